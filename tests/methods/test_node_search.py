"""Searches: their orders and costs are those of their definitions, and cancelling nodes hide from groups."""

from __future__ import annotations

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.methods.node_search import blocks, by_scores, hierarchical, random_order, subsampling


class Patching:
    """Effects that add up, and a count of what was patched."""

    def __init__(self, effects):
        self.effects = np.asarray(effects, float)
        self.n_patched, self.groups = 0, []

    def __call__(self, masks):
        self.n_patched += len(masks)
        self.groups += [tuple(np.flatnonzero(row).tolist()) for row in masks]
        return masks @ self.effects


SEARCHES = {
    "random": lambda patching, n: random_order(n, seed=1),
    "scores": lambda patching, n: by_scores(patching.effects),
    "subsampling": lambda patching, n: subsampling(patching, n, n_subsets=30, probability=0.3, seed=1),
    "blocks": lambda patching, n: blocks(patching, n, block_size=3, seed=1),
    "hierarchical": lambda patching, n: hierarchical(patching, n, n_children=3, seed=1),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("n_nodes", [1, 2, 11])
@pytest.mark.parametrize("is_flat", [False, True])
def test_every_search_verifies_every_node_once_and_repeats(rng, search, n_nodes, is_flat):
    effects = np.zeros(n_nodes) if is_flat else rng.normal(size=n_nodes)
    result, again = (SEARCHES[search](Patching(effects), n_nodes) for _ in range(2))
    assert sorted(result.order.tolist()) == list(range(n_nodes))
    # Costs rise along the order, by one at least.
    assert (np.diff(result.cost_of[result.order], prepend=result.setup_cost) >= 1).all()
    np.testing.assert_array_equal(result.order, again.order)
    np.testing.assert_array_equal(result.cost_of, again.cost_of)
    assert f"{n_nodes} nodes" in repr(result)


def test_random_order_costs_one_pass_a_node():
    result = random_order(50, seed=3)
    assert result.setup_cost == 0
    assert result.cost_of[result.order].tolist() == list(range(1, 51))
    assert result.order.tolist() != list(range(50))
    assert result.order.tolist() != random_order(50, seed=4).order.tolist()


def test_scores_decide_and_their_passes_count():
    result = by_scores([1.0, 3.0, 3.0, 2.0], n_forwards=2, n_backwards=30, backward_cost=1.5, method="AtP*")
    assert result.order.tolist() == [1, 2, 3, 0]
    assert result.setup_cost == 47
    assert result.cost_of.tolist() == [51, 48, 49, 50]
    assert by_scores([1.0]).setup_cost == 4


def test_subsampling_ranks_by_the_size_of_the_effect(rng):
    patching = Patching([0.1, -4.0, 2.0, 0.0, 1.0])
    result = subsampling(patching, 5, n_subsets=2000, probability=0.4, seed=0)
    assert result.order[:3].tolist() == [1, 2, 4]
    assert result.setup_cost == patching.n_patched == 2000


def test_subsampling_puts_last_what_it_never_saw():
    # One subset: no node is both in a subset and outside of another.
    result = subsampling(Patching([5.0, 1.0]), 2, n_subsets=1, probability=0.5)
    assert result.order.tolist() == [0, 1]
    # With a rare p some nodes are seen and some are not; those that are not come last, in order.
    patching = Patching(np.arange(1.0, 41.0))
    result = subsampling(patching, 40, n_subsets=12, probability=0.05, seed=1)
    seen = sorted(set().union(*patching.groups))
    assert 0 < len(seen) < 40
    assert sorted(result.order[: len(seen)].tolist()) == seen
    assert result.order[len(seen) :].tolist() == [node for node in range(40) if node not in seen]


def test_blocks_of_ones_own():
    patching = Patching([0.0, -5.0, 1.0, 2.0, 2.0, 0.0])
    result = blocks(patching, 6, labels=[7, 3, 3, 7, 5, 5])
    # Effects by label: 3 has -4, 5 has 2, 7 has 2; between equals the lower label, within a block the lower id.
    assert result.order.tolist() == [1, 2, 4, 5, 0, 3]
    assert patching.groups == [(1, 2), (4, 5), (0, 3)]
    assert result.setup_cost == 3
    assert result.cost_of[1] == 4


def test_random_blocks_have_their_size(rng):
    patching = Patching(rng.normal(size=11))
    result = blocks(patching, 11, block_size=4, seed=5)
    assert sorted(map(len, patching.groups)) == [3, 4, 4]
    assert sorted(sum(patching.groups, ())) == list(range(11))
    assert result.setup_cost == 3


def test_nodes_that_cancel_hide_in_their_block():
    effects = [1.0, -1.0, 0.2, 0.0, 0.1, 0.0]
    result = blocks(Patching(effects), 6, labels=[0, 0, 1, 1, 2, 2])
    assert result.order.tolist() == [2, 3, 4, 5, 0, 1]
    found = hierarchical(Patching(effects), 6, n_children=3, order=range(6))
    assert found.order.tolist() == [2, 3, 4, 5, 0, 1]
    # Apart, they are found first.
    assert blocks(Patching(effects), 6, labels=[0, 1, 0, 1, 2, 2]).order[:4].tolist() == [0, 2, 1, 3]


def test_hierarchical_goes_down_where_the_effect_is():
    patching = Patching([0, 0, 0, 0, 0, 9, 0, 1])
    result = hierarchical(patching, 8, order=range(8))
    assert patching.groups[:6] == [(0, 1, 2, 3), (4, 5, 6, 7), (4, 5), (6, 7), (4,), (5,)]
    assert result.order[:4].tolist() == [4, 5, 6, 7]
    assert result.cost_of[[4, 5, 6, 7]].tolist() == [5, 6, 7, 8]
    assert result.setup_cost == 4


def test_hierarchical_stops_splitting_when_its_passes_are_spent():
    patching = Patching([0, 0, 2, 0, 0, 9, 0, 1])
    result = hierarchical(patching, 8, order=range(8), max_forwards=4)
    # Four passes say that 4 and 5 matter most, then nodes 0 to 3, then 6 and 7; from there on it patches single nodes.
    assert patching.groups == [(0, 1, 2, 3), (4, 5, 6, 7), (4, 5), (6, 7)]
    assert result.order.tolist() == [4, 5, 0, 1, 2, 3, 6, 7]
    assert result.cost_of[result.order].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert result.setup_cost == 4
    assert hierarchical(patching, 8, order=range(7, -1, -1), max_forwards=0).order.tolist() == list(range(7, -1, -1))


@pytest.mark.parametrize(
    ("n_nodes", "n_children"), [(1, 2), (8, 2), (9, 3), (16, 4), (64, 4), (16, 8), (7, 2), (10, 4), (5, 9)]
)
def test_hierarchical_costs_no_more_than_it_says(rng, n_nodes, n_children):
    patching = Patching(rng.normal(size=n_nodes))
    result = hierarchical(patching, n_nodes, n_children=n_children, seed=2)
    assert result.cost_of.max() == patching.n_patched
    is_power = n_nodes in n_children ** np.arange(10)
    assert patching.n_patched <= (n_nodes * n_children / (n_children - 1) if is_power else 2 * n_nodes)
    # It patches whole groups besides the nodes, and each node once.
    assert sorted(group[0] for group in patching.groups if len(group) == 1) == list(range(n_nodes))


ZERO = Patching(np.zeros(3))


@pytest.mark.parametrize(
    ("search", "error", "words"),
    [
        (lambda: random_order(0), InvalidInputError, "An empty set of nodes was given in random_order"),
        (lambda: by_scores([]), InvalidInputError, "An empty set of nodes was given in by_scores"),
        (lambda: by_scores([[1.0]]), ShapeError, r"\[1, 1\] were given in by_scores"),
        (lambda: by_scores([0.0, np.nan]), InvalidInputError, "NaN as the score of node 1"),
        (lambda: by_scores([0.0], n_backwards=-1), InvalidInputError, "n_backwards=-1"),
        (lambda: subsampling(ZERO, 3, n_subsets=0, probability=0.5), InvalidInputError, "n_subsets=0.*subsampling"),
        (lambda: subsampling(ZERO, 0, n_subsets=1, probability=0.5), InvalidInputError, "an empty set of nodes"),
        (lambda: blocks(ZERO, 3), InvalidInputError, "block_size=None, labels=None"),
        (lambda: blocks(ZERO, 3, block_size=1, labels=[1, 1, 1]), InvalidInputError, "labels=\\.\\.\\."),
        (lambda: blocks(ZERO, 3, block_size=0), InvalidInputError, "block_size=0"),
        (lambda: blocks(ZERO, 3, labels=[1, 2]), ShapeError, r"shape \[2\]"),
        (lambda: blocks(lambda masks: masks, 3, block_size=1), ShapeError, r"bool\[3, 3\]"),
        (lambda: hierarchical(ZERO, 3, n_children=1), InvalidInputError, "n_children=1"),
        (lambda: hierarchical(ZERO, 3, max_forwards=-1), InvalidInputError, "max_forwards=-1"),
        (lambda: hierarchical(ZERO, 3, order=[0, 0, 1]), InvalidInputError, "no permutation"),
    ],
    ids=lambda value: "call" if callable(value) else None,
)
def test_what_cannot_be_searched_is_refused(search, error, words):
    with pytest.raises(error, match=rf"{words}[\s\S]*Fix:"):
        search()
