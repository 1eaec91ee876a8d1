"""Faithfulness: its two ends, what pruning may not change, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.forward.metrics import logit_difference
from interp_jax.methods.circuits.edge_attribution import edge_attribution
from interp_jax.methods.circuits.edge_model import edge_graph
from interp_jax.methods.circuits.evaluation import FaithfulnessResult, faithfulness
from interp_jax.methods.circuits.graph import Circuit, EdgeGraph
from interp_jax.transforms.compilations import count_compilations
from tests.methods.circuits.induction import CIRCUIT, CLEAN, CORRUPTED, induction_model
from tests.methods.circuits.toys import Plain, toy

METRIC = logit_difference(3, 7)


def test_ends_pruning_and_values(rng, pair):
    lm = toy(rng)
    graph = edge_graph(lm)
    some = [Circuit(graph, graph.is_edge & (rng.random(graph.shape) < share)) for share in (0.2, 0.5)]
    pruned = [circuit.pruned() for circuit in some]
    circuits = [Circuit(graph, graph.is_edge), Circuit.of(graph, []), *some, *pruned]
    result = faithfulness(lm, pair[0], pair[1], METRIC, circuits, progress=False)
    np.testing.assert_allclose(result.faithfulness[:2], [1, 0], atol=1e-5)
    assert any(one.n_edges < other.n_edges for one, other in zip(pruned, some, strict=True))
    np.testing.assert_allclose(result.kept[4:6], result.kept[2:4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.full, METRIC(lm(pair[0])), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.empty, METRIC(lm(pair[1])), rtol=1e-4, atol=1e-5)
    _, writes, _ = (plain := Plain(lm)).run(pair[1], lambda u, v, write: write)
    logits = plain.patched(pair[0], writes, some[0].mask)
    np.testing.assert_allclose(result.kept[2], logits[:, -1, 3] - logits[:, -1, 7], rtol=1e-3, atol=1e-4)
    means = [part.mean() for part in (result.kept[2], result.empty, result.full)]
    assert result.faithfulness[2] == pytest.approx((means[0] - means[1]) / (means[2] - means[1]))
    np.testing.assert_allclose(result.unexplained[:2], [0, 1], atol=1e-5)
    assert result.n_edges == tuple(circuit.n_edges for circuit in circuits)


def test_the_induction_circuit_is_faithful_and_nothing_less_is():
    lm, metric = induction_model(), logit_difference(4, 0)
    graph = edge_graph(lm)
    whole = Circuit.of(graph, CIRCUIT)
    parts = [Circuit.of(graph, CIRCUIT - {edge}) for edge in sorted(CIRCUIT)]
    result = faithfulness(lm, CLEAN, CORRUPTED, metric, [whole, *parts], progress=False)
    assert result.faithfulness[0] == pytest.approx(1, abs=1e-3)
    assert (result.faithfulness[1:] < 0.9).all()
    with count_compilations() as new:
        scores = edge_attribution(lm, CLEAN, CORRUPTED, metric, progress=False)
        curve = faithfulness(lm, CLEAN, CORRUPTED, metric, [scores.greedy(n) for n in (0, 5, 29)], progress=False)
    assert [entry for entry in new if entry.name == "faithfulness"] == []
    np.testing.assert_allclose(curve.faithfulness, [0, 1, 1], atol=1e-3)


def test_errors_of_opposite_sign_do_not_make_up_for_each_other():
    result = FaithfulnessResult(np.array([2.0, 2.0]), np.array([0.0, 0.0]), np.array([[3.0, 1.0]]), (1,))
    assert (result.faithfulness[0], result.unexplained[0]) == (1, 0.5)


def test_where_nothing_changes_there_is_no_ratio(rng, pair):
    lm = toy(rng, n_layers=1)
    everything = Circuit(edge_graph(lm), edge_graph(lm).is_edge)
    with pytest.warns(UserWarning, match="are the same clean and corrupted"):
        result = faithfulness(lm, pair[0], pair[0], METRIC, everything, progress=False)
    assert np.isnan(result.faithfulness).all()
    assert np.isnan(result.unexplained).all()
    with pytest.raises(InvalidInputError, match=r"1 circuits of EdgeGraph\(n_layers=9[\s\S]*Fix:"):
        faithfulness(lm, pair[0], pair[1], METRIC, Circuit.of(EdgeGraph(9, 2, 2), []))
