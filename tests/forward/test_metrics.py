"""Metrics against their definitions, and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.forward.metrics import column_read, divergence, finite, kl_divergence, logit_difference, prepared


def test_a_logit_difference_reads_its_position_and_its_rows_own_tokens():
    logits = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4) ** 2
    per_row = logit_difference([0, 3], [2, 1], position=1)(jnp.asarray(logits))
    np.testing.assert_array_equal(per_row, [logits[0, 1, 0] - logits[0, 1, 2], logits[1, 1, 3] - logits[1, 1, 1]])
    at_end = logit_difference(1, 2)(jnp.asarray(logits))
    np.testing.assert_array_equal(at_end, logits[:, -1, 1] - logits[:, -1, 2])


def test_the_divergence_is_that_of_the_definition(rng):
    p, q = (rng.normal(size=(2, 3, 5)) for _ in range(2))
    probabilities = [np.exp(x[:, 1]) / np.exp(x[:, 1]).sum(-1, keepdims=True) for x in (p, q)]
    expected = (probabilities[0] * np.log(probabilities[0] / probabilities[1])).sum(-1)
    actual = kl_divergence(jnp.asarray(p, jnp.float32), position=1)(jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_divergence_with_impossible_tokens_is_finite_where_it_should_be():
    certain = jnp.log(jnp.array([1.0, 0.0]))
    even = jnp.log(jnp.array([0.5, 0.5]))
    assert float(divergence(certain, even)) == pytest.approx(np.log(2))
    assert float(divergence(even, certain)) == np.inf
    assert float(divergence(certain, certain)) == 0
    # The metric likewise, where a model masks part of its vocabulary.
    masked = jnp.array([[[0.0, 1.0, -jnp.inf]]])
    value, gradient = jax.value_and_grad(lambda logits: kl_divergence(masked)(logits)[0])(masked + 0.0)
    assert float(value) == 0 and np.abs(gradient).max() < 1e-6


@pytest.mark.parametrize("position", [2, -1, 0, -5])
def test_the_column_a_metric_reads_is_all_it_reads(rng, position):
    logits = jnp.asarray(rng.normal(size=(2, 5, 7)), jnp.float32)
    for metric in (logit_difference([3, 1], 2, position=position), kl_divergence(logits * 0.5, position=position)):
        column, of_column = column_read(metric, 5) or (-1, metric)
        assert column == position % 5
        np.testing.assert_array_equal(of_column(logits[:, column : column + 1]), metric(logits))
    assert column_read(lambda logits: logits[:, 0, 0], 5) is None


def test_ids_that_are_none():
    for ids in [(" Mary", 1), (-1, 2), (1.5, 2), ([[1]], 2)]:
        with pytest.raises(InvalidInputError, match="token ids, integers from 0"):
            logit_difference(*ids)


def test_numbers_that_are_not_finite():
    assert finite([1.0, 2.0], where="here").tolist() == [1.0, 2.0]
    with pytest.raises(
        InvalidInputError, match=r"A score is nan \(2 of 3 numbers are not finite\) in here\.[\s\S]*Fix"
    ):
        finite(np.array([1.0, np.nan, np.inf]), what="A score", where="here")


CLEAN = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)


def test_ids_are_checked_where_the_metric_is_called_itself(tiny_llama):
    logits = tiny_llama(CLEAN)
    with pytest.raises(
        InvalidInputError, match=r"Expected: ids below 260, and a position from -4 to 3\.[\s\S]*Fix: take"
    ):
        logit_difference(10**6, 2)(logits)
    with pytest.raises(InvalidInputError, match="Position 9 was asked for"):
        kl_divergence(logits, position=9)


def test_a_metric_becomes_one_whose_ids_are_data(tiny_llama):
    metric = logit_difference(1, 2)
    assert prepared(metric, tiny_llama, CLEAN, where="test") is metric
    own = prepared(lambda logits: logits[:, -1, 3], tiny_llama, CLEAN, where="test")
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(own, jnp.ones((2, 4, 5))), [1, 1])
