"""The QK fix against the softmax computed again for every query and key, in float64, saturated or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.methods.atp.qk_fix import key_effects, query_effects


def softmax(scores: np.ndarray, visible: np.ndarray) -> np.ndarray:
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def truth_of_keys(scores: np.ndarray, g: np.ndarray, change: np.ndarray, visible: np.ndarray) -> np.ndarray:
    before, effects = softmax(scores, visible), np.zeros_like(scores)
    for t in range(scores.shape[-1]):
        new = scores.copy()
        new[..., t] += change[..., t]
        effects[..., t] = ((softmax(new, visible) - before) * g).sum(-1) * visible[..., t]
    return effects


def test_the_hand_example() -> None:
    scores, g = jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.array([[1.0, 0.0, -1.0]])
    change = jnp.array([[np.log(3.0), 0.0, 0.0]], jnp.float32)
    visible = jnp.ones((1, 3), bool)
    np.testing.assert_allclose(key_effects(scores, g, change, visible)[0, 0], 0.35, rtol=1e-6)
    np.testing.assert_allclose(query_effects(scores, g, change, visible)[0], 0.35, rtol=1e-6)
    gradient = jax.grad(lambda c: (jax.nn.softmax(scores + c) * g).sum())(jnp.zeros_like(change))
    np.testing.assert_allclose((gradient * change).sum(), 0.3845, atol=5e-5)  # What AtP says.


def test_a_saturated_head() -> None:
    scores, g, visible = jnp.array([[20.0, 0.0]]), jnp.array([[1.0, 0.0]]), jnp.ones((1, 2), bool)
    change = jnp.array([[-20.0, 20.0]])
    np.testing.assert_allclose(query_effects(scores, g, change, visible)[0], -0.9999999959, rtol=1e-6)
    p = np.exp([20.0, 0.0]) / np.exp([20.0, 0.0]).sum()
    first_order = (p * (np.array([1.0, 0.0]) - p[0]) * np.array([-20.0, 20.0])).sum()
    np.testing.assert_allclose(first_order, -8.24e-8, rtol=1e-2)  # What AtP says.


@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
def test_every_query_and_key_in_single_precision(rng: np.random.Generator, spread: float) -> None:
    shape = (3, 2, 16, 16)
    scores, change = (rng.normal(size=shape).astype(np.float32) * np.float32(spread) for _ in range(2))
    g = rng.normal(size=shape).astype(np.float32)
    visible = np.broadcast_to(np.tril(np.ones(shape[-2:], bool)), shape)
    scores64, g64, change64 = (part.astype(np.float64) for part in (scores, g, change))
    keys = np.asarray(jax.jit(key_effects)(scores, g, change, visible))
    assert np.isfinite(keys).all()
    np.testing.assert_allclose(
        keys, truth_of_keys(scores64, g64, change64, visible), atol=1e-5 if spread < 10 else 1e-4
    )
    assert np.all(keys[..., 0, :] == 0.0)  # One visible key: the pattern is 1 whatever its score.
    assert np.all(keys[~visible] == 0.0)
    queries = np.asarray(jax.jit(query_effects)(scores, g, change, visible))
    after = softmax(scores64 + change64, visible) - softmax(scores64, visible)
    np.testing.assert_allclose(queries, (after * g64).sum(-1), atol=1e-5 if spread < 10 else 1e-4)
