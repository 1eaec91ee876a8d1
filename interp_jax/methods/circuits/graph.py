"""The edge graph of a transformer: who writes to the residual stream, who reads it, and subsets of its edges.

Senders are the input, every head and every MLP; receivers are the q, k and v inputs of every head, the input of every
MLP, and the final norm's (`logits`). An edge leads from each sender to each receiver that comes after it. Under
grouped-query attention a key or value input belongs to a `kv_head`, as the model computes it once for its group.

>>> graph = EdgeGraph(n_layers=12, n_heads=12, n_kv_heads=12)
>>> len(graph.senders), len(graph.receivers), graph.n_edges
(157, 445, 32491)
>>> circuit = Circuit.of(graph, [("input", "0.mlp"), ("0.mlp", "3.head5.k"), ("3.head5", "logits")])
>>> circuit
Circuit(3 of 32491 edges, 3 senders)
>>> Circuit.of(graph, [("input", "0.mlp"), ("3.head5", "logits")]).pruned().n_edges
0

Sharp edges: an edge counts once, at all positions together. In parallel blocks an MLP does not read the heads of its
own layer. Attention's output bias belongs to no head, and is no sender: it is the same in every run.

Source: Conmy et al., ACDC (2304.14997), for the graph; Hanna et al., EAP-IG (2403.17806), for pruning and greedy
selection.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError, check_choice, four_part

RANKINGS = ("size", "lowest", "highest")


class Node(NamedTuple):
    """A sender or a receiver.

    Args:
        layer: Its layer; None for the input and the logits.
        part: "input", "head" or "mlp" of a sender; "q", "k", "v", "mlp" or "logits" of a receiver.
        head: Its head, or key-value head; None for what is no head.
        name: What it is called, such as "3.head5", "3.kv_head1.k" or "logits".
    """

    layer: int | None
    part: str
    head: int | None
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class EdgeGraph:
    """The senders, receivers and edges of a model of some shape.

    Args:
        n_layers: Number of layers.
        n_heads: Heads per layer.
        n_kv_heads: Key-value heads per layer.
        is_parallel: Whether attention and MLP of a layer both read its input.
        has_mlps: Whether there are MLPs.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    is_parallel: bool = False
    has_mlps: bool = True

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """The input, then per layer its heads and its MLP."""
        found = [Node(None, "input", None, "input")]
        for layer in range(self.n_layers):
            found += [Node(layer, "head", head, f"{layer}.head{head}") for head in range(self.n_heads)]
            found += [Node(layer, "mlp", None, f"{layer}.mlp")] * self.has_mlps
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[Node, ...]:
        """Per layer the q inputs of its heads, the k and the v inputs, and its MLP's; then the logits."""
        kv = "head" if self.n_kv_heads == self.n_heads else "kv_head"
        found = []
        for layer in range(self.n_layers):
            for part, kind, n in (("q", "head", self.n_heads), ("k", kv, self.n_kv_heads), ("v", kv, self.n_kv_heads)):
                found += [Node(layer, part, head, f"{layer}.{kind}{head}.{part}") for head in range(n)]
            found += [Node(layer, "mlp", None, f"{layer}.mlp")] * self.has_mlps
        return (*found, Node(None, "logits", None, "logits"))

    @cached_property
    def is_edge(self) -> np.ndarray:
        """Whether there is an edge, `[sender, receiver]`."""

        def place(node: Node, of_mlp: int) -> int:
            ends = {"input": -1, "logits": 2 * self.n_layers}
            return ends.get(node.part, 2 * (node.layer or 0) + (of_mlp if node.part == "mlp" else 0))

        written = np.array([place(node, 1) for node in self.senders])
        read = np.array([place(node, 0 if self.is_parallel else 1) for node in self.receivers])
        return written[:, None] < read[None, :]

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.is_edge.sum())

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of senders and receivers, the shape of a mask or of scores."""
        return len(self.senders), len(self.receivers)

    @cached_property
    def feeds(self) -> np.ndarray:
        """Whether a receiver is an input of a sender, `[receiver, sender]`; nothing is fed by the logits."""
        group = self.n_heads // self.n_kv_heads

        def heads_of(node: Node) -> list[str]:
            if node.part in ("mlp", "logits") or node.head is None:
                return [node.name]
            width = 1 if node.part == "q" else group
            return [f"{node.layer}.head{head}" for head in range(node.head * width, (node.head + 1) * width)]

        names = {node.name: index for index, node in enumerate(self.senders)}
        feeds = np.zeros((len(self.receivers), len(self.senders)), bool)
        for row, node in enumerate(self.receivers):
            for name in heads_of(node):
                if name in names:
                    feeds[row, names[name]] = True
        return feeds

    def sender(self, name: str) -> int:
        """The index of the sender of this `name`."""
        return self._index(name, self.senders, "sender")

    def receiver(self, name: str) -> int:
        """The index of the receiver of this `name`."""
        return self._index(name, self.receivers, "receiver")

    def _index(self, name: str, nodes: tuple[Node, ...], what: str) -> int:
        names = [node.name for node in nodes]
        if name not in names:
            raise UnknownNameError(
                four_part(
                    f"Unknown {what} {name!r}",
                    where="an edge graph",
                    names=names,
                    given=str(name),
                    fix=f"use one of these; graph.{what}s lists them all.",
                )
            )
        return names.index(name)


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Some of a graph's edges.

    Args:
        graph: The graph.
        is_kept: Whether an edge is in the circuit, bool `[sender, receiver]`.
    """

    graph: EdgeGraph
    is_kept: np.ndarray

    def __post_init__(self) -> None:
        given = np.asarray(self.is_kept)
        if given.dtype != np.bool_ or given.shape != self.graph.shape:
            raise ShapeError(
                four_part(
                    f"Edges {given.dtype}{list(given.shape)} were given",
                    where="Circuit",
                    expected=f"bool{list(self.graph.shape)}, one entry per sender and receiver.",
                    fix="compare scores of this graph with a threshold, or name edges in Circuit.of.",
                )
            )
        if (given & ~self.graph.is_edge).any():
            raise _not_edges(self.graph, np.argwhere(given & ~self.graph.is_edge))
        object.__setattr__(self, "is_kept", given)

    @classmethod
    def of(cls, graph: EdgeGraph, edges: Iterable[tuple[str, str]]) -> Circuit:
        """The circuit of these edges.

        Args:
            graph: The graph.
            edges: Names of sender and receiver.

        Returns:
            The circuit.

        Raises:
            UnknownNameError: There is no such sender or receiver.
            InvalidInputError: The receiver does not come after the sender.
        """
        is_kept = np.zeros(graph.shape, bool)
        for sender, receiver in edges:
            is_kept[graph.sender(sender), graph.receiver(receiver)] = True
        return cls(graph, is_kept)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.is_kept.sum())

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """Names of sender and receiver of every edge, by sender."""
        graph = self.graph
        return tuple((graph.senders[u].name, graph.receivers[v].name) for u, v in np.argwhere(self.is_kept))

    @property
    def senders(self) -> tuple[Node, ...]:
        """The senders some edge begins at."""
        return tuple(self.graph.senders[index] for index in np.flatnonzero(self.is_kept.any(1)))

    @property
    def mask(self) -> np.ndarray:
        """1 where a receiver hears the corrupted write: at the edges left out. float32 `[sender, receiver]`."""
        return (self.graph.is_edge & ~self.is_kept).astype(np.float32)

    def pruned(self) -> Circuit:
        """Only the edges on some path from the input to the logits. What the circuit computes stays the same.

        A node none of whose inputs reaches back to the input writes its corrupted value anyway (where that comes
        from a corrupted run, not from zeros), and what nothing carries on to the logits changes nothing.
        """
        graph, is_kept = self.graph, self.is_kept
        feeds = graph.feeds
        # Senders are in the order of execution, so one pass in each direction is enough.
        is_live = np.zeros(graph.shape[0], bool)
        is_live[0] = True
        for u in range(1, graph.shape[0]):
            is_live[u] = is_kept[is_live][:, feeds[:, u]].any()
        is_heard = np.zeros(graph.shape[1], bool)
        is_heard[-1] = True
        for u in reversed(range(1, graph.shape[0])):
            is_heard |= feeds[:, u] & is_kept[u, is_heard].any()
        return Circuit(graph, is_kept & is_live[:, None] & is_heard[None, :])

    def __repr__(self) -> str:
        return f"Circuit({self.n_edges} of {self.graph.n_edges} edges, {len(self.senders)} senders)"


