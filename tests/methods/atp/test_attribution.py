"""Attribution patching: exact where the model is linear, or one softmax; GradDrop against stopped gradients."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from interp_jax.core.errors import InvalidInputError, UnsupportedModelError
from interp_jax.core.sites import Site
from interp_jax.forward.metrics import logit_difference
from interp_jax.forward.nodes import node_set
from interp_jax.methods.activation_patching import activation_patching
from interp_jax.methods.atp import attribution_patching
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loading import load
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.harvest import intervene, reap_sites, site_gradients
from interp_jax.transforms.sowing import layer_scope, sow
from tests.source_tree import ROOT

METRIC, ORACLES = logit_difference(3, 7), ROOT / "tests" / "oracles"
D, HEADS, KV_HEADS, D_HEAD, D_VOCAB = 8, 4, 2, 3, 40


def attention(x: Any, w: Any, *, bias: float = 0.0) -> Any:
    """One layer of grouped-query attention with its sites; linear but for the softmax."""
    pos = x.shape[1]
    q, k, v = (
        sow(jnp.einsum("bpd,dhe->bphe", x, w[name]), name=name) for name in "qkv"
    )  # q [batch, pos, head, d_head]; k and v by kv_head
    k_all, v_all = (jnp.repeat(part, HEADS // KV_HEADS, axis=2) for part in (k, v))
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k_all) * 1.3
    distance = jnp.arange(pos)[:, None] - jnp.arange(pos)[None]
    scores = scores - bias * distance.astype(jnp.float32)[None, None]
    scores = sow(jnp.where((distance >= 0)[None, None], scores, jnp.finfo(jnp.float32).min), name="attn_scores")
    pattern = sow(jax.nn.softmax(scores), name="pattern")
    z = sow(jnp.einsum("bhqk,bkhe->bqhe", pattern, v_all), name="z")
    return sow(jnp.einsum("bqhe,hed->bqd", z, w["o"]), name="attn_out")


def model(params: Any, tokens: Any) -> Any:
    """Layers of a kind each: attention, a linear or a tanh MLP."""
    x = sow(params["W_E"][tokens], name="embed")
    for i, (kind, w) in enumerate(zip(params["kinds"].kinds, params["layers"], strict=True)):
        with layer_scope(i):
            x = sow(x, name="resid_pre")
            if kind.startswith("attention"):
                x = x + attention(x, w, bias=1.0 if kind.endswith("bias") else 0.0)
            else:
                out = jnp.einsum("bpd,de->bpe", x, w)
                x = x + sow(jnp.tanh(out) if kind == "tanh" else out, name="mlp_out")
            x = sow(x, name="resid_post")
    return jnp.einsum("bpd,dv->bpv", x, params["W_U"])


@jax.tree_util.register_static
class Kinds:
    """The kinds of a model's layers."""

    def __init__(self, *kinds: str):
        self.kinds = kinds

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kinds) and self.kinds == other.kinds

    def __hash__(self) -> int:
        return hash(self.kinds)


UPSTREAM = Upstream("toy", model)


