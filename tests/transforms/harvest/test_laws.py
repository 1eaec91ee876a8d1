"""The laws of a harvest, in every construct of JAX, for every pair of modes in one body, in both orders of their names.

The pairs of one construct stand in one program, each in a nest of its own, so that each construct compiles a few
programs instead of dozens. All numbers are exact in float32, so results are compared to the last bit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

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


Pairs = list[tuple[str, str, str]]


def program(context: Context, which: Pairs, sow_one: Sow = sow_in) -> Callable[[Any], dict[str, Any]]:
    """All bodies of a construct in one function."""

    def of_pair(pair: tuple[str, str, str]) -> Callable[[Any], Any]:
        return nest(lambda x: context.jax_form(lambda x: body(pair, x, sow_one), x), scope=str(pair))

    def bodies(x: Any) -> dict[str, Any]:
        return {str(pair): of_pair(pair)(x) for pair in which}

    return bodies


def reference(context: Context, which: Pairs, *, added: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
    """What plain Python returns and sows, when `added` is added to each value where it is sown."""

    def run(pair: tuple[str, str, str], x: Any) -> tuple[Any, Tree]:
        sown: dict[str, Sown] = {}

        def record(value: Any, name: str, mode: str, when: Any) -> Any:
            if not isinstance(value, Tracer):  # What JAX differentiates is not what is recorded.
                sown[name] = Sown(value + added, bool(when) if mode == "cond_clobber" else True)
            return value + added

        return body(pair, x, record), sown

    outs: dict[str, Any] = {}
    reaps: dict[str, Any] = {}
    for pair in which:
        outs[str(pair)], tree = context.plain(lambda x, pair=pair: run(pair, x), X)
        reaps[str(pair)] = {name: expected(tree, name, mode) for name, mode in zip(pair[2], pair[:2], strict=True)}
    return outs, reaps


def assert_equal(ours: Any, truth: Any) -> None:
    """Equal to the last bit."""
    mine = dict(jax.tree.leaves_with_path(ours))
    theirs = dict(jax.tree.leaves_with_path(truth))
    assert mine.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(mine[path], leaf, err_msg=jax.tree_util.keystr(path))


def each(contexts: Sequence[Context]) -> Any:
    return pytest.mark.parametrize("context", contexts, ids=lambda context: context.name)


@each(CONTEXTS)
def test_reaps_and_results_are_those_of_plain_python(context: Context) -> None:
    which = pairs(context)
    assert_equal(jax.jit(call_and_reap(program(context, which), tag=TAG))(X), reference(context, which))


# A planted value ends the derivative of what it replaces, and clobbered values of a loop are not those of each
# iteration.
PLANTABLE = [context for context in CONTEXTS if "strict" in context.modes or "append" in context.modes]
PLANTABLE = [context for context in PLANTABLE if not context.name.startswith("grad")]


def plantable_pairs(context: Context) -> Pairs:
    modes = [mode for mode in context.modes if mode in ("strict", "append") or "strict" in context.modes]
    return [pair for pair in pairs(context) if set(pair[:2]) <= set(modes) - {"cond_clobber"}]


@each(PLANTABLE)
def test_planting_what_was_reaped_changes_nothing(context: Context) -> None:
    fn = program(context, plantable_pairs(context))
    outs, reaps = jax.jit(call_and_reap(fn, tag=TAG))(X)
    assert_equal(jax.jit(harvest(fn, tag=TAG))(reaps, X), (outs, {}))


@each(PLANTABLE)
def test_what_is_planted_takes_the_place_of_what_is_sown(context: Context) -> None:
    which = plantable_pairs(context)
    outs, values = reference(context, which, added=1.0)
    assert_equal(jax.jit(plant(program(context, which), tag=TAG))(values, X), outs)
    # Half of them: the others are reaped as they then are.
    first = {str(pair): {pair[2][0]: values[str(pair)][pair[2][0]]} for pair in which}
    second = {str(pair): {pair[2][1]: values[str(pair)][pair[2][1]] - 1.0} for pair in which}
    _, reaps = jax.jit(harvest(program(context, which), tag=TAG))(first, X)
    if context.name not in SECOND_FEEDS_FIRST:
        assert_equal(reaps, second)


# Constructs in which the second sow's value decides the first of the next iteration.
SECOND_FEEDS_FIRST = [context.name for context in CONTEXTS if "strict" not in context.modes]


@each(CONTEXTS)
def test_no_sow_is_left_and_a_second_harvest_finds_nothing(context: Context) -> None:
    fn = program(context, pairs(context)[:1])
    assert "sow" not in str(jax.make_jaxpr(reap(fn, tag=TAG))(X))
    assert "sow" not in str(jax.make_jaxpr(reap(fn, tag=TAG, allowlist=[]))(X))
    assert "sow" not in str(jax.make_jaxpr(reap(fn, tag="other", exclusive=True))(X))
    assert reap(reap(fn, tag=TAG), tag=TAG)(X) == {}


@each(CONTEXTS)
def test_a_harvest_of_nothing_is_the_plain_function(context: Context) -> None:
    # The predicate of a conditional sow is an operation of its own, so those are not in here.
    which = [pair for pair in pairs(context) if "cond_clobber" not in pair]
    sown = program(context, which)
    plain = program(context, which, lambda value, name, mode, when: value)
    text = _lowered(plain)
    assert _lowered(sown) == text
    assert _lowered(lambda x: harvest(sown, tag="other")({}, x)[0]) == text
    assert _lowered(lambda x: plant(sown, tag=TAG)({}, x)) == text


def _lowered(fn: Callable[..., Any]) -> str:
    """StableHLO, its private functions numbered in the order in which they appear: JAX 0.8 counts other things too."""
    fn.__name__ = "fn"
    numbers: dict[str, int] = {}
    return re.sub(
        r'@("?[\w<>]+?)_\d+\b',
        lambda match: f"@{match[1]}_{numbers.setdefault(match[0], len(numbers))}",
        jax.jit(fn).lower(X).as_text(),
    )


@each(CONTEXTS)
def test_eagerly_the_same(context: Context) -> None:
    which = pairs(context)[-3:]
    assert_equal(call_and_reap(program(context, which), tag=TAG)(X), reference(context, which))


@each(CONTEXTS)
def test_callbacks_are_called_as_often_as_without_a_harvest(context: Context) -> None:
    calls: list[str] = []

    def noisy(value: Any, name: str, mode: str, when: Any) -> Any:
        jax.debug.callback(lambda _: calls.append(name), value)
        return sow_in(value, name, mode, when)

    counts = []
    fn = program(context, pairs(context)[-1:], noisy)
    for run in (fn, call_and_reap(fn, tag=TAG), jax.jit(fn), jax.jit(call_and_reap(fn, tag=TAG))):
        calls.clear()
        jax.block_until_ready(run(X))
        jax.effects_barrier()
        counts.append(sorted(calls))
    assert counts[0] and counts[1] == counts[0] and counts[3] == counts[2]


@each([context for context in CONTEXTS if "while" not in context.name and "grad" not in context.name])
def test_gradients_through_a_harvest_are_those_of_the_function(context: Context) -> None:
    which = pairs(context)[:1]
    fn = program(context, which)

    def total(result: Any) -> Any:
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(result))

    truth = jax.jit(jax.grad(lambda x: total(fn(x))))(X)
    assert_equal(jax.jit(jax.grad(lambda x: total(call_and_reap(fn, tag=TAG)(x)[0])))(X), truth)
    with jax.checking_leaks():
        assert_equal(jax.grad(lambda x: total(call_and_reap(fn, tag=TAG)(x)[0]))(X), truth)
