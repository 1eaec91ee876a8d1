"""The tensors in a file that torch wrote, read without torch and without running what a pickle asks for.

A `.pt` file is a zip of a pickle and of raw storages. A pickle may call any function of any installed module. Here
it may name the handful that tensors are made of, which are replaced by our own, and a type of storage; every other
name is an error before anything is called.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     with zipfile.ZipFile(Path(folder, "ae.pt"), "w") as archive:
...         archive.writestr("ae/data.pkl", pickle.dumps(print))
...     read_tensors(Path(folder, "ae.pt"))
Traceback (most recent call last):
interp_jax.core.errors.LoadError: A pickle that asks for builtins.print in .../ae.pt.
  Expected: ...

Sharp edges: files of torch before 1.6 are no zips and are refused. Only a dict of tensors is read, not a module.

Source: https://docs.pytorch.org/docs/stable/notes/serialization.html (the layout of the file).
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from interp_jax.core.errors import LoadError, four_part
from interp_jax.models.weights.checkpoint import Tensors

_DTYPES: Mapping[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MAX_PICKLE_BYTES = 1 << 24  # a state dict has some bytes for each tensor; its values lie outside


@dataclass(frozen=True)
class _StorageType:
    """Stands for a class of storages."""

    dtype: np.dtype


@dataclass(frozen=True)
class _Tensor:
    """Stands for a tensor: where in a storage its values lie."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _Dict(dict):
    """Stands for an OrderedDict; its attributes (versions of modules) are dropped."""

    def __setstate__(self, state: Any) -> None:
        del state


class _RefusedError(Exception):
    """A name that a pickle may not ask for, or one used in a way no tensor is."""


def _rebuild_tensor(*args: Any) -> _Tensor:
    if len(args) < 4:
        raise _RefusedError("a tensor of too few parts")
    return _Tensor(*args[:4])


def _rebuild_parameter(*args: Any) -> Any:
    return args[0]


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(np.dtype(dtype)) for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows the names in `_ALLOWED` and no other."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any, /) -> Any:
        is_storage = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"
        if not is_storage or not isinstance(pid[1], _StorageType) or not isinstance(pid[2], str):
            raise _RefusedError(f"the storage {pid!r:.60}")
        return pid[1].dtype, pid[2]


def read_tensors(path: Path) -> Tensors:
    """The tensors of a state dict.

    Args:
        path: A file written by `torch.save`.

    Returns:
        The tensors, in memory.

    Raises:
        LoadError: It is no such file, is damaged, or asks for anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = _root(archive)
            document = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl"))).load()
            if not isinstance(document, dict) or not all(
                isinstance(name, str) and isinstance(part, _Tensor) for name, part in document.items()
            ):
                raise ValueError("it holds something else than tensors by name")
            arrays = {name: _array(archive, root, tensor) for name, tensor in document.items()}
    except _RefusedError as error:
        raise LoadError(
            four_part(
                f"A pickle that asks for {error}",
                where=str(path),
                expected="a dict of tensors, as torch.save(module.state_dict(), path) writes it.",
                fix="do not load this file with torch.load either unless you trust who made it; ask for its state "
                "dict, or for safetensors.",
            )
        ) from None
    except Exception as error:  # a pickle of anything can fail in any way
        raise LoadError(
            four_part(
                f"An unreadable torch file ({type(error).__name__}: {error})",
                where=str(path),
                expected="a zip with data.pkl and the storages it refers to, as torch writes since version 1.6.",
                fix="download the file again; one of an older torch: torch.save(torch.load(path), path).",
            )
        ) from error
    return Tensors.from_arrays(arrays)


def _root(archive: zipfile.ZipFile) -> str:
    """The folder inside the archive that everything is in; the archive is checked."""
    found = [info.filename for info in archive.infolist() if info.filename.endswith("data.pkl")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} files called data.pkl in it")
    if archive.getinfo(found[0]).file_size > _MAX_PICKLE_BYTES:
        raise ValueError("a pickle too large for one that refers to tensors")
    # Torch compresses nothing; what is compressed could be a bomb.
    if packed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(f"compressed members: {', '.join(packed[:3])}")
    root = found[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and (order := archive.read(f"{root}byteorder")) != b"little":
        raise ValueError(f"the byte order {order!r:.20}")
    return root


def _array(archive: zipfile.ZipFile, root: str, tensor: _Tensor) -> np.ndarray:
    """The values of a tensor, inside its storage."""
    dtype, key = tensor.storage
    counts = [tensor.offset, *tensor.shape, *tensor.strides]
    if not all(isinstance(count, int) and count >= 0 for count in counts) or len(tensor.shape) != len(tensor.strides):
        raise ValueError(f"a tensor of shape {tensor.shape!r:.60} and strides {tensor.strides!r:.60}")
    values = np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
    size = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if size and (last >= values.size or size > values.size):
        raise ValueError(f"a tensor of shape {tensor.shape!r:.60} that reaches beyond its storage")
    if not size:
        return np.zeros(tensor.shape, dtype)
    strides = [step * dtype.itemsize for step in tensor.strides]
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides, writeable=False)
    return np.ascontiguousarray(view).reshape(tensor.shape)
