"""Searches for the nodes that matter: in which order would each method patch them for real, and at what cost?

A search spends forward passes on finding out where to look first (its setup) and then patches nodes one by one. These
are the ways that need no gradient, beside the one that follows given scores (`by_scores`: AtP and its variants):

- `random_order`: no setup, no idea; brute force.
- `subsampling`: random subsets tell each node's mean effect.
- `blocks`: nodes are patched in blocks; those of the blocks with the largest effects come first.
- `hierarchical`: the group with the largest effect is split and its parts are patched, until single nodes are left.

Four nodes, the third of which matters, found among blocks of two:

>>> effects = np.array([0.0, 0.1, 3.0, 0.0])
>>> found = blocks(lambda masks: masks @ effects, 4, labels=[0, 0, 1, 1])
>>> found.order.tolist(), found.setup_cost, found.cost_of.tolist()
([2, 3, 0, 1], 2.0, [5.0, 6.0, 3.0, 4.0])

Sharp edges: a group whose members cancel has no effect, so blocks and hierarchical look there last: they miss nodes by
construction. Costs are in forward passes per prompt pair; the two passes that every method needs (clean and corrupted)
count for none. All orders are the same for the same seed, ties included.

Source: Kramár et al., "AtP*: An efficient and scalable method for localizing LLM behaviour to components" (2403.00745).
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.forward.subsets import SubsetEffects, checked_effects, subset_moments


@dataclass(frozen=True)
class NodeSearchResult:
    """The order in which a search verifies all nodes, and what it has spent by then.

    Args:
        method: Name of the search.
        order: Ids of all nodes, first verified first, `[n_nodes]`.
        cost_of: By node id: forward passes spent when that node has been verified, `[n_nodes]`.
        setup_cost: Forward passes spent before the first node is verified.
    """

    method: str
    order: np.ndarray
    cost_of: np.ndarray
    setup_cost: float

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.order[:5]))
        return (
            f"NodeSearchResult({self.method}: {len(self.order)} nodes, setup {self.setup_cost:g} forward passes, "
            f"all verified after {self.cost_of.max():g}; first: {first})"
        )


def random_order(n_nodes: int, *, seed: int = 0) -> NodeSearchResult:
    """Patch the nodes one by one in random order: brute force.

    Args:
        n_nodes: How many nodes there are, at least 1.
        seed: Of the order.

    Returns:
        The search; no setup.

    Raises:
        InvalidInputError: There is no node.
    """
    _check_n_nodes(n_nodes, "random_order")
    return _verified_after("random order", np.random.default_rng(seed).permutation(n_nodes), 0.0)


def by_scores(
    scores: Any,
    *,
    n_forwards: float = 2,
    n_backwards: float = 1,
    backward_cost: float = 2.0,
    method: str = "scores",
) -> NodeSearchResult:
    """Patch the nodes in descending order of given scores, such as those of AtP.

    setup = n_forwards + n_backwards * backward_cost

    Args:
        scores: A number per node, `[n_nodes]`; of equal ones the lower id comes first.
        n_forwards: Forward passes the scores took.
        n_backwards: Backward passes they took: 1 for AtP, as many as there are layers with GradDrop.
        backward_cost: What a backward pass costs, in forward passes.
        method: What to call the search.

    Returns:
        The search.

    Raises:
        ShapeError: The scores are not `[n_nodes]`.
        InvalidInputError: A score is NaN, there is none, or a cost is negative.
    """
    scores = np.asarray(scores)
    if scores.ndim != 1:
        raise ShapeError(
            four_part(
                f"Scores of shape {list(scores.shape)} were given",
                where="by_scores",
                expected="one score per node, [n_nodes].",
                fix="average the sizes over the prompt pairs: abs(effects).mean(0).",
            )
        )
    _check_n_nodes(len(scores), "by_scores")
    scores = scores.astype(np.float64)
    costs = {"n_forwards": n_forwards, "n_backwards": n_backwards, "backward_cost": backward_cost}
    faults = [f"{name}={value}" for name, value in costs.items() if not value >= 0]
    if np.isnan(scores).any():
        faults.append(f"NaN as the score of node {int(np.flatnonzero(np.isnan(scores))[0])}")
    if faults:
        raise InvalidInputError(
            four_part(
                f"{', '.join(faults)} was given",
                where="by_scores",
                expected="scores that are numbers, and costs from 0.",
                fix="count the passes that the scores took; find out where NaN comes from.",
            )
        )
    order = np.argsort(-scores, kind="stable")
    return _verified_after(method, order, float(n_forwards + n_backwards * backward_cost))


def subsampling(
    subset_effects: SubsetEffects, n_nodes: int, *, n_subsets: int, probability: float, seed: int = 0
) -> NodeSearchResult:
    """Patch random subsets, then the nodes one by one by the size of their estimated effect.

    score_n = |mean{y_i : n in S_i} - mean{y_i : n not in S_i}|

    Args:
        subset_effects: From masks, bool `[m, n_nodes]`, to the effect of patching each row's nodes at once, `[m]`.
        n_nodes: How many nodes there are.
        n_subsets: How many subsets to patch: the setup cost.
        probability: With which each node is in a subset.
        seed: Of the subsets.

    Returns:
        The search. Nodes of which nothing is known, because no subset held them or all did, come last.

    Raises:
        InvalidInputError: A number is out of range, or an effect is not finite.
        ShapeError: `subset_effects` does not return one number per subset.

    Source: Kramár et al. 2403.00745; at probability 1/2 the expectation is the Banzhaf value.
    """
    ((_, moments),) = subset_moments(
        subset_effects, n_nodes, n_subsets=n_subsets, probability=probability, seed=seed, where="subsampling"
    )
    scores = np.abs(moments.estimate().effects)
    order = np.argsort(-np.where(np.isnan(scores), -1.0, scores), kind="stable")
    return _verified_after("subsampling", order, float(n_subsets))


def blocks(
    subset_effects: SubsetEffects,
    n_nodes: int,
    *,
    block_size: int | None = None,
    labels: Any = None,
    seed: int = 0,
) -> NodeSearchResult:
    """Patch whole blocks of nodes, then the nodes one by one, those of the blocks with the largest effects first.

    Args:
        subset_effects: From masks, bool `[m, n_nodes]`, to the effect of patching each row's nodes at once, `[m]`.
        n_nodes: How many nodes there are.
        block_size: Nodes per block, from 1; the blocks are then random. Give this or `labels`.
        labels: Which block each node is in, any integers `[n_nodes]`: such as one per layer and position.
        seed: Of random blocks.

    Returns:
        The search; its setup cost is the number of blocks. Within a block the lower id comes first, between blocks
        with equal effects the one with the lower label (random ones: at random).

    Raises:
        InvalidInputError: Not exactly one of `block_size` and `labels`, or a number out of range.
        ShapeError: `labels` are not one per node.

    Source: Kramár et al. 2403.00745.
    """
    where = "blocks"
    _check_n_nodes(n_nodes, where)
    if (block_size is None) == (labels is None) or (block_size is not None and block_size < 1):
        raise InvalidInputError(
            four_part(
                f"block_size={block_size}, labels={'None' if labels is None else '...'} was given",
                where=where,
                expected="one of the two: a block_size from 1 for random blocks, or labels for blocks of your own.",
                fix="for random blocks of eight nodes give block_size=8.",
            )
        )
    if block_size is not None:
        labels = np.empty(n_nodes, np.int64)
        labels[np.random.default_rng(seed).permutation(n_nodes)] = np.arange(n_nodes) // block_size
    labels = np.asarray(labels)
    if labels.shape != (n_nodes,):
        raise ShapeError(
            four_part(
                f"Labels of shape {list(labels.shape)} were given",
                where=where,
                expected=f"one label per node, [{n_nodes}].",
                fix="give each node the number of its block.",
            )
        )
    kinds, block_of = np.unique(labels, return_inverse=True)
    sizes = np.abs(_patched(subset_effects, [np.flatnonzero(block_of == b) for b in range(len(kinds))], n_nodes, where))
    # By block, largest first, then by label, then by id.
    order = np.lexsort((np.arange(n_nodes), block_of, -sizes[block_of]))
    return _verified_after(where, order, float(len(kinds)))


def hierarchical(
    subset_effects: SubsetEffects,
    n_nodes: int,
    *,
    n_children: int = 2,
    order: Any = None,
    seed: int = 0,
    max_forwards: int | None = None,
) -> NodeSearchResult:
    """Split the group with the largest effect and patch its parts, again and again; single nodes are then verified.

    Args:
        subset_effects: From masks, bool `[m, n_nodes]`, to the effect of patching each row's nodes at once, `[m]`.
        n_nodes: How many nodes there are.
        n_children: Into how many parts a group is split, from 2; their sizes differ by one at most.
        order: The nodes in the order in which they are cut into groups, a permutation of all ids: neighbours stay
            together longest. Random by default.
        seed: Of the random order.
        max_forwards: Split no more after so many passes, and verify what is left node by node, the groups with the
            largest effects first; by default the last group is split, too.

    Returns:
        The search. Patching all nodes costs n_nodes * n_children / (n_children - 1) at most if n_nodes is a power of
        n_children, and below 2 n_nodes for any other.

    Raises:
        InvalidInputError: There is no node, `n_children` is below 2, `max_forwards` is negative, or `order` is no
            permutation.

    Source: Kramár et al. 2403.00745.
    """
    where = "hierarchical"
    _check_n_nodes(n_nodes, where)
    nodes = np.random.default_rng(seed).permutation(n_nodes) if order is None else np.asarray(order)
    is_permutation = nodes.shape == (n_nodes,) and np.array_equal(np.sort(nodes), np.arange(n_nodes))
    faults = [f"n_children={n_children}"] if n_children < 2 else []
    faults += [f"max_forwards={max_forwards}"] if max_forwards is not None and max_forwards < 0 else []
    faults += [] if is_permutation else ["an order that is no permutation"]
    if faults:
        raise InvalidInputError(
            four_part(
                f"{', '.join(faults)} was given",
                where=where,
                expected=f"n_children from 2; max_forwards from 0; as order each id from 0 to {n_nodes - 1} once.",
                fix="use two children and a random order, which is the default.",
            )
        )
    found, cost_of, cost, setup_cost = [], np.zeros(n_nodes), 0, None
    # Largest effect first; of equal ones the group that comes first in the order.
    queue = [(-np.inf, 0, n_nodes)]
    while queue:
        _, start, stop = heapq.heappop(queue)
        if max_forwards is not None and cost >= max_forwards:
            setup_cost = cost if setup_cost is None else setup_cost
            found.extend(nodes[start:stop])
            cost_of[nodes[start:stop]] = cost + 1 + np.arange(stop - start)
            cost += stop - start
            continue
        n_parts = min(n_children, stop - start)
        edges = [start + (stop - start) * i // n_parts for i in range(n_parts + 1)]
        parts = list(itertools.pairwise(edges))
        effects = _patched(subset_effects, [nodes[a:b] for a, b in parts], n_nodes, where)
        for (a, b), effect in zip(parts, effects, strict=True):
            if b - a > 1:
                heapq.heappush(queue, (-abs(float(effect)), a, b))
                cost += 1
                continue
            setup_cost = cost if setup_cost is None else setup_cost
            cost += 1
            found.append(nodes[a])
            cost_of[nodes[a]] = cost
    return NodeSearchResult(where, np.array(found), cost_of, float(setup_cost or 0))


def _patched(subset_effects: SubsetEffects, groups: list[np.ndarray], n_nodes: int, where: str) -> np.ndarray:
    """The effect of patching each group."""
    step = max(1, 2**24 // n_nodes)
    effects = []
    for start in range(0, len(groups), step):
        masks = np.zeros((len(groups[start : start + step]), n_nodes), bool)
        for row, group in enumerate(groups[start : start + step]):
            masks[row, group] = True
        effects.append(checked_effects(subset_effects, masks, where=where))
    return np.concatenate(effects)


def _verified_after(method: str, order: np.ndarray, setup_cost: float) -> NodeSearchResult:
    """A search that is done with its setup before it verifies the first node."""
    cost_of = np.empty(len(order))
    cost_of[order] = setup_cost + 1 + np.arange(len(order))
    return NodeSearchResult(method, order, cost_of, setup_cost)


def _check_n_nodes(n_nodes: int, where: str) -> None:
    if n_nodes < 1:
        raise InvalidInputError(
            four_part(
                "An empty set of nodes was given",
                where=where,
                expected="at least one node.",
                fix="choose sites that the model has and positions of the prompt.",
            )
        )
