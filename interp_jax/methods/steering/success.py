"""P(success): how often a completion speaks of what it was steered to, with the interval it is known to.

A completion succeeds if it holds at least one entry of a vocabulary: as a whole word, in any case, with one of a list
of endings if such a list is given. That is all that is looked at, and its mistakes are known ones: a wedding that is
only hinted at fails, and so does an insult that is not on the list.

>>> weather = Vocabulary(("rain", "cloud"), inflections=("s", "y", "ing"))
>>> weather.found("Rainy days: no rainbow, but clouds.")
['Rainy', 'clouds']
>>> success_rate(["It rains.", "Sun.", "sun", "SUN"], weather)
25 % (1 of 4; 95 % interval 4.6 % to 69.9 %)

Sharp edges: an ending is put after the entry as it stands ("parties" needs an entry of its own beside "party"). Give
completions without their prompts: a word of the prompt would count.

Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference", for the interval.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part


@dataclass(frozen=True)
class Vocabulary:
    """The words a completion is looked through for.

    Args:
        words: The entries; several words in one are matched as a phrase.
        inflections: Endings that an entry may have, such as "s" or "ing"; an entry alone always counts.
    """

    words: tuple[str, ...]
    inflections: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("words", "inflections"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        blank = [word for word in self.words if not isinstance(word, str) or not word.strip()]
        if not self.words or blank:
            raise InvalidInputError(
                four_part(
                    f"The empty entry {blank[0]!r} was given" if blank else "An empty vocabulary was given",
                    where="Vocabulary",
                    expected="at least one word.",
                    fix='list what to look for, such as Vocabulary(("rain", "cloud"), inflections=("s",)).',
                )
            )

    def found(self, text: str) -> list[str]:
        """What of a text is in the vocabulary, in order, as it stands there."""
        return [match[0] for match in _pattern(self).finditer(text)]

    def is_in(self, text: str) -> bool:
        """Whether a text holds at least one entry."""
        return _pattern(self).search(text) is not None


# A small neutral list, to try things out with.
WEATHER = Vocabulary(
    ("rain", "cloud", "wind", "storm", "snow", "sun", "sunny", "fog", "thunder", "weather", "forecast"),
    inflections=("s", "y", "ing", "ed"),
)


@functools.lru_cache(maxsize=64)
def _pattern(vocabulary: Vocabulary) -> re.Pattern[str]:
    def either(parts: Sequence[str]) -> str:
        return "|".join(map(re.escape, parts))

    # The longest first, so that what is found is shown whole.
    entries = sorted(vocabulary.words, key=len, reverse=True)
    phrases = "|".join(r"\s+".join(map(re.escape, entry.split())) for entry in entries)
    endings = sorted(filter(None, vocabulary.inflections), key=len, reverse=True)
    ending = f"(?:{either(endings)})?" if endings else ""
    return re.compile(rf"(?<!\w)(?:{phrases}){ending}(?!\w)", re.IGNORECASE)


@dataclass(frozen=True, repr=False)
class SuccessRate:
    """How often something succeeded.

    Args:
        n_successes: How many did.
        n: Of how many.
        low: Lower end of the interval.
        high: Upper end.
        confidence: Of the interval.
    """

    n_successes: int
    n: int
    low: float
    high: float
    confidence: float = 0.95

    @property
    def rate(self) -> float:
        """n_successes / n."""
        return self.n_successes / self.n

    def __repr__(self) -> str:
        interval = f"{100 * self.confidence:.3g} % interval {100 * self.low:.1f} % to {100 * self.high:.1f} %"
        return f"{100 * self.rate:.3g} % ({self.n_successes} of {self.n}; {interval})"


def success_rate(completions: Sequence[str], vocabulary: Vocabulary, *, confidence: float = 0.95) -> SuccessRate:
    """How many completions hold a word of a vocabulary.

    Args:
        completions: Texts without their prompts.
        vocabulary: What they are looked through for.
        confidence: Of the interval, between 0 and 1.

    Returns:
        The rate with its Wilson interval.

    Raises:
        InvalidInputError: There is no completion, or the confidence is out of range.
    """
    completions = [completions] if isinstance(completions, str) else list(completions)
    n_successes = sum(map(vocabulary.is_in, completions))
    low, high = wilson_interval(n_successes, len(completions), confidence=confidence)
    return SuccessRate(n_successes, len(completions), low, high, confidence)


def wilson_interval(n_successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion.

    (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2/n), p = n_successes / n

    Args:
        n_successes: How many succeeded, 0 to n.
        n: Of how many, at least 1.
        confidence: Between 0 and 1.

    Returns:
        Lower and upper end, within 0 and 1.

    Raises:
        InvalidInputError: A number is out of range.

    Source: Wilson 1927.
    """
    if n < 1 or not 0 <= n_successes <= n or not 0 < confidence < 1:
        raise InvalidInputError(
            four_part(
                f"{n_successes} successes of {n} rollouts and a confidence of {confidence} were given",
                where="wilson_interval",
                expected="at least one rollout, no more successes than rollouts, a confidence between 0 and 1.",
                fix="sample at least one completion.",
            )
        )
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), n_successes / n
    centre, half = p + z * z / (2 * n), z * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    # At the ends the formula is exactly 0 and 1; its rounding is not.
    return (0.0 if n_successes == 0 else max(0.0, low)), (1.0 if n_successes == n else min(1.0, high))
