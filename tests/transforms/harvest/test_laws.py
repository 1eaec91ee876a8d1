"""The laws of a harvest, in every construct of JAX, for every pair of modes in one body, in both orders of their names.

The pairs of one construct stand in one program, each in a nest of its own, so that each construct compiles a few
programs instead of dozens. All numbers are exact in float32, so results are compared to the last bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interp_jax.transforms.harvest import call_and_reap, harvest, nest, plant, reap, sow, sow_cond
from tests.transforms.harvest.contexts import CONTEXTS, Context, Sown, Tree, expected

X = jnp.array([1.0, -2.0, 3.0, 0.5])
TAG = ("t", 1)  # Any hashable.

Sow = Callable[[Any, str, str, Any], Any]


def pairs(context: Context) -> list[tuple[str, str, str]]:
    """Modes of the first and the second sow, and the names: "ab" or "ba"."""
    return list(itertools.product(context.modes, context.modes, ("ab", "ba")))


def body(pair: tuple[str, str, str], x: Any, sow_one: Sow) -> Any:
    """Two sows, the second of what became of the first. Their predicates are not those of the last iteration."""
    first, second, names = pair
    a = sow_one(x * 0.5 + 1.0, names[0], first, x[0] > 1.5)
    b = sow_one(a - x * 0.25, names[1], second, a[2] < 2.25)
    return b * 0.5 + a * 0.25


def sow_in(value: Any, name: str, mode: str, when: Any) -> Any:
    if mode == "cond_clobber":
        return sow_cond(value, when, tag=TAG, name=name)
    return sow(value, tag=TAG, name=name, mode=mode)


def program(context: Context) -> Callable[[Any], dict[str, Any]]:
    def run(x: Any) -> dict[str, Any]:
        return {
            str(pair): nest(lambda x, pair=pair: context.jax_form(lambda x: body(pair, x, sow_in), x), scope=str(pair))(x)
            for pair in pairs(context)
        }

    return run


def plain_body(pair: tuple[str, str, str], x: Any, plants: dict[str, Any]) -> tuple[Any, Tree]:
    sown: dict[str, Sown] = {}

    def record(value: Any, name: str, mode: str, when: Any) -> Any:
        if name in plants:
            return next(plants[name]) if hasattr(plants[name], "__next__") else plants[name]
        sown[name] = Sown(value, bool(when) if mode == "cond_clobber" else True)
        return value

    return body(pair, x, record), sown


def reference(context: Context) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    outs, reaps = {}, {}
    for pair in pairs(context):
        outs[str(pair)], tree = _concretely(context, pair)
        reaps[str(pair)] = {
            name: expected(tree, name, mode) for name, mode in zip(pair[2], pair[:2], strict=True)
        }
    return outs, reaps


def _concretely(context: Context, pair: tuple[str, str, str]) -> tuple[Any, Any]:
    """The plain form; what JAX differentiates of it is not what is recorded."""

    def run(x: Any) -> tuple[Any, Tree]:
        if isinstance(x, jax.core.Tracer):
            return body(pair, x, lambda value, name, mode, when: value), {}
        return plain_body(pair, x, {})

    return context.plain(run, X)


def assert_equal(ours: Any, truth: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(truth)
    for path, leaf in jax.tree.leaves_with_path(truth):
        mine = dict(jax.tree.leaves_with_path(ours))[path]
        np.testing.assert_array_equal(mine, leaf, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.name)
def test_reaps_and_results_are_those_of_plain_python(context: Context) -> None:
    outs, reaps = reference(context)
    assert_equal(jax.jit(call_and_reap(program(context), tag=TAG))(X), (outs, reaps))
