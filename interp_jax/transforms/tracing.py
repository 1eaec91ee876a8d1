"""Tracing: a function and its arguments as a jaxpr, and the sites that jaxpr has.

>>> from interp_jax.transforms.sowing import sow
>>> trace = trace_program(lambda x: {"y": sow(x * 2.0, name="a")}, (1.0,), {})
>>> [str(row.site) for row in sites_of(trace.closed)]
['a']

Sharp edges: arguments that hold no array or number (strings, booleans, functions, None) are constants of the
program, as with `static_argnums` of `jax.jit`. Give the same function object again to have its trace reused.

Source: interp_jax.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from interp_jax.core.activations import SiteRow
from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.transforms.jaxprs import (
    Scope,
    any_site_inside,
    inner_jaxprs,
    is_loop,
    is_site,
    outline_of,
    scope_of,
    site_of,
    source_line,
    without_effects_of_sows,
)
from interp_jax.transforms.sowing import harvesting, value_seen


class Trace(NamedTuple):
    """A traced program: its `closed` jaxpr, the `args` it is run on, and the `out_tree` of its result."""

    closed: ClosedJaxpr
    args: list[Any]
    out_tree: Any


def trace_program(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Trace `fn(*args, **kwargs)`, or take the trace made before.

    Args:
        fn: The function.
        args: Its arguments; those without arrays or numbers in them are constants.
        kwargs: Its keyword arguments, likewise.

    Returns:
        The trace.
    """
    static_argnums = tuple(i for i, arg in enumerate(args) if _is_static(arg))
    static_argnames = tuple(name for name, arg in kwargs.items() if _is_static(arg))
    dynamic_args = [arg for i, arg in enumerate(args) if i not in static_argnums]
    dynamic_kwargs = {name: arg for name, arg in kwargs.items() if name not in static_argnames}
    values = jax.tree.leaves((dynamic_args, dynamic_kwargs))
    traces = _traces_of(fn, static_argnums, static_argnames)
    mark = None
    if traces is not None and not any(isinstance(value, Tracer) for value in values):
        mark = traces.mark(args, kwargs)
        if mark in traces.by_mark:
            return Trace(traces.by_mark[mark][0], values, traces.by_mark[mark][1])
    jitted = jax.jit(fn, static_argnums=static_argnums, static_argnames=static_argnames)
    # Under `jax.disable_jit` loops would be run instead of traced.
    with jax.disable_jit(False), harvesting():
        traced = jitted.trace(*args, **kwargs)
        closed, out_info = traced.jaxpr, traced.out_info
        if len(closed.jaxpr.invars) != len(values):
            # The function closes over values of a trace that is under way; `make_jaxpr` keeps those as constants.
            closed, out_info = _make_jaxpr(fn, args, kwargs, static_argnums, static_argnames)
            mark = None
    closed = without_effects_of_sows(closed)
    trace = Trace(closed, values, jax.tree.structure(out_info))
    if traces is not None and mark is not None:
        traces.keep(mark, trace)
    return trace


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Mark:
    """A number that a compiled function returns as part of its result's structure: reading it runs nothing."""

    number: int


