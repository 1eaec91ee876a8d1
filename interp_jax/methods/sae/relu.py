"""The plain SAE: a ReLU and an L1 penalty, tied or not, with a pre-encoder bias or without.

    f = ReLU((x - b_dec) W_enc + b_enc)        loss = |x - f W_dec - b_dec|^2 + coefficient * sum f

With a free decoder the penalty must weigh latents by their rows' norms, or W * c with f / c would escape it.

>>> ReLU(is_centred=False)
ReLU(is_tied=False, is_centred=False, is_norm_weighted=False)

Sharp edges: L1 shrinks: latents come out too small. `shrinkage` in the evaluation says by how much.

Source: Bricken et al. 2023, Towards Monosemanticity; Anthropic's April 2024 update for the weighted penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.architecture import Architecture, TrainPass
from interp_jax.methods.sae.dense import relu
from interp_jax.methods.sae.parameters import Params


@final
@dataclass(frozen=True)
class ReLU(Architecture):
    """ReLU latents under an L1 penalty.

    Args:
        is_tied: Whether the encoder is the decoder's transpose.
        is_centred: Whether `b_dec` is subtracted before encoding.
        is_norm_weighted: Whether the penalty weighs each latent by the norm of its decoder row.
    """

    is_tied: bool = False
    is_centred: bool = True
    is_norm_weighted: bool = False

    name: ClassVar[str] = "relu"

    def init(self, key: jax.Array, *, d_in: int, n_latents: int, d_out: int | None = None, **options: Any) -> Params:
        """The arrays for a `key`, `d_in`, `n_latents` and `d_out`, `options` of `init_params`; no `W_enc` if tied."""
        return super().init(key, d_in=d_in, n_latents=n_latents, d_out=d_out, is_tied=self.is_tied, **options)

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """`ReLU((x - b_dec) W_enc + b_enc)` with the arrays of `params`."""
        return relu(self.pre_activations(params, x)[0])

    def train_pass(self, params: Params, x: jax.Array, y: jax.Array, *, dtype: Any = jnp.float32) -> TrainPass:
        """One batch of `params` from `x` to `y`, with factors of `dtype`; the penalty is L1."""
        pre, for_dead = self.pre_activations(params, x, dtype)
        latents = relu(pre)
        weighted = latents * jnp.linalg.norm(params["W_dec"], axis=-1)[None] if self.is_norm_weighted else latents
        return TrainPass(
            pre_activations=for_dead,
            latents=latents,
            reconstruction=parameters.decode(params, latents, x, dtype=dtype),
            penalty=weighted.sum(axis=-1).mean(),
            auxiliary=jnp.zeros(()),
        )