def made(rng: np.random.Generator, *kinds: str, scale: float = 0.5, **weights: Any) -> LanguageModel:
    def random(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    layers = [
        {name: random(D, n, D_HEAD) for name, n in heads.items()} | {"o": random(HEADS, D_HEAD, D)}
        if kind.startswith("attention")
        else random(D, D)
        for kind in kinds
    ]
    params = {"W_E": random(D_VOCAB, D), "W_U": random(D, D_VOCAB), "layers": layers, "kinds": Kinds(*kinds)}
    return LanguageModel(UPSTREAM, params | weights, name="toy")


@pytest.fixture
def pair(rng: np.random.Generator) -> Any:
    clean = rng.integers(0, D_VOCAB, (2, 5)).astype(np.int32)
    corrupted = clean.copy()
    corrupted[:, 1] = (clean[:, 1] + 3) % D_VOCAB
    corrupted[1, 3] = (clean[1, 3] + 8) % D_VOCAB
    corrupted[:, 4] = (clean[:, 4] + 5) % D_VOCAB
    return clean, corrupted


def test_exact_in_a_linear_model(rng, pair) -> None:
    lm = made(rng, "linear", "linear", "linear")
    for is_pooled in (False, True):
        nodes = node_set(lm, pair[0], ["mlp_out", "resid_pre", "embed"], is_pooled=is_pooled)
        exact = activation_patching(lm, *pair, metric=METRIC, nodes=nodes, progress=False)
        assert np.abs(exact.effects).max() > 0.1
        result = attribution_patching(lm, *pair, metric=METRIC, nodes=nodes, grad_drop=False)
        np.testing.assert_allclose(result.estimates, exact.effects, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result.plain, exact.plain, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result.contribution, exact.contribution, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.4, 2.5])
def test_the_qk_fix_is_exact_for_one_head_saturated_or_not(rng, pair, scale) -> None:
    lm = made(rng, "attention", "linear", scale=scale)
    nodes = node_set(lm, pair[0], ["q", "k", "v", "z"])
    exact = activation_patching(lm, *pair, metric=METRIC, nodes=nodes, progress=False)
    result = attribution_patching(lm, *pair, metric=METRIC, nodes=nodes, grad_drop=False)
    size = np.abs(exact.effects).max()
    np.testing.assert_allclose(result.estimates, exact.effects, rtol=1e-3, atol=2e-5 * size)
    if scale < 1.0:
        return
    plain = attribution_patching(lm, *pair, metric=METRIC, nodes=nodes, qk_fix=False, grad_drop=False)
    for name in ("q", "k"):  # Without the fix it is not.
        ours, truth = nodes.grid(name, plain.estimates), nodes.grid(name, exact.effects)
        assert np.abs(ours - truth).max() > 0.05 * np.abs(truth).max()


def test_the_error_shrinks_with_the_square_of_the_difference(rng) -> None:
    # Over many directions: along a single one the terms of second and third order may cancel at one size.
    lm, rows, errors = made(rng, "attention", "tanh", "tanh"), np.arange(9, 17), []
    clean, directions = np.full((8, 4), 2, np.int32), jnp.asarray(rng.normal(size=(8, D)), jnp.float32)
    corrupted = clean.copy()
    corrupted[:, 1] = rows
    for size in (0.04, 0.02, 0.01):
        W_E = lm.params["W_E"].at[rows].set(lm.params["W_E"][2][None] + size * directions)
        near = LanguageModel(UPSTREAM, lm.params | {"W_E": W_E}, name="toy")
        nodes = node_set(near, clean, ["embed", "v", "resid_pre", "mlp_out"])
        exact = activation_patching(near, clean, corrupted, METRIC, nodes, progress=False)
        estimate = attribution_patching(near, clean, corrupted, METRIC, nodes, grad_drop=False)
        errors.append(np.linalg.norm(exact.effects - estimate.estimates))
    assert errors[-1] > 5e-5  # far above rounding
    for larger, smaller in itertools.pairwise(errors):
        assert 3.2 < larger / smaller < 5.0  # 2 if the gradient were wrong, 8 if the curvature were right


