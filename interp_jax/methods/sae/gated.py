"""The gated SAE: one half of the encoder decides which latents fire, the other how strongly.

    u = (x - b_dec) W_enc,  gate = u + b_gate,  f = 1[gate > 0] ReLU(exp(r_mag) u + b_mag)
    loss = |x - x'|^2 + coefficient * sum ReLU(gate) + |x - ReLU(gate) W_dec - b_dec|^2

The penalty acts on the gate alone, so it does not shrink the latents. The step in f gives the gate no gradient; the
last term trains it, through frozen copies of the decoder.

>>> sorted(Gated().init(jax.random.key(0), d_in=3, n_latents=5))
['W_dec', 'W_enc', 'b_dec', 'b_gate', 'b_mag', 'r_mag']

Sharp edges: there is no `b_enc`. A latent whose gate is open while its magnitude is not gives 0.

Source: Rajamanoharan et al. 2024 (2404.16014).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.architecture import Architecture, TrainPass, squared_error
from interp_jax.methods.sae.parameters import Params


@final
@dataclass(frozen=True)
class Gated(Architecture):
    """Latents with a gate and a magnitude that share the encoder's directions.

    Args:
        is_centred: Whether `b_dec` is subtracted before encoding.
    """

    is_centred: bool = True

    name: ClassVar[str] = "gated"

    def init(self, key: jax.Array, *, d_in: int, n_latents: int, d_out: int | None = None, **options: Any) -> Params:
        """The arrays for a `key`, `d_in`, `n_latents` and `d_out`, with the `options` of `init_params`; no `b_enc`."""
        params = super().init(key, d_in=d_in, n_latents=n_latents, d_out=d_out, **options)
        return {name: value for name, value in params.items() if name != "b_enc"}

    def extra_params(self, n_latents: int) -> Params:
        """Biases of gate and magnitude, and the logarithm of the magnitude's scale, for `n_latents`."""
        return {name: jnp.zeros(n_latents) for name in ("b_gate", "b_mag", "r_mag")}

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """The magnitudes of `x` under `params` where the gate is open."""
        return self._latents(
            params, parameters.pre_activations(params, x, is_centred=self.is_centred, bias="b_gate")[0]
        )

    def train_pass(self, params: Params, x: jax.Array, y: jax.Array, *, dtype: Any = jnp.float32) -> TrainPass:
        """One batch of `params` from `x` to `y`, with factors of `dtype`; the penalty is L1 of the gate."""
        gate, for_dead = parameters.pre_activations(params, x, is_centred=self.is_centred, bias="b_gate", dtype=dtype)
        latents, opened = self._latents(params, gate), jax.nn.relu(gate)
        by_gate = parameters.decode(lax.stop_gradient(params), opened, x, dtype=dtype)
        return TrainPass(
            pre_activations=for_dead,
            latents=latents,
            reconstruction=parameters.decode(params, latents, x, dtype=dtype),
            penalty=opened.sum(axis=-1).mean(),
            auxiliary=squared_error(y, by_gate),
        )

    def scaled_biases(self, params: Params, factors: jax.Array) -> Params:
        """The biases in `params` of gate and magnitude, times `factors`."""
        return {name: params[name] * factors for name in ("b_gate", "b_mag")}

    def _latents(self, params: Params, gate: jax.Array) -> jax.Array:
        r_mag, b_gate, b_mag = (params[name][None] for name in ("r_mag", "b_gate", "b_mag"))
        magnitude = jnp.exp(r_mag) * (gate - b_gate) + b_mag
        return jnp.where(gate > 0, jax.nn.relu(magnitude), 0.0)
