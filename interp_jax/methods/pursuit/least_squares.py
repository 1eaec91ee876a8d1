"""Least squares over the few atoms each signal has chosen, for a batch of signals, with and without a sign.

    minimise |x - w D_S|^2, that is  (D_S D_S^T) w = D_S x;  with w >= 0 by an active set

>>> gram, products = jnp.array([[[1.0, 0.8], [0.8, 1.0]]]), jnp.array([[1.0, 0.5]])
>>> nonneg_least_squares(gram, products, jnp.zeros((1, 2)), jnp.ones((1, 2), bool)).tolist()
[[1.0, 0.0]]

Sharp edges: a Gram matrix that is singular to the last digits counts as one with `8 eps` added to its diagonal, so
that every system has a solution; equations are solved for the exact one twice over, which is why others do not notice.

Source: Lawson & Hanson 1974, Solving Least Squares Problems, chapter 23.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.methods.pursuit.atoms import combination, products


def refined(signals: jax.Array, atoms: jax.Array, values: jax.Array, is_free: jax.Array) -> jax.Array:
    """Least-squares coefficients brought to the last digits, with their derivatives.

    w + (D_S D_S^T)^-1 D_S (x - w D_S), of which w and the inverse are constants to derivatives: as the residual is
    orthogonal to D_S at the minimum, what remains are the derivatives of the minimum.

    Args:
        signals: `[batch, d]`.
        atoms: `[batch, k, d]`.
        values: Near the minimum, `[batch, k]`.
        is_free: Which coefficients the minimum is over; the rest are 0.

    Returns:
        `[batch, k]`.
    """
    fixed, values = lax.stop_gradient((atoms, values))
    gram = jnp.einsum("bkd,bld->bkl", fixed, fixed, precision=lax.Precision.HIGHEST)
    left = signals - combination(values, atoms)
    return values + _solve(_factor(gram, is_free), jnp.where(is_free, products(atoms, left), 0))


class _Search(NamedTuple):
    """An active-set search; `[batch, k]` each, but for the last two."""

    values: jax.Array
    is_passive: jax.Array
    is_barred: jax.Array
    is_open: jax.Array
    n_steps: jax.Array


def nonneg_least_squares(gram: jax.Array, linear: jax.Array, start: jax.Array, is_free: jax.Array) -> jax.Array:
    """The w >= 0 with the least `w G w / 2 - b . w`.

    Args:
        gram: `G`, with a diagonal of ones, `[batch, k, k]`.
        linear: `b`, `[batch, k]`.
        start: Where to begin, at least 0, `[batch, k]`.
        is_free: Which coefficients there are; the rest stay 0.

    Returns:
        `[batch, k]`.
    """
    n_batch, k = linear.shape
    # Below this a coefficient's gradient is rounding.
    noise = 8 * jnp.finfo(linear.dtype).eps * jnp.abs(linear).max(axis=1, keepdims=True, initial=0)

    def is_searching(search: _Search) -> jax.Array:
        return search.is_open.any() & (search.n_steps < 3 * k + 8)

    def step(search: _Search) -> _Search:
        values, is_passive = search.values, search.is_passive
        factor = _factor(gram, is_passive)
        goal = _solve(factor, jnp.where(is_passive, linear, 0))
        goal += _solve(factor, jnp.where(is_passive, linear - _apply(gram, goal), 0))
        is_below = is_passive & (goal <= 0)
        is_reached = ~is_below.any(axis=1, keepdims=True)

        # On the way to the goal some coefficients reach 0: go to the first, and let it leave.
        way = values - goal
        share = jnp.where(is_below, values / jnp.where(is_below & (way > 0), way, jnp.ones_like(way)), jnp.inf)
        first = jnp.where(is_reached, jnp.ones_like(way[:, :1]), share.min(axis=1, keepdims=True))
        leaves = is_below & (share <= first)
        there = jnp.where(is_passive & ~leaves, jnp.maximum(values - first * way, 0), 0)
        # One that came in just now and would go below 0 at once came in by rounding.
        is_barred = search.is_barred | (leaves & (values == 0))

        # At the goal: let in the one that lowers the error most.
        has_moved = (there != values).any(axis=1, keepdims=True)
        is_barred &= ~(is_reached & has_moved)
        slope = linear - _apply(gram, there)
        may_enter = is_free & ~is_passive & ~is_barred & (slope > noise)
        slope = jnp.where(may_enter, slope, -jnp.inf)
        enters = may_enter & is_reached & (jnp.arange(k)[None] == jnp.argmax(slope, axis=1, keepdims=True))

        is_open = search.is_open[:, None]
        return _Search(
            jnp.where(is_open, there, values),
            jnp.where(is_open, (is_passive & ~leaves) | enters, is_passive),
            is_barred,
            search.is_open & (~is_reached[:, 0] | enters.any(axis=1)),
            search.n_steps + 1,
        )

    begin = _Search(start, start > 0, jnp.zeros_like(is_free), jnp.ones(n_batch, bool), jnp.zeros((), jnp.int32))
    return lax.while_loop(is_searching, step, begin).values


def _factor(gram: jax.Array, is_free: jax.Array) -> jax.Array:
    """The Cholesky factor of the free part of the Gram matrix; of the identity in the rest."""
    k = gram.shape[-1]
    both = is_free[:, :, None] & is_free[:, None, :]
    diagonal = jnp.where(is_free, jnp.asarray(8 * jnp.finfo(gram.dtype).eps, gram.dtype), jnp.ones((), gram.dtype))
    return lax.linalg.cholesky(jnp.where(both, gram, 0) + diagonal[:, :, None] * jnp.eye(k, dtype=gram.dtype)[None])


def _solve(factor: jax.Array, linear: jax.Array) -> jax.Array:
    """The solution of `L L^T w = b`."""
    column = linear[:, :, None]
    column = lax.linalg.triangular_solve(factor, column, left_side=True, lower=True)
    return lax.linalg.triangular_solve(factor, column, left_side=True, lower=True, transpose_a=True)[:, :, 0]


def _apply(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
    return jnp.einsum("bkl,bl->bk", matrix, vectors, precision=lax.Precision.HIGHEST)
