"""Steering in terms of an SAE's latents: one latent, what all say, what a few say, and what is left without some.

Everything here is arrays: latents `[pos, latent]` and what each writes, `W_dec [latent, d_model]`.

    one latent          s * f_i * W_dec_i
    reconstruction      sum over all (pos, i) of (f+ - f-) W_dec_i: SAE(h+) - SAE(h-), in which the bias cancels
    the top k           the same over the k pairs (pos, i) that are on in the positive prompt with the largest
                        |f+ - f-| |W_dec_i|; optionally those of the negative prompt too
    projected out       v - v Q Q^T, Q an orthonormal basis of the rows W_dec_i to be removed

>>> W_dec = np.array([[1.0, 0.0], [0.6, 0.8]])
>>> latents = LatentDifference(np.array([[0.0, 3.0]]), np.array([[1.0, 1.0]]), W_dec)
>>> latents.top(1), latents.norms
(array([[1.2, 1.6]], dtype=float32), array([[1., 2.]], dtype=float32))
>>> bool(abs(project_out(np.array([[5.0, -2.0]]), W_dec)).max() < 1e-6)
True

Sharp edges: a coefficient on a latent and one on the raw difference are not comparable: the raw difference has the size
of the residual stream. `W_dec` must be in the units of the activations (`sae.fold_scale().W_dec`, if the SAE scales
what it reads). Dense latents, on for most tokens, say little; `dense` lists them with what they contribute.

Source: Turner et al. 2023 (2308.10248) for the difference; Bricken et al. 2023 for latents as directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part

# Directions count as dependent below this share of the largest singular value; rows come in float32.
_RANK_TOLERANCE = 1e-6


class LatentAt(NamedTuple):
    """A latent at a position: `position`, `latent`, its value on both prompts, and the `norm` of what it adds."""

    position: int
    latent: int
    positive: float
    negative: float
    norm: float


class DenseLatent(NamedTuple):
    """A latent that fires on most tokens: `latent`, its `frequency`, and the largest `norm` of what it adds."""

    latent: int
    frequency: float
    norm: float


@dataclass(frozen=True, eq=False)
class LatentDifference:
    """Latents on a positive and a negative prompt, position by position.

    Args:
        positive: Latents on the positive prompt, `[pos, latent]`.
        negative: On the negative one, `[pos, latent]`.
        W_dec: What each latent writes, `[latent, d_model]`.
        frequencies: How often each fires on ordinary text, from 0 to 1, `[latent]`; None if that is not known.
    """

    positive: np.ndarray
    negative: np.ndarray
    W_dec: np.ndarray
    frequencies: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("positive", "negative", "W_dec", "frequencies"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.asarray(value, np.float32))
        shapes = [np.shape(part) for part in (self.positive, self.negative, self.W_dec)]
        n_latents = self.W_dec.shape[0] if self.W_dec.ndim == 2 else None
        fits = shapes[0] == shapes[1] and len(shapes[0]) == 2 and shapes[0][1] == n_latents
        if not fits or (self.frequencies is not None and self.frequencies.shape != (n_latents,)):
            given = ", ".join(str(list(shape)) for shape in shapes)
            more = "" if self.frequencies is None else f", frequencies {list(self.frequencies.shape)}"
            raise ShapeError(
                four_part(
                    f"Latents and W_dec of shapes {given}{more} were given",
                    where="LatentDifference",
                    expected="[pos, latent] twice, [latent, d_model], and frequencies [latent].",
                    fix="encode aligned prompts (prompt_pair aligns them) with the SAE whose W_dec this is.",
                )
            )
        if wrong := [n for n in ("positive", "negative", "W_dec") if not np.isfinite(getattr(self, n)).all()]:
            raise _refuse(
                f"NaN or infinite numbers in {', '.join(wrong)}",
                "LatentDifference",
                "finite numbers.",
                "look at the SAE's training: its weights, and the scale of what it reads.",
            )

    @property
    def difference(self) -> np.ndarray:
        """f+ - f-, `[pos, latent]`."""
        return self.positive - self.negative

    @property
    def norms(self) -> np.ndarray:
        """The norm of what each latent adds at each position, |f+ - f-| |W_dec_i|, `[pos, latent]`."""
        return np.abs(self.difference) * np.linalg.norm(self.W_dec, axis=-1)

    @property
    def reconstruction(self) -> np.ndarray:
        """What all latents at all positions add, `[pos, d_model]`: SAE(h+) - SAE(h-)."""
        return self._written(np.ones_like(self.positive, bool))

    def is_kept(self, k: int, *, include_negative: bool = False) -> np.ndarray:
        """Which latents at which positions are among the top k.

        Args:
            k: How many pairs of position and latent, of those that are on in the positive prompt.
            include_negative: Whether the top k of those that are on in the negative prompt are kept, too.

        Returns:
            bool `[pos, latent]`; fewer than k where fewer are on.

        Raises:
            InvalidInputError: k is not a whole number from 1.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise _refuse(f"k={k!r} was given", "LatentDifference.top", "a whole number from 1.", "choose 1 or more.")
        norms = self.norms
        kept = np.zeros(norms.shape, bool)
        for latents in (self.positive, self.negative)[: 1 + include_negative]:
            ranked = np.argsort(np.where(latents != 0, -norms, np.inf), axis=None, kind="stable")[:k]
            kept.flat[ranked[latents.flat[ranked] != 0]] = True
        return kept

    def top(self, k: int, *, include_negative: bool = False) -> np.ndarray:
        """What the top k latents add; each with its difference f+ - f-, whichever prompt it was chosen for.

        Args:
            k: As for `is_kept`.
            include_negative: As for `is_kept`.

        Returns:
            `[pos, d_model]`.
        """
        return self._written(self.is_kept(k, include_negative=include_negative))

    def listed(self, k: int, *, include_negative: bool = False) -> list[LatentAt]:
        """The top k latents with their positions, largest contribution first.

        Args:
            k: As for `is_kept`.
            include_negative: As for `is_kept`.

        Returns:
            One entry per pair of position and latent.
        """
        norms = self.norms
        found = [
            LatentAt(int(p), int(i), float(self.positive[p, i]), float(self.negative[p, i]), float(norms[p, i]))
            for p, i in np.argwhere(self.is_kept(k, include_negative=include_negative))
        ]
        return sorted(found, key=lambda one: -one.norm)

    def dense(self, *, threshold: float = 0.5) -> list[DenseLatent]:
        """The latents that fire on more than a share of all tokens, largest contribution first.

        Args:
            threshold: The share.

        Returns:
            One entry per latent; the norm is the largest over positions, and should be small.

        Raises:
            InvalidInputError: No frequencies were given.
        """
        if self.frequencies is None:
            raise _refuse(
                "Latents without frequencies",
                "LatentDifference.dense",
                "how often each fires on ordinary text, [latent].",
                "pass frequencies=(latents > 0).mean(0) over the tokens of a text, or those of evaluate_sae.",
            )
        largest = self.norms.max(axis=0)
        dense = np.flatnonzero(self.frequencies > threshold)
        found = [DenseLatent(int(i), float(self.frequencies[i]), float(largest[i])) for i in dense]
        return sorted(found, key=lambda one: -one.norm)

    def _written(self, is_kept: np.ndarray) -> np.ndarray:
        return np.where(is_kept, self.difference, np.float32(0)) @ self.W_dec


