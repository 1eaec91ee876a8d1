"""Products with, and sums of, the few atoms each signal has chosen.

>>> atoms = jnp.eye(3)[None, :2]
>>> products(atoms, jnp.array([[1.0, 2.0, 3.0]])).tolist(), combination(jnp.ones((1, 2)), atoms).tolist()
([[1.0, 2.0]], [[1.0, 1.0, 0.0]])

Source: interp_jax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.methods.pursuit.pursuit import Choice, State


def products(atoms: jax.Array, vectors: jax.Array) -> jax.Array:
    """The product of each of a signal's atoms with its vector.

    Args:
        atoms: `[batch, k, d]`.
        vectors: `[batch, d]`.

    Returns:
        `[batch, k]`.
    """
    return jnp.einsum("bkd,bd->bk", atoms, vectors, precision=lax.Precision.HIGHEST)


def combination(values: jax.Array, atoms: jax.Array) -> jax.Array:
    """The sum of each signal's atoms times its values.

    Args:
        values: `[batch, k]`.
        atoms: `[batch, k, d]`.

    Returns:
        `[batch, d]`.
    """
    return jnp.einsum("bk,bkd->bd", values, atoms, precision=lax.Precision.HIGHEST)


def in_support(state: State, choice: Choice, *, is_nonneg: bool) -> jax.Array:
    """Which slots move: all that were chosen, but for those that were set to 0 since.

    Args:
        state: Where the pursuit stands.
        choice: The atom that was chosen just now.
        is_nonneg: Whether coefficients are set to 0 at all.

    Returns:
        `[batch, k]`.
    """
    return choice.is_slot | (state.values > 0 if is_nonneg else state.indices >= 0)
