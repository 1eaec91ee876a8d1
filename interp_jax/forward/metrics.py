"""Metrics: functions from logits to one number per row of the batch.

Any such function will do. Those made here carry their token ids as data (`jax.tree_util.Partial`), so that a
program compiled for one pair of answers serves every other pair.

>>> logits = jnp.zeros((1, 3, 5)).at[0, -1, 2].set(4.0)
>>> logit_difference(2, 4)(logits)
Array([4.], dtype=float32)

Sharp edges: position -1 is the last column. `tokenize` pads on the left, so that is the last token of every row.

Source: Wang et al., "Interpretability in the Wild" (2211.00593), for the logit difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

Metric: TypeAlias = Callable[[Any], Any]


def logit_difference(positive: Any, negative: Any, *, position: int = -1) -> Partial:
    """The metric logit(positive) - logit(negative) at one position.

    metric_b = logits[b, position, positive_b] - logits[b, position, negative_b]

    Args:
        positive: Id of the token whose logit counts; one for all rows, or one per row `[batch]`.
        negative: Id of the token to compare with, likewise.
        position: Which position's logits are read; negative counts from the end.

    Returns:
        A function from logits `[batch, pos, d_vocab]` to `[batch]`.

    Raises:
        InvalidInputError: An id is not a non-negative integer, or has the wrong number of axes.

    Source: Wang et al. 2211.00593, section 3.
    """
    ids = [np.asarray(part) for part in (positive, negative)]
    if any(part.ndim > 1 or part.dtype.kind not in "iu" or (part < 0).any() for part in ids):
        raise InvalidInputError(
            four_part(
                f"positive={positive!r}, negative={negative!r} was given",
                where="logit_difference",
                expected="token ids, integers from 0: one for all rows, or one per row.",
                fix='take the ids from lm.tokenize(" Mary"), not the text itself.',
            )
        )
    as_data = [jnp.asarray(part, jnp.int32) for part in (*ids, position)]
    return Partial(_difference, *as_data)


def _difference(positive: Any, negative: Any, position: Any, logits: Any) -> jax.Array:
    _check_in_range((positive, negative), position, logits.shape)
    at_position = logits[:, position].astype(jnp.float32)
    rows = jnp.arange(at_position.shape[0])
    batch = at_position.shape[:1]
    return at_position[rows, jnp.broadcast_to(positive, batch)] - at_position[rows, jnp.broadcast_to(negative, batch)]


def kl_divergence(logits: Any, *, position: int = -1) -> Partial:
    """The metric KL(reference prediction || prediction) at one position, in nats.

    sum over tokens of p (log p - log q), p of the reference logits

    Args:
        logits: The reference's logits, `[batch, pos, d_vocab]`, such as `lm(tokens)`.
        position: Which position's prediction; negative counts from the end.

    Returns:
        A function from logits to `[batch]`; never negative but for rounding.

    Raises:
        InvalidInputError: The reference has no such position.
    """
    logits = jnp.asarray(logits)
    _check_in_range((), position, logits.shape)
    reference = jax.nn.log_softmax(logits[:, position].astype(jnp.float32))
    return Partial(_divergence, reference, jnp.asarray(position, jnp.int32))


def _divergence(reference: Any, position: Any, logits: Any) -> jax.Array:
    _check_in_range((), position, logits.shape)
    return divergence(reference, jax.nn.log_softmax(logits[:, position].astype(jnp.float32)))


def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) in nats over the last axis, from log probabilities.

    KL(p || q) = sum_v p_v (log p_v - log q_v)

    Args:
        log_p: Log probabilities, `[..., d_vocab]`.
        log_q: Log probabilities, `[..., d_vocab]`.

    Returns:
        The divergence, `[...]`. Entries with p = 0 contribute 0.
    """
    return jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def _ids_and_position(metric: Metric) -> tuple[tuple[Any, ...], Any] | None:
    """The token ids and the position a metric made in this module reads; None for any other."""
    if not isinstance(metric, Partial) or metric.func not in (_difference, _divergence):
        return None
    *ids, position = metric.args
    return tuple(ids) if metric.func is _difference else (), position


def column_read(metric: Metric, n_pos: int) -> tuple[int, Partial] | None:
    """The one position whose logits a metric reads, and the metric of that column alone; None if that is not known.

    Args:
        metric: A metric that `prepared` let pass; of those made in this module the position is known.
        n_pos: Length of the prompts.

    Returns:
        The position, from 0, and a function from logits `[batch, 1, d_vocab]` to `[batch]`; or None.
    """
    if (known := _ids_and_position(metric)) is None:
        return None
    assert isinstance(metric, Partial)
    position = known[1]
    return int(position) % n_pos, Partial(metric.func, *metric.args[:-1], jnp.zeros_like(position))


