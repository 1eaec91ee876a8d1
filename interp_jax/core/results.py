"""Results on disk: a directory that says what was computed, from what, by which code.

`save_result` writes `runs/<name>/<time>_<hash>/` with the configuration, the result, the interventions as data, the
figures, and where all of it came from. The directory appears under its name only when it is complete: a full disk
or a kill leaves no half result behind.

>>> import tempfile
>>> import numpy as np
>>> with tempfile.TemporaryDirectory() as runs:
...     path = save_result({"effect": np.array([0.5, -1.0])}, name="zeroing", config={"layer": 5}, root=runs)
...     saved = load_result(path)
>>> saved.result["effect"], saved.config
(array([ 0.5, -1. ]), {'layer': 5})

A result is a nest of mappings, sequences and dataclasses around arrays, numbers, strings, booleans, None, Sites,
`Masked` and `Added`. Arrays go to `arrays.npz`, all else to JSON that refers to them.

Sharp edges: what is read back is plain data. Dataclasses come back as dicts, tuples as lists, Sites as strings (which
are selectors too), JAX arrays as NumPy arrays. Functions and PRNG keys are refused: save what they were made of.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, LoadError, four_part
from interp_jax.core.interventions import Added, Masked
from interp_jax.core.provenance import provenance
from interp_jax.core.sites import Site

FORMAT = 1
_RESERVED = ("config.json", "result.json", "interventions.json", "arrays.npz", "provenance.json")


@dataclass(frozen=True, repr=False)
class SavedResult:
    """A result read back from its directory.

    Args:
        path: The directory.
        result: The result, as plain data.
        config: The configuration, as plain data.
        interventions: The interventions, as plain data, `Masked` and `Added`; None when none were saved.
        provenance: Commit, versions, device, seeds, command line, time, digests of the files.
    """

    path: Path
    result: Any
    config: Any
    interventions: Any
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        entries = self.result.items() if isinstance(self.result, dict) else [("result", self.result)]
        lines = [f"SavedResult({str(self.path)!r}, saved {self.provenance['time']})", f"  config: {self.config}"]
        return "\n".join(lines + [f"  {name}: {_summary(value)}" for name, value in entries])


def save_result(
    result: Any,
    *,
    name: str,
    config: Any = None,
    interventions: Any = None,
    figures: Mapping[str, Any] | None = None,
    patch_digests: Mapping[str, Any] | None = None,
    seeds: Mapping[str, int] | None = None,
    root: str | os.PathLike[str] = "runs",
) -> Path:
    """Write a result with everything needed to tell where it came from.

    Args:
        result: A nest of mappings, sequences and dataclasses around arrays, numbers and strings.
        name: What was computed: letters, digits, "_", "-" and ".".
        config: What it was computed with, in the same form; its digest is part of the directory's name.
        interventions: Selector -> array, `Masked` or `Added`, as they were applied.
        figures: File name -> a Matplotlib figure, text (HTML, SVG) or bytes.
        patch_digests: Patch set -> the digests of the upstream functions it patched.
        seeds: What each seed was for -> the seed.
        root: The folder that holds all results.

    Returns:
        The new directory.

    Raises:
        InvalidInputError: A name is no plain file name, or something in the result cannot be saved.
    """
    figures = dict(figures or {})
    for file in (name, *figures):
        _check_name(file)
    arrays: dict[str, np.ndarray] = {}
    documents = {"config": _encode(config, "config", arrays), "result": _encode(result, "result", arrays)}
    if interventions is not None:
        documents["interventions"] = _encode(interventions, "interventions", arrays)
    origin = provenance(patch_digests=patch_digests, seeds=seeds)
    now = datetime.datetime.now(datetime.UTC)
    config_digest = hashlib.sha256(_json(documents["config"])).hexdigest()[:8]

    parent = Path(root) / name
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
    try:
        for stem, document in documents.items():
            (folder / f"{stem}.json").write_bytes(_json(document))
        if arrays:
            np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
        for file, figure in figures.items():
            _write_figure(folder / file, figure)
        origin |= {"format": FORMAT, "name": name, "time": now.isoformat(timespec="seconds")}
        origin["files"] = {path.name: _digest(path) for path in sorted(folder.iterdir())}
        (folder / "provenance.json").write_bytes(_json(_encode(origin, "provenance", {})))
        return _publish(folder, parent / f"{now:%Y%m%d-%H%M%S}_{config_digest}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def load_result(path: str | os.PathLike[str]) -> SavedResult:
    """Read back what `save_result` wrote, checking every file against its digest.

    Args:
        path: The result's directory.

    Returns:
        The result, its configuration and provenance.

    Raises:
        LoadError: There is no such directory, it is no result, or a file in it is missing or damaged.
    """
    folder = Path(path)
    where = f"load_result({str(path)!r})"
    if not folder.is_dir():
        beside = sorted(entry.name for entry in folder.parent.glob("*") if entry.is_dir())
        raise LoadError(
            four_part(
                f"There is no directory {folder.name!r}",
                where=where,
                names=[name for name in beside if not name.startswith(".")],
                given=folder.name,
                fix="give a directory that save_result returned.",
            )
        )
    try:
        record = json.loads((folder / "provenance.json").read_bytes())
        version, files = record["format"], record["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(f"provenance.json ({type(error).__name__}: {error})", where) from error
    if version != FORMAT:
        raise LoadError(
            four_part(
                f"A result of format {version!r} was given",
                where=where,
                expected=f"format {FORMAT}.",
                fix="read it with the version of interp-jax that wrote it (see versions in its provenance.json).",
            )
        )
    faults = {file: _fault(folder / file, digest) for file, digest in files.items()}
    if any(faults.values()):
        raise _damaged(", ".join(f"{file} ({fault})" for file, fault in faults.items() if fault), where)
    arrays: dict[str, np.ndarray] = {}
    if "arrays.npz" in files:
        with np.load(folder / "arrays.npz", allow_pickle=False) as archive:
            arrays = dict(archive)

    def document(stem: str) -> Any:
        file = f"{stem}.json"
        return _decode(json.loads((folder / file).read_bytes()), arrays) if file in files else None

    return SavedResult(folder, document("result"), document("config"), document("interventions"), _decode(record, {}))


def _check_name(name: str) -> None:
    is_plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is not None
    if not is_plain or name in _RESERVED:
        raise InvalidInputError(
            four_part(
                f"The name {name!r} was given",
                where="save_result",
                expected='letters, digits, "_", "-" and ".", the first a letter or a digit, and none of '
                f"{', '.join(_RESERVED)}.",
                fix="name what was computed or drawn, without folders; `root` says where it goes.",
            )
        )


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """`value` as JSON data; its arrays are put into `arrays` and referred to by name."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # JSON has no such numbers, and other readers refuse the names Python writes for them.
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, (Site, os.PathLike)):
        return str(value)
    if isinstance(value, Masked):
        parts = {"value": value.value, "mask": value.mask}
        return {"$masked": {key: _encode(part, f"{path}/{key}", arrays) for key, part in parts.items()}}
    if isinstance(value, Added):
        return {"$added": {key: _encode(part, f"{path}/{key}", arrays) for key, part in vars(value).items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        names = [str(key) if isinstance(key, (str, Site)) else None for key in value]
        if None in names or len(set(names)) < len(names):
            raise _unsavable(f"A mapping with the keys {list(value)!r} was given", path)
        # A dollar at the start marks what this function adds; one of the user's is doubled.
        return {
            f"${name}" if name.startswith("$") else name: _encode(part, f"{path}/{name}", arrays)
            for name, part in zip(names, value.values(), strict=True)
            if name is not None
        }
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [_encode(part, f"{path}/{i}", arrays) for i, part in enumerate(value)]
    if hasattr(value, "__array__") and not _is_key(value):
        array = np.asarray(value)
        if array.dtype != object:
            while path in arrays:  # {"a/b": ...} beside {"a": {"b": ...}}
                path += "~"
            arrays[path] = array
            return {"$array": path, "dtype": array.dtype.name}
    raise _unsavable(f"A value of type {type(value).__name__} was given", path)


def _decode(document: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(document, list):
        return [_decode(part, arrays) for part in document]
    if not isinstance(document, dict):
        return document
    if "$float" in document:
        return float(document["$float"])
    if "$array" in document:
        array = arrays[document["$array"]]
        # The file format knows NumPy's own dtypes only: bfloat16 and its like come back as raw bytes.
        return array.view(document["dtype"]) if array.dtype.kind == "V" else array
    if "$masked" in document:
        return Masked(**{name: _decode(part, arrays) for name, part in document["$masked"].items()})
    if "$added" in document:
        return Added(**{name: _decode(part, arrays) for name, part in document["$added"].items()})
    return {name.removeprefix("$"): _decode(part, arrays) for name, part in document.items()}


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _unsavable(what: str, path: str) -> InvalidInputError:
    return InvalidInputError(
        four_part(
            what,
            where=f"save_result, at {path}",
            expected="mappings with distinct string keys, sequences, dataclasses, arrays, numbers, strings, None, "
            "Sites, Masked, Added.",
            fix="save what it was made of: the numbers behind a function, the seed behind a PRNG key.",
        )
    )


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(path: Path, digest: str) -> str | None:
    if not path.is_file():
        return "missing"
    return None if _digest(path) == digest else "not as it was saved"


def _damaged(offenders: str, where: str) -> LoadError:
    return LoadError(
        four_part(
            f"A result directory with unusable files was given: {offenders}",
            where=where,
            expected="the files that save_result wrote, unchanged.",
            fix="copy the directory again from where it was saved, or run the experiment again.",
        )
    )


def _write_figure(path: Path, figure: Any) -> None:
    if isinstance(figure, bytes):
        path.write_bytes(figure)
    elif isinstance(figure, str):
        path.write_text(figure, encoding="utf-8")
    elif hasattr(figure, "savefig"):
        figure.savefig(path)
    else:
        raise _unsavable(f"A figure of type {type(figure).__name__} was given", f"figures/{path.name}")


def _publish(folder: Path, final: Path) -> Path:
    """Give a finished folder its name, or the name with a number when another result took it this second."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)  # made private for the time of writing
    for number in range(1, 1000):
        target = final if number == 1 else final.with_name(f"{final.name}-{number}")
        try:
            return folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise FileExistsError(errno.EEXIST, "a thousand results of this name in one second", str(final))


def _summary(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.size > 8:
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
