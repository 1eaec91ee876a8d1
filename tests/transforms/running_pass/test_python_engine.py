"""The python engine: the same results as plain Python, and what it can do that the compiled engine cannot."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import RunningPassError, ShapeError, SiteNotReachedError, UnsupportedModelError
from interp_jax.core.sites import Site
from interp_jax.transforms.harvest import layer_scope, loop_layer, sow
from interp_jax.transforms.running_pass import run
from tests.transforms.running_pass.programs import PROGRAMS, Jax, Plain, jax_form
from tests.transforms.running_pass.test_running_pass import NAMES, X, assert_same, change, plain


class IndexedScans(Jax):
    """Scans whose layer scope is given the loop's index, as the python engine needs it."""

    @staticmethod
    def scan(body: Any, carry: Any, xs: Any, *, stride: int = 1, reverse: bool = False) -> Any:
        def tagged(carry: Any, indexed: Any) -> Any:
            index, x = indexed
            with layer_scope(loop_layer(stride, index=index, length=len(xs))):
                return body(carry, x)

        return jax.lax.scan(tagged, carry, (jnp.arange(len(xs)), xs), reverse=reverse)


def loop(name: str, x: Any, visit: Any, **options: Any) -> tuple[Any, list[Site]]:
    seen = []
    ctl = IndexedScans
    with run(lambda x: PROGRAMS[name](ctl, x), x, engine="python", **options) as running_pass:
        for layer, site_name, value in running_pass:
            seen.append(Site(layer, site_name))
            running_pass.modified_value = visit(seen[-1], value)
            del value
    return running_pass.retval, seen


# Both branches of a conditional are traced, a loop's body once: there the visits differ, not the results.
@pytest.mark.parametrize("name", NAMES)
def test_changes_have_the_same_effect_as_in_plain_python(name: str) -> None:
    truth, truth_seen = plain(name, X, change)
    result, seen = loop(name, X, change)
    assert_same(result, truth)
    if name in ("branching", "looping", "scanned_in_reverse", "nested_scan", "scanned", "checkpointed_scan"):
        assert set(seen) >= {site for site, _ in truth_seen}
    else:
        assert seen == [site for site, _ in truth_seen]


@pytest.mark.parametrize("name", ["straight", "inner_jit", "checkpointed", "scanned", "trees"])
def test_under_the_callers_jit_grad_and_vmap(name: str) -> None:
    def total(result: Any) -> Any:
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(result))

    def ours(x: Any) -> Any:
        return total(loop(name, x, change)[0])

    def truth(x: Any) -> Any:
        return total(PROGRAMS[name](Plain(change), x))

    assert_same(jax.jit(ours)(X), truth(X))
    assert_same(jax.grad(ours)(X), jax.grad(truth)(X), 1e-5)
    assert_same(jax.jit(jax.grad(jax.checkpoint(ours)))(X), jax.grad(truth)(X), 1e-5)
    assert_same(jax.vmap(ours)(jnp.stack([X, X + 1.0])), jnp.stack([truth(X), truth(X + 1.0)]))


def test_a_scan_visits_concrete_layers_in_order() -> None:
    seen = loop("scanned", X, lambda site, value: value, sites="resid_post")[1]
    assert seen == [Site(i, "resid_post") for i in range(4)]
    only = loop("scanned", X, change, sites="2.mlp_out")
    assert only[1] == [Site(2, "mlp_out")]
    truth = plain("scanned", X, lambda site, v: change(site, v) if site == (2, "mlp_out") else v)[0]
    assert_same(only[0], truth)


def test_a_scan_without_its_index_is_refused() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        list(run(jax_form("scanned"), X, engine="python"))
    assert "loop_layer(index=i, length=n)" in str(error.value) and "engine='compiled'" in str(error.value)


def test_a_jitted_block_is_visited_at_every_call_and_in_every_pass() -> None:
    @jax.jit
    def block(x: Any) -> Any:
        return sow(jnp.sin(x), name="mlp_out")

    def model(x: Any) -> Any:
        for i in range(3):
            with layer_scope(i):
                x = block(x)
        return x

    before = block(X)
    for _ in range(2):
        assert [layer for layer, _, _ in run(model, X, engine="python")] == [0, 1, 2]
        # A selection that skips a layer leaves a trace behind that a later pass must not reuse.
        assert [layer for layer, _, _ in run(model, X, engine="python", sites="1.mlp_out")] == [1]
    np.testing.assert_array_equal(block(X), before)


def test_functions_without_sows_keep_their_compiled_form() -> None:
    traces = []

    @jax.jit
    def helper(x: Any) -> Any:
        traces.append(1)
        return x * 2.0

    def model(x: Any) -> Any:
        return sow(helper(x), name="a")

    for _ in range(3):
        list(run(model, X, engine="python"))
    # Once for the passes; they do not share the trace made outside any pass.
    assert len(traces) == 1


def test_code_jax_cannot_trace() -> None:
    def model(x: Any) -> Any:
        rounds = 0
        while float(jnp.sum(sow(x, name="x"))) < 20.0:
            x, rounds = x * 2.0, rounds + 1
        return x, rounds

    for _ in (running_pass := run(model, X, engine="python")):
        pass
    assert running_pass.retval[1] == 4


def test_a_value_may_change_its_shape() -> None:
    def model(x: Any) -> Any:
        return jnp.sum(sow(x, name="x"))

    for _, _, value in (running_pass := run(model, X, engine="python")):
        running_pass.modified_value = jnp.concatenate([value, value])
    np.testing.assert_allclose(running_pass.retval, 2 * X.sum(), rtol=1e-6)


def test_in_a_scan_a_value_keeps_its_form() -> None:
    with pytest.raises(ShapeError, match=r"site 0\.mlp_out"):
        loop("scanned", X, lambda site, value: jnp.zeros(7), sites="mlp_out")


def test_a_value_carried_out_of_a_body_is_named() -> None:
    kept: list[Any] = []
    running_pass = run(jax_form("checkpointed"), X, engine="python")
    with pytest.raises(RunningPassError) as error, running_pass:
        for _, _, value in running_pass:
            if kept:
                running_pass.modified_value = kept[0]
            kept.append(value)
    message = str(error.value)
    assert "the last site was 1.mlp_out" in message and "engine='compiled'" in message and "checkpoint" in message
    kept.clear()
    np.testing.assert_allclose(jax.jit(lambda x: x + 1.0)(X), X + 1.0)


def test_a_site_that_is_never_reached_is_an_error_at_the_end() -> None:
    with pytest.raises(SiteNotReachedError) as error:
        list(run(jax_form("straight"), X, sites=["mlp_outs", "embed"], engine="python"))
    assert "Unknown site 'mlp_outs'" in str(error.value) and "Did you mean 'mlp_out'?" in str(error.value)


def test_break_with_a_context_leaves_jax_clean() -> None:
    @jax.jit
    def partly(x: Any) -> Any:
        with run(jax_form("inner_jit"), x, engine="python") as running_pass:
            for layer, _, _value in running_pass:
                if layer == 1:
                    break
        return x * 2.0

    np.testing.assert_allclose(partly(X), X * 2.0)
    np.testing.assert_allclose(jax.jit(lambda x: x + 1.0)(X), X + 1.0)


def test_a_pass_under_way_does_not_change_how_the_consumer_compiles() -> None:
    traces = []

    @jax.jit
    def consumer(x: Any) -> Any:
        traces.append(1)
        return x + 1.0

    consumer(X)
    for _, _, value in run(jax_form("straight"), X, engine="python"):
        consumer(value)
    assert len(traces) == 2  # One for arrays of shape [3], one for the scalar logits.
