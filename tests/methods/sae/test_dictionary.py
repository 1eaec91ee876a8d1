"""Measures of weights alone: closed forms, and the same numbers from plain NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.methods.sae import SAE, ReLU, dictionary
from interp_jax.methods.sae.dictionary import (
    CLASSES,
    cluster_cosines,
    encoder_decoder_cosines,
    max_cosines,
    mmcs,
    neuron_sparsity,
    null_space_fractions,
    random_null_space_fraction,
)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_max_cosines_are_those_of_all_pairs_whatever_the_blocks(rng, monkeypatch):
    a, b = rng.normal(size=(11, 5)), rng.normal(size=(7, 5))
    a[3] = 0
    expected = (unit(np.where(a == 0, 1, a)) @ unit(b).T).max(1)
    expected[3] = 0
    whole = max_cosines(a, b)
    monkeypatch.setattr(dictionary, "_BLOCK_BYTES", 4 * 7 * 4)  # four rows at a time
    np.testing.assert_allclose(whole, expected, atol=2e-6)
    np.testing.assert_allclose(max_cosines(a, b), expected, atol=2e-6)
    # Rows as small or as large as float32 has them keep their directions.
    np.testing.assert_allclose(max_cosines(a * 1e-30, b * 1e30), expected, atol=2e-6)


def test_mmcs_knows_permutations_and_duplicates_and_has_a_direction(rng):
    a = rng.normal(size=(20, 8))
    assert mmcs(a, a[rng.permutation(20)]) == pytest.approx(1, abs=2e-6)
    assert mmcs(np.concatenate([a, a[:5]]), a) == pytest.approx(1, abs=2e-6)
    # Half of the true atoms are found: precision 1, recall one half.
    found = np.eye(8)[:4]
    assert (mmcs(found, np.eye(8)), mmcs(np.eye(8), found)) == (1.0, 0.5)
    # The opposite direction is another feature.
    assert mmcs(np.eye(2)[:1], -np.eye(2)[:1]) == -1.0


def test_neuron_sparsity_of_one_hot_uniform_and_short_rows():
    n = 2048
    rows = np.zeros((3, n), np.float32)
    rows[0, 17] = -0.3
    rows[1] = 0.01
    sparsity = neuron_sparsity(rows)
    np.testing.assert_allclose(sparsity.fve_top_1, [1, 1 / n, 0], rtol=1e-9)
    np.testing.assert_allclose(sparsity.fve_next_9, [0, 9 / n, 0], rtol=1e-9)
    assert sparsity.kurtosis[0] == pytest.approx((n * n - 3 * n + 3) / (n - 1) - 3, rel=1e-9)
    assert sparsity.kurtosis[0] == pytest.approx(2043.0005, abs=1e-4)
    assert sparsity.kurtosis[2] == 0
    # Fewer neurons than ten: what there is.
    short = neuron_sparsity(np.array([[2.0, 1.0, 0.0]]))
    assert (short.fve_top_1[0], short.fve_next_9[0]) == (pytest.approx(0.8), pytest.approx(0.2))


def test_kurtosis_of_gaussian_rows_is_zero_and_blocks_do_not_matter(rng, monkeypatch):
    rows = rng.normal(size=(64, 4096))
    sparsity = neuron_sparsity(rows)
    # The standard error of one row is sqrt(24 / n); the mean of 64 rows is within six of its own.
    assert abs(sparsity.kurtosis.mean()) < 6 * np.sqrt(24 / 4096 / 64)
    monkeypatch.setattr(dictionary, "_BLOCK_BYTES", 8 * 4096 * 10)
    again = neuron_sparsity(rows)
    for name in ("fve_top_1", "fve_next_9", "kurtosis"):
        np.testing.assert_array_equal(getattr(sparsity, name), getattr(again, name))
    squares = -np.sort(-(rows**2), axis=1) / (rows**2).sum(1, keepdims=True)
    np.testing.assert_allclose(sparsity.fve_top_1, squares[:, 0])
    np.testing.assert_allclose(sparsity.fve_next_9, squares[:, 1:10].sum(1))


def test_classes():
    squares = np.zeros((4, 40))
    squares[0, 0], squares[0, 1:10], squares[0, 10:] = 0.9, 0.05 / 9, 0.05 / 30
    squares[1, :10], squares[1, 10:] = 0.08, 0.2 / 30
    squares[2] = 1 / 40
    squares[3, 0], squares[3, 1:3] = 0.6, 0.2
    sparsity = neuron_sparsity(np.sqrt(squares))
    assert sparsity.classes.tolist() == ["1-sparse", "10-sparse", "dense", "10-sparse"]
    assert set(sparsity.classes) == set(CLASSES)
    assert repr(sparsity).startswith("NeuronSparsity(4 rows: 1 dense, 1 1-sparse, 2 10-sparse; median kurtosis")


def test_encoder_decoder_cosines(key, rng, monkeypatch):
    params = ReLU().init(key, d_in=6, n_latents=9)
    # Encoders begin along decoders.
    np.testing.assert_allclose(encoder_decoder_cosines(SAE(ReLU(), params)), 1, atol=1e-6)
    encoder = rng.normal(size=(6, 9)).astype(np.float32)
    encoder[:, 4] = 0
    sae = SAE(ReLU(), params | {"W_enc": jnp.asarray(encoder)})
    W_dec = np.asarray(params["W_dec"], np.float64)
    expected = np.einsum("dn,nd->n", encoder, W_dec) / np.linalg.norm(np.where(encoder == 0, 1, encoder), axis=0)
    expected[4] = 0
    np.testing.assert_allclose(encoder_decoder_cosines(sae), expected, atol=1e-6)
    monkeypatch.setattr(dictionary, "_BLOCK_BYTES", 8 * 6 * 2)
    np.testing.assert_allclose(encoder_decoder_cosines(sae), expected, atol=1e-6)


def test_a_cluster_points_one_way_and_the_rest_does_not(rng):
    direction = rng.normal(size=64)
    vectors = rng.normal(size=(50, 64))
    members = np.arange(50) < 20
    vectors[members] = direction / np.linalg.norm(direction) * rng.uniform(0.5, 2, size=(20, 1))
    np.testing.assert_allclose(cluster_cosines(vectors, members), 1, atol=1e-12)
    chosen = vectors[~members]
    expected = unit(chosen) @ (chosen.mean(0) / np.linalg.norm(chosen.mean(0)))
    np.testing.assert_allclose(cluster_cosines(vectors, ~members), expected, atol=1e-12)
    assert cluster_cosines(vectors, np.zeros(50, bool)).shape == (0,)


def test_null_space(rng):
    W_out = np.zeros((6, 3))
    W_out[:3] = rng.normal(size=(3, 3)) + 5 * np.eye(3)
    W_out[:, 2] = W_out[:, 0] * 2  # of rank 2
    kernel = np.linalg.svd(W_out.T)[2][2:]  # what the map sends to zero
    read = np.linalg.svd(W_out.T)[2][:2]
    rows = np.stack([kernel[0], read[1], 3 * kernel[1] + 4 * read[0], np.zeros(6)])
    np.testing.assert_allclose(null_space_fractions(rows, W_out), [1, 0, 9 / 25, 0], atol=1e-10)


def test_null_space_of_random_directions(rng):
    mean, sd = random_null_space_fraction(2048, 512)
    assert (mean, round(sd, 3)) == (0.75, 0.014)
    beta = (2048 - 512) / 2, 512 / 2
    assert sd == pytest.approx(np.sqrt(beta[0] * beta[1] / (sum(beta) ** 2 * (sum(beta) + 1))))
    mean, sd = random_null_space_fraction(128, 32)
    fractions = null_space_fractions(rng.normal(size=(3000, 128)), rng.normal(size=(128, 32)))
    assert fractions.mean() == pytest.approx(mean, abs=6 * sd / np.sqrt(3000))
    assert fractions.std() == pytest.approx(sd, rel=0.1)


TRANSCODER = ReLU(is_centred=False)
ROWS = np.ones((2, 3))
BAD = {
    "widths": (lambda: max_cosines(ROWS, np.ones((2, 4))), ShapeError, "width 3 and of width 4"),
    "no-rows": (lambda: mmcs(np.ones((0, 3)), ROWS), InvalidInputError, r"rows \[0, 3\] was given, empty"),
    "nan": (lambda: neuron_sparsity(np.full((1, 3), np.nan)), InvalidInputError, "with NaN or inf in it"),
    "vector": (lambda: neuron_sparsity(np.ones(3)), ShapeError, r"rows of float64\[3\] was given"),
    "members": (lambda: cluster_cosines(ROWS, [0, 1]), ShapeError, r"members int64\[2\]"),
    "map": (lambda: null_space_fractions(ROWS, np.ones((2, 3))), ShapeError, r"W_out \[2, 3\]"),
    "rank": (lambda: random_null_space_fraction(3, 4), InvalidInputError, "n_neurons=3, rank=4"),
    "transcoder": (
        lambda: encoder_decoder_cosines(
            SAE(TRANSCODER, TRANSCODER.init(jax.random.key(0), d_in=3, n_latents=4, d_out=5))
        ),
        ShapeError,
        "3 -> 4 latents -> 5",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=rf"{words}[\s\S]*Expected:[\s\S]*Fix:"):
        call()
