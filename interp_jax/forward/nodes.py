"""Nodes: the parts of a forward pass whose effect is measured one by one.

A node is a site at one position: one head's query, key, value or output, one neuron, or a whole vector of the residual
stream or of a write to it. Pooled, a node is the same part at all positions at once. A `NodeSet` numbers the nodes of
several sites, so that scores are plain arrays `[..., node]`, and folds such arrays back into grids for heatmaps.

>>> nodes = NodeSet((NodeGroup("z", (0, 1), (3, 4), n_units=2), NodeGroup("mlp_out", (0, 1), (4,))), n_pos=5)
>>> nodes.n_nodes, str(nodes[5]), str(nodes[9])
(10, '1.z, unit 1, position 3', '1.mlp_out, position 4')
>>> nodes.grid("z", np.arange(10)).shape
(2, 2, 2)

Sharp edges: under grouped-query attention `k` and `v` have fewer units than `q` and `z`. A whole residual vector is a
large perturbation: estimates by a gradient are poor there, and exact patching of so few nodes is cheap.

Source: Kramar et al. 2024 (2403.00745), for the nodes of AtP*.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError, four_part
from interp_jax.core.sites import Site, select_sites

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

NEURONS = ("mlp_pre", "mlp_gate", "mlp_post")
# Values with two position axes, or that are no activations of a layer's own.
_NO_NODES = ("attn_scores", "pattern", "logits")


class Node(NamedTuple):
    """One part of a forward pass: a `site`, at a `position` (None: all of the set's), of it a `unit` (None: all)."""

    site: Site
    position: int | None
    unit: int | None

    def __str__(self) -> str:
        unit = "" if self.unit is None else f", unit {self.unit}"
        return f"{self.site}{unit}, " + ("all positions" if self.position is None else f"position {self.position}")


@dataclass(frozen=True)
class NodeGroup:
    """The nodes at sites of one name.

    Args:
        name: Name of the sites.
        layers: Their layers; `(None,)` outside the layers.
        positions: The positions, from 0.
        n_units: How many heads or neurons the site has; None if its vector is one node.
        is_pooled: Whether a node is all positions together.
    """

    name: str
    layers: tuple[int | None, ...]
    positions: tuple[int, ...]
    n_units: int | None = None
    is_pooled: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of layers, of positions (1 if pooled), of units (1 if there are none)."""
        return len(self.layers), 1 if self.is_pooled else len(self.positions), self.n_units or 1

    @property
    def n_nodes(self) -> int:
        """How many nodes there are."""
        return int(np.prod(self.shape))

    @property
    def sites(self) -> list[Site]:
        """The sites, by layer."""
        return [Site(layer, self.name) for layer in self.layers]

    def position_masks(self, n_pos: int) -> np.ndarray:
        """Which positions each of the second axis' entries covers, bool `[position, n_pos]`."""
        masks = np.zeros((self.shape[1], n_pos), bool)
        rows = np.zeros(len(self.positions), int) if self.is_pooled else np.arange(len(self.positions))
        masks[rows, list(self.positions)] = True
        return masks


@dataclass(frozen=True)
class NodeSet:
    """Numbered nodes: those of each group in turn, by layer, then position, then unit.

    Args:
        groups: The nodes, by the name of their sites.
        n_pos: Length of the prompts they are about.
    """

    groups: tuple[NodeGroup, ...]
    n_pos: int

    @property
    def n_nodes(self) -> int:
        """How many nodes there are."""
        return sum(group.n_nodes for group in self.groups)

    def __len__(self) -> int:
        return self.n_nodes

    def __iter__(self) -> Iterator[Node]:
        return (self[number] for number in range(self.n_nodes))

    def __getitem__(self, number: int) -> Node:
        if not 0 <= number < self.n_nodes:
            raise IndexError(f"node {number} of {self.n_nodes}")
        for group, ids in self.with_ids():
            if number < ids.start + group.n_nodes:
                layer, position, unit = np.unravel_index(number - ids.start, group.shape)
                return Node(
                    Site(group.layers[layer], group.name),
                    None if group.is_pooled else group.positions[position],
                    None if group.n_units is None else int(unit),
                )
        raise AssertionError(number)

    def with_ids(self) -> Iterator[tuple[NodeGroup, range]]:
        """Each group with the numbers of its nodes."""
        ends = itertools.accumulate(group.n_nodes for group in self.groups)
        for group, end in zip(self.groups, ends, strict=True):
            yield group, range(end - group.n_nodes, end)

    @property
    def sites(self) -> list[Site]:
        """All sites that hold nodes."""
        return [site for group in self.groups for site in group.sites]

    def group(self, name: str) -> NodeGroup:
        """The nodes at sites of a `name`."""
        return self._named(name)[0]

    def _named(self, name: str) -> tuple[NodeGroup, range]:
        for group, ids in self.with_ids():
            if group.name == name:
                return group, ids
        names = [group.name for group in self.groups]
        raise UnknownNameError(
            four_part(f"Unknown name {name!r}", where="NodeSet", names=names, given=name, fix="use one of these.")
        )

    def grid(self, name: str, scores: Any) -> np.ndarray:
        """Scores `[..., node]` as a grid `[..., layer, position, unit]` over the nodes of one `name`."""
        group, ids = self._named(name)
        scores = np.asarray(scores)
        if scores.shape[-1:] != (self.n_nodes,):
            raise ShapeError(
                four_part(
                    f"Scores of shape {list(scores.shape)} were given",
                    where="NodeSet.grid",
                    expected=f"one score per node on the last axis, [..., {self.n_nodes}].",
                    fix="pass the scores of this node set.",
                )
            )
        return scores[..., ids.start : ids.stop].reshape(*scores.shape[:-1], *group.shape)

    def order(self, scores: Any) -> np.ndarray:
        """Numbers of the nodes by falling absolute `scores`, `[node]`; of equals, the lower number first."""
        return np.argsort(-np.abs(np.asarray(scores)), kind="stable")

    def top(self, scores: Any, n: int = 10) -> list[tuple[Node, float]]:
        """The `n` nodes with the largest absolute `scores`, `[node]`, largest first."""
        return [(self[int(i)], float(np.asarray(scores)[i])) for i in self.order(scores)[:n]]

    def __repr__(self) -> str:
        parts = [f"{group.name} {'x'.join(map(str, group.shape))}" for group in self.groups]
        return f"NodeSet({self.n_nodes} nodes (layer x position x unit): {', '.join(parts)})"


def node_set(
    lm: LanguageModel,
    tokens: Any,
    names: Sequence[str] = ("q", "k", "v", "z"),
    *,
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    is_pooled: bool = False,
) -> NodeSet:
    """The nodes of a model at sites of some names.

    Args:
        lm: The model.
        tokens: Prompts of the length in question, `[batch, pos]`.
        names: Names of sites: "q", "k", "v", "z" have a node per head, "mlp_pre", "mlp_gate", "mlp_post" one per
            neuron, all others one per vector.
        layers: Which layers; all by default.
        positions: Which positions, negative ones from the end; all by default.
        is_pooled: Whether a node is all of these positions together.

    Returns:
        The nodes.

    Raises:
        UnknownNameError: The model has no such sites, or not in such a layer.
        InvalidInputError: The set is empty, has a position out of range or twice, or sites that hold no nodes.
    """
    tokens = np.asarray(lm.check_tokens(tokens, where="node_set"))
    n_pos, table = tokens.shape[1], lm.sites(tokens)
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    where = f"node_set({lm.name})"
    refused = [name for name in names if name in _NO_NODES]
    chosen = list(range(n_pos)) if positions is None else [int(p) + n_pos * (int(p) < 0) for p in positions]
    if refused:
        raise _refuse(f"{', '.join(refused)} was given", "sites with one position axis.", "use q, k, v or z.")
    if not names or not chosen or (layers is not None and not (layers := list(layers))):
        raise _refuse(
            "An empty set of nodes was given", "names, layers and positions, at least one of each.", "add some."
        )
    if len(set(chosen)) < len(chosen) or not all(0 <= p < n_pos for p in chosen):
        given = list(positions or ())
        raise _refuse(f"positions={given} was given", f"different positions from 0 to {n_pos - 1}.", "leave some out.")
    by_site = {row.site: row for row in table.rows}
    groups = []
    for name in names:
        selector = name if layers is None else [Site(layer, name) for layer in layers]
        sites = select_sites(selector, table.sites, where=where)
        shape = by_site[sites[0]].value.shape
        n_units = shape[2] if len(shape) == 4 or name in NEURONS else None
        groups.append(NodeGroup(name, tuple(site.layer for site in sites), tuple(chosen), n_units, is_pooled))
    return NodeSet(tuple(groups), n_pos)


def check_nodes(nodes: NodeSet, tokens: np.ndarray, *, where: str) -> None:
    """Refuse nodes that are not of these prompts.

    Args:
        nodes: The nodes.
        tokens: Token ids, `[batch, pos]`.
        where: The public call, for the error message.

    Raises:
        InvalidInputError: The prompts have another length, or there are no nodes.
    """
    if nodes.n_pos != tokens.shape[1] or not nodes.n_nodes:
        raise InvalidInputError(
            four_part(
                f"{nodes.n_nodes} nodes of prompts of {nodes.n_pos} tokens were given for prompts of {tokens.shape[1]}",
                where=where,
                expected="nodes, and of prompts of the same length.",
                fix="make them with node_set(lm, tokens, ...) of these tokens.",
            )
        )


def check_pair(lm: LanguageModel, clean: Any, corrupted: Any, *, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a batch of prompt pairs, once it is known that they can be patched into each other.

    Args:
        lm: The model.
        clean: Token ids, `[batch, pos]`.
        corrupted: Token ids, `[batch, pos]`.
        where: The public call, for the error message.

    Returns:
        Both, int32.

    Raises:
        ShapeError: They differ in shape.
        InvalidInputError: They are padded at different places.
    """
    clean, corrupted = (np.asarray(lm.check_tokens(tokens, where=where)) for tokens in (clean, corrupted))
    if clean.shape != corrupted.shape:
        raise ShapeError(
            four_part(
                f"Clean tokens {list(clean.shape)} and corrupted tokens {list(corrupted.shape)} were given",
                where=where,
                expected="pairs of prompts with the same number of tokens, position by position.",
                fix="choose words with the same number of tokens; lm.tokenize(text).shape tells.",
            )
        )
    if rows := np.flatnonzero(((clean < 0) != (corrupted < 0)).any(1)).tolist():
        raise InvalidInputError(
            four_part(
                f"Pairs whose rows {rows} are padded at different places were given",
                where=where,
                expected="clean and corrupted prompts with padding at the same places.",
                fix="choose corrupted prompts that tokenize to the same length, row by row.",
            )
        )
    if rows := np.flatnonzero((clean == corrupted).all(1)).tolist():
        message = f"Rows {rows} are the same clean and corrupted ({where}): nothing has an effect there."
        warnings.warn(message, stacklevel=3)
    return clean, corrupted


def _refuse(what: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where="node_set", expected=expected, fix=fix))
