"""A count of what was compiled and why.

Everything here that loops compiles its functions through `counted_jit`, which writes one entry whenever JAX traces
the function afresh, that is, whenever it is about to be compiled again. A sweep that should compile once can thus
be seen (and tested) to compile once.

>>> import jax.numpy as jnp
>>> double = counted_jit(lambda x: 2 * x, name="double")
>>> with count_compilations() as new:
...     _ = double(jnp.ones(3)), double(jnp.zeros(3)), double(jnp.ones(4))
>>> len(new)
2

Sharp edges: only functions compiled by this package are counted; the eager operations of a user's loop are not.

Source: interp_jax.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax


class Compilation(NamedTuple):
    """One compilation: the function's name, and the reason (the shapes that called for it)."""

    name: str
    reason: str


class Compilations(tuple[Compilation, ...]):
    """All compilations in order; prints as a table of counts."""

    def __repr__(self) -> str:
        if not self:
            return "Compilations: none"
        rows = [f"  {count:4d} x {name}  ({reason})" for (name, reason), count in Counter(self).items()]
        return "\n".join([f"Compilations: {len(self)}", *rows])


_LOG: list[Compilation] = []
_LOCK = threading.Lock()


def compilations() -> Compilations:
    """What this package has compiled in this process so far, oldest first."""
    with _LOCK:
        return Compilations(_LOG)


@contextmanager
def count_compilations() -> Iterator[list[Compilation]]:
    """Context whose value is a list that holds, after the block, the compilations made within it."""
    new: list[Compilation] = []
    start = len(_LOG)
    try:
        yield new
    finally:
        with _LOCK:
            new.extend(_LOG[start:])


def counted_jit(fn: Callable[..., Any], *, name: str, **jit_options: Any) -> Callable[..., Any]:
    """`jax.jit(fn)` that counts its own compilations.

    Args:
        fn: The function to compile.
        name: What to call it in the log.
        **jit_options: Options of `jax.jit`.

    Returns:
        The compiled function.
    """

    def counted(*args: Any, **kwargs: Any) -> Any:
        shapes = [_short(leaf) for leaf in jax.tree.leaves((args, kwargs))]
        reason = ", ".join(shapes[:4]) + (f", ... {len(shapes)} arrays" if len(shapes) > 4 else "")
        with _LOCK:
            _LOG.append(Compilation(name, reason))
        return fn(*args, **kwargs)

    counted.__name__ = counted.__qualname__ = name
    return jax.jit(counted, **jit_options)


def _short(leaf: Any) -> str:
    aval = jax.typeof(leaf) if hasattr(leaf, "dtype") else None
    return type(leaf).__name__ if aval is None else aval.str_short()
