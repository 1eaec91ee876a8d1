"""Direct logit attribution: the parts sum to the model's own logits, and are those of the formula in NumPy."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError, UnsupportedModelError
from interp_jax.core.sites import Site
from interp_jax.methods import direct_logit_attribution as module
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loading import load
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import layer_scope, sow
from tests.conftest import ORACLES

direct_logit_attribution: Any = module.direct_logit_attribution  # Any: whether it has heads is known here
# LayerNorm and RMSNorm; biases everywhere and nowhere; positions learned and rotary; blocks one after the other and
# side by side (gptj, whose unembedding has a bias); grouped-query attention (llama).
FAMILIES = ("gpt2", "llama", "gptj", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_neo", "opt")))
TOKENS = np.array([[5, 80, 3, 7, 12], [-1, -1, 9, 31, 4]], np.int32)
ANSWER, WRONG = np.array([3, 8]), np.array([7, 1])


@pytest.fixture(scope="module")
def tiny_models():
    return functools.cache(lambda name: load(ORACLES / f"tiny_{name}"))


def by_the_formula(lm, tokens, answer, wrong) -> Any:
    """Contributions of all writes, of all heads, and the remainder, at the last position, in NumPy and float64."""
    values = {site: np.asarray(value, np.float64) for site, value in lm.reap(tokens, None).items()}

    def weight(name, layer=None):
        has_it = name in lm.upstream.weight_names
        return np.asarray(lm.weight(name, layer), np.float64) if has_it else np.zeros(lm.config.d_model)

    w_u = np.asarray(lm.W_U, np.float64)
    b_u = weight("b_U") if "b_U" in lm.upstream.weight_names else np.zeros(lm.config.d_vocab)
    u = (w_u[:, answer] - w_u[:, wrong]).T
    residual = values[Site(lm.config.n_layers - 1, "resid_post")][:, -1]
    is_centring = lm.config.norm == "layernorm"
    centred = residual - residual.mean(-1, keepdims=True) if is_centring else residual
    sigma = np.sqrt((centred**2).mean(-1) + lm.config.norm_eps)

    def contribution(c):
        c = c - c.mean(-1, keepdims=True) if is_centring else c
        return ((weight("ln_final_w") * c) / sigma[:, None] * u).sum(-1)

    n_layers = lm.config.n_layers
    writes = {
        site: contribution(np.broadcast_to(value, (len(tokens), *value.shape[-2:]))[:, -1])
        for site, value in values.items()
        if site.name in ("embed", "pos_embed", "attn_out", "mlp_out")
    }
    heads = np.array(
        [
            [contribution(values[Site(i, "z")][:, -1, h] @ weight("W_O", i)[h]) for h in range(lm.config.n_heads)]
            for i in range(n_layers)
        ]
    )
    biases = np.array([contribution(np.tile(weight("b_O", i), (len(tokens), 1))) for i in range(n_layers)])
    remainder = u @ weight("ln_final_b") + b_u[answer] - b_u[wrong]
    return writes, heads, biases, remainder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_those_of_the_formula_and_sum_to_the_logits(tiny_models, family):
    lm = tiny_models(family)
    result = direct_logit_attribution(lm, TOKENS, ANSWER, WRONG, position=None)
    writes, heads, biases, remainder = by_the_formula(lm, TOKENS, ANSWER, WRONG)
    assert list(result.sites) == list(writes)
    assert result.layers == tuple(range(lm.config.n_layers))
    for actual, expected in (
        (result.contributions, np.stack(list(writes.values()))),
        (result.heads, heads),
        (result.attn_biases, biases),
        (result.remainder, remainder),
    ):
        np.testing.assert_allclose(actual[..., -1], expected, rtol=1e-5, atol=1e-5)
    # The biases of GPT-2 and its kin are there, so leaving them out would show.
    assert (np.abs(biases).max() > 1e-3) == ("b_O" in lm.upstream.weight_names)
    assert (np.abs(remainder).min() > 1e-4) == (lm.config.norm == "layernorm")

    logits = np.asarray(lm(TOKENS), np.float64)
    rows = np.arange(2)
    expected = (logits[rows, :, ANSWER] - logits[rows, :, WRONG]) * (TOKENS >= 0)
    np.testing.assert_allclose(result.total, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(result.contributions.sum(0) + result.remainder - expected).max() < 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(result.heads.sum(1) + result.attn_biases, result.table("attn_out"), atol=1e-5)


def test_smollm2_sums_to_its_logits(smollm2):
    tokens = smollm2.tokenize("When Mary and John went to the store, John gave a drink to")
    mary, john = (smollm2.tokenizer.token_id(name) for name in (" Mary", " John"))
    logits = np.asarray(smollm2(tokens), np.float64)[0, -1]
    result = direct_logit_attribution(smollm2, tokens, mary, john)
    expected = logits[mary] - logits[john]
    assert expected > 5
    assert result.total[0] == pytest.approx(expected, rel=1e-6)
    assert abs(result.contributions.sum() + result.remainder[0] - expected) < 1e-5 * expected
    np.testing.assert_allclose(result.heads.sum(1) + result.attn_biases, result.table("attn_out"), atol=2e-5)
    # The mover of names that zeroing finds, too (experiments/ioi_layers.py).
    assert result.strongest(1)[0][0] == Site(23, "attn_out")
    assert result.strongest_heads(1)[0][:2] == (23, 3)
    assert repr(result).startswith("DirectLogitAttributionResult(61 writes, 30 x 9 heads, batch 1; strongest: 23.attn_")


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_in_float64_the_sum_is_exact_to_twelve_digits(x64, family):
    lm = load(ORACLES / f"tiny_{family}", dtype=jnp.float64)
    result = direct_logit_attribution(lm, TOKENS, ANSWER, WRONG)
    logits = np.asarray(lm(TOKENS))[:, -1]
    assert logits.dtype == np.float64
    expected = logits[[0, 1], ANSWER] - logits[[0, 1], WRONG]
    assert np.abs(result.contributions.sum(0) + result.remainder - expected).max() < 1e-12 * np.abs(expected).min()


@pytest.mark.slow
def test_half_precision_is_summed_in_single(tiny_models):
    lm = load(ORACLES / "tiny_llama", dtype=jnp.bfloat16)
    half, single = (direct_logit_attribution(m, TOKENS, ANSWER, WRONG) for m in (lm, tiny_models("llama")))
    np.testing.assert_allclose(half.contributions, single.contributions, atol=0.1)
    np.testing.assert_allclose(half.sum_error, 0, atol=0.1)


@pytest.mark.slow
def test_stacked_layers_have_the_same_parts(tiny_models):
    one, other = (
        direct_logit_attribution(m, TOKENS, ANSWER, WRONG) for m in (tiny_models("gpt2"), tiny_models("gpt2").stacked())
    )
    assert one.sites == other.sites
    np.testing.assert_allclose(one.contributions, other.contributions, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.heads, other.heads, rtol=1e-4, atol=1e-5)


def test_one_position_is_a_column_of_all(tiny_models):
    lm = tiny_models("gpt2")
    every = direct_logit_attribution(lm, TOKENS, 3, 7, position=None)
    for position in (2, -1):
        one = direct_logit_attribution(lm, TOKENS, 3, 7, position=position)
        for name in ("contributions", "heads", "attn_biases", "remainder", "total"):
            np.testing.assert_allclose(getattr(one, name), getattr(every, name)[..., position], rtol=1e-5, atol=1e-6)
    assert [site for site, _ in every.strongest(3, row=1)] == [site for site, _ in one.strongest(3, row=1)]
    assert every.strongest_heads(2)[0][:2] == one.strongest_heads(2)[0][:2]
    np.testing.assert_array_equal(every.mask, TOKENS >= 0)
    assert (every.contributions[:, ~every.mask] == 0).all()
    assert (every.total[~every.mask] == 0).all()


def test_logits_alone_and_against_the_mean(tiny_models):
    lm = tiny_models("gptj")
    logits = np.asarray(lm(TOKENS), np.float64)[:, -1]
    alone, mean = (direct_logit_attribution(lm, TOKENS, 3, wrong) for wrong in (None, "mean"))
    np.testing.assert_allclose(alone.contributions.sum(0) + alone.remainder, logits[:, 3], rtol=1e-5)
    np.testing.assert_allclose(mean.contributions.sum(0) + mean.remainder, logits[:, 3] - logits.mean(-1), rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_direction_reads_what_the_norm_says(tiny_models, family, rng):
    lm = tiny_models(family)
    u = np.asarray(lm.W_U[:, 3] - lm.W_U[:, 7])
    by_direction, by_ids = direct_logit_attribution(lm, TOKENS, direction=u), direct_logit_attribution(lm, TOKENS, 3, 7)
    np.testing.assert_allclose(by_direction.contributions, by_ids.contributions, rtol=1e-4, atol=1e-5)
    probes = rng.normal(size=(2, len(u))).astype(np.float32)
    result = direct_logit_attribution(lm, TOKENS, direction=probes)
    expected = (np.asarray(lm.reap(TOKENS, "ln_final")["ln_final"])[:, -1] * probes).sum(-1)
    np.testing.assert_allclose(result.contributions.sum(0) + result.remainder, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("at", "n_writes"), [("1.resid_pre", 4), ("1.resid_mid", 5), ("1.resid_post", 6)])
def test_a_probe_reads_a_residual_as_it_is(tiny_models, rng, at, n_writes):
    lm = tiny_models("gpt2")
    probe = rng.normal(size=lm.config.d_model).astype(np.float32)
    result = direct_logit_attribution(lm, TOKENS, direction=probe, at=at)
    values = lm.reap(TOKENS, None)
    assert len(result.sites) == n_writes
    assert str(result.at) == at
    np.testing.assert_allclose(result.total, np.asarray(values[at])[:, -1] @ probe, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.contributions.sum(0), result.total, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.table("0.mlp_out")[0], np.asarray(values["0.mlp_out"])[:, -1] @ probe, atol=1e-5)
    assert (result.remainder == 0).all()


def test_other_answers_compile_nothing(tiny_models):
    lm = tiny_models("llama")
    direct_logit_attribution(lm, TOKENS, 3, 7)
    with count_compilations() as new:
        direct_logit_attribution(lm, TOKENS[::-1].copy()[:, ::-1].clip(0), 4, 9, position=1)
    assert new == []


@pytest.mark.parametrize("forgotten", ["pos_embed", "embed", "mlp_out"])
def test_a_write_that_is_left_out_shows(tiny_models, monkeypatch, forgotten):
    monkeypatch.setattr(module, "WRITES", tuple(name for name in module.WRITES if name != forgotten))
    with pytest.raises(UnsupportedModelError, match=r"do not add up to 2\.resid_post[\s\S]*Fix: tag whatever else"):
        direct_logit_attribution(tiny_models("gpt2"), TOKENS, 3, 7)


# A residual model of a user's own, with a final norm and an unembedding of several kinds.
D_MODEL, D_VOCAB = 7, 11


def rms_norm_one_plus(params, x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * (1 + params["gain"])[None, None]


def layer_norm(params, x):
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    return x * params["gain"][None, None] + params["bias"][None, None]


def no_norm(params, x):
    return x


def squash(params, x):
    return jnp.tanh(x) * params["gain"][None, None]


def unembed(params, normalised):
    return normalised @ params["W_U"]


def capped(params, normalised):
    return 3 * jnp.tanh(unembed(params, normalised) / 3)


def toy(rng, norm, *, unembedding=unembed, tags=("embed", "mlp_out", "resid_post"), has_heads=False):
    def tag(x, name):
        return sow(x, name=name) if name in tags else x

    def forward(params, tokens):
        x = tag(params["W_E"][tokens], "embed")
        for layer in range(2):
            with layer_scope(layer):
                if has_heads:
                    z = sow(x[:, :, None], name="z")
                    x = x + sow(2 * z.sum(2) @ params["W"], name="attn_out")
                x = tag(x + tag(jnp.tanh(x) @ params["W"], "mlp_out"), "resid_post")
        return unembedding(params, norm(params, x))

    shapes = {"W_E": (D_VOCAB, D_MODEL), "W": (D_MODEL, D_MODEL), "W_U": (D_MODEL, D_VOCAB)}
    shapes |= {"gain": (D_MODEL,), "bias": (D_MODEL,)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    upstream = Upstream(
        "toy",
        forward,
        ln_final=norm,
        unembed=unembedding,
        layer_weights={"W_O": lambda layer: layer["W"][None]},
        layer_params=lambda params, layer: params,
    )
    if not has_heads:
        return LanguageModel(upstream, params)
    gpt2: Any = load(ORACLES / "tiny_gpt2").config
    config = dataclasses.replace(gpt2, n_layers=2, d_model=D_MODEL, d_vocab=D_VOCAB)
    return LanguageModel(upstream, params, config)


TOY_TOKENS = np.array([[1, 4, 2]], np.int32)


@pytest.mark.parametrize("norm", [rms_norm_one_plus, layer_norm, no_norm], ids=["1 + w", "layernorm", "none"])
def test_any_norm_of_the_two_kinds_will_do(rng, norm):
    lm = toy(rng, norm)
    result = direct_logit_attribution(lm, TOY_TOKENS, 3, 7, heads=False)
    logits = np.asarray(lm(TOY_TOKENS), np.float64)[0, -1]
    parts = result.contributions.sum(0) + result.remainder
    np.testing.assert_allclose(parts, [logits[3] - logits[7]], rtol=1e-4, atol=1e-5)
    embed = np.asarray(lm.params["W_E"], np.float64)[TOY_TOKENS[0, -1]]
    residual = np.asarray(lm.reap(TOY_TOKENS, "1.resid_post")["1.resid_post"], np.float64)[0, -1]
    gain, u = np.asarray(lm.params["gain"], np.float64), np.asarray(lm.params["W_U"], np.float64)
    u = u[:, 3] - u[:, 7]
    if norm is layer_norm:
        expected = (gain * (embed - embed.mean()) / np.sqrt(residual.var() + 1e-6)) @ u
    elif norm is rms_norm_one_plus:
        expected = ((1 + gain) * embed / np.sqrt((residual**2).mean() + 1e-6)) @ u
    else:
        expected = embed @ u
    np.testing.assert_allclose(result.contributions[0], [expected], rtol=1e-4, atol=1e-5)


def test_models_that_are_not_linear_at_the_end_are_refused(rng):
    with pytest.raises(UnsupportedModelError, match=r"neither LayerNorm nor RMSNorm[\s\S]*Fix: .*at="):
        direct_logit_attribution(toy(rng, squash), TOY_TOKENS, 3, 7, heads=False)
    lm = toy(rng, no_norm, unembedding=capped)
    residual = np.asarray(lm.reap(TOY_TOKENS, "1.resid_post")["1.resid_post"], np.float64)[0, -1]
    uncapped = residual @ np.asarray(lm.params["W_U"], np.float64)
    # The largest logit is 3 before the cap, and 3 tanh(1) after.
    factor, answer = 3 / np.abs(uncapped).max(), int(np.abs(uncapped).argmax())
    lm = dataclasses.replace(lm, params=lm.params | {"W_U": jnp.float32(factor) * lm.params["W_U"]})
    with pytest.raises(UnsupportedModelError, match=r"not linear in the normed residual[\s\S]*soft cap[\s\S]*Fix:"):
        direct_logit_attribution(lm, TOY_TOKENS, answer, heads=False)
    # The way out that the message names.
    result = direct_logit_attribution(lm, TOY_TOKENS, direction=np.asarray(lm.params["W_U"][:, answer]), heads=False)
    np.testing.assert_allclose(result.contributions.sum(0), [factor * uncapped[answer]], rtol=1e-4)


def test_heads_that_do_not_make_up_their_attn_out_are_refused(rng):
    lm = toy(rng, no_norm, tags=("embed", "attn_out", "mlp_out", "resid_post"), has_heads=True)
    with pytest.raises(UnsupportedModelError, match=r"Heads that do not add up[\s\S]*Fix: use heads=False"):
        direct_logit_attribution(lm, TOY_TOKENS, 3, 7)
    assert direct_logit_attribution(lm, TOY_TOKENS, 3, 7, heads=False).heads is None


@pytest.mark.parametrize(
    ("tags", "words"),
    [(("embed", "mlp_out"), "without a site resid_post"), (("resid_post",), r"without a write before 1\.resid_post")],
)
def test_models_that_lack_a_tag_are_told_which(rng, tags, words):
    with pytest.raises(UnsupportedModelError, match=rf"{words}[\s\S]*Fix: tag"):
        direct_logit_attribution(toy(rng, no_norm, tags=tags), TOY_TOKENS, 3, 7, heads=False)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, InvalidInputError, "neither was given"),
        ({"answer": 3, "direction": np.ones(24, np.float32)}, InvalidInputError, "answer and direction was given"),
        ({"wrong": 3}, InvalidInputError, "wrong was given"),
        ({"answer": " Mary"}, UnknownNameError, r"answer=' Mary' was given in"),
        ({"answer": 3, "wrong": "meen"}, UnknownNameError, r"wrong='meen'[\s\S]*or \"mean\""),
        ({"answer": [1, 2, 3]}, ShapeError, r"answer of int64\[3\][\s\S]*int\[2\]"),
        ({"answer": 3.0}, ShapeError, r"answer of float64\[\]"),
        ({"answer": 10**6}, InvalidInputError, r"answer=1000000[\s\S]*ids from 0"),
        ({"direction": np.ones(5, np.float32)}, ShapeError, r"float32\[5\][\s\S]*float\[24\]"),
        ({"direction": np.ones(24, int)}, ShapeError, r"int64\[24\]"),
        ({"direction": np.full(24, np.nan, np.float32)}, InvalidInputError, "not finite"),
        ({"answer": 3, "at": "1.resid_post"}, InvalidInputError, "without a direction"),
        ({"direction": np.ones(24, np.float32), "at": "resid_post"}, InvalidInputError, "at='resid_post'"),
        ({"direction": np.ones(24, np.float32), "at": "1.mlp_out"}, InvalidInputError, "at='1.mlp_out'"),
        ({"direction": np.ones(24, np.float32), "at": "1.resid_pots"}, UnknownNameError, "resid_post"),
        ({"answer": 3, "position": 5}, InvalidInputError, r"position=5[\s\S]*-5 to 4"),
        ({"answer": 3, "position": 1}, InvalidInputError, "position=1 was given, which is padding in row 1"),
    ],
)
def test_mistakes_are_named(tiny_models, options, error, words):
    assert tiny_models("gpt2").config.d_model == 24
    with pytest.raises(error, match=rf"{words}[\s\S]*Fix:"):
        direct_logit_attribution(tiny_models("gpt2"), TOKENS, **options)


def test_what_a_model_lacks_is_named(tiny_models, rng):
    whole = toy(rng, no_norm)
    bare = LanguageModel(Upstream("bare", whole.forward), whole.params)
    with pytest.raises(UnsupportedModelError, match=r"without ln_final and unembed and W_O[\s\S]*heads=False"):
        direct_logit_attribution(bare, TOY_TOKENS, 3, 7)
    result = direct_logit_attribution(tiny_models("gpt2"), TOKENS, 3, 7, heads=False)
    with pytest.raises(UnknownNameError, match=r"Heads were asked for[\s\S]*heads=True"):
        result.strongest_heads(1)
