"""A Hugging Face model directory as a `Checkpoint`.

The directory holds `config.json`, the weights in `model.safetensors` or in several files named by
`model.safetensors.index.json`, and perhaps a tokenizer. The headers of all files are read and compared first; the
values are read tensor by tensor as they are taken.

>>> import json, tempfile
>>> import numpy as np
>>> from safetensors.numpy import save_file
>>> with tempfile.TemporaryDirectory() as directory:
...     _ = Path(directory, "config.json").write_text(json.dumps({"model_type": "gpt2"}))
...     save_file({"wte.weight": np.ones((5, 2), np.float32)}, Path(directory, "model.safetensors"))
...     checkpoint = read_checkpoint(Path(directory))
...     checkpoint.family, checkpoint.tensors.shape("wte.weight")
('gpt2', (5, 2))

Sharp edges: pickled weights (`pytorch_model.bin`) are not read, since reading them runs code they bring along.

Source: https://huggingface.co/docs/safetensors (format); interp_jax (the checks).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from interp_jax.core.errors import LoadError, UnsupportedModelError, closest, four_part, shorten
from interp_jax.models import tokenizers as tokenizer_rules
from interp_jax.models.weights.checkpoint import Checkpoint, LazyTensor, Tensors, read_values
from interp_jax.models.weights.rope_keys import with_older_rope_keys

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "flax_model.msgpack", "tf_model.h5")

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def read_checkpoint(directory: Path, *, source: str | None = None) -> Checkpoint:
    """A Hugging Face model directory as a checkpoint.

    Args:
        directory: Where `config.json` and the weights lie.
        source: What to call it in messages and provenance; the path by default.

    Returns:
        The checkpoint; its tokenizer is None when the directory holds none.

    Raises:
        LoadError: A file is missing, damaged or truncated, or the index and the files contradict each other.
        UnsupportedModelError: The weights are in another format, or of a dtype numpy has no type for.
    """
    source = source or str(directory)
    config = with_older_rope_keys(_read_object(directory / "config.json"))
    family = config.get("model_type")
    if not isinstance(family, str):
        raise LoadError(
            four_part(
                "A config.json without model_type",
                where=source,
                expected='the family of the model, such as "model_type": "gpt2".',
                fix="take the config.json the model was published with.",
            )
        )
    files = _weight_files(directory)
    _check_files(files)
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        tensors |= _open_file(path)
    return Checkpoint(family, config, Tensors(tensors), tokenizer_rules.from_directory(directory), source)


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The files of weights there are to read, and the tensors the index says are in each (None without an index)."""
    if (directory / SINGLE).exists():
        return {directory / SINGLE: None}
    if (directory / INDEX).exists():
        weight_map = _read_object(directory / INDEX).get("weight_map")
        is_map = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
        if not weight_map or not is_map:
            raise LoadError(
                four_part(
                    f"A {INDEX} without weight_map" + (" from tensors to files" if weight_map else ""),
                    where=str(directory),
                    expected="for each tensor the file it is in.",
                    fix="download the file again.",
                )
            )
        files: dict[Path, set[str] | None] = {}
        for name, file in weight_map.items():
            names = files.setdefault(directory / file, set())
            assert names is not None
            names.add(name)
        lacking = [path.name for path in files if not path.exists()]
        if lacking:
            raise LoadError(
                four_part(
                    f"Missing weight files {shorten(lacking)} ({len(lacking)} of {len(files)})",
                    where=str(directory),
                    expected=f"each file that {INDEX} names.",
                    fix="download the missing files, for example with `hf download <model> --local-dir <directory>`.",
                )
            )
        return files
    others = [name for name in _OTHER_WEIGHTS if (directory / name).exists()]
    if others:
        raise UnsupportedModelError(
            four_part(
                f"Weights in {', '.join(others)}",
                where=str(directory),
                expected=f"weights in {SINGLE} or {INDEX}.",
                fix="convert them once: AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory).",
            )
        )
    found = sorted(path.name for path in directory.iterdir())
    if lacking := _lacking_parts(found):
        raise LoadError(
            four_part(
                f"Missing weight files {shorten(lacking)}",
                where=str(directory),
                expected=f"each part of the weights, and {INDEX}, which says what is in it.",
                fix="download the missing files, for example with `hf download <model> --local-dir <directory>`.",
            )
        )
    broken = [path.name for path in directory.iterdir() if path.is_symlink() and not path.exists()]
    near = next((name for name in closest(SINGLE, set(found) - set(broken)) if name.endswith(".safetensors")), None)
    raise LoadError(
        four_part(
            "No file of weights"
            + (f" (links to files that are gone: {shorten(broken)})" if broken else "")
            + (f" (is {near!r} meant to be {SINGLE!r}?)" if near else ""),
            where=str(directory),
            expected=f"{SINGLE} or {INDEX} beside config.json; there is {shorten(found)}.",
            fix="download the weights, for example with `hf download <model> --local-dir <directory>`.",
        )
    )