def test_grad_drop_sees_effects_that_cancel(rng, pair) -> None:
    # Layer 0 writes, layer 1 takes all of the stream away again, layer 2 writes nothing.
    eye = jnp.eye(D)
    lm = made(rng, "linear", "linear", "linear")
    layers = [lm.params["layers"][0], -eye, 0 * eye]
    lm = LanguageModel(UPSTREAM, lm.params | {"layers": layers}, name="toy")
    nodes = node_set(lm, pair[0], ["mlp_out"], layers=[0])
    direct = LanguageModel(UPSTREAM, lm.params | {"layers": [layers[0], 0 * eye, 0 * eye]}, name="toy")
    delta = attribution_patching(direct, *pair, metric=METRIC, nodes=nodes, grad_drop=False).estimates
    assert np.abs(delta).max() > 0.1
    result = attribution_patching(lm, *pair, metric=METRIC, nodes=nodes)
    np.testing.assert_allclose(result.estimates, 0.0, atol=1e-5)
    np.testing.assert_allclose(result.scores, np.abs(delta) / 2, rtol=1e-4, atol=1e-5)
    # With nobody downstream that reads it, it is AtP.
    result = attribution_patching(direct, *pair, metric=METRIC, nodes=nodes)
    np.testing.assert_allclose(result.scores, np.abs(delta), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "layers_per_step"),
    [("llama", 2), pytest.param("gpt2", 8, marks=pytest.mark.slow), pytest.param("gptj", 8, marks=pytest.mark.slow)],
)
def test_grad_drop_is_the_mean_over_stopped_gradients(rng, family, layers_per_step) -> None:
    tiny = load(ORACLES / f"tiny_{family}")
    assert tiny.config is not None
    clean = rng.integers(1, 40, (2, 6)).astype(np.int32)
    corrupted = rng.integers(1, 40, (2, 6)).astype(np.int32)
    names = ["z", "v", "mlp_post", "attn_out", "resid_pre", "resid_post", "embed", "ln_final"]
    names += [] if tiny.config.is_parallel else ["resid_mid"]
    nodes = node_set(tiny, clean, names, positions=[1, 5])
    result = attribution_patching(tiny, clean, corrupted, METRIC, nodes, layers_per_step=layers_per_step)
    new = reap_sites(tiny.forward, nodes.sites)(tiny.params, corrupted)

    def estimates(forward: Any) -> np.ndarray:
        _, values, gradients = jax.jit(site_gradients(forward, nodes.sites, METRIC))(tiny.params, clean)
        parts = []
        for group in nodes.groups:
            for site in group.sites:
                products = np.asarray((new[site] - values[site]) * gradients[site])[:, [1, 5]]
                n_kept = 3 if group.n_units else 2
                parts.append(products.sum(tuple(range(n_kept, products.ndim))).reshape(2, -1))
        return np.concatenate(parts, axis=1)

    terms = []
    for layer in range(tiny.config.n_layers):
        writes = [Site(layer, "attn_out"), Site(layer, "mlp_out")]
        terms.append(np.abs(estimates(intervene(tiny.forward, dict.fromkeys(writes, lax.stop_gradient)))))
    np.testing.assert_allclose(result.estimates, estimates(tiny.forward), rtol=1e-3, atol=2e-6)
    for i, node in enumerate(nodes):
        is_inside = node.site.layer is not None and not node.site.name.startswith("resid")
        kept = [term[:, i] for layer, term in enumerate(terms) if not (is_inside and layer == node.site.layer)]
        np.testing.assert_allclose(result.scores[:, i], np.mean(kept, axis=0), rtol=1e-3, atol=2e-6, err_msg=str(node))


@pytest.mark.slow
def test_stacked_layers_and_any_metric_give_the_same(tiny_llama, rng) -> None:
    clean, corrupted = (rng.integers(1, 40, (2, 6)).astype(np.int32) for _ in range(2))
    nodes = node_set(tiny_llama, clean, ["q", "k", "z", "mlp_post"])

    def metric(logits: Any) -> Any:
        return logits[:, -1, 3] - logits[:, -1, 7]

    one, *others = (
        attribution_patching(lm, clean, corrupted, each, nodes)
        for lm, each in ((tiny_llama, METRIC), (tiny_llama, metric), (tiny_llama.stacked(), METRIC))
    )
    assert np.abs(one.scores).max() > 1e-3
    for other in others:
        np.testing.assert_allclose(other.estimates, one.estimates, rtol=1e-3, atol=2e-6)
        np.testing.assert_allclose(other.scores, one.scores, rtol=1e-3, atol=2e-6)


