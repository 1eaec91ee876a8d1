"""The pictures of circuits: every edge is there, between the nodes it joins, and what cannot be drawn is refused."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.figures.circuits import circuit_figure, circuit_layout, circuit_page, faithfulness_figure
from interp_jax.methods.circuits.evaluation import FaithfulnessResult
from interp_jax.methods.circuits.graph import Circuit, EdgeGraph

GRAPH = EdgeGraph(3, 4, 2)
EDGES = [
    ("input", "0.head1.q"),
    ("input", "0.mlp"),
    ("0.head1", "2.kv_head1.k"),
    ("0.mlp", "2.head3.q"),
    ("2.head2", "logits"),
    ("2.head3", "logits"),
]
CIRCUIT = Circuit.of(GRAPH, EDGES)


@pytest.fixture
def scores(rng):
    return rng.normal(size=GRAPH.shape)


def test_rows_go_up_and_edges_join_what_they_should(scores):
    nodes, edges = circuit_layout(CIRCUIT, scores)
    rows = {node.name: node.y for node in nodes}
    assert rows == {"input": 0, "0.head1": 1, "0.mlp": 2, "2.head2": 3, "2.head3": 3, "logits": 4}
    columns = {node.name: node.x for node in nodes}
    assert columns == {"input": 0, "0.head1": -1.5, "2.head2": -0.5, "2.head3": 0.5, "0.mlp": 1.5, "logits": 0}
    assert all(rows[edge.sender] < rows[edge.target] for edge in edges)
    # A key-value head is read by both heads of its group that are in the circuit.
    assert {edge.target for edge in edges if edge.receiver == "2.kv_head1.k"} == {"2.head2", "2.head3"}
    assert {(edge.sender, edge.receiver) for edge in edges} == set(EDGES)
    for edge in edges:
        assert edge.score == scores[GRAPH.sender(edge.sender), GRAPH.receiver(edge.receiver)]
    sizes = [abs(edge.score or 0.0) for edge in edges]
    assert sizes == sorted(sizes, reverse=True)
    first = sorted(EDGES, key=lambda edge: -abs(scores[GRAPH.sender(edge[0]), GRAPH.receiver(edge[1])]))[:2]
    assert {(edge.sender, edge.receiver) for edge in circuit_layout(CIRCUIT, scores, n_drawn=2)[1]} == set(first)


def test_heads_and_mlps_of_parallel_blocks_share_a_row():
    graph = EdgeGraph(1, 2, 2, is_parallel=True)
    nodes, _ = circuit_layout(Circuit(graph, graph.is_edge))
    assert {node.name: node.y for node in nodes} == {"input": 0, "0.head0": 1, "0.head1": 1, "0.mlp": 1, "logits": 2}


def test_the_page_holds_every_edge(scores):
    page = circuit_page(CIRCUIT, scores, title="<toy>", text="x & y")
    data = json.loads(re.search(r"^const DATA = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]
    assert {(edge["sender"], edge["receiver"]) for edge in data["edges"]} == set(EDGES)
    for edge in data["edges"]:
        expected = scores[GRAPH.sender(edge["sender"]), GRAPH.receiver(edge["receiver"])]
        assert edge["score"] == pytest.approx(expected, rel=1e-4)
    assert {edge["sender"] for edge in data["edges"]} | {"logits"} == {node["name"] for node in data["nodes"]}
    assert "&lt;toy&gt;" in page and "x &amp; y" in page
    assert re.findall(r"\b(?:src|href|@import|url\()", page) == []
    assert '"score":null' in circuit_page(CIRCUIT)
    assert "the strongest 3 drawn" in circuit_page(CIRCUIT, n_drawn=3)


def test_curves_lead_from_sender_to_target(scores):
    figure = circuit_figure(CIRCUIT, scores, title="$toy$")
    figure.savefig(io.BytesIO(), format="png")
    (lines,) = figure.axes[0].collections
    nodes, edges = circuit_layout(CIRCUIT, scores)
    places = {node.name: (node.x, node.y) for node in nodes}
    ends = [(tuple(path.vertices[0]), tuple(path.vertices[-1])) for path in lines.get_paths()]  # type: ignore[index]
    assert ends == [(places[edge.sender], places[edge.target]) for edge in reversed(edges)]
    widths = np.asarray(lines.get_linewidth())
    assert widths[-1] == widths.max()
    assert {text.get_text() for text in figure.axes[0].texts} == set(places)
    circuit_figure(CIRCUIT).savefig(io.BytesIO(), format="png")


def test_the_curve_of_faithfulness_is_in_order_of_size():
    result = FaithfulnessResult(np.array([3.0]), np.array([1.0]), np.array([[3.5], [1.0], [2.0]]), (500, 0, 20))
    figure = faithfulness_figure(result, title="toy")
    figure.savefig(io.BytesIO(), format="png")
    curve = figure.axes[0].lines[-1]
    np.testing.assert_allclose(np.asarray(curve.get_xdata()), [0, 20, 500])
    np.testing.assert_allclose(np.asarray(curve.get_ydata()), [0, 0.5, 1.25])


def test_what_cannot_be_drawn_is_refused():
    for draw in (circuit_figure, circuit_page):
        with pytest.raises(InvalidInputError, match=r"Circuit\(0 of[\s\S]*at least one edge[\s\S]*Fix:"):
            draw(Circuit.of(GRAPH, []))
        with pytest.raises(ShapeError, match=r"Scores \[2\] were given[\s\S]*Fix:"):
            draw(CIRCUIT, np.zeros(2))
    same = FaithfulnessResult(np.ones(1), np.ones(1), np.ones((1, 1)), (3,))
    with pytest.raises(InvalidInputError, match=r"faithfulness \[nan\][\s\S]*Fix:"):
        faithfulness_figure(same)
