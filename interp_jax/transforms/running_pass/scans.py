"""Stepping a scan: stop in the iterations that hold selected sites, roll through all others.

The iterations are cut into stretches. A stretch without a selected site runs as one rolled loop; an iteration with
one runs as pieces, like any other plan. Outside a trace the bounds of a stretch and the number of an iteration are
arguments of compiled programs, so moving an intervention to another layer compiles nothing, and an iteration reads
its row of the scanned arrays inside the program that needs it. Under a trace the bounds are constants and the
scanned arrays are split once, so that a gradient flows back as one concatenation.

>>> stretches([2, 3], 6)
[(0, 2, False), (2, 3, True), (3, 4, True), (4, 6, False)]

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from interp_jax.core.sites import Site
from interp_jax.transforms.compilations import counted_jit
from interp_jax.transforms.jaxprs import evaluate, scan_counts, site_of
from interp_jax.transforms.running_pass.plan import Plan, ScanStep, SiteStep, inner_plans
from interp_jax.transforms.running_pass.programs import Slice, cached, is_traced, param_key


def stretches(touched: Collection[int], length: int) -> list[tuple[int, int, bool]]:
    """Cut `range(length)` into single touched iterations and the runs between them: `(start, stop, is_touched)`."""
    out, start = [], 0
    for index in sorted(touched):
        if index > start:
            out.append((start, index, False))
        out.append((index, index + 1, True))
        start = index + 1
    if start < length:
        out.append((start, length, False))
    return out


RunBody: TypeAlias = Callable[[Sequence[Any], int], Generator[Any, Any, list[Any]]]


@dataclass
class ScanFrame:
    """A scan under way. `run_body` runs one iteration as pieces, given its arguments and its index."""

    step: ScanStep
    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    ys: list[Any]
    cuts: list[tuple[int, int, bool]]
    run_body: RunBody
    index: int = 0

    @classmethod
    def at_start(
        cls,
        step: ScanStep,
        operands: list[Any],
        selected: frozenset[Site],
        loop_indices: tuple[int, ...],
        run_body: RunBody,
    ) -> ScanFrame:
        """A `step` on `operands`, inside loops at `loop_indices`, before its first iteration; stops at `selected`."""
        (n_consts, n_carry), length = scan_counts(step.eqn), step.eqn.params["length"]
        touched = [i for i in range(length) if is_touched(step.body, (*loop_indices, i), selected)]
        forms: list[Any] = [var.aval for var in step.eqn.outvars[n_carry:]]
        return cls(
            step,
            consts=operands[:n_consts],
            carry=operands[n_consts : n_consts + n_carry],
            xs=operands[n_consts + n_carry :],
            ys=[jnp.zeros(form.shape, form.dtype) for form in forms],
            cuts=stretches(touched, length),
            run_body=run_body,
        )

    def put(self, results: list[Any]) -> None:
        """Note the results of the present iteration."""
        n_carry = len(self.carry)
        self.carry = results[:n_carry]
        new = results[n_carry:]
        self.ys = [lax.dynamic_update_index_in_dim(y, one, self.index, 0) for y, one in zip(self.ys, new, strict=True)]

    def finish(
        self, results: list[Any], selected: frozenset[Site], changed: set[int]
    ) -> Generator[Any, Any, list[Any]]:
        """The scan's results if the present iteration had these; the rest runs as one loop, or up to its sites."""
        frame = replace(self)
        frame.put(results)
        length, is_reverse = self.step.eqn.params["length"], self.step.eqn.params["reverse"]
        start, stop = (0, self.index) if is_reverse else (self.index + 1, length)
        yield from ()
        carry, ys = _rolled(frame, start, stop, donates=False)  # Under vmap the outputs gain an axis.
        return [*carry, *ys]


