"""The interpreter of harvest: run a jaxpr, giving values to its sows and taking values from them.

One rule per kind of equation that holds a jaxpr; every other equation is evaluated as it is. Calls stay calls: a
jit stays one jit, a checkpoint stays rematerialised, a custom derivative rule stays in force. After it no sow of the
harvest is left.

>>> import jax
>>> from interp_jax.transforms.harvest.keys import Names
>>> from interp_jax.transforms.harvest.planting import Planting
>>> from interp_jax.transforms.sowing import sow
>>> closed = jax.make_jaxpr(jax.jit(lambda x: sow(x * 2.0, tag="t", name="a") + 1.0))(1.0)
>>> outs, reaps = interpret(closed, [3.0], Planting(Names("t")), Place())
>>> float(outs[0]), float(reaps[("a",)].value)
(7.0, 6.0)

Source: Oryx Harvest for the semantics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from interp_jax.transforms.harvest.calls import harvest_call, harvest_shard_map, is_being_differentiated
from interp_jax.transforms.harvest.control_flow import harvest_cond, harvest_scan, harvest_while
from interp_jax.transforms.harvest.keys import EVERY, Key, Place
from interp_jax.transforms.harvest.state import Reaped, Result, State, choose, zeros_of
from interp_jax.transforms.harvest.survey import concerns, keys_of
from interp_jax.transforms.jaxprs import OPENABLE, at_equation, bind, equation_without_sows, evaluate, outline_of
from interp_jax.transforms.sowing import leaves_of_seen, predicate_seen, sow_p, value_seen

_RULES = {"scan": harvest_scan, "while": harvest_while, "cond": harvest_cond, "shard_map": harvest_shard_map}


def interpret(
    closed: ClosedJaxpr, args: Sequence[Any], state: State, place: Place
) -> tuple[list[Any], dict[Key, Reaped]]:
    """Run a jaxpr under a harvest.

    Args:
        closed: The program.
        args: Values of its arguments.
        state: What is done at its sows.
        place: Where it is called.

    Returns:
        Its results, and what was reaped, in execution order.
    """
    jaxpr, outline = closed.jaxpr, outline_of(closed.jaxpr)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    reaps: dict[Key, Reaped] = {}
    dropped = EVERY if state.is_silent else state.policy.dropped

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for index, eqn in enumerate(jaxpr.eqns):
        if state.is_silent and eqn.effects and index in outline.unread and index not in outline.busy:
            continue
        operands = [read(atom) for atom in eqn.invars]
        if _is_touched(eqn, operands, state, place, is_busy=index in outline.busy):
            results, new = _rule(eqn, operands, state, place.of(eqn))
            for key, reaped in new.items():
                reaps[key] = _merge(reaps.pop(key, None), reaped)
        elif index in outline.busy and eqn.primitive is not sow_p:
            results = evaluate(equation_without_sows(eqn, dropped), operands)
        else:
            results = evaluate(eqn, operands)
        env.update(zip(eqn.outvars, results, strict=True))
        for var in outline.frees[index]:
            env.pop(var, None)
    return [read(atom) for atom in jaxpr.outvars], reaps


def _is_touched(eqn: JaxprEqn, operands: Sequence[Any], state: State, place: Place, *, is_busy: bool) -> bool:
    """Whether there is more to do in an equation than to take sows out of it."""
    if state.is_silent and eqn.effects and eqn.primitive.name in OPENABLE:
        return True
    if is_busy and eqn.primitive is sow_p:
        return state.is_silent or concerns(eqn, state.policy, place)
    if is_busy and any(state.policy.is_wanted(key) or state.changes(key) for key in keys_of(eqn, state.policy, place)):
        return True
    return is_being_differentiated(eqn, operands)


def _merge(old: Reaped | None, new: Reaped) -> Reaped:
    """What is left of two sows of one key, the later one conditional or not."""
    if old is None or new.when is None:
        return new
    value = choose(new.when, new.value, old.value)
    return Reaped(value, None if old.when is None else old.when | new.when)


def _rule(eqn: JaxprEqn, operands: list[Any], state: State, place: Place) -> Result:
    with at_equation(eqn):
        if eqn.primitive is sow_p:
            return _sow(eqn, operands, state, place)
        rule = _RULES.get(eqn.primitive.name, harvest_call)
        return rule(eqn, operands, state, place, interpret)


def _sow(eqn: JaxprEqn, operands: list[Any], state: State, place: Place) -> Result:
    params = eqn.params
    values = operands[: len(eqn.outvars)]
    key = state.policy.key(eqn, place)
    if key is None:
        return values, {}
    old = value_seen(values, params)
    new, is_reaped = state.visit(key, old)
    results = values if new is old else leaves_of_seen(new, params)
    if state.resows and not state.is_silent:
        results = bind(eqn, [*results, *operands[len(values) :]])
    if not is_reaped:
        return results, {}
    when = predicate_seen(operands, params)
    if when is not None:
        new = choose(when, new, zeros_of(new))
    return results, {key: Reaped(new, when)}
