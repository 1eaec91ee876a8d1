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
from interp_jax.patches import transformers_gpt2, transformers_llama


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


@functools.cache
def smollm2_width(n_layers: int) -> ij.LanguageModel:
    """A Llama of SmolLM2-135M's width and vocabulary, of any depth, with random weights."""
    d_model, d_mlp, d_kv, d_vocab = 576, 1536, 192, 49152
    config = {
        "model_type": "llama",
        "vocab_size": d_vocab,
        "hidden_size": d_model,
        "intermediate_size": d_mlp,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    }
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (d_vocab, d_model), "model.norm.weight": (d_model,)}
    for i in range(n_layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.input_layernorm.weight": (d_model,), f"{at}.post_attention_layernorm.weight": (d_model,)}
        for name, d_out in (("q", d_model), ("k", d_kv), ("v", d_kv), ("o", d_model)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (d_out, d_model)
        for name, d_out, d_in in (("gate", d_mlp, d_model), ("up", d_mlp, d_model), ("down", d_model, d_mlp)):
            shapes[f"{at}.mlp.{name}_proj.weight"] = (d_out, d_in)
    tensors = {name: rng.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in shapes.items()}
    checkpoint = Checkpoint("llama", config, Tensors.from_arrays(tensors), tokenizer=None, source="random weights")
    return dataclasses.replace(transformers_llama.from_checkpoint(checkpoint), name=f"smollm2 width, {n_layers} layers")
