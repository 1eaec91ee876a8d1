"""What it costs a model's predictions to have something else at a site: held-out text, ablations, losses.

One text, cut into batches of one size, is predicted by passes that differ in what stands at some sites. All losses are
means over the same targets, in nats per token; what comes before a site runs once per batch.

    loss recovered   (L_ablated - L_spliced) / (L_ablated - L_clean)       once with zeros, once with means

>>> loss_recovered({"clean": 3.0, "zero": 8.0}, 3.5, "zero", where="here")
0.9
>>> loss_recovered({"clean": 3.0, "mean": 3.00005}, 3.5, "mean", where="here")
nan

Sharp edges: zero and mean ablation differ a lot, and neither is comparable across sites. A target is a token that is no
padding and follows one; all count, whatever is left untouched.

Source: Bricken et al. 2023 (loss recovered, zero).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from interp_jax.core.errors import InvalidInputError, UnknownNameError, check_choice, check_number, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.metrics import divergence
from interp_jax.forward.moments import check_counts
from interp_jax.forward.splicing import Replacement, blend, untouched
from interp_jax.models.upstream import PAD
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

ABLATIONS = ("zero", "mean")
# Where ablation changes the loss by less (nats), the share of it that is recovered means nothing.
LOSS_TOLERANCE = 1e-4
# What the logits of a batch may take; those of two passes are held at a time.
_LOGIT_BYTES = 2**28


class Batch(NamedTuple):
    """Some sequences, all `[batch, pos]`.

    Args:
        tokens: Token ids.
        is_touched: Which of them are replaced and measured.
        has_target: Which are followed by a token of the same sequence.
    """

    tokens: np.ndarray
    is_touched: np.ndarray
    has_target: np.ndarray


class HeldOut(NamedTuple):
    """A text to measure on, as `held_out` made it.

    Args:
        tokens: Token ids `[sequence, pos]`, or what gives them by slices.
        untouched_tokens: Ids at whose positions nothing is replaced or measured.
        n_untouched: At how many tokens at the start of each sequence likewise.
        batch_size: Sequences that are read at once.
        progress: Whether to show progress bars.
        where: The public call, for error messages.
    """

    tokens: Any
    untouched_tokens: tuple[int, ...]
    n_untouched: int
    batch_size: int
    progress: bool
    where: str

    def batches(self, lm: LanguageModel, doing: str) -> Iterator[Batch]:
        """The sequences in batches of one size; the last one is filled up with copies that do not count.

        Args:
            lm: The model.
            doing: What the progress bar says.

        Returns:
            An iterator of batches.
        """
        size, n = self.batch_size, len(self.tokens)
        with tqdm(total=n, desc=doing, unit="seq", disable=None if self.progress else True, leave=False) as bar:
            for start in range(0, n, size):
                rows = np.asarray(lm.check_tokens(self.tokens[start : start + size], where=self.where))
                n_new = len(rows)
                rows = rows[np.minimum(np.arange(size), n_new - 1)]
                is_new = (np.arange(size) < n_new)[:, None]
                skipped = untouched(rows, tokens=self.untouched_tokens, n_first=self.n_untouched)
                following = np.concatenate([rows[:, 1:], np.full((size, 1), PAD, np.int32)], axis=1)
                yield Batch(rows, ~skipped & is_new, (rows >= 0) & (following >= 0) & is_new)
                bar.update(n_new)


def held_out(
    lm: LanguageModel,
    tokens: Any,
    *,
    where: str,
    untouched_tokens: Iterable[int] = (),
    n_untouched: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> tuple[HeldOut, np.ndarray]:
    """A text to measure on, once it is known to be one.

    Args:
        lm: The model.
        tokens: Token ids `[sequence, pos]`, padding is -1; or what gives them by slices and has a length.
        where: The public call, for error messages.
        untouched_tokens: Ids of tokens, such as BOS, at whose positions nothing is replaced or measured.
        n_untouched: At how many tokens at the start of each sequence likewise.
        batch_size: Sequences that are read at once; by default as many as the memory for their logits allows.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The text, and its first sequence `[1, pos]`.

    Raises:
        InvalidInputError: No tokens, a sequence of padding, or a batch size below 1.
    """
    if not hasattr(tokens, "__getitem__") or isinstance(tokens, list | tuple | str | np.ndarray | jax.Array):
        tokens = np.asarray(lm.check_tokens(tokens, where=where))
    first = np.asarray(lm.check_tokens(tokens[:1], where=where))
    if batch_size is not None:
        check_number(batch_size, what="batch_size", where=where, is_whole=True, at_least=1)
    if isinstance(untouched_tokens, str) or not isinstance(untouched_tokens, Iterable):
        raise InvalidInputError(
            four_part(
                f"untouched_tokens = {untouched_tokens!r:.60} was given",
                where=where,
                expected="ids of tokens, in a tuple.",
                fix="give ids such as (0,), or packed.rule.special_tokens.",
            )
        )
    size = min(batch_size or _rows_that_fit(lm, first), len(tokens))
    return HeldOut(tokens, tuple(untouched_tokens), n_untouched, size, progress, where), first


def _rows_that_fit(lm: LanguageModel, first: np.ndarray) -> int:
    """A power of two, so that texts of many lengths share one program."""
    logits = jax.eval_shape(lm.forward, lm.params, jax.ShapeDtypeStruct(first.shape, jnp.int32))
    rows, per_row = 1, logits.size * 4
    while rows < 64 and 2 * rows * per_row <= _LOGIT_BYTES:
        rows *= 2
    return rows


def check_ablations(ablations: Sequence[str], *, where: str) -> tuple[str, ...]:
    """The ablations in the order of `ABLATIONS`, once all are known.

    Args:
        ablations: Names.
        where: The public call, for error messages.

    Returns:
        The names.

    Raises:
        UnknownNameError: There is no such ablation.
    """
    for name in ablations:
        check_choice(name, ABLATIONS, what="ablation", where=where)
    return tuple(name for name in ABLATIONS if name in ablations)


def check_targets(n_targets: int, text: HeldOut) -> None:
    """Raise `InvalidInputError` if a `text` has no token to predict, of `n_targets`."""
    if n_targets == 0:
        raise InvalidInputError(
            four_part(
                f"{len(text.tokens)} sequences without a target were given",
                where=text.where,
                expected="sequences of two tokens or more: a token's prediction is judged by the next one.",
                fix="give longer sequences.",
            )
        )


def site_means(lm: LanguageModel, sites: Sequence[Site], text: HeldOut) -> list[np.ndarray]:
    """The mean of what is at each site, over all positions that count.

    Args:
        lm: The model.
        sites: The sites.
        text: The text.

    Returns:
        float32 `[d]` for each.

    Raises:
        InvalidInputError: No position counts.
    """
    totals: list[Any] = [0.0] * len(sites)
    n = 0
    for batch in text.batches(lm, "site means"):
        values, n_new = lm.reap(batch.tokens, list(sites)), int(batch.is_touched.sum())
        means = [np.asarray(_mean(values[site], batch.is_touched), np.float64) for site in sites]
        totals = [total + mean * n_new for total, mean in zip(totals, means, strict=True)]
        n += n_new
    check_counts(n, where=text.where)
    return [(total / n).astype(np.float32) for total in totals]


def ablated(name: str, means: Sequence[np.ndarray] | None, batch: Batch) -> Replacement:
    """The replacement of what is at the sites by zeros or by their means.

    Args:
        name: "zero" or "mean".
        means: What `site_means` gave, `[d]` for each site; not needed for "zero".
        batch: The batch, whose untouched positions stay.

    Returns:
        The replacement.
    """

    def replace(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        del x
        there = np.zeros(y.shape[-1:], np.float32) if means is None or name == "zero" else means[number]
        return blend(y, there[None, None], None, batch.is_touched)

    return replace


def _mean_of_counted(values: Any, counted: Any) -> jax.Array:
    flat = values.reshape(*counted.shape, -1).astype(jnp.float32)
    n = jnp.maximum(counted.sum(), 1).astype(jnp.float32)
    return jnp.where(counted[..., None], flat, 0.0).sum(axis=(0, 1)) / n


_mean = counted_jit(_mean_of_counted, name="spliced.site_mean")


def loss_sums(passes: Iterable[jax.Array], batch: Batch) -> np.ndarray:
    """Cross-entropy with the targets and KL(first pass || pass), summed over the targets of a batch.

    Args:
        passes: Logits `[batch, pos, d_vocab]` of each pass, the clean one first; two are held at a time.
        batch: The batch.

    Returns:
        float64 `[2, pass]`.
    """
    targets = np.where(batch.has_target, np.roll(batch.tokens, -1, axis=1), 0)
    reference, parts = None, []
    for logits in passes:
        # The clean pass too is compared with the clean pass: one program, so equal logits have equal losses.
        reference = logits if reference is None else reference
        parts.append(_losses(logits, reference, targets))
    return np.array([[np.asarray(one, np.float64)[batch.has_target].sum() for one in part] for part in parts]).T


def _losses_of_rows(logits: Any, reference: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy with the targets, and KL(reference || prediction), `[batch, pos]`; one row's at a time."""

    def of_row(row: tuple[Any, Any, Any]) -> tuple[jax.Array, jax.Array]:
        log_p, log_reference = (jax.nn.log_softmax(part.astype(jnp.float32)) for part in row[:2])
        return -jnp.take_along_axis(log_p, row[2][:, None], axis=-1)[:, 0], divergence(log_reference, log_p)

    return lax.map(of_row, (logits, reference, targets))


