"""Gradient pursuit: each step moves the coefficients of all chosen atoms along the gradient, by the best step.

    g = (D r)_S;  c = g D_S;  w_S += a g  with  a = |g|^2 / |c|^2;  r -= a c

Nearly the error of orthogonal matching pursuit, without its linear system.

>>> from interp_jax.methods.pursuit.pursue import pursue
>>> pursued = pursue(GradientPursuit(), jnp.ones((1, 2)), jnp.array([[1.0, 0.0], [0.6, 0.8]]), k=2)
>>> pursued.indices.tolist(), [f"{value:.2f}" for value in pursued.values[0]]
([[1, 0]], ['1.40', '0.16'])

Sharp edges: the step is the best before coefficients below 0 are set to 0; among coherent atoms the error may grow in
such a step, unless `guard` is on. A coefficient that was set to 0 leaves the support until its atom is chosen again.

Source: Blumensath & Davies 2008, Gradient Pursuits, for the step; Rajamanoharan et al. 2024 for its use on the
dictionaries of SAEs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import jax
import jax.numpy as jnp

from interp_jax.methods.pursuit.atoms import combination, in_support, products
from interp_jax.methods.pursuit.line_search import line_search
from interp_jax.methods.pursuit.pursuit import Choice, Pursuit, State, Update


@final
@dataclass(frozen=True)
class GradientPursuit(Pursuit):
    """Gradient pursuit.

    Args:
        is_nonneg: Whether coefficients stay at least 0.
        guard: Whether a step that was cut off at 0 and does not lower the error is dropped; the signal stops there.
    """

    is_nonneg: bool = True
    guard: bool = False

    name: ClassVar[str] = "gradient_pursuit"

    def update(self, signals: jax.Array, state: State, choice: Choice) -> Update:
        """A step along the gradient over the atoms of `state` and the `choice`, towards `signals`."""
        gradient = jnp.where(
            in_support(state, choice, is_nonneg=self.is_nonneg), products(state.atoms, state.residual), 0
        )
        moved = combination(gradient, state.atoms)
        found = line_search(state, gradient, gradient, moved, is_nonneg=self.is_nonneg)
        is_stuck = found.is_flat
        if self.guard:
            left = signals - combination(found.values, state.atoms)
            before, after = (jnp.square(residual).sum(axis=1) for residual in (state.residual, left))
            is_stuck |= found.is_cut & (after >= before)
        return Update(found.values, found.residual, None, found.is_cut, is_stuck)
