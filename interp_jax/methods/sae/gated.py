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
from typing import Any, ClassVar, cast, final

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.architecture import Architecture, TrainPass, squared_error
from interp_jax.methods.sae.dense import plus_row, rows_and_sums
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
        latents, opened, penalty = gated(linear, params["b_gate"], params["r_mag"], params["b_mag"])
        by_gate = parameters.decode(lax.stop_gradient(params), opened, x, dtype=dtype)
        return TrainPass(
            pre_activations=plus_row(for_dead, params["b_gate"]),
            latents=latents,
            reconstruction=parameters.decode(params, latents, x, dtype=dtype),
            penalty=penalty,
            auxiliary=squared_error(y, by_gate),
        )

    def scaled_biases(self, params: Params, factors: jax.Array) -> Params:
        """The biases in `params` of gate and magnitude, times `factors`."""
        return {name: params[name] * factors for name in ("b_gate", "b_mag")}


def _latents(linear: jax.Array, gate: jax.Array, r_mag: jax.Array, b_mag: jax.Array) -> jax.Array:
    return jnp.where(gate <= 0, 0.0, jax.nn.relu(jnp.exp(r_mag)[None] * linear + b_mag[None]))


@jax.custom_vjp
def gated(
    linear: jax.Array, b_gate: jax.Array, r_mag: jax.Array, b_mag: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both halves of the encoder: magnitudes where the gate is open, and how far it is open.

    Args:
        linear: What gate and magnitude share, `[batch, latent]`.
        b_gate: `[latent]`; the latents' gradient does not reach it.
        r_mag: `[latent]`.
        b_mag: `[latent]`.

    Returns:
        The latents and `ReLU(linear + b_gate)`, `[batch, latent]`, and the latter's sum over the latents, averaged over
        the batch.
    """
    return _forward(linear, b_gate, r_mag, b_mag)[0]


def _forward(linear: Any, b_gate: Any, r_mag: Any, b_mag: Any) -> tuple[Any, Any]:
    gate = linear + b_gate[None]
    # Without the barrier XLA computes both again from `linear` wherever they are read, and keeps that.
    latents, opened = lax.optimization_barrier((_latents(linear, gate, r_mag, b_mag), jax.nn.relu(gate)))
    return (latents, opened, opened.sum(axis=-1).mean()), (latents, opened, jnp.exp(r_mag), b_mag)


def _backward(saved: Any, cotangents: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    latents, opened, scale, b_mag = saved
    to_latents, to_opened, to_penalty = cotangents
    each = to_penalty / len(latents)

    def rows(to_latents: Any, latents: Any, to_opened: Any, opened: Any) -> tuple[Any, tuple[Any, ...]]:
        to_magnitude = jnp.where(latents > 0, to_latents, 0.0)
        to_gate = jnp.where(opened > 0, to_opened + each, 0.0)
        # Where a latent is above 0, exp(r_mag) linear = latent - b_mag: `linear` need not be kept.
        to_r_mag = to_magnitude * (latents - b_mag[None])
        return scale[None] * to_magnitude + to_gate, (to_gate, to_r_mag, to_magnitude)

    to_linear, sums = rows_and_sums(rows, to_latents, latents, to_opened, opened)
    return (cast(jax.Array, to_linear), *sums)


gated.defvjp(_forward, _backward)