_losses = counted_jit(_losses_of_rows, name="spliced.losses")


def is_recoverable(losses: Mapping[str, float], ablation: str, *, where: str) -> bool:
    """Whether an ablation changes the loss by `LOSS_TOLERANCE` or more.

    Args:
        losses: Mean losses by name: "clean", and of ablations.
        ablation: Which one.
        where: The public call, for error messages.

    Returns:
        Whether it does.

    Raises:
        UnknownNameError: This ablation was not run.
    """
    if ablation not in ABLATIONS or ablation not in losses:
        raise UnknownNameError(
            four_part(
                f"The ablation {ablation!r} was asked for",
                where=where,
                names=[name for name in ABLATIONS if name in losses],
                given=ablation,
                fix='run it: ablations=("zero", "mean").',
            )
        )
    return abs(losses[ablation] - losses["clean"]) >= LOSS_TOLERANCE


def loss_recovered(losses: Mapping[str, float], spliced: Any, ablation: str, *, where: str) -> Any:
    """The share of an ablation's damage that is avoided.

    (L_ablated - L_spliced) / (L_ablated - L_clean)

    Args:
        losses: Mean losses by name: "clean", and of ablations.
        spliced: The mean loss, or several.
        ablation: "zero" or "mean".
        where: The public call, for error messages.

    Returns:
        The share, not clipped; NaN where `is_recoverable` says no.

    Raises:
        UnknownNameError: This ablation was not run.
    """
    if not is_recoverable(losses, ablation, where=where):
        return spliced * float("nan")
    return (losses[ablation] - spliced) / (losses[ablation] - losses["clean"])
