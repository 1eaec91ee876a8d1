"""Patches of the libraries models are written in: Flax (Linen and NNX), transformers, JAX itself.

Source: interp_jax.
"""

from __future__ import annotations

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interp_jax.transforms.patcher import Patcher
from interp_jax.transforms.patcher.drift import APPLIES

# --- Flax Linen -----------------------------------------------------------------------------------------------------

DENSE = ("if bias is not None: $$add\nreturn y", "if bias is not None: $$add\nreturn record(y)")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4)(jax.nn.tanh(Own(3)(x)))


class Own(nn.Dense):
    """A subclass that inherits what is patched."""


def test_linen_modules_made_before_and_their_subclasses(key: jax.Array) -> None:
    net, x = Net(), jnp.ones((2, 5))
    params = net.init(key, x)
    seen: list[tuple[int, ...]] = []

    def record(value: jax.Array) -> jax.Array:
        seen.append(value.shape)
        return value * 2.0

    plain = jax.jit(net.apply)
    before = plain(params, x)
    old, wrapper = inspect.unwrap(nn.Dense.__call__).__code__, nn.Dense.__call__
    with Patcher("flax.linen", {"Dense.__call__": [DENSE]}, names={"record": record}):
        after = plain(params, x)
        assert nn.Dense.__call__ is wrapper  # Flax's own wrapping stays around it
    assert seen == [(2, 3), (2, 4)]
    assert not np.allclose(before, after)
    np.testing.assert_array_equal(plain(params, x), before)
    assert inspect.unwrap(nn.Dense.__call__).__code__ is old


def test_linen_lifted_transforms(key: jax.Array) -> None:
    """What `nn.remat`, `nn.scan` and `nn.vmap` made of a class before the patch runs the patched code."""

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            dense = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return dense()(x, None)[0]

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return nn.Dense(3, kernel_init=nn.initializers.ones)(x), None

    stack, x = Stack(), jnp.ones((1, 3))
    params = stack.init(key, x)
    assert stack.apply(params, x)[0, 0] == 27  # type: ignore[index]
    with Patcher("flax.linen", {"Dense.__call__": [DENSE]}, names={"record": lambda y: y * 2.0}):
        assert stack.apply(params, x)[0, 0] == 216  # type: ignore[index]
        assert jax.grad(lambda p: jax.jit(stack.apply)(p, x)[0, 0])(params)["params"] is not None
    assert stack.apply(params, x)[0, 0] == 27  # type: ignore[index]


def test_linen_identity_patch_of_a_whole_module(key: jax.Array) -> None:
    net, x = Net(), jnp.ones((2, 5))
    params = net.init(key, x)
    text = jax.jit(net.apply).lower(params, x).as_text()
    with Patcher("flax.linen.linear", Dense=[], DenseGeneral=[], Conv=[], Embed=[]) as patcher:
        assert len(patcher.digests()) > 5
        assert jax.jit(net.apply).lower(params, x).as_text() == text


# --- Flax NNX -------------------------------------------------------------------------------------------------------


def test_nnx() -> None:
    linear, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3))
    call = nnx.jit(lambda module, x: module(x))
    before = call(linear, x)
    with Patcher("flax.nnx", {"Linear.__call__": ["return y", "return y * 2.0"]}):
        np.testing.assert_array_equal(call(linear, x), before * 2)
    np.testing.assert_array_equal(call(linear, x), before)


# --- JAX ------------------------------------------------------------------------------------------------------------


def test_jax_nn_through_custom_jvp_and_jit() -> None:
    x = jnp.float32(-3)
    alias = jax.nn.relu
    derivative = jax.grad(alias)
    assert (float(alias(x)), float(derivative(x))) == (0, 0)
    with Patcher("jax.nn", relu=["jnp.maximum(x, 0)", "jnp.maximum(x, 7)"]) as patcher:
        assert float(alias(x)) == 7
        assert float(jax.jit(alias)(x)) == 7
        assert patcher.diff().startswith("--- a/jax/")
    assert (float(alias(x)), float(derivative(x))) == (0, 0)


# --- transformers ---------------------------------------------------------------------------------------------------

GPT2 = "transformers.models.gpt2.modeling_flax_gpt2"
LLAMA = "transformers.models.llama.modeling_flax_llama"


