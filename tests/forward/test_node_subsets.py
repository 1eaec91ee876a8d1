"""Subsets of nodes patched at once, against one plain intervention per subset."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.core.interventions import Masked
from interp_jax.forward.metrics import logit_difference
from interp_jax.forward.node_subsets import subset_patching
from interp_jax.forward.nodes import NodeGroup, NodeSet, node_set
from interp_jax.methods.node_diagnostics import bound_missed_nodes, verify_top_nodes
from interp_jax.methods.node_search import blocks, hierarchical
from interp_jax.transforms.compilations import count_compilations

METRIC = logit_difference(3, 7)
CLEAN = np.array([[-1, 5, 9, 2, 30], [4, 8, 1, 6, 11]], np.int32)
CORRUPTED = np.array([[-1, 5, 12, 2, 30], [4, 3, 1, 7, 11]], np.int32)


@pytest.fixture(scope="module")
def patching(tiny_llama: Any) -> Any:
    """Heads (grouped for k), neurons and whole vectors of two layers at two positions."""
    nodes = node_set(tiny_llama, CLEAN, ["q", "k", "z", "mlp_post", "attn_out"], layers=[0, 2], positions=[2, 4])
    return subset_patching(tiny_llama, CLEAN, CORRUPTED, METRIC, nodes, rows_per_step=16)


def by_intervention(lm: Any, nodes: NodeSet, mask: np.ndarray) -> np.ndarray:
    """The truth: one pass with a `Masked` at each site, filled node by node."""
    values = lm.reap(CORRUPTED, nodes.sites)
    masks = {site: np.zeros(values[site].shape, bool) for site in nodes.sites}
    for number in np.flatnonzero(mask):
        node = nodes[int(number)]
        at = slice(None) if node.position is None else node.position
        masks[node.site][(slice(None), at) if node.unit is None else (slice(None), at, node.unit)] = True
    patched = lm.intervene(CLEAN, {site: Masked(values[site], masks[site]) for site in nodes.sites})
    return np.asarray(METRIC(patched)) - np.asarray(METRIC(lm(CLEAN)))


def test_each_subset_is_one_pass_with_all_its_nodes_patched(tiny_llama, patching, rng):
    nodes = patching.nodes
    masks = rng.random((3, nodes.n_nodes)) < np.array([0.02, 0.2, 0.7])[:, None]
    effects = patching.per_pair(masks)
    assert effects.shape == (2, 3)
    for i, mask in enumerate(masks):
        np.testing.assert_allclose(effects[:, i], by_intervention(tiny_llama, nodes, mask), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(patching(masks), effects.mean(0), rtol=1e-5)
    assert np.abs(effects).max() > 1e-3


def test_a_subset_of_one_is_one_node_and_none_is_nothing(tiny_llama, patching, rng):
    nodes = patching.nodes
    ids = np.sort(rng.choice(nodes.n_nodes, 4, replace=False))
    masks = np.eye(nodes.n_nodes, dtype=bool)[ids]
    truth = np.stack([by_intervention(tiny_llama, nodes, mask) for mask in masks], axis=1)
    np.testing.assert_allclose(patching.per_pair(masks), truth, rtol=1e-4, atol=2e-5)
    assert (patching(np.zeros((2, nodes.n_nodes), bool)) == 0).all()
    assert patching.per_pair(np.zeros((0, nodes.n_nodes), bool)).shape == (2, 0)


def test_equal_prompts_have_no_effect_at_all(tiny_llama, patching):
    mixed = np.stack([CLEAN[0], CORRUPTED[1]])
    with pytest.warns(UserWarning, match=r"Rows \[0\] are the same clean and corrupted"):
        half = subset_patching(tiny_llama, CLEAN, mixed, METRIC, patching.nodes, rows_per_step=16)
    effects = half.per_pair(np.ones((1, patching.nodes.n_nodes), bool))
    assert effects[0] == 0 and effects[1] != 0


def test_other_subsets_and_prompts_compile_nothing(tiny_llama, patching, rng):
    nodes = patching.nodes
    with count_compilations() as new:
        patching(rng.random((21, nodes.n_nodes)) < 0.1)
    assert new == []


def test_all_inputs_patched_make_the_other_prompt(tiny_llama):
    nodes = NodeSet((NodeGroup("embed", (None,), tuple(range(5)), is_pooled=True),), n_pos=5)
    effects = subset_patching(tiny_llama, CLEAN, CORRUPTED, METRIC, nodes, rows_per_step=2).per_pair(np.array([[True]]))
    expected = np.asarray(METRIC(tiny_llama(CORRUPTED))) - np.asarray(METRIC(tiny_llama(CLEAN)))
    np.testing.assert_allclose(effects[:, 0], expected, rtol=1e-4, atol=2e-5)


def test_diagnostics_and_searches_run_on_it(patching):
    n_nodes = patching.nodes.n_nodes
    top = verify_top_nodes(np.arange(n_nodes), lambda ids: patching.per_pair(np.eye(n_nodes, dtype=bool)[ids]), top_k=5)
    assert sorted(top.ranking.tolist()) == list(range(n_nodes - 5, n_nodes))
    bound = bound_missed_nodes(patching, n_nodes, n_subsets=48, probability=0.3, verified=top.nodes)
    assert 0 < bound.bound(0.01) < np.inf
    found = blocks(patching, n_nodes, block_size=n_nodes // 8)
    assert sorted(found.order.tolist()) == list(range(n_nodes))
    few = hierarchical(lambda masks: patching(np.pad(masks, ((0, 0), (0, n_nodes - 8)))), 8)
    assert sorted(few.order.tolist()) == list(range(8))


def test_what_cannot_be_patched_is_refused(tiny_llama, patching):
    nodes = patching.nodes
    for masks in (np.zeros((1, 3), bool), np.zeros((1, nodes.n_nodes)), np.zeros(nodes.n_nodes, bool)):
        with pytest.raises(ShapeError, match=r"Masks of [\s\S]* were given[\s\S]*Fix:"):
            patching(masks)
    with pytest.raises(InvalidInputError, match=r"rows_per_step=0[\s\S]*Fix:"):
        subset_patching(tiny_llama, CLEAN, CORRUPTED, METRIC, nodes, rows_per_step=0)
    with pytest.raises(InvalidInputError, match=r"for prompts of 4[\s\S]*Fix:"):
        subset_patching(tiny_llama, CLEAN[:, 1:], CORRUPTED[:, 1:], METRIC, nodes)
    with pytest.raises(ShapeError, match=r"Clean tokens[\s\S]*Fix:"):
        subset_patching(tiny_llama, CLEAN, CORRUPTED[:1], METRIC, nodes)
    with pytest.raises(InvalidInputError, match=r"The metric is nan \(2 of 2 numbers[\s\S]*Fix:"):
        subset_patching(tiny_llama, CLEAN, CORRUPTED, lambda logits: jnp.log(-jnp.abs(logits[:, -1, 0])), nodes)
    with pytest.raises(ShapeError, match=r"The metric returned float32\[2, 5\][\s\S]*Fix:"):
        subset_patching(tiny_llama, CLEAN, CORRUPTED, lambda logits: logits[..., 0], nodes)
