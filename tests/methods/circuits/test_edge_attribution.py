"""Edge attribution against exact patching, against itself by another route, and against closed forms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.forward.metrics import logit_difference
from interp_jax.methods.circuits.edge_attribution import edge_attribution, integration_points
from interp_jax.methods.circuits.edge_passes import patched_edges, sender_writes
from interp_jax.models.loading import load
from interp_jax.transforms.compilations import count_compilations
from tests.conftest import ORACLES
from tests.methods.circuits.induction import CIRCUIT, CLEAN, CORRUPTED, induction_model
from tests.methods.circuits.toys import toy

METRIC = logit_difference(3, 7)


def attribute(lm, pair, metric: Any = METRIC, **options: Any):
    return edge_attribution(lm, pair[0], pair[1], metric, progress=False, **options)


def exact_effects(lm, pair, metric, graph):
    """Every edge patched alone."""
    edges = np.argwhere(graph.is_edge)
    masks = np.zeros((len(edges) + 1, *graph.shape), np.float32)
    masks[np.arange(len(edges)), edges[:, 0], edges[:, 1]] = 1
    writes = sender_writes(lm, pair[1])

    def value(mask, metric):
        return metric(patched_edges(lm, lm.params, pair[0], writes, mask)).mean()

    values = jax.jit(jax.vmap(value, in_axes=(0, None)))(masks, metric)
    effects = np.zeros(graph.shape)
    effects[tuple(edges.T)] = values[:-1] - values[-1]
    return effects


@pytest.mark.parametrize("is_parallel", [False, True], ids=["sequential", "parallel"])
def test_on_a_linear_model_every_score_is_the_exact_effect(rng, pair, is_parallel):
    lm = toy(rng, "linear", n_heads=2, n_kv_heads=1, is_parallel=is_parallel)
    result = attribute(lm, pair)
    np.testing.assert_allclose(result.scores, exact_effects(lm, pair, METRIC, result.graph), rtol=1e-3, atol=2e-5)
    # Edges into the logits are each sender's own logit attribution.
    difference = np.asarray(sender_writes(lm, pair[1]) - sender_writes(lm, pair[0]))[:, :, -1].mean(1)
    direction = np.asarray(lm.params["W_U"][:, 3] - lm.params["W_U"][:, 7])
    np.testing.assert_allclose(result.scores[:, -1], difference @ direction, rtol=1e-3, atol=1e-5)
    assert result.scores[:, -1].sum() == pytest.approx(float((result.corrupted - result.clean).mean()), rel=1e-3)


SHAPES = {
    "sequential": {},
    "grouped-parallel": {"n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "is_parallel": True},
    "attention-only": {"n_layers": 1, "d_mlp": 0},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_gradient_is_the_same_by_another_route(rng, pair, shape):
    lm = toy(rng, **SHAPES[shape])
    by_input, by_mask = attribute(lm, pair), attribute(lm, pair, method="mask_gradient")
    largest = np.abs(by_input.scores).max()
    np.testing.assert_allclose(by_input.scores, by_mask.scores, rtol=1e-4, atol=1e-5 * largest)
    assert largest > 1e-3
    assert (by_input.scores[~by_input.graph.is_edge] == 0).all()


def test_the_mask_gradient_on_upstream():
    check_mask_gradient(load(ORACLES / "tiny_gpt2"))


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "stacked"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gptj", "opt", "neox", "gpt_neo"])
def test_the_mask_gradient_on_every_family(name, stacked):
    check_mask_gradient(load(ORACLES / f"tiny_{name}", stacked=stacked))


def check_mask_gradient(lm):
    pair = np.array([[5, 80, 3, 7]], np.int32), np.array([[5, 81, 3, 9]], np.int32)
    by_input, by_mask = attribute(lm, pair), attribute(lm, pair, method="mask_gradient")
    largest = np.abs(by_input.scores).max()
    assert largest > 1e-3
    np.testing.assert_allclose(by_input.scores, by_mask.scores, rtol=1e-3, atol=1e-4 * largest)


def test_scores_are_means_over_examples_and_first_order(rng, pair):
    lm = toy(rng)
    both = attribute(lm, pair)
    halves = [attribute(lm, tuple(part[[i, i]] for part in pair)).scores for i in range(2)]
    np.testing.assert_allclose(both.scores, np.mean(halves, axis=0), rtol=1e-4, atol=1e-6)
    # The error of the estimate shrinks with the square of the step.
    writes = [sender_writes(lm, part) for part in pair]
    edge = np.zeros(both.graph.shape, np.float32)
    edge[0, both.graph.receiver("0.mlp")] = 1
    value = jax.jit(lambda mask, metric: metric(patched_edges(lm, lm.params, pair[0], writes[1], mask)).mean())
    clean, score = float(value(0 * edge, METRIC)), both.score("input", "0.mlp")
    errors = [abs(float(value(np.float32(step) * edge, METRIC)) - clean - step * score) for step in (0.1, 0.05)]
    assert errors[1] < 0.35 * errors[0] + 1e-5


@pytest.mark.parametrize(
    ("rule", "expected"), [("right", 1.32), ("left", 0.72), ("midpoint", 0.99), ("trapezoid", 1.02)]
)
def test_integration_of_a_cube(rng, rule, expected):
    """The metric is the cube of what the input writes, which goes from 1 to 0; five steps."""
    lm = toy(rng, "linear", n_layers=1, n_heads=1, d_model=1, d_head=1, d_vocab=2, n_ctx=1, d_mlp=0)
    layer = {name: 0 * weight for name, weight in lm.params["layers"][0].items()}
    params = lm.params | {"W_E": jnp.array([[0.0], [1.0]]), "W_pos": jnp.zeros((1, 1)), "W_U": jnp.ones((1, 2))}
    object.__setattr__(lm, "params", params | {"layers": [layer]})
    pair = np.array([[1]], np.int32), np.array([[0]], np.int32)
    result = attribute(lm, pair, cube, method="eap_ig", n_steps=5, rule=rule)
    assert result.score("input", "logits") == pytest.approx(-expected, rel=1e-5)
    assert (result.clean, result.corrupted) == (1, 0)
    assert attribute(lm, pair, cube).score("input", "logits") == pytest.approx(-3)


def cube(logits):
    return logits[:, -1, 0] ** 3


def test_edges_out_of_the_input_add_up_to_the_whole_effect(rng, pair):
    lm = toy(rng)
    gaps = []
    for n_steps in (4, 64):
        result = attribute(lm, pair, method="eap_ig", n_steps=n_steps)
        gaps.append(abs(result.scores[0].sum() - float((result.corrupted - result.clean).mean())))
    assert gaps[1] < 2e-3 + 0.1 * gaps[0]
    # Through the space of masks it is another integral, for which all edges together add up.
    masks = attribute(lm, pair, method="mask_ig", n_steps=64)
    assert masks.scores.sum() == pytest.approx(float((masks.corrupted - masks.clean).mean()), abs=2e-2)
    assert np.abs(masks.scores - result.scores).max() > 1e-2


def test_the_induction_circuit_is_recovered():
    lm = induction_model()
    assert int(lm(CLEAN)[0, -1].argmax()) == 4
    for method in ("eap", "eap_ig"):
        result = attribute(lm, (CLEAN, CORRUPTED), logit_difference(4, 0), method=method)
        assert set(result.top(5).edges) == set(result.greedy(5).edges) == CIRCUIT
        assert result.top(5).pruned().n_edges == 5
        others = ~result.top(5).is_kept
        assert np.abs(result.scores[others]).max() == 0
    assert [edge[:2] for edge in result.strongest(5)] == [
        result.strongest(5)[i][:2] for i in np.argsort([-abs(edge[2]) for edge in result.strongest(5)], kind="stable")
    ]
    assert "EdgeAttributionResult(29 edges; strongest: " in repr(result)


def test_steps_and_prompts_compile_nothing_new(rng, pair):
    lm = toy(rng, d_model=9)
    attribute(lm, pair, method="eap_ig", n_steps=2)
    with count_compilations() as new:
        attribute(lm, pair[::-1], logit_difference(1, 2), method="eap_ig", n_steps=7, rule="left")
        attribute(lm, pair)
    assert new == []


def not_finite(logits):
    return jnp.log(0 * logits[:, -1, 0])


def test_mistakes_are_named(rng, pair):
    lm = toy(rng, n_layers=1)
    clean, corrupted = pair
    with pytest.raises(UnknownNameError, match=r"Unknown method 'eap-ig'[\s\S]*Did you mean 'eap_ig'[\s\S]*Fix:"):
        attribute(lm, pair, method="eap-ig")
    with pytest.raises(UnknownNameError, match="Unknown rule 'middle'"):
        attribute(lm, pair, rule="middle")
    with pytest.raises(InvalidInputError, match=r"n_steps=0[\s\S]*Fix:"):
        integration_points("left", 0)
    with pytest.raises(ShapeError, match=r"Clean tokens \[2, 5\] and corrupted tokens \[2, 4\][\s\S]*Fix:"):
        attribute(lm, (clean, corrupted[:, 1:]))
    padded = np.where(np.arange(5) == 0, -1, clean).astype(np.int32)
    with pytest.raises(InvalidInputError, match=r"rows \[0, 1\] are padded at different places"):
        attribute(lm, (padded, corrupted))
    with pytest.raises(ShapeError, match=r"The metric returned float32\[2, 5\]"):
        attribute(lm, pair, lambda logits: logits[..., 0])
    with pytest.raises(InvalidInputError, match=r"The metric is -inf \(4 of 4 numbers are not finite\)[\s\S]*Fix:"):
        attribute(lm, pair, not_finite)
    with pytest.warns(UserWarning, match=r"Rows \[0, 1\] are the same clean and corrupted"):
        assert (attribute(lm, (clean, clean)).scores == 0).all()
