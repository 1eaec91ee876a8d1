"""The graph's numbers, and what choosing and pruning edges promise."""

from __future__ import annotations

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.methods.circuits.graph import Circuit, EdgeGraph, greedy_edges, top_edges

SMALL = EdgeGraph(2, 2, 2)


@pytest.mark.parametrize(
    ("graph", "n_senders", "n_receivers", "n_edges"),
    [
        (EdgeGraph(12, 12, 12), 157, 445, 32491),  # GPT-2 small
        (EdgeGraph(30, 9, 3), 301, 481, 70651),  # SmolLM2-135M
        (EdgeGraph(1, 2, 1, is_parallel=True), 4, 6, 5 + 4),
        (EdgeGraph(1, 2, 1), 4, 6, 4 + 3 + 4),
        (EdgeGraph(2, 2, 2, has_mlps=False), 5, 13, 6 + 18 + 5),
    ],
    ids=["gpt2", "smollm2", "parallel", "sequential", "attention-only"],
)
def test_numbers(graph, n_senders, n_receivers, n_edges):
    assert (*graph.shape, graph.n_edges) == (n_senders, n_receivers, n_edges)
    # Counted once more, in the order in which a layer runs.
    n_heard, total = 1, 0
    for _ in range(graph.n_layers):
        total += (graph.n_heads + 2 * graph.n_kv_heads) * n_heard
        total += (n_heard + graph.n_heads * (not graph.is_parallel)) * graph.has_mlps
        n_heard += graph.n_heads + graph.has_mlps
    assert graph.n_edges == total + n_heard


def test_names_and_order():
    assert [node.name for node in SMALL.senders] == [
        "input", "0.head0", "0.head1", "0.mlp", "1.head0", "1.head1", "1.mlp"
    ]  # fmt: skip
    assert [node.name for node in EdgeGraph(1, 4, 2).receivers] == [
        "0.head0.q", "0.head1.q", "0.head2.q", "0.head3.q", "0.kv_head0.k", "0.kv_head1.k", "0.kv_head0.v",
        "0.kv_head1.v", "0.mlp", "logits",
    ]  # fmt: skip
    edges = set(Circuit(SMALL, SMALL.is_edge).edges)
    assert ("0.head1", "0.mlp") in edges
    assert ("0.mlp", "0.head1.q") not in edges
    assert ("0.head0", "0.mlp") not in Circuit(EdgeGraph(2, 2, 2, True), EdgeGraph(2, 2, 2, True).is_edge).edges
    fed = EdgeGraph(1, 4, 2).feeds
    names = [node.name for node in EdgeGraph(1, 4, 2).senders]
    assert [names[i] for i in np.flatnonzero(fed[EdgeGraph(1, 4, 2).receiver("0.kv_head1.v")])] == [
        "0.head2",
        "0.head3",
    ]


def test_pruning_keeps_the_paths_from_input_to_logits():
    kept = [("input", "0.head0.v"), ("0.head0", "1.mlp"), ("1.mlp", "logits")]
    loose = [("0.mlp", "1.head1.q"), ("1.head1", "logits"), ("input", "1.head0.k")]
    assert Circuit.of(SMALL, kept + loose).pruned().edges == Circuit.of(SMALL, kept).edges
    assert Circuit(SMALL, SMALL.is_edge).pruned().n_edges == SMALL.n_edges


def test_the_edges_that_come_first(rng):
    scores = rng.normal(size=SMALL.shape)
    order = {"size": np.abs(scores), "lowest": -scores, "highest": scores}
    for by, rank in order.items():
        expected = sorted(np.argwhere(SMALL.is_edge).tolist(), key=lambda edge: -rank[tuple(edge)])[:9]
        chosen = np.argwhere(top_edges(SMALL, scores, 9, by=by).is_kept).tolist()
        assert sorted(chosen) == sorted(expected)
    assert top_edges(SMALL, scores, SMALL.n_edges).n_edges == SMALL.n_edges
    # Ties go to the earlier edge.
    assert top_edges(SMALL, np.zeros(SMALL.shape), 2).edges == (("input", "0.head0.q"), ("input", "0.head1.q"))


def test_greedy_growth_takes_only_what_leads_on(rng):
    scores = np.zeros(SMALL.shape)
    for edge, score in {
        ("input", "0.head0.q"): 9.0,  # The best edge of all, but nobody listens to the head.
        ("1.mlp", "logits"): 3.0,
        ("0.head1", "1.mlp"): -2.0,
        ("input", "0.head1.v"): 1.0,
        ("input", "logits"): 0.5,
    }.items():
        scores[SMALL.sender(edge[0]), SMALL.receiver(edge[1])] = score
    circuit = greedy_edges(SMALL, scores, 4)
    assert set(circuit.edges) == {
        ("1.mlp", "logits"), ("0.head1", "1.mlp"), ("input", "0.head1.v"), ("input", "logits")
    }  # fmt: skip
    assert circuit.pruned().n_edges == 4
    assert ("0.head1", "1.mlp") not in greedy_edges(SMALL, scores, 3, by="highest").edges
    assert greedy_edges(SMALL, rng.normal(size=SMALL.shape), SMALL.n_edges).n_edges == SMALL.n_edges


def test_mistakes_are_named():
    with pytest.raises(
        UnknownNameError, match=r"Unknown receiver '1.heads0.q'[\s\S]*Did you mean '1.head0.q'[\s\S]*Fix"
    ):
        Circuit.of(SMALL, [("input", "1.heads0.q")])
    with pytest.raises(InvalidInputError, match=r"1\.mlp -> 0\.mlp: no edge of the graph[\s\S]*comes after[\s\S]*Fix"):
        Circuit.of(SMALL, [("1.mlp", "0.mlp")])
    with pytest.raises(ShapeError, match=r"Edges float64\[7, 15\][\s\S]*bool\[7, 15\]"):
        Circuit(SMALL, np.zeros(SMALL.shape))
    with pytest.raises(UnknownNameError, match="Unknown ranking 'abs'"):
        top_edges(SMALL, np.zeros(SMALL.shape), 1, by="abs")
    with pytest.raises(ShapeError, match=r"Scores \[3\] were given"):
        greedy_edges(SMALL, np.zeros(3), 1)
    for n, scores in ((1, np.full(SMALL.shape, np.nan)), (-1, np.zeros(SMALL.shape)), (999, np.zeros(SMALL.shape))):
        with pytest.raises(InvalidInputError, match=rf"n={n} and scores of which \d+ are not finite[\s\S]*Fix:"):
            top_edges(SMALL, scores, n)
