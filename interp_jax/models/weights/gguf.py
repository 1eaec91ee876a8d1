"""GGUF files (llama.cpp's format) as a `Checkpoint` in the Hugging Face convention.

Maps the file's header to the keys of a `config.json` and its tensor names to Hugging Face's, and undoes the one change
of layout llama.cpp's converter makes: it stores the rows of the q and k projections of each head as interleaved pairs,
where Hugging Face's rotary embedding pairs a row with the one half a head away.

    q_gguf[head, i, half] = q_hf[head, half, i]        half in {0, 1}, i < d_head / 2

>>> import numpy as np
>>> rows = np.arange(8, dtype=np.float32)[:, None]               # one head of 8 rows
>>> unpermuted(rows, n_heads=1)[:, 0].astype(int).tolist()
[0, 2, 4, 6, 1, 3, 5, 7]

Sharp edges: only the llama architecture; header keys of that architecture which are not understood are refused.

Source: llama.cpp, convert_hf_to_gguf.py (names, keys and permutation).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from interp_jax.core.errors import LoadError, UnsupportedModelError, four_part, shorten
from interp_jax.models import tokenizers as tokenizer_rules
from interp_jax.models.weights.checkpoint import Checkpoint, LazyTensor, Tensors
from interp_jax.models.weights.gguf_file import GgufFile, open_file

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

# Header keys of the llama architecture, and the config keys they become.
_REQUIRED_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_CONFIG_KEYS = _REQUIRED_KEYS | {
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
}
_IMPLIED_KEYS = ("vocab_size", "rope.dimension_count", "attention.value_length")  # what they say follows from others
_SCALING = "rope.scaling."
_FACTORS = "rope_freqs.weight"  # what each rotary frequency is divided by, in files of Llama 3.1 and later


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
        if name == _FACTORS:
            continue
        n_heads = next((n for part, n in heads.items() if f".{part}." in name), None)
        if n_heads is not None and (n_heads < 1 or entry.shape[0] % (2 * n_heads)):
            raise LoadError(
                four_part(
                    f"Tensor {name!r} of shape {entry.shape} for {n_heads} heads",
                    where=source,
                    expected="an even number of rows per head, as a rotary embedding needs.",
                    fix="download the file again, or convert the model again.",
                )
            )
        tensors[_hugging_face_name(name)] = _lazy_tensor(file, name, n_heads)
    tokenizer = tokenizer_rules.from_gguf_metadata(file.metadata, source=source)
    return Checkpoint("llama", config, Tensors(tensors), tokenizer, source)


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


def llama3_scaling(factors: np.ndarray, theta: float, d_head: int, *, source: str) -> dict[str, Any] | None:
    """The `rope_scaling` that llama.cpp's converter made these factors of.

    factor_i = 1 if w < old / high,  factor if w > old / low,  between them 1 / ((1 - s) / factor + s),
    s = (old / w - low) / (high - low),  w = 2 pi theta^(2 i / d_head);  old = 8192, low = 1, high = 4

    Args:
        factors: What each frequency is divided by, `[d_head / 2]`.
        theta: The rotary base.
        d_head: Size of a head.
        source: The file, for the error message.

    Returns:
        A `rope_scaling` of kind llama3; None if all factors are 1.

    Raises:
        UnsupportedModelError: They are not those of the training context and the bounds all Llama 3 models share.

    Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors.
    """
    if np.all(factors == 1):
        return None
    low, high, old = 1.0, 4.0, 8192
    factor = float(factors.max())
    n_turns = old / (2 * np.pi * theta ** (np.arange(0, d_head, 2) / d_head))
    share = np.clip((n_turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
        given = np.round(factors, 3).tolist()
        raise UnsupportedModelError(
            four_part(
                f"Factors of rotary frequencies ({_FACTORS}) that are not Llama 3's: {given!s:.80}",
                where=source,
                expected="those that llama.cpp writes for a training context of 8192 and the bounds 1 and 4.",
                fix="load the model from a Hugging Face directory, whose config.json says how it scales.",
            )
        )
    bounds = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": old}
    return {"rope_type": "llama3", "factor": factor, **bounds}


def _lazy_tensor(file: GgufFile, name: str, n_heads: int | None) -> LazyTensor:
    """Tensor `name` in Hugging Face's layout."""
    shape, dtype = file.entries[name].shape, np.dtype(np.float32)
    if n_heads is not None:  # rows from all over: read whole
        return LazyTensor(shape, dtype, lambda: unpermuted(file.tensor(name), n_heads=n_heads))
    return LazyTensor(shape, dtype, lambda: file.tensor(name), lambda start, stop: file.rows(name, start, stop))