class _Traces:
    """The traces of one function, found by asking JAX whether it has seen these arguments before.

    `jax.jit(...).trace` takes milliseconds for a model's parameters even when it finds what it knows. A compiled
    function is told apart by the same things (types of the arguments, contexts, configuration) in microseconds: this
    one does nothing, and returns a mark that was made when JAX traced it.
    """

    def __init__(self, static_argnums: tuple[int, ...], static_argnames: tuple[str, ...]):
        self.by_mark: OrderedDict[_Mark, tuple[ClosedJaxpr, Any]] = OrderedDict()

        # A function object of its own: JAX tells traces apart by it.
        def new_mark(*args: Any, **kwargs: Any) -> _Mark:
            return _Mark(next(_numbers))

        self._probe = jax.jit(new_mark, static_argnums=static_argnums, static_argnames=static_argnames)

    def mark(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Mark:
        """The mark of these arguments: an old one where JAX would reuse a trace, else a new one."""
        return self._probe(*args, **kwargs)

    def keep(self, mark: _Mark, trace: Trace) -> None:
        """Keep a trace under its mark; the oldest of many shapes leave."""
        self.by_mark[mark] = (trace.closed, trace.out_tree)
        while len(self.by_mark) > _MAX_TRACES:
            self.by_mark.popitem(last=False)


_MAX_TRACES = 64
_numbers = itertools.count()
_TRACES: weakref.WeakKeyDictionary[Any, dict[Any, _Traces]] = weakref.WeakKeyDictionary()


def _traces_of(
    fn: Callable[..., Any], static_argnums: tuple[int, ...], static_argnames: tuple[str, ...]
) -> _Traces | None:
    """Where the traces of a function are kept: beside it, or for a bound method beside the instance."""
    owner, own_key = (fn.__self__, fn.__func__) if isinstance(fn, MethodType) else (fn, None)
    try:
        of_owner = _TRACES.setdefault(owner, {})
    except TypeError:  # It cannot be hashed or weakly referenced.
        return None
    key = (own_key, static_argnums, static_argnames)
    if key not in of_owner:
        of_owner[key] = _Traces(static_argnums, static_argnames)
    return of_owner[key]


def _make_jaxpr(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    static_argnums: tuple[int, ...],
    static_argnames: tuple[str, ...],
) -> tuple[ClosedJaxpr, Any]:
    static_kwargs = {name: kwargs[name] for name in static_argnames}
    dynamic_kwargs = {name: value for name, value in kwargs.items() if name not in static_kwargs}

    def closure(*args: Any, **dynamic: Any) -> Any:
        return fn(*args, **dynamic, **static_kwargs)

    return jax.make_jaxpr(closure, static_argnums=static_argnums, return_shape=True)(*args, **dynamic_kwargs)


def _is_static(arg: Any) -> bool:
    """Whether an argument is a constant of the program: it has leaves, and none of them is an array or number."""
    leaves = jax.tree.leaves(arg)
    numbers = (jax.Array, np.ndarray, np.generic, int, float, complex)
    if not leaves or not all(isinstance(leaf, bool) or not isinstance(leaf, numbers) for leaf in leaves):
        return False
    try:
        hash(arg)
    except TypeError:
        raise InvalidInputError(
            four_part(
                f"An argument {arg!r} without arrays in it was given, which makes it a constant, but it has no hash",
                where="a running pass",
                expected="arrays, numbers, pytrees of them, or hashable constants (strings, tuples, functions).",
                fix="pass the constants one by one, or bind them with functools.partial.",
            )
        ) from None
    return True


def sites_of(closed: ClosedJaxpr) -> list[SiteRow]:
    """The sites of a `closed` jaxpr in execution order, with what they hold. Both branches of a conditional count."""
    return list(_sites(closed.jaxpr, Scope(), ()))


def _sites(jaxpr: Jaxpr, outer: Scope, loop_indices: tuple[int, ...]) -> Iterator[SiteRow]:
    n_loops = len(loop_indices)
    for position in sorted(outline_of(jaxpr).busy):
        eqn = jaxpr.eqns[position]
        if is_site(eqn):
            params, scope = eqn.params, scope_of(eqn, outer, n_loops)
            yield SiteRow(site_of(params["name"], scope, loop_indices), form_seen(eqn), source_line(eqn))
        elif any_site_inside(eqn, lambda name, scope: True, outer, n_loops):
            scope = scope_of(eqn, outer, n_loops)
            # How often a while loop runs is not known beforehand; its first iteration stands for all.
            lengths = {"scan": eqn.params.get("length"), "while": 1}
            length = lengths[eqn.primitive.name] if is_loop(eqn) else None
            order = range(length or 0)[:: -1 if eqn.params.get("reverse") else 1]
            for index in [loop_indices] if length is None else [(*loop_indices, i) for i in order]:
                for _, inner in inner_jaxprs(eqn):
                    yield from _sites(inner, scope, index)


def form_seen(eqn: JaxprEqn) -> Any:
    """Shapes and dtypes of the value a reader of the site `eqn` sees."""
    avals: list[Any] = [var.aval for var in eqn.outvars]
    forms = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    if not eqn.params["batch_axes"]:
        return jax.tree.unflatten(eqn.params["tree"], forms)
    return jax.eval_shape(lambda *leaves: value_seen(leaves, eqn.params), *forms)


class Remembered:
    """The `limit` most recent results of a function of a jaxpr object, by the object's identity."""

    def __init__(self, limit: int = 64):
        self._limit = limit
        self._entries: OrderedDict[tuple[int, Hashable], tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self,
        closed: ClosedJaxpr,
        extra: Hashable,
        make: Callable[[], Any],
        *,
        is_kept: Callable[[Any], bool] = lambda made: True,
    ) -> Any:
        """`make()`, or what it returned last for this `closed` jaxpr and `extra`, if `is_kept` said so of that."""
        if any(isinstance(const, Tracer) for const in closed.consts):
            return make()  # Nothing of a trace under way may be kept.
        key = (id(closed), extra)
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][1]
        result = make()
        if not is_kept(result):
            return result
        with self._lock:
            self._entries[key] = (closed, result)  # Holding the jaxpr keeps its identity taken.
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
        return result
