"""Problems of one size, so that each pursuit is compiled once for all the laws, in float64.

Source: interp_jax.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from interp_jax.methods.pursuit import PURSUITS, GradientPursuit, Pursuit, dense_codes, pursue

N_BATCH, N_ATOMS, D, K = 6, 32, 16, 8
MODES = [*(cls(is_nonneg=is_nonneg) for cls in PURSUITS for is_nonneg in (True, False)), GradientPursuit(guard=True)]


def name_of(pursuit: Pursuit) -> str:
    """For test ids."""
    return pursuit.name + ("" if pursuit.is_nonneg else "-signed") + ("-guard" if pursuit == MODES[-1] else "")


class Codes:
    """What `pursue` found for signals given at their own size, after 0, 1, ... k steps."""

    def __init__(self, pursued: Any, n_batch: int, n_atoms: int, d: int) -> None:
        self.indices = np.asarray(pursued.indices)[:n_batch]
        self.values = np.asarray(pursued.values)[:n_batch]
        self.residual = np.asarray(pursued.residual)[:n_batch, :d]
        self.after = np.asarray(dense_codes(pursued.indices, pursued.prefix_values, N_ATOMS))[:, :n_batch, :n_atoms]
        self.final = self.after[-1]


def run(pursuit: Pursuit, signals: np.ndarray, dictionary: np.ndarray, *, tolerance: float = 0.0) -> Codes:
    """`pursue` in float64, of signals and atoms filled up with zeros to the one size."""
    (n_batch, d), n_atoms = np.shape(signals), len(dictionary)
    x, atoms = np.zeros((N_BATCH, D)), np.zeros((N_ATOMS, D))
    x[:n_batch, :d], atoms[:n_atoms, :d] = signals, dictionary
    with jax.enable_x64(True):
        pursued = pursue(pursuit, x, atoms, K, tolerance=tolerance, prefixes=range(K + 1))
        assert pursued.values.dtype == np.float64
        return Codes(pursued, n_batch, n_atoms, d)


def random_problem(rng: np.random.Generator, *, n_atoms: int = N_ATOMS, common: float = 0.0) -> tuple[Any, Any]:
    """Signals, and unit atoms that share `common` times one direction."""
    atoms = rng.normal(size=(n_atoms, D)) + common * rng.normal(size=D)
    return rng.normal(size=(N_BATCH, D)), atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
