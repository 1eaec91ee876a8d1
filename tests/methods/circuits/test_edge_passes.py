"""Passes over edges: nothing, everything and anything in between, against upstream and against NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import ShapeError, UnsupportedModelError
from interp_jax.methods.circuits.edge_model import edge_graph
from interp_jax.methods.circuits.edge_passes import patched_edges, sender_writes
from interp_jax.models.loading import load
from tests.conftest import ORACLES
from tests.methods.circuits.toys import Plain, toy

TOYS = {
    "sequential": {},
    "grouped": {"n_heads": 4, "n_kv_heads": 2},
    "parallel": {"is_parallel": True, "n_kv_heads": 1},
    "attention only": {"d_mlp": 0},
}


def patching(lm):
    return jax.jit(lambda tokens, writes, mask: patched_edges(lm, lm.params, tokens, writes, mask))


@pytest.mark.parametrize("kind", TOYS)
def test_any_mask_is_what_numpy_computes_edge_by_edge(kind, rng, pair):
    lm = toy(rng, **TOYS[kind])
    clean, corrupted = pair
    plain, graph, patch = Plain(lm), edge_graph(lm), patching(lm)
    _, writes, _ = plain.run(corrupted, lambda u, v, write: write)
    np.testing.assert_allclose(sender_writes(lm, corrupted), writes, rtol=1e-4, atol=1e-5)
    for mask in (rng.random(graph.shape), (rng.random(graph.shape) < 0.3).astype(float), np.eye(*graph.shape)):
        actual = patch(clean, np.asarray(writes, np.float32), mask.astype(np.float32))
        np.testing.assert_allclose(actual, plain.patched(clean, writes, mask), rtol=1e-4, atol=2e-5)


def check_ends(lm, clean, corrupted):
    """Mask 0 is the model, mask 1 is the corrupted run; entries that are no edge count for nothing."""
    graph, patch, writes = edge_graph(lm), patching(lm), sender_writes(lm, corrupted)
    is_token = clean >= 0
    largest = float(np.abs(lm(clean)).max())
    none = patch(clean, writes, (~graph.is_edge).astype(np.float32))
    np.testing.assert_allclose(none[is_token], lm(clean)[is_token], rtol=0, atol=2e-6 * largest)
    every = patch(clean, writes, np.ones(graph.shape, np.float32))
    np.testing.assert_allclose(every[is_token], lm(corrupted)[is_token], rtol=0, atol=2e-6 * largest)
    assert float(np.abs(lm(clean) - lm(corrupted))[is_token].max()) > 1e-2
    return patch, writes


def test_upstream_models_with_padding(tiny, rng):
    clean, corrupted = np.array([[-1, 5, 80, 3], [9, 2, 7, 1]], np.int32), np.array([[-1, 6, 80, 4], [9, 1, 7, 2]])
    patch, _ = check_ends(tiny, clean, corrupted.astype(np.int32))
    if tiny.config.family != "gpt2":
        return
    clean, corrupted, plain = clean[1:], corrupted[1:], Plain(tiny)
    writes, mask = sender_writes(tiny, corrupted), rng.random(plain.graph.shape)
    actual = patch(clean, writes, mask.astype(np.float32))
    np.testing.assert_allclose(actual, plain.patched(clean, np.asarray(writes), mask), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "stacked"])
@pytest.mark.parametrize("name", ["mistral", "gptj", "opt", "neox", "gpt_neo", "llama"])
def test_every_family(name, stacked):
    clean, corrupted = np.array([[5, 80, 3, 7], [-1, 6, 0, 9]], np.int32), np.array([[5, 81, 3, 9], [-1, 7, 0, 12]])
    check_ends(load(ORACLES / f"tiny_{name}", stacked=stacked), clean, corrupted.astype(np.int32))


def test_what_does_not_fit_is_refused(rng, pair):
    lm = toy(rng)
    clean, corrupted = pair
    writes, graph = sender_writes(lm, corrupted), edge_graph(lm)
    with pytest.raises(ShapeError, match=r"mask \[15, 7\] was given in patched_edges[\s\S]*\[7, 15\][\s\S]*Fix:"):
        patched_edges(lm, lm.params, clean, writes, np.zeros(graph.shape[::-1]))
    with pytest.raises(ShapeError, match=r"corrupted_writes \[7, 2, 5, 8\][\s\S]*\[7, 2, 4, 8\]"):
        patched_edges(lm, lm.params, clean[:, 1:], writes, np.zeros(graph.shape))
    with pytest.raises(UnsupportedModelError, match=r"without a config[\s\S]*Fix:"):
        edge_graph(dataclasses.replace(lm, config=None))
    lacking = dataclasses.replace(lm.upstream, layer_weights={"W_Q": lm.upstream.layer_weights["W_Q"]})
    with pytest.raises(UnsupportedModelError, match="the weight W_K, the weight W_V, the weight W_O, the weight ln1_w"):
        edge_graph(dataclasses.replace(lm, upstream=lacking))


def test_a_model_whose_writes_do_not_add_up_is_refused(rng, pair):
    lm = toy(rng)
    weights = {
        **lm.upstream.layer_weights,
        "W_O": lambda layer: 2 * layer["W_O"],
        "ln1_w": lambda layer: -layer["ln1_w"],
    }
    wrong = dataclasses.replace(lm, upstream=dataclasses.replace(lm.upstream, layer_weights=weights))
    with pytest.raises(
        UnsupportedModelError, match=r"ln1 is not the norm of its weights[\s\S]*do not add up[\s\S]*Fix:"
    ):
        sender_writes(wrong, pair[0])


def test_the_gradient_by_the_mask_is_finite_differences(rng, pair):
    lm = toy(rng, n_layers=1)
    writes, graph = sender_writes(lm, pair[1]), edge_graph(lm)
    at, direction = (jnp.asarray(rng.random(graph.shape), jnp.float32) for _ in range(2))

    @jax.jit
    def value(mask):
        return patched_edges(lm, lm.params, pair[0], writes, mask)[:, -1, 3].sum()

    exact = float((jax.grad(value)(at) * direction).sum())
    steps = 1e-2 * direction
    assert float(value(at + steps) - value(at - steps)) / 2e-2 == pytest.approx(exact, rel=1e-2, abs=1e-3)