def step_scan(frame: ScanFrame) -> Generator[Any, Any, list[Any]]:
    """Run a scan, yielding what its `run_body` yields in the iterations with selected sites.

    Args:
        frame: The scan, before its first iteration.

    Returns:
        The final carry and the stacked outputs, as the value of `StopIteration`.
    """
    xs, cuts = frame.xs, frame.cuts
    rows = _split(xs, cuts) if is_traced(xs) else None
    in_order = list(enumerate(cuts))
    for number, (start, stop, stops) in reversed(in_order) if frame.step.eqn.params["reverse"] else in_order:
        block = rows[number] if rows is not None else None
        if not stops:
            frame.carry, frame.ys = _roll(frame, start, stop, block)
            continue
        if block is None:
            row = [Slice(x, np.int32(start)) for x in xs]
        else:
            row = [lax.squeeze(x, (0,)) for x in block]
        frame.index = start
        frame.put((yield from frame.run_body([*frame.consts, *frame.carry, *row], start)))
    return [*frame.carry, *frame.ys]


def is_touched(plan: Plan, indices: tuple[int, ...], selected: frozenset[Site]) -> bool:
    """Whether a plan, run in loops with these indices, comes to a selected site."""
    for step in plan.steps:
        if isinstance(step, SiteStep):
            # A site in a while loop has one more index, which is not known beforehand.
            if len(indices) < step.scope.n_loops or site_of(step.eqn.params["name"], step.scope, indices) in selected:
                return True
        elif isinstance(step, ScanStep):
            inner = ((*indices, i) for i in range(step.eqn.params["length"]))
            if any(is_touched(step.body, more, selected) for more in inner):
                return True
        elif any(is_touched(inner, indices, selected) for inner in inner_plans(step)):
            return True
    return False


def _split(xs: Sequence[Any], cuts: Sequence[tuple[int, int, bool]]) -> list[list[Any]]:
    """The rows of every stretch, for every scanned array."""
    sizes = tuple(stop - start for start, stop, _ in cuts)
    by_array = [lax.split(x, sizes, axis=0) for x in xs]
    return [list(block) for block in zip(*by_array, strict=True)] if xs else [[] for _ in cuts]


def _roll(frame: ScanFrame, start: int, stop: int, block: list[Any] | None) -> tuple[list[Any], list[Any]]:
    """The carry and outputs after the iterations `start` to `stop`, as one loop; `block`: their rows, if split."""
    step, carry, ys = frame.step, frame.carry, frame.ys
    if not is_traced([frame.consts, carry, frame.xs, ys]):
        return _rolled(frame, start, stop)
    rows = block if block is not None else [lax.slice_in_dim(x, start, stop) for x in frame.xs]
    eqn = step.eqn.replace(params={**step.eqn.params, "length": stop - start})
    results = evaluate(eqn, [*frame.consts, *carry, *rows])
    new = results[len(carry) :]
    updated = [lax.dynamic_update_slice_in_dim(y, part, start, 0) for y, part in zip(ys, new, strict=True)]
    return results[: len(carry)], updated


def _rolled(frame: ScanFrame, start: int, stop: int, *, donates: bool = True) -> tuple[list[Any], list[Any]]:
    """The same by a program whose bounds are arguments; it has no reverse derivative."""
    step = frame.step
    program = step.programs.get(donates)
    if program is None:
        params = step.eqn.params
        key = ("rolled", param_key(params["jaxpr"], False), params["reverse"], len(frame.consts), donates)
        program = step.programs[donates] = cached(key, lambda: _rolled_program(step, donates), shared=None)
    return program(np.int32(start), np.int32(stop), frame.consts, frame.carry, frame.xs, frame.ys)


def _rolled_program(step: ScanStep, donates: bool) -> Callable[..., tuple[list[Any], list[Any]]]:
    closed, is_reverse = step.eqn.params["jaxpr"], step.eqn.params["reverse"]
    body = jaxpr_as_fun(closed)

    def rolled(
        start: Any, stop: Any, consts: list[Any], carry: list[Any], xs: list[Any], ys: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        def iteration(i: Any, state: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
            carry, ys = state
            index = start + stop - 1 - i if is_reverse else i
            row = [lax.dynamic_index_in_dim(x, index, 0, keepdims=False) for x in xs]
            results = body(*consts, *carry, *row)
            new = results[len(carry) :]
            ys = [lax.dynamic_update_index_in_dim(y, part, index, 0) for y, part in zip(ys, new, strict=True)]
            return list(results[: len(carry)]), ys

        return lax.fori_loop(start, stop, iteration, (carry, ys))

    return counted_jit(
        rolled, name=f"rolled loop over {len(closed.jaxpr.eqns)} equations", donate_argnums=5 if donates else ()
    )
