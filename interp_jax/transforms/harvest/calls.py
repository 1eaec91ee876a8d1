"""Harvest through calls: jit, checkpoint, shard_map and functions with derivative rules of their own.

A call stays the call it was. What is reaped inside leaves it as further results.

>>> import jax
>>> from interp_jax.transforms.harvest.interpret import interpret
>>> from interp_jax.transforms.harvest.keys import Names
>>> from interp_jax.transforms.harvest.planting import Planting
>>> from interp_jax.transforms.sowing import sow
>>> def read(x):
...     closed = jax.make_jaxpr(jax.jit(lambda x: sow(x * 2.0, tag="t", name="a") + 1.0))(1.0)
...     return interpret(closed, [x], Planting(Names("t")), Place())[1][("a",)].value
>>> [eqn.primitive.name for eqn in jax.make_jaxpr(read)(3.0).eqns]
['jit']

Sharp edges: what lies inside a custom_jvp or custom_vjp call is read by running its code a second time beside the call,
as far as the values need it; compiled, the two are one. The derivative of such a value is that of the code. Once
something inside is changed the code gives the result too, and the call's rule no longer counts.

Source: Oryx Harvest for the semantics of calls with derivative rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.interpreters import ad, partial_eval
from jax.sharding import PartitionSpec, Sharding

from interp_jax.transforms.harvest.keys import Key, Place
from interp_jax.transforms.harvest.state import Reaped, Result, Run, State
from interp_jax.transforms.harvest.survey import concerns, is_recomputation, keys_in, survey
from interp_jax.transforms.jaxprs import (
    CHECKPOINTS,
    CUSTOM_RULES,
    bind,
    callee_of,
    equation_without_sows,
    evaluate,
    with_callee,
)

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def harvest_call(eqn: JaxprEqn, operands: list[Any], state: State, place: Place, run: Run) -> Result:
    """A call of one jaxpr under a harvest: still the same call."""
    name = eqn.primitive.name
    if name in CUSTOM_RULES:
        return _custom_rule(eqn, operands, state, place, run)
    callee = callee_of(eqn)
    if name in ("jit", "pjit"):
        return _jit(eqn, callee, operands, state, place, run)
    if name in CHECKPOINTS:
        return _checkpoint(eqn, callee, operands, state, place, run)
    return run(callee, operands, state, place)


def _through(wrap: Wrap, callee: ClosedJaxpr, operands: Sequence[Any], state: State, place: Place, run: Run) -> Result:
    """Run a jaxpr under a harvest inside a call that `wrap` makes out of a function."""
    keys: list[Key] = []

    def inner(*args: Any) -> tuple[list[Any], list[Reaped]]:
        outs, reaps = run(callee, args, state, place)
        keys[:] = list(reaps)
        return outs, list(reaps.values())

    outs, values = wrap(inner)(*operands)
    return outs, dict(zip(keys, values, strict=True))


def _jit(eqn: JaxprEqn, callee: ClosedJaxpr, operands: list[Any], state: State, place: Place, run: Run) -> Result:
    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        fn.__name__ = fn.__qualname__ = eqn.params["name"]
        return jax.jit(fn, inline=eqn.params["inline"])

    operands = _constrained(operands, eqn.params["in_shardings"])
    outs, reaps = _through(wrap, callee, operands, state, place, run)
    return _constrained(outs, eqn.params["out_shardings"]), reaps


def _constrained(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Values under the shardings a jit asked for."""
    pairs = zip(values, shardings, strict=True)
    return [lax.with_sharding_constraint(v, s) if isinstance(s, Sharding) else v for v, s in pairs]


def _checkpoint(
    eqn: JaxprEqn, callee: ClosedJaxpr, operands: list[Any], state: State, place: Place, run: Run
) -> Result:
    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.checkpoint(fn, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])

    if not is_recomputation(eqn):
        return _through(wrap, callee, operands, state, place, run)
    # A recomputation must say that it is one, or the compiler merges it with what it repeats. Only equations say so.
    silent = state.reading_nothing()
    closed = jax.make_jaxpr(lambda *args: _through(wrap, callee, args, silent, place, run)[0])(*operands)

    def replay(inner: JaxprEqn, values: list[Any]) -> list[Any]:
        if inner.primitive is eqn.primitive:
            inner = inner.replace(params={**inner.params, "differentiated": True})
        return evaluate(inner, values)

    return _run(closed, operands, replay), {}


