"""What the norms of the decoder's rows may be, and how a step keeps to it.

"unit": the gradient along a row is removed, the optimiser steps, the row is scaled to norm 1. All three are needed:
an optimiser that scales each coordinate moves off the sphere even along a tangent.
"at_most_one": rows may shrink. "free": anything; the penalty must then weigh latents by their rows' norms.

>>> rows = jnp.array([[3.0, 4.0]])
>>> [f"{value:.2f}" for value in tangent(jnp.ones((1, 2)), rows, "unit")[0]]
['0.16', '-0.12']

Sharp edges: a row of zeros has no direction; it stays as it is.

Source: Bricken et al. 2023, Towards Monosemanticity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from interp_jax.core.errors import check_choice
from interp_jax.methods.sae.parameters import unit_rows

CONSTRAINTS = ("unit", "at_most_one", "free")


def check_constraint(constraint: str, *, where: str) -> None:
    """Raise `UnknownNameError` unless there is such a constraint."""
    check_choice(constraint, CONSTRAINTS, what="decoder norm", where=where)


def tangent(gradient: jax.Array, W_dec: jax.Array, constraint: str) -> jax.Array:
    """The gradient without what would only change the norms the constraint holds, `[latent, d_out]`."""
    if constraint == "free":
        return gradient
    directions = unit_rows(W_dec)
    along = (gradient * directions).sum(axis=-1, keepdims=True)
    if constraint == "at_most_one":
        # A step goes against the gradient: outward where the gradient points inward.
        is_outward = (along < 0) & (jnp.linalg.norm(W_dec, axis=-1, keepdims=True) >= 1 - 1e-6)
        along = jnp.where(is_outward, along, 0.0)
    return gradient - along * directions


def constrained(W_dec: jax.Array, constraint: str) -> jax.Array:
    """The rows scaled to what the constraint allows, `[latent, d_out]`."""
    if constraint == "free":
        return W_dec
    if constraint == "unit":
        return unit_rows(W_dec)
    return W_dec / jnp.maximum(1.0, jnp.linalg.norm(W_dec, axis=-1, keepdims=True))
