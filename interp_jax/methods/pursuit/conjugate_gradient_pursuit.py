"""Conjugate gradient pursuit: gradient pursuit whose steps do not undo one another.

    p = g + b p_prev  with b such that  (p D_S) . (p_prev D_S) = 0;  then the best step along p

This is the approximate form: conjugate to the step before only. It costs hardly more than the gradient's direction and
ends closer to orthogonal matching pursuit.

>>> from interp_jax.methods.pursuit.pursue import pursue
>>> pursued = pursue(ConjugateGradientPursuit(), jnp.ones((1, 2)), jnp.array([[1.0, 0.0], [0.6, 0.8]]), k=2)
>>> pursued.indices.tolist(), [f"{value:.2f}" for value in pursued.values[0]]
([[1, 0]], ['1.25', '0.25'])

Sharp edges: as those of gradient pursuit. After a step that was cut off at 0 the next one follows the gradient.

Source: Blumensath & Davies 2008, Gradient Pursuits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp

from interp_jax.methods.pursuit.atoms import combination, in_support, products
from interp_jax.methods.pursuit.line_search import line_search
from interp_jax.methods.pursuit.pursuit import Choice, Pursuit, State, Update


class Previous(NamedTuple):
    """The direction of the step before, 0 where there is none.

    Args:
        direction: `[batch, k]`.
        moved: What it adds to the reconstruction, `[batch, d]`.
    """

    direction: jax.Array
    moved: jax.Array


@final
@dataclass(frozen=True)
class ConjugateGradientPursuit(Pursuit):
    """Approximate conjugate gradient pursuit.

    Args:
        is_nonneg: Whether coefficients stay at least 0.
    """

    is_nonneg: bool = True

    name: ClassVar[str] = "conjugate_gradient_pursuit"

    def memory(self, signals: jax.Array, k: int) -> Previous:
        """No direction yet, for `signals` and `k` slots."""
        return Previous(jnp.zeros((len(signals), k), signals.dtype), jnp.zeros_like(signals))

    def update(self, signals: jax.Array, state: State, choice: Choice) -> Update:
        """A conjugate step over the atoms of `state` and the `choice`, towards `signals`, by what is left of them."""
        del signals
        previous: Previous = state.memory
        is_moving = in_support(state, choice, is_nonneg=self.is_nonneg)
        gradient = jnp.where(is_moving, products(state.atoms, state.residual), 0)
        moved = combination(gradient, state.atoms)
        length = jnp.square(previous.moved).sum(axis=1, keepdims=True)
        overlap = (moved * previous.moved).sum(axis=1, keepdims=True)
        share = jnp.where(length > 0, -overlap / jnp.where(length > 0, length, jnp.ones_like(length)), 0)
        direction, moved = gradient + share * previous.direction, moved + share * previous.moved
        found = line_search(state, direction, gradient, moved, is_nonneg=self.is_nonneg)
        goes_on = ~found.is_cut[:, None]
        memory = Previous(jnp.where(goes_on, direction, 0), jnp.where(goes_on, moved, 0))
        return Update(found.values, found.residual, memory, found.is_cut, found.is_flat)