def _run(closed: ClosedJaxpr, args: Sequence[Any], rule: Callable[[JaxprEqn, list[Any]], list[Any]]) -> list[Any]:
    """Run a jaxpr by a rule for its equations."""
    jaxpr = closed.jaxpr
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, rule(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def harvest_shard_map(eqn: JaxprEqn, operands: list[Any], state: State, place: Place, run: Run) -> Result:
    """A shard_map under a harvest: values that all devices share can leave it; the survey has refused others."""
    params = eqn.params
    inner = params["jaxpr"]
    keys = [key for key in survey(inner, state.policy, place) if not state.is_planted(key)]

    def harvested(*args: Any) -> tuple[list[Any], list[Reaped]]:
        outs, reaps = run(ClosedJaxpr(inner, ()), args, state, place)
        return outs, [reaps[key] for key in keys]

    mapped = jax.shard_map(
        harvested,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=(list(params["out_specs"]), PartitionSpec()),
        # JAX has renamed this parameter.
        axis_names=params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"],
        check_vma=params["check_vma"],
    )
    outs, values = mapped(*operands)
    return outs, dict(zip(keys, values, strict=True))


def _custom_rule(eqn: JaxprEqn, operands: list[Any], state: State, place: Place, run: Run) -> Result:
    callee = callee_of(eqn)
    if any(map(state.changes, keys_in(callee.jaxpr, state.policy, place))):
        return run(callee, operands, state, place)
    reaps = _read_beside(callee, operands, state, place, run)
    if is_being_differentiated(eqn, operands):
        harvested = _harvest_jvp_rule(eqn, operands, state, place, run)
        if harvested is not None:
            results, of_rule = harvested
            return results, {**of_rule, **reaps}
    if state.is_silent:
        quiet = jax.make_jaxpr(lambda *args: run(callee, args, state.reading_nothing(), place)[0])(*operands)
        return bind(with_callee(eqn, quiet), operands), reaps
    return bind(equation_without_sows(eqn, state.policy.dropped), operands), reaps


def is_being_differentiated(eqn: JaxprEqn, operands: Sequence[Any]) -> bool:
    """Whether `eqn` is a custom_jvp call that is about to run its rule on `operands`: the rule's sows are then sown."""
    return eqn.primitive.name == "custom_jvp_call" and any(isinstance(o, ad.JVPTracer) for o in operands)


def _read_beside(callee: ClosedJaxpr, operands: list[Any], state: State, place: Place, run: Run) -> dict[Key, Reaped]:
    """What a jaxpr sows, computed by as much of it as is needed, and without its effects."""
    keys: list[Key] = []

    def read(*args: Any) -> list[Reaped]:
        reaps = run(callee, args, state.silenced(), place)[1]
        keys[:] = list(reaps)
        return list(reaps.values())

    closed, forms = jax.make_jaxpr(read, return_shape=True)(*operands)
    jaxpr, reads_consts, reads_args = partial_eval.dce_jaxpr_consts(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    consts = [const for const, is_read in zip(closed.consts, reads_consts, strict=True) if is_read]
    args = [operand for operand, is_read in zip(operands, reads_args, strict=True) if is_read]
    values = eval_jaxpr(jaxpr, consts, *args)
    return dict(zip(keys, jax.tree.unflatten(jax.tree.structure(forms), values), strict=True))


def _harvest_jvp_rule(eqn: JaxprEqn, operands: list[Any], state: State, place: Place, run: Run) -> Result | None:
    """Harvest the rule of a custom_jvp call that is about to run, or None if there is nothing in it to harvest."""

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        return jax.jvp(lambda *args: evaluate(eqn, args), tuple(primals), tuple(tangents))

    forms = [jax.ShapeDtypeStruct(jnp.shape(o), o.dtype) for o in operands]
    closed = jax.make_jaxpr(rule)(forms, forms)
    if not any(concerns(inside, state.policy, place) for inside in closed.jaxpr.eqns):
        return None
    keys: list[Key] = []

    @jax.custom_jvp
    def harvested(args: list[Any], arrays: Any) -> tuple[list[Any], list[Any]]:
        raise AssertionError("called only to be differentiated")

    @harvested.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (args, arrays), (args_dot, _) = primals, tangents
        outs, reaps = run(closed, [*args, *args_dot], state.with_arrays(arrays), place)
        keys[:] = list(reaps)
        values = [reaped.value for reaped in reaps.values()]
        n = len(eqn.outvars)
        return (outs[:n], values), (outs[n:], jax.tree.map(jnp.zeros_like, values))

    results, values = harvested(operands, state.arrays)
    return results, {key: Reaped(value) for key, value in zip(keys, values, strict=True)}
