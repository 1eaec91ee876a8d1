"""The TopK SAE: the k largest pre-activations of each row, and nothing else, at least 0.

    f = ReLU(TopK_k((x - b_dec) W_enc + b_enc))

L0 is set rather than found, and nothing shrinks the latents. Latents that never win get no gradient: see `AuxK`.

>>> variant = TopK(k=2)
>>> params = variant.init(jax.random.key(0), d_in=3, n_latents=5)
>>> int((variant.encode(params, jnp.ones((1, 3))) > 0).sum()) <= 2
True

Sharp edges: fewer than k latents are active where fewer pre-activations are above 0.

Source: Gao et al. 2024 (2406.04093).
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.architecture import Architecture, SparseLatents, TrainPass
from interp_jax.methods.sae.parameters import Params
from interp_jax.methods.sae.sparse import sparse_matmul, top_k_latents


@final
@dataclass(frozen=True)
class TopK(Architecture):
    """The k largest latents of each row.

    Args:
        k: How many.
        is_centred: Whether `b_dec` is subtracted before encoding.
    """

    k: int
    is_centred: bool = True

    name: ClassVar[str] = "top_k"
    is_normalised: ClassVar[bool] = True

    def check(self, n_latents: int) -> None:
        """Raise `InvalidInputError` if k is above `n_latents`."""
        check_k(self.k, n_latents, where=f"TopK, with {n_latents} latents")

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """The k largest pre-activations of `x` under `params`."""
        pre, _ = self.pre_activations(params, x)
        return densify(top_k_latents(*self._encoder(params, x), pre, self.k), pre.shape[-1])

    def train_pass(self, params: Params, x: jax.Array, y: jax.Array, *, dtype: Any = jnp.float32) -> TrainPass:
        """One batch of `params` from `x` to `y`, with factors of `dtype`; only chosen rows are touched."""
        pre, for_dead = self.pre_activations(params, x, dtype)
        sparse = top_k_latents(*self._encoder(params, x), pre, self.k)
        reconstruction = sparse_matmul(*sparse, params["W_dec"]) + parameters.offset(params, x, dtype=dtype)
        return TrainPass(for_dead, sparse, reconstruction, penalty=jnp.zeros(()), auxiliary=jnp.zeros(()))

    def _encoder(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What pre-activations are computed from."""
        inputs = x - params["b_dec"][None] if self.is_centred else x
        return inputs, parameters.encoder_weights(params), params["b_enc"]


def check_k(k: int, n_latents: int, *, where: str) -> None:
    """Raise `InvalidInputError` unless so many latents can be chosen."""
    if not isinstance(k, numbers.Integral) or isinstance(k, bool) or not 1 <= k <= n_latents:
        raise InvalidInputError(
            four_part(
                f"k = {k!r:.60} was given",
                where=where,
                expected=f"a whole number from 1 to {n_latents}.",
                fix="lower k, or train more latents.",
            )
        )


def densify(sparse: SparseLatents, n_latents: int) -> jax.Array:
    """The latents as `[batch, latent]`."""
    rows = jnp.arange(sparse.values.shape[0])[:, None]
    return jnp.zeros((sparse.values.shape[0], n_latents)).at[rows, sparse.indices].add(sparse.values)
