"""Staging: what a harvested function does when it is called outside any trace.

Interpreting a program makes new functions for its jits, scans and branches, and JAX would compile them anew at every
call. So when all arguments are concrete, the interpretation is itself traced, and its equations are then evaluated one
by one, as JAX evaluates any function that is not compiled. A trace is kept if all that decides it is known; a function
among the interventions is called every time, as it may read what has changed meanwhile, but what comes out equal to an
earlier trace is compiled no more.

>>> import jax.numpy as jnp
>>> traced = []
>>> def double(x):
...     traced.append(x)
...     return x * 2.0
>>> closed = jax.make_jaxpr(double)(1.0)
>>> [float(staged(closed, "double", double, x)) for x in (1.0, 2.0, 3.0)], len(traced)
([2.0, 4.0, 6.0], 1)

Source: interp_jax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.core import Tracer, eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr

from interp_jax.transforms.jaxpr_keys import jaxpr_key
from interp_jax.transforms.tracing import Remembered

_TRACED = Remembered()


def staged(closed: ClosedJaxpr, key: Hashable | None, interpreted: Callable[..., Any], *args: Any) -> Any:
    """`interpreted(*args)`, by way of a trace if nothing among the arguments is traced.

    Args:
        closed: The program that is interpreted.
        key: What else decides the interpretation, besides the form of the arguments; None if that is not known.
        interpreted: The interpretation.
        *args: Pytrees of arrays and numbers.

    Returns:
        What the interpretation returns.
    """
    leaves, tree = jax.tree.flatten(args)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return interpreted(*args)

    def trace() -> tuple[ClosedJaxpr, Any]:
        return jax.make_jaxpr(interpreted, return_shape=True)(*args)

    if key is None:
        program, form = trace()
        jaxpr = _first_equal(_ByCode(program.jaxpr))
    else:
        forms = tuple(jax.typeof(leaf) for leaf in leaves)
        program, form = _TRACED.get(closed, (key, tree, forms), trace, is_kept=_is_free)
        jaxpr = program.jaxpr
    return jax.tree.unflatten(jax.tree.structure(form), eval_jaxpr(jaxpr, program.consts, *leaves))


def _is_free(traced: tuple[ClosedJaxpr, Any]) -> bool:
    """Whether a program closes over nothing of a trace that is under way."""
    return not any(isinstance(const, Tracer) for const in traced[0].consts)


class _ByCode:
    """A jaxpr that equals those with the same code."""

    def __init__(self, jaxpr: Jaxpr):
        self.jaxpr = jaxpr
        self._key = jaxpr_key(jaxpr, False)
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByCode) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash


@functools.lru_cache(maxsize=64)
def _first_equal(jaxpr: _ByCode) -> Jaxpr:
    """The first jaxpr with this code: what JAX has compiled of it counts for all of them."""
    return jaxpr.jaxpr