def latent_direction(activation: float, decoder_row: Any, *, multiplier: float = 1.0) -> np.ndarray:
    """What one latent writes, so many times over.

    multiplier * activation * W_dec_i

    Args:
        activation: The latent's own activation, such as its largest on the prompt.
        decoder_row: `W_dec_i`, `[d_model]`.
        multiplier: How many times as strong.

    Returns:
        `[d_model]`.

    Raises:
        ShapeError: The row is not one vector.
    """
    row = np.asarray(decoder_row, np.float32)
    if row.ndim != 1 or np.ndim(activation) != 0:
        raise ShapeError(
            four_part(
                f"An activation of shape {list(np.shape(activation))} and a row of shape {list(row.shape)} were given",
                where="latent_direction",
                expected="one number and one row [d_model].",
                fix="write latent_direction(float(latents[pos, i]), W_dec[i]).",
            )
        )
    return np.float32(multiplier) * np.float32(activation) * row


def project_out(values: Any, directions: Any) -> np.ndarray:
    """Vectors without what they have along some directions, all of them at once.

    v - v Q Q^T, Q an orthonormal basis of the directions' span

    Args:
        values: `[..., d_model]`.
        directions: `[direction, d_model]`, such as rows of `W_dec`; duplicates and zeros are harmless.

    Returns:
        `[..., d_model]`.

    Raises:
        ShapeError: The widths differ.
        InvalidInputError: A number is not finite.
    """
    values, directions = np.asarray(values), np.asarray(directions)
    if directions.ndim != 2 or values.ndim < 1 or values.shape[-1] != directions.shape[-1]:
        raise ShapeError(
            four_part(
                f"Values {list(values.shape)} and directions {list(directions.shape)} were given",
                where="project_out",
                expected="[..., d_model] and [direction, d_model].",
                fix="for one direction write directions[None].",
            )
        )
    if not (np.isfinite(values).all() and np.isfinite(directions).all()):
        raise _refuse("NaN or infinite numbers", "project_out", "finite numbers.", "look at where they come from.")
    wide = directions.astype(np.float64)
    norms = np.linalg.norm(wide, axis=-1)
    # Rows of one length: how long a direction is says nothing about whether it is one.
    unit = wide[norms > 0] / norms[norms > 0, None]
    if len(unit) == 0:
        return values.copy()
    _, singular, basis = np.linalg.svd(unit, full_matrices=False)
    basis = basis[singular > _RANK_TOLERANCE * singular[0]]
    kept = values.astype(np.float64)
    # Twice: the first pass leaves rounding errors of the part that was removed.
    for _ in range(2):
        kept = kept - kept @ basis.T @ basis
    return kept.astype(values.dtype if values.dtype.kind == "f" else np.float32)


def _refuse(what: str, where: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where=where, expected=expected, fix=fix))
