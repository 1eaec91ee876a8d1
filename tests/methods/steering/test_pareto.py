"""The frontier: by hand, and against asking every pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.methods.steering.pareto import dominates, pareto_frontier

# Few values, so that there are ties and duplicates.
POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=14)


def beats(a, b) -> bool:
    return a[0] >= b[0] and a[1] <= b[1] and (a[0] > b[0] or a[1] < b[1])


def test_four_points_by_hand() -> None:
    points = [(0.1, 1), (0.5, 2), (0.4, 3), (0.9, 5)]
    assert pareto_frontier(points).tolist() == [0, 1, 3]
    assert pareto_frontier(points[::-1]).tolist() == [3, 2, 0]


@given(POINTS)
def test_the_frontier_is_what_nothing_beats(points) -> None:
    frontier = pareto_frontier(points).tolist()
    unbeaten = [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
    once = [i for i in unbeaten if points[i] not in points[:i]]
    assert sorted(frontier) == once
    assert [points[i][1] for i in frontier] == sorted(points[i][1] for i in frontier)


@given(POINTS, POINTS)
def test_dominance_is_its_definition(points, others) -> None:
    expected = all(any(a[0] >= b[0] and a[1] <= b[1] for a in points) for b in others)
    assert dominates(points, others) == expected
    assert dominates(points, points)


def test_what_are_no_points() -> None:
    for wrong in (np.zeros((0, 2)), np.zeros(3), np.zeros((2, 3))):
        with pytest.raises(ShapeError, match=r"\[point, 2\]"):
            pareto_frontier(wrong)
    with pytest.raises(InvalidInputError, match=r"1 have a NaN were given in dominates(.|\n)*Fix"):
        dominates([[0.0, 1.0]], [[np.nan, 1.0]])
