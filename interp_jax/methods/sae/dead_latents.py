"""Latents that no longer fire: terms of the loss that bring them back.

A term reads the pre-activations of the dead latents and the residual `e = y - y'` that the living ones leave, and
lets the dead ones predict it. Its gradient reaches nothing but the dead latents' own weights.

    GhostGrads   exp(pre) W_dec of the dead, scaled to half the residual's norm, against the residual
    AuxK         the k_aux largest pre-activations of the dead, decoded, against the residual

>>> e, dead = jnp.array([[2.0, 0.0]]), jnp.array([True])
>>> direction = jnp.array([[jnp.cos(jnp.radians(50.0)), jnp.sin(jnp.radians(50.0))]])
>>> def ghost(pre):
...     return GhostGrads("dead_only_rescaled")(pre, direction, e, dead, dead.mean(), jnp.float32)
>>> round(float(jax.grad(ghost)(jnp.zeros((1, 1)))[0, 0]), 4)
-0.5712

Sharp edges: a footnote of a later report says half the norm of the input; the recipe and its code say of the
residual, and so does this. With more than a third of the latents dead, or all (`n_first_steps`), ghost gradients cost
two thirds of a step more: three products of all latents beside the five of a plain step.

Source: Jermyn & Templeton, Anthropic's January 2024 update (ghost gradients); Gao et al. 2024 (AuxK).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import final

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.core.errors import check_choice, check_number
from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.architecture import squared_error
from interp_jax.methods.sae.sparse import largest, sparse_matmul

KINDS = ("original", "rescaled", "dead_only_rescaled")


class DeadTerm(abc.ABC):
    """The contract of a term; every subclass is final."""

    def dead(self, is_dead: jax.Array, step: jax.Array) -> jax.Array:
        """Which latents the term is about, `[latent]`: those of `is_dead`, whatever the `step`."""
        del step
        return is_dead

    @abc.abstractmethod
    def __call__(
        self,
        pre: jax.Array,
        W_dec: jax.Array,
        residual: jax.Array,
        dead: jax.Array,
        share: jax.Array,
        dtype: jnp.dtype | type,
    ) -> jax.Array:
        """The term, a mean over the batch, from all latents or from some with the dead among them.

        Args:
            pre: Pre-activations, `[batch, latent]`.
            W_dec: The decoder, `[latent, d_out]`.
            residual: `[batch, d_out]`.
            dead: Which of these latents, `[latent]`.
            share: Which share of all latents is dead.
            dtype: What the product's factors are rounded to.

        Returns:
            A scalar; 0 where nothing is dead.
        """


@final
@dataclass(frozen=True)
class GhostGrads(DeadTerm):
    """Ghost gradients.

    Args:
        kind: "original" (the term equals the reconstruction's error in size), "rescaled" (that times the share of dead
            latents) or "dead_only_rescaled" (the share times the term itself).
        is_capped: Whether the exponential is of `min(pre, 0)`.
        n_first_steps: For so many steps every latent counts as dead.
    """

    kind: str = "original"
    is_capped: bool = False
    n_first_steps: int = 0

    def __post_init__(self) -> None:
        check_choice(self.kind, KINDS, what="kind", where="GhostGrads")
        check_number(self.n_first_steps, what="n_first_steps", where="GhostGrads", is_whole=True, at_least=0)

    def dead(self, is_dead: jax.Array, step: jax.Array) -> jax.Array:
        """Which latents the term is about, `[latent]`: those of `is_dead`, or all, by the `step`."""
        return is_dead | (step < self.n_first_steps)

    def __call__(
        self,
        pre: jax.Array,
        W_dec: jax.Array,
        residual: jax.Array,
        dead: jax.Array,
        share: jax.Array,
        dtype: jnp.dtype | type,
    ) -> jax.Array:
        """The term for `pre`, `W_dec`, `residual`, `dead` and its `share`, with factors of `dtype`."""
        residual = lax.stop_gradient(residual)
        exponents = jnp.where(dead[None], jnp.minimum(pre, 0.0) if self.is_capped else pre, -jnp.inf)
        # The scale below cancels any factor of a row, so the exponential cannot overflow, nor all of it underflow.
        largest = lax.stop_gradient(exponents.max(axis=-1, keepdims=True))
        ghosts = jnp.exp(exponents - jnp.where(jnp.isfinite(largest), largest, 0.0))
        written = parameters.matmul(ghosts, W_dec, dtype)
        norms = jnp.linalg.norm(residual, axis=-1, keepdims=True)
        scale = norms / (2 * jnp.linalg.norm(lax.stop_gradient(written), axis=-1, keepdims=True) + 1e-12)
        errors = jnp.square(scale * written - residual).sum(axis=-1)
        if self.kind != "dead_only_rescaled":
            errors *= lax.stop_gradient(jnp.square(norms[:, 0]) / (errors + 1e-12))
        factor = jnp.where(dead.any(), 1.0, 0.0) if self.kind == "original" else share
        return factor * errors.mean()


@final
@dataclass(frozen=True)
class AuxK(DeadTerm):
    """The residual's error when the largest of the dead latents predict it.

    Args:
        k: How many of them; None for half of d_out.
        coefficient: What the term is multiplied by, in units of the residual's variance.
    """

    k: int | None = None
    coefficient: float = 1 / 32

    def __post_init__(self) -> None:
        if self.k is not None:
            check_number(self.k, what="k", where="AuxK", is_whole=True, at_least=1)
        check_number(self.coefficient, what="coefficient", where="AuxK", at_least=0)

    def __call__(
        self,
        pre: jax.Array,
        W_dec: jax.Array,
        residual: jax.Array,
        dead: jax.Array,
        share: jax.Array,
        dtype: jnp.dtype | type,
    ) -> jax.Array:
        """The term for `pre`, `W_dec`, `residual` and `dead`, by its variance; `share` and `dtype` are not used."""
        del share, dtype  # Few rows are touched.
        residual, d_out = lax.stop_gradient(residual), W_dec.shape[1]
        k = min(self.k or max(d_out // 2, 1), len(dead))
        _, indices = largest(jnp.where(dead[None], pre, -jnp.inf), k)
        values = jnp.where(dead[indices], jnp.take_along_axis(pre, indices, axis=1), 0.0)
        # Fewer may be dead than k: the rest count for nothing.
        written = sparse_matmul(jax.nn.relu(values), indices, W_dec)
        error = squared_error(residual, written)
        variance = squared_error(residual, residual.mean(axis=0, keepdims=True))
        return jnp.where(
            dead.any() & (variance > 0), self.coefficient * error / jnp.where(variance > 0, variance, 1.0), 0.0
        )
