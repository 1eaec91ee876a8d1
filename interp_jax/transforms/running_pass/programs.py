"""Programs: chunks of a plan as compiled functions, shared by chunks that are the same code.

Two chunks are the same code when their equations are equal up to the numbering of slots: layer 3's and layer 17's
then run one compiled function on other operands. Keys are those of `interp_jax.transforms.jaxpr_keys`.

>>> import jax
>>> from interp_jax.transforms.running_pass.plan import build_plan
>>> plan = build_plan(jax.make_jaxpr(lambda x: x * 2 + 1)(1.0), frozenset())
>>> [float(out) for out in run_chunk(plan.steps[0], [3.0])]
[7.0]

Sharp edges: the cache holds at most `MAX_PROGRAMS` programs, the least recently used leave first; a plan keeps the
ones it uses.

Source: interp_jax.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.extend.core import Literal

from interp_jax.transforms.compilations import counted_jit
from interp_jax.transforms.jaxpr_keys import param_key, params_key, value_key
from interp_jax.transforms.jaxprs import evaluate
from interp_jax.transforms.running_pass.plan import Chunk, Operand, Operation, Region

MAX_PROGRAMS = 512

_CACHE: OrderedDict[Hashable, Callable[..., list[Any]]] = OrderedDict()
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Slice:
    """One row of an array, taken inside the program that reads it (so that no copy of it goes in or out)."""

    array: Any
    index: Any

    def read(self) -> Any:
        """The row."""
        return lax.dynamic_index_in_dim(self.array, self.index, 0, keepdims=False)


jax.tree_util.register_dataclass(Slice, data_fields=["array", "index"], meta_fields=[])


def is_traced(values: Sequence[Any]) -> bool:
    """Whether any value belongs to a JAX trace (jit, grad, vmap) of the caller's."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(list(values)))


def run_chunk(chunk: Chunk, values: Sequence[Any]) -> list[Any]:
    """The results of a chunk on the values of its `ins`."""
    traced = is_traced(values)
    program = chunk.programs.get(traced)
    if program is None:
        program = chunk.programs[traced] = _program(chunk, traced)
    return program(*values)


def _program(chunk: Chunk, traced: bool) -> Callable[..., list[Any]]:
    def make() -> Callable[..., list[Any]]:
        fn = chunk_function(chunk.operations, chunk.ins, chunk.outs, checkpointed=traced)
        return counted_jit(fn, name=f"piece of {len(chunk.operations)} equations")

    return cached(_chunk_key(chunk, traced), make, shared=chunk.shared if traced else None)


def cached(
    key: Hashable, make: Callable[[], Callable[..., Any]], *, shared: dict[Hashable, Any] | None
) -> Callable[..., Any]:
    """The program with this key, made now if there is none.

    Args:
        key: What decides the program.
        make: Makes it.
        shared: Where to keep it instead of the process-wide cache. Programs for traced values belong to one plan:
            their parameters may refer to the caller's trace, which nothing may outlive.

    Returns:
        The program.
    """
    if shared is not None:
        if key not in shared:
            shared[key] = make()
        return shared[key]
    with _LOCK:
        if key in _CACHE:
            _CACHE.move_to_end(key)
            return _CACHE[key]
    program = make()
    with _LOCK:
        _CACHE.setdefault(key, program)
        while len(_CACHE) > MAX_PROGRAMS:
            _CACHE.popitem(last=False)
        return _CACHE.get(key, program)


def chunk_function(
    operations: Sequence[Operation], ins: Sequence[int], outs: Sequence[int], *, checkpointed: bool
) -> Callable[..., list[Any]]:
    """A traceable function that runs operations.

    Args:
        operations: What to run, in order.
        ins: Slots of the arguments.
        outs: Slots of the results.
        checkpointed: Whether operations from a checkpointed call run under `jax.checkpoint` again.

    Returns:
        A function from the values of `ins` to those of `outs`. Arguments may be `Slice`s.
    """
    runs = [(region, list(run)) for region, run in itertools.groupby(operations, key=lambda op: op.region)]

    def run_operations(*values: Any) -> list[Any]:
        read = [value.read() if isinstance(value, Slice) else value for value in values]
        env: dict[int, Any] = dict(zip(ins, read, strict=True))
        for number, (region, run) in enumerate(runs):
            if region is None or not checkpointed:
                _run(run, env)
            else:
                later = [op for _, rest in runs[number + 1 :] for op in rest]
                _run_checkpointed(run, region, env, later, outs)
        return [env[slot] for slot in outs]

    return run_operations


def _run(operations: Sequence[Operation], env: dict[int, Any]) -> None:
    for operation in operations:
        operands = [read_operand(operand, env) for operand in operation.ins]
        if operation.sharding is not None:
            results = [lax.with_sharding_constraint(operands[0], operation.sharding)]
        else:
            results = evaluate(operation.eqn, operands)
        env.update((slot, value) for slot, value in zip(operation.outs, results, strict=True) if slot is not None)


def _run_checkpointed(
    run: Sequence[Operation], region: Region, env: dict[int, Any], later: Sequence[Operation], outs: Sequence[int]
) -> None:
    """Run operations of one checkpointed call so that only what others read of them is saved."""
    made = {slot for operation in run for slot in operation.outs}
    needed = dict.fromkeys(operand for op in run for operand in op.ins if isinstance(operand, int) and operand in env)
    read_later = {operand for op in later for operand in op.ins if isinstance(operand, int)} | set(outs)
    results = [slot for slot in made if slot is not None and slot in read_later]

    def body(*values: Any) -> list[Any]:
        inner = dict(zip(needed, values, strict=True))
        _run(run, inner)
        return [inner[slot] for slot in results]

    checkpointed = jax.checkpoint(body, policy=region.policy, prevent_cse=region.prevent_cse)
    env.update(zip(results, checkpointed(*(env[slot] for slot in needed)), strict=True))


def read_operand(operand: Operand, env: Any) -> Any:
    """The value of a slot or literal."""
    return operand.val if isinstance(operand, Literal) else env[operand]


def _slot_avals(operations: Sequence[Operation]) -> dict[int, Any]:
    """The type of every slot the operations mention."""
    avals: dict[int, Any] = {}
    for op in operations:
        if op.sharding is not None:
            continue
        for slots, atoms in ((op.ins, op.eqn.invars), (op.outs, op.eqn.outvars)):
            avals.update((slot, atom.aval) for slot, atom in zip(slots, atoms, strict=True) if isinstance(slot, int))
    return avals


def _chunk_key(chunk: Chunk, traced: bool) -> Hashable:
    avals = _slot_avals(chunk.operations)
    numbers: dict[int, int] = {slot: position for position, slot in enumerate(chunk.ins)}
    regions: dict[Region | None, int] = {}
    lines = []
    for op in chunk.operations:
        operands = tuple(
            ("literal", *value_key(o.val), o.aval) if isinstance(o, Literal) else numbers[o] for o in op.ins
        )
        for slot in op.outs:
            if slot is not None:
                numbers[slot] = len(numbers)
        if op.sharding is not None:
            what: Hashable = ("sharding", op.sharding)
        else:
            what = (op.eqn.primitive, params_key(op.eqn.params, traced), value_key(op.eqn.ctx))
        # A region's number differs from layer to layer; what counts is which operations share one.
        region = (regions.setdefault(op.region, len(regions)), param_key(op.region and op.region[1:], traced))
        lines.append((what, operands, region if traced else None))
    ins = tuple(avals.get(slot) for slot in chunk.ins)
    return (traced, ins, tuple(lines), tuple(numbers[slot] for slot in chunk.outs))
