"""Spliced loss: what steering costs the model on ordinary text, after the steered positions.

The vector is added to the text exactly as to a prompt, and the loss is that of predicting what follows, on text that
somebody else wrote: a model that has collapsed would find its own text easy. What is predicted at a steered position
is not counted, since there the vector speaks for itself: with the last steered position p the first logits that count
are those at p + 1, and their target is token p + 2.

>>> is_steered = np.zeros((1, 10), bool)
>>> is_steered[0, 4:7] = True
>>> np.flatnonzero(counted_targets(is_steered, np.arange(10)[None])[0]).tolist()
[8, 9]

Sharp edges: a vector placed at the back, or everywhere, leaves nothing to count, and is refused. All coefficients and
the unsteered baseline are counted on the same targets, by one compiled program.

Source: interp_jax; Turner et al. 2023 (2308.10248) measure perplexity on text instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.core.interventions import Added
from interp_jax.forward.sweeps import sweep
from interp_jax.methods.steering.steered import Vectors, check_coefficients, placed

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


@dataclass(frozen=True, repr=False)
class SplicedLoss:
    """The loss after the steered positions, by coefficient.

    Args:
        coefficients: `[coefficient]`.
        loss: Mean over the counted targets, in nats per token, `[coefficient]`.
        baseline: The same without steering.
        n_targets: How many targets were counted.
    """

    coefficients: np.ndarray
    loss: np.ndarray
    baseline: float
    n_targets: int

    def __repr__(self) -> str:
        rows = [f"  {c:8.4g}  {loss:.4f}" for c, loss in zip(self.coefficients, self.loss, strict=True)]
        head = f"SplicedLoss: {self.baseline:.4f} nats per token unsteered, over {self.n_targets} targets"
        return "\n".join([head, *rows])


def counted_targets(is_steered: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Which tokens are counted as targets: those from two after the last steered position on.

    Args:
        is_steered: bool `[batch, pos]`.
        tokens: Token ids, `[batch, pos]`.

    Returns:
        bool `[batch, pos]`; never the first token of a row, nor padding.
    """
    n_pos = tokens.shape[1]
    last = np.where(is_steered.any(1), n_pos - 1 - np.argmax(is_steered[:, ::-1], axis=1), -1)
    after_padding = np.pad(tokens[:, :-1] >= 0, ((0, 0), (1, 0)))
    return (np.arange(n_pos) >= last[:, None] + 2) & (tokens >= 0) & after_padding


def spliced_loss(
    lm: LanguageModel,
    tokens: Any,
    vectors: Vectors,
    coefficients: Any,
    *,
    texts_per_pass: int = 8,
    progress: bool = True,
) -> SplicedLoss:
    """The loss on text after the steered positions, for all coefficients in one compiled sweep.

    loss(c) = mean over counted (b, t) of -log p(tokens[b, t] | tokens[b, :t], steered with c)

    Args:
        lm: The model.
        tokens: Ordinary text, token ids `[batch, pos]`; where prompts have a BOS, with a BOS.
        vectors: One steering vector or several, which add up.
        coefficients: What they are multiplied by, `[coefficient]`.
        texts_per_pass: How many texts run side by side.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        The losses, the unsteered baseline on the same targets, and their number.

    Raises:
        InvalidInputError: No target is left to count, a text is shorter than a vector, or a coefficient is not finite.
        UnknownNameError: The model has no such site.
        ShapeError: A vector has another width than its site.
    """
    rows = np.asarray(lm.check_tokens(tokens, where="spliced_loss"))
    wanted = check_coefficients(coefficients, where="spliced_loss", n_axes=1)
    if isinstance(texts_per_pass, bool) or not isinstance(texts_per_pass, int | np.integer) or texts_per_pass < 1:
        raise _refuse(f"texts_per_pass={texts_per_pass!r} was given", "a whole number from 1.", "choose 1 or more.")
    added, is_steered = placed(lm, rows, vectors, where="spliced_loss")
    is_counted = counted_targets(is_steered, rows)
    if not is_counted.any():
        last = int(np.argwhere(is_steered)[:, 1].max())
        raise _refuse(
            f"Texts of {rows.shape[1]} tokens of which the last steered one is number {last}",
            "a token at least two positions after the last steered one.",
            'use longer texts, or place the vector at the "front".',
        )
    with_baseline = np.append(wanted, np.float32(0))
    total = np.zeros(len(with_baseline), np.float64)
    n_side_by_side = min(texts_per_pass, len(rows))
    for start in range(0, len(rows), n_side_by_side):
        # All passes have one shape: the last is filled up with texts of which nothing is counted.
        chosen = np.arange(start, start + n_side_by_side)
        is_there = chosen < len(rows)
        chosen = np.minimum(chosen, len(rows) - 1)
        weights = (is_counted[chosen] & is_there[:, None]).astype(np.float32)
        table = {
            site: Added(np.broadcast_to(part[chosen], (len(with_baseline), *part[chosen].shape)), with_baseline)
            for site, part in added.items()
        }
        metric = Partial(_summed_loss, jnp.asarray(rows[chosen]), jnp.asarray(weights))
        total += sweep(lm, rows[chosen], table, metric, progress=progress).astype(np.float64).sum(1)
    n_targets = int(is_counted.sum())
    loss = total / n_targets
    return SplicedLoss(wanted, loss[:-1], float(loss[-1]), n_targets)


def _summed_loss(tokens: Any, weights: Any, logits: Any) -> jax.Array:
    """The weighted sum of each text's losses; the target at position t is predicted by the logits at t - 1."""
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    targets = jnp.maximum(tokens[:, 1:], 0)
    of_targets = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -(of_targets * weights[:, 1:]).sum(-1)


def _refuse(what: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where="spliced_loss", expected=expected, fix=fix))
