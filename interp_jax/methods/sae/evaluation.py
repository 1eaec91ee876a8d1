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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.forward.metrics import finite
from interp_jax.forward.sparse_coder import SparseCoder
from interp_jax.forward.spliced_losses import (
    ABLATIONS,
    LOSS_TOLERANCE,
    Batch,
    ablated,
    check_ablations,
    check_targets,
    held_out,
    is_recoverable,
    loss_recovered,
    loss_sums,
    site_means,
)
from interp_jax.forward.splicing import Replacement, Splice, blend, checked_splice, spliced_passes
from interp_jax.methods.sae.reconstruction import Reconstruction, Sums, fetched, reconstruct, summary

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


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
        return loss_recovered(self.losses, self.losses["spliced"], ablation, where="SAEEvaluation")

    def is_recoverable(self, ablation: str = "zero") -> bool:
        """Whether an `ablation` changes the loss by `LOSS_TOLERANCE` or more."""
        return is_recoverable(self.losses, ablation, where="SAEEvaluation")

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


def evaluate_sae(
    lm: LanguageModel,
    saes: SparseCoder | Sequence[SparseCoder],
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
        saes: One SAE or several, or what stands in an SAE's place (a pursuit over its dictionary, its k largest
            latents), each with the site it reads (and, of a transcoder, the site it writes); several are spliced at
            once.
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
    text, first = held_out(
        lm,
        tokens,
        where=where,
        untouched_tokens=untouched_tokens,
        n_untouched=n_untouched,
        batch_size=batch_size,
        progress=progress,
    )
    splice, ablations = checked_splice(lm, saes, first, where=where), check_ablations(ablations, where=where)
    means = site_means(lm, splice.writes, text) if "mean" in ablations else None
    sums: list[Sums] | None = None
    n_targets, totals = 0, np.zeros((2, 2 + len(ablations)))
    for batch in text.batches(lm, "evaluate SAE"):
        new, losses = _measured(lm, splice, batch, means, ablations, keep_error)
        sums = new if sums is None else [old.merged(one) for old, one in zip(sums, new, strict=True)]
        n_targets, totals = n_targets + int(batch.has_target.sum()), totals + losses
    check_targets(n_targets, text)
    assert sums is not None
    names = ("clean", "spliced", *ablations)
    reconstructions = tuple(summary(coder, one, where=where) for coder, one in zip(splice.coders, sums, strict=True))
    means_of = finite(totals / n_targets, what="A loss", where=where)
    return SAEEvaluation(
        reconstructions=reconstructions,
        losses=dict(zip(names, means_of[0].tolist(), strict=True)),
        kl=dict(zip(names[1:], means_of[1, 1:].tolist(), strict=True)),
        n_targets=n_targets,
        n_sequences=len(text.tokens),
        keep_error=keep_error,
    )


def _measured(
    lm: LanguageModel,
    splice: Splice,
    batch: Batch,
    means: list[np.ndarray] | None,
    ablations: Sequence[str],
    keep_error: bool,
) -> tuple[list[Sums], np.ndarray]:
    """What a batch adds to the sums of each SAE, and to those of losses and divergences, `[2, pass]`."""
    sums: dict[int, Sums] = {}
    last: dict[int, tuple[Any, Any]] = {}
    measured: dict[int, Any] = {}

    def explained(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        # Passes that share what comes before a site share the value there, and its reconstruction.
        if number not in last or last[number][0] is not x:
            new, of_tokens = reconstruct(splice.coders[number], x, y, batch.is_touched)
            last[number] = x, new
            measured.setdefault(number, of_tokens)
        return last[number][1]

    def clean(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        explained(number, x, y)
        return y

    def spliced(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        new = explained(number, x, y)
        return blend(y, new, new if keep_error else None, batch.is_touched)

    ways: list[Replacement] = [clean, spliced, *(ablated(name, means, batch) for name in ablations)]
    totals = loss_sums(spliced_passes(lm, splice, batch.tokens, ways), batch)
    for number, of_tokens in measured.items():
        sums[number] = fetched(of_tokens, batch.is_touched.reshape(-1))
    return [sums[number] for number in range(len(splice.coders))], totals
