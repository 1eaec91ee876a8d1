"""One step of training: the loss of a batch, its gradient, and everything that happens to the arrays afterwards.

    loss = |y - y'|^2 (in units of the batch's variance for TopK and its kin) + coefficient * penalty
           + auxiliary + dead-latent term

A step that meets a value that is not finite changes nothing but a counter. Several SAEs of one variant take their
steps in one program, one after the other, so that their large intermediates never exist side by side.

>>> from interp_jax.methods.sae.relu import ReLU
>>> rule = StepRule(ReLU(), learning_rate=1e-3)
>>> state = init_state(rule, ReLU().init(jax.random.key(0), d_in=3, n_latents=5))
>>> state, info = step(rule, state, jnp.ones((4, 3)), None, jnp.asarray(1e-3))
>>> int(state.n_steps), int(info.n_dead), bool(info.is_finite)
(1, 0, True)

Sharp edges: the coefficient is an argument, not a constant: sweeps over it compile once. Counters of tokens are
32-bit and stop at their largest value.

Source: Bricken et al. 2023 for beta1 = 0 and the decoder's norm; Gao et al. 2024 for the normalised error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.architecture import Architecture, SparseLatents, TrainPass, fired, squared_error
from interp_jax.methods.sae.dead_latents import DeadTerm
from interp_jax.methods.sae.decoder_norm import constrained, tangent
from interp_jax.methods.sae.parameters import Params

TOKENS_MAX = 2**31 - 1
# Up to such shares of dead latents, the term about them is computed from so many alone, which is compiled for each.
SHARES_OF_FEW = (1 / 8, 1 / 3)


@dataclass(frozen=True)
class StepRule:
    """All that is fixed in a step.

    Args:
        architecture: The variant.
        learning_rate: Of Adam, after the warm-up.
        beta1: Of Adam; 0 keeps no momentum at all.
        beta2: Of Adam.
        epsilon: Of Adam.
        n_warm_up_steps: The learning rate rises linearly over so many steps.
        n_coefficient_warm_up_steps: So does the sparsity coefficient.
        n_decay_steps: The learning rate falls linearly to 0 over the last so many steps of `n_steps`.
        n_steps: How many steps there will be; needed for the decay only.
        gradient_clip: Largest norm of the whole gradient; None for no limit.
        decoder_norm: "unit", "at_most_one" or "free".
        dead_after_tokens: A latent that has not fired for so many tokens is dead.
        dead_term: What brings dead latents back, in the loss.
        dtype: What the factors of products are rounded to; the state stays float32.
    """

    architecture: Architecture
    learning_rate: float = 1e-3
    beta1: float = 0.0
    beta2: float = 0.999
    epsilon: float = 1e-8
    n_warm_up_steps: int = 0
    n_coefficient_warm_up_steps: int = 0
    n_decay_steps: int = 0
    n_steps: int = 0
    gradient_clip: float | None = None
    decoder_norm: str = "unit"
    dead_after_tokens: int = 10_000_000
    dead_term: DeadTerm | None = None
    dtype: str = "float32"

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with the schedule; without momentum where beta1 is 0, and then without the memory for it."""
        start = 1 / (self.n_warm_up_steps + 1)
        schedules = [optax.linear_schedule(start * self.learning_rate, self.learning_rate, self.n_warm_up_steps)]
        if self.n_decay_steps:
            schedules.append(optax.linear_schedule(self.learning_rate, 0.0, self.n_decay_steps))
        schedule = optax.join_schedules(schedules, [self.n_steps - self.n_decay_steps][: len(schedules) - 1])
        if self.beta1 == 0:
            scale = optax.scale_by_rms(self.beta2, self.epsilon, eps_in_sqrt=False, bias_correction=True)
        else:
            scale = optax.scale_by_adam(self.beta1, self.beta2, self.epsilon)
        clip = [] if self.gradient_clip is None else [optax.clip_by_global_norm(self.gradient_clip)]
        return optax.chain(*clip, scale, optax.scale_by_learning_rate(schedule))


