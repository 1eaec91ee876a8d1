"""Dense latents with few passes over their memory, which is what a step costs besides its matrix products.

A batch of latents does not fit a cache: each pass over it, and each more copy of it, is paid for. The operations here
have the values and gradients of the ones they stand for, and read less: a ReLU whose gradient needs nothing but its
result, so that what it read can be overwritten; biases whose gradient is a product with ones; what is computed from
latents row by row, and sums over the batch of such.

>>> values = jnp.array([[1.0, -2.0], [3.0, 4.0]])
>>> relu(plus_row(values, jnp.array([0.0, 1.0]))).tolist()
[[1.0, 0.0], [3.0, 5.0]]
>>> batch_sum(lambda rows: rows > 0, values, dtype=jnp.int32).tolist()
[2, 1]

Sharp edges: `batch_sum` is for counts and backward passes: its own gradient would keep what it read.

Source: interp_jax; measured by `python -m benchmarks.sae`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# So many rows are added at a time: few enough for a cache, enough to be worth a turn of a loop.
_ROWS = 8


@jax.custom_jvp
def relu(pre: jax.Array, threshold: jax.Array | float = 0.0) -> jax.Array:
    """`pre` where it is above 0 and at least `threshold`, else 0; NaN stays NaN. The threshold has no gradient."""
    # Without the barrier XLA computes in the backward pass which are above 0 from `pre`, and keeps that.
    return lax.optimization_barrier(jnp.where((pre <= 0) | (pre < threshold), 0.0, pre))


@relu.defjvp
def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    latents = relu(*primals)
    return latents, jnp.where(latents > 0, tangents[0], 0.0)


@jax.custom_jvp
def plus_row(values: jax.Array, row: jax.Array) -> jax.Array:
    """`values`, `[batch, n]`, with `row`, `[n]`, added to each."""
    return values + row[None]


@plus_row.defjvp
def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    to_values, to_row = tangents
    # The transpose of this product is `column_sum`.
    ones = jnp.ones((len(primals[0]), 1), to_row.dtype)
    return plus_row(*primals), to_values + jnp.matmul(ones, to_row[None], precision=lax.Precision.HIGHEST)


def column_sum(values: jax.Array) -> jax.Array:
    """The sum over the batch of `values`, `[batch, n]`, which are in memory already."""
    # A product: XLA sums columns on a CPU at a tenth of the memory's speed.
    ones = jnp.ones((1, len(values)), values.dtype)
    return jnp.matmul(ones, values, precision=lax.Precision.HIGHEST)[0]


def batch_sum(function: Callable[..., jax.Array], *arrays: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """The sum over the batch of `function(*arrays)`, which is computed a few rows at a time where that is faster.

    Args:
        function: From some rows of each array, `[rows, n]`, to as many rows.
        arrays: `[batch, n]` each.
        dtype: What is summed in.

    Returns:
        The sum, `[n]`.
    """
    return rows_and_sums(lambda *rows: (None, (function(*rows),)), *arrays, dtype=dtype)[1][0]


def rows_and_sums(
    function: Callable[..., tuple[jax.Array | None, tuple[jax.Array, ...]]],
    *arrays: jax.Array,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
    """What `function` makes of the rows of a batch, and sums over the batch, in one pass over memory.

    Args:
        function: From some rows of each array, `[rows, n]`, to as many new ones (or None) and some to be summed.
        arrays: `[batch, n]` each. The new rows are written over the first, where nothing else reads it.
        dtype: What is summed in.

    Returns:
        The new rows, `[batch, n]`, and the sums, `[n]` each.
    """

    def summed(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(value.sum(axis=0, dtype=dtype) for value in values)

    def whole(*arrays: jax.Array) -> Any:
        new, values = function(*arrays)
        return new, summed(values)

    def by_rows(*arrays: jax.Array) -> Any:
        n_rows = math.gcd(len(arrays[0]), _ROWS)
        new, sums = jax.eval_shape(whole, *arrays)
        blocks = [array.reshape(-1, n_rows, array.shape[1]) for array in arrays]

        def turn(carry: tuple[jax.Array | None, tuple[jax.Array, ...]], now: tuple[jax.Array, list[jax.Array]]) -> Any:
            (written, totals), (i, read) = carry, now
            if written is not None:
                read = [written[i], *read]
            rows, values = function(*read)
            if written is not None and rows is not None:
                written = lax.dynamic_update_index_in_dim(written, rows, i, axis=0)
            return (written, tuple(total + more for total, more in zip(totals, summed(values), strict=True))), None

        written = None if new is None else blocks.pop(0)
        start = written, tuple(jnp.zeros(total.shape, dtype) for total in sums)
        (written, totals), _ = lax.scan(turn, start, (jnp.arange(len(arrays[0]) // n_rows), blocks))
        return None if written is None else written.reshape(arrays[0].shape), totals

    return lax.platform_dependent(*arrays, cpu=by_rows, default=whole)
