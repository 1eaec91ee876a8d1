"""What the user gives an edge method, checked: prompt pairs, metrics, and the numbers metrics return.

>>> finite([1.0, 2.0], where="here").tolist()
[1.0, 2.0]

Source: interp_jax.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.forward.metrics import Metric, check_metric, check_metric_reads, check_metric_value
from interp_jax.models.upstream import ModelConfig

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


def checked_pair(lm: LanguageModel, tokens: Any, corrupted: Any, *, where: str) -> tuple[jax.Array, jax.Array]:
    """Clean and corrupted tokens, once they are known to be aligned.

    Args:
        lm: The model.
        tokens: Clean token ids, `[batch, pos]`.
        corrupted: Corrupted token ids.
        where: The public call, for the error message.

    Returns:
        Both.

    Raises:
        ShapeError: Their shapes differ.
        InvalidInputError: They are padded at different places.
    """
    pair = tuple(np.asarray(lm.check_tokens(part, where=where)) for part in (tokens, corrupted))
    clean, other = pair
    if clean.shape != other.shape:
        raise ShapeError(
            four_part(
                f"Clean tokens {list(clean.shape)} and corrupted tokens {list(other.shape)} were given",
                where=where,
                expected="prompt pairs of the same number of tokens, position by position.",
                fix="choose corrupted prompts that tokenize to the same length.",
            )
        )
    if rows := np.flatnonzero(((clean < 0) != (other < 0)).any(1)).tolist():
        raise InvalidInputError(
            four_part(
                f"Pairs whose rows {rows} are padded at different places were given",
                where=where,
                expected="clean and corrupted prompts with padding at the same places.",
                fix="choose corrupted prompts that tokenize to the same length, row by row.",
            )
        )
    if rows := np.flatnonzero((clean == other).all(1)).tolist():
        warnings.warn(f"Rows {rows} are the same clean and corrupted ({where}): no edge has an effect.", stacklevel=3)
    return jnp.asarray(clean), jnp.asarray(other)


def prepared(metric: Metric, config: ModelConfig, tokens: Any, *, where: str) -> Partial:
    """A metric as a pytree, so that token ids in it are data of a compiled program.

    Args:
        metric: The metric.
        config: Shape of the model.
        tokens: The tokens it will see the logits of.
        where: The public call, for the error message.

    Returns:
        The metric.

    Raises:
        InvalidInputError: It is no function, or reads a token or position that is not there.
    """
    check_metric(metric, where=where)
    check_metric_reads(metric, (*np.shape(tokens), config.d_vocab))
    return metric if isinstance(metric, Partial) else Partial(metric)


def metric_values(metric: Metric, logits: jax.Array, *, where: str) -> jax.Array:
    """A `metric` of `logits` in float32, `[batch]`, once it has that form; `where` names the caller in errors."""
    return check_metric_value(metric(logits), batch=logits.shape[0], where=where).astype(jnp.float32)


def finite(values: Any, *, where: str) -> np.ndarray:
    """The `values` of a metric, once they are known to be finite; `where` names the caller in errors."""
    values = np.asarray(values)
    if not np.isfinite(values).all():
        raise InvalidInputError(
            four_part(
                f"The metric is {values[~np.isfinite(values)].ravel()[0]} for some pass",
                where=where,
                expected="a metric that is finite for the clean, the corrupted and every patched run.",
                fix="guard its logarithms and divisions.",
            )
        )
    return values
