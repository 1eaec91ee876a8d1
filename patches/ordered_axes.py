"""`sow_in_order`: a site whose axes its readers see in another order than they have in memory.

Upstream keeps attention patterns as [batch, query, head, key] here and [batch, head, query, key] there; a site has one
order. Transposing there and back would change the program. Instead each axis in turn is mapped over by `jax.vmap`,
which a sow remembers and shows first, and the value stays as it lies.

>>> from interp_jax.transforms.harvest import call_and_reap
>>> fn = lambda x: sow_in_order(x, (0, 2, 1), name="pattern")
>>> out, reaped = call_and_reap(fn, tag="site")(jnp.zeros((2, 3, 4)))
>>> out.shape, reaped["pattern"].shape
((2, 3, 4), (2, 4, 3))

Sharp edges: the python engine hands a value out while it is traced, and under `jax.vmap` that would be one number;
there, and only there, the value is transposed.

Source: interp_jax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.transforms.sowing import LISTENER, sow


def sow_in_order(value: Any, order: Sequence[int], *, name: str) -> jax.Array:
    """Mark an array as a site that is seen transposed.

    Args:
        value: The array.
        order: The axes of the array in the order in which they are seen.
        name: Name of the site.

    Returns:
        The array, or what a listener put in its place, with its axes as they were.
    """
    if LISTENER.get() is not None:
        return sow(jnp.transpose(value, order), name=name).transpose(np.argsort(order))
    # The outermost map is over the axis seen first; those inside it no longer have that one.
    at = [axis - sum(before < axis for before in order[:i]) for i, axis in enumerate(order)]
    sown: Callable[[Any], Any] = functools.partial(sow, name=name)
    for axis in reversed(at):
        sown = jax.vmap(sown, in_axes=axis, out_axes=axis)
    return sown(value)
