"""Passes cut where layers begin: what they read and change, and what they compile.

Source: interp_jax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import UnknownNameError
from interp_jax.core.sites import Site
from interp_jax.models import passes
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import layer_scope, sow


def model(weights, x):
    x = sow(x, name="embed")
    for i in range(6):
        with layer_scope(i):
            x = sow(x, name="resid_pre")
            write = sow(jnp.tanh(x @ weights[i]), name="mlp_out")
            x = sow(x + write, name="resid_post")
    return sow(x, name="logits")


@pytest.fixture
def args(rng: np.random.Generator):
    return list(rng.standard_normal((6, 4, 4), np.float32)), rng.standard_normal((2, 4), np.float32)


def by_hand(args, edits):
    (weights, x), values = args, {}

    def visit(layer, name, value):
        values[Site(layer, name)] = value = np.asarray(edits.get(Site(layer, name), lambda v: v)(value))
        return value

    x = visit(None, "embed", x)
    for i in range(6):
        x = visit(i, "resid_pre", x)
        write = visit(i, "mlp_out", np.tanh(x @ weights[i]))
        x = visit(i, "resid_post", x + write)
    return visit(None, "logits", x), values


def test_read(args) -> None:
    _, expected = by_hand(args, {})
    for select in ("mlp_out", ["embed", "3.resid_post"], "logits", None):
        values = passes.read(model, args, select)
        for site, value in values.items():
            np.testing.assert_allclose(value, expected[site], rtol=1e-5, atol=1e-6)
        assert list(values) == [site for site in expected if site in values]
    assert len(passes.read(model, args, None)) == len(expected) == 20
    assert passes.read(model, args, []) == {}


def test_edit(args) -> None:
    edits = {
        Site(1, "mlp_out"): lambda v: v * 0,
        Site(4, "resid_pre"): lambda v: v + 1,
        Site(None, "embed"): lambda v: -v,
    }
    expected, _ = by_hand(args, edits)
    np.testing.assert_allclose(passes.edit(model, args, edits), expected, rtol=1e-5, atol=1e-6)


def test_moving_to_another_layer_compiles_nothing(args) -> None:
    for layer in (2, 3):
        passes.edit(model, args, {Site(layer, "mlp_out"): lambda v: v * 0})
        passes.read(model, args, f"{layer}.mlp_out")
    with count_compilations() as new:
        for layer in (0, 1, 4, 5):
            passes.edit(model, args, {Site(layer, "mlp_out"): lambda v: v * 0})
            passes.read(model, args, f"{layer}.mlp_out")
    assert new == []


def test_a_pass_with_nothing_to_stop_at_compiles_a_layer(args) -> None:
    """Not the model: three pieces, whatever the number of layers."""
    weights, x = args
    small = [weight[:3, :3] for weight in weights], x[:, :3]
    with count_compilations() as new:
        result = passes.edit(model, small, {})
    assert len(new) <= 3
    np.testing.assert_allclose(result, by_hand(small, {})[0], rtol=1e-5, atol=1e-6)


def test_nothing_after_the_last_site_is_computed(args) -> None:
    def failing(weights, x):
        x = sow(x, name="embed")
        jax.debug.callback(lambda _: calls.append(1), x)
        return x * 2

    calls: list[int] = []
    passes.read(failing, args, "embed")
    jax.effects_barrier()
    assert calls == []


def test_without_sites() -> None:
    assert float(passes.edit(lambda x: x + 1, (1.0,), {})) == 2.0


def test_under_jit_and_grad(args) -> None:
    weights, x = args

    def loss(scale):
        return passes.edit(model, (weights, x), {Site(3, "mlp_out"): lambda v: v * scale}).sum()

    plain = loss(1.0)
    np.testing.assert_allclose(jax.jit(loss)(1.0), plain, rtol=1e-5)
    slope = (loss(1.001) - loss(0.999)) / 0.002
    np.testing.assert_allclose(jax.grad(loss)(1.0), slope, rtol=2e-2)


def test_unknown_site(args) -> None:
    with pytest.raises(UnknownNameError, match="'mlp_outs' in reap"):
        passes.read(model, args, "mlp_outs", where="reap")
