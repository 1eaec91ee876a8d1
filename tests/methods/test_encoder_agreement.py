"""Agreement of two encoders: NumPy's own correlation over all tokens at once, and what is refused."""

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
from interp_jax.methods import encoder_agreement as module
from interp_jax.methods.encoder_agreement import (
    N_INTERVALS,
    SUMS,
    add_sums,
    encoder_agreement,
    intervals,
    low_half,
    pearson,
)
from interp_jax.methods.pursuit import MatchingPursuit, encoder
from interp_jax.methods.sae import SAE, ReLU, TopLatents
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.sowing import layer_scope, sow

D, D_VOCAB, N_LATENTS, SITE = 6, 50, 14, Site(0, "mlp_out")


def toy_forward(params, tokens):
    with layer_scope(0):
        return sow(params["mlp"][tokens], name="mlp_out") @ params["W_U"]


def quarters(rng, shape):
    """Numbers whose products and sums float32 holds exactly, in any order."""
    return jnp.asarray(rng.integers(-9, 10, shape) / 4, jnp.float32)


@pytest.fixture
def toy(rng):
    params = {"mlp": quarters(rng, (D_VOCAB, D)), "W_U": quarters(rng, (D, D_VOCAB))}
    return LanguageModel(Upstream("toy", toy_forward), params, name="toy")


@pytest.fixture
def coders(rng):
    params: dict = {name: quarters(rng, (D, N_LATENTS)) for name in ("W_enc", "other")}
    params |= {"b_enc": quarters(rng, N_LATENTS), "W_dec": quarters(rng, (N_LATENTS, D)), "b_dec": jnp.zeros(D)}
    other = SAE(ReLU(), params | {"W_enc": params.pop("other")}, read=SITE)
    params["b_enc"] = params["b_enc"].at[0].set(-1000.0)  # by the first, latent 0 never fires
    return SAE(ReLU(), params, read=SITE), TopLatents(other, 5)


def correlation(a, b):
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan
    return np.corrcoef(a, b)[0, 1]


def test_every_latent_is_what_numpy_says_of_all_tokens_together(toy, coders, rng, tmp_path, monkeypatch):
    tokens = rng.integers(0, D_VOCAB, (7, 9)).astype(np.int32)
    tokens[2, :4] = -1
    counts = tokens >= 0
    counts &= np.cumsum(counts, axis=1) > 1
    monkeypatch.setattr(module, "_LATENT_BYTES", 4 * N_LATENTS * 5)  # five tokens at a time
    first, second = coders
    found = encoder_agreement(toy, first, second, tokens, n_untouched=1, batch_size=3, progress=False)

    x = np.asarray(toy.reap(tokens, SITE)[SITE])[counts]
    a, b = (np.asarray(coder.encode(x), np.float64) for coder in coders)
    assert found.n_tokens == counts.sum()
    for latent in range(N_LATENTS):
        either = (a[:, latent] != 0) | (b[:, latent] != 0)
        one, other = a[either, latent], b[either, latent]
        assert found.n_either[latent] == either.sum()
        assert found.pearson[latent] == pytest.approx(correlation(one, other), abs=1e-6, nan_ok=True)
        is_low = one < found.threshold[latent] if (one > 0).any() else np.ones(len(one), bool)
        assert found.n_low[latent] == is_low.sum()
        expected = correlation(one[is_low], other[is_low])
        assert found.pearson_low[latent] == pytest.approx(expected, abs=1e-6, nan_ok=True)
        # At least half of the activations, and not the next interval's.
        fired = one[one > 0]
        assert 2 * (fired < found.threshold[latent]).sum() >= len(fired)
        assert 2 * (fired < found.threshold[latent] / 2**0.25).sum() <= len(fired)
        for number, values in enumerate((a[:, latent], b[:, latent])):
            assert found.n_fired[number, latent] == (values != 0).sum()
            smallest = values[values != 0].min() if (values != 0).any() else np.nan
            np.testing.assert_equal(found.smallest[number, latent], smallest)
    assert np.isnan(found.pearson[0]) and found.n_fired[0, 0] == 0
    assert "EncoderAgreement at 0.mlp_out, encoder and pursuit, 52 tokens" in repr(found)
    saved = load_result(save_result(found, name="agreement", root=tmp_path)).result
    np.testing.assert_array_equal(saved["pearson"], found.pearson)


