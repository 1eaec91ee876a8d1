"""The compiled engine: run a plan step by step, handing every selected site to whoever drives the generator.

Between two sites nothing of JAX is held open: no trace, no context. Leaving the loop early is therefore always
safe, and under the caller's own jit, grad or vmap every value the loop sees belongs to the caller's trace.

>>> import jax
>>> from interp_jax.core.sites import Site
>>> from interp_jax.transforms.running_pass.plan import build_plan
>>> from interp_jax.transforms.sowing import sow
>>> closed = jax.make_jaxpr(lambda x: sow(x * 2.0, name="a") + 1.0)(1.0)
>>> selected = frozenset({Site(None, "a")})
>>> steps = execute(build_plan(closed, frozenset({"a"})), [3.0], selected)
>>> site, value = next(steps)
>>> str(site), float(value)
('a', 6.0)
>>> try:
...     steps.send(10.0)
... except StopIteration as stop:
...     float(stop.value[0])
11.0

Sharp edges: a site inside `lax.cond` or `lax.while_loop` needs a predicate that is known when the loop gets there.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from jax.core import Tracer

from interp_jax.core.errors import UnsupportedModelError, four_part
from interp_jax.core.sites import Site
from interp_jax.transforms.jaxprs import evaluate, site_of, source_line
from interp_jax.transforms.running_pass.plan import (
    Chunk,
    CondStep,
    Plan,
    RuleStep,
    ScanStep,
    SiteStep,
    Step,
    WhileStep,
)
from interp_jax.transforms.running_pass.programs import Slice, is_traced, read_operand, run_chunk
from interp_jax.transforms.running_pass.scans import ScanFrame, is_touched, step_scan
from interp_jax.transforms.sowing import leaves_of_seen, value_seen

KEEP: Any = object()
"""Sent to the engine to go on with a site's own value."""

Steps: TypeAlias = Generator[tuple[Site, Any], Any, list[Any]]


@dataclass
class Frame:
    """One plan under way: where it stands, and what it has."""

    plan: Plan
    env: list[Any]
    loop_indices: tuple[int, ...]
    index: int = 0

    def finish(self, results: list[Any], selected: frozenset[Site], changed: set[int]) -> Steps:
        """The plan's results if the step it stands at had these results; the frame itself stays as it is."""
        copy = Frame(self.plan, list(self.env), self.loop_indices, self.index)
        copy.put(results)
        copy.index += 1
        return _go_on(copy, selected, changed, [])

    def put(self, results: Sequence[Any]) -> None:
        """Note the results of the step at hand, and drop what nobody reads after it."""
        step = self.plan.steps[self.index]
        for slot, result in zip(step.writes(), results, strict=True):
            if slot is not None:
                self.env[slot] = result
        for slot in step.frees:
            self.env[slot] = None


@dataclass
class WhileFrame:
    """An iteration of a while loop under way."""

    step: WhileStep
    consts: list[Any]

    def finish(self, results: list[Any], selected: frozenset[Site], changed: set[int]) -> Steps:
        """The loop's results if the present iteration had these; the rest runs as one loop."""
        yield from ()
        return evaluate(self.step.eqn, [*self.consts, *results])


Frames: TypeAlias = "list[Frame | ScanFrame | WhileFrame]"


def execute(
    plan: Plan,
    args: Sequence[Any],
    selected: frozenset[Site],
    loop_indices: tuple[int, ...] = (),
    changed: set[int] | None = None,
    frames: Frames | None = None,
) -> Steps:
    """Run a plan; yields `(site, value)` and takes back `KEEP` or a new value.

    Args:
        plan: The plan.
        args: Values of its arguments.
        selected: The sites to stop at.
        loop_indices: Indices of the loops around this plan, innermost last.
        changed: Collects the numbers of opened custom-rule calls in which a value was changed.
        frames: Collects what is under way while the generator is suspended, outermost first, for `rest_of`.

    Returns:
        The results, as the value of `StopIteration`.
    """
    frame = Frame(plan, [None] * plan.n_slots, loop_indices)
    for slot, value in (*plan.constants.items(), *zip(plan.ins, args, strict=True)):
        frame.env[slot] = value
    args = ()  # The caller's values are freed as soon as the plan no longer needs them.
    return (yield from _go_on(frame, selected, set() if changed is None else changed, [] if frames is None else frames))


def _go_on(frame: Frame, selected: frozenset[Site], changed: set[int], frames: Frames) -> Steps:
    """Run a plan from where it stands."""
    frames.append(frame)
    env = frame.env
    for index in range(frame.index, len(frame.plan.steps)):
        step, frame.index = frame.plan.steps[index], index
        if isinstance(step, Chunk):
            results = run_chunk(step, [env[slot] for slot in step.ins])
        elif isinstance(step, SiteStep):
            results = yield from _visit(step, _read(step.ins, env), selected, frame.loop_indices, changed)
        elif isinstance(step, RuleStep):
            results = _rule_results(step, env, changed)
        else:
            operands = _read(step.reads(), env)
            results = yield from _control_flow(step, operands, selected, frame.loop_indices, changed, frames)
        frame.put(results)
    frames.pop()
    return _read(frame.plan.outs, env)


