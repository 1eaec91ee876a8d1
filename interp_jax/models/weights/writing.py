"""Hugging Face directories, written: whole or not at all, one tensor in memory at a time.

Everything is written into a hidden directory beside the target, which gets the target's name once all of it is on
disk. Whatever happens before, a full disk or a signal, what stood there before still stands.

>>> import tempfile
>>> from interp_jax.models.weights.safetensors import read_checkpoint
>>> with tempfile.TemporaryDirectory() as parent:
...     tensors = Tensors.from_arrays({"wte.weight": np.ones((5, 2), np.float32)})
...     written = write_directory(Path(parent, "model"), {"config.json": b'{"model_type": "gpt2"}'}, tensors)
...     read_checkpoint(written).tensors["wte.weight"].shape
(5, 2)

Sharp edges: two renames replace a directory that exists; a crash between them leaves the old one beside it under a
hidden name.

Source: https://huggingface.co/docs/safetensors (format), Hugging Face's index of several files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from interp_jax.core.errors import ExportError, InvalidInputError, four_part
from interp_jax.models.weights.checkpoint import Tensors
from interp_jax.models.weights.safetensors import DTYPES, INDEX, SINGLE

MAX_FILE_BYTES = 5_000_000_000


def write_directory(
    directory: Path,
    files: Mapping[str, bytes],
    tensors: Tensors,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a model directory.

    Args:
        directory: Where; it must not exist, or be empty, unless `overwrite`.
        files: Contents of the other files, by name.
        tensors: The weights, by name.
        max_file_bytes: Weights beyond this are cut into several files with an index.
        overwrite: Whether to replace a model directory that is there.

    Returns:
        The directory.

    Raises:
        InvalidInputError: Something is there, and it is not a model directory or not to be replaced.
        ExportError: It could not be written; nothing has changed.
    """
    return write_whole(
        directory,
        lambda part: _write(part, files, tensors, max_file_bytes),
        n_bytes=sum(map(tensors.n_bytes, tensors)),
        verb="export",
        mark="config.json",
        noun="model",
        overwrite=overwrite,
    )


def write_whole(
    directory: Path,
    write: Callable[[Path], None],
    *,
    n_bytes: int,
    verb: str,
    mark: str,
    noun: str,
    overwrite: bool = False,
) -> Path:
    """Give a directory its name once everything in it is on disk.

    Args:
        directory: Where; it must not exist, or be empty, unless `overwrite`.
        write: Puts the files into the directory it is given.
        n_bytes: How much that is, about.
        verb: The public call, for messages.
        mark: The file by which a directory that may be replaced is known.
        noun: What is written, for messages.
        overwrite: Whether to replace such a directory.

    Returns:
        The directory.

    Raises:
        InvalidInputError: Something is there, and it has no `mark` or is not to be replaced.
        ExportError: It could not be written; nothing has changed.
    """
    directory = Path(os.path.abspath(directory.expanduser()))
    _check_target(directory, verb, mark, noun, overwrite)
    try:
        publish_whole(directory, write, n_bytes=n_bytes)
    except OSError as error:
        raise ExportError(
            four_part(
                f"Cannot write the {noun} ({error})",
                where=str(directory),
                expected=f"a directory that may be written to, with {n_bytes / 1e6:,.0f} MB of room beside it.",
                fix="free some space or choose another directory; nothing there has changed.",
            )
        ) from error
    return directory


def publish_whole(directory: Path, write: Callable[[Path], None], *, n_bytes: int) -> None:
    """Write into a directory beside its place, and move it there once everything is in it.

    Args:
        directory: Where; what is there is replaced.
        write: Puts the files into the directory it is given.
        n_bytes: How much that is, about.

    Raises:
        OSError: There is no room, or it could not be written; nothing has changed.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    if n_bytes > (n_free := shutil.disk_usage(directory.parent).free):
        raise OSError(f"{n_bytes / 1e6:,.0f} MB to write, {n_free / 1e6:,.0f} MB free")
    part = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-part-"))
    try:
        write(part)
        _publish(part, directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # gone already if all went well


def _check_target(directory: Path, verb: str, mark: str, noun: str, overwrite: bool) -> None:
    """Refuse to write over anything that is not asked for."""
    if not os.path.lexists(directory) or (directory.is_dir() and not any(directory.iterdir())):
        return
    is_known = (directory / mark).is_file()
    if overwrite and is_known:
        return
    known = f"a {noun} directory"
    what = known if is_known else "a directory with other files" if directory.is_dir() else "a file"
    raise InvalidInputError(
        four_part(
            f"{what.capitalize()} is there already",
            where=f"{verb}({str(directory)!r})",
            expected="a directory that does not exist yet, or an empty one"
            + (f"; {known} is replaced with overwrite=True." if is_known else "."),
            fix="pass overwrite=True, or choose another directory." if is_known else "choose another directory.",
        )
    )


def _write(part: Path, files: Mapping[str, bytes], tensors: Tensors, max_file_bytes: int) -> None:
    """All files, into a directory of their own."""
    groups = _grouped(tensors, max_file_bytes)
    weight_map = {}
    for i, names in enumerate(groups):
        file = SINGLE if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        _write_tensors(part / file, names, tensors)
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(map(tensors.n_bytes, tensors))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files = {**files, INDEX: (json.dumps(index, indent=2) + "\n").encode()}
    for name, content in files.items():
        write_file(part / name, content)


def _grouped(tensors: Tensors, max_file_bytes: int) -> list[list[str]]:
    """Names by file: wider types first, so that all lie at multiples of their size, and none beyond the limit."""
    groups: list[list[str]] = [[]]
    room = max_file_bytes
    for name in sorted(tensors, key=lambda name: (-tensors.dtype(name).itemsize, name)):
        if groups[-1] and tensors.n_bytes(name) > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= tensors.n_bytes(name)
    return groups


def _write_tensors(path: Path, names: Sequence[str], tensors: Tensors) -> None:
    """One safetensors file."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers refuses the file
    end = 0
    for name in names:
        start, end = end, end + tensors.n_bytes(name)
        code, shape = codes[tensors.dtype(name)], list(tensors.shape(name))
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            values = np.ascontiguousarray(tensors[name], dtype=tensors.dtype(name)).reshape(-1)
            stream.write(values.view(np.uint8).data)
        _sync(stream)


def write_file(path: Path, contents: bytes | Tensors) -> None:
    """Write `contents`, bytes or the tensors of a safetensors file, to `path`, and wait until they are on disk."""
    if isinstance(contents, Tensors):
        _write_tensors(path, sorted(contents, key=lambda name: (-contents.dtype(name).itemsize, name)), contents)
        return
    with open(path, "wb") as stream:
        stream.write(contents)
        _sync(stream)


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _publish(part: Path, directory: Path) -> None:
    """Give a finished directory its name."""
    umask = os.umask(0)
    os.umask(umask)
    part.chmod(0o777 & ~umask)  # made private for the time of writing
    if not directory.exists() or not any(directory.iterdir()):
        part.rename(directory)  # takes the place of an empty directory
        return
    old = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-old-"))
    directory.rename(old)
    try:
        part.rename(directory)
    except BaseException:
        old.rename(directory)
        raise
    with contextlib.suppress(OSError):
        shutil.rmtree(old)
