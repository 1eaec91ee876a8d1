"""Effects told from random subsets: exact on all sixteen of four nodes, and the same as the textbook's on samples."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.forward.subsets import SubsetMoments, subset_moments

EFFECTS = np.array([1.0, -2.0, 0.5, 0.0])


def last(iterator):
    *_, (budget, moments) = iterator
    return budget, moments


def test_all_sixteen_subsets_with_their_probabilities_give_the_effects():
    masks = np.array(list(itertools.product([False, True], repeat=4)))
    weights = np.prod(np.where(masks, 0.3, 0.7), axis=1)
    assert weights.sum() == pytest.approx(1)
    moments = SubsetMoments.of(4)
    for rows in np.array_split(np.arange(16), 5):
        moments = moments.add(masks[rows], masks[rows] @ EFFECTS + 10.0, weights[rows])
    np.testing.assert_allclose(moments.estimate().effects, EFFECTS, atol=1e-14)
    np.testing.assert_allclose(moments.counts, 0.3)


def test_estimates_are_those_of_two_samples(rng):
    masks = rng.random((60, 5)) < 0.4
    # A large mean would cost a plain sum of squares its digits.
    y = masks @ rng.normal(size=5) + rng.normal(size=60) + 1e6
    moments = SubsetMoments.of(5)
    for rows in np.array_split(np.arange(60), 7):
        moments = moments.add(masks[rows], y[rows])
    effects, errors, dof, counts = moments.estimate()
    for node in range(5):
        inside, outside = y[masks[:, node]], y[~masks[:, node]]
        a, b = inside.var(ddof=1) / len(inside), outside.var(ddof=1) / len(outside)
        assert counts[node] == len(inside)
        assert effects[node] == pytest.approx(inside.mean() - outside.mean(), abs=1e-8)
        assert errors[node] == pytest.approx(np.sqrt(a + b), rel=1e-8)
        assert dof[node] == pytest.approx((a + b) ** 2 / (a**2 / (len(inside) - 1) + b**2 / (len(outside) - 1)))


@pytest.mark.parametrize("n_inside", [0, 1, 9, 10])
def test_too_few_subsets_with_or_without_a_node_tell_nothing(rng, n_inside):
    masks = np.zeros((10, 1), bool)
    masks[:n_inside] = True
    estimate = SubsetMoments.of(1).add(masks, rng.normal(size=10)).estimate()
    assert estimate.standard_errors[0] == np.inf
    assert np.isnan(estimate.effects[0]) == (n_inside in (0, 10))


def test_a_node_alone_is_known_without_error():
    masks = np.arange(10)[:, None] < 4
    estimate = SubsetMoments.of(1).add(masks, 3.0 * masks[:, 0]).estimate()
    assert (estimate.effects[0], estimate.standard_errors[0]) == (3.0, 0.0)
    assert np.isfinite(estimate.dof[0])


def test_variances_too_small_to_square_do_no_harm():
    masks = np.arange(8)[:, None] < 4
    estimate = SubsetMoments.of(1).add(masks, 1e-120 * np.arange(8.0)).estimate()
    assert estimate.standard_errors[0] > 0
    assert estimate.dof[0] >= 3


def test_random_subsets_hold_what_they_should_whatever_the_step():
    seen = []

    def effects(masks):
        seen.append(masks)
        return masks @ np.arange(6.0)

    options = {"n_subsets": 400, "probability": 0.25, "seed": 3, "candidates": [1, 4, 5]}
    budget, moments = last(subset_moments(effects, 6, **options))
    masks, n_calls = np.concatenate(seen), len(seen)
    assert budget == 400
    assert masks.shape == (400, 6)
    assert not masks[:, [0, 2, 3]].any()
    np.testing.assert_allclose(masks[:, [1, 4, 5]].mean(0), 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 400))
    np.testing.assert_array_equal(moments.counts, masks[:, [1, 4, 5]].sum(0))

    seen.clear()
    reached = [budget for budget, _ in subset_moments(effects, 6, **options, step=7, budgets=[10, 100, 1000])]
    assert reached == [10, 100, 400]
    assert len(seen) > n_calls
    np.testing.assert_array_equal(np.concatenate(seen), masks)


def test_effects_of_any_float_will_do(rng):
    _, moments = last(
        subset_moments(lambda masks: masks.sum(1).astype(ml_dtypes.bfloat16), 3, n_subsets=50, probability=0.5)
    )
    assert moments.sums.dtype == np.float64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_subsets": 0}, "n_subsets=0"),
        ({"probability": 0.0}, "probability=0.0"),
        ({"probability": 1.0}, "probability=1.0"),
        ({"candidates": []}, "an empty set of nodes"),
        ({"step": 0}, "step=0"),
    ],
)
def test_numbers_out_of_range_are_refused_at_the_call(options, words):
    with pytest.raises(InvalidInputError, match=rf"{words} was given in subset_moments\.\n  Expected: [\s\S]*Fix:"):
        subset_moments(lambda masks: masks.sum(1), 3, **{"n_subsets": 4, "probability": 0.5} | options)


def test_effects_that_are_none_are_refused():
    options = {"n_subsets": 4, "probability": 0.5}
    with pytest.raises(ShapeError, match=r"returned float64\[4, 3\] for 4 subsets[\s\S]*effects\.mean\(0\)"):
        last(subset_moments(lambda masks: masks * 1.0, 3, **options))
    with pytest.raises(InvalidInputError, match=r"returned nan for a subset of \d nodes[\s\S]*finite numbers"):
        last(subset_moments(lambda masks: np.full(len(masks), np.nan), 3, **options))