def rest_of(frames: Frames, new: Any, changed: set[int], until: Site | None) -> Any:
    """What a suspended pass comes to if its site had a new value; the pass itself stays where it is.

    Args:
        frames: What is under way.
        new: The value, in the form of the site's own.
        changed: Numbers of opened custom-rule calls in which a value was changed.
        until: Stop at this site, and return its value.

    Returns:
        The results of the outermost plan, or the value at `until`; None if the pass does not come to `until`.
    """
    site = frames[-1]
    assert isinstance(site, Frame)
    step = site.plan.steps[site.index]
    assert isinstance(step, SiteStep)
    selected, changed = frozenset(() if until is None else (until,)), changed | set(step.rules)
    results = leaves_of_seen(new, step.eqn.params)
    for frame in reversed(frames):
        steps = frame.finish(results, selected, changed)
        try:
            return next(steps)[1]
        except StopIteration as stop:
            results = stop.value
    return results if until is None else None


def _read(operands: Sequence[Any], env: Sequence[Any]) -> list[Any]:
    values = [read_operand(operand, env) for operand in operands]
    return [value.read() if isinstance(value, Slice) else value for value in values]


def _visit(
    step: SiteStep,
    leaves: list[Any],
    selected: frozenset[Site],
    loop_indices: tuple[int, ...],
    changed: set[int],
) -> Steps:
    params = step.eqn.params
    site = site_of(params["name"], step.scope, loop_indices)
    if site in selected:
        new = yield site, value_seen(leaves, params)
        if new is not KEEP:
            changed.update(step.rules)
            return leaves_of_seen(new, params)
    return leaves[: len(step.outs)]


def _rule_results(step: RuleStep, env: Sequence[Any], changed: set[int]) -> list[Any]:
    """Results of an opened custom-rule call: under a trace and unchanged inside, those of the call itself."""
    operands = [env[slot] for slot in step.whole.ins]
    if step.number not in changed and is_traced(operands):
        return run_chunk(step.whole, operands)
    return _read(step.inner, env)


def _control_flow(
    step: Step,
    operands: list[Any],
    selected: frozenset[Site],
    loop_indices: tuple[int, ...],
    changed: set[int],
    frames: Frames,
) -> Steps:
    match step:
        case ScanStep():

            def run_body(args: Sequence[Any], index: int) -> Steps:
                return execute(step.body, args, selected, (*loop_indices, index), changed, frames)

            frames.append(frame := ScanFrame.at_start(step, operands, selected, loop_indices, run_body))
            results = yield from step_scan(frame)
            frames.pop()
            return results
        case CondStep():
            if isinstance(operands[0], Tracer) and not any(
                is_touched(branch, loop_indices, selected) for branch in step.branches
            ):
                return evaluate(step.eqn, operands)
            branch = _known(operands[0], step)
            plan = step.branches[min(max(int(branch), 0), len(step.branches) - 1)]
            return (yield from execute(plan, operands[1:], selected, loop_indices, changed, frames))
        case WhileStep():
            # With no layer known, any site of a name that is asked for may be the one.
            if not is_touched(step.body, loop_indices, selected):
                return evaluate(step.eqn, operands)
            return (yield from _step_while(step, operands, selected, loop_indices, changed, frames))
    raise AssertionError(step)


def _step_while(
    step: WhileStep,
    operands: list[Any],
    selected: frozenset[Site],
    loop_indices: tuple[int, ...],
    changed: set[int],
    frames: Frames,
) -> Steps:
    n_condition, n_body = step.eqn.params["cond_nconsts"], step.eqn.params["body_nconsts"]
    condition_consts, body_consts = operands[:n_condition], operands[n_condition : n_condition + n_body]
    carry, index = operands[n_condition + n_body :], 0
    frames.append(WhileFrame(step, operands[: n_condition + n_body]))
    while True:
        indices = (*loop_indices, index)
        (go_on,) = yield from execute(step.condition, [*condition_consts, *carry], selected, indices, changed)
        if not _known(go_on, step):
            frames.pop()
            return carry
        carry = yield from execute(step.body, [*body_consts, *carry], selected, indices, changed, frames)
        index += 1


def _known(predicate: Any, step: CondStep | WhileStep) -> Any:
    """A predicate as a number, which it must be for the loop to follow control flow into a selected site."""
    if isinstance(predicate, Tracer):
        raise UnsupportedModelError(
            four_part(
                f"A selected site lies inside {step.eqn.primitive.name} ({source_line(step.eqn)}), whose predicate "
                "is traced",
                where="a running pass under jit, vmap or grad",
                expected="a predicate with a known value at this point.",
                fix="run the loop outside jit and vmap, leave the site unselected, or use reap_sites/intervene.",
            )
        )
    return predicate
