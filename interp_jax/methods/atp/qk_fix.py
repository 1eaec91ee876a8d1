"""The QK fix: what patching one query or one key does to a head, exactly, through the softmax.

Attribution patching takes the softmax of attention to be linear. Where a head is saturated, its derivative is nearly 0
and its response to another query or key is not. Given the gradient g of the metric with respect to the pattern, taken
through the values (g = d metric / d z . v), the response of the pattern is computed in full.

Query at q:   sum_j (p'_j - p_j) g_j          with p' the softmax of the scores with the new query
Key at t:     sum over queries q that see t of the same sum, with p' the softmax with only score (q, t) changed

A changed key moves its whole row. With a = s_t - logsumexp of the other scores of the row, that is

    [sigmoid(a + ds) - sigmoid(a)] (g_t - mean of the other g under the softmax without t),

and prefix and suffix sums give "without t" for every t at once. Written with 1/(1 + u) instead, the effect is lost to
rounding just where the head is saturated.

>>> scores, g = jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.array([[1.0, 0.0, -1.0]])
>>> change = jnp.log(3.0) * jnp.array([[1.0, 0.0, 0.0]])
>>> visible = jnp.ones((1, 3), bool)
>>> round(float(key_effects(scores, g, change, visible)[0, 0]), 4)
0.35

Sharp edges: scores are those the softmax reads, masked ones marked by `visible`. A row with one visible key has no
effect of keys: its pattern is 1 whatever the score.

Source: Kramar et al. 2024 (2403.00745), section 3.1.1; the form without t is our own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Stands for minus infinity, where a difference of two of them must be 0.
_LOWEST = -1e30


def query_effects(scores: Any, g: Any, change: Any, visible: Any) -> jax.Array:
    """The effect of a new query, for each query: its whole row of scores changes.

    Args:
        scores: Attention scores, `[..., query, key]`.
        g: Derivative of the metric with respect to the pattern, same shape.
        change: What the new query adds to each score, same shape.
        visible: Which keys the query can see, same shape.

    Returns:
        Effects, `[..., query]`.
    """
    before, after = (
        jax.nn.softmax(jnp.where(visible, new, _LOWEST), axis=-1)
        for new in (scores, scores + jnp.where(visible, change, 0.0))
    )
    return ((after - before) * jnp.where(visible, g, 0.0)).sum(-1)


def key_effects(scores: Any, g: Any, change: Any, visible: Any) -> jax.Array:
    """The effect of a new key, for each query and key: one score of the row changes.

    Args:
        scores: Attention scores, `[..., query, key]`.
        g: Derivative of the metric with respect to the pattern, same shape.
        change: What the new key adds to its score, same shape.
        visible: Which keys the query can see, same shape.

    Returns:
        Effects, `[..., query, key]`; sum over queries for the effect of the key.
    """
    scores = jnp.where(visible, scores, _LOWEST)
    one = visible.astype(scores.dtype)
    element = (scores, one, one * g)
    axis = scores.ndim - 1
    before = _shifted(lax.associative_scan(_joined, element, axis=axis), 1)
    after = _shifted(lax.associative_scan(_joined, element, axis=axis, reverse=True), -1)
    highest, total, weighted = _joined(before, after)
    has_others = total > 0.0
    total = jnp.where(has_others, total, 1.0)
    logit = scores - highest - jnp.log(total)
    effect = _sigmoid_change(logit, change) * (g - weighted / total)
    return jnp.where(visible & has_others, effect, 0.0)


def _joined(one: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """The highest score, sum of exponentials less it, and the same sum weighted by g, of two runs of keys."""
    highest = jnp.maximum(one[0], other[0])
    scale_one, scale_other = jnp.exp(one[0] - highest), jnp.exp(other[0] - highest)
    return highest, one[1] * scale_one + other[1] * scale_other, one[2] * scale_one + other[2] * scale_other


def _shifted(runs: tuple[Any, Any, Any], by: int) -> tuple[Any, Any, Any]:
    """Runs that end one key earlier (`by` 1) or begin one later (-1)."""

    def shift(part: Any, empty: float) -> Any:
        fill = jnp.full_like(part[..., :1], empty)
        return jnp.concatenate([fill, part[..., :-1]] if by == 1 else [part[..., 1:], fill], axis=-1)

    highest, total, weighted = runs
    return shift(highest, _LOWEST), shift(total, 0.0), shift(weighted, 0.0)


def _sigmoid_change(logit: Any, change: Any) -> Any:
    """sigmoid(logit + change) - sigmoid(logit), to full relative precision at either end."""
    size = -jnp.expm1(-jnp.abs(change))
    up = jax.nn.sigmoid(logit + change) * jax.nn.sigmoid(-logit)
    down = jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit - change)
    return jnp.where(change >= 0.0, up * size, -down * size)
