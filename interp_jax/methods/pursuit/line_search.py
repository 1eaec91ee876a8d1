"""The best step along a direction, cut off where coefficients would fall below 0.

    w = max(w + a p, 0)  with  a = (p . g) / |c|^2,  c = p D_S,  g = D_S r

`p . g` is `c . r`, in fewer and smaller numbers.

>>> jnp.maximum(jnp.array([1.0, 2.0]) - 1.5, 0).tolist()
[0.0, 0.5]

Source: Blumensath & Davies 2008, Gradient Pursuits.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from interp_jax.methods.pursuit.pursuit import State


class Found(NamedTuple):
    """Where a step ends.

    Args:
        values: `[batch, k]`.
        residual: What the whole step leaves, `[batch, d]`.
        is_cut: Whose step was cut off at 0, and leaves something else, `[batch]`.
        is_flat: Whose direction changes nothing, so that there is no best step, `[batch]`.
    """

    values: jax.Array
    residual: jax.Array
    is_cut: jax.Array
    is_flat: jax.Array


def line_search(
    state: State,
    direction: jax.Array,
    gradient: jax.Array,
    moved: jax.Array,
    *,
    is_nonneg: bool,
) -> Found:
    """The best step from `state` along a direction.

    Args:
        state: Where the pursuit stands.
        direction: `p`, `[batch, k]`.
        gradient: `g`, the products of the atoms that move with the residual, `[batch, k]`.
        moved: `c`, what the direction adds to the reconstruction, `[batch, d]`.
        is_nonneg: Whether coefficients below 0 become 0.

    Returns:
        Where it ends.
    """
    length = jnp.square(moved).sum(axis=1, keepdims=True)
    is_flat = length == 0
    step = (direction * gradient).sum(axis=1, keepdims=True) / jnp.where(is_flat, jnp.ones_like(length), length)
    values, residual = state.values + step * direction, state.residual - step * moved
    if not is_nonneg:
        return Found(values, residual, jnp.zeros_like(is_flat[:, 0]), is_flat[:, 0])
    return Found(jnp.maximum(values, 0), residual, (values < 0).any(axis=1), is_flat[:, 0])
