"""What each number of latents costs: the same text with a site's activations coded in many ways, sparse and less so.

For each dictionary and each way to encode with it: how many latents a token really has, what they leave unexplained,
and what the model's predictions lose with the reconstruction in place. A pursuit, or the largest latents of an SAE, say
in one run what fewer steps would have come to; an SAE's own encoder has one sparsity, and is one point.

    FVU              sum |y - y'|^2 / sum |y - mean(y)|^2
    loss recovered   (L_ablated - L_spliced) / (L_ablated - L_clean)       once with zeros, once with means

    ito = ij.pursuit.encoder(GradientPursuit(), sae.W_dec, k=32, b_dec=..., scaling=..., read=sae.read)
    sweep = sparsity_sweep(lm, {"mine": {"encoder": sae, "top-k": TopLatents(sae, 32), "GP": ito}}, tokens, l0s=(8, 32))
    sweep                                                   # prints as a table
    sweep.loss_recovered("mine", "GP", "mean")              # one number for each of l0s

>>> curve = SparsityCurve((4, 8), *np.array([[3.5, 6.0], [0.5, 0.25], [4.0, 3.25], [1.0, 0.25]]))
>>> sweep = SparsitySweep({"mine": {"GP": curve}}, {"clean": 3.0, "zero": 5.0}, 10, 9, 1, Site(3, "mlp_out"))
>>> sweep.loss_recovered("mine", "GP").tolist()
[0.5, 0.875]

Sharp edges: all coders read one site and write one site. A target is a number of steps: an atom may be chosen twice and
a coefficient return to 0, so what counts is `l0`. Loss recovered is not clipped, and NaN where ablation costs nothing.

Source: Smith 2024, Replacing SAE Encoders with Inference-Time Optimisation, for the comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from interp_jax.core.errors import InvalidInputError, UnknownNameError, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.moments import Moments, batch_moments, check_counts, variance_of
from interp_jax.forward.sparse_coder import PrefixCoder, Prefixes, SparseCoder
from interp_jax.forward.spliced_losses import (
    ABLATIONS,
    Batch,
    ablated,
    check_ablations,
    check_targets,
    held_out,
    loss_recovered,
    loss_sums,
    site_means,
)
from interp_jax.forward.splicing import Replacement, Splice, blend, checked_splice, spliced_passes
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

Coders = Mapping[str, Mapping[str, SparseCoder]]
L0S = (4, 8, 16, 32, 64, 128)
# What the latents of the tokens that are encoded at once may take.
_LATENT_BYTES = 2**28


@dataclass(frozen=True)
class SparsityCurve:
    """One way to encode with one dictionary, at some sparsities.

    Args:
        targets: The numbers of steps asked for; None for an encoder with a sparsity of its own, which is one point.
        l0: Mean number of latents of a token that are not 0, float64 `[point]`.
        fvu: Fraction of variance unexplained; NaN if all activations are the same, `[point]`.
        losses: Mean cross-entropy in nats per target with the reconstruction in place, `[point]`.
        kl: Mean KL(clean prediction || prediction) in nats per target, `[point]`.
    """

    targets: tuple[int, ...] | None
    l0: np.ndarray
    fvu: np.ndarray
    losses: np.ndarray
    kl: np.ndarray


@dataclass(frozen=True, repr=False)
class SparsitySweep:
    """What each number of latents costs.

    Args:
        curves: Dictionary to encoder to its numbers.
        losses: Mean cross-entropy in nats per target: "clean", and of the ablations "zero" and "mean".
        n_tokens: How many tokens were coded.
        n_targets: How many targets the losses are means over.
        n_sequences: How many sequences were read.
        write: The site that was written.
    """

    curves: dict[str, dict[str, SparsityCurve]]
    losses: dict[str, float]
    n_tokens: int
    n_targets: int
    n_sequences: int
    write: Site

    def curve(self, dictionary: str, encoder: str) -> SparsityCurve:
        """The numbers of one `encoder` with one `dictionary`.

        Raises:
            UnknownNameError: There is no such one.
        """
        for name, known in ((dictionary, self.curves), (encoder, self.curves.get(dictionary, {}))):
            if name not in known:
                raise UnknownNameError(
                    four_part(
                        f"Unknown name {name!r}",
                        where="SparsitySweep",
                        names=known,
                        given=name,
                        fix="name a dictionary, then one of its encoders.",
                    )
                )
        return self.curves[dictionary][encoder]

    def loss_recovered(self, dictionary: str, encoder: str, ablation: str = "zero") -> np.ndarray:
        """The share of an ablation's damage that each point avoids.

        (L_ablated - L_spliced) / (L_ablated - L_clean)

        Args:
            dictionary: Which dictionary.
            encoder: Which of its encoders.
            ablation: "zero" or "mean".

        Returns:
            float64 `[point]`, not clipped; NaN where the ablation changes the loss by less than `LOSS_TOLERANCE`.

        Raises:
            UnknownNameError: No such dictionary or encoder, or this ablation was not run.
        """
        losses = self.curve(dictionary, encoder).losses
        return loss_recovered(self.losses, losses, ablation, where="SparsitySweep")

    def __repr__(self) -> str:
        names = [name for name in ABLATIONS if name in self.losses]
        rows = [("dictionary", "encoder", "target", "L0", "FVU", "loss", *(f"recovered ({name})" for name in names))]
        for dictionary, encoders in self.curves.items():
            for encoder, curve in encoders.items():
                recovered = [self.loss_recovered(dictionary, encoder, name) for name in names]
                for i in range(len(curve.l0)):
                    target = "own" if curve.targets is None else str(curve.targets[i])
                    numbers = (f"{curve.l0[i]:.4g}", f"{curve.fvu[i]:.4f}", f"{curve.losses[i]:.4f}")
                    rows.append((dictionary, encoder, target, *numbers, *(f"{share[i]:.4f}" for share in recovered)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [f"SparsitySweep at {self.write} ({self.n_sequences} sequences, {self.n_targets:,} targets)"]
        lines.append("  loss (nats)  " + ", ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items()))
        for row in rows:
            cells = [f"{cell:<{width}}" for cell, width in zip(row[:2], widths[:2], strict=True)]
            cells += [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  " + "  ".join(cells).rstrip())
        return "\n".join(lines)


class _Entry(NamedTuple):
    """One coder of a sweep, with its names, and the sparsities it is run at (None: its own)."""

    dictionary: str
    encoder: str
    coder: SparseCoder
    targets: tuple[int, ...] | None

    @property
    def n_points(self) -> int:
        return 1 if self.targets is None else len(self.targets)


class _Sums(NamedTuple):
    """What adds up over batches: the site's moments and square, and by entry the latents and squared errors."""

    moments: Moments
    square: float
    points: list[np.ndarray]

    def merged(self, other: _Sums) -> _Sums:
        points = [one + more for one, more in zip(self.points, other.points, strict=True)]
        return _Sums(self.moments.merged(other.moments), self.square + other.square, points)


