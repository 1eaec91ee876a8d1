"""Operations on dense latents against the plain ones they stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.methods.sae.dense import batch_sum, column_sum, plus_row, relu, rows_and_sums


def test_relu_and_its_gradient(rng) -> None:
    values = jnp.asarray(np.append(rng.normal(size=20), 0.0), jnp.float32)
    np.testing.assert_array_equal(relu(values), jax.nn.relu(values))
    np.testing.assert_array_equal(jax.grad(lambda v: relu(v).sum())(values), (np.asarray(values) > 0))


def test_a_row_has_the_gradient_of_a_broadcast(rng) -> None:
    values, row, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((7, 5), (5,), (7, 5)))
    np.testing.assert_array_equal(plus_row(values, row), values + row[None])
    found = jax.grad(lambda v, r: (weights * plus_row(v, r)).sum(), argnums=(0, 1))(values, row)
    np.testing.assert_array_equal(found[0], weights)
    np.testing.assert_allclose(found[1], np.asarray(weights, np.float64).sum(axis=0), atol=1e-5)
    # Forward mode too.
    _, tangent = jax.jvp(lambda r: plus_row(values, r), (row,), (row,))
    np.testing.assert_allclose(tangent, np.broadcast_to(row, (7, 5)), rtol=1e-6)


@pytest.mark.parametrize("n_rows", [1, 7, 8, 24])
def test_a_sum_over_the_batch(n_rows, rng) -> None:
    a, b = (jnp.asarray(rng.normal(size=(n_rows, 5)), jnp.float32) for _ in range(2))
    expected = (np.asarray(a, np.float64) * np.asarray(b)).sum(axis=0)
    np.testing.assert_allclose(jax.jit(lambda a, b: batch_sum(jnp.multiply, a, b))(a, b), expected, atol=1e-5)
    counts = batch_sum(lambda rows: rows > 0, a, dtype=jnp.int32)
    np.testing.assert_array_equal(counts, (np.asarray(a) > 0).sum(axis=0))
    assert counts.dtype == jnp.int32
    np.testing.assert_allclose(column_sum(a), np.asarray(a, np.float64).sum(axis=0), atol=1e-5)
    # Several at once, as several SAEs may be.
    many = jax.vmap(lambda a, b: batch_sum(jnp.multiply, a, b))(jnp.stack([a, b]), jnp.stack([b, b]))
    np.testing.assert_allclose(many[0], expected, atol=1e-5)


@pytest.mark.parametrize("n_rows", [1, 7, 8, 24])
def test_new_rows_and_sums_in_one_pass(n_rows, rng) -> None:
    a, b = (jnp.asarray(rng.normal(size=(n_rows, 5)), jnp.float32) for _ in range(2))

    def function(a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return a - 2 * b, (a, a * b)

    rows, (first, second) = jax.jit(lambda a, b: rows_and_sums(function, a, b))(a, b)
    np.testing.assert_allclose(rows, np.asarray(a) - 2 * np.asarray(b), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(first, np.asarray(a, np.float64).sum(axis=0), atol=1e-5)
    np.testing.assert_allclose(second, (np.asarray(a, np.float64) * np.asarray(b)).sum(axis=0), atol=1e-5)
    # What it was given is as it was: another reader may need it.
    kept, (rows_again, _) = jax.jit(lambda a, b: (a + 0, rows_and_sums(function, a, b)))(a, b)
    np.testing.assert_array_equal(kept, a)
    np.testing.assert_array_equal(rows_again, rows)
