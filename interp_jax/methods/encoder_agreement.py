"""Whether two ways to encode agree on each latent: an SAE's encoder and a pursuit over its dictionary, say.

For each latent, over the tokens on which either has it: the correlation of the two activations, over all of these
tokens and over the low half of them; and the smallest activation other than 0 that each gives.

    agreement = encoder_agreement(lm, sae, ito, tokens)
    agreement.pearson, agreement.pearson_low, agreement.smallest

The text is read once. What is kept is sums for each latent and interval of the first encoder's activation (a quarter of
an octave each), so memory does not grow with the text.

>>> sums = np.zeros((len(SUMS), 1, N_INTERVALS))
>>> add_sums(sums, np.array([[1.0], [2.0], [4.0], [0.0]]), np.array([[2.0], [3.0], [6.0], [0.0]]))
>>> pearson(sums.sum(axis=2)).round(4).tolist(), float(sums[0].sum())
([0.9959], 3.0)

Sharp edges: the low half is what is at most at the end of the interval in which the median of the first encoder's
activations other than 0 lies, those tokens included on which only the second fires. A latent that fires on one token,
or always alike, has no correlation: NaN. Correlations over tokens where either fires are lower than over all tokens, of
which most have 0 twice.

Source: Smith 2024, Replacing SAE Encoders with Inference-Time Optimisation, for the comparison.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.moments import check_counts
from interp_jax.forward.sparse_coder import SparseCoder
from interp_jax.forward.spliced_losses import held_out
from interp_jax.forward.splicing import checked_splice
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

# What is summed, of the activations a and b of the two.
SUMS = ("n", "a", "b", "aa", "bb", "ab")
# Interval 0 is an activation of 0; the others are quarters of octaves from 2^-16 to 2^16, open at both ends.
_PER_OCTAVE, _LOWEST = 4, -16
N_INTERVALS = 1 + 2 * -_LOWEST * _PER_OCTAVE
# What the latents of the tokens that are encoded at once may take.
_LATENT_BYTES = 2**27


@dataclass(frozen=True, repr=False)
class EncoderAgreement:
    """How alike two encoders are on each latent.

    Args:
        pearson: Correlation over the tokens on which either fires, float64 `[latent]`; NaN where there is none.
        pearson_low: The same over the low half of these tokens.
        n_either: On how many tokens either fires, int64 `[latent]`.
        n_low: How many of these are in the low half.
        threshold: The first encoder's activation up to which a token is in the low half, float64 `[latent]`.
        n_fired: On how many tokens each fires, int64 `[2, latent]`.
        smallest: The smallest magnitude other than 0 each gives, float64 `[2, latent]`; NaN if it never fires.
        n_tokens: How many tokens were read.
        read: The site that was read.
        names: What the two are called.
    """

    pearson: np.ndarray
    pearson_low: np.ndarray
    n_either: np.ndarray
    n_low: np.ndarray
    threshold: np.ndarray
    n_fired: np.ndarray
    smallest: np.ndarray
    n_tokens: int
    read: Site
    names: tuple[str, str] = ("encoder", "pursuit")

    def __repr__(self) -> str:
        def median(values: np.ndarray) -> str:
            return f"{np.median(known):.4g}" if len(known := values[~np.isnan(values)]) else "n/a"

        first, second = self.names
        is_both = (self.n_fired > 0).all(axis=0)
        larger = np.mean(self.smallest[1, is_both] > self.smallest[0, is_both]) if is_both.any() else float("nan")
        return "\n".join(
            [
                f"EncoderAgreement at {self.read}, {first} and {second}, {self.n_tokens:,} tokens",
                f"  latents             {len(self.pearson)}; {(self.n_fired[0] > 0).sum()} fire by {first}, "
                f"{(self.n_fired[1] > 0).sum()} by {second}, {is_both.sum()} by both",
                f"  correlation         {median(self.pearson)} (median of {(~np.isnan(self.pearson)).sum()})",
                f"  of the low half     {median(self.pearson_low)} (median of {(~np.isnan(self.pearson_low)).sum()})",
                f"  smallest, not 0     {first} {median(self.smallest[0])}, {second} {median(self.smallest[1])}; "
                f"larger by {second} for {larger:.3g} of what both have",
            ]
        )


def encoder_agreement(
    lm: LanguageModel,
    first: SparseCoder,
    second: SparseCoder,
    tokens: Any,
    *,
    names: tuple[str, str] = ("encoder", "pursuit"),
    untouched_tokens: Iterable[int] = (),
    n_untouched: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> EncoderAgreement:
    """Compare the latents of two encoders of one dictionary on a text.

    Args:
        lm: The model.
        first: One encoder, such as an SAE; its activations say what is low.
        second: The other, of as many latents and the same read site.
        tokens: Token ids `[sequence, pos]`, padding is -1; or what gives them by slices and has a length.
        names: What the two are called in tables and figures.
        untouched_tokens: Ids of tokens, such as BOS, that do not count.
        n_untouched: How many tokens at the start of each sequence do not count.
        batch_size: Sequences that are read at once.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The comparison.

    Raises:
        InvalidInputError: No tokens, a coder without a site or two of different sites, or latents that are not finite.
        UnknownNameError: The model has no such site.
        ShapeError: A site has another width, or the two have different numbers of latents.
    """
    where = "encoder_agreement"
    text, row = held_out(
        lm,
        tokens,
        where=where,
        untouched_tokens=untouched_tokens,
        n_untouched=n_untouched,
        batch_size=batch_size,
        progress=progress,
    )
    site, other = (checked_splice(lm, coder, row, where=where).reads[0] for coder in (first, second))
    n_latents = first.n_latents
    if second.n_latents != n_latents:
        raise ShapeError(
            four_part(
                f"Coders of {n_latents} and of {second.n_latents} latents were given",
                where=where,
                expected="two encoders of one dictionary.",
                fix="make the pursuit from the SAE's own W_dec.",
            )
        )
    if site != other:
        raise InvalidInputError(
            four_part(
                f"Coders that read {site} and {other} were given",
                where=where,
                expected="two encoders of one site.",
                fix="compare what one dictionary makes of one site.",
            )
        )
    coders = first.unplaced(), second.unplaced()
    n_rows = max(1, _LATENT_BYTES // (4 * n_latents))
    sums, smallest, n_tokens = np.zeros((len(SUMS), n_latents, N_INTERVALS)), np.full((2, n_latents), np.inf), 0
    n_fired = np.zeros((2, n_latents), np.int64)
    for batch in text.batches(lm, "encoder agreement"):
        values = lm.reap(batch.tokens, site)[site]
        values = values.reshape(batch.tokens.size, -1)
        rows = np.flatnonzero(batch.is_touched)
        n_tokens += len(rows)
        size = min(n_rows, batch.tokens.size)
        for start in range(0, len(rows), size):
            # The last part is filled up, so that all have one shape.
            chosen = np.resize(rows[start : start + size], size)
            n_new = min(size, len(rows) - start)
            found = [np.asarray(_latents(coder, values, chosen), np.float64)[:n_new] for coder in coders]
            _check_finite(found, where)
            add_sums(sums, *found)
            for number, latents in enumerate(found):
                n_fired[number] += (latents != 0).sum(axis=0)
                magnitudes = np.where(latents != 0, np.abs(latents), np.inf).min(axis=0, initial=np.inf)
                smallest[number] = np.minimum(smallest[number], magnitudes)
    check_counts(n_tokens, where=where)
    is_low, threshold = low_half(sums[0])
    low = np.where(is_low[None], sums, 0.0).sum(axis=2)
    return EncoderAgreement(
        pearson=pearson(sums.sum(axis=2)),
        pearson_low=pearson(low),
        n_either=sums[0].sum(axis=1).astype(np.int64),
        n_low=low[0].astype(np.int64),
        threshold=threshold,
        n_fired=n_fired,
        smallest=np.where(np.isinf(smallest), np.nan, smallest),
        n_tokens=n_tokens,
        read=site,
        names=names,
    )


def add_sums(sums: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Add the tokens on which either of two activations is not 0.

    Args:
        sums: float64 `[len(SUMS), latent, interval]`, which is changed.
        a: The first encoder's activations, float64 `[token, latent]`.
        b: The second's.
    """
    at = np.nonzero((a != 0) | (b != 0))
    a, b = a[at], b[at]
    cells = at[1] * N_INTERVALS + intervals(a)
    for number, values in enumerate((None, a, b, a * a, b * b, a * b)):
        new = np.bincount(cells, weights=values, minlength=sums[number].size)
        sums[number] += new.reshape(sums[number].shape)


