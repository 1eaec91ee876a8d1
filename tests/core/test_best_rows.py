"""The best row: as a table of all products would have it, in pieces, blocks and over devices.

Source: interp_jax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from interp_jax.core import best_rows as module
from interp_jax.core.best_rows import best_rows, best_rows_across, cut_of


def expected(vectors: np.ndarray, rows: np.ndarray, is_signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """By the table. Small whole numbers: all sums are exact, and many products are equal."""
    table = vectors @ rows.T
    indices = np.argmax(np.abs(table) if is_signed else table, axis=1)
    return indices, table[np.arange(len(table)), indices]


def whole_numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize("is_signed", [False, True])
# One piece without and with blocks; pieces, the last of which overlaps the one before.
@pytest.mark.parametrize("n", [1, 300, 512, 5000])
def test_as_a_table_says(n: int, is_signed: bool, rng: np.random.Generator, monkeypatch) -> None:
    monkeypatch.setattr(module, "_piece", lambda n_vectors, n: min(n, 2048))
    vectors, rows = whole_numbers(rng, 9, 3), whole_numbers(rng, n, 3)
    found = best_rows(jnp.asarray(vectors), jnp.asarray(rows), is_signed=is_signed)
    indices, products = expected(vectors, rows, is_signed)
    assert (np.asarray(found.indices) == indices).all()
    assert (np.asarray(found.products) == products).all()


def test_a_piece_holds_whole_blocks_or_everything() -> None:
    for n_vectors in (0, 1, 7, 300, 10**6):
        for n in (1, 256, 2048, 10**5, 2**17):
            n_piece = module._piece(n_vectors, n)
            assert n_piece == n or n_piece % 256 == 0
            assert 1 <= n_piece <= n


def test_scales_count(rng: np.random.Generator) -> None:
    vectors, rows, scales = whole_numbers(rng, 9, 3), whole_numbers(rng, 40, 3), 2.0 ** rng.integers(-3, 4, 40)
    found = best_rows(jnp.asarray(vectors), jnp.asarray(rows), jnp.asarray(scales, jnp.float32))
    assert (np.asarray(found.indices) == expected(vectors, rows * scales[:, None], False)[0]).all()


def test_half_width_rows_are_multiplied_in_the_width_of_the_vectors(rng: np.random.Generator) -> None:
    rows = jnp.asarray(rng.normal(size=(300, 8)), jnp.bfloat16)
    vectors = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    narrow, wide = best_rows(vectors, rows), best_rows(vectors, rows.astype(jnp.float32))
    assert narrow.products.dtype == jnp.float32
    assert (narrow.indices == wide.indices).all()
    assert (narrow.products == wide.products).all()
    assert best_rows(vectors.astype(jnp.bfloat16), rows).products.dtype == jnp.float32


def test_no_gradient() -> None:
    gradient = jax.grad(lambda vectors: best_rows(vectors, jnp.eye(3)).products.sum())(jnp.ones((2, 3)))
    assert (gradient == 0).all()


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("is_signed", [False, True])
def test_over_devices_ties_go_to_the_first(axes: AxisType, is_signed: bool, rng: np.random.Generator) -> None:
    vectors, rows = whole_numbers(rng, 9, 3), whole_numbers(rng, 40, 3)
    rows[20:] = rows[:20]
    mesh = jax.make_mesh((2,), ("atoms",), axis_types=(axes,))
    cut_rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("atoms")))
    cut = cut_of(cut_rows, jnp.asarray(vectors))
    assert cut is not None
    assert cut.rows == ("atoms",)
    placed = jax.device_put(rows, NamedSharding(cut.mesh, PartitionSpec("atoms")))
    found = jax.jit(lambda v, r, s: best_rows_across(v, r, s, cut, is_signed=is_signed))(
        vectors, placed, np.ones(40, "f")
    )
    indices, products = expected(vectors, rows, is_signed)
    assert (np.asarray(found.indices) == indices).all()
    assert (np.asarray(found.products) == products).all()


def test_rows_in_one_place_are_not_cut() -> None:
    mesh = jax.make_mesh((2,), ("atoms",), axis_types=(AxisType.Auto,))
    vectors, rows = jnp.ones((2, 4)), np.ones((6, 4), np.float32)
    assert cut_of(jnp.asarray(rows), vectors) is None
    for spec in (PartitionSpec(), PartitionSpec(None, "atoms")):
        assert cut_of(jax.device_put(rows, NamedSharding(mesh, spec)), vectors) is None


def test_vectors_cut_over_axes_of_their_own_stay_cut() -> None:
    mesh = jax.make_mesh((1, 2), ("batch", "atoms"), axis_types=(AxisType.Auto,) * 2)
    rows = jax.device_put(np.ones((6, 4), np.float32), NamedSharding(mesh, PartitionSpec("atoms")))
    for axis, kept in (("batch", ("batch",)), ("atoms", ())):
        vectors = jax.device_put(np.ones((4, 4), np.float32), NamedSharding(mesh, PartitionSpec(axis)))
        cut = cut_of(rows, vectors)
        assert cut is not None
        assert cut.batch == kept
