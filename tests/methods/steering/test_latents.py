"""Steering by latents: all of them are the SAE's own reconstruction, some of them a part of it, none what is left."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.methods.sae import ReLU, TopK
from interp_jax.methods.sae.sae import SAE
from interp_jax.methods.steering.latents import LatentDifference, latent_direction, project_out
from interp_jax.methods.steering.prompt_pair import prompt_pair


@pytest.fixture
def pair(tiny_llama):
    return prompt_pair(tiny_llama, "the cat on a mat", "the tree", "1.resid_pre")


@pytest.mark.parametrize("variant", [ReLU(), TopK(k=6)], ids=lambda variant: variant.name)
def test_all_latents_are_the_reconstruction(pair, variant, key) -> None:
    sae = SAE(variant, variant.init(key, d_in=24, n_latents=96))
    bias = jax.random.normal(key, (24,))
    sae = SAE(variant, sae.params | {"b_dec": bias})
    latents = pair.latents(sae.encode, sae.W_dec)
    expected = np.asarray(sae(pair.positive)) - np.asarray(sae(pair.negative))
    np.testing.assert_allclose(latents.reconstruction, expected, atol=1e-4)
    assert np.abs(expected).max() > 1e-2
    # All latents at all positions: the same to the last bit.
    everything = latents.top(latents.positive.size, include_negative=True)
    np.testing.assert_array_equal(everything, latents.reconstruction)


def random_difference(rng: np.random.Generator, n_pos: int = 5, n_latents: int = 12) -> LatentDifference:
    on = rng.random((2, n_pos, n_latents)) < 0.4
    values = np.where(on, rng.exponential(size=on.shape), 0).astype(np.float32)
    return LatentDifference(values[0], values[1], rng.normal(size=(n_latents, 7)))


def top_by_hand(latents: LatentDifference, k: int, include_negative: bool) -> np.ndarray:
    """The definition: list the pairs that are on, sort them by |f+ - f-| |W_dec_i|, add up the first k."""
    total = np.zeros((len(latents.positive), latents.W_dec.shape[1]))
    chosen = set()
    for prompt in (latents.positive, latents.negative)[: 1 + include_negative]:
        norm = {
            (p, i): abs(latents.positive[p, i] - latents.negative[p, i]) * np.linalg.norm(latents.W_dec[i])
            for p, i in np.ndindex(prompt.shape)
            if prompt[p, i] != 0
        }
        chosen |= set(sorted(norm, key=lambda pair: -norm[pair])[:k])
    for p, i in chosen:
        total[p] += (float(latents.positive[p, i]) - float(latents.negative[p, i])) * latents.W_dec[i]
    return total


@pytest.mark.parametrize("include_negative", [False, True])
@pytest.mark.parametrize("k", [1, 4, 1000])
def test_the_top_k_are_their_definition(rng, k: int, include_negative: bool) -> None:
    latents = random_difference(rng)
    top = latents.top(k, include_negative=include_negative)
    np.testing.assert_allclose(top, top_by_hand(latents, k, include_negative), atol=1e-5)
    listed = latents.listed(k, include_negative=include_negative)
    assert [one.norm for one in listed] == sorted((one.norm for one in listed), reverse=True)
    by_list = np.zeros_like(top)
    for one in listed:
        by_list[one.position] += (np.float32(one.positive) - np.float32(one.negative)) * latents.W_dec[one.latent]
    np.testing.assert_allclose(by_list, top, atol=1e-5)


def test_the_coefficient_is_the_difference_whichever_prompt_chose() -> None:
    """Latent 0 is on in both prompts, latent 1 in the negative one alone; what cancels is not ranked high."""
    latents = LatentDifference(
        np.array([[9.0, 0.0, 2.0]]), np.array([[8.5, 4.0, 0.0]]), np.array([[1.0, 0], [0, 1.0], [1.0, 1.0]])
    )
    assert latents.listed(1)[0].latent == 2
    np.testing.assert_allclose(latents.top(1), [[2.0, 2.0]])
    np.testing.assert_allclose(latents.top(1, include_negative=True), [[2.0, 2.0 - 4.0]])
    np.testing.assert_allclose(latents.top(2, include_negative=True), [[2.5, -2.0]])


def test_dense_latents_are_listed_apart() -> None:
    latents = LatentDifference(
        np.array([[1.0, 2.0, 3.0], [0.0, 0.5, 3.0]]),
        np.array([[0.0, 2.0, 2.5], [0.0, 0.0, 3.0]]),
        2 * np.eye(3),
        np.array([0.1, 0.9, 0.51]),
    )
    dense = latents.dense()
    assert [(one.latent, one.norm) for one in dense] == [(1, 1.0), (2, 1.0)]
    assert dense[0].frequency == pytest.approx(0.9)
    assert [one.latent for one in latents.dense(threshold=0.6)] == [1]


def test_one_latent() -> None:
    np.testing.assert_allclose(latent_direction(1.5, [0.0, 2.0], multiplier=10), [0.0, 30.0])
    with pytest.raises(ShapeError, match=r"An activation of shape \[\] and a row of shape \[2, 2\]"):
        latent_direction(1.5, np.eye(2))


def test_directions_are_projected_out_jointly(rng) -> None:
    """Removing one after the other brings the first back: of (1, 0) and (.6, .8) together nothing is left."""
    directions = np.array([[1.0, 0.0], [0.6, 0.8]])
    values = rng.normal(size=(20, 2)) * 100
    np.testing.assert_allclose(project_out(values, directions), 0, atol=1e-10)
    one_by_one = values
    for direction in directions:
        one_by_one = one_by_one - (one_by_one @ direction)[:, None] * direction
    assert np.abs(one_by_one).max() > 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_left_is_orthogonal_and_the_rest_untouched(rng, dtype) -> None:
    directions = rng.normal(size=(4, 30)).astype(dtype)
    values = (rng.normal(size=(6, 30)) * 1000).astype(dtype)
    # Scales, duplicates, zeros and sums say nothing new about the span.
    redundant = np.concatenate([directions * 1e-4, directions[:2], np.zeros((2, 30)), directions[:1] + directions[1:2]])
    left = project_out(values, redundant.astype(dtype))
    assert left.dtype == dtype
    # Numbers near 1000, of which 30 products are summed: 1e-2 is float32's rounding of such sums.
    np.testing.assert_allclose(left @ directions.T, 0, atol=1e-2 if dtype == np.float32 else 1e-9)
    # Least squares, as another route to the same projection.
    weights, *_ = np.linalg.lstsq(directions.T.astype(np.float64), values.T.astype(np.float64), rcond=None)
    np.testing.assert_allclose(left, values - (directions.T @ weights).T, atol=1e-2 if dtype == np.float32 else 1e-8)
    np.testing.assert_array_equal(project_out(values, np.zeros((3, 30))), values)
    np.testing.assert_array_equal(project_out(values, np.zeros((0, 30))), values)


def test_bad_latents() -> None:
    fine = (np.ones((3, 4)), np.ones((3, 4)), np.ones((4, 2)))
    for given, words in (
        ((np.ones((2, 4)), *fine[1:]), r"\[2, 4\], \[3, 4\], \[4, 2\]"),
        ((*fine[:2], np.ones((5, 2))), "prompt_pair aligns them"),
        ((*fine, np.ones(3)), r"frequencies \[3\]"),
    ):
        with pytest.raises(ShapeError, match=words):
            LatentDifference(*given)
    with pytest.raises(InvalidInputError, match="NaN or infinite numbers in negative"):
        LatentDifference(fine[0], fine[1] * np.nan, fine[2])
    with pytest.raises(InvalidInputError, match=r"k=0 was given(.|\n)*a whole number from 1"):
        LatentDifference(*fine).top(0)
    with pytest.raises(InvalidInputError, match=r"Latents without frequencies(.|\n)*Fix: pass frequencies"):
        LatentDifference(*fine).dense()
    with pytest.raises(ShapeError, match=r"Values \[2\] and directions \[3\](.|\n)*directions\[None\]"):
        project_out(np.ones(2), np.ones(3))
    with pytest.raises(InvalidInputError, match="NaN"):
        project_out(np.ones(2), np.full((1, 2), np.nan))
