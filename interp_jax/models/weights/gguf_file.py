"""A GGUF file as it is: header, table of tensors, bytes; nothing renamed, nothing reordered.

A GGUF file is a header of typed keys and values, a table of tensors, and their bytes, mostly quantised in blocks. The
quantised formats are the `gguf` package's. The header is parsed here, since that package's reader makes a handful of
arrays for each of 98 thousand strings of a vocabulary (seconds, against a tenth of one) and does not say what is wrong
with a damaged file.

>>> import tempfile
>>> with tempfile.NamedTemporaryFile() as file:
...     _ = file.write(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))          # version 3, no tensors, no keys
...     file.flush()
...     open_file(Path(file.name)).metadata
{}

Sharp edges: numbers that were float32 in the header are given as the shortest decimal that is the same float32 (1e-05,
not 9.999999747378752e-06).

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import LoadError, UnsupportedModelError, four_part
from interp_jax.models.weights.checkpoint import read_values

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# Types of header values: the number that stands in the file, and how its bytes read.
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9

_CHUNK_BYTES = 1 << 16  # quantised bytes dequantised at once: what the steps between need stays in the cache


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One row of the file's table of tensors.

    Attributes:
        shape: The shape in numpy's order (the file has it reversed).
        kind: How the values are stored.
        start: The first of its bytes, counted from the start of the file.
        n_bytes: How many there are.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file: its header, parsed, and its bytes, mapped but not read.

    Attributes:
        path: The file.
        metadata: The header's keys and values.
        entries: The tensors under the names the file gives them.
        data: All bytes of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    data: np.ndarray

    def tensor(self, name: str) -> np.ndarray:
        """The values of tensor `name` as float32, in the layout of the file."""
        return self.rows(name, 0, self.entries[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The values of tensor `name` with `start <= index < stop` on the first axis, as float32.

        Args:
            name: The name the file gives it.
            start: The first row.
            stop: The row after the last.

        Returns:
            The values; nothing of the file stays in memory.

        Raises:
            LoadError: The file has become shorter since it was opened.
        """
        entry = self.entries[name]
        row_bytes = entry.n_bytes // max(1, entry.shape[0])
        # Read, not mapped: pages of a mapped file would count as memory of this process.
        data = read_values(self.path, np.dtype(np.uint8), (stop - start) * row_bytes, entry.start + start * row_bytes)
        return dequantised(data, entry.kind, (stop - start, *entry.shape[1:]))


def open_file(path: Path) -> GgufFile:
    """Parse the header of a GGUF file and map its bytes.

    Args:
        path: The file.

    Returns:
        The file, none of whose tensors is read yet.

    Raises:
        LoadError: The file is missing, damaged, truncated, or no GGUF file.
    """
    if not path.is_file():
        raise LoadError(
            four_part(
                f"No such file {path.name!r}",
                where=str(path.parent),
                expected="a GGUF file.",
                fix="check the path.",
            )
        )
    try:
        if path.stat().st_size < 24:
            raise _DamageError("it is shorter than the shortest header")
        data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)  # whose slices are cheaper
        cursor = _Cursor(data)
        metadata, entries = _parsed(cursor)
    except _DamageError as damage:
        raise LoadError(
            four_part(
                f"Not a whole GGUF file: {damage}",
                where=str(path),
                expected="a complete GGUF file, version 2 or 3, little-endian.",
                fix="download the file again and compare its size and checksum.",
            )
        ) from None
    return GgufFile(path, metadata, entries, data)


