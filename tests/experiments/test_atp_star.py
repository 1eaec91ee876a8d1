"""AtP* against exact patching, at smoke size: each number of the comparison against its definition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from interp_jax.configs.pairs import Pairs
from interp_jax.core.errors import InvalidInputError, UnknownNameError
from interp_jax.core.results import load_result, save_result
from interp_jax.experiments import atp_star
from interp_jax.experiments.atp_star import METHODS, SMOKE, Config


@pytest.fixture(scope="module")
def result(tiny_llama):
    return atp_star.run(SMOKE, lm=tiny_llama, progress=False)


def test_the_methods_differ_where_they_should(result):
    scores = {name: one.scores for name, one in result.methods.items()}
    assert tuple(scores) == METHODS
    nodes = result.exact.nodes
    is_qk = np.array([node.site.name in ("q", "k") for node in nodes])
    # The fix is for queries and keys alone; two programs round differently.
    np.testing.assert_allclose(scores["AtP"][:, ~is_qk], scores["AtP + QK fix"][:, ~is_qk], atol=1e-6)
    assert np.abs(scores["AtP"] - scores["AtP + QK fix"])[:, is_qk].max() > 1e-3
    assert np.abs(scores["AtP"] - scores["GradDrop"]).max() > 1e-3
    # None is the truth, all know something of it.
    for one in result.methods.values():
        assert 0.3 < one.spearman < 0.9999
    # Forward passes: a backward pass costs two, GradDrop goes back once more for each of three layers.
    assert [one.cost for one in result.methods.values()] == [2, 2, 8, 8]


def test_ranks_found_and_missed_by_definition(result):
    truth = np.abs(result.exact.effects).mean(0)
    top = np.argsort(-truth)[: SMOKE.top_k]
    assert [name for name, _ in result.top] == [str(result.exact.nodes[int(i)]) for i in top]
    for one in result.methods.values():
        mean = one.scores.mean(0)
        assert one.spearman == pytest.approx(stats.spearmanr(mean, truth)[0])
        for pair in range(2):
            expected = stats.spearmanr(one.scores[pair], np.abs(result.exact.effects[pair]))[0]
            assert one.spearman_of_pairs[pair] == pytest.approx(expected)
        assert set(one.spearman_of_sites) == set(SMOKE.sites)
        rank = 1 + (mean[:, None] < mean[None, :]).sum(1)
        assert one.found == (rank[top] <= SMOKE.top_k).sum()
        expected = [(str(result.exact.nodes[int(i)]), at + 1, rank[i]) for at, i in enumerate(top) if rank[i] > 20]
        assert list(one.missed) == expected
        # The last of the true top K is verified after all that rank above it.
        assert one.curve.costs[9] == one.cost + rank[top].max()
        # What it would verify first is patched for real: the exact effects are that.
        own = np.argsort(-mean, kind="stable")[: SMOKE.top_k]
        np.testing.assert_array_equal(one.verified.nodes, own)
        np.testing.assert_array_equal(one.verified.measured, truth[own])


def test_baselines_spend_what_they_patch(tiny_llama, result):
    n_nodes, truth = result.exact.nodes.n_nodes, np.abs(result.exact.effects).mean(0)
    assert list(result.baselines) == ["subsampling", "blocks", "hierarchical", "random order"]
    # Before the first node is found: 64 subsets, 18 blocks of 8 nodes, groups of at most 138 / 4.
    first = {name: curve.costs[0] for name, curve in result.baselines.items()}
    assert first["subsampling"] > 64 and first["blocks"] > 18 and first["hierarchical"] > 4
    for curve in result.baselines.values():
        np.testing.assert_allclose(truth[curve.nodes], np.sort(truth)[::-1][: SMOKE.max_k])
        assert curve.score > max(one.curve.score for one in result.methods.values())
    # No node that AtP* leaves unverified is larger than the bound that random subsets give, at 99 %.
    assert len(result.bound.nodes) == n_nodes - SMOKE.top_k
    assert truth[result.bound.nodes].max() < result.bound.bound(0.01) < np.inf


def test_the_result_is_saved_with_its_figures(result, tmp_path):
    path = save_result(result, name="atp_star", config=SMOKE, figures=atp_star.plot(result), root=tmp_path)
    saved = load_result(path)
    assert saved.config["pairs"]["family"] == "induction"
    np.testing.assert_array_equal(saved.result["exact"]["effects"], result.exact.effects)
    assert saved.result["methods"]["AtP*"]["spearman"] == result.methods["AtP*"].spearman
    figures = {file.name for file in path.rglob("*") if file.suffix in (".png", ".html")}
    assert figures == {f"{kind}.{end}" for kind in ("scatter", "cost_recall", "heads") for end in ("png", "html")}
    assert "AtP + QK fix" in repr(result)


def test_mistakes_in_the_configuration_are_told(tiny_llama):
    with pytest.raises(InvalidInputError, match=r"top_k=0, missed_rank=9999 was given[\s\S]*from 1 to 138"):
        atp_star.run(dataclasses.replace(SMOKE, top_k=0, missed_rank=9999), lm=tiny_llama)
    with pytest.raises(UnknownNameError, match=r"Unknown family 'ioy' in Pairs\. Did you mean 'ioi'"):
        atp_star.run(Config(pairs=Pairs("ioy")), lm=tiny_llama)
