"""The JumpReLU SAE: a latent is its pre-activation where that passes the latent's own threshold, else 0.

    f = pre * 1[pre > threshold],  threshold = exp(log_threshold)

The step has no gradient; the threshold is trained by a kernel of width `bandwidth` around it (the gradient of the
expected loss, estimated from the pre-activations near the threshold). Three penalties:

- "l0": sum 1[pre > threshold], with the kernel's gradient to the threshold;
- "tanh": sum tanh(tanh_scale * f * |W_dec row|), a smooth count;
- "target_l0": (L0 / target_l0 - 1)^2, which steers L0 to the target from either side.

>>> sorted(JumpReLU().init(jax.random.key(0), d_in=3, n_latents=5))
['W_dec', 'W_enc', 'b_dec', 'b_enc', 'log_threshold']

Sharp edges: threshold and bandwidth are in units of the activations: they mean something only together with the
input's normalisation (the defaults, with E|x|^2 = 1). No pre-encoder bias by default, as in the paper.

Source: Rajamanoharan et al. 2024 (2407.14435); Anthropic's January 2025 update for the tanh penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from interp_jax.core.errors import check_choice, check_number
from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.architecture import Architecture, TrainPass
from interp_jax.methods.sae.dense import batch_sum
from interp_jax.methods.sae.parameters import Params

PENALTIES = ("l0", "tanh", "target_l0")
LOG_THRESHOLD_MAX = 60.0


@final
@dataclass(frozen=True)
class JumpReLU(Architecture):
    """Latents with a threshold each.

    Args:
        threshold: Where the thresholds begin, in units of the (normalised) activations.
        bandwidth: Width of the kernel that estimates their gradients, in the same units.
        penalty: "l0", "tanh" or "target_l0".
        target_l0: The L0 that "target_l0" steers to.
        tanh_scale: Steepness of "tanh".
        is_centred: Whether `b_dec` is subtracted before encoding.
    """

    threshold: float = 1e-3
    bandwidth: float = 1e-3
    penalty: str = "l0"
    target_l0: float = 20.0
    tanh_scale: float = 4.0
    is_centred: bool = False

    name: ClassVar[str] = "jump_relu"

    def __post_init__(self) -> None:
        check_choice(self.penalty, PENALTIES, what="penalty", where="JumpReLU")
        for field in ("threshold", "bandwidth", "target_l0", "tanh_scale"):
            check_number(getattr(self, field), what=field, where="JumpReLU", above=0)

    def extra_params(self, n_latents: int) -> Params:
        """The logarithms of the thresholds of `n_latents`."""
        return {"log_threshold": jnp.full(n_latents, jnp.log(self.threshold), jnp.float32)}

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """The pre-activations of `x` under `params` that pass their thresholds."""
        pre = self.pre_activations(params, x)[0]
        return _passed(pre, thresholds(params))

    def train_pass(self, params: Params, x: jax.Array, y: jax.Array, *, dtype: Any = jnp.float32) -> TrainPass:
        """One batch of `params` from `x` to `y`, with factors of `dtype`; the penalty counts latents."""
        pre, for_dead = self.pre_activations(params, x, dtype)
        threshold = thresholds(params)
        latents = jump_relu(pre, threshold, self.bandwidth)
        return TrainPass(
            pre_activations=for_dead,
            latents=latents,
            reconstruction=parameters.decode(params, latents, x, dtype=dtype),
            penalty=self._penalty(params, pre, threshold, latents),
            auxiliary=jnp.zeros(()),
        )

    def _penalty(self, params: Params, pre: jax.Array, threshold: jax.Array, latents: jax.Array) -> jax.Array:
        if self.penalty == "tanh":
            norms = jnp.linalg.norm(params["W_dec"], axis=-1)[None]
            return jnp.tanh(self.tanh_scale * latents * norms).sum(axis=-1).mean()
        # Of the pre-activations: latents are 0 below the threshold, where half of the kernel lies.
        l0 = mean_l0(pre, threshold, self.bandwidth)
        return l0 if self.penalty == "l0" else jnp.square(l0 / self.target_l0 - 1)

    def scaled_biases(self, params: Params, factors: jax.Array) -> Params:
        """The bias and thresholds in `params`, times `factors`."""
        shift = jnp.log(jnp.asarray(factors, jnp.float32))
        return super().scaled_biases(params, factors) | {"log_threshold": params["log_threshold"] + shift}


def thresholds(params: Params) -> jax.Array:
    """The latents' thresholds, `[latent]`, kept finite."""
    return jnp.exp(jnp.minimum(params["log_threshold"], LOG_THRESHOLD_MAX))


@jax.custom_vjp
def mean_l0(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """The mean over rows of how many `pre > threshold`, each with the gradient `-kernel / bandwidth` to its threshold.

    Args:
        pre: `[batch, latent]`.
        threshold: `[latent]`.
        bandwidth: Width of the kernel, which is 1 where `|pre - threshold| < bandwidth / 2`.

    Returns:
        The mean, a scalar, which has no gradient to `pre`.
    """
    del bandwidth
    counts = batch_sum(lambda rows: rows > threshold[None], pre, dtype=jnp.int32)
    return counts.sum().astype(jnp.float32) / len(pre)


@jax.custom_vjp
def jump_relu(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """`pre * 1[pre > threshold]`, whose gradient to the threshold is `-threshold * kernel / bandwidth`.

    Args:
        pre: `[batch, latent]`.
        threshold: `[latent]`.
        bandwidth: Width of the kernel, which is 1 where `|pre - threshold| < bandwidth / 2`.

    Returns:
        The latents.
    """
    del bandwidth
    return _passed(pre, threshold)


def _passed(pre: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(pre <= threshold[None], 0.0, pre)  # NaN stays NaN.


def _kernel(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    return jnp.where(jnp.abs(pre - threshold[None]) < bandwidth / 2, 1 / bandwidth, 0.0)


def _l0_forward(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> tuple[jax.Array, Any]:
    kernels = batch_sum(lambda rows: _kernel(rows, threshold, bandwidth), pre)
    return mean_l0(pre, threshold, bandwidth), kernels / len(pre)


def _l0_backward(kernels: Any, cotangent: jax.Array) -> tuple[None, jax.Array, None]:
    return None, -cotangent * kernels, None


def _jump_forward(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> tuple[jax.Array, Any]:
    return jump_relu(pre, threshold, bandwidth), (pre, threshold, bandwidth)


def _jump_backward(saved: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    pre, threshold, bandwidth = saved
    kernels = batch_sum(lambda rows, pre: rows * _kernel(pre, threshold, bandwidth), cotangent, pre)
    return jnp.where(pre > threshold[None], cotangent, 0.0), -threshold * kernels, None


mean_l0.defvjp(_l0_forward, _l0_backward)
jump_relu.defvjp(_jump_forward, _jump_backward)
