"""Plans: a jaxpr cut into pieces at the sites of some names.

A plan is a list of steps over numbered slots. Equations between two sites form a `Chunk`, which will run as one
compiled function; a sow of one of the names is a `SiteStep`; control flow that has such sites inside becomes a step
with plans of its own. Calls (jit, checkpoint, custom_jvp, custom_vjp) that have such sites inside are opened and
their equations take their place in the list; every other call stays whole.

The cuts are made in every layer, whichever layers are asked for: the pieces of all layers are then the same code,
and asking for another layer needs no other pieces.

Slots are numbers, not jaxpr variables, because one inner jaxpr may be opened several times (a layer's function
called once per layer), each time with other operands.

>>> import jax
>>> from interp_jax.transforms.sowing import sow
>>> closed = jax.make_jaxpr(lambda x: sow(x * 2.0, name="a") + 1.0)(1.0)
>>> [type(step).__name__ for step in build_plan(closed, frozenset({"a"})).steps]
['Chunk', 'SiteStep', 'Chunk']

Sharp edges: a checkpointed call that is opened stays checkpointed piece by piece. A custom derivative rule that is
opened is put back if nothing inside was changed; if something was, derivatives follow the code inside.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import Sharding

from interp_jax.core.errors import UnsupportedModelError, four_part
from interp_jax.core.sites import Site
from interp_jax.transforms.jaxprs import (
    CHECKPOINTS,
    CUSTOM_RULES,
    Scope,
    any_site_inside,
    callee_of,
    inner_jaxprs,
    is_loop,
    is_site,
    scope_of,
    source_line,
)
from interp_jax.transforms.sowing import LoopLayer

Operand: TypeAlias = "int | Literal"


class Region(NamedTuple):
    """The checkpointed call an operation was opened out of."""

    number: int
    policy: Any
    prevent_cse: Any


class Operation(NamedTuple):
    """An equation on slots. `sharding` stands for a constraint instead of the equation."""

    eqn: JaxprEqn
    ins: tuple[Operand, ...]
    outs: tuple[int | None, ...]
    region: Region | None
    sharding: Sharding | None = None


@dataclass
class Step:
    """What all steps have: the slots nobody reads after this step."""

    frees: tuple[int, ...] = field(default=(), init=False)

    def reads(self) -> tuple[Operand, ...]:
        """The slots and literals the step needs."""
        raise AssertionError

    def writes(self) -> tuple[int | None, ...]:
        """The slots the step fills."""
        raise AssertionError


@dataclass
class Chunk(Step):
    """A run of equations that is compiled as one function.

    `programs` holds that function, by whether its arguments are traced; `shared` is where the chunks of one plan
    meet on their traced programs.
    """

    operations: list[Operation]
    shared: dict[Any, Any]
    ins: tuple[int, ...] = ()
    outs: tuple[int, ...] = ()
    programs: dict[bool, Any] = field(default_factory=dict)

    def reads(self) -> tuple[Operand, ...]:
        return self.ins

    def writes(self) -> tuple[int | None, ...]:
        return self.outs


@dataclass
class EquationStep(Step):
    """A step that stands for one equation."""

    eqn: JaxprEqn
    ins: tuple[Operand, ...]
    outs: tuple[int | None, ...]

    def reads(self) -> tuple[Operand, ...]:
        return self.ins

    def writes(self) -> tuple[int | None, ...]:
        return self.outs


@dataclass
class SiteStep(EquationStep):
    """A sow of one of the names; `rules` numbers the custom-rule calls it was opened out of."""

    scope: Scope
    rules: tuple[int, ...]


@dataclass
class ScanStep(EquationStep):
    """A scan with sites in its body. `programs` are those of its iterations that nobody looks into."""

    body: Plan
    shared: dict[Any, Any]
    programs: dict[bool, Any] = field(default_factory=dict)


@dataclass
class WhileStep(EquationStep):
    """A while loop with sites in its body."""

    condition: Plan
    body: Plan


@dataclass
class CondStep(EquationStep):
    """A conditional or switch with sites in a branch."""

    branches: tuple[Plan, ...]


@dataclass
class RuleStep(EquationStep):
    """The end of an opened custom_jvp or custom_vjp call: `inner` holds what the opened code computed."""

    inner: tuple[Operand, ...]
    whole: Chunk
    number: int

    def reads(self) -> tuple[Operand, ...]:
        """What it takes."""
        return (*self.ins, *self.inner)


@dataclass
class Plan:
    """Steps over slots, from the values of `ins` to those of `outs`.

    Args:
        n_slots: How many slots there are.
        ins: Slots of the arguments.
        outs: Slots or literals of the results.
        constants: Values of the slots that are constants.
        steps: The steps in order.
    """

    n_slots: int
    ins: tuple[int, ...]
    outs: tuple[Operand, ...]
    constants: dict[int, Any]
    steps: list[Step]


_CLOSED_TO_LOOPS = {"shard_map", "pallas_call", "run_state", "custom_transpose_call", "custom_lin"}


def build_plan(closed: ClosedJaxpr, names: frozenset[str]) -> Plan:
    """Cut a jaxpr at the sites of some names, in whatever layer.

    Args:
        closed: The program.
        names: Names of sites.

    Returns:
        The plan.
    """
    return _Builder(names, {}, 0).plan(closed, Scope())


def require_reachable(closed: ClosedJaxpr, selected: frozenset[Site]) -> None:
    """Refuse sites that lie where a loop over the pass cannot stop.

    Args:
        closed: The program.
        selected: The sites to stop at.

    Raises:
        UnsupportedModelError: One of them is inside a call that stays whole.
    """

    def hidden(jaxpr: Jaxpr, outer: Scope, n_loops: int) -> None:
        for eqn in jaxpr.eqns:
            if not any_site_inside(eqn, lambda name, scope: True, outer, n_loops):
                continue
            scope, inner_loops = scope_of(eqn, outer, n_loops), n_loops + is_loop(eqn)
            if eqn.primitive.name not in _CLOSED_TO_LOOPS:
                for _, inner in inner_jaxprs(eqn):
                    hidden(inner, scope, inner_loops)
            elif any_site_inside(eqn, is_selected, outer, n_loops):
                raise UnsupportedModelError(
                    four_part(
                        f"A selected site lies inside {eqn.primitive.name} ({source_line(eqn)})",
                        expected="sites outside it, or inside jit, checkpoint, custom_jvp, custom_vjp, scan, while "
                        "and cond.",
                        fix=f"return the value from the {eqn.primitive.name} and sow it outside, or leave the site "
                        "unselected.",
                    )
                )

    def is_selected(name: str, scope: Scope) -> bool:
        in_loop = isinstance(scope.layer, LoopLayer)
        return any(site.name == name and (in_loop or site.layer == scope.layer) for site in selected)

    hidden(closed.jaxpr, Scope(), 0)


class _Builder:
    """Builds one plan; inner plans get builders of their own."""

    def __init__(self, names: frozenset[str], shared: dict[Any, Any], n_loops: int):
        self.names = names
        self.shared = shared
        self.n_loops = n_loops
        self.n_slots = 0
        self.constants: dict[int, Any] = {}
        self.steps: list[Step] = []
        self.pending: list[Operation] = []
        self.rules: tuple[int, ...] = ()
        self.n_regions = 0

    def plan(self, closed: ClosedJaxpr, scope: Scope) -> Plan:
        ins = self.slots(len(closed.jaxpr.invars))
        outs = tuple(self.open(closed, ins, scope, None))
        self.flush()
        _settle(self.steps, outs)
        return Plan(self.n_slots, ins, outs, self.constants, self.steps)

    def inner(self, closed: ClosedJaxpr, scope: Scope, *, loop: int) -> Plan:
        return _Builder(self.names, self.shared, self.n_loops + loop).plan(closed, scope)

    def slots(self, n: int) -> tuple[int, ...]:
        self.n_slots += n
        return tuple(range(self.n_slots - n, self.n_slots))

    def flush(self) -> None:
        if self.pending:
            self.steps.append(Chunk(self.pending, self.shared))
            self.pending = []

    def add(self, step: Step) -> None:
        self.flush()
        self.steps.append(step)

    def open(
        self, closed: ClosedJaxpr, operands: Sequence[Operand], scope: Scope, region: Region | None
    ) -> list[Operand]:
        """Append the equations of a jaxpr; returns where its results are."""
        jaxpr = closed.jaxpr
        env: dict[Any, Operand] = dict(zip(jaxpr.invars, operands, strict=True))
        for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
            (slot,) = self.slots(1)
            self.constants[slot] = value
            env[var] = slot

        def read(atom: Any) -> Operand:
            return atom if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            results = self.equation(eqn, tuple(map(read, eqn.invars)), scope, region)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(
        self, eqn: JaxprEqn, ins: tuple[Operand, ...], outer: Scope, region: Region | None
    ) -> Sequence[Operand]:
        name = eqn.primitive.name
        if is_site(eqn) and eqn.params["name"] in self.names:
            outs = self.slots(len(eqn.outvars))
            self.add(SiteStep(eqn, ins, outs, scope_of(eqn, outer, self.n_loops), self.rules))
            return outs
        has_sites = any_site_inside(eqn, lambda name, scope: name in self.names, outer, self.n_loops)
        if not has_sites or name in _CLOSED_TO_LOOPS:
            outs = self.slots(len(eqn.outvars))
            self.pending.append(Operation(eqn, ins, outs, region))
            return outs
        if name in ("scan", "while", "cond"):
            return self.control_flow(name, eqn, ins, scope_of(eqn, outer, self.n_loops))
        return self.call(name, eqn, ins, scope_of(eqn, outer, self.n_loops), region)

    def control_flow(self, name: str, eqn: JaxprEqn, ins: tuple[Operand, ...], scope: Scope) -> Sequence[Operand]:
        outs = self.slots(len(eqn.outvars))
        if name == "scan":
            self.add(ScanStep(eqn, ins, outs, self.inner(eqn.params["jaxpr"], scope, loop=1), self.shared))
        elif name == "while":
            condition = self.inner(eqn.params["cond_jaxpr"], scope, loop=1)
            body = self.inner(eqn.params["body_jaxpr"], scope, loop=1)
            self.add(WhileStep(eqn, ins, outs, condition, body))
        else:
            branches = tuple(self.inner(branch, scope, loop=0) for branch in eqn.params["branches"])
            self.add(CondStep(eqn, ins, outs, branches))
        return outs

    def call(
        self, name: str, eqn: JaxprEqn, ins: tuple[Operand, ...], scope: Scope, region: Region | None
    ) -> Sequence[Operand]:
        """Open a call and put its equations in its place."""
        inner = callee_of(eqn)
        if name in CUSTOM_RULES:
            self.flush()
            self.n_regions += 1
            number, outer_rules = self.n_regions, self.rules
            self.rules = (*outer_rules, number)
            results = tuple(self.open(inner, ins, scope, region))
            self.rules = outer_rules
            outs = self.slots(len(eqn.outvars))
            whole_outs = self.slots(len(eqn.outvars))
            slots = tuple(dict.fromkeys(operand for operand in ins if isinstance(operand, int)))
            whole = Chunk([Operation(eqn, ins, whole_outs, region)], self.shared, slots, whole_outs)
            self.add(RuleStep(eqn, ins, outs, results, whole, number))
            return outs
        if name in CHECKPOINTS:
            self.n_regions += 1
            region = region or Region(self.n_regions, eqn.params["policy"], eqn.params["prevent_cse"])
        ins = self.constrained(eqn, ins, "in_shardings", region)
        return self.constrained(eqn, self.open(inner, ins, scope, region), "out_shardings", region)

    def constrained(
        self, eqn: JaxprEqn, operands: Sequence[Operand], which: str, region: Region | None
    ) -> tuple[Operand, ...]:
        """Operands under the shardings an opened jit asks for."""
        out = []
        for operand, sharding in zip(operands, eqn.params.get(which, (None,) * len(operands)), strict=True):
            if isinstance(sharding, Sharding):
                (slot,) = self.slots(1)
                self.pending.append(Operation(eqn, (operand,), (slot,), region, sharding))
                operand = slot
            out.append(operand)
        return tuple(out)


def _settle(steps: list[Step], outs: Sequence[Operand]) -> None:
    """Drop dead operations, and say of each step what it reads, writes and frees."""
    live = {operand for operand in outs if isinstance(operand, int)}
    for step in reversed(steps):
        if isinstance(step, Chunk) and not step.outs:
            after = set(live)
            kept = []
            for operation in reversed(step.operations):
                if live.isdisjoint(operation.outs) and not operation.eqn.effects:
                    continue
                kept.append(operation)
                live.difference_update(slot for slot in operation.outs if slot is not None)
                live.update(operand for operand in operation.ins if isinstance(operand, int))
            step.operations = kept[::-1]
            made = [slot for operation in step.operations for slot in operation.outs]
            step.outs = tuple(slot for slot in made if slot in after)
            used = [operand for operation in step.operations for operand in operation.ins]
            step.ins = tuple(dict.fromkeys(slot for slot in used if isinstance(slot, int) and slot not in set(made)))
        else:
            live.difference_update(slot for slot in step.writes() if slot is not None)
            live.update(operand for operand in step.reads() if isinstance(operand, int))
    steps[:] = [step for step in steps if not (isinstance(step, Chunk) and not step.operations)]
    _free(steps, {operand for operand in outs if isinstance(operand, int)})


def _free(steps: list[Step], kept: set[int]) -> None:
    seen = set(kept)
    for step in reversed(steps):
        mentioned = {slot for slot in (*step.reads(), *step.writes()) if isinstance(slot, int)}
        step.frees = tuple(mentioned - seen)
        seen |= mentioned


def chunks_of(plan: Plan) -> Iterator[Chunk]:
    """Every chunk of a plan and of the plans inside it."""
    for step in plan.steps:
        if isinstance(step, Chunk):
            yield step
        for inner in inner_plans(step):
            yield from chunks_of(inner)


def inner_plans(step: Step) -> tuple[Plan, ...]:
    """The plans a control-flow step holds."""
    match step:
        case ScanStep():
            return (step.body,)
        case WhileStep():
            return (step.condition, step.body)
        case CondStep():
            return step.branches
    return ()
