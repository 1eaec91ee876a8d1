"""Evaluation: what an SAE leaves of the activations, and what of the model's predictions, on held-out text.

The sites an SAE writes are replaced at all positions by its reconstruction, by zeros, and by the mean of the same
positions of the same text. All losses are means over the same targets, in nats per token:

    loss recovered   (L_ablated - L_spliced) / (L_ablated - L_clean)       once with zeros, once with means
    delta            L_spliced - L_clean
    KL               KL(clean prediction || spliced prediction)

    evaluation = evaluate_sae(lm, sae, tokens)          # prints as a table
    evaluation.loss_recovered("mean"), evaluation.reconstruction.l0

>>> from dataclasses import replace
>>> losses = {"clean": 3.0, "spliced": 3.5, "zero": 8.0, "mean": 3.00005}
>>> evaluation = SAEEvaluation((), losses, {}, n_targets=100, n_sequences=10)
>>> evaluation.loss_recovered("zero"), evaluation.loss_recovered("mean"), evaluation.delta_loss
(0.9, nan, 0.5)

Sharp edges: zero and mean ablation differ a lot, and neither is comparable across sites: deep in a residual stream
prefer `delta_loss`. Loss recovered is not clipped, and NaN where ablation costs less than `LOSS_TOLERANCE`. A target is
a token that is no padding and follows one; all count, whatever is left untouched. Several SAEs are spliced at once.

Source: Bricken et al. 2023 (loss recovered, zero); Rajamanoharan et al. 2024 (2404.16014) for its use as a frontier.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from interp_jax.core.errors import InvalidInputError, UnknownNameError, four_part
from interp_jax.forward.metrics import divergence, finite
from interp_jax.methods.sae.reconstruction import Reconstruction, Sums, check_counts, fetched, reconstruct, summary
from interp_jax.methods.sae.sae import SAE
from interp_jax.methods.sae.splicing import Replacement, Splice, blend, checked_splice, spliced_passes, untouched
from interp_jax.models.upstream import PAD
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

ABLATIONS = ("zero", "mean")
# Where ablation changes the loss by less (nats), the share of it that is recovered means nothing.
LOSS_TOLERANCE = 1e-4
# What the logits of a batch may take; those of two passes are held at a time.
_LOGIT_BYTES = 2**28


@dataclass(frozen=True, repr=False)
class SAEEvaluation:
    """How SAEs do on a text.

    Args:
        reconstructions: What each SAE makes of its activations in the clean pass.
        losses: Mean cross-entropy in nats per target: "clean", "spliced", and of the ablations "zero" and "mean".
        kl: Mean KL(clean prediction || prediction) in nats per target: "spliced", "zero", "mean".
        n_targets: How many targets the means are over.
        n_sequences: How many sequences were read.
        keep_error: Whether the SAEs' errors were added back.
    """

    reconstructions: tuple[Reconstruction, ...]
    losses: dict[str, float]
    kl: dict[str, float]
    n_targets: int
    n_sequences: int
    keep_error: bool = False

    @property
    def reconstruction(self) -> Reconstruction:
        """What the SAE makes of its activations.

        Raises:
            InvalidInputError: Several SAEs were evaluated.
        """
        if len(self.reconstructions) != 1:
            raise InvalidInputError(
                four_part(
                    f"The reconstruction of {len(self.reconstructions)} SAEs was asked for",
                    where="SAEEvaluation.reconstruction",
                    expected="an evaluation of one SAE.",
                    fix="use reconstructions, in the order the SAEs were given in.",
                )
            )
        return self.reconstructions[0]

    @property
    def delta_loss(self) -> float:
        """Loss with the SAEs less the loss without, in nats per target."""
        return self.losses["spliced"] - self.losses["clean"]

    def loss_recovered(self, ablation: str = "zero") -> float:
        """The share of an ablation's damage that the SAEs avoid.

        (L_ablated - L_spliced) / (L_ablated - L_clean)

        Args:
            ablation: "zero" or "mean".

        Returns:
            The share, not clipped; NaN where `is_recoverable` says no.

        Raises:
            UnknownNameError: This ablation was not run.
        """
        if not self.is_recoverable(ablation):
            return float("nan")
        ablated = self.losses[ablation]
        return (ablated - self.losses["spliced"]) / (ablated - self.losses["clean"])

    def is_recoverable(self, ablation: str = "zero") -> bool:
        """Whether an `ablation` changes the loss by `LOSS_TOLERANCE` or more."""
        if ablation not in ABLATIONS or ablation not in self.losses:
            raise UnknownNameError(
                four_part(
                    f"The ablation {ablation!r} was asked for",
                    where="SAEEvaluation",
                    names=[name for name in ABLATIONS if name in self.losses],
                    given=ablation,
                    fix='run it: evaluate_sae(..., ablations=("zero", "mean")).',
                )
            )
        return abs(self.losses[ablation] - self.losses["clean"]) >= LOSS_TOLERANCE

    def numbers(self) -> dict[str, float]:
        """All single numbers by name, for a log or a table; those of several SAEs begin with the site they write."""
        found: dict[str, float] = {f"loss_{name}": loss for name, loss in self.losses.items()}
        found |= {f"kl_{name}": kl for name, kl in self.kl.items()} | {"delta_loss": self.delta_loss}
        found |= {f"loss_recovered_{name}": self.loss_recovered(name) for name in ABLATIONS if name in self.losses}
        for part in self.reconstructions:
            prefix = f"{part.write}/" if len(self.reconstructions) > 1 else ""
            found |= {f"{prefix}{name}": number for name, number in part.numbers().items()}
        return found

    def __repr__(self) -> str:
        error = ", errors kept" if self.keep_error else ""
        lines = [f"SAEEvaluation({self.n_sequences} sequences, {self.n_targets:,} targets{error})"]
        lines.append("  loss (nats)         " + ", ".join(f"{name} {x:.4f}" for name, x in self.losses.items()))
        lines.append(f"  delta loss          {self.delta_loss:+.4f}")
        if self.kl:
            lines.append("  KL(clean || .)      " + ", ".join(f"{name} {x:.4g}" for name, x in self.kl.items()))
        recovered = [
            f"{self.loss_recovered(name):.4f} ({name})"
            if self.is_recoverable(name)
            else f"n/a ({name}: ablation changes the loss by less than {LOSS_TOLERANCE})"
            for name in ABLATIONS
            if name in self.losses
        ]
        lines += ["  loss recovered      " + ", ".join(recovered)] if recovered else []
        for part in self.reconstructions:
            lines += repr(part).splitlines()[: 1 if len(self.reconstructions) > 1 else 0] + part.lines()
        return "\n".join(lines)


class _Batch(NamedTuple):
    """Some sequences: tokens, which of them are replaced and measured, and which have a target; `[batch, pos]`."""

    tokens: np.ndarray
    is_touched: np.ndarray
    has_target: np.ndarray


class _Settings(NamedTuple):
    """What one evaluation asks for."""

    ablations: tuple[str, ...]
    keep_error: bool
    untouched_tokens: tuple[int, ...]
    n_untouched: int
    batch_size: int
    progress: bool


def evaluate_sae(
    lm: LanguageModel,
    saes: SAE | Sequence[SAE],
    tokens: Any,
    *,
    ablations: Sequence[str] = ABLATIONS,
    keep_error: bool = False,
    untouched_tokens: Iterable[int] = (),
    n_untouched: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> SAEEvaluation:
    """Measure SAEs on held-out text: their reconstructions, and the model's losses with them in place.

    Args:
        lm: The model.
        saes: One SAE or several, each with the site it reads (and, of a transcoder, the site it writes); several are
            spliced at once.
        tokens: Token ids `[sequence, pos]`, padding is -1; or what gives them by slices and has a length, such as the
            held-out part of a packed text.
        ablations: Which of "zero" and "mean" to compare with. The mean is over the positions that are replaced, of all
            these tokens, and costs one more pass up to the site.
        keep_error: Whether the SAEs' errors are added back; the spliced pass is then the clean one.
        untouched_tokens: Ids of tokens, such as BOS, at whose positions nothing is replaced or measured.
        n_untouched: At how many tokens at the start of each sequence likewise.
        batch_size: Sequences that are read at once; by default as many as the memory for their logits allows.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The measures.

    Raises:
        InvalidInputError: No tokens, no targets, a sequence of padding, an SAE without a site or that gives numbers
            that are not finite, or two that write one site.
        UnknownNameError: The model has no such site, or there is no such ablation.
        ShapeError: A site has another width.
    """
    where = "evaluate_sae"
    if not hasattr(tokens, "__getitem__") or isinstance(tokens, list | tuple | str | np.ndarray | jax.Array):
        tokens = np.asarray(lm.check_tokens(tokens, where=where))
    first = np.asarray(lm.check_tokens(tokens[:1], where=where))
    splice = checked_splice(lm, saes, first, where=where)
    if unknown := [name for name in ablations if name not in ABLATIONS]:
        raise UnknownNameError(
            four_part(
                f"Unknown ablation {unknown[0]!r}",
                where=where,
                names=ABLATIONS,
                given=unknown[0],
                fix="use one of these.",
            )
        )
    if batch_size is not None and batch_size < 1:
        raise InvalidInputError(
            four_part(f"batch_size={batch_size} was given", where=where, expected="1 or more.", fix="leave it out.")
        )
    settings = _Settings(
        ablations=tuple(name for name in ABLATIONS if name in ablations),
        keep_error=keep_error,
        untouched_tokens=tuple(untouched_tokens),
        n_untouched=n_untouched,
        batch_size=min(batch_size or _rows_that_fit(lm, first), len(tokens)),
        progress=progress,
    )
    means = _site_means(lm, splice, tokens, settings) if "mean" in ablations else None
    sums: list[Sums] | None = None
    n_targets, totals = 0, np.zeros((2, 2 + len(settings.ablations)))
    for batch in _batches(lm, tokens, settings, "evaluate SAE"):
        new, losses = _measured(lm, splice, batch, means, settings)
        sums = new if sums is None else [old.merged(one) for old, one in zip(sums, new, strict=True)]
        n_targets, totals = n_targets + int(batch.has_target.sum()), totals + losses
    if n_targets == 0:
        raise InvalidInputError(
            four_part(
                f"{len(tokens)} sequences without a target were given",
                where=where,
                expected="sequences of two tokens or more: a token's prediction is judged by the next one.",
                fix="give longer sequences.",
            )
        )
    assert sums is not None
    names = ("clean", "spliced", *settings.ablations)
    reconstructions = tuple(summary(sae, one, where=where) for sae, one in zip(splice.saes, sums, strict=True))
    means_of = finite(totals / n_targets, what="A loss", where=where)
    return SAEEvaluation(
        reconstructions=reconstructions,
        losses=dict(zip(names, means_of[0].tolist(), strict=True)),
        kl=dict(zip(names[1:], means_of[1, 1:].tolist(), strict=True)),
        n_targets=n_targets,
        n_sequences=len(tokens),
        keep_error=keep_error,
    )


def _batches(lm: LanguageModel, tokens: Any, settings: _Settings, doing: str) -> Iterator[_Batch]:
    """The sequences in batches of one size; the last one is filled up with copies that do not count."""
    size, n = settings.batch_size, len(tokens)
    with tqdm(total=n, desc=doing, unit="seq", disable=None if settings.progress else True, leave=False) as bar:
        for start in range(0, n, size):
            rows = np.asarray(lm.check_tokens(tokens[start : start + size], where="evaluate_sae"))
            n_new = len(rows)
            rows = rows[np.minimum(np.arange(size), n_new - 1)]
            is_new = (np.arange(size) < n_new)[:, None]
            skipped = untouched(rows, tokens=settings.untouched_tokens, n_first=settings.n_untouched)
            following = np.concatenate([rows[:, 1:], np.full((size, 1), PAD, np.int32)], axis=1)
            yield _Batch(rows, ~skipped & is_new, (rows >= 0) & (following >= 0) & is_new)
            bar.update(n_new)


def _site_means(lm: LanguageModel, splice: Splice, tokens: Any, settings: _Settings) -> list[np.ndarray]:
    """The mean of what is at each written site, over all positions that count, float32 `[d_out]` each."""
    totals = [np.zeros(sae.d_out) for sae in splice.saes]
    n = 0
    for batch in _batches(lm, tokens, settings, "site means"):
        values = lm.reap(batch.tokens, splice.writes)
        for total, site in zip(totals, splice.writes, strict=True):
            total += np.asarray(_mean(values[site], batch.is_touched), np.float64) * batch.is_touched.sum()
        n += int(batch.is_touched.sum())
    check_counts(n, where="evaluate_sae")
    return [(total / n).astype(np.float32) for total in totals]


def _mean_of_counted(values: Any, counted: Any) -> jax.Array:
    flat = values.reshape(*counted.shape, -1).astype(jnp.float32)
    n = jnp.maximum(counted.sum(), 1).astype(jnp.float32)
    return jnp.where(counted[..., None], flat, 0.0).sum(axis=(0, 1)) / n


_mean = counted_jit(_mean_of_counted, name="sae.site_mean")


def _measured(
    lm: LanguageModel, splice: Splice, batch: _Batch, means: list[np.ndarray] | None, settings: _Settings
) -> tuple[list[Sums], np.ndarray]:
    """What a batch adds to the sums of each SAE, and to those of losses and divergences, `[2, pass]`."""
    sums: dict[int, Sums] = {}
    last: dict[int, tuple[Any, Any]] = {}
    measured: dict[int, Any] = {}

    def explained(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        # Passes that share what comes before a site share the value there, and its reconstruction.
        if number not in last or last[number][0] is not x:
            new, of_tokens = reconstruct(splice.saes[number], x, y, batch.is_touched)
            last[number] = x, new
            measured.setdefault(number, of_tokens)
        return last[number][1]

    def clean(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        explained(number, x, y)
        return y

    def spliced(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        new = explained(number, x, y)
        return blend(y, new, new if settings.keep_error else None, batch.is_touched)

    def zero(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        del number, x
        return blend(y, np.zeros(y.shape[-1:], np.float32)[None, None], None, batch.is_touched)

    def mean(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        del x
        assert means is not None
        return blend(y, means[number][None, None], None, batch.is_touched)

    ways: list[Replacement] = [clean, spliced]
    ways += [{"zero": zero, "mean": mean}[name] for name in settings.ablations]
    targets = np.where(batch.has_target, np.roll(batch.tokens, -1, axis=1), 0)
    reference, parts = None, []
    for logits in spliced_passes(lm, splice, batch.tokens, ways):
        # The clean pass too is compared with the clean pass: one program, so equal logits have equal losses.
        reference = logits if reference is None else reference
        parts.append(_losses(logits, reference, targets))
    totals = [[np.asarray(one, np.float64)[batch.has_target].sum() for one in part] for part in parts]
    for number, of_tokens in measured.items():
        sums[number] = fetched(of_tokens, batch.is_touched.reshape(-1))
    return [sums[number] for number in range(len(splice.saes))], np.array(totals).T


def _losses_of_rows(logits: Any, reference: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy with the targets, and KL(reference || prediction), `[batch, pos]`; one row's at a time."""

    def of_row(row: tuple[Any, Any, Any]) -> tuple[jax.Array, jax.Array]:
        log_p, log_reference = (jax.nn.log_softmax(part.astype(jnp.float32)) for part in row[:2])
        return -jnp.take_along_axis(log_p, row[2][:, None], axis=-1)[:, 0], divergence(log_reference, log_p)

    return lax.map(of_row, (logits, reference, targets))


_losses = counted_jit(_losses_of_rows, name="sae.losses")


def _rows_that_fit(lm: LanguageModel, first: np.ndarray) -> int:
    """A power of two, so that texts of many lengths share one program."""
    logits = jax.eval_shape(lm.forward, lm.params, jax.ShapeDtypeStruct(first.shape, jnp.int32))
    rows, per_row = 1, logits.size * 4
    while rows < 64 and 2 * rows * per_row <= _LOGIT_BYTES:
        rows *= 2
    return rows