def _lacking_parts(found: Sequence[str]) -> list[str]:
    """What a directory of weights in several parts lacks; nothing if there is no part of such weights in it."""
    parts = [match for name in found if (match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", name))]
    if not parts:
        return []
    stem, _, total = parts[0].groups()
    # A total that is no number of files is not counted up to.
    n_parts = int(total) if len(total) <= 5 else 0
    names = [f"{stem}-{i + 1:0{len(total)}d}-of-{total}.safetensors" for i in range(n_parts)]
    return [INDEX, *(name for name in names if name not in found)]


def _check_files(files: Mapping[Path, set[str] | None]) -> None:
    """Refuse files that are damaged, or do not hold what the index says, naming all of them."""
    from safetensors import SafetensorError, safe_open

    damaged, contradictions = [], []
    is_pointer = False
    for path, names in files.items():
        try:
            with safe_open(path, framework="numpy") as file:
                found = set(file.keys())
        except (SafetensorError, OSError) as error:
            with path.open("rb") as stream:
                is_pointer = stream.read(40).startswith(b"version https://git-lfs")
            damaged.append(f"{path.name} ({'a Git LFS pointer in place of the file' if is_pointer else error})")
            continue
        if names is not None and names != found:
            contradictions.append(
                f"{path.name} that does not hold what {INDEX} says"
                f" (missing: {shorten(sorted(names - found)) or 'none'};"
                f" not in the index: {shorten(sorted(found - names)) or 'none'})"
            )
    where = str(next(iter(files)).parent)
    if damaged:
        raise LoadError(
            four_part(
                "Damaged weight file " + ", ".join(damaged),
                where=where,
                expected="complete safetensors files.",
                fix="run `git lfs pull`." if is_pointer else "download the file again and compare its size.",
            )
        )
    if contradictions:
        raise LoadError(
            four_part(
                "Weight file " + ",\n  ".join(contradictions),
                where=where,
                expected="in each file the tensors the index maps to it, and no other.",
                fix="download the index and the weight files again, from one revision of the model.",
            )
        )


def open_tensors(path: Path) -> Tensors:
    """The tensors of one file, read when they are looked up.

    Args:
        path: A safetensors file.

    Returns:
        The tensors, in the order of the file.

    Raises:
        LoadError: The file is damaged or truncated.
        UnsupportedModelError: It holds a dtype numpy has no type for.
    """
    _check_files({path: None})
    return Tensors(_open_file(path))


def _open_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, which is known to be whole."""
    # The library checked the file; it is read without it, since what it maps counts as memory of this process.
    with path.open("rb") as stream:
        n_header = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(n_header))
    tensors, strange = {}, []
    for name, entry in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [])):
        if name == "__metadata__":
            continue
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            strange.append(f"{name} ({entry['dtype']})")
            continue
        tensors[name] = _lazy_tensor(path, dtype, tuple(entry["shape"]), 8 + n_header + entry["data_offsets"][0])
    if strange:
        raise UnsupportedModelError(
            four_part(
                f"Tensors of an unknown dtype: {shorten(strange)}",
                where=str(path),
                names=DTYPES,
                fix="convert the weights to float16, bfloat16 or float32.",
            )
        )
    return tensors


def _lazy_tensor(path: Path, dtype: np.dtype, shape: tuple[int, ...], start: int) -> LazyTensor:
    """The tensor that begins at byte `start` of a file."""
    row_shape = shape[1:]
    n_row = math.prod(row_shape)

    def read() -> np.ndarray:
        return read_values(path, dtype, math.prod(shape), start).reshape(shape)

    def read_rows(first: int, stop: int) -> np.ndarray:
        values = read_values(path, dtype, (stop - first) * n_row, start + first * n_row * dtype.itemsize)
        return values.reshape(stop - first, *row_shape)

    return LazyTensor(shape, dtype, read, read_rows if shape else None)


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that has to be there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    except FileNotFoundError:
        raise LoadError(
            four_part(
                f"No {path.name}",
                where=str(path.parent),
                expected="a model directory as Hugging Face's save_pretrained writes it.",
                fix="check the path, or download the missing file.",
            )
        ) from None
    except ValueError as error:
        raise LoadError(
            four_part(
                f"Damaged {path.name} ({error})",
                where=str(path.parent),
                expected="one JSON object.",
                fix="download the file again.",
            )
        ) from error
    return value
