"""The BatchTopK SAE: the batch * k largest latents of a whole batch in training, a threshold after it.

A row may use more latents than another. Alone a row has no batch to compete with, so what decides after training is
one number: the mean of the smallest latent that was kept, averaged over batches (exponentially, without the bias to
its start).

>>> variant = BatchTopK(k=2)
>>> sorted(variant.init(jax.random.key(0), d_in=3, n_latents=5))
['W_dec', 'W_enc', 'b_dec', 'b_enc', 'threshold']

Sharp edges: before the first batch the threshold is 0 and `encode` is a ReLU. `as_jump_relu` gives the same
function as a JumpReLU SAE.

Source: Bussmann et al. 2024 (2412.06410).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.architecture import Architecture, TrainPass
from interp_jax.methods.sae.dense import relu
from interp_jax.methods.sae.jump_relu import JumpReLU
from interp_jax.methods.sae.parameters import Params
from interp_jax.methods.sae.sparse import largest
from interp_jax.methods.sae.top_k import check_k

THRESHOLD_DECAY = 0.999


class BatchThreshold(Architecture):
    """What variants share whose latents compete within a batch: after training, one threshold decides instead."""

    is_centred: bool

    is_normalised: ClassVar[bool] = True

    def extra_params(self, n_latents: int) -> Params:
        """The threshold after training, one for all `n_latents`."""
        del n_latents
        return {"threshold": jnp.zeros(())}

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """The pre-activations of `x` under `params` that pass the threshold."""
        pre, _ = self.pre_activations(params, x)
        return jnp.where(pre <= params["threshold"], 0.0, jax.nn.relu(pre))

    def observed(self, params: Params, latents: Any, step: jax.Array) -> Params:
        """The `params` with the threshold after the `latents` of the batch of number `step`."""
        return params | {"threshold": mean_threshold(params["threshold"], latents, step)}

    def scaled_biases(self, params: Params, factors: jax.Array) -> Params:
        """The bias and threshold in `params`, times `factors`."""
        return super().scaled_biases(params, factors) | {"threshold": params["threshold"] * factors}


@final
@dataclass(frozen=True)
class BatchTopK(BatchThreshold):
    """The largest latents of a batch, k for each row on average.

    Args:
        k: How many for each row, on average.
        is_centred: Whether `b_dec` is subtracted before encoding.
    """

    k: int
    is_centred: bool = True

    name: ClassVar[str] = "batch_top_k"

    def check(self, n_latents: int) -> None:
        """Raise `InvalidInputError` if k is above `n_latents`."""
        check_k(self.k, n_latents, where=f"BatchTopK, with {n_latents} latents")

    def train_pass(self, params: Params, x: jax.Array, y: jax.Array, *, dtype: Any = jnp.float32) -> TrainPass:
        """One batch of `params` from `x` to `y`, with factors of `dtype`; the batch's largest latents."""
        pre, for_dead = self.pre_activations(params, x, dtype)
        latents = batch_top_k(pre, self.k)
        reconstruction = parameters.decode(params, latents, x, dtype=dtype)
        return TrainPass(for_dead, latents, reconstruction, penalty=jnp.zeros(()), auxiliary=jnp.zeros(()))


def batch_top_k(pre: jax.Array, k: int) -> jax.Array:
    """`ReLU(pre)` where it is among the `batch * k` largest of the batch, else 0."""
    (n_batch, n_latents), seen = pre.shape, lax.stop_gradient(pre)

    def smallest_kept(values: jax.Array) -> jax.Array:
        return jnp.maximum(jnp.min(largest(values.reshape(1, -1), n_batch * k)[0]), 0.0)

    # Few rows keep more than a multiple of the mean: looking at the largest of each row is enough, unless it is not.
    n_candidates = min(4 * k, n_latents)
    candidates, _ = largest(seen, n_candidates)
    smallest = smallest_kept(candidates)
    if n_candidates < n_latents:
        is_enough = jnp.all(candidates[:, -1] <= smallest)
        smallest = lax.cond(is_enough, lambda: smallest, lambda: smallest_kept(seen))
    return relu(pre, smallest)


def mean_threshold(threshold: jax.Array, latents: Any, step: jax.Array) -> jax.Array:
    """The mean over batches of the smallest latent above 0, after one more batch.

    Args:
        threshold: The mean so far.
        latents: The batch's latents, `[batch, latent]`.
        step: How many batches came before.

    Returns:
        The mean. A batch in which nothing fires counts with the mean so far.
    """
    smallest = jnp.min(jnp.where(latents > 0, latents, jnp.inf))
    smallest = lax.stop_gradient(jnp.where(jnp.isfinite(smallest), smallest, threshold))
    # The weight of the newest in an exponential mean whose weights sum to 1.
    weight = (1 - THRESHOLD_DECAY) / (1 - THRESHOLD_DECAY ** (step.astype(jnp.float32) + 1))
    return threshold + weight * (smallest - threshold)


def as_jump_relu(architecture: BatchThreshold, params: Params) -> tuple[JumpReLU, Params]:
    """The same function of one row as a JumpReLU SAE.

    Args:
        architecture: The variant.
        params: Its arrays.

    Returns:
        The variant and the arrays; a threshold of 0 becomes the smallest normal number.
    """
    threshold = jnp.maximum(params["threshold"], jnp.finfo(jnp.float32).tiny)
    log_threshold = jnp.broadcast_to(jnp.log(threshold), params["b_enc"].shape)
    rest = {name: value for name, value in params.items() if name != "threshold"}
    return JumpReLU(is_centred=architecture.is_centred), dict(sorted((rest | {"log_threshold": log_threshold}).items()))
