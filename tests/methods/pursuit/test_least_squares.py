"""Least squares with and without a sign, for a batch, against SciPy.

Source: interp_jax.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from interp_jax.methods.pursuit.least_squares import nonneg_least_squares, refined

N_BATCH, K, D = 40, 7, 9


def problems(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signals, unit atoms (of some problems nearly alike, of others twice the same), and which atoms there are."""
    common = rng.uniform(0, 3, (N_BATCH, 1, 1)) * rng.normal(size=(N_BATCH, 1, D))
    atoms = rng.normal(size=(N_BATCH, K, D)) + common
    atoms[::5, 1] = atoms[::5, 0]
    atoms[1::5, 2] = -atoms[1::5, 0]
    atoms /= np.linalg.norm(atoms, axis=2, keepdims=True)
    return rng.normal(size=(N_BATCH, D)), atoms, rng.random((N_BATCH, K)) < 0.9


def test_as_scipy_from_any_start(rng: np.random.Generator) -> None:
    signals, atoms, is_free = problems(rng)
    gram, linear = np.einsum("bkd,bld->bkl", atoms, atoms), np.einsum("bkd,bd->bk", atoms, signals)
    starts = [np.zeros_like(linear), np.where(is_free, rng.random(linear.shape) * (rng.random(linear.shape) < 0.5), 0)]
    with jax.enable_x64(True):
        solve = jax.jit(nonneg_least_squares)
        found = [np.asarray(solve(gram, linear, start, is_free)) for start in starts]
    for values in found:
        assert (values >= 0).all()
        assert (values[~is_free] == 0).all()
        for row in range(N_BATCH):
            matrix = atoms[row][is_free[row]].T
            _, error = nnls(matrix, signals[row]) if is_free[row].any() else (None, np.linalg.norm(signals[row]))
            # Of atoms that come twice only the sum is determined: compare what is left.
            assert abs(np.linalg.norm(signals[row] - values[row] @ atoms[row]) - error) < 1e-7


def test_refining_ends_at_the_minimum_and_has_its_derivatives(rng: np.random.Generator) -> None:
    signals, atoms, is_free = problems(rng)
    signals, atoms, is_free = signals[2:5], atoms[2:5], is_free[2:5]
    changes = rng.normal(size=signals.shape), rng.normal(size=atoms.shape)

    def exact(size: float) -> np.ndarray:
        values = np.zeros(is_free.shape)
        for row, chosen in enumerate(is_free):
            matrix = (atoms[row] + size * changes[1][row])[chosen].T
            values[row, chosen] = np.linalg.lstsq(matrix, signals[row] + size * changes[0][row], rcond=None)[0]
        return values

    with jax.enable_x64(True):
        start = exact(0.0)
        nearby = start + np.where(is_free, 1e-4, 0)

        def from_(start: np.ndarray) -> Any:
            return lambda signals, atoms: refined(signals, atoms, jnp.asarray(start), jnp.asarray(is_free))

        found, _ = jax.jvp(from_(nearby), (signals, atoms), changes)
        _, derivative = jax.jvp(from_(start), (signals, atoms), changes)
    np.testing.assert_allclose(found, start, atol=1e-9)
    np.testing.assert_allclose(derivative, (exact(1e-6) - exact(-1e-6)) / 2e-6, rtol=1e-4, atol=1e-4)