def sparsity_sweep(
    lm: LanguageModel,
    coders: Coders,
    tokens: Any,
    *,
    l0s: Sequence[int] = L0S,
    ablations: Sequence[str] = ABLATIONS,
    untouched_tokens: Iterable[int] = (),
    n_untouched: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> SparsitySweep:
    """Measure dictionaries under several encoders at several sparsities, on held-out text.

    Args:
        lm: The model.
        coders: Name of a dictionary to name of an encoder to the coder, all of one site. One that goes latent by
            latent (a pursuit, the largest latents of an SAE) is run once and seen at each of `l0s`; another is seen
            at the sparsity it has.
        tokens: Token ids `[sequence, pos]`, padding is -1; or what gives them by slices and has a length.
        l0s: How many steps to take, different whole numbers from 1.
        ablations: Which of "zero" and "mean" to compare with; the mean costs one more pass up to the site.
        untouched_tokens: Ids of tokens, such as BOS, at whose positions nothing is replaced or measured.
        n_untouched: At how many tokens at the start of each sequence likewise.
        batch_size: Sequences that are read at once; by default as many as the memory for their logits allows.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The numbers of each.

    Raises:
        InvalidInputError: No coder, or several sites; no sparsity, one below 1 or above a dictionary's size; no
            tokens or targets; numbers that are not finite.
        UnknownNameError: The model has no such site, or there is no such ablation.
        ShapeError: A site has another width.
    """
    where = "sparsity_sweep"
    entries = _entries(coders, l0s)
    text, first = held_out(
        lm,
        tokens,
        where=where,
        untouched_tokens=untouched_tokens,
        n_untouched=n_untouched,
        batch_size=batch_size,
        progress=progress,
    )
    splice, ablations = _one_splice(lm, entries, first), check_ablations(ablations, where=where)
    means = site_means(lm, splice.writes, text) if "mean" in ablations else None
    n_passes = 1 + len(ablations) + sum(entry.n_points for entry in entries)
    sums, n_targets, totals = None, 0, np.zeros((2, n_passes))
    for batch in text.batches(lm, "sparsity sweep"):
        measured = _Measuring(entries, batch.is_touched)
        passes = spliced_passes(lm, splice, batch.tokens, list(_ways(measured, batch, means, ablations)))
        totals += loss_sums(passes, batch)
        n_targets += int(batch.has_target.sum())
        sums = measured.sums() if sums is None else sums.merged(measured.sums())
    check_targets(n_targets, text)
    assert sums is not None
    check_counts(int(sums.moments.n), where=where)
    losses, kl = totals / n_targets
    _check_finite(losses, sums, entries)
    n_before = 1 + len(ablations)
    starts = n_before + np.cumsum([0] + [entry.n_points for entry in entries])
    curves: dict[str, dict[str, SparsityCurve]] = {}
    variance = variance_of(sums.moments.square, sums.square)
    for entry, start, (n_active, errors) in zip(entries, starts, sums.points, strict=False):
        at = slice(start, start + entry.n_points)
        fvu = errors / variance if variance else errors * np.nan
        curve = SparsityCurve(entry.targets, n_active / sums.moments.n, fvu, losses[at], kl[at])
        curves.setdefault(entry.dictionary, {})[entry.encoder] = curve
    return SparsitySweep(
        curves=curves,
        losses=dict(zip(("clean", *ablations), losses[:n_before].tolist(), strict=True)),
        n_tokens=int(sums.moments.n),
        n_targets=n_targets,
        n_sequences=len(text.tokens),
        write=splice.writes[0],
    )


def _entries(coders: Coders, l0s: Sequence[int]) -> list[_Entry]:
    is_nested = isinstance(coders, Mapping) and all(isinstance(several, Mapping) for several in coders.values())
    flat = (
        [(name, encoder, coder) for name, several in coders.items() for encoder, coder in several.items()]
        if (is_nested)
        else []
    )
    if not flat:
        raise _refuse(
            "No SAE or other coder was given" if is_nested else f"{coders!r:.60} was given",
            "a dictionary's name, and by the name of each encoder a coder.",
            'write {"mine": {"encoder": sae, "top-k": TopLatents(sae, 32)}}.',
        )
    l0s = np.atleast_1d(np.asarray(l0s)).tolist()
    wrong = [n for n in l0s if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1]
    if wrong or not l0s or len(set(l0s)) != len(l0s):
        raise _refuse(f"l0s = {tuple(l0s)!r} was given", "different whole numbers from 1.", "choose (4, 16, 64).")
    targets = tuple(sorted(int(n) for n in l0s))
    by_steps = [(name, coder) for name, _, coder in flat if isinstance(coder, PrefixCoder)]
    if small := [f"{name} ({coder.n_latents})" for name, coder in by_steps if coder.n_latents < targets[-1]]:
        raise _refuse(
            f"l0s up to {targets[-1]} were given for {', '.join(dict.fromkeys(small))}",
            "no more than the number of latents.",
            "leave out the larger ones.",
        )
    return [
        _Entry(name, encoder, coder, targets if isinstance(coder, PrefixCoder) else None)
        for name, encoder, coder in flat
    ]


def _one_splice(lm: LanguageModel, entries: list[_Entry], first: np.ndarray) -> Splice:
    splices = [checked_splice(lm, entry.coder, first, where="sparsity_sweep") for entry in entries]
    sites = dict.fromkeys((one.reads[0], one.writes[0]) for one in splices)
    if len(sites) > 1:
        raise _refuse(
            f"Coders of {len(sites)} sites were given: {', '.join(' -> '.join(map(str, pair)) for pair in sites)}",
            "coders that all read one site and write one site.",
            "make one sweep for each site.",
        )
    return splices[0]


class _Measuring:
    """The coders on one batch: reconstructions, held for one coder at a time, and the sums they leave."""

    def __init__(self, entries: list[_Entry], is_touched: np.ndarray):
        self.entries = entries
        self._is_touched = is_touched
        self._found: tuple[int, Any] = (-1, None)
        self._points: dict[int, tuple[Any, Any]] = {}
        self._site: Any = None

    def reconstruction(self, number: int, point: int, x: jax.Array, y: jax.Array) -> jax.Array:
        """What is written by the coder of this number at one of its sparsities."""
        if self._found[0] != number:
            entry = self.entries[number]
            found, errors = _coded(entry.coder.unplaced(), x, y, self._is_touched, targets=entry.targets)
            self._found = number, found.reconstructions
            self._points[number] = found.n_active, errors
        return self._found[1][point]

    def saw(self, y: jax.Array) -> None:
        """Take note of what is at the site in the clean pass."""
        self._site = _moments(y, self._is_touched)

    def sums(self) -> _Sums:
        """What the batch adds, in float64."""
        mean, square, total = (np.asarray(part, np.float64) for part in self._site)
        counted = self._is_touched.reshape(-1)
        points = [
            np.stack([np.asarray(part, np.float64)[:, counted].sum(axis=1) for part in self._points[number]])
            for number in range(len(self.entries))
        ]
        return _Sums(Moments(float(counted.sum()), mean, float(square)), float(total), points)


def _ways(
    measured: _Measuring, batch: Batch, means: list[np.ndarray] | None, ablations: Sequence[str]
) -> Iterator[Replacement]:
    """The passes of a batch: clean, ablated, and every point of every coder."""

    def clean(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        del number, x
        measured.saw(y)
        return y

    def coded(entry: int, point: int) -> Replacement:
        def replace(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
            del number
            return blend(y, measured.reconstruction(entry, point, x, y), None, batch.is_touched)

        return replace

    yield clean
    yield from (ablated(name, means, batch) for name in ablations)
    for number, entry in enumerate(measured.entries):
        yield from (coded(number, point) for point in range(entry.n_points))


def _coded_in_chunks(
    coder: Any, x: jax.Array, y: jax.Array, counted: jax.Array, *, targets: tuple[int, ...] | None
) -> tuple[Prefixes, jax.Array]:
    """Reconstructions `[point, *y.shape]`, and latents and squared errors by token, `[point, token]`."""
    counted, shape = counted.reshape(-1, 1), y.shape
    x = jnp.where(counted, x.reshape(-1, coder.d_in).astype(jnp.float32), 0.0)
    y = jnp.where(counted, y.reshape(-1, coder.d_out).astype(jnp.float32), 0.0)
    n_rows = min(len(x), max(1, _LATENT_BYTES // (4 * coder.n_latents)))

    def chunk(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if targets is None:
            latents = coder.encode(x)
            found = Prefixes(coder.decode(latents, x)[None], (latents != 0).sum(axis=-1, dtype=jnp.int32)[None])
        else:
            found = coder.prefixes(x, targets)
        return found.reconstructions.swapaxes(0, 1), found.n_active.T

    chunks = jnp.pad(x, ((0, -len(x) % n_rows), (0, 0))).reshape(-1, n_rows, coder.d_in)
    parts = lax.map(chunk, chunks)
    written, n_active = (part.reshape(-1, *part.shape[2:])[: len(y)].swapaxes(0, 1) for part in parts)
    errors = jnp.square(y[None] - written).sum(axis=-1)
    return Prefixes(written.reshape(-1, *shape), n_active), errors


_coded = counted_jit(_coded_in_chunks, name="sparsity_sweep.coded", static_argnames=("targets",))


def _moments_of_site(y: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    flat, counted = y.reshape(-1, y.shape[-1]).astype(jnp.float32), counted.reshape(-1)
    return *batch_moments(flat, counted), jnp.where(counted[:, None], jnp.square(flat), 0.0).sum()


_moments = counted_jit(_moments_of_site, name="sparsity_sweep.moments")


def _check_finite(losses: np.ndarray, sums: _Sums, entries: list[_Entry]) -> None:
    wrong = [
        f"{entry.dictionary}, {entry.encoder}"
        for entry, points in zip(entries, sums.points, strict=True)
        if not np.isfinite(points).all()
    ]
    what = f"Reconstructions (of {'; '.join(wrong)})" if wrong else "Losses"
    what = what if np.isfinite([sums.moments.square, sums.square]).all() else "Activations"
    if wrong or what == "Activations" or not np.isfinite(losses).all():
        raise _refuse(
            f"{what} that are not finite (or whose square is not) were met",
            "finite numbers on every token that counts.",
            "look at the model's dtype, at the dictionaries and at the scaling of what is coded.",
        )


def _refuse(what: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where="sparsity_sweep", expected=expected, fix=fix))
