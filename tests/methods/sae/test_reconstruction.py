"""Measures of reconstructions: closed forms, plain NumPy, and batches of any size."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.core.sites import Site
from interp_jax.forward.moments import Moments
from interp_jax.methods.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK, reconstruction
from interp_jax.methods.sae.normalization import Normalization
from interp_jax.methods.sae.reconstruction import measure_reconstruction
from interp_jax.transforms.compilations import count_compilations


def linear_sae(d, *, scale=1.0, offset=0.0):
    """An SAE that returns `scale * x + offset`, exactly where the scale is a power of two."""
    both = jnp.concatenate([jnp.eye(d), -jnp.eye(d)])
    params = {"W_enc": both.T, "b_enc": jnp.zeros(2 * d), "W_dec": both * scale, "b_dec": jnp.full(d, offset)}
    return SAE(ReLU(is_centred=False), params)


def brute_force(y, y_hat, latents, W_dec):
    """Everything from its definition, in float64."""
    y, y_hat, f = (np.asarray(part, np.float64) for part in (y, y_hat, latents))
    error, total = y - y_hat, np.square(y - y.mean(0)).sum()
    norm, norm_hat = np.linalg.norm(y, axis=1), np.linalg.norm(y_hat, axis=1)
    return {
        "n_tokens": len(y),
        "l1": f.sum(1).mean(),
        "l1_weighted": (f @ np.linalg.norm(np.asarray(W_dec, np.float64), axis=1)).mean(),
        "squared_error": np.square(error).sum(1).mean(),
        "fvu": np.square(error).sum() / total,
        "explained_variance": 1 - np.square(error).sum() / total,
        "error_variance": np.square(error - error.mean(0)).sum() / total,
        "cosine": ((y * y_hat).sum(1) / (norm * norm_hat)).mean(),
        "norm_ratio": (norm_hat / norm).mean(),
        "shrinkage": np.square(y_hat).sum() / (y * y_hat).sum(),
    }


def assert_measures(result, expected):
    for name, value in expected.items():
        assert result.numbers()[name] == pytest.approx(value, rel=5e-5, abs=5e-6), name
    # Rounding may lift a pre-activation above 0, or not; L0 is what was counted.
    assert result.l0 == pytest.approx(result.n_fired.sum() / result.n_tokens)


def test_an_error_that_is_always_the_same_is_no_unexplained_variance_but_counts_in_the_fvu(rng):
    x = rng.normal(size=(4096, 8)).astype(np.float32)
    result = measure_reconstruction(linear_sae(8, offset=3.0), x)
    assert result.variance_explained_up_to_a_constant == pytest.approx(1, abs=1e-6)
    assert result.fvu == pytest.approx(72 * 4096 / np.square(x - x.mean(0)).sum(), rel=1e-5)
    assert result.fvu == pytest.approx(9, abs=0.6)


def test_half_of_everything(rng):
    x = rng.normal(size=(200, 5)).astype(np.float32)
    x = np.concatenate([x, -x])  # a mean of zero
    result = measure_reconstruction(linear_sae(5, scale=0.5), x)
    assert result.shrinkage == pytest.approx(0.5, abs=1e-6)
    assert result.fvu == pytest.approx(0.25, abs=1e-6)
    assert result.norm_ratio == pytest.approx(0.5, abs=1e-6)
    assert result.cosine == pytest.approx(1, abs=1e-6)


def test_the_whole_is_explained_exactly(rng):
    result = measure_reconstruction(linear_sae(5), rng.normal(size=(30, 5)).astype(np.float32))
    assert (result.fvu, result.squared_error, result.l0) == (0, 0, 5)
    assert result.cosine == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("a", [0.5, 3.0])
def test_variance_is_about_the_mean_squared_and_not_the_squares_mean(a):
    # x = -a or a: the variance is a^2; with the mean of squares in the mean's place it would be a^2 - a^4.
    x = np.array([[a], [-a]] * 4, np.float32)
    assert measure_reconstruction(linear_sae(1, scale=0.0), x).fvu == 1
    assert measure_reconstruction(linear_sae(1, scale=0.0, offset=a / 2), x).fvu == pytest.approx(1.25)


# Each trained into something with real densities would be slow: random weights, with all parts at work.
SAES = {
    "relu": (ReLU(), Normalization()),
    "gated": (Gated(), Normalization("unit_ms", 0.3)),
    "top_k": (TopK(3), Normalization("layer")),
    "batch_top_k": (BatchTopK(3), Normalization()),
    "jump_relu": (JumpReLU(), Normalization("constant_norm")),
}


def random_sae(key, name, *, d=6, n_latents=17):
    architecture, scaling = SAES[name]
    params = architecture.init(key, d_in=d, n_latents=n_latents, decoder_norm=0.7)
    params["b_dec"] = jnp.linspace(-0.5, 0.5, d)
    return SAE(architecture, params, input_scaling=replace(scaling, scale=jnp.asarray(scaling.scale)))


@pytest.mark.parametrize("name", SAES)
def test_every_measure_is_its_definition(key, rng, name):
    sae = random_sae(key, name)
    x = (rng.normal(size=(4, 9, 6)) + 2).astype(np.float32)
    latents, y_hat = sae.encode(x), sae.decode(sae.encode(x), x)
    expected = brute_force(x.reshape(-1, 6), y_hat.reshape(-1, 6), latents.reshape(-1, 17), sae.W_dec)
    for batch_size in (4096, 10):
        result = measure_reconstruction(sae, x, batch_size=batch_size)
        assert_measures(result, expected)
        np.testing.assert_allclose(result.n_fired, (np.asarray(latents) > 0).sum((0, 1)), atol=1)


def test_a_transcoder_is_measured_against_what_it_writes(key, rng):
    transcoder = ReLU(is_centred=False)
    params = transcoder.init(key, d_in=4, n_latents=11, d_out=3) | {"b_dec": jnp.full(3, 0.3)}
    sae = SAE(transcoder, params, read=Site(0, "ln2"), write=Site(0, "mlp_out"))
    x = rng.normal(size=(50, 4)).astype(np.float32)
    y = np.asarray(sae(x)) + rng.normal(size=(50, 3)).astype(np.float32)
    expected = brute_force(y, sae.decode(sae.encode(x), x), sae.encode(x), sae.W_dec)
    result = measure_reconstruction(sae, x, y)
    assert_measures(result, expected)
    assert np.isnan(result.encoder_decoder_cosine)
    assert repr(result).startswith("Reconstruction at 0.ln2 -> 0.mlp_out, 50 tokens\n  L0 ")


def test_few_tokens_at_a_time_on_the_device(key, rng, monkeypatch):
    sae = random_sae(key, "relu", n_latents=18)
    x = rng.normal(size=(23, 6)).astype(np.float32)
    whole = measure_reconstruction(sae, x)
    monkeypatch.setattr(reconstruction, "_LATENT_BYTES", 4 * 18 * 5)
    parts = measure_reconstruction(sae, x, batch_size=22)  # a shape of its own, so that it is compiled anew
    np.testing.assert_allclose(parts.n_fired, whole.n_fired, atol=1)
    assert_measures(parts, {name: whole.numbers()[name] for name in ("n_tokens", "l1", "fvu", "cosine", "norm_ratio")})


def test_all_batches_share_one_program(key, rng):
    x = rng.normal(size=(25, 7)).astype(np.float32)
    saes = [random_sae(one, "relu", d=7) for one in jax.random.split(key)]
    with count_compilations() as new:
        for layer, sae in enumerate(saes):
            measure_reconstruction(replace(sae, read=Site(layer, "mlp_out")), x, batch_size=8)
    assert [compilation.name for compilation in new] == ["sae.reconstruct"]


def test_moments_of_parts_are_those_of_the_whole_far_from_zero(rng):
    vectors = rng.normal(size=(30, 3)) + 1e6
    whole = Moments(30, vectors.mean(0), float(np.square(vectors - vectors.mean(0)).sum()))
    merged = Moments(0, np.zeros(3), 0.0)
    for part in np.split(vectors, [1, 8, 8, 20]):
        mean = part.mean(0) if len(part) else np.zeros(3)
        merged = merged.merged(Moments(len(part), mean, float(np.square(part - mean).sum())))
    assert merged.n == 30
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    assert merged.square == pytest.approx(whole.square, rel=1e-9)
    empty = Moments(0, np.zeros(3), 0.0)
    assert empty.merged(empty).n == 0


def test_densities_and_clusters():
    # Four latents read one coordinate each; one fires on every token, one on half, one on one in 20000, one never.
    n = 20000
    x = np.zeros((n, 4), np.float32)
    x[:, 0], x[: n // 2, 1], x[7, 2] = 1, 1, 1
    sae = SAE(ReLU(), {"W_enc": jnp.eye(4), "b_enc": jnp.zeros(4), "W_dec": jnp.eye(4), "b_dec": jnp.zeros(4)})
    result = measure_reconstruction(sae, x, batch_size=3000)
    assert result.n_fired.tolist() == [n, n // 2, 1, 0]
    np.testing.assert_allclose(result.frequency, [1, 0.5, 5e-5, 0])
    np.testing.assert_allclose(result.log_density, [0, np.log10(0.5), np.log10(5e-5 + 10**-6.5), -6.5], atol=1e-5)
    assert [cluster.tolist() for cluster in (result.is_dead, result.is_ultra_low, result.is_normal)] == [
        [False, False, False, True],
        [False, False, True, False],
        [True, True, False, False],
    ]
    counts, edges = result.histogram(13)
    assert (counts.sum(), counts[0], counts[-1]) == (4, 1, 2)
    assert (edges[0], len(edges)) == (-6.5, 14)
    assert edges[-1] == pytest.approx(0, abs=1e-6)
    assert result.rare_encoder_cosines.tolist() == [1.0]
    assert "1 dead, 1 ultra-low, 2 normal" in repr(result)


def test_ultra_low_latents_whose_encoders_point_one_way(rng):
    n, n_rare = 30000, 5
    x = np.zeros((n, 6), np.float32)
    x[:, 0] = 1
    x[0, 1] = 1
    W_enc = np.zeros((6, n_rare + 1), np.float32)
    W_enc[0, 0], W_enc[1, 1:] = 1, rng.uniform(1, 2, n_rare)
    W_dec = rng.normal(size=(n_rare + 1, 6)).astype(np.float32)
    params = {"W_enc": W_enc, "b_enc": np.zeros(6), "W_dec": W_dec, "b_dec": np.zeros(6)}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    result = measure_reconstruction(SAE(ReLU(is_centred=False), params), x)
    np.testing.assert_allclose(result.rare_encoder_cosines, 1, atol=1e-6)
    mean = W_dec[1:].mean(0)
    expected = W_dec[1:] @ mean / np.linalg.norm(W_dec[1:], axis=1) / np.linalg.norm(mean)
    np.testing.assert_allclose(result.rare_decoder_cosines, expected, atol=1e-5)
    # The median over normal latents leaves the rare ones out.
    assert result.encoder_decoder_cosine == pytest.approx(W_dec[0, 0] / np.linalg.norm(W_dec[0]), abs=1e-6)
    assert "encoder 1.000" in repr(result)


def test_what_has_no_number_is_nan():
    x = np.full((10, 3), 0.1, np.float32)  # its mean is another float32
    constant = measure_reconstruction(linear_sae(3, scale=0.0), x)
    assert np.isnan(constant.fvu)
    assert np.isnan(constant.error_variance)
    assert np.isnan(constant.shrinkage)
    assert constant.cosine == 0
    zeros = measure_reconstruction(linear_sae(3), np.zeros((10, 3), np.float32))
    assert np.isnan(zeros.norm_ratio)
    assert (zeros.cosine, zeros.l0) == (0, 0)


def test_sixteen_bit_activations_are_measured_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(40, 4)), jnp.bfloat16)
    half = measure_reconstruction(linear_sae(4, scale=0.5), x)
    full = measure_reconstruction(linear_sae(4, scale=0.5), np.asarray(x, np.float32))
    assert half.numbers() == pytest.approx(full.numbers())


SAE_OF_3 = linear_sae(3)
BAD = {
    "width": (np.ones((5, 4), np.float32), None, {}, ShapeError, r"float32\[5, 4\]"),
    "integers": (np.ones((5, 3), int), None, {}, ShapeError, r"int64\[5, 3\]"),
    "numbers": (np.ones((5, 3), np.float32), np.ones((4, 3), np.float32), {}, ShapeError, r"float32\[4, 3\]"),
    "nothing": (np.ones((0, 3), np.float32), None, {}, InvalidInputError, "No tokens were given"),
    "nan": (np.full((5, 3), np.nan, np.float32), None, {}, InvalidInputError, "Activations that are not finite"),
    "batch": (np.ones((5, 3), np.float32), None, {"batch_size": 0}, InvalidInputError, "batch_size=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case):
    x, y, options, error, words = BAD[case]
    with pytest.raises(error, match=rf"{words}[\s\S]*in measure_reconstruction[\s\S]*Expected:[\s\S]*Fix:"):
        measure_reconstruction(SAE_OF_3, x, y, **options)


def test_an_sae_that_is_not_finite_is_told_from_activations_that_are_not():
    broken = replace(SAE_OF_3, params=SAE_OF_3.params | {"b_dec": jnp.full(3, jnp.nan)})
    with pytest.raises(InvalidInputError, match="Reconstructions that are not finite"):
        measure_reconstruction(broken, np.ones((5, 3), np.float32))
