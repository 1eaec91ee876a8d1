"""Activation patching against one plain intervention per node, closed forms, and itself resumed."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.core.interventions import Masked
from interp_jax.forward import node_effects as engine
from interp_jax.forward.metrics import logit_difference
from interp_jax.forward.nodes import NodeGroup, NodeSet, node_set
from interp_jax.methods.activation_patching import PatchingResult, ablation, activation_patching
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import layer_scope, sow

METRIC = logit_difference(3, 7)
NAMES = ["q", "k", "v", "z", "mlp_post", "resid_pre", "attn_out", "embed"]


@pytest.fixture
def pair(rng: np.random.Generator) -> Any:
    """Two pairs that share two tokens at the start; the first row of each is padded."""
    clean = rng.integers(1, 40, (2, 6)).astype(np.int32)
    corrupted = clean.copy()
    corrupted[:, 2] = (clean[:, 2] + 5) % 40
    corrupted[1, 4] = (clean[1, 4] + 9) % 40
    clean[0, 0] = corrupted[0, 0] = -1
    return clean, corrupted


def one_by_one(lm: Any, tokens: Any, values: Any, nodes: NodeSet, metric: Any) -> np.ndarray:
    """The truth: a whole pass for each node."""
    plain, effects = np.asarray(metric(lm(tokens))), []
    for node in nodes:
        value = values[node.site]
        mask = np.zeros(value.shape, bool)
        at: Any = slice(None) if node.position is None else node.position
        mask[(slice(None), at) if node.unit is None else (slice(None), at, node.unit)] = True
        effects.append(np.asarray(metric(lm.intervene(tokens, {node.site: Masked(value, mask)}))) - plain)
    return np.stack(effects, axis=1)


def chosen(nodes: NodeSet, rng: np.random.Generator, n: int) -> np.ndarray:
    return np.sort(rng.choice(nodes.n_nodes, n, replace=False))


@pytest.mark.parametrize("direction", ["noising", pytest.param("denoising", marks=pytest.mark.slow)])
def test_effects_are_those_of_one_pass_per_node(tiny, pair, direction) -> None:
    clean, corrupted = pair
    nodes = node_set(tiny, clean, NAMES[:-1], layers=[1], positions=[2, 5])
    result = activation_patching(tiny, clean, corrupted, METRIC, nodes, direction=direction, progress=False)
    tokens, source = pair if direction == "noising" else pair[::-1]
    truth = one_by_one(tiny, tokens, tiny.reap(source, nodes.sites), nodes, METRIC)
    np.testing.assert_allclose(result.effects, truth, rtol=1e-4, atol=2e-6)
    assert np.abs(truth).max() > 1e-3
    np.testing.assert_allclose(result.plain, METRIC(tiny(tokens)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(result.other), METRIC(tiny(source)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_smollm2_has_the_effects_that_three_other_tools_find(smollm2) -> None:
    """TransformerLens 4.3.0, nnsight 0.8.1 and a loop by hand in PyTorch 2.13, in float32, agree to these digits."""
    clean, corrupted = (
        smollm2.tokenize(f"Then, Mary and John went to the shop, and {name} gave a bag to") for name in ("John", "Mary")
    )
    mary, john = (int(smollm2.tokenize(name)[0, 0]) for name in (" Mary", " John"))
    nodes = node_set(smollm2, clean, ["resid_pre"])
    metric = logit_difference(mary, john)
    result = activation_patching(smollm2, clean, corrupted, metric, nodes, direction="denoising", progress=False)
    shares = nodes.grid("resid_pre", result.normalised[0])[..., 0]
    assert shares.shape == (30, 16)
    assert shares.sum() == pytest.approx(29.622, abs=1e-3)
    assert np.abs(shares).max() == pytest.approx(1.0207, abs=1e-4)
    assert shares[15, -1] == pytest.approx(-0.010772, abs=1e-6)


def test_any_metric_stacked_layers_and_steps_give_the_same(tiny_llama, pair, rng) -> None:
    clean, corrupted = pair
    nodes = node_set(tiny_llama, clean, ["z", "mlp_out"])

    def metric(logits: Any) -> Any:
        return jax.nn.log_softmax(logits)[:, :, 5].mean(-1)

    results = [
        activation_patching(lm, clean, corrupted, metric, nodes, rows_per_step=rows, progress=False)
        for lm, rows in ((tiny_llama, None), (tiny_llama, 3), (tiny_llama.stacked(), None))
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result.effects, results[0].effects, rtol=1e-4, atol=2e-6)
    some = chosen(nodes, rng, 6)
    truth = one_by_one(tiny_llama, clean, tiny_llama.reap(corrupted, nodes.sites), nodes, metric)
    np.testing.assert_allclose(results[0].effects[:, some], truth[:, some], rtol=1e-4, atol=2e-6)


def test_pooled_nodes_are_patched_at_all_positions_together(tiny_llama, pair) -> None:
    clean, corrupted = pair
    nodes = node_set(tiny_llama, clean, ["z", "resid_pre"], layers=[0, 2], is_pooled=True)
    result = activation_patching(tiny_llama, clean, corrupted, METRIC, nodes, progress=False)
    truth = one_by_one(tiny_llama, clean, tiny_llama.reap(corrupted, nodes.sites), nodes, METRIC)
    np.testing.assert_allclose(result.effects, truth, rtol=1e-4, atol=2e-6)
    # The whole input replaced is the other prompt.
    np.testing.assert_allclose(result.grid("resid_pre")[0, 0, 0], (result.other - result.plain).mean(), rtol=1e-4)
    np.testing.assert_allclose(result.normalised[:, nodes.n_nodes - 2], 1.0, rtol=1e-4)


def test_what_cannot_matter_is_exactly_zero(tiny_llama, pair) -> None:
    clean, corrupted = pair
    nodes = node_set(tiny_llama, clean, ["q", "z", "resid_pre"])
    at_4 = logit_difference(3, 7, position=4)
    result = activation_patching(tiny_llama, clean, corrupted, at_4, nodes, progress=False)
    for name in ("q", "z", "resid_pre"):
        grid = nodes.grid(name, result.effects)
        assert np.all(grid[:, :, :2] == 0.0)  # Before the first token that differs.
        assert np.all(grid[:, :, 5:] == 0.0)  # After the position the metric reads.
        assert np.any(grid[:, :, 2:5] != 0.0)
    with pytest.warns(UserWarning, match="are the same clean and corrupted"):
        same = activation_patching(tiny_llama, clean, clean, METRIC, nodes, progress=False)
    assert np.all(same.effects == 0.0)


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_ablations(tiny_llama, pair, key, kind) -> None:
    tokens = pair[0]
    nodes = node_set(tiny_llama, tokens, ["z", "mlp_out"], layers=[1])
    result = ablation(tiny_llama, tokens, METRIC, nodes, kind=kind, key=key, progress=False)
    clean = tiny_llama.reap(tokens, nodes.sites)
    values = {}
    for site, value in clean.items():
        real = np.asarray(value)[tokens >= 0]  # [token, ...]
        if kind == "zero":
            values[site] = jnp.zeros_like(value)
        elif kind == "mean":
            values[site] = jnp.broadcast_to(jnp.asarray(real.mean(0))[None, None], value.shape)
        else:
            values[site] = value[::-1]  # Two rows: each gets the other's.
    truth = one_by_one(tiny_llama, tokens, values, nodes, METRIC)
    np.testing.assert_allclose(result.effects, truth, rtol=2e-4, atol=3e-6)
    assert result.other is None
    with pytest.raises(InvalidInputError, match="shares of an ablation"):
        _ = result.normalised


# --- a linear model: no norms, no attention pattern that depends on anything -----------------------------------------


def linear(params: Any, tokens: Any) -> Any:
    x = sow(params["W_E"][tokens], name="embed")
    for i, (mix, out) in enumerate(params["layers"]):
        with layer_scope(i):
            x = sow(x, name="resid_pre")
            before = jnp.cumsum(x, axis=1)
            x = x + sow(jnp.einsum("bpd,de->bpe", before, mix), name="attn_out")
            x = x + sow(jnp.einsum("bpd,de->bpe", x, out), name="mlp_out")
    return jnp.einsum("bpd,dv->bpv", sow(x, name="ln_final"), params["W_U"])


@pytest.fixture
def linear_lm(rng: np.random.Generator) -> LanguageModel:
    def random(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)

    params = {"W_E": random(40, 5), "W_U": random(5, 40), "layers": [(random(5, 5), random(5, 5)) for _ in range(2)]}
    return LanguageModel(Upstream("linear", linear), params, name="linear")


def test_in_a_linear_model_effects_of_the_embeddings_add_up(linear_lm, pair) -> None:
    clean, corrupted = (np.abs(tokens) for tokens in pair)
    nodes = node_set(linear_lm, clean, ["embed"])
    result = activation_patching(linear_lm, clean, corrupted, METRIC, nodes, progress=False)
    np.testing.assert_allclose(result.effects.sum(1), result.other - result.plain, rtol=1e-4, atol=1e-5)


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_compiles_for_one_layer_and_another_sweep_nothing(tiny_llama, pair) -> None:
    clean, corrupted = pair
    first = node_set(tiny_llama, clean, ["z", "resid_pre"], layers=[0, 1])
    activation_patching(tiny_llama, clean, corrupted, METRIC, first, progress=False)
    with count_compilations() as compiled:
        activation_patching(tiny_llama, clean, corrupted[::-1].copy()[::-1], METRIC, first, progress=False)
        other = node_set(tiny_llama, clean, ["z", "resid_pre"], layers=[1, 2])
        activation_patching(tiny_llama, clean, corrupted, logit_difference(1, 2), other, progress=False)
    assert not compiled


def test_an_interrupted_sweep_keeps_what_it_has_and_goes_on(tiny_llama, pair, monkeypatch) -> None:
    clean, corrupted = pair
    nodes = node_set(tiny_llama, clean, ["resid_pre", "mlp_out"])
    whole = activation_patching(tiny_llama, clean, corrupted, METRIC, nodes, progress=False)
    placed, calls = engine._placed, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return placed(*args)

    monkeypatch.setattr(engine, "_placed", interrupted)
    with pytest.warns(UserWarning, match=r"Interrupted: \d+ of 36 nodes are left"):
        part = activation_patching(tiny_llama, clean, corrupted, METRIC, nodes, progress=False)
    assert not part.is_complete
    known = ~np.isnan(part.effects)
    np.testing.assert_array_equal(part.effects[known], whole.effects[known])
    n_before = len(calls)
    rest = activation_patching(tiny_llama, clean, corrupted, METRIC, nodes, resume=part, progress=False)
    np.testing.assert_allclose(rest.effects, whole.effects, rtol=1e-5, atol=1e-6)
    assert rest.is_complete
    assert 0 < len(calls) - n_before <= 3  # Of six sites, three were done.


def test_top_and_repr() -> None:
    nodes = NodeSet((NodeGroup("z", (0,), (0,), 3),), n_pos=1)
    result = PatchingResult(np.array([[1.0, -3.0, 2.0]]), np.zeros(1), np.ones(1), nodes, "noising")
    assert [(node.unit, score) for node, score in result.top(2)] == [(1, -3.0), (2, 2.0)]
    assert repr(result) == "PatchingResult(noising, batch 1, 3 nodes)"


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (UnknownNameError, "Unknown direction 'noise'", {"direction": "noise"}),
        (ShapeError, "The metric returned", {"metric": lambda logits: logits[:, -1]}),
        (
            InvalidInputError,
            "The metric of the plain pass is .*nan",
            {"metric": lambda logits: logits[:, -1, 0] * jnp.nan},
        ),
        (InvalidInputError, "rows_per_step=0", {"rows_per_step": 0}),
    ],
    ids=["direction", "shape", "nan", "rows"],
)
def test_mistakes(tiny_llama, pair, error, words, change) -> None:
    nodes = node_set(tiny_llama, pair[0], "mlp_out", layers=[2])
    arguments = {"metric": METRIC, "nodes": nodes, "progress": False, **change}
    with pytest.raises(error, match=words):
        activation_patching(tiny_llama, *pair, **arguments)


def test_nodes_and_results_of_other_prompts_are_refused(tiny_llama, pair, key) -> None:
    nodes = node_set(tiny_llama, pair[0], "mlp_out", layers=[2])
    short: Any = tuple(tokens[:, 1:] for tokens in pair)
    with pytest.raises(InvalidInputError, match="nodes of prompts of 6 tokens were given for prompts of 5"):
        activation_patching(tiny_llama, *short, metric=METRIC, nodes=nodes)
    wrong = PatchingResult(np.zeros((1, 2)), np.zeros(1), None, nodes, "noising")
    with pytest.raises(ShapeError, match="to go on from"):
        activation_patching(tiny_llama, *pair, metric=METRIC, nodes=nodes, resume=wrong, progress=False)
    with pytest.raises(InvalidInputError, match="kind='resample' was given with key=None"):
        ablation(tiny_llama, pair[0], METRIC, nodes, kind="resample")
    with pytest.raises(UnknownNameError, match="Unknown kind 'none'"):
        ablation(tiny_llama, pair[0], METRIC, nodes, kind=cast("Any", "none"))