def dequantised(data: np.ndarray, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values of a tensor's bytes.

    Args:
        data: Its bytes, uint8.
        kind: How they store values.
        shape: The shape of the tensor; blocks run along the last axis.

    Returns:
        A new array, never a view of the file.

    Raises:
        UnsupportedModelError: The `gguf` package cannot dequantise this kind.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    plain = {
        GGMLQuantizationType.F32: np.float32,
        GGMLQuantizationType.F16: np.float16,
        GGMLQuantizationType.F64: np.float64,
    }
    if kind in plain:
        return data.view(plain[kind]).reshape(shape).astype(np.float32)
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = data.reshape(-1, block_bytes)
    values = np.empty((len(blocks), block_values), np.float32)
    step = max(1, _CHUNK_BYTES // block_bytes)
    try:
        for start in range(0, len(blocks), step):
            # As one long row: the package loops in Python over every 16 rows.
            row = blocks[start : start + step].reshape(1, -1)
            values[start : start + step] = dequantize(row, kind).reshape(-1, block_values)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            four_part(
                f"Values stored as {kind.name}",
                where="a GGUF file",
                expected="a kind the installed `gguf` package can dequantise.",
                fix="update `gguf`, or use a file of another quantisation (Q8_0, Q4_1, F16, ...).",
            )
        ) from error
    return values.reshape(shape)


class _DamageError(Exception):
    """What is wrong with the file, as half a sentence."""


class _Cursor:
    """Reads values one after the other and knows where the file ends."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        # A view on the bytes as they are: slices of it cost a tenth of numpy's.
        self._bytes = data.data
        self.position = 0

    def bytes(self, n: int) -> memoryview:
        """The next `n` bytes."""
        start, self.position = self.position, self.position + n
        if self.position > len(self._bytes):
            raise _DamageError(f"it ends after {len(self._bytes):,} bytes, in the middle of its header")
        return self._bytes[start : self.position]

    def unsigned(self, n_bytes: int = 8) -> int:
        """The next unsigned integer."""
        return int.from_bytes(self.bytes(n_bytes), "little")

    def string(self) -> str:
        """The next string."""
        raw = self.bytes(self.unsigned())
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise _DamageError(f"the string before byte {self.position:,} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """The next header value of type number `kind`."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, n = self.unsigned(4), self.unsigned()
            if item in _SCALARS:
                dtype = np.dtype(_SCALARS[item])
                return _decimals(np.frombuffer(self.bytes(n * dtype.itemsize), dtype))
            return [self.value(item) for _ in range(n)]
        if kind not in _SCALARS:
            raise _DamageError(f"value type {kind} before byte {self.position:,} does not exist")
        dtype = np.dtype(_SCALARS[kind])
        return _decimals(np.frombuffer(self.bytes(dtype.itemsize), dtype))[0]


def _decimals(values: np.ndarray) -> list[Any]:
    """Numbers as Python's; a float32 as the shortest decimal that is the same float32."""
    if values.dtype == np.float32:
        return [float(str(value)) for value in values]
    return values.tolist()


def _parsed(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Header values and table of tensors."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    magic = bytes(cursor.bytes(4))
    if magic != b"GGUF":
        raise _DamageError(f"it begins with {magic!r}, not with b'GGUF'")
    version = cursor.unsigned(4)
    if version not in (2, 3):
        is_big_endian = version & 0xFFFF == 0
        raise _DamageError("it is big-endian" if is_big_endian else f"its version is {version}")
    n_tensors, n_values = cursor.unsigned(), cursor.unsigned()
    metadata = {}
    for _ in range(n_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.unsigned(4))
    rows = []
    for _ in range(n_tensors):
        name = cursor.string()
        shape = tuple(cursor.unsigned() for _ in range(cursor.unsigned(4)))[::-1]
        rows.append((name, shape, cursor.unsigned(4), cursor.unsigned()))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _DamageError(f"its alignment is {alignment!r:.60}")
    first = -(-cursor.position // alignment) * alignment
    entries = {}
    for name, shape, kind_number, offset in rows:
        if name in entries:
            raise _DamageError(f"it has tensor {name!r} twice")
        try:
            kind = GGMLQuantizationType(kind_number)
        except ValueError:
            raise _DamageError(f"tensor {name!r} has the unknown storage type {kind_number}") from None
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
        n = 1
        for size in shape:
            n *= size
        if not shape or shape[-1] % block_values:
            raise _DamageError(f"tensor {name!r} of shape {shape} is not made of whole {kind.name} blocks")
        entries[name] = TensorEntry(shape, kind, first + offset, n // block_values * block_bytes)
    end, last = max(((entry.start + entry.n_bytes, name) for name, entry in entries.items()), default=(0, ""))
    if end > len(cursor.data):
        raise _DamageError(f"it ends after {len(cursor.data):,} bytes, but tensor {last!r} reaches to byte {end:,}")
    return metadata, entries
