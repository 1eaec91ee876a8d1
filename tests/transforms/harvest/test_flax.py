"""Harvest inside Flax's own transforms: Linen's scan, remat and jit, and those of NNX, against plain Python.

The truth is written out with the same parameters and no Flax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from interp_jax.core.sites import Site
from interp_jax.transforms.harvest import (
    call_and_reap,
    harvest_sites,
    layer_scope,
    loop_layer,
    plant,
    site_gradients,
    sow,
)
from interp_jax.transforms.running_pass import run

N_LAYERS, D = 3, 4
X = jnp.linspace(-1.0, 1.0, 2 * D).reshape(2, D)


class Layer(nn.Module):
    """A residual layer with a site and a tagged value."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        with layer_scope(loop_layer()):
            out = sow(jnp.tanh(nn.Dense(D, use_bias=False)(x)), name="mlp_out")
        return x + sow(out, tag="t", name="out", mode="append"), None


def linen(remat: bool, jit: bool) -> tuple[Any, Callable[..., Any]]:
    """The weights of the layers, and a function of them."""
    layer = nn.remat(Layer) if remat else Layer
    scanned = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=N_LAYERS)
    model = (nn.jit(scanned) if jit else scanned)()
    params = model.init(jax.random.key(0), X, None)
    (weights,) = jax.tree.leaves(params)
    tree = jax.tree.structure(params)
    return weights, lambda weights, x: model.apply(jax.tree.unflatten(tree, [weights]), x, None)[0]


class Block(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(D, D, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        with layer_scope(loop_layer()):
            out = sow(jnp.tanh(self.dense(x)), name="mlp_out")
        return x + sow(out, tag="t", name="out", mode="append")


def in_nnx(remat: bool, jit: bool) -> tuple[Any, Callable[..., Any]]:
    """The weights of the layers, and a function of them."""

    @nnx.split_rngs(splits=N_LAYERS)
    @nnx.vmap(in_axes=0, out_axes=0)
    def blocks(rngs: nnx.Rngs) -> Block:
        return Block(rngs)

    graph, state = nnx.split(blocks(nnx.Rngs(0)))
    call = nnx.remat(Block.__call__) if remat else Block.__call__

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def scanned(block: Block, x: Any) -> Any:
        return call(block, x)

    forward = nnx.jit(scanned) if jit else scanned
    (weights,) = jax.tree.leaves(state)
    tree = jax.tree.structure(state)
    return weights, lambda weights, x: forward(nnx.merge(graph, jax.tree.unflatten(tree, [weights])), x)


def plain(weights: Any, x: Any, edit: Callable[[int, Any], Any] = lambda i, value: value) -> tuple[Any, Any]:
    outs = []
    for i in range(N_LAYERS):
        outs.append(edit(i, jnp.tanh(x @ weights[i])))
        x = x + outs[-1]
    return x, jnp.stack(outs)


def assert_close(ours: Any, truth: Any) -> None:
    np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("make", [linen, in_nnx])
def test_every_way_of_harvesting(make: Any, options: tuple[bool, bool]) -> None:
    weights, fn = make(*options)
    assert weights.shape == (N_LAYERS, D, D)
    truth, outs = plain(weights, X)

    # By name.
    result, reaps = jax.jit(call_and_reap(fn, tag="t"))(weights, X)
    assert_close(result, truth)
    assert_close(reaps["out"], outs)
    planted = outs * 0.5
    assert_close(plant(fn, tag="t")({"out": planted}, weights, X), plain(weights, X, lambda i, _: planted[i])[0])

    # By site: read one layer, change another, and the gradient of the result at each.
    halved = {Site(1, "mlp_out"): lambda value: value * 0.5}
    truth, outs = plain(weights, X, lambda i, value: value * 0.5 if i == 1 else value)
    result, activations = jax.jit(harvest_sites(fn, "2.mlp_out", halved))(weights, X)
    assert_close(result, truth)
    assert_close(activations["2.mlp_out"], outs[2])
    gradients = jax.jit(site_gradients(fn, "mlp_out", jnp.sum))(weights, X)[2]
    for i in range(N_LAYERS):
        at = lambda added, i=i: plain(weights, X, lambda j, v: v + added if j == i else v)[0].sum()  # noqa: E731
        assert_close(gradients[Site(i, "mlp_out")], jax.grad(at)(jnp.zeros_like(X)))

    # By loop, under the caller's gradient.
    def looped(weights: Any) -> Any:
        for layer, _, value in (running_pass := run(fn, weights, X, sites="mlp_out")):
            if layer == 1:
                running_pass.modified_value = value * 0.5
            del value
        return running_pass.retval.sum(), running_pass.retval

    gradient, result = jax.grad(looped, has_aux=True)(weights)
    assert_close(result, truth)
    halve = lambda i, value: value * 0.5 if i == 1 else value  # noqa: E731
    assert_close(gradient, jax.grad(lambda weights: plain(weights, X, halve)[0].sum())(weights))


def test_debug_prints_and_ordered_effects_stay(capsys: pytest.CaptureFixture[str]) -> None:
    def fn(x: Any) -> Any:
        def body(x: Any, i: Any) -> Any:
            with layer_scope(loop_layer()):
                x = sow(x * 2.0, name="a")
            jax.debug.print("layer {i} holds {x}", i=i, x=x, ordered=True)
            return x, None

        return lax.scan(body, x, jnp.arange(3))[0]

    def printed(run_it: Callable[[], Any]) -> list[str]:
        jax.block_until_ready(run_it())
        jax.effects_barrier()
        return capsys.readouterr().out.split("\n")[:-1]

    plain = ["layer 0 holds 2.0", "layer 1 holds 4.0", "layer 2 holds 8.0"]
    assert printed(lambda: fn(1.0)) == plain
    for wrap in (jax.jit, lambda fn: fn):
        assert printed(lambda wrap=wrap: wrap(harvest_sites(fn, "1.a"))(jnp.float32(1.0))) == plain
        changed = wrap(harvest_sites(fn, None, {"1.a": lambda value: value + 1.0}))
        assert printed(lambda changed=changed: changed(jnp.float32(1.0))) == [
            "layer 0 holds 2.0",
            "layer 1 holds 5.0",
            "layer 2 holds 10.0",
        ]