class TrainState(NamedTuple):
    """All that a step changes.

    Args:
        params: The SAE's arrays.
        optimizer: The optimiser's state.
        n_since_fired: For how many tokens each latent has not fired, `[latent]`.
        n_fired: In how many tokens each latent fired since the window began, `[latent]`.
        n_window_tokens: How many tokens the window has.
        n_steps: How many steps were taken, refused ones included.
        n_refused: How many of them met values that are not finite.
    """

    params: Params
    optimizer: Any
    n_since_fired: jax.Array
    n_fired: jax.Array
    n_window_tokens: jax.Array
    n_steps: jax.Array
    n_refused: jax.Array


class StepInfo(NamedTuple):
    """What a person looks at; scalars.

    Args:
        loss: The whole loss.
        error: Squared error, summed over d_out and averaged over the batch.
        fvu: The error over the batch's variance.
        penalty: What the coefficient multiplies.
        dead_loss: The dead-latent term.
        l0: Mean number of latents above 0.
        n_dead: How many latents are dead.
        is_finite: Whether the step was applied.
        n_bad: How many values of the batch are not finite.
    """

    loss: jax.Array
    error: jax.Array
    fvu: jax.Array
    penalty: jax.Array
    dead_loss: jax.Array
    l0: jax.Array
    n_dead: jax.Array
    is_finite: jax.Array
    n_bad: jax.Array


def init_state(rule: StepRule, params: Params) -> TrainState:
    """The state before the first step.

    Args:
        rule: The rule.
        params: The arrays to begin with.

    Returns:
        The state.
    """
    n_latents = params["W_dec"].shape[0]
    params = params | {"W_dec": constrained(params["W_dec"], rule.decoder_norm)}
    # Each its own: a step takes over the memory of all of them.
    counts = [jnp.zeros(shape, jnp.int32) for shape in ((n_latents,), (n_latents,), (), (), ())]
    return TrainState(params, rule.optimizer().init(params), *counts)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(
    rule: StepRule, state: TrainState, x: jax.Array, y: jax.Array | None, coefficient: jax.Array
) -> tuple[TrainState, StepInfo]:
    """One step of one SAE, compiled; the old state's memory is taken over.

    Args:
        rule: What is fixed.
        state: The state.
        x: What is read, `[batch, d_in]`.
        y: What is to be written, `[batch, d_out]`; None for `x`.
        coefficient: The sparsity coefficient.

    Returns:
        The state after it, and the numbers to look at.
    """
    return _step(rule, state, x, y, coefficient)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def steps(
    rule: StepRule, states: TrainState, x: jax.Array, y: jax.Array | None, coefficients: jax.Array
) -> tuple[TrainState, StepInfo]:
    """One step of each of several SAEs that read the same batch, compiled as one program.

    Args:
        rule: What is fixed, for all.
        states: The states, stacked on a leading axis.
        x: What is read, `[batch, d_in]`.
        y: What is to be written, `[batch, d_out]`; None for `x`.
        coefficients: The sparsity coefficients, one for each.

    Returns:
        The states after it, and the numbers to look at, stacked.
    """
    return lax.map(lambda own: _step(rule, own[0], x, y, own[1]), (states, coefficients))


