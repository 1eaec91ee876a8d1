"""Pictures of circuits: nodes layer by layer from the input up to the logits, and the edges between them.

`circuit_figure` draws it with matplotlib; `circuit_page` is one HTML file in which pointing at a node shows its edges,
with all of them in a table below; `faithfulness_figure` draws faithfulness over the number of edges.

    circuit_figure(circuit, result.scores).savefig("circuit.png")

>>> from interp_jax.methods.circuits.graph import EdgeGraph
>>> graph = EdgeGraph(2, 2, 2)
>>> nodes, edges = circuit_layout(Circuit.of(graph, [("input", "1.head0.q"), ("1.head0", "logits")]))
>>> [(node.name, node.x, node.y) for node in nodes]
[('input', 0.0, 0), ('1.head0', 0.0, 1), ('logits', 0.0, 2)]
>>> [(edge.sender, edge.target, edge.receiver) for edge in edges]
[('input', '1.head0', '1.head0.q'), ('1.head0', 'logits', 'logits')]

Sharp edges: a head is one node, whichever of its inputs an edge goes to; an edge into a `kv_head` is drawn to every
head of its group in the picture. Rows without nodes are left out. Only the strongest edges are drawn where there are
more than `n_drawn`, and the caption says so.

Source: interp_jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.figures.circuit_page import BODY, SCRIPT, STYLE
from interp_jax.figures.page import escape, html_page
from interp_jax.figures.plotting import INK, LINE, QUIET, SERIES, add_heading, drawing
from interp_jax.methods.circuits.graph import Circuit, Node

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from interp_jax.methods.circuits.evaluation import FaithfulnessResult


class PlacedNode(NamedTuple):
    """A node of the picture.

    Args:
        name: Its name.
        x: Its column, 1 apart, by the number of its head; 0 is the middle.
        y: Its row, from 0 for the input.
        part: "input", "head", "mlp" or "logits".
    """

    name: str
    x: float
    y: int
    part: str


class DrawnEdge(NamedTuple):
    """An edge of the picture.

    Args:
        sender: Name of the node it begins at.
        target: Name of the node it ends at.
        receiver: Name of the receiver, which says which input of the node it is.
        score: Its score; None if there are none.
    """

    sender: str
    target: str
    receiver: str
    score: float | None


def circuit_layout(
    circuit: Circuit, scores: Any = None, *, n_drawn: int = 400
) -> tuple[list[PlacedNode], list[DrawnEdge]]:
    """Where the nodes of a circuit stand, and which edges are drawn between them.

    Args:
        circuit: The circuit.
        scores: A number per edge, `[sender, receiver]`, if there are any.
        n_drawn: Most edges to draw, the strongest first (without scores, the first).

    Returns:
        Nodes from the input up, and edges, strongest first.

    Raises:
        InvalidInputError: The circuit has no edges.
        ShapeError: The scores are not those of the circuit's graph.
    """
    graph = circuit.graph
    if scores is not None and np.shape(scores) != graph.shape:
        raise ShapeError(
            four_part(
                f"Scores {list(np.shape(scores))} were given",
                where="a picture of a circuit",
                expected=f"one per sender and receiver of its graph, {list(graph.shape)}.",
                fix="give the scores of the result the circuit was taken from.",
            )
        )
    pairs = np.argwhere(circuit.is_kept)
    if not len(pairs):
        raise InvalidInputError(
            four_part(
                f"{circuit} was given",
                where="a picture of a circuit",
                expected="a circuit with at least one edge.",
                fix="take more edges, or look whether pruning removed them all.",
            )
        )
    strength = np.ones(len(pairs)) if scores is None else np.abs(np.asarray(scores))[tuple(pairs.T)]
    pairs = pairs[np.argsort(-strength, kind="stable")[:n_drawn]]
    senders = {graph.senders[u].name: graph.senders[u] for u in pairs[:, 0]}
    # A receiver stands for what it is an input of, as far as that is in the circuit.
    edges, targets = [], {}
    for u, v in pairs:
        receiver = graph.receivers[v]
        fed = [graph.senders[i] for i in np.flatnonzero(graph.feeds[v])] or [receiver]
        score = None if scores is None else float(np.asarray(scores)[u, v])
        for target in [node for node in fed if node.name in senders] or fed[:1]:
            targets[target.name] = target
            edges.append(DrawnEdge(graph.senders[u].name, target.name, receiver.name, score))
    return _placed(list((senders | targets).values()), is_parallel=graph.is_parallel), edges


def _placed(nodes: list[Node], *, is_parallel: bool) -> list[PlacedNode]:
    def row(node: Node) -> float:
        ends = {"input": -1.0, "logits": float("inf")}
        return ends.get(node.part, (node.layer or 0) + (0.5 if node.part == "mlp" and not is_parallel else 0.0))

    nodes = sorted(nodes, key=lambda node: (row(node), node.part == "mlp", node.head or 0))
    rows = {place: y for y, place in enumerate(sorted({row(node) for node in nodes}))}
    # A head has a column by its number, and MLPs have one on the right, so that few edges pass behind a node.
    columns: list[int | str | None] = [*sorted({node.head for node in nodes if node.head is not None})]
    columns += ["mlp"] * any(node.part == "mlp" for node in nodes)

    def column(node: Node) -> float:
        if node.part in ("input", "logits"):
            return 0.0
        return columns.index("mlp" if node.part == "mlp" else node.head) - (len(columns) - 1) / 2

    return [PlacedNode(node.name, column(node), rows[row(node)], node.part) for node in nodes]


def circuit_figure(circuit: Circuit, scores: Any = None, *, title: str = "", n_drawn: int = 400) -> Figure:
    """A circuit as a matplotlib figure.

    Args:
        circuit: The circuit.
        scores: A number per edge, `[sender, receiver]`, for width and colour.
        title: What to add to the heading, such as the model's name.
        n_drawn: Most edges to draw.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: The circuit has no edges.
        ShapeError: The scores are not those of the circuit's graph.
    """
    nodes, edges = circuit_layout(circuit, scores, n_drawn=n_drawn)
    widest, n_rows = max(abs(node.x) for node in nodes), nodes[-1].y + 1
    width, height = max(6.0, 1.2 + 0.95 * (2 * widest + 1)), 1.3 + 0.62 * n_rows
    with drawing(width, height) as figure:
        axes = figure.add_axes((0.02, 0.02, 0.96, 1 - 0.95 / height))
        _draw_edges(axes, nodes, edges)
        for node in nodes:
            axes.text(
                node.x, node.y, node.name, ha="center", va="center", fontsize=8, color=INK, zorder=3,
                bbox={"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": _colour(node.part), "lw": 1.2},
            )  # fmt: skip
        axes.set_xlim(-widest - 0.8, widest + 0.8)
        axes.set_ylim(-0.6, n_rows - 0.4)
        axes.set_axis_off()
        heading = "Circuit" + (f": {title}" if title else "")
        add_heading(figure, heading, _caption(circuit, scores, n_drawn), left_inches=0.3)
    return figure


def _caption(circuit: Circuit, scores: Any, n_drawn: int) -> str:
    shown = f", the strongest {n_drawn} drawn" if circuit.n_edges > n_drawn else ""
    signs = "" if scores is None else "; blue: corrupting the edge raises the metric, orange: lowers it"
    return f"{circuit.n_edges} of {circuit.graph.n_edges} edges{shown}{signs}."


def _draw_edges(axes: Axes, nodes: list[PlacedNode], edges: list[DrawnEdge]) -> None:
    from matplotlib.collections import LineCollection

    places = {node.name: (node.x, node.y) for node in nodes}
    largest = max((abs(edge.score) for edge in edges if edge.score is not None), default=0.0) or 1.0
    t = np.linspace(0, 1, 24)
    curves, widths, colours = [], [], []
    # The strongest on top.
    for edge in reversed(edges):
        (x0, y0), (x1, y1) = places[edge.sender], places[edge.target]
        # Up from the sender and up into the target, past the nodes in between.
        ease = t * t * (3 - 2 * t)
        curves.append(np.stack([x0 + (x1 - x0) * ease, y0 + (y1 - y0) * t], axis=1))
        widths.append(1.0 if edge.score is None else 0.4 + 3.0 * abs(edge.score) / largest)
        colours.append(QUIET if edge.score is None else SERIES[0 if edge.score > 0 else 1])
    axes.add_collection(LineCollection(curves, linewidths=widths, colors=colours, alpha=0.55, zorder=1))


def _colour(part: str) -> str:
    return {"head": SERIES[0], "mlp": SERIES[2]}.get(part, SERIES[3])


def circuit_page(circuit: Circuit, scores: Any = None, *, title: str = "", text: str = "", n_drawn: int = 400) -> str:
    """A circuit as one HTML document that needs nothing else.

    Args:
        circuit: The circuit.
        scores: A number per edge, `[sender, receiver]`, for width and colour.
        title: What to add to the heading, such as the model's name.
        text: The prompt, shown under the heading.
        n_drawn: Most edges to draw.

    Returns:
        The document.

    Raises:
        InvalidInputError: The circuit has no edges.
        ShapeError: The scores are not those of the circuit's graph.
    """
    nodes, edges = circuit_layout(circuit, scores, n_drawn=n_drawn)
    heading = "Circuit" + (f": {title}" if title else "")
    rounded = [edge._replace(score=None if edge.score is None else float(f"{edge.score:.5g}")) for edge in edges]
    data = {"nodes": [node._asdict() for node in nodes], "edges": [edge._asdict() for edge in rounded]}
    body = BODY.format(heading=escape(heading), text=escape(text), caption=escape(_caption(circuit, scores, n_drawn)))
    return html_page(heading, body=body, style=STYLE, script=SCRIPT, data=data)


def faithfulness_figure(result: FaithfulnessResult, *, title: str = "") -> Figure:
    """Faithfulness over the number of edges, as a matplotlib figure.

    Args:
        result: Faithfulness of circuits of several sizes.
        title: What to add to the heading.

    Returns:
        The figure.

    Raises:
        InvalidInputError: No circuit, or a model whose metric is the same with and without edges.
    """
    values = result.faithfulness
    if not len(values) or not np.isfinite(values).all():
        raise InvalidInputError(
            four_part(
                f"A result with {len(values)} circuits and faithfulness {values.tolist()[:4]} was given",
                where="faithfulness_figure",
                expected="at least one circuit, and a metric that differs between the clean and the corrupted run.",
                fix="measure circuits on prompts that differ.",
            )
        )
    order = np.argsort(result.n_edges, kind="stable")
    sizes = np.array(result.n_edges)[order]
    with drawing(6.4, 3.8) as figure:
        axes = figure.add_axes((0.11, 0.14, 0.85, 0.7))
        for level in (0, 1):
            axes.axhline(level, color=QUIET, linewidth=0.8, linestyle="--" if level else "-", zorder=1)
        axes.plot(sizes, values[order], marker="o", markersize=4, color=SERIES[0], linewidth=1.6, zorder=2)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(0, max(10, 1.2 * sizes.max()))
        axes.grid(color=LINE, linewidth=0.7, zorder=0)
        axes.spines[:].set_visible(False)
        axes.tick_params(labelsize=8, labelcolor=INK, length=0)
        axes.set_xlabel("edges in the circuit", fontsize=9, color=QUIET)
        axes.set_ylabel("faithfulness", fontsize=9, color=QUIET)
        heading = "Faithfulness" + (f": {title}" if title else "")
        add_heading(figure, heading, left_inches=0.7)
    return figure