def top_edges(graph: EdgeGraph, scores: np.ndarray, n: int, *, by: str = "size") -> Circuit:
    """The circuit of the n edges that come first; ties go to the earlier edge.

    Args:
        graph: The graph.
        scores: A number per edge, `[sender, receiver]`.
        n: How many edges.
        by: "size" (largest absolute value first), "lowest" or "highest".

    Returns:
        The circuit, in which some edges may lead nowhere; see `Circuit.pruned`.

    Raises:
        ShapeError: Scores of another graph.
        InvalidInputError: Scores that are not finite, or `n` out of range.
        UnknownNameError: An unknown ranking.
    """
    ranks = _ranks(graph, scores, n, by)
    flat = np.where(graph.is_edge, ranks, -np.inf).reshape(-1)
    is_kept = np.zeros(flat.size, bool)
    is_kept[np.argsort(-flat, kind="stable")[:n]] = True
    return Circuit(graph, is_kept.reshape(graph.shape))


def greedy_edges(graph: EdgeGraph, scores: np.ndarray, n: int, *, by: str = "size") -> Circuit:
    """The circuit that grows from the logits, each time by the first of the edges that lead to a node in it.

    Args:
        graph: The graph.
        scores: A number per edge, `[sender, receiver]`.
        n: How many edges to take, fewer if there are no more.
        by: As for `top_edges`.

    Returns:
        The circuit; every edge leads on to the logits, but some may not come from the input (`Circuit.pruned`).

    Raises:
        ShapeError: Scores of another graph.
        InvalidInputError: Scores that are not finite, or `n` out of range.
        UnknownNameError: An unknown ranking.
    """
    ranks = _ranks(graph, scores, n, by)
    is_kept, is_open = np.zeros(graph.shape, bool), np.zeros(graph.shape[1], bool)
    heap: list[tuple[float, int, int]] = []

    def open_receivers(receivers: np.ndarray) -> None:
        for v in receivers[~is_open[receivers]]:
            is_open[v] = True
            for u in np.flatnonzero(graph.is_edge[:, v]):
                heapq.heappush(heap, (-float(ranks[u, v]), int(u), int(v)))

    open_receivers(np.array([graph.shape[1] - 1]))
    for _ in range(n):
        if not heap:
            break
        _, u, v = heapq.heappop(heap)
        is_kept[u, v] = True
        open_receivers(np.flatnonzero(graph.feeds[:, u]))
    return Circuit(graph, is_kept)


