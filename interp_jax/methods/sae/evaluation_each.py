"""Many SAEs of one site on one text, each by itself: the model's own pass and the ablations are run once for all.

    evaluations = evaluate_each(lm, saes, tokens)    # as [evaluate_sae(lm, sae, tokens) for sae in saes], and faster

For each SAE there is one pass from the site on, instead of four.

>>> evaluate_each.__name__
'evaluate_each'

Sharp edges: all SAEs read one site and write one site. Several spliced into one pass are `evaluate_sae`'s.

Source: Bricken et al. 2023 (loss recovered, zero).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.forward.metrics import finite
from interp_jax.forward.spliced_losses import (
    ABLATIONS,
    Batch,
    ablated,
    check_ablations,
    check_targets,
    held_out,
    loss_sums,
    site_means,
)
from interp_jax.forward.splicing import Replacement, blend, checked_splice, spliced_passes
from interp_jax.methods.sae.evaluation import SAEEvaluation
from interp_jax.methods.sae.reconstruction import Measured, Sums, fetched, reconstruct, summary
from interp_jax.methods.sae.sae import SAE

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


def evaluate_each(
    lm: LanguageModel,
    saes: Sequence[SAE],
    tokens: Any,
    *,
    ablations: Sequence[str] = ABLATIONS,
    untouched_tokens: Iterable[int] = (),
    n_untouched: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[SAEEvaluation]:
    """Measure SAEs of one site on held-out text, each by itself.

    Args:
        lm: The model.
        saes: The SAEs, which all read one site and write one site.
        tokens: Token ids `[sequence, pos]`, padding is -1; or what gives them by slices and has a length.
        ablations: Which of "zero" and "mean" to compare with.
        untouched_tokens: Ids of tokens, such as BOS, at whose positions nothing is replaced or measured.
        n_untouched: At how many tokens at the start of each sequence likewise.
        batch_size: Sequences that are read at once; by default as many as the memory for their logits allows.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The measures of each.

    Raises:
        InvalidInputError: No SAEs, several sites, no tokens or targets, or numbers that are not finite.
        UnknownNameError: The model has no such site, or there is no such ablation.
        ShapeError: A site has another width.
    """
    where = "evaluate_each"
    if not isinstance(saes, Iterable):
        raise InvalidInputError(
            four_part(
                f"{saes!r:.60} was given",
                where=where,
                expected="several SAEs, in a list.",
                fix="give [sae], or use evaluate_sae.",
            )
        )
    text, first = held_out(
        lm,
        tokens,
        where=where,
        untouched_tokens=untouched_tokens,
        n_untouched=n_untouched,
        batch_size=batch_size,
        progress=progress,
    )
    splices = [checked_splice(lm, sae, first, where=where) for sae in saes]
    sites = dict.fromkeys((one.reads[0], one.writes[0]) for one in splices)
    if len(sites) != 1:
        listed = ": " + ", ".join(" -> ".join(map(str, pair)) for pair in sites) if sites else ""
        raise InvalidInputError(
            four_part(
                f"SAEs of {len(sites)} sites were given{listed}",
                where=where,
                expected="SAEs that all read one site and write one site.",
                fix="evaluate those of one site at a time.",
            )
        )
    splice, ablations = splices[0], check_ablations(ablations, where=where)
    means = site_means(lm, splice.writes, text) if "mean" in ablations else None
    sums: list[Sums] | None = None
    n_targets, totals = 0, np.zeros((2, 1 + len(ablations) + len(saes)))
    for batch in text.batches(lm, f"evaluate {len(saes)} SAEs"):
        seen: list[Measured] = []
        ways: list[Replacement] = [_clean, *(ablated(name, means, batch) for name in ablations)]
        ways += [_spliced(sae, batch, seen.append) for sae in saes]
        totals += loss_sums(spliced_passes(lm, splice, batch.tokens, ways), batch)
        n_targets += int(batch.has_target.sum())
        new = [fetched(one, batch.is_touched.reshape(-1)) for one in seen]
        sums = new if sums is None else [old.merged(one) for old, one in zip(sums, new, strict=True)]
    check_targets(n_targets, text)
    assert sums is not None
    losses, kl = finite(totals / n_targets, what="A loss", where=where)
    shared = dict(zip(ablations, zip(losses[1:].tolist(), kl[1:].tolist(), strict=True), strict=False))
    found = []
    for number, (sae, one) in enumerate(zip(saes, sums, strict=True), start=1 + len(ablations)):
        evaluation = SAEEvaluation(
            reconstructions=(summary(sae, one, where=where),),
            losses={"clean": float(losses[0]), "spliced": float(losses[number])}
            | {name: loss for name, (loss, _) in shared.items()},
            kl={"spliced": float(kl[number])} | {name: divergence for name, (_, divergence) in shared.items()},
            n_targets=n_targets,
            n_sequences=len(text.tokens),
        )
        found.append(evaluation)
    return found


def _clean(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
    del number, x
    return y


def _spliced(sae: SAE, batch: Batch, saw: Callable[[Measured], None]) -> Replacement:
    def replace(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        del number
        new, measured = reconstruct(sae, x, y, batch.is_touched)
        saw(measured)
        return blend(y, new, None, batch.is_touched)

    return replace
