"""Diagnostics of node scores: verification finds the wrong ones, and the bound holds as often as it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.forward.subsets import SubsetMoments
from interp_jax.methods.node_diagnostics import MissedNodesResult, bound_missed_nodes, verify_top_nodes

stats: Any = scipy.stats  # whose types do not know the fields of its results


def test_the_top_nodes_are_measured(rng):
    scores = rng.permutation(20) + 0.5
    effects = rng.normal(size=(3, 20))
    result = verify_top_nodes(scores, lambda ids: effects[:, ids], top_k=8)

    expected = np.argsort(-scores)[:8]
    np.testing.assert_array_equal(result.nodes, expected)
    np.testing.assert_array_equal(result.estimated, scores[expected])
    # The size inside the mean: effects of both signs do not cancel.
    np.testing.assert_allclose(result.measured, np.abs(effects).mean(0)[expected])
    np.testing.assert_allclose(result.signed, effects.mean(0)[expected])
    assert result.pearson == pytest.approx(stats.pearsonr(result.estimated, result.measured).statistic)
    assert result.spearman == pytest.approx(stats.spearmanr(result.estimated, result.measured).statistic)
    np.testing.assert_array_equal(result.ranking, expected[np.argsort(-result.measured)])
    assert result.n_patches == 8
    assert not result.is_constant


def test_ties_go_by_id():
    scores = np.array([1.0, 2.0, 1.0, 2.0, 1.0, 0.0])
    result = verify_top_nodes(scores, lambda ids: np.array([5.0, 5.0, 7.0, 5.0]), top_k=4)
    assert result.nodes.tolist() == [1, 3, 0, 2]
    assert result.ranking.tolist() == [0, 1, 2, 3]
    assert result.spearman == pytest.approx(stats.spearmanr([2, 2, 1, 1], [5, 5, 7, 5]).statistic)


@pytest.mark.parametrize(("scores", "effects"), [(np.ones(4), np.arange(4.0)), (np.arange(4.0), np.ones(4))])
def test_no_correlation_with_what_is_constant(scores, effects):
    result = verify_top_nodes(scores, lambda ids: effects[ids], top_k=4)
    assert np.isnan(result.pearson)
    assert np.isnan(result.spearman)
    assert result.is_constant
    assert "none (constant)" in repr(result)


def test_bounds_and_p_values_are_the_textbooks(rng):
    effects = rng.normal(size=4)
    seen, results = [], []

    def subset_effects(masks):
        seen.append(masks)
        results.append(masks @ effects + rng.normal(size=len(masks)))
        return results[-1]

    result = bound_missed_nodes(subset_effects, 5 - 1, n_subsets=50, probability=0.4, verified=[2], step=16)
    masks, y = np.concatenate(seen), np.concatenate(results)
    assert not masks[:, 2].any()
    np.testing.assert_array_equal(result.nodes, [0, 1, 3])
    limits, p_values = {alpha: [] for alpha in result.alphas}, []
    for node in result.nodes:
        inside, outside = y[masks[:, node]], y[~masks[:, node]]
        test = stats.ttest_ind(inside, outside, equal_var=False)
        difference = inside.mean() - outside.mean()
        error = difference / test.statistic
        for alpha in result.alphas:
            limits[alpha].append(abs(difference) + stats.t.ppf(1 - alpha, test.df) * error)
        p_values.append(stats.t.cdf((abs(difference) - 2.0) / error, test.df))
    for alpha, bound in zip(result.alphas, result.bounds[-1], strict=True):
        assert bound == pytest.approx(max(limits[alpha]))
        assert result.bound(alpha) == pytest.approx(bound)
        # The bound is the size at which the p-value is alpha.
        assert result.p_value(float(bound)) == pytest.approx(alpha)
    assert result.p_value(2.0) == pytest.approx(max(p_values))
    assert result.budgets.tolist() == [4, 8, 16, 32, 50]
    assert "if effects add up in expectation" in repr(result)


def test_a_node_that_was_not_seen_can_have_any_effect():
    calm = bound_missed_nodes(lambda masks: masks.sum(1) * 0.0, 3, n_subsets=40, probability=0.5, seed=1)
    assert calm.bound(0.01) == 0
    assert calm.p_value(0.1) == 0
    rare = bound_missed_nodes(lambda masks: masks.sum(1) * 0.0, 3, n_subsets=3, probability=0.01, seed=1)
    assert rare.bound(0.01) == np.inf
    assert rare.p_value(100.0) == 1


def test_effects_that_only_add_up_leave_no_error_to_a_node_alone():
    result = bound_missed_nodes(lambda masks: 3.0 * masks[:, 0], 1, n_subsets=30, probability=0.5, seed=2)
    assert result.bound(0.001) == 3
    assert (result.p_value(3.0), result.p_value(3.1)) == (1.0, 0.0)


def test_the_bound_holds_as_often_as_it_says(rng):
    # A planted node of effect 1 among smaller ones, and noise; how often is it above its bound?
    effects = np.array([1.0, 0.1, -0.2, 0.0])
    n_runs, alphas, misses, bounds = 1500, (0.1, 0.01), np.zeros(2), []
    for _ in range(n_runs):
        masks = rng.random((80, 4)) < 0.3
        estimate = SubsetMoments.of(4).add(masks, masks @ effects + 0.5 * rng.normal(size=80)).estimate()
        result = MissedNodesResult(np.arange(4), estimate, np.array([80]), np.zeros((1, 2)), alphas, 0.3, 0)
        bounds.append([result.bound(alpha) for alpha in alphas])
        misses += np.array(bounds[-1]) < 1.0
    allowed = np.array(alphas) + 4 * np.sqrt(np.array(alphas) * (1 - np.array(alphas)) / n_runs)
    assert (misses / n_runs <= allowed).all()
    # A bound of infinity would always hold; this one is of use, and is missed about as often as it may be.
    assert np.median(bounds, axis=0).max() < 1.6
    assert misses[0] / n_runs > 0.03


@pytest.mark.parametrize(
    ("scores", "effects_of", "top_k", "error", "words"),
    [
        (np.ones(3), np.zeros_like, 0, InvalidInputError, r"top_k=0[\s\S]*1 to 3"),
        (np.ones(3), np.zeros_like, 4, InvalidInputError, r"top_k=4[\s\S]*1 to 3"),
        (np.ones((2, 3)), np.zeros_like, 1, ShapeError, r"\[2, 3\]"),
        (np.ones(0), np.zeros_like, 1, ShapeError, r"at least one node"),
        (np.array([0, np.nan]), np.zeros_like, 1, InvalidInputError, r"first nan for node 1"),
        (np.ones(3), lambda ids: np.zeros(2), 3, ShapeError, r"float64\[2\] for 3 nodes"),
        (np.ones(3), lambda ids: np.full(3, np.inf), 3, InvalidInputError, r"nodes \[0, 1, 2\]"),
    ],
    ids=["none", "too many", "two axes", "empty", "nan", "too few effects", "infinite effects"],
)
def test_verification_refuses_what_it_cannot_use(scores, effects_of, top_k, error, words):
    with pytest.raises(error, match=rf"{words}[\s\S]*Fix:"):
        verify_top_nodes(scores, effects_of, top_k=top_k)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"verified": [0, 1, 2]}, "an empty set of nodes was given in bound_missed_nodes"),
        ({"verified": [3]}, r"from 3 to 3[\s\S]*0 to 2"),
        ({"alphas": [0.01, 0.7]}, r"alphas=\[0\.7\]"),
        ({"alphas": []}, r"alphas=\[\]"),
        ({"probability": 2}, "probability=2"),
    ],
    ids=["all verified", "unknown node", "large alpha", "no alpha", "probability"],
)
def test_the_bound_refuses_what_it_cannot_use(options, words):
    with pytest.raises(InvalidInputError, match=rf"{words}[\s\S]*Fix:"):
        bound_missed_nodes(lambda masks: masks.sum(1), 3, **{"n_subsets": 4, "probability": 0.5} | options)
