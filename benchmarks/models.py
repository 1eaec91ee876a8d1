"""The models the benchmarks run on.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

import interp_jax as ij
from interp_jax.models.weights.checkpoint import Checkpoint, Tensors
from interp_jax.patches import transformers_gpt2


@functools.cache
def smollm2() -> ij.LanguageModel:
    """SmolLM2-135M with its real weights."""
    return ij.load("smollm2-135m")


@functools.cache
def gpt2_small() -> ij.LanguageModel:
    """GPT-2 in its smallest published shape, with random weights (its own are not in a package registry)."""
    config = {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
    }
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = rng.normal(0, 0.02, shape).astype(np.float32)

    add("transformer.wte.weight", 50257, 768)
    add("transformer.wpe.weight", 1024, 768)
    for i in range(12):
        at = f"transformer.h.{i}"
        for norm in ("ln_1", "ln_2"):
            add(f"{at}.{norm}.weight", 768)
            add(f"{at}.{norm}.bias", 768)
        for layer, d_in, d_out in (
            ("attn.c_attn", 768, 2304),
            ("attn.c_proj", 768, 768),
            ("mlp.c_fc", 768, 3072),
            ("mlp.c_proj", 3072, 768),
        ):
            add(f"{at}.{layer}.weight", d_in, d_out)
            add(f"{at}.{layer}.bias", d_out)
    add("transformer.ln_f.weight", 768)
    add("transformer.ln_f.bias", 768)
    checkpoint = Checkpoint("gpt2", config, Tensors.from_arrays(tensors), tokenizer=None, source="random weights")
    return dataclasses.replace(transformers_gpt2.from_checkpoint(checkpoint), name="gpt2-small shape")
