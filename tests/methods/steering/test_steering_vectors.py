"""Steering vectors: where their rows fall, and what no vector can be made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.core.sites import Site
from interp_jax.methods.steering.steering_vector import PLACEMENTS, SteeringVector, as_vectors, place, residual_site

SITE = Site(1, "resid_pre")
# Rows of 7, 4 and 3 tokens, padded on the left.
TOKENS = np.array([[5, 6, 7, 8, 9, 1, 2], [-1, -1, -1, 5, 6, 7, 8], [-1, -1, -1, -1, 1, 2, 3]])


def positions_by_hand(placement: str, n_tokens: int, n_rows: int) -> list[int]:
    everywhere = list(range(n_tokens))
    free = n_tokens - n_rows
    before = {"front": 0, "middle": free // 2, "back": free}
    return everywhere if placement == "everywhere" else everywhere[before[placement] :][:n_rows]


@pytest.mark.parametrize("n_rows", [1, 2, 3])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_fall_on_positions_of_the_text(placement: str, n_rows: int, rng: np.random.Generator) -> None:
    n_rows = 1 if placement == "everywhere" else n_rows
    values = rng.normal(size=(n_rows, 4)).astype(np.float32)
    added, is_steered = place(SteeringVector(values, SITE, placement), TOKENS)
    for row, tokens in enumerate(TOKENS):
        text = np.flatnonzero(tokens >= 0)
        expected = np.zeros((7, 4), np.float32)
        for number, position in enumerate(positions_by_hand(placement, len(text), n_rows)):
            expected[text[position]] = values[number % n_rows]
        np.testing.assert_array_equal(added[row], expected)
        np.testing.assert_array_equal(is_steered[row], (expected != 0).any(-1))


def test_a_mask_counts_positions_of_the_text() -> None:
    mask = np.array([False, True, True])
    added, is_steered = place(SteeringVector(np.array([[1.0], [2.0]]), SITE, mask), TOKENS)
    assert added[..., 0].tolist() == [[0, 1, 2, 0, 0, 0, 0], [0, 0, 0, 0, 1, 2, 0], [0, 0, 0, 0, 0, 1, 2]]
    np.testing.assert_array_equal(is_steered, added[..., 0] != 0)
    # One row falls on all of them.
    added, _ = place(SteeringVector(np.array([3.0]), SITE, mask), TOKENS)
    assert added[0, :, 0].tolist() == [0, 3, 3, 0, 0, 0, 0]


def test_a_row_of_zeros_is_steered_too() -> None:
    """What counts as steered is where the vector lies, not how large it is there."""
    _, is_steered = place(SteeringVector(np.array([[0.0], [1.0]]), SITE), TOKENS)
    assert np.flatnonzero(is_steered[0]).tolist() == [0, 1]


def test_arithmetic_and_words() -> None:
    vector = SteeringVector(np.array([[3.0, 4.0], [0.0, 1.0]]), SITE, "back", name="joy")
    np.testing.assert_array_equal((2 * vector).values, (vector * 2.0).values)
    np.testing.assert_array_equal((vector * 2).values, [[6, 8], [0, 2]])
    assert repr(vector) == "SteeringVector('joy', 2 x 2 at 1.resid_pre, back; norms 5, 1)"
    row = vector.row(-1)
    assert len(row) == 1 and row.placement == "everywhere" and row.values.tolist() == [[0.0, 1.0]]
    masked = SteeringVector(np.ones((2, 2)), SITE, np.array([True, False, True]))
    assert "2 masked positions" in repr(masked)


@pytest.mark.parametrize(
    ("values", "placement", "error", "words"),
    [
        (np.ones((1, 2, 4)), "front", ShapeError, ["[1, 2, 4]", "take one row of the batch"]),
        (np.ones((0, 4)), "front", ShapeError, ["[0, 4]", "at least one row"]),
        ([[1.0, np.nan], [np.inf, 0.0]], "front", InvalidInputError, ["2 entries that are NaN or infinite", "row 0"]),
        (np.ones((2, 4)), "end", UnknownNameError, ["Unknown placement 'end'", "front, middle, back, everywhere"]),
        (np.ones((2, 4)), "bakc", UnknownNameError, ["Did you mean 'back'?"]),
        (np.ones((2, 4)), "everywhere", ShapeError, ["2 rows and placement 'everywhere'", "vector.row(2)"]),
        (np.ones((2, 4)), np.array([True]), ShapeError, ["2 rows and a mask with 1 true positions"]),
        (np.ones((2, 4)), np.array([1, 2]), ShapeError, ["placement int64[2]", "bools [pos]"]),
        (np.ones((1, 4)), np.array([False]), ShapeError, ["at least one is true"]),
    ],
)
def test_what_is_no_steering_vector(values, placement, error, words) -> None:
    with pytest.raises(error) as raised:
        SteeringVector(values, SITE, placement)
    for word in [*words, "Expected:" if error is not UnknownNameError else "Known:", "Fix:"]:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (SteeringVector(np.ones((4, 2)), SITE), ["A target of 3 tokens (row 2)", "steering vector of 4"]),
        (
            SteeringVector(np.ones(2), SITE, np.arange(6) == 5),
            ["A target of 4 tokens (row 1)", "last true position of 6"],
        ),
    ],
    ids=["rows", "mask"],
)
def test_a_target_shorter_than_the_vector(vector, words) -> None:
    with pytest.raises(InvalidInputError) as raised:
        place(vector, TOKENS)
    for word in [*words, "steering 1.resid_pre", "Expected: a target at least as long", "Fix: use a longer target"]:
        assert word in str(raised.value)
    assert isinstance(raised.value, ValueError)


def test_what_is_asked_for_as_vectors() -> None:
    vector = SteeringVector(np.ones(2), SITE)
    assert as_vectors(vector, where="f") == (vector,) and as_vectors([vector, vector], where="f") == (vector, vector)
    cases: list[Any] = [([], "No steering vector was given in f"), ([np.ones(3)], "was given as a steering vector")]
    for wrong, words in cases:
        with pytest.raises(InvalidInputError, match=words):
            as_vectors(wrong, where="f")


def test_the_site_is_one_with_a_vector_per_position(tiny_llama) -> None:
    assert residual_site(tiny_llama, 2, where="f") == Site(2, "resid_pre")
    assert residual_site(tiny_llama, "blocks.1.hook_resid_mid", where="f") == Site(1, "resid_mid")
    for selector, error, words in (
        ("1.resid_pr", UnknownNameError, "Did you mean"),
        (7, UnknownNameError, "7"),
        ("resid_pre", InvalidInputError, "picks 3 sites"),
        ("1.pattern", ShapeError, "one vector per position"),
    ):
        with pytest.raises(error, match=words):
            residual_site(tiny_llama, selector, where="f")
