"""Orthogonal matching pursuit: after each choice all coefficients become the best ones for the atoms chosen so far.

    w_S = argmin |x - w_S D_S|, with w_S >= 0 or without a sign

What is left is orthogonal to every atom with a coefficient, so no step is wasted: the smallest error at each L0,
and the dearest step. Without a sign the inverse of the Gram matrix's Cholesky factor grows by a row each step; with
one, an active set is searched from the coefficients of the step before.

>>> from interp_jax.methods.pursuit.pursue import pursue
>>> pursued = pursue(OrthogonalMatchingPursuit(), jnp.ones((1, 2)), jnp.array([[1.0, 0.0], [0.6, 0.8]]), k=2)
>>> pursued.indices.tolist(), [f"{value:.2f}" for value in pursued.values[0]]
([[1, 0]], ['1.25', '0.25'])

Sharp edges: without a sign a signal stops once the best atom is nearly in the span of those it has: the part of it that
is new is at most 8 sqrt(eps) of it, 0.003 in float32 (0.0000001 in float64). With `is_nonneg` an atom whose coefficient
is 0 at the minimum keeps its slot and may come back.

Source: Pati, Rezaiifar & Krishnaprasad 1993.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.methods.pursuit.atoms import combination, products
from interp_jax.methods.pursuit.least_squares import nonneg_least_squares
from interp_jax.methods.pursuit.pursuit import Choice, Pursuit, State, Update


class Normal(NamedTuple):
    """The normal equations of the atoms chosen so far.

    Args:
        gram: `[batch, k, k]`.
        linear: The atoms' products with the signal, `[batch, k]`.
    """

    gram: jax.Array
    linear: jax.Array


@final
@dataclass(frozen=True)
class OrthogonalMatchingPursuit(Pursuit):
    """Orthogonal matching pursuit.

    Args:
        is_nonneg: Whether coefficients stay at least 0.
    """

    is_nonneg: bool = True

    name: ClassVar[str] = "orthogonal_matching_pursuit"
    is_least_squares: ClassVar[bool] = True

    def memory(self, signals: jax.Array, k: int) -> jax.Array | Normal:
        """For `signals` and `k` slots, the normal equations, or the inverse of their factor: empty."""
        square = jnp.zeros((len(signals), k, k), signals.dtype)
        return Normal(square, jnp.zeros((len(signals), k), signals.dtype)) if self.is_nonneg else square

    def update(self, signals: jax.Array, state: State, choice: Choice) -> Update:
        """The best coefficients of `signals` for the atoms of `state`, the `choice` among them."""
        # Of an atom that is there already the product is rounding.
        is_stuck = ~lax.dynamic_index_in_dim(choice.is_slot, choice.step, axis=1, keepdims=False)
        solve = self._with_sign if self.is_nonneg else self._without_sign
        values, memory, is_dependent = solve(signals, state, choice)
        residual = signals - combination(values, state.atoms)
        return Update(values, residual, memory, jnp.zeros_like(is_stuck), is_stuck | is_dependent)

    def _with_sign(self, signals: jax.Array, state: State, choice: Choice) -> tuple[jax.Array, Normal, jax.Array]:
        gram, linear = state.memory
        row = products(state.atoms, choice.atom)
        gram = lax.dynamic_update_index_in_dim(gram, row, choice.step, axis=1)
        gram = lax.dynamic_update_index_in_dim(gram, row, choice.step, axis=2)
        linear = lax.dynamic_update_index_in_dim(linear, (choice.atom * signals).sum(axis=1), choice.step, axis=1)
        values = nonneg_least_squares(gram, linear, state.values, state.indices >= 0)
        return values, Normal(gram, linear), jnp.zeros(len(signals), bool)

    def _without_sign(self, signals: jax.Array, state: State, choice: Choice) -> tuple[jax.Array, jax.Array, jax.Array]:
        # The rows of the inverse M of the factor: D_S orthonormalised is M D_S.
        inverse = state.memory
        inside = jnp.einsum("bkl,bl->bk", inverse, products(state.atoms, choice.atom), precision=lax.Precision.HIGHEST)
        height = 1 - jnp.square(inside).sum(axis=1, keepdims=True)
        is_dependent = height <= 64 * jnp.finfo(height.dtype).eps
        root = jnp.sqrt(jnp.where(is_dependent, jnp.ones_like(height), height))
        new = jnp.where(choice.is_slot, 1, -jnp.einsum("bkl,bk->bl", inverse, inside, precision=lax.Precision.HIGHEST))
        inverse = lax.dynamic_update_index_in_dim(inverse, new / root, choice.step, axis=1)
        # From the residual rather than the signal: what rounding left of earlier atoms goes with it.
        along = jnp.einsum(
            "bkl,bl->bk", inverse, products(state.atoms, state.residual), precision=lax.Precision.HIGHEST
        )
        values = state.values + jnp.einsum("bkl,bk->bl", inverse, along, precision=lax.Precision.HIGHEST)
        return values, inverse, is_dependent[:, 0]
