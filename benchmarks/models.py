"""The models the benchmarks run on.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import interp_jax as ij
from interp_jax.models.weights.checkpoint import Checkpoint, Tensors
from interp_jax.patches import transformers_gpt2, transformers_llama
from interp_jax.transforms.layer_stack import scan_layers, stack_layers
from interp_jax.transforms.sowing import layer_scope, sow


@functools.cache
def smollm2() -> ij.LanguageModel:
    """SmolLM2-135M with its real weights."""
    return ij.load("smollm2-135m")


@functools.cache
def gpt2_small() -> ij.LanguageModel:
    """GPT-2 in its smallest published shape, with random weights (its own are not in a package registry)."""
    return _gpt2("gpt2-small shape", n_layers=12, n_heads=12, d_model=768)


@functools.cache
def gpt2_xl() -> ij.LanguageModel:
    """GPT-2 in its largest published shape, 6 GB of weights that are random and the same in each layer."""
    return _gpt2("gpt2-xl shape", n_layers=48, n_heads=25, d_model=1600)


def _gpt2(name: str, *, n_layers: int, n_heads: int, d_model: int) -> ij.LanguageModel:
    config = {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": d_model,
        "n_layer": n_layers,
        "n_head": n_heads,
    }
    shapes = {f"{norm}.{part}": (d_model,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    for layer, d_in, d_out in (
        ("attn.c_attn", d_model, 3 * d_model),
        ("attn.c_proj", d_model, d_model),
        ("mlp.c_fc", d_model, 4 * d_model),
        ("mlp.c_proj", 4 * d_model, d_model),
    ):
        shapes |= {f"{layer}.weight": (d_in, d_out), f"{layer}.bias": (d_out,)}
    around = {"wte.weight": (50257, d_model), "wpe.weight": (1024, d_model)}
    around |= {f"ln_f.{part}": (d_model,) for part in ("weight", "bias")}
    rng = np.random.default_rng(0)

    def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return {key: rng.standard_normal(shape, np.float32) * np.float32(0.02) for key, shape in shapes.items()}

    layer = drawn(shapes)
    tensors = {f"transformer.{key}": value for key, value in drawn(around).items()}
    tensors |= {f"transformer.h.{i}.{key}": value for i in range(n_layers) for key, value in layer.items()}
    checkpoint = Checkpoint("gpt2", config, Tensors.from_arrays(tensors), tokenizer=None, source="random weights")
    return dataclasses.replace(transformers_gpt2.from_checkpoint(checkpoint), name=name)


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


class PlainTransformer(NamedTuple):
    """A transformer in plain JAX, 32 layers of width 256, and its parameters; random weights."""

    forward: Callable[[Any, Any], Any]
    params: Any


def plain_transformer(*, is_stacked: bool, n_layers: int = 32, d_model: int = 256, n_heads: int = 4) -> Any:
    """A model nobody tuned: attention and MLP as one writes them down, layers in a list or stacked for a scan."""
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys("qkvo", (d_model, d_model)) | {
        "in": (d_model, 4 * d_model),
        "out": (4 * d_model, d_model),
    }
    layers = [
        {name: jnp.asarray(rng.normal(0, 0.02, shape), jnp.float32) for name, shape in shapes.items()}
        for _ in range(n_layers)
    ]

    def normalised(x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def block(x: Any, layer: Any) -> tuple[Any, None]:
        x = sow(x, name="resid_pre")
        batch, pos, _ = x.shape
        q, k, v = ((normalised(x) @ layer[name]).reshape(batch, pos, n_heads, -1) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(d_model // n_heads).astype(np.float32)
        pattern = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((pos, pos), bool)), scores, -1e9))
        x = x + jnp.einsum("bhqk,bkhd->bqhd", pattern, v).reshape(batch, pos, d_model) @ layer["o"]
        return x + sow(jax.nn.gelu(normalised(x) @ layer["in"]) @ layer["out"], name="mlp_out"), None

    if is_stacked:
        return PlainTransformer(lambda params, x: scan_layers(block, x, params)[0], stack_layers(layers))

    def unrolled(params: Any, x: Any) -> Any:
        for i, layer in enumerate(params):
            with layer_scope(i):
                x, _ = block(x, layer)
        return x

    return PlainTransformer(unrolled, layers)