def _hugging_face_name(name: str) -> str:
    """The Hugging Face name of a tensor; names that are not understood stay as they are (and are refused later)."""
    inside = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if inside and inside[2] in _BLOCK_NAMES:
        return f"model.layers.{inside[1]}.{_BLOCK_NAMES[inside[2]]}.{inside[3]}"
    part, _, ending = name.rpartition(".")
    return f"{_OUTER_NAMES[part]}.{ending}" if part in _OUTER_NAMES else name


def _hugging_face_config(file: GgufFile, source: str) -> dict[str, Any]:
    """The keys of a `config.json` from the header of a llama file."""
    header = _llama_header(file, source)
    config: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu", "mlp_bias": False}
    config |= {name: header[key] for key, name in _CONFIG_KEYS.items() if key in header}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("rope_theta", 10000.0)
    config.setdefault("head_dim", config["hidden_size"] // max(1, config["num_attention_heads"]))
    config["vocab_size"] = file.entries["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.entries
    config["attention_bias"] = "blk.0.attn_q.bias" in file.entries
    scaling = {key.removeprefix(_SCALING): value for key, value in header.items() if key.startswith(_SCALING)}
    if scaling.get("type", "none") != "none":
        config["rope_scaling"] = {"rope_type": scaling.pop("type"), **scaling}
    if _FACTORS in file.entries:
        config["rope_scaling"] = llama3_scaling(
            file.tensor(_FACTORS), config["rope_theta"], config["head_dim"], source=source
        )
    for role in ("bos", "eos"):
        config[f"{role}_token_id"] = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
    implied = dict(zip(_IMPLIED_KEYS, (config["vocab_size"], config["head_dim"], config["head_dim"]), strict=True))
    wrong = [f"llama.{key}={header[key]!r} (not {n})" for key, n in implied.items() if header.get(key, n) != n]
    if wrong:
        raise UnsupportedModelError(
            four_part(
                f"Header keys that contradict the rest: {', '.join(wrong)}",
                where=source,
                expected="one row of the embedding per token, and a rotary embedding over whole heads.",
                fix="load the model from a Hugging Face directory.",
            )
        )
    return config


def _llama_header(file: GgufFile, source: str) -> dict[str, Any]:
    """The `llama.` keys of the header, without that prefix, each of them understood and none lacking."""
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
    understood = {*_CONFIG_KEYS, *_IMPLIED_KEYS}
    unknown = [
        f"{prefix}{key}={value!r:.60}"
        for key, value in header.items()
        # A list is one value per layer; a zero (no experts) says that there is none of it.
        if isinstance(value, list)
        or (key in understood and (isinstance(value, str | bool)))
        or (key not in understood and not key.startswith(_SCALING) and value)
    ]
    if unknown:
        raise UnsupportedModelError(
            four_part(
                f"Header keys that are not understood: {', '.join(unknown)}",
                where=source,
                expected=f"llama.<key> with one number for each of {shorten(sorted(understood))}.",
                fix="load the model from a Hugging Face directory, or teach interp_jax/models/weights/gguf.py the key.",
            )
        )
    lacking = [prefix + key for key in _REQUIRED_KEYS if key not in header]
    lacking += [name for name in ("token_embd.weight",) if name not in file.entries]
    if lacking:
        raise LoadError(
            four_part(
                f"A llama file without {', '.join(lacking)}",
                where=source,
                expected="the sizes of the model in the header and its embedding among the tensors.",
                fix="download the file again, or convert the model again.",
            )
        )
    return header
