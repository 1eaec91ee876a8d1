"""Node sets: numbering, grids, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.core.sites import Site
from interp_jax.forward.nodes import Node, check_pair, node_set

TOKENS = np.arange(1, 7, dtype=np.int32)[None]


def test_nodes_are_numbered_by_name_layer_position_and_unit(tiny_llama) -> None:
    config = tiny_llama.config
    nodes = node_set(tiny_llama, TOKENS, ["q", "k", "mlp_post", "resid_pre", "embed"], positions=[2, -1])
    units = {"q": config.n_heads, "k": config.n_kv_heads, "mlp_post": config.d_mlp, "resid_pre": 1}
    expected = [
        Node(Site(layer, name), position, unit if name != "resid_pre" else None)
        for name, n_units in units.items()
        for layer in range(config.n_layers)
        for position in (2, 5)
        for unit in range(n_units)
    ]
    expected += [Node(Site(None, "embed"), position, None) for position in (2, 5)]
    assert list(nodes) == expected
    assert len(nodes) == nodes.n_nodes == len(expected)
    scores = np.arange(nodes.n_nodes)
    for name in units:
        grid = nodes.grid(name, scores)
        for (layer, position, unit), number in np.ndenumerate(grid):
            node = nodes[int(number)]
            assert node.site == Site(layer, name)
            assert (node.position, node.unit or 0) == ((2, 5)[position], unit)


def test_pooled_nodes_cover_all_positions(tiny_llama) -> None:
    nodes = node_set(tiny_llama, TOKENS, "z", layers=[1], positions=[0, 3], is_pooled=True)
    assert [str(node) for node in nodes][1] == "1.z, unit 1, all positions"
    np.testing.assert_array_equal(nodes.group("z").position_masks(6), [[True, False, False, True, False, False]])


def test_ties_are_in_order_of_the_numbers(tiny_llama) -> None:
    nodes = node_set(tiny_llama, TOKENS, "mlp_out", positions=[0, 1])
    assert nodes.order([1.0, -3.0, 3.0, 0.0, 1.0, -1.0]).tolist() == [1, 2, 0, 4, 5, 3]
    assert [score for _, score in nodes.top([1.0, -3.0, 3.0, 0.0, 1.0, -1.0], 2)] == [-3.0, 3.0]


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (UnknownNameError, r"Unknown site 'zz'.*Did you mean 'z'", {"names": ["zz"]}),
        (UnknownNameError, r"Unknown site '7\.z'", {"layers": [7]}),
        (InvalidInputError, "pattern was given", {"names": ["pattern"]}),
        (InvalidInputError, "An empty set of nodes", {"names": []}),
        (InvalidInputError, "An empty set of nodes", {"positions": []}),
        (InvalidInputError, "An empty set of nodes", {"layers": []}),
        (InvalidInputError, r"positions=\[6\]", {"positions": [6]}),
        (InvalidInputError, r"positions=\[1, -5\]", {"positions": [1, -5]}),
    ],
)
def test_mistakes(tiny_llama, error, words, arguments) -> None:
    with pytest.raises(error, match=words):
        node_set(tiny_llama, TOKENS, **{"names": ["z"], **arguments})


def test_scores_of_other_nodes_are_refused(tiny_llama) -> None:
    nodes = node_set(tiny_llama, TOKENS, "mlp_out")
    with pytest.raises(ShapeError, match=r"Scores of shape \[3\].*"):
        nodes.grid("mlp_out", np.zeros(3))
    with pytest.raises(UnknownNameError, match="Unknown name 'z'"):
        nodes.grid("z", np.zeros(nodes.n_nodes))
    with pytest.raises(IndexError):
        nodes[nodes.n_nodes]


def test_pairs_that_are_not_aligned_are_refused(tiny_llama) -> None:
    with pytest.raises(ShapeError, match=r"Clean tokens \[1, 6\] and corrupted tokens \[1, 5\] were given in test"):
        check_pair(tiny_llama, TOKENS, TOKENS[:, 1:], where="test")
    padded = TOKENS.copy()
    padded[0, 0] = -1
    with pytest.raises(InvalidInputError, match=r"rows \[0\] are padded at different places were given in test"):
        check_pair(tiny_llama, TOKENS, padded, where="test")
    with pytest.warns(UserWarning, match=r"Rows \[0\] are the same clean and corrupted \(test\)"):
        check_pair(tiny_llama, TOKENS, TOKENS, where="test")