def intervals(a: np.ndarray) -> np.ndarray:
    """The number of the interval that each activation `a` is in, by its magnitude."""
    magnitudes = np.where(a != 0, np.abs(a), 1.0)
    numbers = np.floor(_PER_OCTAVE * (np.log2(magnitudes) - _LOWEST)).astype(np.int64)
    return np.where(a != 0, 1 + np.clip(numbers, 0, N_INTERVALS - 2), 0)


def low_half(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which intervals hold the low half of each latent's tokens.

    Args:
        counts: How many tokens are in each interval, `[latent, interval]`.

    Returns:
        Which intervals, bool `[latent, interval]`, and the activation at which the last of them ends, float64
        `[latent]`; 0 for a latent that never fires.
    """
    fired = counts.copy()
    fired[:, 0] = 0
    total = fired.sum(axis=1)
    last = np.argmax(2 * fired.cumsum(axis=1) >= total[:, None], axis=1)
    ends = 2.0 ** (_LOWEST + last / _PER_OCTAVE)
    return np.arange(N_INTERVALS)[None] <= last[:, None], np.where(total > 0, ends, 0.0)


def pearson(sums: np.ndarray) -> np.ndarray:
    """The correlation that sums stand for.

    Args:
        sums: float64 `[len(SUMS), latent]`.

    Returns:
        float64 `[latent]`; NaN where one of the two does not vary.
    """
    n, a, b, aa, bb, ab = sums
    n = np.maximum(n, 1)
    variances = [square - total * total / n for square, total in ((aa, a), (bb, b))]
    # What rounding leaves of equal numbers is no variance.
    varies = (variances[0] > 1e-12 * aa) & (variances[1] > 1e-12 * bb)
    scale = np.sqrt(np.where(varies, variances[0] * variances[1], 1.0))
    return np.where(varies, (ab - a * b / n) / scale, np.nan)


def _latents_of_rows(coder: Any, values: jax.Array, rows: jax.Array) -> jax.Array:
    return coder.encode(values[rows].astype(jnp.float32))


_latents = counted_jit(_latents_of_rows, name="encoder_agreement.latents")


def _check_finite(found: list[np.ndarray], where: str) -> None:
    if not all(np.isfinite(latents).all() for latents in found):
        raise InvalidInputError(
            four_part(
                "Latents that are not finite were met",
                where=where,
                expected="finite numbers on every token that counts.",
                fix="look at the model's dtype, at the dictionary and at the scaling of what is coded.",
            )
        )