@pytest.mark.slow
def test_examples_do_not_mix(tiny_llama, rng) -> None:
    clean, corrupted = (rng.integers(1, 40, (1, 6)).astype(np.int32) for _ in range(2))
    nodes = node_set(tiny_llama, clean, ["q", "k", "z"])
    one = attribution_patching(tiny_llama, clean, corrupted, METRIC, nodes)
    four = attribution_patching(
        tiny_llama, *(np.repeat(t, 4, 0) for t in (clean, corrupted)), metric=METRIC, nodes=nodes
    )
    for row in four.scores:
        np.testing.assert_allclose(row, one.scores[0], rtol=1e-4, atol=1e-6)


def test_mistakes(rng, pair) -> None:
    one_layer = made(rng, "linear")
    with pytest.raises(InvalidInputError, match=r"GradDrop of a model with 1 layer\(s\)"):
        attribution_patching(one_layer, *pair, metric=METRIC, nodes=node_set(one_layer, pair[0], "mlp_out"))
    lm = made(rng, "linear", "linear")
    nodes = node_set(lm, pair[0], "mlp_out")
    with pytest.raises(InvalidInputError, match="layers_per_step=0"):
        attribution_patching(lm, *pair, metric=METRIC, nodes=nodes, layers_per_step=0)
    with pytest.raises(InvalidInputError, match=r"10 nodes of prompts of 5 tokens were given for prompts of 4"):
        attribution_patching(lm, *(tokens[:, 1:] for tokens in pair), metric=METRIC, nodes=nodes)
    with pytest.raises(InvalidInputError, match="The metric of the clean pass is nan"):
        attribution_patching(lm, *pair, metric=lambda logits: jnp.sqrt(logits[:, -1, 0] * 0.0 - 1.0), nodes=nodes)
    with pytest.raises(InvalidInputError, match="A score is nan"):  # The root of zero is zero, its slope is not.
        attribution_patching(lm, *pair, metric=lambda logits: jnp.sqrt(logits[:, -1, 0] * 0.0), nodes=nodes)
    biased = made(rng, "attention with bias", "linear")
    with pytest.raises(UnsupportedModelError, match="differ from scaled products of queries and keys"):
        attribution_patching(biased, *pair, metric=METRIC, nodes=node_set(biased, pair[0], "q"), grad_drop=False)


def wide(params: Any, tokens: Any) -> Any:
    """Ten layers of many neurons."""
    x = params["W_E"][tokens]
    for layer, (W_in, W_out) in enumerate(params["layers"]):
        with layer_scope(layer):
            x = sow(x, name="resid_pre")
            x = sow(x + sow(jnp.tanh(x @ W_in), name="mlp_post") @ W_out, name="resid_post")
    return x


def test_each_row_has_its_own_scores_among_many_nodes(rng) -> None:
    # With 40000 nodes the sum over layers was once compiled so that all rows had the scores of the first.
    def weights(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    params = {"W_E": weights(7, 4), "layers": [(weights(4, 4000), weights(4000, 4) / 64) for _ in range(10)]}
    lm = LanguageModel(Upstream("wide", wide), params, name="wide")
    clean, corrupted = np.array([[0], [1], [2]], np.int32), np.array([[3], [4], [5]], np.int32)
    nodes = node_set(lm, clean, ["mlp_post"])
    result = attribution_patching(lm, clean, corrupted, lambda logits: logits[:, -1, 1], nodes)
    # No layer after the last one can block it.
    estimates, scores = (nodes.grid("mlp_post", each)[:, -1] for each in (np.abs(result.estimates), result.scores))
    np.testing.assert_allclose(scores, estimates, rtol=1e-4, atol=1e-7)
    assert np.abs(estimates[0] - estimates[1]).max() > 1e-3
