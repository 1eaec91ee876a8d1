"""GGUF files (llama.cpp's format) as a `Checkpoint` in the Hugging Face convention.

A GGUF file is a header of typed keys and values, a table of tensors, and their bytes, mostly quantised in blocks.
`read_checkpoint` maps the header to the keys of a `config.json`, the tensor names to Hugging Face's, dequantises to
float32, and undoes the one change of layout llama.cpp's converter makes: it stores the rows of the q and k projections
of each head as interleaved pairs, where Hugging Face's rotary embedding pairs a row with the one half a head away.

    q_gguf[head, i, half] = q_hf[head, half, i]        half in {0, 1}, i < d_head / 2

The quantised formats are the `gguf` package's. The header is parsed here, since that package's reader makes a handful
of arrays for each of 98 thousand strings of a vocabulary (seconds, against a tenth of one) and takes a truncated file
for a whole one.

>>> import numpy as np
>>> rows = np.arange(8, dtype=np.float32)[:, None]               # one head of 8 rows
>>> unpermuted(rows, n_heads=1)[:, 0].astype(int).tolist()
[0, 2, 4, 6, 1, 3, 5, 7]

Sharp edges: only the llama architecture; header keys of that architecture which are not understood are refused.
Numbers were float32 in the header, so 1e-5 would read 9.999999747e-06: they are given back as the shortest decimal
that is the same float32.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp, convert_hf_to_gguf.py (permutation).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import LoadError, UnsupportedModelError, four_part, shorten
from interp_jax.models import tokenizers as tokenizer_rules
from interp_jax.models.weights.checkpoint import Checkpoint, LazyTensor, Tensors

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# Types of header values: the number that stands in the file, and how its bytes read.
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9

_CHUNK_BYTES = 1 << 16  # quantised bytes dequantised at once: what the steps between need stays in the cache

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

# Header keys of the llama architecture and the config keys they become; the others say nothing about the numbers.
_CONFIG_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
}
_CHECKED_KEYS = {"vocab_size", "rope.dimension_count", "attention.value_length"}
_REQUIRED_KEYS = set(list(_CONFIG_KEYS)[:3]) | {"feed_forward_length", "context_length"}
_REQUIRED_KEYS |= {"attention.layer_norm_rms_epsilon"}


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
        entry = self.entries[name]
        return dequantised(self.data[entry.start : entry.start + entry.n_bytes], entry.kind, entry.shape)


def read_checkpoint(path: Path, *, source: str | None = None) -> Checkpoint:
    """A GGUF file as a checkpoint; the weights are dequantised to float32 as they are taken.

    Args:
        path: The file.
        source: What to call it in messages and provenance; the path by default.

    Returns:
        The checkpoint.

    Raises:
        LoadError: The file is damaged, truncated, or no GGUF file.
        UnsupportedModelError: Its architecture, tokenizer or a header key is not understood.
    """
    source = source or str(path)
    file = open_file(path)
    config = _hugging_face_config(file, source)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, entry in file.entries.items():
        n_heads = next((n for part, n in heads.items() if f".{part}." in name), None)
        tensors[_hugging_face_name(name)] = LazyTensor(entry.shape, np.dtype(np.float32), _reader(file, name, n_heads))
    tokenizer = tokenizer_rules.from_gguf_metadata(file.metadata, source=source)
    return Checkpoint("llama", config, Tensors(tensors), tokenizer, source)


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
        data = np.memmap(path, dtype=np.uint8, mode="r")
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


def unpermuted(rows: np.ndarray, *, n_heads: int) -> np.ndarray:
    """The rows of a q or k projection in Hugging Face's order.

    out[head, half, i] = rows[head, i, half]

    Args:
        rows: Weight [n_heads * d_head, d_model] or bias [n_heads * d_head] as llama.cpp stores it.
        n_heads: The number of heads in it (for k the number of k and v heads).

    Returns:
        A copy in the other order.

    Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute.
    """
    pairs = rows.reshape(n_heads, len(rows) // n_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


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


def _reader(file: GgufFile, name: str, n_heads: int | None) -> Callable[[], np.ndarray]:
    """What reads tensor `name` in Hugging Face's layout."""

    def read() -> np.ndarray:
        values = file.tensor(name)
        return values if n_heads is None else unpermuted(values, n_heads=n_heads)

    return read


def _hugging_face_name(name: str) -> str:
    """The Hugging Face name of a tensor; names that are not understood stay as they are (and are refused later)."""
    inside = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if inside and inside[2] in _BLOCK_NAMES:
        return f"model.layers.{inside[1]}.{_BLOCK_NAMES[inside[2]]}.{inside[3]}"
    part, _, ending = name.rpartition(".")
    return f"{_OUTER_NAMES[part]}.{ending}" if part in _OUTER_NAMES else name


def _hugging_face_config(file: GgufFile, source: str) -> dict[str, Any]:
    """The keys of a `config.json` from the header of a llama file."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModelError(
            four_part(
                f"Architecture {architecture!r} (general.architecture)",
                where=source,
                expected="'llama' in a GGUF file.",
                fix="load the model from a Hugging Face directory, if there is a patch set for its family.",
            )
        )
    prefix = "llama."
    header = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    unknown = [
        f"{prefix}{key}={value!r}"
        for key, value in header.items()
        if key not in _CONFIG_KEYS and key not in _CHECKED_KEYS and not key.startswith("rope.scaling.") and value
    ]
    if unknown:
        raise UnsupportedModelError(
            four_part(
                f"Header keys that are not understood: {', '.join(unknown)}",
                where=source,
                expected=f"llama.<key> with one of {shorten(sorted({*_CONFIG_KEYS, *_CHECKED_KEYS}))}.",
                fix="load the model from a Hugging Face directory, or teach interp_jax/models/weights/gguf.py the key.",
            )
        )
    embedding = file.entries.get("token_embd.weight")
    lacking = [prefix + key for key in sorted(_REQUIRED_KEYS - header.keys())]
    lacking += ["token_embd.weight"] if embedding is None else []
    if embedding is None or lacking:
        raise LoadError(
            four_part(
                f"A llama file without {', '.join(lacking)}",
                where=source,
                expected="the sizes of the model in the header and its embedding among the tensors.",
                fix="download the file again, or convert the model again.",
            )
        )
    config: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu", "mlp_bias": False}
    config |= {name: header[key] for key, name in _CONFIG_KEYS.items() if key in header}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("rope_theta", 10000.0)
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.entries
    config["attention_bias"] = "blk.0.attn_q.bias" in file.entries
    scaling = {key.removeprefix("rope.scaling."): value for key, value in header.items() if "rope.scaling." in key}
    if scaling.get("type", "none") != "none":
        config["rope_scaling"] = {"rope_type": scaling.pop("type"), **scaling}
    for role in ("bos", "eos"):
        config[f"{role}_token_id"] = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
    expected = {
        "vocab_size": config["vocab_size"],
        "rope.dimension_count": config["head_dim"],
        "attention.value_length": config["head_dim"],
    }
    wrong = [
        f"llama.{key}={header[key]!r} ({want} expected)"
        for key, want in expected.items()
        if header.get(key, want) != want
    ]
    if wrong:
        raise UnsupportedModelError(
            four_part(
                f"Header keys that contradict the rest: {', '.join(wrong)}",
                where=source,
                expected="the rows of the embedding as vocabulary, and the rotary embedding over whole heads.",
                fix="load the model from a Hugging Face directory.",
            )
        )
    return config