def _step(
    rule: StepRule, state: TrainState, x: jax.Array, y: jax.Array | None, coefficient: jax.Array
) -> tuple[TrainState, StepInfo]:
    is_autoencoder, x = y is None, x.astype(jnp.float32)
    y = x if y is None else y.astype(jnp.float32)
    coefficient = coefficient * _ramp(state.n_steps, rule.n_coefficient_warm_up_steps)
    is_dead = state.n_since_fired >= rule.dead_after_tokens
    variance = squared_error(y, y.mean(axis=0, keepdims=True))

    (loss, (latents, penalty, error, dead_loss)), gradients = _with_gradients(
        rule, state.params, x, y, coefficient, is_dead, state.n_steps, variance
    )
    read = (x,) if is_autoencoder else (x, y)
    n_bad = sum(((~jnp.isfinite(values)).sum(dtype=jnp.int32) for values in read), jnp.zeros((), jnp.int32))
    is_finite = jnp.stack([jnp.isfinite(value).all() for value in (loss, *gradients.values())]).all()

    gradients["W_dec"] = tangent(gradients["W_dec"], state.params["W_dec"], rule.decoder_norm)
    # Optax counts on implicit promotion, which a user may have forbidden.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer = rule.optimizer().update(gradients, state.optimizer, state.params)
    params = dict(cast(Params, optax.apply_updates(state.params, updates)))
    params["W_dec"] = constrained(params["W_dec"], rule.decoder_norm)
    params = rule.architecture.observed(params, latents, state.n_steps - state.n_refused)

    hits, n_tokens = fired(latents, len(is_dead)), x.shape[0]
    quiet = jnp.where(state.n_since_fired > TOKENS_MAX - n_tokens, TOKENS_MAX, state.n_since_fired + n_tokens)
    applied = TrainState(
        params=params,
        optimizer=optimizer,
        n_since_fired=jnp.where(hits > 0, 0, quiet),
        n_fired=state.n_fired + hits,
        n_window_tokens=state.n_window_tokens + n_tokens,
        n_steps=state.n_steps + 1,
        n_refused=state.n_refused,
    )
    refused = state._replace(n_steps=state.n_steps + 1, n_refused=state.n_refused + 1)
    state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), applied, refused)
    info = StepInfo(
        loss=loss,
        error=error,
        fvu=error / variance,
        penalty=penalty,
        dead_loss=dead_loss,
        l0=hits.sum().astype(jnp.float32) / n_tokens,
        n_dead=is_dead.sum(dtype=jnp.int32),
        is_finite=is_finite,
        n_bad=n_bad,
    )
    return state, info


# A loss, with a batch's latents, penalty, squared error and term about dead latents.
_Losses = tuple[jax.Array, tuple[jax.Array | SparseLatents, jax.Array, jax.Array, jax.Array]]


def _with_gradients(
    rule: StepRule,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    coefficient: jax.Array,
    is_dead: jax.Array,
    n_steps: jax.Array,
    variance: jax.Array,
) -> tuple[_Losses, Params]:
    dtype = jnp.dtype(rule.dtype)

    def run(of_dead: Callable[[Params, TrainPass, jax.Array], jax.Array] | None, params: Params) -> Any:
        def losses(params: Params) -> _Losses:
            training_pass = rule.architecture.train_pass(params, x, y, dtype=dtype)
            error = squared_error(y, training_pass.reconstruction)
            unit = jnp.where(variance > 0, variance, 1.0) if rule.architecture.is_normalised else jnp.ones(())
            loss = (error + training_pass.auxiliary) / unit + coefficient * training_pass.penalty
            dead_loss = jnp.zeros(())
            if of_dead is not None:
                dead_loss = of_dead(params, training_pass, y - training_pass.reconstruction)
            return loss + dead_loss, (training_pass.latents, training_pass.penalty, error, dead_loss)

        return jax.value_and_grad(losses, has_aux=True)(params)

    if (term := rule.dead_term) is None:
        return run(None, params)
    dead = term.dead(is_dead, n_steps)
    n_dead = dead.sum(dtype=jnp.int32)
    share = n_dead.astype(jnp.float32) / len(dead)
    sizes = [math.ceil(len(dead) * few) for few in SHARES_OF_FEW]

    def of_few(size: int, params: Params, training_pass: TrainPass, residual: jax.Array) -> jax.Array:
        del training_pass
        # What they read is computed again, or the gradient to it would be as large as that to all latents.
        own = parameters.of_latents(params, jnp.nonzero(dead, size=size, fill_value=0)[0])
        _, pre = rule.architecture.pre_activations(own, x, dtype)
        return term(pre, own["W_dec"], residual, jnp.arange(size) < n_dead, share, dtype)

    def of_all(params: Params, training_pass: TrainPass, residual: jax.Array) -> jax.Array:
        return term(training_pass.pre_activations, params["W_dec"], residual, dead, share, dtype)

    # A step each, and not one with branches in its loss: a branch that does nothing would still have a gradient to all
    # latents, of zeros.
    level = (n_dead > jnp.asarray([0, *sizes])).sum(dtype=jnp.int32)
    terms = [None, *(partial(of_few, size) for size in sizes), of_all]
    return lax.switch(level, [partial(run, of_dead) for of_dead in terms], params)


def _ramp(n_steps: jax.Array, length: int) -> jax.Array:
    """From 1 / (length + 1) at the first step to 1 after `length` steps."""
    return jnp.minimum((n_steps + 1).astype(jnp.float32) / (length + 1), 1.0)
