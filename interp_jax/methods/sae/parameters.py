"""An autoencoder's arrays: which there are, how they begin, and the affine maps every variant is made of.

The arrays of an SAE are a dict under the names the field's files use: `W_enc` [d_in, latent], `b_enc` [latent],
`W_dec` [latent, d_out], `b_dec` [d_out], and what a variant adds to them. A tied SAE has no `W_enc`, a skip
transcoder has `W_skip` [d_in, d_out] too.

>>> params = init_params(jax.random.key(0), d_in=3, n_latents=5)
>>> {name: value.shape for name, value in params.items()}
{'W_dec': (5, 3), 'W_enc': (3, 5), 'b_dec': (3,), 'b_enc': (5,)}

Sharp edges: rows of `W_dec` are latents. A decoder stored the other way round has the shape of another SAE, and of
this one when d_out = latent.

Source: Bricken et al. 2023, Towards Monosemanticity; Gao et al. 2024 (2406.04093) for the initial encoder.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.methods.sae.dense import plus_row

Params = dict[str, jax.Array]


def init_params(
    key: jax.Array,
    *,
    d_in: int,
    n_latents: int,
    d_out: int | None = None,
    decoder_norm: float = 1.0,
    is_tied: bool = False,
    has_skip: bool = False,
) -> Params:
    """Decoder rows in random directions, encoder columns along them, biases of zero.

    Args:
        key: Random key.
        d_in: Width of what is read.
        n_latents: How many latents.
        d_out: Width of what is written; None for the same as `d_in`.
        decoder_norm: Norm of the decoder's rows.
        is_tied: Whether the encoder is the decoder's transpose, always.
        has_skip: Whether there is a linear map past the latents, which begins as zero.

    Returns:
        The arrays, in float32.
    """
    d_out = d_in if d_out is None else d_out
    for name, size in (("d_in", d_in), ("n_latents", n_latents), ("d_out", d_out)):
        if size < 1:
            raise InvalidInputError(
                four_part(
                    f"{name} = {size} was given",
                    where="init_params",
                    expected="at least 1.",
                    fix=f"give a positive {name}.",
                )
            )
    key_decoder, key_encoder = jax.random.split(key)
    rows = unit_rows(jax.random.normal(key_decoder, (n_latents, d_out), jnp.float32))
    params = {"W_dec": rows * decoder_norm, "b_dec": jnp.zeros(d_out), "b_enc": jnp.zeros(n_latents)}
    if not is_tied:
        # A transcoder's encoder reads another space than its decoder writes: nothing to copy.
        columns = rows if d_in == d_out else unit_rows(jax.random.normal(key_encoder, (n_latents, d_in), jnp.float32))
        params["W_enc"] = columns.T
    if has_skip:
        params["W_skip"] = jnp.zeros((d_in, d_out))
    return dict(sorted(params.items()))


def unit_rows(rows: jax.Array) -> jax.Array:
    """Rows scaled to norm 1; a row of zeros stays one."""
    norms = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, 1.0)


def encoder_weights(params: Params) -> jax.Array:
    """`W_enc`, `[d_in, latent]`, the decoder's transpose where the two are tied."""
    return params["W_enc"] if "W_enc" in params else params["W_dec"].T


def matmul(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """`a @ b` of factors rounded to `dtype`, summed and returned in float32."""
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def pre_activations(
    params: Params, x: jax.Array, *, is_centred: bool, bias: str | None = "b_enc", dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """What the latents' nonlinearity reads, `(x - b_dec) W_enc + b_enc`, twice.

    Both have the same value. The gradient of the second stays out of `b_dec`: it is what terms about dead latents
    read, which may move nothing else.

    Args:
        params: The arrays.
        x: Activations, `[batch, d_in]`.
        is_centred: Whether `b_dec` is subtracted first.
        bias: Name of the bias that is added; None for none.
        dtype: What the product's factors are rounded to.

    Returns:
        The pre-activations `[batch, latent]`, and the same for dead latents.
    """

    def with_bias(linear: jax.Array) -> jax.Array:
        return linear if bias is None else plus_row(linear, params[bias])

    W_enc = encoder_weights(params)
    if not is_centred:
        linear = with_bias(matmul(x, W_enc, dtype))
        return linear, linear
    b_dec = lax.stop_gradient(params["b_dec"])
    linear = with_bias(matmul(x - b_dec[None], W_enc, dtype))
    # Zero, with the gradient of -b_dec W_enc: one row instead of a product over the batch.
    return plus_row(linear, -((params["b_dec"] - b_dec)[None] @ W_enc)[0]), linear


def decode(params: Params, latents: jax.Array, x: jax.Array | None = None, *, dtype: Any = jnp.float32) -> jax.Array:
    """`latents W_dec + b_dec`, and `x W_skip` where there is a skip.

    Args:
        params: The arrays.
        latents: Latents, `[batch, latent]`.
        x: What was read, `[batch, d_in]`; needed with a skip only.
        dtype: What the product's factors are rounded to.

    Returns:
        The reconstruction, `[batch, d_out]`.

    Raises:
        InvalidInputError: There is a skip and no `x`.
    """
    return matmul(latents, params["W_dec"], dtype) + offset(params, x, dtype=dtype)


def offset(params: Params, x: jax.Array | None, *, dtype: Any = jnp.float32) -> jax.Array:
    """What a reconstruction has without any latent, `[1 or batch, d_out]`: `b_dec`, and `x W_skip` with a skip."""
    if "W_skip" not in params:
        return params["b_dec"][None]
    if x is None:
        raise InvalidInputError(
            four_part(
                "Latents alone were given",
                where="decode",
                expected="what was read as well: this transcoder has a skip, x W_skip.",
                fix="call decode(latents, x).",
            )
        )
    return params["b_dec"][None] + matmul(x, params["W_skip"], dtype)


def of_latents(params: Params, indices: jax.Array) -> Params:
    """The arrays of `params` with the latents at `indices` alone."""

    def picked(name: str, value: jax.Array) -> jax.Array:
        if name in ("b_dec", "W_skip") or value.ndim == 0:  # These belong to no latent.
            return value
        return value[:, indices] if name == "W_enc" else value[indices]

    return {name: picked(name, value) for name, value in params.items()}


def geometric_median(points: Any, *, n_steps: int = 100, tolerance: float = 1e-6) -> np.ndarray:
    """The point with the least sum of distances to the points, by Weiszfeld's iteration.

    Args:
        points: `[n, d]`.
        n_steps: At most so many steps.
        tolerance: Stop once a step is shorter than this share of the points' spread.

    Returns:
        The median, `[d]`.
    """
    points = np.asarray(points, np.float64)
    median = points.mean(axis=0)
    spread = np.linalg.norm(points - median, axis=1).mean()
    for _ in range(n_steps if spread > 0 else 0):
        distances = np.linalg.norm(points - median, axis=1)
        # The iterate may sit on a point, whose weight would be infinite.
        weights = 1 / np.maximum(distances, 1e-12 * spread)
        previous, median = median, weights @ points / weights.sum()
        if np.linalg.norm(median - previous) <= tolerance * spread:
            break
    return median.astype(np.float32)
