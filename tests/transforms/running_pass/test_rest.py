"""`running_pass.rest`: what a pass comes to from here, with another value at its site."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import RunningPassError, ShapeError
from interp_jax.core.sites import Site
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.running_pass import run
from interp_jax.transforms.sowing import layer_scope, loop_layer, sow
from tests.transforms.running_pass.programs import PROGRAMS, Plain, jax_form

X = jnp.array([0.3, -1.2, 0.7])


def change(value: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf * 1.25 + 0.05, value)


def with_visit_changed(name: str, number: int) -> Any:
    """The truth: the program in plain Python, with one visit of a site changed."""
    count = iter(range(10**6))
    return PROGRAMS[name](Plain(lambda site, value: change(value) if next(count) == number else value), X)


def assert_close(ours: Any, truth: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), ours, truth)


@pytest.mark.parametrize("name", PROGRAMS)
def test_is_the_result_with_this_value_changed_and_the_pass_goes_on_undisturbed(name: str) -> None:
    out, n_visits = jax_form(name)(X), 0
    for number, (_, _, value) in enumerate(running_pass := run(jax_form(name), X)):
        assert_close(running_pass.rest(change(value)), with_visit_changed(name, number))
        n_visits += 1
    assert n_visits > 0
    assert_close(running_pass.retval, out)


def layers(weights: Any, x: Any, *, is_stacked: bool) -> Any:
    def block(x: Any, w: Any) -> tuple[Any, Any]:
        x = sow(x, name="resid_pre")
        return sow(x + jnp.tanh(x @ w), name="resid_post"), jnp.sum(x)

    if is_stacked:

        def body(x: Any, w: Any) -> Any:
            with layer_scope(loop_layer()):
                return block(x, w)

        x, sums = jax.lax.scan(body, x, weights)
    else:
        sums = []
        for i, w in enumerate(weights):
            with layer_scope(i):
                x, total = block(x, w)
            sums.append(total)
        sums = jnp.stack(sums)
    return sow(x * 2.0, name="ln_final") + 1.0, sums


def stacked(weights: Any, x: Any) -> Any:
    return layers(weights, x, is_stacked=True)


def unrolled(weights: Any, x: Any) -> Any:
    return layers(weights, x, is_stacked=False)


@pytest.fixture
def weights(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (5, 3, 3))


@pytest.mark.parametrize("fn", [stacked, unrolled])
def test_many_values_at_once(fn: Any, weights: Any) -> None:
    x = X[None]
    factors = jnp.arange(3.0)
    with count_compilations() as compiled:
        for layer, _, value in (running_pass := run(fn, weights, x, sites="resid_post")):
            values = factors[:, None, None] * value[None]
            out, sums = jax.vmap(running_pass.rest)(values)
            for i, new in enumerate(values):
                again = run(unrolled, weights, x, sites="resid_post")
                for other, _, _ in again:
                    if other == layer:
                        again.modified_value = new
                assert_close((out[i], sums[i]), again.retval)
    assert len(compiled) < 12  # Not some for each layer: 5 layers come to a few programs for each of the functions.


@pytest.mark.parametrize("fn", [stacked, unrolled])
def test_stops_at_a_later_site(fn: Any, weights: Any) -> None:
    for layer, name, value in (running_pass := run(fn, weights, X[None], sites=["resid_pre", "ln_final"])):
        if name == "resid_pre":
            (out, _), at_end = (
                running_pass.rest(value * 0.5),
                running_pass.rest(value * 0.5, until=Site(None, "ln_final")),
            )
            assert_close(at_end + 1.0, out)
            if layer:
                with pytest.raises(RunningPassError, match=r"until 0\.resid_pre, where it does not come by"):
                    running_pass.rest(value, until=Site(0, "resid_pre"))


def test_is_differentiable_where_layers_are_apart(weights: Any) -> None:
    for layer, _, value in (running_pass := run(unrolled, weights, X[None], sites="resid_post")):
        if layer == 2:
            derivative = jax.grad(lambda v, rest=running_pass.rest: rest(v)[0].sum())(value)
            step = 1e-2
            for i in range(3):
                bump = jnp.zeros((1, 3)).at[0, i].set(step)
                slope = (running_pass.rest(value + bump)[0].sum() - running_pass.rest(value - bump)[0].sum()) / (
                    2 * step
                )
                np.testing.assert_allclose(derivative[0, i], slope, rtol=5e-3, atol=1e-3)


def test_mistakes_are_refused(weights: Any) -> None:
    running_pass = run(unrolled, weights, X[None], sites="resid_post")
    with pytest.raises(RunningPassError, match="the rest was asked for while the pass is not started"):
        running_pass.rest(X)
    next(running_pass)
    with pytest.raises(ShapeError, match=r"0.resid_post"):
        running_pass.rest(X)
    with (
        run(unrolled, weights, X[None], sites="resid_post", engine="python") as slow,
        pytest.raises(RunningPassError, match="python engine"),
    ):
        next(slow)
        slow.rest(X[None])
