"""A training step of an SAE against the matrix products it cannot do without, and its variants against each other.

`python -m benchmarks.sae [n_latents batch]`: 16384 latents and batches of 4096 by default, as wide as SmolLM2.

Source: interp_jax.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import compare, report
from interp_jax.methods.sae import AuxK, BatchTopK, Gated, GhostGrads, JumpReLU, ReLU, StepRule, TopK
from interp_jax.methods.sae.train_step import TOKENS_MAX, init_state, step, steps

D_IN, K, N_SAES, ROUNDS = 576, 32, 8, 5


def main(n_latents: int = 16384, n_batch: int = 4096) -> bool:
    """Print the lines; return whether all promises were kept."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(n_batch, D_IN)), jnp.float32)
    sizes = {"d_in": D_IN, "n_latents": n_latents, "batch": n_batch}

    ghost = StepRule(ReLU(), dead_term=GhostGrads("rescaled"), dead_after_tokens=2**30)
    steppers = {
        "relu": _stepper(StepRule(ReLU()), n_latents, x),
        "jump_relu": _stepper(StepRule(JumpReLU()), n_latents, x),
        "gated": _stepper(StepRule(Gated()), n_latents, x),
        "top_k": _stepper(StepRule(TopK(K)), n_latents, x),
        "batch_top_k": _stepper(StepRule(BatchTopK(K)), n_latents, x),
        "relu, none dead": _stepper(ghost, n_latents, x),
        "relu, an eighth dead": _stepper(ghost, n_latents, x, dead_share=1 / 8),
        "relu, a third dead": _stepper(ghost, n_latents, x, dead_share=1 / 3),
        "relu, all dead": _stepper(ghost, n_latents, x, dead_share=1.0),
        "top_k, all dead": _stepper(
            StepRule(TopK(K), dead_term=AuxK(), dead_after_tokens=2**30), n_latents, x, dead_share=1.0
        ),
    }
    products = {
        name: _products(n_latents, x, n_more=n_more)
        for name, n_more in (("products", 0), ("gated products", 2), ("ghost products", 3))
    }
    seconds = compare(steppers | products, rounds=ROUNDS, warm_up=1)

    results = []
    for name, base in (
        ("relu", "products"),
        ("jump_relu", "products"),
        ("gated", "gated products"),
        ("relu, all dead", "ghost products"),
    ):
        ratio = seconds[name] / seconds[base]
        results.append(
            report(
                f"SAE step, {name}: time over its matrix products'",
                ratio,
                must="<= 1.15",
                holds=ratio <= 1.15,
                step_s=seconds[name],
                products_s=seconds[base],
                **sizes,
            )
        )
    for name, base, must in (
        ("top_k", "relu", 0.5),
        ("batch_top_k", "relu", 1.15),
        ("relu, none dead", "relu", 1.05),
        ("relu, an eighth dead", "relu", 1.5),
        ("relu, a third dead", "relu", 1.5),
        ("relu, all dead", "relu", 1.5),
        ("top_k, all dead", "relu", 1.15),
    ):
        ratio = seconds[name] / seconds[base]
        results.append(
            report(
                f"SAE step, {name}: time over the {base} step's",
                ratio,
                must=f"<= {must}",
                holds=ratio <= must,
                step_s=seconds[name],
                **sizes,
            )
        )

    # Eight SAEs in one program against one at a time.
    rule, n_small = StepRule(TopK(K)), n_latents // 4
    several = compare(
        {
            "one": _stepper(rule, n_small, x),
            "several": _stepper(rule, n_small, x, n_saes=N_SAES),
        },
        rounds=ROUNDS,
        warm_up=1,
    )
    ratio = several["several"] / (N_SAES * several["one"])
    results.append(
        report(
            f"{N_SAES} SAEs from one batch: time over {N_SAES} steps of one",
            ratio,
            must="<= 1.1",
            holds=ratio <= 1.1,
            **(sizes | {"n_latents": n_small}),
        )
    )
    return all(results)


def _stepper(
    rule: StepRule, n_latents: int, x: jax.Array, *, n_saes: int | None = None, dead_share: float = 0.0
) -> Callable[[], Any]:
    """A function that takes the next step and returns its loss; the first of the latents are dead and stay so."""
    params = rule.architecture.init(jax.random.key(0), d_in=D_IN, n_latents=n_latents)
    is_dead = jnp.arange(n_latents) < dead_share * n_latents
    if dead_share:
        params["b_enc"] = jnp.where(is_dead, -1e3, params["b_enc"])
    state = init_state(rule, params)._replace(n_since_fired=jnp.where(is_dead, TOKENS_MAX, 0))
    coefficient = jnp.asarray(1e-3)
    if n_saes is not None:
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * n_saes), state)
        coefficient = jnp.full(n_saes, 1e-3)
    holder = [state]

    def take() -> Any:
        run = step if n_saes is None else steps
        holder[0], info = run(rule, holder[0], x, None, coefficient)
        return info.loss

    return take


def _products(n_latents: int, x: jax.Array, *, n_more: int = 0) -> Callable[[], Any]:
    """The products of a dense step: encode, decode, and the gradients to latents, decoder and encoder.

    A gated step decodes its gate as well, and has a gradient to that: the decoder is frozen there. Ghost gradients of
    all latents decode once more, and have gradients to latents and decoder.
    """
    keys = jax.random.split(jax.random.key(0))
    W_enc = jax.random.normal(keys[0], (D_IN, n_latents))
    W_dec = jax.random.normal(keys[1], (n_latents, D_IN))

    @jax.jit
    def run(x: jax.Array, W_enc: jax.Array, W_dec: jax.Array) -> Any:
        latents = x @ W_enc
        written = latents @ W_dec
        to_latents = written @ W_dec.T
        results = [latents.T @ written, x.T @ to_latents]
        if n_more:
            again = to_latents @ W_dec
            results.append((again @ W_dec.T).sum())
            if n_more > 2:
                results.append(to_latents.T @ again)
        return results

    return lambda: run(x, W_enc, W_dec)


if __name__ == "__main__":
    sys.exit(0 if main(*map(int, sys.argv[1:])) else 1)
