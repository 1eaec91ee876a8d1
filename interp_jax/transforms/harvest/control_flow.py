"""Harvest through loops and branches: what is reaped leaves a body in its carry or its stacked outputs.

In a scan, an appended value is a stacked output, a clobbered one rides in the carry, and a site of a scan over
layers rides in as many carry slots as layers were asked for, written in their iterations only (conditional
carry-sowing): memory grows with what is asked, not with depth. All layers together are a stacked output.

>>> import jax, jax.numpy as jnp
>>> from interp_jax.transforms.harvest.interpret import interpret
>>> from interp_jax.transforms.harvest.keys import Names, Place
>>> from interp_jax.transforms.harvest.planting import Planting
>>> from interp_jax.transforms.sowing import sow
>>> def total(xs):
...     return lax.scan(lambda c, x: (sow(c + x, tag="t", name="sum", mode="append"), None), 0.0, xs)[0]
>>> closed = jax.make_jaxpr(total)(jnp.arange(3.0))
>>> interpret(closed, [jnp.arange(3.0)], Planting(Names("t")), Place())[1][("sum",)].value
Array([0., 1., 3.], dtype=float32)

Source: Oryx Harvest for the modes; conditional carry-sowing as in the design page of this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from interp_jax.transforms.harvest.keys import Key, LoopSite, Place
from interp_jax.transforms.harvest.state import LoopIndex, Reaped, Result, Run, State, choose, zeros_of
from interp_jax.transforms.harvest.survey import Sown, survey, survey_branches, survey_scan, survey_while
from interp_jax.transforms.jaxprs import scan_counts


def harvest_scan(eqn: JaxprEqn, operands: list[Any], state: State, place: Place, run: Run) -> Result:
    """A scan under a harvest: still one scan."""
    params = eqn.params
    (n_consts, n_carry), length = scan_counts(eqn), params["length"]
    consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    inside, _ = survey_scan(eqn, state.policy, place)
    reaped = {key: sown for key, sown in inside.items() if not state.is_planted(key)}
    slots = {key: _Slots(key, sown, state, length) for key, sown in reaped.items() if _is_layer(key, place)}
    # A site of these layers may be asked for elsewhere only.
    reaped = {key: sown for key, sown in reaped.items() if key not in slots or slots[key].iterations}
    slots = {key: slot for key, slot in slots.items() if key in reaped}
    partial = [slot for slot in slots.values() if not slot.is_all]
    clobbered = {key: sown for key, sown in reaped.items() if sown.mode in ("clobber", "cond_clobber")}
    in_carry = {key: sown for key, sown in clobbered.items() if key not in slots}
    loop_state, planted, needs_index = state.enter_loop(inside, length)
    index = jnp.arange(length, dtype=jnp.int32) if partial or needs_index else None

    def body(carry: Any, xs: Any) -> Any:
        (own_carry, kept, buffers), (x, i, rows) = carry, xs
        here = loop_state.in_iteration(LoopIndex(i, length), dict(zip(planted, rows, strict=True)))
        outs, reaps = run(params["jaxpr"], [*consts, *own_carry, *x], here, place.in_loop())
        kept = [_keep(reaps[key], old) for key, old in zip(in_carry, kept, strict=True)]
        buffers = [slot.write(buffer, reaps[slot.key].value, i) for slot, buffer in zip(partial, buffers, strict=True)]
        stacked = [reaps[key].value for key in reaped if _is_stacked(key, in_carry, slots)]
        return (outs[:n_carry], kept, buffers), (outs[n_carry:], stacked)

    start = (init, [_nothing(sown) for sown in in_carry.values()], [slot.start() for slot in partial])
    xs = (operands[n_consts + n_carry :], index, list(planted.values()))
    options = {name: params[name] for name in ("reverse", "unroll") if name in params}
    (carry, kept, buffers), (ys, stacked) = lax.scan(body, start, xs, length=length, **options)
    stacks = dict(zip([key for key in reaped if _is_stacked(key, in_carry, slots)], stacked, strict=True))
    out: dict[Key, Reaped] = {}
    for key in reaped:
        if key in slots:
            slot = slots[key]
            out.update(slot.read(stacks[key] if slot.is_all else buffers[partial.index(slot)]))
        elif key in in_carry:
            out[key] = kept[list(in_carry).index(key)]
        else:
            out[key] = Reaped(stacks[key])
    return [*carry, *ys], out


def _is_layer(key: Key, place: Place) -> bool:
    """Whether a key in a scan's body is a site of that scan over layers."""
    return isinstance(key, LoopSite) and key.n_loops == place.n_loops + 1


def _is_stacked(key: Key, in_carry: dict[Key, Sown], slots: dict[Key, _Slots]) -> bool:
    return slots[key].is_all if key in slots else key not in in_carry


def _nothing(sown: Sown) -> Reaped:
    """What a carried sow holds before the first iteration."""
    return Reaped(zeros_of(sown.form), None if sown.when is None else jnp.zeros(sown.when, bool))


def _keep(new: Reaped, old: Reaped) -> Reaped:
    """What a carried sow holds after an iteration."""
    if old.when is None:
        return Reaped(new.value)
    if new.when is None:
        return Reaped(new.value, jnp.ones_like(old.when))
    when = jnp.broadcast_to(new.when, old.when.shape)
    return Reaped(choose(when, new.value, old.value), old.when | when)


