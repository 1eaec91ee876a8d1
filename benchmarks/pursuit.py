"""Pursuits against the dense form textbooks write, against the products they cannot do without, and scikit-learn.

`python -m benchmarks.pursuit [n_signals n_atoms k]`: 256 signals as wide as SmolLM2, 16384 atoms and k = 32 by default.

Source: algorithms page, section 4.
"""

from __future__ import annotations

import sys
import time
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.common import compare, report
from interp_jax.methods.pursuit import GradientPursuit, OrthogonalMatchingPursuit, Pursued, pursue

D, ROUNDS, N_SKLEARN = 576, 5, 16


def main(n_signals: int = 256, n_atoms: int = 16384, k: int = 32) -> bool:
    """Print the lines; return whether all promises were kept."""
    signals, dictionary = _problem(n_signals, n_atoms)
    sizes = {"signals": n_signals, "d": D, "n_atoms": n_atoms, "k": k}
    gp, omp = GradientPursuit(), OrthogonalMatchingPursuit(is_nonneg=False)
    found: dict[str, Any] = {}

    def kept(name: str, value: Any) -> Any:
        found[name] = value
        return value

    seconds = compare(
        {
            "gradient": lambda: kept("gradient", pursue(gp, signals, dictionary, k)),
            "orthogonal": lambda: kept("orthogonal", pursue(omp, signals, dictionary, k)),
            "products": lambda: _products(signals, dictionary, k=k),
            "dense": lambda: kept("dense", _dense_gradient_pursuit(signals, dictionary, k=k)),
        },
        rounds=ROUNDS,
        warm_up=1,
    )
    error = _mean_square(found["gradient"].residual)
    dense_error = _mean_square(signals - found["dense"] @ dictionary)
    is_same = abs(error / dense_error - 1) < 1e-3
    times = {f"{name}_s": value for name, value in seconds.items()}

    ratio = seconds["dense"] / seconds["gradient"]
    results = [
        report(
            "gradient pursuit: time of the dense textbook form over ours",
            ratio,
            must=">= 3, at the same mean squared error",
            holds=ratio >= 3 and is_same,
            error=error,
            dense_error=dense_error,
            **times,
            **sizes,
        )
    ]
    ratio = seconds["gradient"] / seconds["products"]
    results.append(
        report("gradient pursuit: time over its k dense products'", ratio, must="<= 2", holds=ratio <= 2, **sizes)
    )
    results.append(_against_sklearn(signals, dictionary, k, found["orthogonal"], seconds["orthogonal"]))
    return all(results)


def _against_sklearn(signals: jax.Array, dictionary: jax.Array, k: int, ours: Pursued, ours_s: float) -> bool:
    """Orthogonal matching pursuit. scikit-learn takes one signal after the other: some are timed for all."""
    from sklearn.linear_model import orthogonal_mp

    atoms, some = np.asfortranarray(np.asarray(dictionary).T), np.asarray(signals[:N_SKLEARN])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        start = time.perf_counter()
        codes = np.asarray(orthogonal_mp(atoms, some.T, n_nonzero_coefs=k)).T
        theirs_s = (time.perf_counter() - start) * len(signals) / len(some)
    error = _mean_square(ours.residual[:N_SKLEARN])
    theirs_error = float(np.square(some - codes @ np.asarray(dictionary)).mean())
    ratio = theirs_s / ours_s
    return report(
        "orthogonal matching pursuit: scikit-learn's time over ours",
        ratio,
        must=">= 4, at the same mean squared error",
        holds=ratio >= 4 and abs(error / theirs_error - 1) < 1e-3,
        error=error,
        sklearn_error=theirs_error,
        ours_s=ours_s,
        sklearn_s=theirs_s,
        signals_timed=len(some),
    )


def _problem(n_signals: int, n_atoms: int) -> tuple[jax.Array, jax.Array]:
    """Unit atoms at random, and sums of twenty of them with noise."""
    rng = np.random.default_rng(0)
    dictionary = rng.normal(size=(n_atoms, D)).astype(np.float32)
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    codes = np.zeros((n_signals, n_atoms), np.float32)
    for row in codes:
        row[rng.choice(n_atoms, 20, replace=False)] = rng.uniform(0.5, 2, 20)
    signals = codes @ dictionary + 0.05 * rng.normal(size=(n_signals, D)).astype(np.float32)
    return jnp.asarray(signals), jnp.asarray(dictionary)


def _mean_square(residual: jax.Array) -> float:
    return float(jnp.square(residual).mean())


@partial(jax.jit, static_argnames="k")
def _products(signals: jax.Array, dictionary: jax.Array, *, k: int) -> Any:
    """k products of all residuals with the dictionary, each after the one before."""

    def step(residual: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        products = residual @ dictionary.T
        return residual + 1e-9 * products[:, :1], products[:, -1]

    return lax.scan(step, signals, None, length=k)


@partial(jax.jit, static_argnames="k")
def _dense_gradient_pursuit(signals: jax.Array, dictionary: jax.Array, *, k: int) -> jax.Array:
    """Gradient pursuit over coefficients of all atoms, `[signals, n_atoms]`: three dense products a step."""

    def step(codes: jax.Array, _: None) -> tuple[jax.Array, None]:
        residual = signals - codes @ dictionary
        products = residual @ dictionary.T
        chosen = jax.nn.one_hot(jnp.argmax(products, axis=1), len(dictionary), dtype=bool)
        gradient = jnp.where((codes != 0) | chosen, products, 0)
        change = gradient @ dictionary
        length = (change * residual).sum(axis=1, keepdims=True) / jnp.square(change).sum(axis=1, keepdims=True)
        return jnp.maximum(codes + length * gradient, 0), None

    return lax.scan(step, jnp.zeros((len(signals), len(dictionary))), None, length=k)[0]


if __name__ == "__main__":
    sys.exit(0 if main(*map(int, sys.argv[1:])) else 1)
