"""The interpreter of harvest: run a jaxpr, giving values to its sows and taking values from them.

One rule per kind of equation that holds a jaxpr; every other equation is evaluated as it is. Calls stay calls: a
jit stays one jit, a checkpoint stays rematerialised, a custom derivative rule stays in force. After it no sow of the
harvest is left.

>>> import jax
>>> from interp_jax.transforms.harvest.keys import Names
>>> from interp_jax.transforms.sowing import sow
>>> closed = jax.make_jaxpr(jax.jit(lambda x: sow(x * 2.0, tag="t", name="a") + 1.0))(1.0)
>>> outs, reaps = interpret(closed, [3.0], Planting(Names("t")), Place())
>>> float(outs[0]), float(reaps[("a",)].value)
(7.0, 6.0)

Source: Oryx Harvest for the semantics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal
from jax.interpreters import ad

from interp_jax.core.errors import ShapeError
from interp_jax.core.interventions import same_form
from interp_jax.transforms.harvest.keys import Key, Place, Policy, show_key
from interp_jax.transforms.harvest.survey import Sown, concerns
from interp_jax.transforms.jaxprs import at_equation, evaluate, inner_jaxprs, outline_of
from interp_jax.transforms.sowing import leaves_of_seen, predicate_seen, sow_p, value_seen


class Reaped(NamedTuple):
    """A value taken from a sow, and the predicate under which it was sown (None: always)."""

    value: Any
    when: Any = None


class LoopIndex(NamedTuple):
    """The (traced) index of a loop, and how often the loop runs. A while loop knows neither."""

    index: Any
    length: int | None


class State(Protocol):
    """What is done at the sows: which count, and what their values become."""

    @property
    def policy(self) -> Policy:
        """Which sows count."""
        ...

    @property
    def is_silent(self) -> bool:
        """Whether effects whose results nobody reads are left out, because the same code also runs elsewhere."""
        ...

    def visit(self, key: Key, value: Any) -> tuple[Any, bool]:
        """The value to go on with at a sow, and whether it is also to be reaped."""
        ...

    @property
    def resows(self) -> bool:
        """Whether the sows stay, on the new values, for whoever listens further out."""
        ...

    def is_planted(self, key: Key) -> bool:
        """Whether the sow's value is given, so that it is not reaped."""
        ...

    def changes(self, key: Key) -> bool:
        """Whether the value at this sow may become another."""
        ...

    def enter_loop(self, inside: Mapping[Key, Sown], length: int | None) -> tuple[State, dict[Key, Any], bool]:
        """The state for a loop, the values it plants one per iteration, and whether it must know the index."""
        ...

    def in_iteration(self, at: LoopIndex, rows: Mapping[Key, Any]) -> State:
        """The state for the body, in one iteration with its row of the values planted one per iteration."""
        ...

    @property
    def arrays(self) -> Any:
        """The arrays the state holds, for code that must be given them as arguments."""
        ...

    def with_arrays(self, arrays: Any) -> State:
        """The state with those arrays replaced."""
        ...

    def silenced(self) -> State:
        """The state with `is_silent`."""
        ...

    def reading_nothing(self) -> State:
        """The state that reaps nothing."""
        ...


@dataclass(frozen=True)
class Planting:
    """Plants values by key and reaps all other wanted sows, as Oryx does."""

    policy: Policy
    plants: Mapping[Key, Any] = field(default_factory=dict)
    is_silent: bool = False
    resows = False

    def visit(self, key: Key, value: Any) -> tuple[Any, bool]:
        if not self.policy.is_wanted(key):
            return value, False
        if key not in self.plants:
            return value, True
        return same_form(value, self.plants[key], where=show_key(key)), False

    def is_planted(self, key: Key) -> bool:
        return key in self.plants

    changes = is_planted

    def enter_loop(self, inside: Mapping[Key, Sown], length: int | None) -> tuple[Planting, dict[Key, Any], bool]:
        appended = {key for key, sown in inside.items() if sown.mode == "append"}
        return self, {key: value for key, value in self.plants.items() if key in appended}, False

    def in_iteration(self, at: LoopIndex, rows: Mapping[Key, Any]) -> Planting:
        return replace(self, plants={**self.plants, **rows})

    @property
    def arrays(self) -> Any:
        return dict(self.plants)

    def with_arrays(self, arrays: Any) -> Planting:
        return replace(self, plants=arrays)

    def silenced(self) -> Planting:
        return replace(self, is_silent=True)

    def reading_nothing(self) -> Planting:
        return replace(self, policy=self.policy.reading_nothing())


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

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for index, eqn in enumerate(jaxpr.eqns):
        if state.is_silent and eqn.effects and index in outline.unread and index not in outline.busy:
            continue
        operands = [read(atom) for atom in eqn.invars]
        if _is_touched(eqn, operands, state, place, is_busy=index in outline.busy):
            with at_equation(eqn):
                results, new = _rule(eqn, operands, state, place.of(eqn))
            for key, reaped in new.items():
                reaps[key] = _merge(reaps.pop(key, None), reaped)
        else:
            results = evaluate(eqn, operands)
        env.update(zip(eqn.outvars, results, strict=True))
        for var in outline.frees[index]:
            env.pop(var, None)
    return [read(atom) for atom in jaxpr.outvars], reaps


