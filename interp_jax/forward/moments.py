"""Mean and spread of vectors that come batch by batch, without the loss of digits that sums of squares bring.

A batch is summed up on the device around its own mean; batches are put together on the host, in float64.

>>> vectors = jnp.array([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]])
>>> mean, square = batch_moments(vectors, jnp.array([True, True, False]))
>>> mean.tolist(), float(square)
([2.0, 0.0], 2.0)
>>> one = Moments(2.0, np.asarray(mean, np.float64), float(square))
>>> one.merged(Moments(1.0, np.array([5.0, 0.0]), 0.0))
Moments(n=3.0, mean=array([3., 0.]), square=8.0)

Sharp edges: `square` is summed over the components, and over the vectors: divide by `n` for a variance.

Source: Chan, Golub & LeVeque 1979 for putting them together.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part


class Moments(NamedTuple):
    """Where some vectors are and how far apart; float64.

    Args:
        n: How many.
        mean: Their mean, `[d]`.
        square: The summed squared distance from it.
    """

    n: float
    mean: np.ndarray
    square: float

    def merged(self, other: Moments) -> Moments:
        """Those of both sets of vectors together, `other` being the second."""
        n = self.n + other.n
        if n == 0:
            return self
        shift = other.mean - self.mean
        between = float(shift @ shift) * self.n * other.n / n
        return Moments(n, self.mean + shift * (other.n / n), self.square + other.square + between)


def batch_moments(vectors: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean of the vectors that count, and the sum of their squared distances from it.

    Args:
        vectors: float32 `[batch, d]`.
        counted: Which of them count, bool `[batch]`.

    Returns:
        `[d]` and a scalar.
    """
    n = jnp.maximum(counted.sum(), 1).astype(jnp.float32)
    mean = jnp.where(counted[:, None], vectors, 0.0).sum(axis=0) / n
    return mean, jnp.where(counted[:, None], jnp.square(vectors - mean[None]), 0.0).sum()


def variance_of(square: float, total_square: float) -> float:
    """The summed squared distance from the mean, 0 where it is no more than the mean's rounding.

    Args:
        square: The summed squared distance.
        total_square: The summed square of the vectors themselves.

    Returns:
        One of the two.
    """
    # A mean of equal float32 vectors may be off in the last digit: what is left then is no variance.
    return square if square > 1e-12 * total_square else 0.0


def check_counts(n_tokens: int, *, where: str) -> None:
    """Raise `InvalidInputError` if `n_tokens` leave nothing to measure on; `where` names the public call."""
    if n_tokens < 1:
        raise InvalidInputError(
            four_part(
                "No tokens were given to measure on",
                where=where,
                expected="activations of at least one token that is neither padding nor left out.",
                fix="give more text, or leave fewer tokens out.",
            )
        )
