"""How well an SAE reconstructs activations, and how its latents fire: sums over tokens, taken batch by batch.

    L0                     mean number of latents that are not 0
    FVU                    sum |y - y'|^2 / sum |y - mean(y)|^2, the mean over all tokens together
    explained variance     1 - FVU
    variance of the error  1 - Var(y - y') / Var(y): blind to an error that is the same everywhere
    shrinkage              E |y'|^2 / E[y . y']: below 1 where the reconstruction is too short
    frequency              share of tokens on which each latent is not 0

An SAE that halves what it reads:

>>> from interp_jax.methods.sae.relu import ReLU
>>> from interp_jax.methods.sae.sae import SAE
>>> both = jnp.concatenate([jnp.eye(2), -jnp.eye(2)])
>>> params = {"W_enc": both.T, "b_enc": jnp.zeros(4), "W_dec": both / 2, "b_dec": jnp.zeros(2)}
>>> result = measure_reconstruction(SAE(ReLU(), params), jnp.array([[1.0, 2.0], [-1.0, -2.0], [3.0, 0.0], [-3.0, 0.0]]))
>>> round(result.shrinkage, 6), round(result.fvu, 6), result.l0, result.n_fired.tolist()
(0.5, 0.25, 1.5, [2, 1, 2, 1])

Sharp edges: sums are float32 within a token and float64 across tokens; ratios are taken once, at the end. Averages of
ratios per token or per batch, as some evaluators report, are other numbers. A frequency cannot be told from 0 below
one over the number of tokens. Latents are in the units of the SAE's own scaling.

Source: Rajamanoharan et al. 2024 (2404.16014), equation 10, for the shrinkage; Bricken et al. 2023 for densities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.moments import Moments, batch_moments, check_counts, variance_of
from interp_jax.forward.sparse_coder import SparseCoder
from interp_jax.methods.sae.dictionary import cluster_cosines, encoder_decoder_cosines
from interp_jax.transforms.compilations import counted_jit

# Below this frequency a latent that fires is called ultra-low.
ULTRA_LOW = 1e-4
# Added to frequencies before their logarithm: latents that never fire stand at -6.5.
DENSITY_FLOOR = 10**-6.5
# What the latents of the tokens that are encoded at once may take.
_LATENT_BYTES = 2**28


@dataclass(frozen=True, repr=False)
class Reconstruction:
    """What an SAE makes of the activations of a text.

    Args:
        n_tokens: How many tokens were counted.
        l0: Mean number of latents that are not 0.
        l1: Mean sum of the latents' absolute values.
        l1_weighted: The same, each latent times the norm of its decoder row.
        squared_error: Mean of |y - y'|^2, summed over d_out.
        fvu: Fraction of variance unexplained; NaN if all activations are the same up to rounding.
        error_variance: Var(y - y') / Var(y).
        cosine: Mean cosine between y and y'; 0 where one of them is 0.
        norm_ratio: Mean of |y'| / |y| over tokens with y not 0.
        shrinkage: E |y'|^2 / E[y . y']; NaN if the reconstruction is always 0.
        encoder_decoder_cosine: Median over normal latents of the cosine between encoder column and decoder row; NaN if
            there is none, or where the two live in different spaces.
        n_fired: On how many tokens each latent is not 0, int64 `[latent]`.
        rare_encoder_cosines: Cosine of each ultra-low latent's encoder column with their mean, `[rare latent]`.
        rare_decoder_cosines: Likewise of the decoder rows.
        read: The site that was read, if known.
        write: The site that was reconstructed, if known.
    """

    n_tokens: int
    l0: float
    l1: float
    l1_weighted: float
    squared_error: float
    fvu: float
    error_variance: float
    cosine: float
    norm_ratio: float
    shrinkage: float
    encoder_decoder_cosine: float
    n_fired: np.ndarray
    rare_encoder_cosines: np.ndarray
    rare_decoder_cosines: np.ndarray
    read: Site | None = None
    write: Site | None = None

    @property
    def n_latents(self) -> int:
        """How many latents there are."""
        return len(self.n_fired)

    @property
    def explained_variance(self) -> float:
        """1 - FVU."""
        return 1 - self.fvu

    @property
    def variance_explained_up_to_a_constant(self) -> float:
        """1 - Var(y - y') / Var(y), which a constant error does not lower."""
        return 1 - self.error_variance

    @property
    def frequency(self) -> np.ndarray:
        """Share of tokens on which each latent fires, `[latent]`, in steps of 1 / n_tokens."""
        return self.n_fired / self.n_tokens

    @property
    def log_density(self) -> np.ndarray:
        """log10(frequency + 10^-6.5), `[latent]`; latents that never fire are at -6.5."""
        return np.log10(self.frequency + DENSITY_FLOOR)

    @property
    def is_dead(self) -> np.ndarray:
        """Which latents never fired, bool `[latent]`."""
        return self.n_fired == 0

    @property
    def is_ultra_low(self) -> np.ndarray:
        """Which latents fired, on fewer than one token in 10,000, bool `[latent]`."""
        return (self.n_fired > 0) & (self.frequency < ULTRA_LOW)

    @property
    def is_normal(self) -> np.ndarray:
        """Which latents fired on one token in 10,000 or more, bool `[latent]`."""
        return self.frequency >= ULTRA_LOW

    def histogram(self, n_bins: int = 60) -> tuple[np.ndarray, np.ndarray]:
        """How many latents have which density.

        Args:
            n_bins: How many bins from -6.5 to 0; the first begins at the dead latents.

        Returns:
            Counts `[bin]` and edges of `log_density` `[bin + 1]`.
        """
        low, high = np.log10(DENSITY_FLOOR), np.log10(1 + DENSITY_FLOOR)
        # Rounding may put a density next to the outermost edges.
        counts, _ = np.histogram(np.clip(self.log_density, low, high), bins=n_bins, range=(low, high))
        return counts, np.linspace(low, high, n_bins + 1)

    def numbers(self) -> dict[str, float]:
        """All single numbers by name, for a log or a table."""
        names = ("n_tokens", "l0", "l1", "l1_weighted", "squared_error", "fvu", "explained_variance", "error_variance")
        names += ("cosine", "norm_ratio", "shrinkage", "encoder_decoder_cosine")
        found: dict[str, float] = {name: getattr(self, name) for name in names}
        clusters = {"n_dead": self.is_dead, "n_ultra_low": self.is_ultra_low, "n_normal": self.is_normal}
        return found | {name: int(members.sum()) for name, members in clusters.items()}

    def __repr__(self) -> str:
        at = "" if self.read is None else f" at {self.read}"
        at += "" if self.write in (None, self.read) else f" -> {self.write}"
        return "\n".join([f"Reconstruction{at}, {self.n_tokens:,} tokens", *self.lines()])

    def lines(self) -> list[str]:
        """The numbers as lines of a table."""
        rare = ""
        if len(self.rare_encoder_cosines) > 1:
            encoder, decoder = np.median(self.rare_encoder_cosines), np.median(self.rare_decoder_cosines)
            rare = f"; cosine of the ultra-low with their mean: encoder {encoder:.3f}, decoder {decoder:.3f} (medians)"
        counts = (int(members.sum()) for members in (self.is_dead, self.is_ultra_low, self.is_normal))
        clusters = ", ".join(f"{n} {name}" for n, name in zip(counts, ("dead", "ultra-low", "normal"), strict=True))
        return [
            f"  L0                  {self.l0:.4g} of {self.n_latents} latents; L1 {self.l1:.4g}",
            f"  FVU                 {self.fvu:.4g} (explained variance {self.explained_variance:.4g})",
            f"  cosine              {self.cosine:.4g}; |y'|/|y| {self.norm_ratio:.4g}; shrinkage {self.shrinkage:.4g}",
            f"  latents             {clusters}{rare}",
            f"  encoder . decoder   {self.encoder_decoder_cosine:.4g} (median cosine of the normal latents)",
        ]


class Sums(NamedTuple):
    """What is known of an SAE's reconstruction of some tokens: everything adds up over batches.

    Args:
        totals: Sums over tokens of the numbers in `PER_TOKEN`, and of what follows from them.
        n_fired: On how many tokens each latent fired.
        target: Moments of what was to be written.
        error: Moments of what is missing.
    """

    totals: dict[str, float]
    n_fired: np.ndarray
    target: Moments
    error: Moments

    def merged(self, other: Sums) -> Sums:
        """Those of both sets of tokens together, `other` being the second."""
        return Sums(
            {name: total + other.totals[name] for name, total in self.totals.items()},
            self.n_fired + other.n_fired,
            self.target.merged(other.target),
            self.error.merged(other.error),
        )


class Measured(NamedTuple):
    """One batch on the device: `[token]` numbers, `[latent]` counts, and mean and square of targets and errors."""

    per_token: dict[str, jax.Array]
    n_fired: jax.Array
    target: tuple[jax.Array, jax.Array]
    error: tuple[jax.Array, jax.Array]


def measure_reconstruction(sae: SparseCoder, x: Any, y: Any | None = None, *, batch_size: int = 4096) -> Reconstruction:
    """Measure an SAE on activations.

    Args:
        sae: The SAE.
        x: Activations of the site it reads, `[..., d_in]`.
        y: Activations of the site it writes, `[..., d_out]`; None for the same.
        batch_size: Tokens that go to the device at once.

    Returns:
        The measures.

    Raises:
        ShapeError: Activations of another width, or not as many of one site as of the other.
        InvalidInputError: There are none, or some are not finite.
    """
    where = "measure_reconstruction"
    read = np.asarray(x)
    written = read if y is None else np.asarray(y)
    is_float = all(jnp.issubdtype(part.dtype, jnp.floating) for part in (read, written))
    widths = read.shape[-1:] + written.shape[-1:]
    if not is_float or widths != (sae.d_in, sae.d_out) or read.shape[:-1] != written.shape[:-1]:
        given = " and ".join(f"{part.dtype}{list(part.shape)}" for part in (read, written))
        raise ShapeError(
            four_part(
                f"Activations and targets of {given} were given",
                where=where,
                expected=f"floats, [..., {sae.d_in}] and [..., {sae.d_out}], as many of the one as of the other.",
                fix="give activations of the sites the SAE reads and writes; a transcoder needs both.",
            )
        )
    read, written = read.reshape(-1, sae.d_in), written.reshape(-1, sae.d_out)
    check_counts(len(read), where=where)
    if batch_size < 1:
        raise InvalidInputError(
            four_part(f"batch_size={batch_size} was given", where=where, expected="1 or more.", fix="choose 4096.")
        )
    batch_size = min(batch_size, len(read))
    sums = None
    for start in range(0, len(read), batch_size):
        # The last batch is filled up, so that all have one shape.
        rows = np.minimum(np.arange(start, start + batch_size), len(read) - 1)
        is_new = np.arange(start, start + batch_size) < len(read)
        new = fetched(reconstruct(sae, read[rows], written[rows], is_new)[1], is_new)
        sums = new if sums is None else sums.merged(new)
    assert sums is not None
    return summary(sae, sums, where=where)


def reconstruct(sae: SparseCoder, x: Any, y: Any, counted: Any) -> tuple[jax.Array, Measured]:
    """The reconstruction of activations, and its measures.

    Args:
        sae: The SAE.
        x: What is read, `[..., d_in]`.
        y: What was to be written, `[..., d_out]`.
        counted: Which tokens are measured, bool `[...]`; the others may hold anything.

    Returns:
        The reconstruction, float32 `[..., d_out]`, and the measures of each token counted.
    """
    # Sites are no part of the program: it serves the SAEs of all layers.
    return _reconstruct(sae.unplaced(), x, y, counted)


def _reconstruct_in_chunks(
    sae: SparseCoder, x: jax.Array, y: jax.Array, counted: jax.Array
) -> tuple[jax.Array, Measured]:
    shape, counted = y.shape, counted.reshape(-1)
    x = jnp.where(counted[:, None], x.reshape(-1, sae.d_in).astype(jnp.float32), 0.0)
    y = jnp.where(counted[:, None], y.reshape(-1, sae.d_out).astype(jnp.float32), 0.0)
    norms = jnp.linalg.norm(sae.W_dec.astype(jnp.float32), axis=1)
    n_rows = min(len(x), max(1, _LATENT_BYTES // (4 * sae.n_latents)))

    def chunk(rows: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        x, y, counted = rows
        latents = sae.encode(x)
        decoded = sae.decode(latents, x)
        is_active = (latents != 0) & counted[:, None]
        per_token = {
            "l0": is_active.sum(axis=1).astype(jnp.float32),
            "l1": jnp.abs(latents).sum(axis=1),
            "l1_weighted": jnp.abs(latents) @ norms,
            "y_y": jnp.square(y).sum(axis=1),
            "d_d": jnp.square(decoded).sum(axis=1),
            "y_d": (y * decoded).sum(axis=1),
            "e_e": jnp.square(y - decoded).sum(axis=1),
        }
        return decoded, is_active.sum(axis=0, dtype=jnp.int32), per_token

    n_missing = -len(x) % n_rows
    chunks = tuple(
        jnp.pad(part, ((0, n_missing), *[(0, 0)] * (part.ndim - 1))).reshape(-1, n_rows, *part.shape[1:])
        for part in (x, y, counted)
    )
    decoded, n_fired, per_token = lax.map(chunk, chunks)
    decoded = decoded.reshape(-1, sae.d_out)[: len(x)]
    per_token = {name: values.reshape(-1)[: len(x)] for name, values in per_token.items()}
    moments = batch_moments(y, counted), batch_moments(y - decoded, counted)
    return decoded.reshape(*shape[:-1], sae.d_out), Measured(per_token, n_fired.sum(axis=0), *moments)


_reconstruct = counted_jit(_reconstruct_in_chunks, name="sae.reconstruct")


def fetched(measured: Measured, counted: np.ndarray) -> Sums:
    """The sums of one batch on the host, in float64.

    Args:
        measured: What `reconstruct` returned.
        counted: Which tokens are measured, bool `[token]`.

    Returns:
        The sums.
    """
    values = {name: np.asarray(part, np.float64)[counted] for name, part in measured.per_token.items()}
    lengths = np.sqrt(values["y_y"] * values["d_d"])
    has_length = values["y_y"] > 0
    totals = {name: float(part.sum()) for name, part in values.items()}
    totals["cosine"] = float((values["y_d"] / np.where(lengths > 0, lengths, 1.0)).sum())
    ratios = values["d_d"][has_length] / values["y_y"][has_length]
    totals["norm_ratio"], totals["n_with_length"] = float(np.sqrt(ratios).sum()), float(has_length.sum())
    n = float(counted.sum())
    moments = [Moments(n, np.asarray(mean, np.float64), float(square)) for mean, square in measured[2:]]
    return Sums(totals, np.asarray(measured.n_fired, np.int64), *moments)


def summary(sae: SparseCoder, sums: Sums, *, where: str) -> Reconstruction:
    """The measures that sums over all tokens make.

    Args:
        sae: The SAE.
        sums: The sums.
        where: The public call, for error messages.

    Returns:
        The measures.

    Raises:
        InvalidInputError: There were no tokens, or activations that are not finite.
    """
    n, totals = int(sums.target.n), sums.totals
    check_counts(n, where=where)
    if not np.isfinite([*totals.values(), sums.target.square]).all():
        which = "activations" if not np.isfinite(totals["y_y"]) else "reconstructions"
        raise InvalidInputError(
            four_part(
                f"{which[0].upper()}{which[1:]} that are not finite (or whose square is not) were met",
                where=where,
                expected=f"finite {which} on every token that counts.",
                fix="look at the model's dtype, at the SAE's weights and at the scaling of its input.",
            )
        )
    variance = variance_of(sums.target.square, totals["y_y"])
    result = Reconstruction(
        n_tokens=n,
        l0=totals["l0"] / n,
        l1=totals["l1"] / n,
        l1_weighted=totals["l1_weighted"] / n,
        squared_error=totals["e_e"] / n,
        fvu=_ratio(totals["e_e"], variance),
        error_variance=_ratio(sums.error.square, variance),
        cosine=totals["cosine"] / n,
        norm_ratio=_ratio(totals["norm_ratio"], totals["n_with_length"]),
        shrinkage=_ratio(totals["d_d"], totals["y_d"]),
        encoder_decoder_cosine=float("nan"),
        n_fired=sums.n_fired,
        rare_encoder_cosines=np.zeros(0),
        rare_decoder_cosines=np.zeros(0),
        read=sae.read,
        write=sae.write if sae.write is not None else sae.read,
    )
    rare, normal = result.is_ultra_low, result.is_normal
    is_comparable = sae.d_in == sae.d_out and not sae.is_transcoder and normal.any()
    return replace(
        result,
        encoder_decoder_cosine=float(np.median(encoder_decoder_cosines(sae)[normal]))
        if is_comparable
        else float("nan"),
        rare_encoder_cosines=cluster_cosines(np.asarray(sae.W_enc).T, rare),
        rare_decoder_cosines=cluster_cosines(np.asarray(sae.W_dec), rare),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole != 0 else float("nan")
