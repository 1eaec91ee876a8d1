"""Torch's files without torch: the tensors as torch had them, and nothing run.

The files were written by torch (tests/oracles/record_sae_files.py).

Source: interp_jax.
"""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp_jax.core.errors import LoadError
from interp_jax.methods.sae.files import torch_pickle
from interp_jax.methods.sae.files.torch_pickle import read_tensors
from tests.conftest import ORACLES

TORCH = ORACLES / "sae_files" / "torch"


def test_tensors_are_those_torch_saved() -> None:
    tensors = read_tensors(TORCH / "tensors.pt")
    with np.load(TORCH / "tensors.npz") as known:
        assert set(tensors) == set(known.files)
        for name in tensors:
            assert tensors.shape(name) == known[name].shape
            np.testing.assert_array_equal(tensors[name].astype(np.float32), known[name])
    dtypes = {name: tensors.dtype(name).name for name in ("float64", "float16", "bfloat16", "int64", "int32", "bool")}
    assert dtypes == {name: name for name in dtypes}


def test_a_modules_own_dict_is_read() -> None:
    tensors = read_tensors(TORCH / "state_dict.pt")
    assert {name: tensors.shape(name) for name in tensors} == {"weight": (2, 3), "bias": (2,)}


def test_what_is_not_a_dict_of_tensors_is_refused() -> None:
    with pytest.raises(LoadError, match=r"A pickle that asks for torch.nn.modules.linear.Linear in .*module.pt"):
        read_tensors(TORCH / "module.pt")
    with pytest.raises(LoadError, match=r"An unreadable torch file \(BadZipFile: .*") as caught:
        read_tensors(TORCH / "before_1_6.pt")
    assert "since version 1.6" in str(caught.value)
    with pytest.raises(LoadError, match="reaches beyond its storage"):
        read_tensors(TORCH / "expanded.pt")


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


class Setting(dict):
    """Pickles as a dict whose attributes are set afterwards."""


def archive(path: Path, document: bytes, *, storages: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A torch file around a pickle."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("ae/data.pkl", document)
        file.writestr("ae/byteorder", "little")
        for key, content in (storages or {}).items():
            file.writestr(f"ae/data/{key}", content)
    return path


def test_nothing_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    command = f"touch {mark}"
    dangers = {
        "posix.system": pickle.dumps({"x": Calls(os.system, command)}),
        "subprocess.Popen": pickle.dumps(Calls(subprocess.Popen, command)),
        "__builtin__.eval": pickle.dumps([Calls(builtins.eval, f"open({str(mark)!r}, 'w')")], 0),
        "shutil.rmtree": pickle.dumps(Calls(shutil.rmtree, str(tmp_path))),
        "collections.deque": pickle.dumps(collections.deque([1])),
        "torch.storage._load_from_bytes": b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        "torch.load": b"ctorch\nload\n(S'x'\ntR.",
        "torch._utils._rebuild_wrapper_subclass": b"ctorch._utils\n_rebuild_wrapper_subclass\n.",
        "os.system": b"(S'touch'\nios\nsystem\n.",
        f"{__name__}.Setting": pickle.dumps(Setting()),
    }
    for name, document in dangers.items():
        with pytest.raises(LoadError, match=f"A pickle that asks for {name} in") as caught:
            read_tensors(archive(tmp_path / "ae.pt", document))
        assert "do not load this file with torch.load either" in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ae.pt"]


class Stored:
    """Pickles as torch's tensors do, with any numbers."""

    def __init__(self, offset: Any, shape: Any, strides: Any, pid: Any = ("storage", "FloatStorage", "0", "cpu", 4)):
        self.parts = (offset, shape, strides)
        self.pid = pid


def pickled(stored: Stored) -> bytes:
    """A dict of one tensor as torch would pickle it, names as they are."""
    output = io.BytesIO()
    # By hand: the standard pickler insists on importing what it names.
    output.write(b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n(")
    kind, storage, *rest = stored.pid
    output.write(b"(" + _plain(kind) + f"ctorch\n{storage}\n".encode() + b"".join(map(_plain, rest)) + b"tQ")
    output.write(b"".join(map(_plain, stored.parts)) + b"\x89ccollections\nOrderedDict\n)RtRs.")
    return output.getvalue()


def _plain(value: Any) -> bytes:
    """The opcodes of a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def test_a_tensor_by_hand(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    path = archive(tmp_path / "a.pt", pickled(Stored(1, (3,), (1,))), storages={"0": values.tobytes()})
    np.testing.assert_array_equal(read_tensors(path)["x"], values[1:])


@pytest.mark.parametrize(
    "stored",
    [
        Stored(2, (3,), (1,)),
        Stored(-1, (1,), (1,)),
        Stored(0, (2, 2), (1,)),
        Stored(0, (2,), (-1,)),
        Stored(0, (1 << 40,), (0,)),
        Stored(0, ("a",), (1,)),
        Stored(0, 3, 1),
        Stored(0.5, (1,), (1,)),
        Stored(0, (1,), (1,), ("storage", "FloatStorage", "../../x", "cpu", 4)),
        Stored(0, (1,), (1,), ("module", "FloatStorage", "0", "cpu", 4)),
        Stored(0, (1,), (1,), ("storage", "QInt8Storage", "0", "cpu", 4)),
        Stored(0, (1,), (1,), ("storage", "FloatStorage", 0, "cpu", 4)),
    ],
    ids=range(12),
)
def test_tensors_outside_their_storage_are_refused(stored: Stored, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", pickled(stored), storages={"0": np.arange(4, dtype=np.float32).tobytes()})
    with pytest.raises(LoadError):
        read_tensors(path)


def test_other_archives_are_refused(tmp_path: Path) -> None:
    document, storages = pickled(Stored(0, (4,), (1,))), {"0": bytes(16)}
    packed = archive(tmp_path / "a.pt", document, storages=storages, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(LoadError, match=r"compressed members: ae/data\.pkl"):
        read_tensors(packed)
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
        file.writestr("ae/weights", "")
    with pytest.raises(LoadError, match=r"0 files called data\.pkl"):
        read_tensors(tmp_path / "b.pt")
    with pytest.raises(LoadError, match="it holds something else than tensors by name"):
        read_tensors(archive(tmp_path / "c.pt", pickle.dumps({"x": 3})))
    with pytest.raises(LoadError, match="FileNotFoundError"):
        read_tensors(tmp_path / "none.pt")
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as file:
        file.writestr("ae/data.pkl", document)
        file.writestr("ae/byteorder", "big")
    with pytest.raises(LoadError, match="the byte order b'big'"):
        read_tensors(tmp_path / "d.pt")


def test_a_pickle_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "_MAX_PICKLE_BYTES", 10)
    with pytest.raises(LoadError, match="a pickle too large"):
        read_tensors(archive(tmp_path / "a.pt", pickled(Stored(0, (4,), (1,)))))


def test_damage_is_an_error_of_ours(rng: np.random.Generator, tmp_path: Path) -> None:
    whole = (TORCH / "state_dict.pt").read_bytes()
    for i in range(150):
        content = bytearray(whole)
        for at in rng.integers(len(content), size=3):
            content[at] = int(rng.integers(256))
        (tmp_path / "a.pt").write_bytes(content if i % 3 else content[: rng.integers(len(content))])
        try:
            tensors = read_tensors(tmp_path / "a.pt")
        except LoadError:
            continue
        assert all(array.size <= len(whole) for array in tensors.values())
