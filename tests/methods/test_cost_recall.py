"""Cost and recall: the three known numbers, the curve by its definition, and ties at their best."""

from __future__ import annotations

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.methods.cost_recall import cost_recall


@pytest.mark.parametrize(
    ("cost_of", "costs", "score"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([4, 4, 4, 4], [4, 4, 4, 4], 2.4056),
        ([4, 3, 2, 1], [4, 4, 4, 4], 2.4056),
        ([4, 5, 6, 7], [4, 5, 6, 7], 2.8962),
    ],
    ids=["the oracle", "all at the end", "the wrong way round", "a setup of three"],
)
def test_known_searches(cost_of, costs, score):
    result = cost_recall([9.0, 5.0, 2.0, 1.0], cost_of)
    assert result.costs.tolist() == costs
    assert result.score == pytest.approx(score, abs=5e-5)


def test_the_curve_is_that_of_its_definition(rng):
    contributions, cost_of = rng.permutation(30) + 1.0, 3.0 + rng.permutation(30)
    result = cost_recall(contributions, cost_of, max_k=20, method="some search")
    total = weight = 0.0
    for k in range(1, 21):
        top = sorted(range(30), key=lambda node: -contributions[node])[:k]
        c_k = max(cost_of[node] for node in top)
        assert result.costs[k - 1] == c_k
        assert sorted(result.nodes[:k].tolist()) == sorted(top)
        total, weight = total + np.log(c_k / k) / k, weight + 1 / k
    assert len(result.costs) == 20
    assert result.score == pytest.approx(np.exp(total / weight))
    assert repr(result).startswith("CostRecallResult(some search: ")


def test_equal_contributions_count_in_the_order_that_is_best_for_the_search():
    result = cost_recall([1.0, 1.0, 1.0, 2.0], [4, 2, 3, 1])
    assert result.nodes.tolist() == [3, 1, 2, 0]
    assert result.score == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1.0, 2.0], [1.0]), ShapeError, r"shape \[2\] and costs of shape \[1\]"),
        (([], []), ShapeError, "at least one node"),
        (([1.0, -2.0], [1.0, 2.0]), InvalidInputError, r"contribution -2\.0 of node 1"),
        (([1.0, np.nan], [1.0, 2.0]), InvalidInputError, "contribution nan of node 1"),
        (([1.0, 1.0], [0.0, 2.0]), InvalidInputError, r"cost 0\.0 of node 0"),
        (([1.0, 1.0], [1.0, 2.0], 3), InvalidInputError, "max_k=3"),
    ],
    ids=["lengths", "empty", "negative", "nan", "free", "max_k"],
)
def test_what_has_no_curve_is_refused(arguments, error, words):
    contributions, cost_of, *max_k = arguments
    with pytest.raises(error, match=rf"{words}[\s\S]*Fix:"):
        cost_recall(contributions, cost_of, max_k=max_k[0] if max_k else None)