@pytest.fixture(autouse=True)
def _upstreams_promotion_rules():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def gpt2() -> tuple[Any, Any, jax.Array]:
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config
    from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2LMHeadModule

    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    return _initialised(FlaxGPT2LMHeadModule(config))


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any, jax.Array]:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_flax_llama import FlaxLlamaForCausalLMModule

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return _initialised(FlaxLlamaForCausalLMModule(config))


def _initialised(module: Any) -> tuple[Any, Any, jax.Array]:
    tokens = jnp.arange(5, dtype=jnp.int32)[None]
    mask = jnp.ones_like(tokens)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, mask, tokens)
    # Any numbers do, and Flax's own initialisers take seconds to compile.
    numbers = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(numbers.normal(size=leaf.shape), leaf.dtype), shapes)
    return module, params, tokens


def _logits(case: tuple[Any, Any, jax.Array]) -> Any:
    module, params, tokens = case
    return lambda: module.apply(params, tokens, jnp.ones_like(tokens), tokens).logits


LOOP = (
    """
    for block in self.blocks:
        $$body
    """,
    """
    for layer, block in enumerate(self.blocks):
        if layer == skipped:
            continue
        $$body
    """,
)
EDITS = {
    "gpt2": {
        "FlaxGPT2BlockCollection.__call__": [LOOP],
        "FlaxGPT2MLP": [("self.act(hidden_states)", "note(self.act(hidden_states))")],
        "FlaxGPT2Block.__call__": [("attn_output + residual", "note(attn_output + residual)")],
    },
    "llama": {
        "FlaxLlamaLayerCollection.__call__": [LOOP],
        "FlaxLlamaMLP": [("up_proj_states * gate_states", "note(up_proj_states * gate_states)")],
        "FlaxLlamaDecoderLayer.__call__": [("residual + attn_output", "note(residual + attn_output)")],
    },
}


@pytest.mark.parametrize(("family", "module_name"), [("gpt2", GPT2), ("llama", LLAMA)])
def test_transformers(request: pytest.FixtureRequest, family: str, module_name: str) -> None:
    logits = jax.jit(_logits(request.getfixturevalue(family)))
    text = logits.lower().as_text()
    before = logits()
    seen: list[tuple[int, ...]] = []

    def note(value: jax.Array) -> jax.Array:
        seen.append(value.shape)
        return value

    tags = Patcher(module_name, EDITS[family], names={"note": note, "skipped": None})
    skip = Patcher(module_name, EDITS[family], names={"note": note, "skipped": 1})
    with tags:
        assert logits.lower().as_text() == text
        np.testing.assert_array_equal(logits(), before)
        assert len(seen) == 2 * 2
        assert {len(shape) for shape in seen} == {3}
    with skip:
        assert not np.allclose(logits(), before)
    np.testing.assert_array_equal(logits(), before)
    assert tags.check().status == APPLIES
    assert tags.check(tags.digests()).status == APPLIES
    name = module_name.replace(".", "/")
    assert f"--- a/{name}.py\n+++ b/{name}.py\n" in tags.diff()
    assert "+            if layer == skipped:\n" in tags.diff()


@pytest.mark.parametrize(("family", "module_name"), [("gpt2", GPT2), ("llama", LLAMA)])
def test_transformers_compiled_again(request: pytest.FixtureRequest, family: str, module_name: str) -> None:
    import importlib

    logits = _logits(request.getfixturevalue(family))
    module = importlib.import_module(module_name)
    text = jax.jit(logits).lower().as_text()
    classes = {
        name: ()
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module_name and name.startswith("Flax")
    }
    assert len(classes) > 8
    with Patcher(module, classes) as patcher:
        assert "class body executed" not in patcher.report()
        assert jax.jit(logits).lower().as_text() == text


def test_copies_that_transformers_makes_of_methods(gpt2) -> None:
    """`FlaxGPT2LMHeadModel.__call__` is a copy of the base class's method, made after the class."""
    from transformers.models.gpt2 import modeling_flax_gpt2 as module

    copy, original = module.FlaxGPT2LMHeadModel.__call__, module.FlaxGPT2PreTrainedModel.__call__
    assert copy is not original
    old = copy.__code__
    with Patcher(module, {"FlaxGPT2PreTrainedModel.__call__": [("rngs = {}", "rngs = {'x': 1}")]}):
        assert copy.__code__ is original.__code__ is not old
    assert copy.__code__ is original.__code__ is old