class _Slots:
    """Where the asked-for iterations of a site of a loop over layers are kept."""

    def __init__(self, key: Key, sown: Sown, state: State, length: int):
        assert isinstance(key, LoopSite)
        self.key = key
        self.iterations = state.policy.iterations(key, length)
        # All iterations are cheaper as a stacked output; a loop that never runs has none.
        self.is_all = len(self.iterations) == length
        self._form = sown.form
        self._slot_of = np.full(max(length, 1), -1, np.int32)
        self._slot_of[self.iterations] = np.arange(len(self.iterations))

    def start(self) -> Any:
        """Empty slots."""
        n = len(self.iterations)
        return jax.tree.map(lambda leaf: jnp.zeros((n, *leaf.shape), leaf.dtype), self._form)

    def write(self, buffers: Any, value: Any, index: Any) -> Any:
        """The slots after the iteration with this index."""
        slot = jnp.asarray(self._slot_of)[index]
        row = jnp.maximum(slot, 0)

        def update(buffer: Any, leaf: Any) -> Any:
            old = lax.dynamic_index_in_dim(buffer, row, 0, keepdims=False)
            return lax.dynamic_update_index_in_dim(buffer, jnp.where(slot >= 0, leaf, old), row, 0)

        return jax.tree.map(update, buffers, value)

    def read(self, rows: Any) -> dict[Key, Reaped]:
        """The value of every asked-for site, from the slots or from the stack of all iterations."""
        return {
            self.key.site(i): Reaped(jax.tree.map(lambda leaf, slot=slot: leaf[slot], rows))
            for slot, i in enumerate(self.iterations)
        }


def harvest_while(eqn: JaxprEqn, operands: list[Any], state: State, place: Place, run: Run) -> Result:
    """A while loop under a harvest: what is reaped rides in the carry.

    Under vmap the predicate may differ between examples. Such a loop runs until the last example is done, and what is
    computed for an example after its own end does not count.
    """
    params = eqn.params
    n_condition, n_body = params["cond_nconsts"], params["body_nconsts"]
    condition_consts = operands[:n_condition]
    body_consts = operands[n_condition : n_condition + n_body]
    reaped = {key: sown for key, sown in survey_while(eqn, state.policy, place).items() if not state.is_planted(key)}
    loop_state, _, needs_index = state.enter_loop(reaped, None)
    is_per_example = bool(params["cond_jaxpr"].out_avals[0].shape)

    def goes_on(own_carry: Any, index: Any) -> Any:
        here = loop_state.in_iteration(LoopIndex(index, None), {})
        return run(params["cond_jaxpr"], [*condition_consts, *own_carry], here, place.in_loop())[0][0]

    def condition(carry: Any) -> Any:
        is_live = goes_on(carry[0], carry[2])
        return jnp.any(is_live) if is_per_example else is_live

    def body(carry: Any) -> Any:
        own_carry, kept, index = carry
        here = loop_state.in_iteration(LoopIndex(index, None), {})
        outs, reaps = run(params["body_jaxpr"], [*body_consts, *own_carry], here, place.in_loop())
        new = [_keep(reaps[key], old) for key, old in zip(reaped, kept, strict=True)]
        if is_per_example:
            is_live = goes_on(own_carry, index)
            outs = choose(is_live, outs, own_carry)
            live = [is_live if sown.n_batched else jnp.any(is_live) for sown in reaped.values()]
            new = [choose(here, after, before) for here, after, before in zip(live, new, kept, strict=True)]
        return outs, new, None if index is None else index + 1

    kept = [_nothing(sown) for sown in reaped.values()]
    start = (operands[n_condition + n_body :], kept, jnp.zeros((), jnp.int32) if needs_index else None)
    outs, kept, _ = lax.while_loop(condition, body, start)
    return outs, dict(zip(reaped, kept, strict=True))


def harvest_cond(eqn: JaxprEqn, operands: list[Any], state: State, place: Place, run: Run) -> Result:
    """A cond or switch under a harvest: every branch returns what it reaped."""
    keys = survey_branches([survey(branch.jaxpr, state.policy, place) for branch in eqn.params["branches"]])
    reaped = {key: sown for key, sown in keys.items() if not state.is_planted(key)}

    def branch(closed: Any) -> Any:
        def harvested(*args: Any) -> tuple[list[Any], list[Reaped]]:
            outs, reaps = run(closed, args, state, place)
            return outs, [_as_mode(reaps[key], sown) for key, sown in reaped.items()]

        return harvested

    branches: Sequence[Any] = [branch(closed) for closed in eqn.params["branches"]]
    outs, values = lax.switch(operands[0], branches, *operands[1:])
    return outs, dict(zip(reaped, values, strict=True))


def _as_mode(reaped: Reaped, sown: Sown) -> Reaped:
    """The same with a predicate exactly if its mode has one, so that branches agree in structure."""
    if sown.when is None:
        return Reaped(reaped.value)
    return Reaped(reaped.value, jnp.broadcast_to(True if reaped.when is None else reaped.when, sown.when))
