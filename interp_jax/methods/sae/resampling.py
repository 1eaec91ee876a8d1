"""Replacing dead latents between steps: with inputs the SAE reconstructs badly, or with new random directions.

`Resample` is the published recipe: a latent that did not fire in the window before gets the direction of an input
drawn with probability proportional to its squared loss, an encoder column of 0.2 times the living ones' mean norm, a
bias of 0, and Adam moments of 0. `Redraw` is the cheap one: new random weights for latents below a frequency.

>>> rng = np.random.default_rng(0)
>>> draws = [int(draw(rng, np.array([1.0, 3.0]), 1)[0]) for _ in range(2000)]
>>> bool(0.87 < np.mean(draws) < 0.93)
True

Sharp edges: a resampled latent points at the input itself, not at what was left of it. Inputs are drawn without
replacement as long as there are more of them than dead latents.

Source: Bricken et al. 2023, Towards Monosemanticity, appendix on neuron resampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from interp_jax.methods.sae.parameters import Params, encoder_weights, unit_rows
from interp_jax.methods.sae.train_step import StepRule, TrainState


@dataclass(frozen=True)
class Resample:
    """Dead latents take the direction of badly reconstructed inputs.

    Args:
        at_steps: After which steps.
        window_steps: A latent is dead if it did not fire in so many steps before.
        n_inputs: Among how many inputs, drawn from the stream, to choose.
        encoder_norm: Norm of a new encoder column, in units of the living ones' mean.
    """

    at_steps: tuple[int, ...] = (25_000, 50_000, 75_000, 100_000)
    window_steps: int = 12_500
    n_inputs: int = 819_200
    encoder_norm: float = 0.2


@dataclass(frozen=True)
class Redraw:
    """Rare latents get new random directions.

    Args:
        at_steps: After which steps; frequencies are counted from one to the next.
        frequency: A latent that fired less often than this, per token, is rare.
    """

    at_steps: tuple[int, ...]
    frequency: float = 1e-5


def draw(rng: np.random.Generator, losses: Any, n: int) -> np.ndarray:
    """Indices drawn with probability proportional to the squared loss, without replacement where there are enough.

    Args:
        rng: Source of randomness.
        losses: At least 0, `[pool]`.
        n: How many to draw.

    Returns:
        Indices, `[n]`; empty if all losses are 0.
    """
    weights = np.square(np.asarray(losses, np.float64))
    n_possible = int((weights > 0).sum())
    if n_possible == 0:
        return np.zeros(0, np.int64)
    return rng.choice(len(weights), size=n, replace=n_possible < n, p=weights / weights.sum())


@partial(jax.jit, static_argnums=0)
def row_losses(rule: StepRule, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The squared error of each row, `[batch]`."""
    training_pass = rule.architecture.train_pass(params, x, y, dtype=jnp.dtype(rule.dtype))
    return jnp.square(y - training_pass.reconstruction).sum(axis=-1)


def resampled(
    rule: StepRule, state: TrainState, is_dead: Any, x: Any, y: Any, *, encoder_norm: float = 0.2
) -> TrainState:
    """The state with the dead latents pointing at inputs.

    Args:
        rule: The rule.
        state: The state.
        is_dead: Which latents, `[latent]`.
        x: The inputs, one for each dead latent, `[n_dead, d_in]`.
        y: What they were to give, `[n_dead, d_out]`.
        encoder_norm: Norm of a new encoder column, in units of the living ones' mean.

    Returns:
        The state; what belongs to the living is the same, bit for bit.
    """
    where = np.flatnonzero(np.asarray(is_dead))
    params = dict(state.params)
    if "W_enc" in params:
        norms = jnp.linalg.norm(params["W_enc"], axis=0)
        living = norms[np.flatnonzero(~np.asarray(is_dead))]
        scale = encoder_norm * (living.mean() if living.size else jnp.ones(()))
        params["W_enc"] = params["W_enc"].at[:, where].set(unit_rows(jnp.asarray(x, jnp.float32)).T * scale)
    params["W_dec"] = params["W_dec"].at[where].set(unit_rows(jnp.asarray(y, jnp.float32)))
    return _renewed(rule, state, params, where)


def redrawn(rule: StepRule, state: TrainState, is_rare: Any, key: jax.Array) -> TrainState:
    """The state with new random directions for the rare latents, as at the start.

    Args:
        rule: The rule.
        state: The state.
        is_rare: Which latents, `[latent]`.
        key: Random key.

    Returns:
        The state; what belongs to the others is the same, bit for bit.
    """
    where = np.flatnonzero(np.asarray(is_rare))
    n_latents, d_out = state.params["W_dec"].shape
    d_in = encoder_weights(state.params).shape[0]
    fresh = rule.architecture.init(key, d_in=d_in, n_latents=n_latents, d_out=d_out)
    params = dict(state.params)
    params["W_dec"] = params["W_dec"].at[where].set(fresh["W_dec"][where])
    if "W_enc" in params:
        params["W_enc"] = params["W_enc"].at[:, where].set(fresh["W_enc"][:, where])
    return _renewed(rule, state, params, where)


def _renewed(rule: StepRule, state: TrainState, params: Params, where: np.ndarray) -> TrainState:
    """Biases, moments and counters of the latents as at the start."""
    n_latents = params["W_dec"].shape[0]
    starts = {"b_enc": jnp.zeros(n_latents)} | rule.architecture.extra_params(n_latents)
    for name, start in starts.items():
        if name in params and start.shape == (n_latents,):
            params[name] = params[name].at[where].set(start[where])
    is_new = jnp.zeros(n_latents, bool).at[where].set(True)
    masks = {
        name: {"W_enc": is_new[None], "W_dec": is_new[:, None]}.get(
            name, is_new if value.shape == (n_latents,) and name in starts else jnp.zeros_like(value, bool)
        )
        for name, value in params.items()
    }
    with jax.numpy_dtype_promotion("standard"):
        optimizer = optax.tree_utils.tree_map_params(
            rule.optimizer(), lambda moment, mask: jnp.where(mask, 0.0, moment), state.optimizer, masks
        )
    return state._replace(
        params=params,
        optimizer=optimizer,
        n_since_fired=jnp.where(is_new, 0, state.n_since_fired),
    )
