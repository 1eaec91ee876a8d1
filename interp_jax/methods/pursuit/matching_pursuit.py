"""Matching pursuit: each step takes out of the residual what the chosen atom explains of it.

    w_j += D_j . r;  r -= (D_j . r) D_j

The cheapest step and the slowest to converge: the coefficients chosen earlier stay as they are. An atom may be chosen
again, and its coefficients add up.

>>> from interp_jax.methods.pursuit.pursue import pursue
>>> dictionary = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 0.0], [0.0, 0.0]])
>>> pursued = pursue(MatchingPursuit(is_nonneg=False), jnp.ones((1, 2)), dictionary, k=4)
>>> pursued.indices.tolist(), [f"{value:.4f}" for value in pursued.values[0]]
([[1, 0, -1, -1]], ['1.3040', '0.2176', '0.0000', '0.0000'])

Sharp edges: fewer than k atoms where one was chosen again.

Source: Mallat & Zhang 1993.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import jax
import jax.numpy as jnp

from interp_jax.methods.pursuit.pursuit import Choice, Pursuit, State, Update


@final
@dataclass(frozen=True)
class MatchingPursuit(Pursuit):
    """Matching pursuit.

    Args:
        is_nonneg: Whether coefficients stay at least 0: only positive products are chosen.
    """

    is_nonneg: bool = True

    name: ClassVar[str] = "matching_pursuit"

    def update(self, signals: jax.Array, state: State, choice: Choice) -> Update:
        """Add to the coefficient of the `choice` what it explains of the residual in `state`, not of `signals`."""
        del signals
        products = (choice.atom * state.residual).sum(axis=1, keepdims=True)
        values = state.values + jnp.where(choice.is_slot, products, jnp.zeros_like(products))
        # The product that chose the atom was above 0; this one was summed in another order.
        is_stuck = products[:, 0] <= 0 if self.is_nonneg else products[:, 0] == 0
        is_stale = jnp.zeros_like(is_stuck)
        return Update(values, state.residual - products * choice.atom, None, is_stale, is_stuck)