def test_a_coder_agrees_with_itself(toy, coders, rng):
    tokens = rng.integers(0, D_VOCAB, (5, 9)).astype(np.int32)
    found = encoder_agreement(toy, coders[0], coders[0], tokens, progress=False)
    known = found.pearson[~np.isnan(found.pearson)]
    np.testing.assert_allclose(known, 1, atol=1e-9)
    np.testing.assert_array_equal(found.smallest[0], found.smallest[1])


def test_intervals_are_quarters_of_octaves():
    values = np.array([0.0, 1.0, 1.18, 1.2, -2.0, 1e-9, 1e9])
    assert intervals(values).tolist() == [0, 65, 65, 66, 69, 1, N_INTERVALS - 1]
    counts = np.zeros((2, N_INTERVALS))
    counts[0, [0, 65, 66, 69]] = [10, 2, 1, 3]
    is_low, ends = low_half(counts)
    assert np.flatnonzero(is_low[0]).tolist() == list(range(67))
    assert ends.tolist() == [pytest.approx(2**0.5), 0]
    assert np.flatnonzero(is_low[1]).tolist() == [0]


def test_sums_in_parts_are_sums_and_what_does_not_vary_has_no_correlation(rng):
    a, b = rng.uniform(0.1, 9, (2, 40, 3))
    a[:, 2] = 1 / 3
    sums, parts = np.zeros((2, len(SUMS), 3, N_INTERVALS))
    add_sums(sums, a, b)
    for part in np.split(np.arange(40), [3, 17]):
        add_sums(parts, a[part], b[part])
    np.testing.assert_allclose(sums, parts, rtol=1e-12)
    found = pearson(sums.sum(axis=2))
    np.testing.assert_allclose(found[:2], [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(2)], atol=1e-10)
    assert np.isnan(found[2])


PARAMS = ReLU().init(jax.random.key(0), d_in=D, n_latents=N_LATENTS)
ONE = SAE(ReLU(), PARAMS, read=SITE)
BAD = {
    "latents": (
        {"second": replace(ONE, params=ReLU().init(jax.random.key(0), d_in=D, n_latents=9))},
        ShapeError,
        "Coders of 14 and of 9 latents were given",
    ),
    "no-site": ({"second": replace(ONE, read=None)}, InvalidInputError, "without a site was given"),
    "unknown-site": ({"first": replace(ONE, read=Site(0, "mlp_uot"))}, UnknownNameError, "mlp_uot"),
    "no-text": ({"tokens": np.zeros((0, 4), np.int32)}, InvalidInputError, "An empty prompt"),
    "nothing-counts": ({"n_untouched": 9}, InvalidInputError, "No tokens were given to measure on"),
    "nan": (
        {"second": replace(encoder(MatchingPursuit(), ONE.W_dec, k=1, read=SITE), b_dec=jnp.full(D, jnp.nan))},
        InvalidInputError,
        "Latents that are not finite",
    ),
    "k": ({"second": TopLatents(ONE, 99)}, InvalidInputError, "k = 99 was given"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_named(toy, case):
    options, error, words = BAD[case]
    given: dict[str, Any] = {"first": ONE, "second": ONE, "tokens": np.zeros((2, 4), np.int32)} | options
    with pytest.raises(error, match=rf"{words}[\s\S]*(Expected|Known):[\s\S]*Fix:"):
        encoder_agreement(toy, given.pop("first"), given.pop("second"), given.pop("tokens"), progress=False, **given)
