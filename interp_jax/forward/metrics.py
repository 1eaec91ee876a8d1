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
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part

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
    _check_in_range(positive, negative, position, logits.shape)
    at_position = logits[:, position].astype(jnp.float32)
    rows = jnp.arange(at_position.shape[0])
    batch = at_position.shape[:1]
    return at_position[rows, jnp.broadcast_to(positive, batch)] - at_position[rows, jnp.broadcast_to(negative, batch)]


def column_read(metric: Metric, n_pos: int) -> tuple[int, Partial] | None:
    """The one position whose logits a metric reads, and the metric of that column alone; None if that is not known.

    Args:
        metric: A metric; of those made in this module it is known.
        n_pos: Length of the prompts.

    Returns:
        The position, from 0, and a function from logits `[batch, 1, d_vocab]` to `[batch]`; or None.

    Raises:
        InvalidInputError: The position is out of range.
    """
    if not (isinstance(metric, Partial) and metric.func is _difference):
        return None
    positive, negative, position = metric.args
    column = int(position) + (n_pos if position < 0 else 0)
    if not 0 <= column < n_pos:
        raise InvalidInputError(
            four_part(
                f"A metric of position {int(position)} was given",
                where=f"prompts of {n_pos} tokens",
                expected=f"a position from {-n_pos} to {n_pos - 1}.",
                fix="make the metric with position=-1, the last token of every row.",
            )
        )
    return column, Partial(_difference, positive, negative, jnp.zeros_like(position))


def check_metric_reads(metric: Metric, shape: tuple[int, ...]) -> None:
    """Refuse a metric of this module that reads logits there are none of, before its ids are traced.

    Args:
        metric: Any metric.
        shape: Shape of the logits, `[batch, pos, d_vocab]`.

    Raises:
        InvalidInputError: An id or a position is out of range.
    """
    if isinstance(metric, Partial) and metric.func is _difference:
        positive, negative, position = metric.args
        _check_in_range(positive, negative, position, shape)


def _check_in_range(positive: Any, negative: Any, position: Any, shape: tuple[int, ...]) -> None:
    """Refuse ids and positions the logits do not have, where JAX would read others; traced ones are not known."""
    if any(isinstance(part, Tracer) for part in (positive, negative, position)):
        return
    # NumPy, as under a trace of the caller's JAX would trace these too.
    top = max(int(np.asarray(part).max()) for part in (positive, negative))
    if top >= shape[-1] or not -shape[1] <= int(position) < shape[1]:
        raise InvalidInputError(
            four_part(
                f"Token id {top} at position {int(position)} was asked for",
                where=f"logit_difference of logits {list(shape)}",
                expected=f"ids below {shape[-1]}, and a position from {-shape[1]} to {shape[1] - 1}.",
                fix="take the ids from this model's own lm.tokenize.",
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