def _is_touched(eqn: JaxprEqn, operands: Sequence[Any], state: State, place: Place, *, is_busy: bool) -> bool:
    """Whether there is anything to do in an equation."""
    if is_busy and concerns(eqn, state.policy, place):
        return True
    if state.is_silent and eqn.effects:
        return any(True for _ in inner_jaxprs(eqn))
    return is_being_differentiated(eqn, operands)


def is_being_differentiated(eqn: JaxprEqn, operands: Sequence[Any]) -> bool:
    """Whether a custom_jvp call is about to run its rule, whose sows are then sown too."""
    return eqn.primitive.name == "custom_jvp_call" and any(isinstance(o, ad.JVPTracer) for o in operands)


def _merge(old: Reaped | None, new: Reaped) -> Reaped:
    """What is left of two sows of one key, the later one conditional or not."""
    if old is None or new.when is None:
        return new
    value = choose(new.when, new.value, old.value)
    return Reaped(value, None if old.when is None else old.when | new.when)


def choose(predicate: Any, value: Any, other: Any) -> Any:
    """`value` where the predicate is true, else `other`; leading axes of the predicate are those of the values."""

    def leaf(a: Any, b: Any) -> Any:
        shape = jnp.shape(predicate) + (1,) * (jnp.ndim(a) - jnp.ndim(predicate))
        return jnp.where(jnp.broadcast_to(jnp.reshape(predicate, shape), jnp.shape(a)), a, b)

    return jax.tree.map(leaf, value, other)


def zeros_of(form: Any) -> Any:
    """Zeros of a form."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), form)


Result = tuple[Sequence[Any], dict[Key, Reaped]]


def _rule(eqn: JaxprEqn, operands: list[Any], state: State, place: Place) -> Result:
    if eqn.primitive is sow_p:
        return _sow(eqn, operands, state, place)
    from interp_jax.transforms.harvest import calls, control_flow

    rule = {
        "scan": control_flow.harvest_scan,
        "while": control_flow.harvest_while,
        "cond": control_flow.harvest_cond,
        "shard_map": calls.harvest_shard_map,
    }.get(eqn.primitive.name, calls.harvest_call)
    return rule(eqn, operands, state, place)


def _sow(eqn: JaxprEqn, operands: list[Any], state: State, place: Place) -> Result:
    params = eqn.params
    values = operands[: len(eqn.outvars)]
    key = state.policy.key(eqn, place)
    if key is None:
        return values, {}
    old = value_seen(values, params)
    new, is_reaped = state.visit(key, old)
    results = values if new is old else leaves_of_seen(new, params)
    if state.resows:
        results = evaluate(eqn, [*results, *operands[len(values) :]])
    if not is_reaped:
        return results, {}
    when = predicate_seen(operands, params)
    if when is not None:
        new = choose(when, new, zeros_of(new))
    return results, {key: Reaped(new, when)}


def check_fits(key: Key, sown: Sown, value: Any, *, where: str) -> Any:
    """A value to be planted, once it is known to have the form of what is sown.

    Args:
        key: The sow's key.
        sown: What is sown there.
        value: What is to be planted.
        where: The public call.

    Returns:
        The value as arrays of the sown dtypes; Python numbers are converted.

    Raises:
        ShapeError: Structure, a shape or a dtype differs.
    """
    try:
        return same_form(sown.form, value, where=f"{show_key(key)} (sown at {sown.source})")
    except ShapeError as error:
        raise ShapeError(str(error).replace("in site", f"in {where}, sow", 1)) from None
