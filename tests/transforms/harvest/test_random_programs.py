"""Random harvests of random programs give what plain Python says, and leave no sow behind.

Every construct, mode and pair of modes, at every depth: values planted, names filtered, tags mixed, under jit and vmap.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import interp_jax.transforms.harvest as ours
from tests.transforms.harvest.random_harvests import Case, X, draw_case, perform, truth
from tests.transforms.harvest.random_programs import OTHER_TAG, TAG, jax_form


def check(case: Case) -> None:
    """The law."""
    if case.around == "grad":
        check_gradient(case)
        return
    mine, right = perform(case, ours), truth(case)
    about = f"{case}\n{case.program}"
    assert mine.keys() == right.keys(), about
    for path, value in right.items():
        assert mine[path].shape == value.shape, (path, about)
        np.testing.assert_allclose(mine[path], value, rtol=2e-4, atol=2e-5, err_msg=f"{path}\n{about}")
    fn = jax_form(case.program, ours)
    jaxpr = jax.make_jaxpr(ours.reap(fn, tag=TAG, exclusive=True))(jnp.asarray(X, jnp.float32))
    assert "sow" not in str(jaxpr), about
    assert ours.reap(ours.reap(fn, tag=OTHER_TAG), tag=OTHER_TAG)(jnp.asarray(X, jnp.float32)) == {}, about


def check_gradient(case: Case) -> None:
    """The derivative of a program's result is the same under a harvest that plants nothing."""
    fn = jax_form(case.program, ours)
    harvested = ours.call_and_reap(fn, tag=TAG, allowlist=case.allowlist, blocklist=case.blocklist)
    x = jnp.asarray(X, jnp.float32)
    mine = jax.jit(jax.grad(lambda x: harvested(x)[0].sum()))(x)
    np.testing.assert_allclose(
        mine, jax.grad(lambda x: fn(x).sum())(x), rtol=1e-3, atol=1e-4, err_msg=str(case.program)
    )


SEEDS: Any = st.integers(0, 2**32 - 1)


@settings(max_examples=4)
@given(SEEDS)
def test_a_few(seed: int) -> None:
    check(draw_case(seed))


@pytest.mark.slow
@settings(max_examples=40)
@given(SEEDS)
def test_many(seed: int) -> None:
    check(draw_case(seed))
