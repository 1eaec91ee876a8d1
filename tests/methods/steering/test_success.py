"""P(success): what counts as a word, and the interval a count is known to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats

from interp_jax.core.errors import InvalidInputError
from interp_jax.methods.steering.success import WEATHER, Vocabulary, success_rate, wilson_interval

WEDDING = Vocabulary(("wedding", "marry", "tie the knot", "R.S.V.P.", "mother-in-law"), inflections=("s", "ing"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A WEDDING.", ["WEDDING"]),
        ("weddings, marrying", ["weddings", "marrying"]),
        ("married weddingish unwedding wedding_cake wedding2", []),
        ("wedding-cake", ["wedding"]),
        ("They tie  the\nknot!", ["tie  the\nknot"]),
        ("they untie the knot", []),
        ("Please R.S.V.P. soon, RxSxVxPx", ["R.S.V.P."]),
        ("my mother-in-laws", ["mother-in-laws"]),
        ("weddingsing", []),
        ("", []),
        ("Hochzeit; wéddings; weddingé", []),
    ],
)
def test_whole_words_in_any_case(text: str, found: list[str]) -> None:
    assert WEDDING.found(text) == found
    assert WEDDING.is_in(text) == bool(found)


def test_endings_are_optional() -> None:
    plain = Vocabulary(("wedding",))
    assert plain.found("weddings wedding") == ["wedding"]
    one: Any = "rain"
    assert Vocabulary(one).words == ("rain",)
    assert WEATHER.is_in("It rains") and not WEATHER.is_in("The train")


@pytest.mark.parametrize("words", [(), ("rain", ""), ("rain", "  ")])
def test_an_empty_vocabulary(words) -> None:
    with pytest.raises(InvalidInputError) as error:
        Vocabulary(words)
    assert "empty" in str(error.value) and "Expected: at least one word." in str(error.value)
    assert "Fix: list what to look for" in str(error.value) and isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_intervals(k: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(k, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_intervals_against_scipy(confidence: float) -> None:
    for n in (1, 2, 7, 100, 12345):
        for k in sorted({0, 1, n // 3, n - 1, n}):
            expected = scipy.stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
            np.testing.assert_allclose(wilson_interval(k, n, confidence=confidence), expected, atol=1e-12)
    assert wilson_interval(0, 9)[0] == 0.0 and wilson_interval(9, 9)[1] == 1.0


def test_a_rigged_sampler(rng: np.random.Generator) -> None:
    """One that says "wedding" a quarter of the time is found out; the interval holds the truth as often as it says."""
    covers = 0
    for _ in range(200):
        texts = ["a Wedding!" if coin < 0.25 else "a funeral" for coin in rng.random(80)]
        rate = success_rate(texts, WEDDING)
        assert rate.n_successes == sum("Wedding" in text for text in texts) and rate.n == 80
        covers += rate.low <= 0.25 <= rate.high
    # 190 expected, standard deviation about 3.
    assert covers >= 172
    texts = ["wedding" if coin < 0.25 else "no" for coin in rng.random(20_000)]
    assert success_rate(texts, WEDDING).rate == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 20_000) ** 0.5)


def test_no_rollout_and_other_nonsense() -> None:
    with pytest.raises(InvalidInputError, match=r"0 successes of 0 rollouts(.|\n)*at least one rollout(.|\n)*Fix"):
        success_rate([], WEDDING)
    for k, n, confidence in ((3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 0.0)):
        with pytest.raises(InvalidInputError, match="no more successes than rollouts"):
            wilson_interval(k, n, confidence=confidence)
    assert success_rate("one text with a wedding", WEDDING).n == 1
