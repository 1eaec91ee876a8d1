"""Which of many rows has the largest inner product with each vector, without a table of all the products.

The product is the smaller part of the work if one asks for an argmax of it: on a CPU XLA takes as long again to find
it. Here the rows come in pieces of bounded size. Of a piece first the maximum of each block is taken, which is
vectorised, and then the argmax of the maxima and of one block.

>>> best = best_rows(jnp.array([[1.0, 1.0], [-2.0, 0.0]]), jnp.array([[1.0, 0.0], [0.5, 0.75]]), is_signed=True)
>>> best.indices.tolist(), best.products.tolist()
([1, 0], [1.25, -2.0])

Sharp edges: of equal products the row that comes first wins. Neither result has a gradient. Numbers are to be
finite: a product that is NaN may win or lose.

Source: interp_jax.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# How many products of a piece are found by their block.
_N_BLOCK = 512
_LAST = np.iinfo(np.int32).max


class BestRows(NamedTuple):
    """The row with the largest product, for each vector.

    Args:
        indices: int32 `[batch]`.
        products: With that row, `[batch]`.
    """

    indices: jax.Array
    products: jax.Array


def best_rows(
    vectors: jax.Array,
    rows: jax.Array,
    scales: jax.Array | None = None,
    *,
    is_signed: bool = False,
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
) -> BestRows:
    """The row with the largest product `scale (row . vector)`, or the largest absolute one.

    Args:
        vectors: `[batch, d]`; products are computed in their dtype and summed in float32 or wider.
        rows: `[n, d]`, of any floating dtype, n at least 1.
        scales: What the products with each row are multiplied by, `[n]`; None for nothing.
        is_signed: Whether the largest absolute product is looked for.
        precision: Of the product.

    Returns:
        The indices, and the products with their signs.
    """
    vectors, rows = lax.stop_gradient((vectors, rows))
    scales = None if scales is None else lax.stop_gradient(scales)
    (n_vectors, _), n = vectors.shape, len(rows)
    n_piece = _piece(n_vectors, n)
    sums = vectors.dtype if jnp.finfo(vectors.dtype).bits > 32 else jnp.float32

    def of_piece(start: jax.Array | int) -> BestRows:
        piece = lax.dynamic_slice_in_dim(rows, start, n_piece).astype(vectors.dtype)
        products = jnp.matmul(vectors, piece.T, precision=precision, preferred_element_type=sums)
        own = None if scales is None else lax.dynamic_slice_in_dim(scales, start, n_piece).astype(sums)
        found = _best_of(products, own, is_signed)
        return BestRows(found.indices + start, found.products)

    if n_piece == n:
        return of_piece(0)

    def step(i: jax.Array, best: BestRows) -> BestRows:
        # The last piece begins earlier rather than being shorter; what it repeats ties, and a tie changes nothing.
        found = of_piece(jnp.minimum(i * n_piece, n - n_piece))
        is_better = _size(found.products, is_signed) > _size(best.products, is_signed)
        return BestRows(*(jnp.where(is_better, new, old) for new, old in zip(found, best, strict=True)))

    return lax.fori_loop(1, -(-n // n_piece), step, of_piece(0))


class Cut(NamedTuple):
    """How rows lie on devices.

    Args:
        mesh: The devices, with `Auto` axes.
        rows: The axes of the mesh that cut the rows, in order.
        batch: The axes that cut the vectors.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    batch: tuple[str, ...]


def cut_of(rows: jax.Array, vectors: jax.Array) -> Cut | None:
    """How rows are cut over devices, or None if they are not.

    Args:
        rows: `[n, d]`, not traced.
        vectors: `[batch, d]`, possibly traced.

    Returns:
        The cut.
    """
    axes = _first_axes(rows)
    if not axes:
        return None
    mesh = rows.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue] - a NamedSharding, as it has axes
    batch = () if isinstance(vectors, Tracer) else _first_axes(vectors)
    shared = [axis for axis in batch if axis in mesh.axis_names and axis not in axes]
    return Cut(Mesh(mesh.devices, mesh.axis_names), axes, tuple(shared) if len(shared) == len(batch) else ())


def _first_axes(array: jax.Array) -> tuple[str, ...]:
    """The axes of a mesh that cut an array's first axis."""
    if not isinstance(array.sharding, NamedSharding) or not array.sharding.spec:
        return ()
    axes = array.sharding.spec[0]
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def best_rows_across(
    vectors: jax.Array, rows: jax.Array, scales: jax.Array, cut: Cut, *, is_signed: bool = False
) -> BestRows:
    """`best_rows` of rows that are cut over devices: of each device's best, the best.

    Args:
        vectors: `[batch, d]`.
        rows: `[n, d]`.
        scales: `[n]`.
        cut: How they are cut.
        is_signed: Whether the largest absolute product is looked for.

    Returns:
        As `best_rows`; of equal products the row that comes first wins, on whichever device.
    """

    def on_device(vectors: jax.Array, rows: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        best = best_rows(vectors, rows, scales, is_signed=is_signed)
        indices = best.indices + lax.axis_index(cut.rows).astype(jnp.int32) * len(rows)
        sizes = _size(best.products, is_signed)
        first = lax.pmin(jnp.where(sizes == lax.pmax(sizes, cut.rows), indices, _LAST), cut.rows)
        return first, lax.psum(jnp.where(indices == first, best.products, 0), cut.rows)

    of_rows, of_batch = PartitionSpec(cut.rows), PartitionSpec(cut.batch or None)
    run = jax.shard_map(on_device, mesh=cut.mesh, in_specs=(of_batch, of_rows, of_rows), out_specs=(of_batch, of_batch))
    return BestRows(*run(*lax.stop_gradient((vectors, rows, scales))))


def _piece(n_vectors: int, n: int) -> int:
    """How many rows at once: a piece is copied, so as few pieces as keep their products in a large cache."""
    at_once = 2**22 if jax.default_backend() == "cpu" else 2**26
    n_piece = max(at_once // max(n_vectors, 1), 2048) // _N_BLOCK * _N_BLOCK
    return n if n <= n_piece else n_piece


def _best_of(products: jax.Array, scales: jax.Array | None, is_signed: bool) -> BestRows:
    """The largest of each row of products, which are multiplied by the scales."""
    n_vectors, n = products.shape
    first = jnp.zeros(n_vectors, jnp.int32)
    scales = jnp.ones(n, products.dtype) if scales is None else scales
    if n > _N_BLOCK and n % _N_BLOCK == 0:
        blocks = products.reshape(n_vectors, -1, _N_BLOCK)
        # Scaled on the way to the maximum and again in the one block: the whole is not written a second time.
        sizes = _size(blocks * scales.reshape(1, -1, _N_BLOCK), is_signed)
        block = jnp.argmax(sizes.max(axis=2), axis=1).astype(jnp.int32)
        products = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
        products = products * scales.reshape(-1, _N_BLOCK)[block]
        first = block * _N_BLOCK
    else:
        products = products * scales[None]
    within = jnp.argmax(_size(products, is_signed), axis=1).astype(jnp.int32)
    return BestRows(first + within, jnp.take_along_axis(products, within[:, None], axis=1)[:, 0])


def _size(products: jax.Array, is_signed: bool) -> jax.Array:
    """What is largest at the best."""
    return jnp.abs(products) if is_signed else products
