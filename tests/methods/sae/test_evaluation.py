"""Evaluation on text: every loss from its definition, by another route through the model and in plain NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.core.results import load_result, save_result
from interp_jax.core.sites import Site
from interp_jax.data.text_streams import pack
from interp_jax.forward.spliced_losses import LOSS_TOLERANCE
from interp_jax.forward.splicing import checked_splice, looped_pass, spliced_logits, spliced_passes
from interp_jax.methods.sae import SAE, ReLU, TopK
from interp_jax.methods.sae.evaluation import SAEEvaluation, evaluate_sae
from interp_jax.methods.sae.reconstruction import measure_reconstruction
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import layer_scope, sow

N_LAYERS, D, D_VOCAB = 3, 6, 11
QUIET: dict[str, Any] = {"progress": False}


def toy_forward(params, tokens):
    """Every layer mixes positions causally and depends on all before it."""
    x = params["W_E"][tokens]
    for layer in range(N_LAYERS):
        with layer_scope(layer):
            x = sow(x, name="resid_pre")
            # Two heads of D / 2.
            z = sow(jnp.cumsum(x, axis=1).reshape(*x.shape[:2], 2, D // 2), name="z")
            x = x + sow(jnp.tanh(z.reshape(x.shape) @ params["mix"][layer]), name="attn_out")
            x = x + sow(jnp.tanh(x + params["mlp"][layer][tokens]), name="mlp_out")
    sow(x * 1.0, name="unread")
    return x @ params["W_U"]


@pytest.fixture
def toy(rng):
    shapes = {"W_E": (D_VOCAB, D), "W_U": (D, D_VOCAB)}
    params: dict = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    for name, shape in (("mix", (D, D)), ("mlp", (D_VOCAB, D))):
        # Small enough that rounding does not grow from layer to layer.
        params[name] = [jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for _ in range(N_LAYERS)]
    return LanguageModel(Upstream("toy", toy_forward), params, name="toy")


@pytest.fixture
def toy_tokens(rng):
    return rng.integers(0, D_VOCAB, (5, 7)).astype(np.int32)


def random_sae(key, site, *, d=D, n_latents=13, write=None, d_out=None):
    architecture = ReLU(is_centred=False)
    params = architecture.init(key, d_in=d, n_latents=n_latents, d_out=d_out, decoder_norm=0.8)
    params["b_dec"] = jnp.full_like(params["b_dec"], 0.1)
    return SAE(architecture, params, read=Site(*site), write=None if write is None else Site(*write))


def identity_sae(site, d=D):
    both = jnp.concatenate([jnp.eye(d), -jnp.eye(d)])
    params = {"W_enc": both.T, "b_enc": jnp.zeros(2 * d), "W_dec": both, "b_dec": jnp.zeros(d)}
    return SAE(ReLU(), params, read=Site(*site))


def constant_sae(site, value):
    params = ReLU(is_centred=False).init(jax.random.key(0), d_in=D, n_latents=4)
    params |= {"W_dec": jnp.zeros((4, D)), "b_dec": jnp.asarray(value, jnp.float32)}
    return SAE(ReLU(is_centred=False), params, read=Site(*site))


def numpy_relu_sae(sae, x):
    W_enc, b_enc, W_dec, b_dec = (
        np.asarray(sae.params[name], np.float64) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    latents = np.maximum(np.asarray(x, np.float64) @ W_enc + b_enc, 0)
    return latents, latents @ W_dec + b_dec


def numpy_losses(logits, clean, tokens):
    """Mean cross-entropy and KL(clean || prediction) over tokens that follow a token, by loops."""
    log_p, log_clean = (
        (z := np.asarray(part, np.float64)) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - z.max(-1, keepdims=True)
        for part in (logits, clean)
    )  # fmt: skip
    losses, kls = [], []
    for row in range(len(tokens)):
        for t in range(tokens.shape[1] - 1):
            if tokens[row, t] >= 0 and tokens[row, t + 1] >= 0:
                losses.append(-log_p[row, t, tokens[row, t + 1]])
                kls.append((np.exp(log_clean[row, t]) * (log_clean[row, t] - log_p[row, t])).sum())
    return np.mean(losses), np.mean(kls), len(losses)


def assert_losses(evaluation, by_name, tokens):
    for name, logits in by_name.items():
        loss, kl, n = numpy_losses(logits, by_name["clean"], tokens)
        assert evaluation.losses[name] == pytest.approx(loss, rel=5e-5), name
        assert evaluation.kl.get(name, 0.0) == pytest.approx(kl, rel=1e-3, abs=2e-6), name
        assert evaluation.n_targets == n


def assert_same_measures(one, other):
    """Equal up to rounding, in which a latent may be just above 0 or not, and a quotient have hardly a denominator."""
    np.testing.assert_allclose(one.n_fired, other.n_fired, atol=1)
    for name in ("n_tokens", "l1", "l1_weighted", "squared_error", "fvu", "error_variance", "cosine", "norm_ratio"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4, abs=1e-5), name


def padded_tokens(rng, d_vocab):
    tokens = rng.integers(0, d_vocab, (5, 7)).astype(np.int32)
    tokens[1, :3] = -1
    tokens[4, 5:] = -1
    tokens[0, 2] = 7
    return tokens


def test_every_loss_is_its_definition(tiny, key, rng):
    """Values by `reap`, replacements in NumPy, logits by `intervene`: none of it shared with the evaluation."""
    site = Site(1, "resid_post")
    sae = random_sae(key, site, d=tiny.config.d_model)
    tokens = padded_tokens(rng, tiny.config.d_vocab)
    is_touched = (tokens >= 0) & (tokens != 7)
    is_touched[[0, 2, 3, 4], 0] = False  # the first token of each row
    is_touched[1, 3] = False

    y = np.asarray(tiny.reap(tokens, site)[site])
    latents, y_hat = numpy_relu_sae(sae, y)
    mean = y[is_touched].astype(np.float64).mean(0)
    new = {"spliced": y_hat, "zero": np.zeros_like(y_hat), "mean": np.broadcast_to(mean, y.shape)}
    by_name = {"clean": tiny.intervene(tokens, {site: y})} | {
        name: tiny.intervene(tokens, {site: np.where(is_touched[..., None], value, y).astype(np.float32)})
        for name, value in new.items()
    }

    evaluation = evaluate_sae(tiny, sae, tokens, untouched_tokens=[7], n_untouched=1, **QUIET)
    assert_losses(evaluation, by_name, tokens)
    part, error = evaluation.reconstruction, (y - y_hat)[is_touched]
    assert part.n_tokens == is_touched.sum()
    # Rounding may lift one of a latent's pre-activations above 0.
    np.testing.assert_allclose(part.n_fired, (latents > 0)[is_touched].sum(0), atol=1)
    assert part.l0 == pytest.approx(part.n_fired.sum() / is_touched.sum())
    assert part.fvu == pytest.approx(np.square(error).sum() / np.square(y[is_touched] - mean).sum(), rel=1e-4)
    clean, spliced, zero, mean_loss = (evaluation.losses[name] for name in ("clean", "spliced", "zero", "mean"))
    assert evaluation.delta_loss == spliced - clean
    if abs(zero - clean) >= LOSS_TOLERANCE:
        assert evaluation.loss_recovered("zero") == (zero - spliced) / (zero - clean)
    if abs(mean_loss - clean) >= LOSS_TOLERANCE:
        assert evaluation.loss_recovered("mean") == (mean_loss - spliced) / (mean_loss - clean)
    assert (part.read, part.write) == (site, site)


def test_several_at_once_read_what_is_there_by_then(toy, toy_tokens, key):
    keys = jax.random.split(key, 3)
    saes = [
        random_sae(keys[0], (2, "mlp_out")),  # the order given is not the order of the pass
        random_sae(keys[1], (0, "attn_out")),
        random_sae(keys[2], (1, "resid_pre"), n_latents=9, write=(1, "mlp_out")),
    ]

    def numpy_sae(sae):
        return lambda value: jnp.asarray(numpy_relu_sae(sae, value)[1], jnp.float32)

    # One after the other: what each reads depends on those before it.
    edits = {saes[1].read: numpy_sae(saes[1])}
    changed: dict[str, Any] = {}

    def remember(value):
        changed["x"] = value
        return value

    toy.intervene(toy_tokens, edits | {saes[2].read: remember})
    edits |= {saes[2].write: lambda value: numpy_sae(saes[2])(changed["x"]), saes[0].read: numpy_sae(saes[0])}
    sites = [sae.write or sae.read for sae in saes]
    clean = toy.reap(toy_tokens, [*sites, *(sae.read for sae in saes)])
    means = {site: np.asarray(clean[site], np.float64).mean((0, 1)) for site in sites}

    def constant(of):
        return {site: np.broadcast_to(of[site], clean[site].shape).astype(np.float32) for site in sites}

    by_name = {
        "clean": toy(toy_tokens),
        "spliced": toy.intervene(toy_tokens, edits),
        "zero": toy.intervene(toy_tokens, constant({site: np.zeros(D) for site in sites})),
        "mean": toy.intervene(toy_tokens, constant(means)),
    }
    evaluation = evaluate_sae(toy, saes, toy_tokens, batch_size=3, **QUIET)
    assert_losses(evaluation, by_name, toy_tokens)
    # Each SAE is measured on the clean pass.
    for sae, part in zip(saes, evaluation.reconstructions, strict=True):
        alone = measure_reconstruction(sae, clean[sae.read], clean[sae.write or sae.read])
        assert_same_measures(part, alone)
    assert {"0.attn_out/l0", "1.mlp_out/fvu", "2.mlp_out/n_dead", "loss_recovered_zero"} <= set(evaluation.numbers())
    with pytest.raises(InvalidInputError, match=r"The reconstruction of 3 SAEs was asked for[\s\S]*Fix:"):
        _ = evaluation.reconstruction


def test_one_site_by_the_rest_of_a_pass_and_by_whole_passes(toy, toy_tokens, key):
    splice = checked_splice(toy, random_sae(key, (0, "attn_out"), write=(1, "mlp_out")), toy_tokens, where="here")
    ways = [lambda number, x, y: y, lambda number, x, y: x + y, lambda number, x, y: y * (number + 2.0)]
    for way, logits in zip(ways, spliced_passes(toy, splice, toy_tokens, ways), strict=True):
        np.testing.assert_array_equal(logits, looped_pass(toy, splice, toy_tokens, way))


def test_an_sae_that_loses_nothing_recovers_everything_exactly(toy, toy_tokens):
    evaluation = evaluate_sae(toy, identity_sae((1, "mlp_out")), toy_tokens, **QUIET)
    assert evaluation.losses["spliced"] == evaluation.losses["clean"]
    assert (evaluation.delta_loss, evaluation.reconstruction.fvu) == (0, 0)
    for name in ("zero", "mean"):
        assert evaluation.kl[name] > 0
        assert evaluation.loss_recovered(name) == 1 or not evaluation.is_recoverable(name)
    assert evaluation.kl["spliced"] == 0


def test_a_sixteen_bit_model_is_measured_in_float32_and_left_as_it_is(toy, toy_tokens, key):
    short = replace(toy, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toy.params))
    site = (1, "mlp_out")
    identity = evaluate_sae(short, identity_sae(site), toy_tokens, **QUIET)
    kept = evaluate_sae(short, random_sae(key, site), toy_tokens, keep_error=True, **QUIET)
    assert identity.losses == kept.losses
    assert identity.losses["spliced"] == identity.losses["clean"]
    # Cut at the same site: a program of the whole may round in other places.
    logits = short.intervene(toy_tokens, {"1.mlp_out": lambda value: value})
    by_name = {"clean": logits.astype(jnp.float32)}
    assert_losses(evaluate_sae(short, identity_sae(site), toy_tokens, ablations=(), **QUIET), by_name, toy_tokens)


def test_an_sae_that_is_an_ablation_recovers_nothing_of_it(toy, toy_tokens):
    zero = evaluate_sae(toy, constant_sae((1, "mlp_out"), np.zeros(D)), toy_tokens, **QUIET)
    assert zero.losses["spliced"] == zero.losses["zero"]
    assert zero.loss_recovered("zero") == 0 or not zero.is_recoverable("zero")
    mean = np.asarray(toy.reap(toy_tokens, "1.mlp_out")["1.mlp_out"]).mean((0, 1))
    at_mean = evaluate_sae(toy, constant_sae((1, "mlp_out"), mean), toy_tokens, **QUIET)
    assert at_mean.losses["spliced"] == pytest.approx(at_mean.losses["mean"], rel=1e-5)
    assert at_mean.reconstruction.fvu == pytest.approx(1, rel=1e-4)


def test_with_the_error_kept_nothing_changes_to_the_bit(tiny_llama, key, rng):
    tokens = padded_tokens(rng, 259)
    keys = jax.random.split(key)
    saes = [random_sae(one, (layer, "resid_post"), d=24) for layer, one in zip((0, 1), keys, strict=True)]
    for given in (saes[0], saes):
        evaluation = evaluate_sae(tiny_llama, given, tokens, keep_error=True, ablations=(), **QUIET)
        assert evaluation.losses["spliced"] == evaluation.losses["clean"]
        assert evaluation.kl == {"spliced": 0.0}
        assert list(evaluation.losses) == ["clean", "spliced"]
        assert "errors kept" in repr(evaluation)
    # Dropped, it does change something.
    assert evaluate_sae(tiny_llama, saes, tokens, ablations=(), **QUIET).kl["spliced"] > 1e-4


def test_edits_of_latents_with_the_error_kept_and_dropped(toy, toy_tokens, key):
    sae = random_sae(key, (1, "attn_out"))
    y = toy.reap(toy_tokens, sae.read)[sae.read]
    latents, y_hat = numpy_relu_sae(sae, y)
    taken = latents[..., [4]] * np.asarray(sae.W_dec, np.float64)[4]

    def without_4(f):
        return f.at[..., 4].set(0.0)

    for keep_error, new in ((True, np.asarray(y) - taken), (False, y_hat - taken)):
        new[:, 0] = y[:, 0]
        expected = toy.intervene(toy_tokens, {sae.read: new.astype(np.float32)})
        got = spliced_logits(toy, sae, toy_tokens, keep_error=keep_error, edits={0: without_4}, n_untouched=1)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        InvalidInputError, match=r"SAE number 1 was given in spliced_logits[\s\S]*from 0 to 0[\s\S]*Fix"
    ):
        spliced_logits(toy, sae, toy_tokens, edits={1: without_4})
    # What lacks an axis is not spread over it.
    for edit in (lambda f: f[:, -1:], lambda f: f[0], lambda f: f.sum()):
        with pytest.raises(ShapeError, match=r"An edit gave \[[\s\S]*all latents of all positions[\s\S]*Fix"):
            spliced_logits(toy, sae, toy_tokens, edits={0: edit})


@pytest.mark.parametrize(
    "options",
    [{"untouched_tokens": [1.5]}, {"untouched_tokens": "1"}, {"n_untouched": -1}, {"n_untouched": True}],
    ids=str,
)
def test_what_is_left_untouched_is_token_ids_and_a_number(toy, toy_tokens, key, options):
    with pytest.raises(InvalidInputError, match=r"were given in what is left untouched[\s\S]*token ids[\s\S]*Fix"):
        spliced_logits(toy, random_sae(key, (1, "mlp_out")), toy_tokens, **options)


def test_heads_are_read_side_by_side(toy, toy_tokens, key):
    z = np.asarray(toy.reap(toy_tokens, "1.z")["1.z"])
    sae = random_sae(key, (1, "z"))
    new = numpy_relu_sae(sae, z.reshape(*toy_tokens.shape, D))[1].reshape(z.shape)
    by_name = {"clean": toy(toy_tokens), "spliced": toy.intervene(toy_tokens, {"1.z": new.astype(np.float32)})}
    assert_losses(evaluate_sae(toy, sae, toy_tokens, ablations=(), **QUIET), by_name, toy_tokens)


def test_stacked_layers_say_the_same(tiny_llama, key, rng):
    tokens = padded_tokens(rng, 259)
    sae = random_sae(key, (1, "resid_post"), d=24)
    plain = evaluate_sae(tiny_llama, sae, tokens, **QUIET)
    stacked = evaluate_sae(tiny_llama.stacked(), sae, tokens, **QUIET)
    assert stacked.losses == pytest.approx(plain.losses, rel=2e-5)
    assert stacked.kl == pytest.approx(plain.kl, rel=1e-3, abs=2e-6)
    assert_same_measures(stacked.reconstruction, plain.reconstruction)


def _numbers(text):
    return [int(word) for word in text.split()]


def test_batches_of_any_size_and_text_that_comes_in_slices(toy, toy_tokens, key):
    class Sliced:
        def __len__(self):
            return len(toy_tokens)

        def __getitem__(self, index):
            assert len(toy_tokens[index]) <= 2
            return toy_tokens[index]

    sae = random_sae(key, (1, "mlp_out"))
    whole = evaluate_sae(toy, sae, toy_tokens, batch_size=5, **QUIET)
    # One document of all tokens, cut into the same sequences.
    packed, _ = pack([" ".join(map(str, toy_tokens.reshape(-1)))], _numbers, n_ctx=7, separator=None, holdout=0)
    np.testing.assert_array_equal(packed[:], toy_tokens)
    for tokens in (toy_tokens.tolist(), Sliced(), packed):
        parts = evaluate_sae(toy, sae, tokens, batch_size=2, **QUIET)
        assert_same_measures(parts.reconstruction, whole.reconstruction)
        assert parts.losses == pytest.approx(whole.losses, rel=2e-5)
        assert parts.kl == pytest.approx(whole.kl, rel=1e-3, abs=2e-6)
        assert (parts.n_targets, parts.n_sequences) == (whole.n_targets, whole.n_sequences) == (30, 5)


def test_padding_on_either_side_is_the_same(tiny_llama, key, rng):
    tokens, padding = rng.integers(0, 259, (5, 5)).astype(np.int32), np.full((5, 2), -1, np.int32)
    sae = random_sae(key, (1, "resid_post"), d=24)
    sides = (padding, tokens), (tokens, padding)
    left, right = (
        evaluate_sae(tiny_llama, sae, np.concatenate(side, axis=1), n_untouched=1, **QUIET) for side in sides
    )
    assert left.n_targets == right.n_targets == 20
    assert left.reconstruction.n_tokens == right.reconstruction.n_tokens == 20
    assert left.losses == pytest.approx(right.losses, rel=1e-4)
    assert left.reconstruction.fvu == pytest.approx(right.reconstruction.fvu, rel=1e-4)


def test_another_layer_another_sae_and_more_text_compile_nothing(toy, toy_tokens, key):
    keys = jax.random.split(key)
    evaluate_sae(toy, random_sae(keys[0], (0, "mlp_out")), toy_tokens, batch_size=4, **QUIET)
    with count_compilations() as new:
        more = np.concatenate([toy_tokens, toy_tokens[::-1]])
        evaluate_sae(toy, random_sae(keys[1], (1, "mlp_out")), more, batch_size=4, **QUIET)
    assert new == []


def test_an_ablation_that_costs_nothing_recovers_nothing_that_could_be_told(toy, toy_tokens, key):
    evaluation = evaluate_sae(toy, random_sae(key, (None, "unread")), toy_tokens, **QUIET)
    assert evaluation.losses["zero"] == evaluation.losses["clean"]
    assert np.isnan(evaluation.loss_recovered("zero"))
    assert not evaluation.is_recoverable("mean")
    assert "n/a (zero: ablation changes the loss by less than 0.0001)" in repr(evaluation)


def test_recovered_losses_are_not_clipped():
    losses = {"clean": 3.0, "spliced": 2.5, "zero": 5.0, "mean": 2.0}
    evaluation = SAEEvaluation((), losses, {}, n_targets=1, n_sequences=1)
    assert (evaluation.loss_recovered("zero"), evaluation.loss_recovered("mean")) == (1.25, 0.5)
    assert SAEEvaluation((), losses | {"spliced": 6.0}, {}, n_targets=1, n_sequences=1).loss_recovered() == -0.5
    with pytest.raises(UnknownNameError, match=r"'maen' was asked for[\s\S]*Did you mean 'mean'"):
        evaluation.loss_recovered("maen")


def test_the_table_and_the_files(toy, toy_tokens, key, tmp_path):
    evaluation = evaluate_sae(toy, random_sae(key, (1, "mlp_out")), toy_tokens, **QUIET)
    table = repr(evaluation)
    assert table.startswith("SAEEvaluation(5 sequences, 30 targets)\n  loss (nats)         clean ")
    for words in (
        "delta loss",
        "KL(clean || .)",
        "loss recovered",
        "L0 ",
        "FVU",
        "cosine",
        "dead",
        "encoder . decoder",
    ):
        assert words in table
    saved = load_result(save_result(evaluation, name="evaluation", root=tmp_path)).result
    assert saved["losses"] == evaluation.losses
    np.testing.assert_array_equal(saved["reconstructions"][0]["n_fired"], evaluation.reconstruction.n_fired)


TOKENS = np.zeros((2, 4), np.int32)
KEY = jax.random.key(0)
BAD = {
    "no-tokens": ({"tokens": np.zeros((0, 4), np.int32)}, InvalidInputError, r"An empty prompt .*\[0, 4\]"),
    "all-padding": ({"tokens": np.full((2, 4), -1)}, InvalidInputError, "row 0 is all padding"),
    "no-targets": ({"tokens": np.zeros((2, 1), np.int32)}, InvalidInputError, "2 sequences without a target"),
    "nothing-touched": ({"n_untouched": 4}, InvalidInputError, "No tokens were given to measure on"),
    "width": (
        {"saes": random_sae(KEY, (1, "mlp_out"), d=5)},
        ShapeError,
        r"reads vectors of 5, was given for 1\.mlp_out",
    ),
    "written-width": (
        {"saes": random_sae(KEY, (1, "attn_out"), write=(1, "mlp_out"), d_out=5)},
        ShapeError,
        r"writes vectors of 5, was given for 1\.mlp_out \[1, 4, 6\]",
    ),
    "no-site": ({"saes": replace(random_sae(KEY, (1, "x")), read=None)}, InvalidInputError, "without a site was given"),
    "no-sae": ({"saes": []}, InvalidInputError, "No SAE was given"),
    "no-sae-at-all": ({"saes": [len]}, InvalidInputError, "built-in function len"),
    "unknown-site": ({"saes": random_sae(KEY, (1, "mlp_uot"))}, UnknownNameError, r"mlp_uot[\s\S]*Did you mean"),
    "unknown-layer": ({"saes": random_sae(KEY, (9, "mlp_out"))}, UnknownNameError, r"9\.mlp_out"),
    "many-sites": (
        {"saes": replace(random_sae(KEY, (1, "x")), read="mlp_out")},
        UnknownNameError,
        "'mlp_out' is 3 sites",
    ),
    "backwards": (
        {"saes": random_sae(KEY, (1, "mlp_out"), write=(0, "mlp_out"))},
        InvalidInputError,
        r"writes 0\.mlp_out before 1\.mlp_out",
    ),
    "twice": (
        {"saes": [random_sae(KEY, (1, "mlp_out")), random_sae(KEY, (1, "attn_out"), write=(1, "mlp_out"))]},
        InvalidInputError,
        r"several write 1\.mlp_out",
    ),
    "ablation": ({"ablations": ("zreo",)}, UnknownNameError, r"Unknown ablation 'zreo'[\s\S]*Did you mean 'zero'"),
    "batch-size": ({"batch_size": 0}, InvalidInputError, "batch_size = 0"),
    "half-a-batch": ({"batch_size": 1.5}, InvalidInputError, "batch_size = 1.5"),
    "one-id": ({"untouched_tokens": 3}, InvalidInputError, "untouched_tokens = 3"),
    "nan": (
        {"saes": constant_sae((1, "mlp_out"), np.full(D, np.nan))},
        InvalidInputError,
        "Reconstructions that are not finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(toy, case):
    options, error, words = BAD[case]
    given = {"tokens": TOKENS, "saes": random_sae(KEY, (1, "mlp_out")), "progress": False} | options
    with pytest.raises(error, match=rf"{words}[\s\S]*(Expected|Known):[\s\S]*Fix:") as caught:
        evaluate_sae(toy, given.pop("saes"), given.pop("tokens"), **given)
    assert "evaluate_sae" in str(caught.value)


def test_one_program_serves_every_variant_of_the_same_kind(toy, toy_tokens, key):
    params = TopK(3).init(key, d_in=D, n_latents=13)
    sae = SAE(TopK(3), params, read=Site(1, "mlp_out"))
    evaluation = evaluate_sae(toy, sae, toy_tokens, ablations=("zero",), **QUIET)
    assert evaluation.reconstruction.l0 <= 3
    assert list(evaluation.kl) == ["spliced", "zero"]