def prepared(metric: Metric, lm: LanguageModel, tokens: Any, *, where: str) -> Partial:
    """A metric as a pytree, so that token ids in it are data of a compiled program, once it can be read.

    What is asked for is compared with the logits here, before anything runs: in a compiled program ids and positions
    are no longer known, and JAX reads the nearest ones there are.

    Args:
        metric: The metric.
        lm: The model whose logits it is to read.
        tokens: The tokens, `[batch, pos]`.
        where: The public call, for the error message.

    Returns:
        The metric.

    Raises:
        InvalidInputError: It is no function, or reads a token or a position that is not there.
        ShapeError: It has token ids for another number of rows.
    """
    check_metric(metric, where=where)
    if (known := _ids_and_position(metric)) is not None:
        d_vocab = _d_vocab(lm, tokens) if lm.config is None else lm.config.d_vocab
        _check_in_range(*known, (*np.shape(tokens), d_vocab))
    return metric if isinstance(metric, Partial) else Partial(metric)


def _d_vocab(lm: LanguageModel, tokens: Any) -> int:
    """The number of logits of a model that does not say it; nothing is computed."""
    return jax.eval_shape(lm.forward, lm.params, jax.ShapeDtypeStruct(np.shape(tokens), jnp.int32)).shape[-1]


def _check_in_range(ids: tuple[Any, ...], position: Any, shape: tuple[int, ...]) -> None:
    """Refuse ids and positions the logits do not have, where JAX would read others; traced ones are not known."""
    where = f"a metric of logits {list(shape)}"
    if wrong := [np.size(part) for part in ids if np.ndim(part) and np.size(part) not in (1, shape[0])]:
        raise ShapeError(
            four_part(
                f"{wrong[0]} token ids were given",
                where=where,
                expected=f"one id for all rows, or one per row of the batch, {shape[0]}.",
                fix="give as many ids as prompts.",
            )
        )
    if any(isinstance(part, Tracer) for part in (*ids, position)):
        return
    # NumPy, as under a trace of the caller's JAX would trace these too.
    top = max((int(np.asarray(part).max()) for part in ids), default=0)
    if top >= shape[-1] or not -shape[1] <= int(position) < shape[1]:
        asked = f"Token id {top} at position" if ids else "Position"
        raise InvalidInputError(
            four_part(
                f"{asked} {int(position)} was asked for",
                where=where,
                expected=f"ids below {shape[-1]}, and a position from {-shape[1]} to {shape[1] - 1}.",
                fix="take the ids from this model's own lm.tokenize; position=-1 is the last token of every row.",
            )
        )


def check_metric(metric: Any, *, where: str) -> None:
    """Refuse what is no metric.

    Args:
        metric: What was given.
        where: The public call, for the error message.

    Raises:
        InvalidInputError: It cannot be called.
    """
    if not callable(metric):
        raise InvalidInputError(
            four_part(
                f"{metric!r:.60} ({type(metric).__name__}) was given as the metric",
                where=where,
                expected="a function from logits [batch, pos, d_vocab] to [batch].",
                fix="use logit_difference(answer, other), or a function of your own.",
            )
        )


def check_metric_value(value: Any, *, batch: int, where: str) -> Any:
    """The metric's value, once it is known to be one float per row of the batch.

    Args:
        value: What the metric returned.
        batch: Rows of the batch.
        where: The public call, for the error message.

    Returns:
        The value.

    Raises:
        ShapeError: It is not a float array `[batch]`.
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape != (batch,) or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        given = type(value).__name__ if shape is None or dtype is None else f"{dtype}{list(shape)}"
        raise ShapeError(
            four_part(
                f"The metric returned {given}",
                where=where,
                expected=f"one float per row of the batch, float[{batch}].",
                fix="let the metric reduce logits [batch, pos, d_vocab] to [batch], for example logits[:, -1, token].",
            )
        )
    return value


def metric_values(metric: Metric, logits: Any, *, where: str) -> Any:
    """A `metric` of `logits` in float32, `[batch]`, once it has that form; `where` names the caller in errors."""
    return check_metric_value(metric(logits), batch=logits.shape[0], where=where).astype(jnp.float32)


def finite(values: Any, *, what: str = "The metric", where: str) -> np.ndarray:
    """Numbers, once they are known to be finite.

    Args:
        values: The numbers.
        what: What they are, for the error message.
        where: The public call, likewise.

    Returns:
        The numbers.

    Raises:
        InvalidInputError: One of them is infinite or NaN.
    """
    values = np.asarray(values)
    if not (is_finite := np.isfinite(values)).all():
        raise InvalidInputError(
            four_part(
                f"{what} is {values[~is_finite][0]} ({(~is_finite).sum()} of {values.size} numbers are not finite)",
                where=where,
                expected="a metric that is finite, and has a finite derivative, in every pass.",
                fix="guard the metric's logarithms and divisions; look at the prompts and at the model's dtype.",
            )
        )
    return values
