"""Latents of which few differ from zero, at the cost of the few: chosen, decoded and differentiated by index.

`top_k_latents` gives the values and indices of the k largest pre-activations. The product that finds them is dense;
its gradient, and the decoder, touch only the chosen rows.

>>> pre = jnp.array([[1.0, 3.0, -1.0]])
>>> sparse = top_k_latents(jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.zeros(3), pre, 2)
>>> sparse.values.tolist(), sparse.indices.tolist()
([[3.0, 1.0]], [[1, 0]])

Sharp edges: the same gradients as the dense form's, in another order of summation.

Source: Gao et al. 2024 (2406.04093), appendix on kernels, for the idea.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.methods.sae.architecture import SparseLatents


def top_k_latents(inputs: jax.Array, W_enc: jax.Array, bias: jax.Array, pre: jax.Array, k: int) -> SparseLatents:
    """The k largest pre-activations of each row, at least 0, with their gradients to what they were computed from.

    Args:
        inputs: What the encoder multiplies, `[batch, d_in]`.
        W_enc: `[d_in, latent]`.
        bias: What was added, `[latent]`.
        pre: `inputs W_enc + bias`, `[batch, latent]`.
        k: How many.

    Returns:
        The latents; values below 0 are 0.
    """
    values, indices = largest(pre, k)
    return SparseLatents(jax.nn.relu(_at(inputs, W_enc, bias, values, indices)), indices)


def largest(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row and where they are, without a gradient.

    Args:
        values: `[batch, n]`.
        k: How many.

    Returns:
        Both `[batch, k]`, largest first.
    """
    # Without the barrier XLA fuses what follows into the selection and sorts whole rows: ten times the time.
    return lax.optimization_barrier(lax.top_k(lax.stop_gradient(values), k))


@jax.custom_vjp
def _at(inputs: jax.Array, W_enc: jax.Array, bias: jax.Array, values: jax.Array, indices: jax.Array) -> jax.Array:
    """`values`, as a function of what they were computed from."""
    del inputs, W_enc, bias, indices
    return values


def _at_forward(inputs: Any, W_enc: Any, bias: Any, values: Any, indices: Any) -> tuple[jax.Array, Any]:
    return values, (inputs, W_enc, bias, indices)


def _at_backward(saved: Any, cotangents: jax.Array) -> tuple[Any, ...]:
    inputs, W_enc, bias, indices = saved
    to_W = scatter_outer(cotangents, indices, inputs, W_enc.shape[1]).T
    to_bias = jnp.zeros_like(bias).at[indices.reshape(-1)].add(cotangents.reshape(-1))
    to_inputs = sparse_matmul(cotangents, indices, W_enc.T)
    return to_inputs.astype(inputs.dtype), to_W.astype(W_enc.dtype), to_bias, None, None


_at.defvjp(_at_forward, _at_backward)


@jax.custom_vjp
def sparse_matmul(values: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """`sum_k values[b, k] rows[indices[b, k]]`.

    Args:
        values: `[batch, k]`.
        indices: `[batch, k]`.
        rows: `[latent, d]`.

    Returns:
        `[batch, d]`, in float32.
    """
    k, d = indices.shape[1], rows.shape[1]
    return lax.map(lambda row: row[0] @ rows[row[1]], (values, indices), batch_size=_n_rows(k * d))


def _sparse_forward(values: Any, indices: Any, rows: Any) -> tuple[jax.Array, Any]:
    return sparse_matmul(values, indices, rows), (values, indices, rows)


def _sparse_backward(saved: Any, cotangents: jax.Array) -> tuple[Any, ...]:
    values, indices, rows = saved
    k, d = indices.shape[1], rows.shape[1]
    to_values = lax.map(lambda row: rows[row[0]] @ row[1], (indices, cotangents), batch_size=_n_rows(k * d))
    return to_values, None, scatter_outer(values, indices, cotangents, rows.shape[0]).astype(rows.dtype)


sparse_matmul.defvjp(_sparse_forward, _sparse_backward)


def scatter_outer(values: jax.Array, indices: jax.Array, vectors: jax.Array, n_rows: int) -> jax.Array:
    """Rows `sum_b,k 1[indices[b, k] = row] values[b, k] vectors[b]`, `[n_rows, d]`, in float32."""
    (n_batch, k), d = indices.shape, vectors.shape[1]
    n_chunk = min(_n_rows(k * d), n_batch)

    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        values, indices, vectors = chunk
        outer = values[:, :, None] * vectors[:, None, :]
        return total.at[indices.reshape(-1)].add(outer.reshape(-1, d)), None

    # Rows of value 0 fill the last chunk up.
    n_missing = -n_batch % n_chunk
    chunks = [
        jnp.pad(array, ((0, n_missing), (0, 0))).reshape(-1, n_chunk, array.shape[1])
        for array in (values, indices, vectors)
    ]
    return lax.scan(add, jnp.zeros((n_rows, d)), tuple(chunks))[0]


def _n_rows(n_elements: int) -> int:
    """How many rows of a batch to handle at once: what a CPU's cache holds, or enough work for an accelerator."""
    at_once = 2**20 if jax.default_backend() == "cpu" else 2**27
    return max(1, at_once // n_elements)
