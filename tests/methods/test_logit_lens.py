"""The logit lens against closed forms and against the same statistics written in NumPy, in double precision."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError, UnsupportedModelError
from interp_jax.core.sites import Site
from interp_jax.methods.logit_lens import _Decoder, _statistics_of_views, logit_lens, rank_of
from interp_jax.models.language_model import LanguageModel, ModelConfig
from interp_jax.models.upstream import PAD, Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import layer_scope, sow

N_LAYERS, D_MODEL, D_VOCAB, EPS = 3, 8, 11, 1e-5


def rms_norm(params, residual):
    scale = jax.lax.rsqrt(jnp.square(residual).mean(-1, keepdims=True) + EPS)
    return residual * scale * params["gain"].astype(residual.dtype)[None, None]


def identity_norm(params, residual):
    return residual


def unembed(params, normalised):
    return jnp.einsum("bpd,dv->bpv", normalised, params["W_U"])


@functools.cache
def toy(norm):
    """A residual model whose layers mix neighbouring positions, so that positions differ; compiled once for all."""

    def forward(params, tokens):
        x = params["W_E"][jnp.maximum(tokens, 0)]
        for layer in range(N_LAYERS):
            with layer_scope(layer):
                x = sow(x, name="resid_pre")
                mixed = jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
                write = sow(jnp.einsum("bpd,de->bpe", jnp.tanh(mixed), params["W"][layer]), name="mlp_out")
                sow(jnp.einsum("bpd,bqd->bpq", x, x), name="pattern")
                x = sow(x + write, name="resid_post")
        return unembed(params, norm(params, x))

    return Upstream("toy", forward, ln_final=norm, unembed=unembed)


def make_lm(rng, *, norm=rms_norm, kind="rmsnorm", dtype=jnp.float32):
    params = {
        "W_E": rng.normal(size=(D_VOCAB, D_MODEL)),
        "W_U": rng.normal(size=(D_MODEL, D_VOCAB)),
        "W": rng.normal(size=(N_LAYERS, D_MODEL, D_MODEL)),
        "gain": rng.uniform(0.5, 1.5, size=D_MODEL),
    }
    params = {name: jnp.asarray(value, dtype) for name, value in params.items()}
    config = ModelConfig(
        family="toy",
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_heads=1,
        n_kv_heads=1,
        d_head=D_MODEL,
        d_mlp=D_MODEL,
        d_vocab=D_VOCAB,
        n_ctx=64,
        activation="tanh",
        is_gated=False,
        is_tied=False,
        norm=kind,
        norm_eps=EPS,
        rope_theta=None,
        dtype=jnp.dtype(dtype).name,
    )
    return LanguageModel(toy(norm), params, config, name="toy")


@pytest.fixture
def lm(rng):
    return make_lm(rng)


@pytest.fixture
def tokens(rng):
    return rng.integers(0, D_VOCAB, (2, 5)).astype(np.int32)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference(lm, tokens, site, norm, target):
    """Every statistic of one view, in NumPy and float64, one position at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), lm.params)
    residual = np.asarray(lm.reap(tokens, site)[site], np.float64)
    final = log_softmax(np.asarray(lm(tokens), np.float64))
    if norm != "none":
        residual = residual / np.sqrt((residual**2).mean(-1, keepdims=True) + EPS)
    if norm == "final":
        residual = residual * params["gain"]
    logits = residual @ params["W_U"]
    view = log_softmax(logits)
    out = {name: np.empty(tokens.shape) for name in ("rank", "target_probability", "kl", "kl_reverse", "entropy")}
    for at in np.ndindex(tokens.shape):
        wanted = final[at].argmax() if target is None else target[at]
        p, q = final[at], view[at]
        out["rank"][at] = 1 + sum(other > logits[at][wanted] for other in logits[at])
        out["target_probability"][at] = np.exp(q[wanted])
        out["kl"][at] = sum(np.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        out["kl_reverse"][at] = sum(np.exp(b) * (b - a) for a, b in zip(p, q, strict=True))
        out["entropy"][at] = -sum(np.exp(b) * b for b in q)
    return out, np.argsort(-logits, axis=-1, kind="stable"), view


@pytest.mark.parametrize("norm", ["final", "unit", "none"])
@pytest.mark.parametrize("given_target", [False, True])
def test_every_statistic_is_that_of_its_definition(lm, tokens, rng, norm, given_target):
    target = rng.integers(0, D_VOCAB, tokens.shape) if given_target else None
    result = logit_lens(lm, tokens, norm=norm, target=target if given_target else "final", top_k=4)

    assert [str(site) for site in result.views] == ["0.resid_pre", "0.resid_post", "1.resid_post", "2.resid_post"]
    for index, site in enumerate(result.views):
        expected, order, log_p = reference(lm, tokens, site, norm, target)
        np.testing.assert_array_equal(result.rank[index], expected["rank"])
        np.testing.assert_array_equal(result.top_ids[index], order[..., :4])
        np.testing.assert_array_equal(result.top1[index], order[..., 0])
        top_log_p = np.take_along_axis(log_p, order[..., :4], -1)
        np.testing.assert_allclose(result.top_probabilities[index], np.exp(top_log_p), rtol=1e-4, atol=1e-6)
        for name in ("target_probability", "kl", "kl_reverse", "entropy"):
            np.testing.assert_allclose(getattr(result, name)[index], expected[name], rtol=1e-4, atol=1e-5)
    final_top1 = np.asarray(lm(tokens)).argmax(-1)
    np.testing.assert_array_equal(result.agrees, np.asarray(result.top1) == final_top1[None])


def test_unit_norm_of_a_layer_norm_model_subtracts_the_mean(rng, tokens):
    lm = make_lm(rng, kind="layernorm")
    result = logit_lens(lm, tokens, views="1.resid_post", norm="unit", top_k=1)

    residual = np.asarray(lm.reap(tokens, "1.resid_post")["1.resid_post"], np.float64)
    unit = (residual - residual.mean(-1, keepdims=True)) / np.sqrt(residual.var(-1, keepdims=True) + EPS)
    expected = log_softmax(unit @ np.asarray(lm.W_U if "W_U" in lm.upstream.weights else lm.params["W_U"], np.float64))
    np.testing.assert_allclose(result.top1_probability[0], np.exp(expected).max(-1), rtol=1e-4)


def test_the_last_view_is_the_model_to_the_bit(lm, tokens):
    result = logit_lens(lm, tokens)

    # Equal logits give a divergence of exactly 0; the smallest difference would not.
    assert np.all(np.asarray(result.kl[-1]) == 0)
    assert np.all(np.asarray(result.kl_reverse[-1]) == 0)
    assert np.all(np.asarray(result.rank[-1]) == 1)
    assert np.all(np.asarray(result.agrees[-1]))
    assert np.asarray(result.kl[0]).min() > 1e-3


def test_the_smallest_difference_would_show(lm, tokens):
    # The test above can fail: decoding a stream that is off in its last bit gives another divergence than 0.
    residual = lm.reap(tokens, "2.resid_post")["2.resid_post"]
    off = jnp.nextafter(residual, jnp.full_like(residual, jnp.inf))
    statistics = _statistics_of_views(
        _Decoder("final", unembed, rms_norm), lm.params, (off,), lm(tokens), None, top_k=1, ties="min"
    )
    assert np.any(np.asarray(statistics["kl"]) != 0)


def test_divergences_of_two_tokens_have_the_known_values():
    # The embedding says (.9, .1); the layer's write turns that into (.5, .5).
    at_first = np.log(np.array([0.9, 0.1], np.float32))
    even = np.log(np.array([0.5, 0.5], np.float32))

    def forward(params, tokens):
        x = sow(jnp.broadcast_to(params["first"], (*tokens.shape, 2)), name="embed")
        return sow(x + params["write"][None, None], name="resid_post")

    params = {"first": jnp.asarray(at_first), "write": jnp.asarray(even - at_first)}
    upstream = Upstream("two_tokens", forward, ln_final=identity_norm, unembed=identity_norm)
    params["first"] = params["first"][None, None]
    result = logit_lens(LanguageModel(upstream, params), np.zeros((1, 1), np.int32), views=None, top_k=2)

    assert [str(site) for site in result.views] == ["embed", "resid_post"]
    np.testing.assert_allclose(np.ravel(result.kl), [0.5108, 0], atol=5e-5)
    np.testing.assert_allclose(np.ravel(result.kl_reverse), [0.3681, 0], atol=5e-5)
    np.testing.assert_allclose(np.ravel(result.entropy), [0.3251, np.log(2)], atol=5e-5)
    np.testing.assert_allclose(np.ravel(result.top_probabilities[0]), [0.9, 0.1], rtol=1e-5)


def orthonormal_lm(rng, offset=0.0):
    """Tied orthonormal embeddings and no norm; the one layer writes the same vector everywhere."""
    basis, _ = np.linalg.qr(rng.normal(size=(D_VOCAB, D_VOCAB)))
    embedding = basis + offset

    def forward(params, tokens):
        with layer_scope(0):
            x = sow(params["W_E"][tokens], name="resid_pre")
            x = sow(x + params["write"][None, None], name="resid_post")
        return unembed(params, x)

    params = {"W_E": embedding, "W_U": embedding.T, "write": 3 * basis[4]}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    return LanguageModel(Upstream("tied", forward, ln_final=identity_norm, unembed=unembed), params)


def test_orthonormal_embeddings_read_back_the_input(rng):
    tokens = rng.permutation(D_VOCAB)[None].astype(np.int32)
    result = logit_lens(orthonormal_lm(rng), tokens, target="input", top_k=1)

    np.testing.assert_array_equal(result.top1[0], tokens)
    np.testing.assert_array_equal(result.rank[0], np.ones_like(tokens))
    # After the write every position says token 4, and the input comes second (first where it is token 4).
    np.testing.assert_array_equal(result.top1[1], np.full_like(tokens, 4))
    np.testing.assert_array_equal(result.rank[1], np.where(tokens == 4, 1, 2))


def test_a_huge_shared_offset_drowns_the_input(rng):
    lm = orthonormal_lm(rng, offset=1000.0)
    largest = np.linalg.norm(np.asarray(lm.params["W_E"], np.float64), axis=1).argmax()
    result = logit_lens(lm, np.arange(D_VOCAB, dtype=np.int32)[None], norm="none", views="resid_pre", top_k=1)
    np.testing.assert_array_equal(result.top1, np.full((1, 1, D_VOCAB), largest))


def test_ties_rank_first_or_last():
    logits = jnp.array([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert rank_of(logits, jnp.array([2])).tolist() == [2]
    assert rank_of(logits, jnp.array([2]), ties="max").tolist() == [4]
    assert rank_of(logits, jnp.array([0]), ties="max").tolist() == [1]


def test_ties_reach_the_result(tokens):
    upstream = Upstream(
        "flat", lambda params, tokens: sow(jnp.zeros((*tokens.shape, 4)), name="embed"), unembed=identity_norm
    )
    lm = LanguageModel(upstream, {"none": jnp.zeros(1)})
    tokens = np.zeros((1, 2), np.int32)
    assert np.asarray(logit_lens(lm, tokens, views="embed", norm="none", top_k=1).rank).tolist() == [[[1, 1]]]
    assert np.asarray(logit_lens(lm, tokens, views="embed", norm="none", top_k=1, ties="max").rank).tolist() == [
        [[4, 4]]
    ]


def test_the_next_token_is_ranked_where_there_is_one(lm, rng):
    tokens = rng.integers(0, D_VOCAB, (2, 4)).astype(np.int32)
    tokens[1, 0] = PAD
    result = logit_lens(lm, tokens, target="next")

    np.testing.assert_array_equal(result.mask, [[True, True, True, False], [False, True, True, False]])
    np.testing.assert_array_equal(
        np.asarray(result.target)[:, :-1][result.mask[:, :-1]], tokens[:, 1:][result.mask[:, :-1]]
    )
    with_final = logit_lens(lm, tokens)
    np.testing.assert_array_equal(with_final.mask, tokens >= 0)


def test_statistics_are_float32_whatever_the_model_computes_in(rng, tokens):
    result = logit_lens(make_lm(rng, dtype=jnp.bfloat16), tokens)
    for name in ("top_probabilities", "target_probability", "kl", "kl_reverse", "entropy"):
        assert getattr(result, name).dtype == jnp.float32
        assert np.isfinite(np.asarray(getattr(result, name))).all()
    np.testing.assert_allclose(np.asarray(result.kl[-1]), 0, atol=1e-6)


def test_logits_of_all_views_are_never_held_together(lm):
    residuals = tuple(jnp.zeros((3, 7, D_MODEL)) for _ in range(5))
    logits = jnp.zeros((3, 7, D_VOCAB))
    program = jax.make_jaxpr(
        lambda *args: _statistics_of_views(_Decoder("final", unembed, rms_norm), *args, top_k=2, ties="min")
    )(lm.params, residuals, logits, None)
    text = str(program)
    assert f"f32[3,7,{D_VOCAB}]" in text
    assert f"[5,3,7,{D_VOCAB}]" not in text


def test_other_tokens_and_targets_compile_nothing(lm, tokens):
    logit_lens(lm, tokens, target=np.zeros_like(tokens))
    with count_compilations() as new:
        logit_lens(lm, tokens[::-1], target=np.ones_like(tokens))
    assert new == []


def test_single_writes_can_be_viewed(lm, tokens):
    result = logit_lens(lm, tokens, views=["mlp_out", "0.resid_pre"])
    assert result.views == (Site(0, "resid_pre"), Site(0, "mlp_out"), Site(1, "mlp_out"), Site(2, "mlp_out"))


def test_a_result_is_a_pytree_and_prints_its_size(lm, tokens):
    result = logit_lens(lm, tokens)
    doubled = jax.tree.map(lambda leaf: leaf, result)
    assert doubled.views == result.views
    assert repr(result) == (
        "LogitLensResult(4 views (0.resid_pre ... 2.resid_post), batch 2, 5 positions, top 5, norm='final', "
        "rank of the final token)"
    )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"views": "resid_pots"}, UnknownNameError, ["'resid_pots'", "Did you mean 'resid_post'?"]),
        ({"views": "1.pattern"}, ShapeError, ["1.pattern is float32[2, 5, 5]", "[2, 5, 8]", "resid_mid"]),
        ({"norm": "last"}, UnknownNameError, ["norm='last'", "final, unit, none"]),
        ({"ties": "mean"}, UnknownNameError, ["ties='mean'", "min, max"]),
        ({"target": "nxt"}, UnknownNameError, ["target='nxt'", "Did you mean 'next'?"]),
        ({"target": np.zeros((2, 4), int)}, ShapeError, ["int64[2, 4]", "[2, 5]"]),
        ({"target": np.full((2, 5), D_VOCAB)}, InvalidInputError, ["[11]", "0 to 10"]),
        ({"top_k": 0}, InvalidInputError, ["top_k=0", "1 to 11"]),
        ({"top_k": D_VOCAB + 1}, InvalidInputError, ["top_k=12", "1 to 11"]),
    ],
)
def test_mistakes_are_named(lm, tokens, options, error, words):
    with pytest.raises(error) as caught:
        logit_lens(lm, tokens, **options)
    for word in [*words, "Fix:"]:
        assert word in str(caught.value)


def test_a_model_that_cannot_be_decoded_says_what_is_missing(tokens):
    bare = LanguageModel(Upstream("bare", lambda params, tokens: sow(params[tokens], name="embed")), jnp.eye(D_VOCAB))
    with pytest.raises(UnsupportedModelError, match="without ln_final and unembed"):
        logit_lens(bare, tokens, views="embed")
    with pytest.raises(InvalidInputError, match="Text was given"):
        logit_lens(make_lm(np.random.default_rng(0)), "When Mary")
