"""The matching-pursuit SAE: latents are found one at a time, each in what the ones before left over.

    r = x - b_dec;  k times:  j = argmax r W_dec^T,  f_j += r . W_dec_j,  r -= (r . W_dec_j) W_dec_j

The encoder is the decoder. An atom may be chosen twice, and its coefficients add up. Which atom is chosen has no
gradient; the coefficients have.

>>> variant = MatchingPursuit(k=3, is_nonneg=False)
>>> params = {"W_dec": jnp.array([[1.0, 0.0], [0.6, 0.8]]), "b_dec": jnp.zeros(2)}
>>> [f"{value:.3f}" for value in variant.encode(params, jnp.ones((1, 2)))[0]]
['0.160', '1.304']

Sharp edges: decoder rows must have norm 1, or a step overshoots. With `is_nonneg=False` latents may be below 0:
training counts those above 0 as fired, evaluation all that are not 0.

Source: Costa et al. 2025, From Flat to Hierarchical (MP-SAE); Mallat & Zhang 1993 for the pursuit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.core.best_rows import best_rows
from interp_jax.core.errors import check_number
from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.architecture import Architecture, TrainPass
from interp_jax.methods.sae.parameters import Params
from interp_jax.methods.sae.top_k import check_k


@final
@dataclass(frozen=True)
class MatchingPursuit(Architecture):
    """Latents by matching pursuit over the decoder's rows.

    Args:
        k: How many steps.
        tolerance: A row stops once its residual's norm is below this.
        is_nonneg: Whether coefficients stay at least 0; a row stops when no atom has a positive product.
    """

    k: int
    tolerance: float = 0.0
    is_nonneg: bool = True

    name: ClassVar[str] = "matching_pursuit"
    is_normalised: ClassVar[bool] = True
    can_fold_norms: ClassVar[bool] = False

    @property
    def reads_b_dec(self) -> bool:
        """Always: what is pursued is `x - b_dec`."""
        return True

    def check(self, n_latents: int) -> None:
        """Raise `InvalidInputError` if k is above `n_latents`, or the tolerance is no number from 0 on."""
        check_k(self.k, n_latents, where=f"MatchingPursuit, with {n_latents} latents")
        check_number(self.tolerance, what="tolerance", where="MatchingPursuit", at_least=0)

    def init(self, key: jax.Array, *, d_in: int, n_latents: int, d_out: int | None = None, **options: Any) -> Params:
        """The arrays for a `key`, `d_in`, `n_latents` and `d_out`, the `options` of `init_params`: a decoder only."""
        params = super().init(key, d_in=d_in, n_latents=n_latents, d_out=d_out, is_tied=True, **options)
        return {name: value for name, value in params.items() if name != "b_enc"}

    def pre_activations(self, params: Params, x: jax.Array, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
        """The products of `x` with the atoms of `params`, with factors of `dtype`; both alike."""
        products = parameters.matmul(x - lax.stop_gradient(params["b_dec"])[None], params["W_dec"].T, dtype)
        return products, products

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """The coefficients of k steps of pursuit of `x` under `params`."""
        return self._pursue(params, x - params["b_dec"][None], jnp.float32)[0]

    def train_pass(self, params: Params, x: jax.Array, y: jax.Array, *, dtype: Any = jnp.float32) -> TrainPass:
        """One batch of `params` from `x` to `y`, with factors of `dtype`; `y` must be `x`."""
        latents, residual = self._pursue(params, x - params["b_dec"][None], dtype)
        return TrainPass(
            pre_activations=self.pre_activations(params, x, dtype)[1],
            latents=latents,
            reconstruction=x - residual,
            penalty=jnp.zeros(()),
            auxiliary=jnp.zeros(()),
        )

    def in_units(self, factor: float) -> MatchingPursuit:
        """The tolerance times `factor`."""
        return replace(self, tolerance=self.tolerance * factor)

    def scaled_biases(self, params: Params, factors: jax.Array) -> Params:
        """Nothing: `factors` scale no array in `params`."""
        del params, factors
        return {}

    def _pursue(self, params: Params, x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        W_dec, rows = params["W_dec"], jnp.arange(len(x))
        rounded = W_dec.astype(dtype)

        def step(state: tuple[jax.Array, ...], _: None) -> tuple[tuple[jax.Array, ...], None]:
            residual, latents = state
            chosen = best_rows(residual.astype(dtype), rounded, is_signed=not self.is_nonneg, precision=None).indices
            atoms = W_dec[chosen]
            # Again in float32, and with a gradient: of the chosen ones only.
            coefficients = (residual * atoms).sum(axis=-1)
            is_done = jnp.linalg.norm(lax.stop_gradient(residual), axis=-1) <= self.tolerance
            if self.is_nonneg:
                is_done |= coefficients <= 0
            coefficients = jnp.where(is_done, 0.0, coefficients)
            return (residual - coefficients[:, None] * atoms, latents.at[rows, chosen].add(coefficients)), None

        residual, latents = lax.scan(step, (x, jnp.zeros((len(x), len(W_dec)))), None, length=self.k)[0]
        return latents, residual
