"""Pareto frontiers of success against loss: which points no other point beats at both.

A point (success, loss) dominates another if it succeeds at least as often at no greater loss, and is better in one.

>>> points = np.array([[0.1, 1.0], [0.5, 2.0], [0.4, 3.0], [0.9, 5.0]])
>>> pareto_frontier(points).tolist()
[0, 1, 3]
>>> dominates(points, [[0.4, 2.5], [0.9, 5.0]]), dominates([[0.4, 2.5]], points)
(True, False)

Sharp edges: points that are the same in both are one point of the frontier, the first of them.

Source: interp_jax.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part


def pareto_frontier(points: Any) -> np.ndarray:
    """The points that no other one dominates.

    Args:
        points: (success, loss) of each, `[point, 2]`; more success and less loss are better.

    Returns:
        Their indices, by rising loss; of equal points the first.

    Raises:
        ShapeError: Not `[point, 2]`.
        InvalidInputError: A number is NaN.
    """
    success, loss = _checked(points, where="pareto_frontier").T
    # By rising loss, of one loss the best success first, of equal points the first one: each point that succeeds more
    # than all before it is on the frontier, no other.
    order = np.lexsort((np.arange(len(loss)), -success, loss))
    best_before = np.maximum.accumulate(np.append(-np.inf, success[order]))[:-1]
    return order[success[order] > best_before]


def dominates(points: Any, others: Any) -> bool:
    """Whether for each of some other points there is one of `points` that is at least as good at both.

    Args:
        points: (success, loss) of each, `[point, 2]`.
        others: Likewise.

    Returns:
        Whether it is so.

    Raises:
        ShapeError: Not `[point, 2]`.
        InvalidInputError: A number is NaN.
    """
    success, loss = _checked(points, where="dominates").T
    other_success, other_loss = _checked(others, where="dominates").T
    order = np.argsort(loss, kind="stable")
    best = np.append(-np.inf, np.maximum.accumulate(success[order]))
    # The best success there is at no greater loss.
    return bool((best[np.searchsorted(loss[order], other_loss, side="right")] >= other_success).all())


def _checked(points: Any, *, where: str) -> np.ndarray:
    array = np.asarray(points, np.float64)
    if array.ndim != 2 or array.shape[1] != 2 or len(array) == 0:
        raise ShapeError(
            four_part(
                f"Points of shape {list(array.shape)} were given",
                where=where,
                expected="(success, loss) of each, [point, 2], at least one point.",
                fix="write np.stack([success, loss], axis=1).",
            )
        )
    if np.isnan(array).any():
        raise InvalidInputError(
            four_part(
                f"Points of which {int(np.isnan(array).any(1).sum())} have a NaN were given",
                where=where,
                expected="numbers.",
                fix="look at the coefficients for which the loss is NaN: the model may have overflowed.",
            )
        )
    return array
