"""Whole Llamas in each common quantisation: what is loaded is what the `gguf` package decodes, row by row.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from interp_jax.models.loading import load
from interp_jax.models.weights import checkpoint as checkpoints
from interp_jax.models.weights import gguf
from tests.models.weights.gguf_files import gguf_name, permuted, write_llama

D_MODEL, D_MLP, D_VOCAB = 256, 512, 260
CONFIG: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}
HEADS = {"q_proj": 4, "k_proj": 2}

# The half-precision scales of a block, as offsets into its bytes: random ones would be infinite now and then.
SCALES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}


def random_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (D_VOCAB, D_MODEL),
        "model.norm.weight": (D_MODEL,),
    }
    shapes["lm_head.weight"] = (D_VOCAB, D_MODEL)
    for i in range(2):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.{name}.weight": (D_MODEL,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, d_out in (("q", D_MODEL), ("k", D_MODEL // 2), ("v", D_MODEL // 2), ("o", D_MODEL)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (d_out, D_MODEL)
        for name, d_out, d_in in (("gate", D_MLP, D_MODEL), ("up", D_MLP, D_MODEL), ("down", D_MODEL, D_MLP)):
            shapes[f"{at}.mlp.{name}_proj.weight"] = (d_out, d_in)
    return {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def quantised(values: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """A tensor's bytes: quantised by the package where it can, else any blocks with small scales."""
    if kind not in SCALES:
        return quantize(values, kind).view(np.uint8).reshape(len(values), -1)
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (values.size // block_values, block_bytes), dtype=np.uint8)
    for start in SCALES[kind]:
        scales = (0.001 * (1 + rng.random(len(data)))).astype(np.float16)
        data[:, start : start + 2] = scales[:, None].view(np.uint8)
    return data.reshape(len(values), -1)


def write(
    path: Path, kinds: Mapping[str, Kind], tensors: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Write a file and say what the package decodes of it, under Hugging Face's names and in its order of rows."""
    stored, expected = {}, {}
    for name, values in tensors.items():
        kind = next((kind for part, kind in kinds.items() if part in name), None) if values.ndim == 2 else None
        n_heads = next((n for part, n in HEADS.items() if part in name), None)
        if kind is None:
            expected[name] = values
            continue
        data = quantised(values if n_heads is None else permuted(values, n_heads), kind, rng)
        stored[gguf_name(name)] = (data, kind)
        decoded = dequantize(data.view({Kind.F16: np.float16, Kind.F32: np.float32}.get(kind, np.uint8)), kind)
        decoded = np.asarray(decoded, np.float32)
        if n_heads is not None:
            back = np.argsort(permuted(np.arange(len(values)), n_heads))
            decoded = decoded[back]
        expected[name] = decoded
    write_llama(path, CONFIG, tensors, stored=stored)
    return expected


ALL = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.F16, Kind.BF16, Kind.F32)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_every_weight_is_what_the_package_decodes(
    kind: Kind, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_PIECE_BYTES", 50_000)  # in pieces of some fifty rows
    tensors = random_tensors(rng)
    expected = write(tmp_path / "m.gguf", {"": kind}, tensors, rng)
    found = gguf.read_checkpoint(tmp_path / "m.gguf").tensors
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    lm = load(tmp_path / "m.gguf", stacked=True)
    np.testing.assert_array_equal(lm.W_E, expected["model.embed_tokens.weight"])
    np.testing.assert_array_equal(lm.W_U, expected["lm_head.weight"].T)
    for i in range(2):
        at = f"model.layers.{i}"
        for weight, name in (("W_gate", "mlp.gate_proj"), ("W_in", "mlp.up_proj"), ("W_out", "mlp.down_proj")):
            np.testing.assert_array_equal(lm.weight(weight, i), expected[f"{at}.{name}.weight"].T)
        for weight, name, n_heads in (("W_Q", "q_proj", 4), ("W_K", "k_proj", 2)):
            by_head = expected[f"{at}.self_attn.{name}.weight"].reshape(n_heads, 64, D_MODEL).swapaxes(1, 2)
            np.testing.assert_array_equal(lm.weight(weight, i), by_head)
    # And near what was quantised, in the order of Hugging Face.
    if kind not in SCALES:
        largest = {Kind.Q4_0: 0.06, Kind.Q4_1: 0.04, Kind.Q5_0: 0.03}.get(kind, 0.005)
        for name, values in tensors.items():
            assert np.abs(np.asarray(found[name]) - values).max() < largest, name


def test_a_file_of_mixed_quantisations_in_bfloat16(tmp_path: Path, rng: np.random.Generator) -> None:
    kinds = {"down_proj": Kind.Q6_K, "lm_head": Kind.Q6_K, "v_proj": Kind.Q5_K, "": Kind.Q4_K}  # as Q4_K_M is
    expected = write(tmp_path / "m.gguf", kinds, random_tensors(rng), rng)
    lm = load(tmp_path / "m.gguf", dtype="bfloat16")
    assert lm.W_out.dtype == "bfloat16"
    for weight, name in (("W_out", "down_proj"), ("W_in", "up_proj")):
        values = np.stack([expected[f"model.layers.{i}.mlp.{name}.weight"].T for i in range(2)])
        np.testing.assert_array_equal(np.asarray(lm.weight(weight)), values.astype("bfloat16"))
