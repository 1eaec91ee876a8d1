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

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from types import MethodType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from interp_jax.core.activations import SiteRow
from interp_jax.transforms.jaxprs import any_site, inner_jaxprs, is_site, source_line
from interp_jax.transforms.running_pass.plan import CUSTOM_RULES
from interp_jax.transforms.sowing import site_of, value_seen


class Trace(NamedTuple):
    """A traced program: its jaxpr, the values of its arguments, and the structure of its result."""

    closed: ClosedJaxpr
    args: list[Any]
    out_tree: Any


_METHODS: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def trace_program(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Trace `fn(*args, **kwargs)`, or take the trace JAX still has of it.

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
    jitted = _jitted(fn, static_argnums, static_argnames)
    traced = jitted.trace(*args, **kwargs)
    closed, out_info = traced.jaxpr, traced.out_info
    if len(closed.jaxpr.invars) != len(values):
        # The function closes over values of a trace that is under way; `make_jaxpr` keeps those as constants.
        closed, out_info = _make_jaxpr(fn, args, kwargs, static_argnums, static_argnames)
    return Trace(closed, values, jax.tree.structure(out_info))


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
    leaves = jax.tree.leaves(arg)
    is_dynamic = [isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)) for leaf in leaves]
    return not any(is_dynamic) or all(isinstance(leaf, bool) for leaf in leaves)


def _jitted(fn: Callable[..., Any], static_argnums: tuple[int, ...], static_argnames: tuple[str, ...]) -> Any:
    """`jax.jit(fn)`. JAX remembers traces by function object; a bound method is a new object at each access, so its
    compiled form is kept beside the instance it is bound to."""
    if not isinstance(fn, MethodType):
        return jax.jit(fn, static_argnums=static_argnums, static_argnames=static_argnames)
    try:
        of_instance = _METHODS.setdefault(fn.__self__, {})
    except TypeError:  # The instance cannot be hashed or weakly referenced.
        return jax.jit(fn, static_argnums=static_argnums, static_argnames=static_argnames)
    key = (fn.__func__, static_argnums, static_argnames)
    if key not in of_instance:
        of_instance[key] = jax.jit(_weak_method(fn), static_argnums=static_argnums, static_argnames=static_argnames)
    return of_instance[key]


def _weak_method(method: MethodType) -> Callable[..., Any]:
    """The method as a function that does not keep its instance alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        target = reference()
        assert target is not None  # The instance is the key under which this function is kept.
        return target(*args, **kwargs)

    return call


def sites_of(closed: ClosedJaxpr) -> list[SiteRow]:
    """The sites of a program in execution order, with what they hold. Both branches of a conditional count."""
    return list(_sites(closed.jaxpr, ()))


def _sites(jaxpr: Jaxpr, loop_indices: tuple[int, ...]) -> Iterator[SiteRow]:
    for eqn in jaxpr.eqns:
        if is_site(eqn):
            params = eqn.params
            avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
            value = jax.eval_shape(lambda *leaves, p=params: value_seen(leaves, p), *avals)
            yield SiteRow(site_of(params, loop_indices), value, source_line(eqn))
            continue
        inner = [(name, jaxpr) for name, jaxpr in inner_jaxprs(eqn) if any_site(jaxpr, lambda params: True)]
        if not inner:
            continue
        if eqn.primitive.name == "scan":
            for index in range(eqn.params["length"]):
                yield from _sites(eqn.params["jaxpr"].jaxpr, (*loop_indices, index))
        elif eqn.primitive.name in CUSTOM_RULES:
            yield from _sites(inner[0][1], loop_indices)
        else:
            indices = (*loop_indices, 0) if eqn.primitive.name == "while" else loop_indices
            for _, inner_jaxpr in inner:
                yield from _sites(inner_jaxpr, indices)


class Remembered:
    """The most recent results of a function of a jaxpr object, by the object's identity."""

    def __init__(self, limit: int = 64):
        self._limit = limit
        self._entries: OrderedDict[tuple[int, Hashable], tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, closed: ClosedJaxpr, extra: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it returned the last time for this jaxpr and `extra`."""
        if any(isinstance(const, jax.core.Tracer) for const in closed.consts):
            return make()  # Nothing of a trace under way may be kept.
        key = (id(closed), extra)
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][1]
        result = make()
        with self._lock:
            self._entries[key] = (closed, result)  # Holding the jaxpr keeps its identity taken.
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
        return result


