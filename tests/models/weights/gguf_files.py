"""Small GGUF files for tests, written by the `gguf` package's own writer.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

ORACLES = Path(__file__).parents[2] / "oracles"
TINY_LLAMA = ORACLES / "tiny_llama"

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def permuted(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: row (head, half, i) goes to (head, i, half)."""
    d_head = len(rows) // n_heads
    order = [
        head * d_head + half * (d_head // 2) + i
        for head in range(n_heads)
        for i in range(d_head // 2)
        for half in range(2)
    ]
    return rows[order]


def gguf_name(name: str) -> str:
    """The name llama.cpp gives a Hugging Face tensor."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def write_llama(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    architecture: str = "llama",
    more: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    stored: Mapping[str, tuple[np.ndarray, Kind]] | None = None,
) -> Path:
    """Write a Llama as llama.cpp's converter would, float32, with a byte-level tokenizer of 260 tokens.

    Args:
        path: The file to write.
        config: The keys of its config.json.
        tensors: Its weights under Hugging Face names.
        architecture: What to call it.
        more: Further numbers and strings for the header.
        without: Header keys and tensors (in GGUF's names) to leave out.
        stored: Tensors (in GGUF's names) to write as these bytes, uint8, and of what kind they are.
    """
    header: dict[str, Any] = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.vocab_size": config["vocab_size"],
        "llama.rope.dimension_count": config["head_dim"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        **(more or {}),
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in header.items():
        if key in without:
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    letters = byte_letters()
    writer.add_token_list([*letters, "Ġt", "he", "Ġthe", "<|endoftext|>"])
    writer.add_token_types([1] * 259 + [3])
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, values in tensors.items():
        written = gguf_name(name)
        n_heads = next((n for part, n in heads.items() if part in written), None)
        if stored is not None and written in stored:
            data, kind = stored[written]
            writer.add_tensor(written, data, raw_dtype=kind)
        elif written not in without:
            writer.add_tensor(written, values if n_heads is None else permuted(values, n_heads), raw_dtype=Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_letters() -> list[str]:
    """GPT-2's letters for the 256 bytes, sorted."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())