def _ranks(graph: EdgeGraph, scores: np.ndarray, n: int, by: str) -> np.ndarray:
    """The larger, the earlier the edge is taken."""
    scores = np.asarray(scores)
    check_choice(by, RANKINGS, what="ranking", where="a choice of edges")
    if scores.shape != graph.shape:
        raise ShapeError(
            four_part(
                f"Scores {list(scores.shape)} were given",
                where="a choice of edges",
                expected=f"one per sender and receiver of the graph, {list(graph.shape)}.",
                fix="give scores and graph of the same model.",
            )
        )
    if not np.isfinite(scores[graph.is_edge]).all() or isinstance(n, bool) or not 0 <= n <= graph.n_edges:
        n_bad = int((~np.isfinite(scores[graph.is_edge])).sum())
        raise InvalidInputError(
            four_part(
                f"n={n} and scores of which {n_bad} are not finite were given",
                where="a choice of edges",
                expected=f"n from 0 to {graph.n_edges}, and finite scores.",
                fix="choose n in that range; NaN scores come from a metric that is NaN.",
            )
        )
    return {"size": np.abs, "lowest": np.negative, "highest": np.positive}[by](scores)


def _not_edges(graph: EdgeGraph, pairs: np.ndarray) -> InvalidInputError:
    named = [f"{graph.senders[u]} -> {graph.receivers[v]}" for u, v in pairs]
    shown = ", ".join(named[:6]) + (f", ... ({len(named)} in all)" if len(named) > 6 else "")
    return InvalidInputError(
        four_part(
            f"{shown}: no edge of the graph",
            where="Circuit",
            expected="edges from a sender to a receiver that comes after it"
            + (" (MLPs of parallel blocks do not read the heads of their layer)." if graph.is_parallel else "."),
            fix="leave them out; graph.is_edge says which edges there are.",
        )
    )
