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
from interp_jax.methods.sae.dense import batch_sum, column_sum, plus_row, relu
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
    bias: ClassVar[str] = "b_gate"

    def init(self, key: jax.Array, *, d_in: int, n_latents: int, d_out: int | None = None, **options: Any) -> Params:
        """The arrays for a `key`, `d_in`, `n_latents` and `d_out`, with the `options` of `init_params`; no `b_enc`."""
        params = super().init(key, d_in=d_in, n_latents=n_latents, d_out=d_out, **options)
        return {name: value for name, value in params.items() if name != "b_enc"}

    def extra_params(self, n_latents: int) -> Params:
        """Biases of gate and magnitude, and the logarithm of the magnitude's scale, for `n_latents`."""
        return {name: jnp.zeros(n_latents) for name in ("b_gate", "b_mag", "r_mag")}

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """The magnitudes of `x` under `params` where the gate is open."""
        linear, _ = parameters.pre_activations(params, x, is_centred=self.is_centred, bias=None)
        return _latents(linear, linear + params["b_gate"][None], params["r_mag"], params["b_mag"])

    def train_pass(self, params: Params, x: jax.Array, y: jax.Array, *, dtype: Any = jnp.float32) -> TrainPass:
        """One batch of `params` from `x` to `y`, with factors of `dtype`; the penalty is L1 of the gate."""
        linear, for_dead = parameters.pre_activations(params, x, is_centred=self.is_centred, bias=None, dtype=dtype)
        gate = plus_row(linear, params["b_gate"])
        latents = gated(linear, lax.stop_gradient(gate), params["r_mag"], params["b_mag"])
        opened = relu(gate)
        by_gate = parameters.decode(lax.stop_gradient(params), opened, x, dtype=dtype)
        return TrainPass(
            pre_activations=plus_row(for_dead, params["b_gate"]),
            latents=latents,
            reconstruction=parameters.decode(params, latents, x, dtype=dtype),
            penalty=opened.sum(axis=-1).mean(),
            auxiliary=squared_error(y, by_gate),
        )

    def scaled_biases(self, params: Params, factors: jax.Array) -> Params:
        """The biases in `params` of gate and magnitude, times `factors`."""
        return {name: params[name] * factors for name in ("b_gate", "b_mag")}


@jax.custom_vjp
def gated(linear: jax.Array, gate: jax.Array, r_mag: jax.Array, b_mag: jax.Array) -> jax.Array:
    """The magnitudes `exp(r_mag) linear + b_mag`, at least 0, where the gate is open.

    Args:
        linear: What gate and magnitude share, `[batch, latent]`.
        gate: It is open where this is above 0, which has no gradient, `[batch, latent]`.
        r_mag: `[latent]`.
        b_mag: `[latent]`.

    Returns:
        The latents.
    """
    return _latents(linear, gate, r_mag, b_mag)


def _latents(linear: jax.Array, gate: jax.Array, r_mag: jax.Array, b_mag: jax.Array) -> jax.Array:
    return jnp.where(gate <= 0, 0.0, jax.nn.relu(jnp.exp(r_mag)[None] * linear + b_mag[None]))


def _forward(linear: Any, gate: Any, r_mag: Any, b_mag: Any) -> tuple[jax.Array, Any]:
    latents = lax.optimization_barrier(_latents(linear, gate, r_mag, b_mag))
    return latents, (latents, linear, jnp.exp(r_mag))


def _backward(saved: Any, cotangent: jax.Array) -> tuple[jax.Array | None, ...]:
    latents, linear, scale = saved
    to_magnitude = jnp.where(latents > 0, cotangent, 0.0)
    to_r_mag = scale * batch_sum(jnp.multiply, to_magnitude, linear)
    return scale[None] * to_magnitude, None, to_r_mag, column_sum(to_magnitude)


gated.defvjp(_forward, _backward)
