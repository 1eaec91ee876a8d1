"""The read-out: the final norm and the unembedding as one linear function of the residual stream.

With its scale held at the value it has in a pass, a final norm is linear, and so is an unembedding: a logit, a
difference of logits, or a direction after the norm, is a dot product with the residual plus a constant. Both are read
off the model's own code by what it does to a few vectors, so whether a gain is kept as w, as 1 + w or not at all is all
the same.

    total = (direction . residual) / scale + remainder

A residual read by a probe, without a norm:

>>> readout = probe_readout(np.ones((1, 2, 3)), np.array([1.0, 2.0, 3.0]), where="docs")
>>> readout.total.tolist(), readout.scale.tolist()
([[6.0, 6.0]], [[1.0, 1.0]])

Sharp edges: a different position has a different scale. What is not linear after the norm (a soft cap) is refused.

Source: the formulas of LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError, UnsupportedModelError, four_part
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


class Readout(NamedTuple):
    """A linear function of the residual at each position, in float64.

    Args:
        direction: What the residual is multiplied with, `[batch, d_model]`.
        scale: What that is divided by, `[batch, pos]`.
        remainder: What is added, `[batch]`.
        total: What the model itself has there, `[batch, pos]`.
        size: How large the numbers are that `total` is rounded with, `[batch, pos]`.
    """

    direction: np.ndarray
    scale: np.ndarray
    remainder: np.ndarray
    total: np.ndarray
    size: np.ndarray


def tolerance(dtype: Any) -> float:
    """Relative error that rounding in this `dtype` explains, with room; what is wrong is off by far more."""
    return max(1e-4, 16 * float(jnp.finfo(dtype).eps))


def at_least_float32(dtype: Any) -> Any:
    """The `dtype`, or float32 if it is a shorter one."""
    return dtype if jnp.finfo(dtype).bits >= 32 else np.dtype(np.float32)


def probe_readout(residual: Any, direction: Any, *, where: str) -> Readout:
    """A direction that reads a residual as it is.

    total = direction . residual

    Args:
        residual: `[batch, pos, d_model]`.
        direction: `[d_model]` or `[batch, d_model]`.
        where: The public call, for error messages.

    Returns:
        The read-out.

    Raises:
        ShapeError: The direction has another shape, or is not of floats.
        InvalidInputError: It holds a number that is not finite.
    """
    u = _directions(direction, residual, where)
    total = np.einsum("bpm,bm->bp", np.asarray(residual, np.float64), u)
    return Readout(u, np.ones(total.shape), np.zeros(len(u)), total, np.abs(total))


def norm_readout(lm: LanguageModel, residual: Any, direction: Any, mask: np.ndarray, *, where: str) -> Readout:
    """A direction that reads what the final norm makes of the last residual.

    total = direction . ln_final(residual)

    Args:
        lm: The model.
        residual: The last residual, `[batch, pos, d_model]`.
        direction: `[d_model]` or `[batch, d_model]`.
        mask: Where there are tokens, `[batch, pos]`; nothing is known elsewhere.
        where: The public call, for error messages.

    Returns:
        The read-out.

    Raises:
        ShapeError: The direction has another shape, or is not of floats.
        InvalidInputError: It holds a number that is not finite.
        UnsupportedModelError: The final norm is no LayerNorm or RMSNorm.
    """
    u = _directions(direction, residual, where)
    normalised = np.asarray(lm.ln_final(residual), np.float64)
    total = np.einsum("bpm,bm->bp", normalised, u)
    return _through_norm(lm, residual, normalised, u, np.zeros(len(u)), total, np.abs(total), mask, where)


def logit_readout(
    lm: LanguageModel, residual: Any, logits: Any, answer: Any, wrong: Any, mask: np.ndarray, *, where: str
) -> Readout:
    """A logit, or a difference of logits.

    total = logits[answer] - logits[wrong]

    Args:
        lm: The model.
        residual: The last residual, `[batch, pos, d_model]`.
        logits: What the model makes of it, `[batch, pos, d_vocab]`.
        answer: A token id, or one per row.
        wrong: Likewise, or "mean" for the mean logit of all tokens, or None.
        mask: Where there are tokens, `[batch, pos]`; nothing is known elsewhere.
        where: The public call, for error messages.

    Returns:
        The read-out.

    Raises:
        ShapeError: Ids that are no integers, or not one per row.
        InvalidInputError: An id is not in the vocabulary.
        UnknownNameError: `wrong` is another word than "mean".
        UnsupportedModelError: The final norm is no LayerNorm or RMSNorm, or the logits are not linear after it.
    """
    answer, wrong = (_ids(name, ids, logits, where) for name, ids in (("answer", answer), ("wrong", wrong)))
    is_mean, wrong_ids = isinstance(wrong, str), None if isinstance(wrong, str) else wrong
    zero = jnp.zeros((len(residual), 1, residual.shape[-1]), residual.dtype)
    gradient, at_zero = _unembedding(lm.upstream.unembed, lm.params, zero, answer, wrong_ids, is_mean=is_mean)
    u, constant = np.asarray(gradient, np.float64)[:, 0], np.asarray(at_zero, np.float64)[:, 0]
    parts = [np.asarray(part, np.float64) for part in _parts(logits, answer, wrong_ids, is_mean=is_mean)]
    total, size = parts[0] - parts[1], np.abs(parts[0]) + np.abs(parts[1])

    normalised = np.asarray(lm.ln_final(residual), np.float64)
    linear = np.einsum("bpm,bm->bp", normalised, u) + constant[:, None]
    size = size + np.einsum("bpm,bm->bp", np.abs(normalised), np.abs(u))
    misfit = np.where(mask, np.abs(total - linear), 0.0).max()
    if misfit > tolerance(residual.dtype) * np.where(mask, size, 0.0).max():
        raise UnsupportedModelError(
            four_part(
                f"Logits that are not linear in the normed residual were given (off by {misfit:.1e})",
                where=where,
                expected="normalised @ W_U + b_U; a soft cap is none.",
                fix="attribute what is before the cap: direction=lm.W_U[:, answer] - lm.W_U[:, wrong].",
            )
        )
    return _through_norm(lm, residual, normalised, u, constant, total, size, mask, where)


def _directions(direction: Any, residual: Any, where: str) -> np.ndarray:
    """The given direction for each row, float64 `[batch, d_model]`."""
    batch, _, d_model = residual.shape
    u = np.asarray(direction)
    if u.shape not in ((d_model,), (batch, d_model)) or not jnp.issubdtype(u.dtype, jnp.floating):
        raise ShapeError(
            four_part(
                f"A direction of {u.dtype}{list(u.shape)} was given",
                where=where,
                expected=f"float[{d_model}], or one per row, float[{batch}, {d_model}].",
                fix="give the vector as it reads the residual stream: its length is d_model.",
            )
        )
    u = u.astype(np.float64)
    if not np.isfinite(u).all():
        raise InvalidInputError(
            four_part(
                "A direction with numbers that are not finite was given",
                where=where,
                expected="finite numbers.",
                fix="look at where the direction comes from.",
            )
        )
    return np.broadcast_to(u, (batch, d_model))


def _ids(name: str, given: Any, logits: Any, where: str) -> Any:
    """Ids as int32 `[batch]`; "mean" and None stay."""
    batch, d_vocab = logits.shape[0], logits.shape[-1]
    if given is None or (isinstance(given, str) and given == "mean" and name == "wrong"):
        return given
    if isinstance(given, str):
        raise UnknownNameError(
            four_part(
                f"{name}={given!r} was given",
                where=where,
                expected="token ids" + (', or "mean".' if name == "wrong" else "."),
                fix=f"give the id of a token: lm.tokenizer.token_id({given!r}).",
            )
        )
    ids = np.asarray(given)
    if ids.dtype.kind not in "iu" or ids.shape not in ((), (batch,)):
        raise ShapeError(
            four_part(
                f"{name} of {ids.dtype}{list(ids.shape)} was given",
                where=where,
                expected=f"one token id, or one per row, int[{batch}].",
                fix='take the id from lm.tokenizer.token_id(" Mary").',
            )
        )
    if ids.min() < 0 or ids.max() >= d_vocab:
        raise InvalidInputError(
            four_part(
                f"{name}={ids.tolist()} was given",
                where=where,
                expected=f"ids from 0 to {d_vocab - 1}.",
                fix="use this model's own tokenizer.",
            )
        )
    return np.broadcast_to(ids.astype(np.int32), (batch,))


def _parts(logits: jax.Array, answer: Any, wrong: Any, *, is_mean: bool) -> tuple[jax.Array, jax.Array]:
    """The two logits whose difference is read, at least float32: `[batch, pos, d_vocab] -> [batch, pos]` each."""
    logits = logits.astype(at_least_float32(logits.dtype))

    def of(ids: Any) -> jax.Array:
        return jnp.take_along_axis(logits, ids[:, None, None], axis=-1)[..., 0]

    return of(answer), logits.mean(-1) if is_mean else jnp.zeros_like(logits[..., 0]) if wrong is None else of(wrong)


def _gradient_of_unembedding(
    unembed: Callable[..., Any], params: Any, zero: Any, answer: Any, wrong: Any, *, is_mean: bool
) -> tuple[jax.Array, jax.Array]:
    """The direction u of each row, `[batch, 1, d_model]`, and the logit of a residual of zeros, `[batch, 1]`."""

    def value(normalised: Any) -> tuple[jax.Array, jax.Array]:
        parts = _parts(unembed(params, normalised), answer, wrong, is_mean=is_mean)
        return (parts[0] - parts[1]).sum(), parts[0] - parts[1]

    return jax.grad(value, has_aux=True)(zero)


_unembedding = counted_jit(
    _gradient_of_unembedding, name="readout.unembedding", static_argnums=0, static_argnames=("is_mean",)
)


def _through_norm(
    lm: LanguageModel,
    residual: Any,
    normalised: np.ndarray,
    u: np.ndarray,
    constant: np.ndarray,
    total: np.ndarray,
    size: np.ndarray,
    mask: np.ndarray,
    where: str,
) -> Readout:
    gain, bias, is_centring = norm_parts(lm, residual)
    scale = _norm_scale(np.asarray(residual, np.float64), normalised - bias, gain, mask, is_centring, residual.dtype)
    if scale is None:
        raise UnsupportedModelError(
            four_part(
                "A final norm that is neither LayerNorm nor RMSNorm was given",
                where=where,
                expected="gain * x / scale + bias, with or without the mean of x taken off first.",
                fix="read a direction at a site before the norm: direction=..., at=...",
            )
        )
    direction = gain * u
    if is_centring:
        # The norm takes the mean off: (x - mean(x)) . w = x . (w - mean(w)).
        direction = direction - direction.mean(-1, keepdims=True)
    return Readout(direction, scale, u @ bias + constant, total, size)


def norm_parts(lm: LanguageModel, residual: Any) -> tuple[np.ndarray, np.ndarray, bool]:
    """What the final norm does apart from its scale.

    At 0 a norm says its bias, at a vector of alternating signs its bias plus its gain. What it says at a constant
    vector tells LayerNorm (its bias again) from RMSNorm.

    Args:
        lm: The model.
        residual: An array of the residual stream's width and dtype, `[..., d_model]`.

    Returns:
        The gain (up to a factor, which the scale takes up) and the bias, float64 `[d_model]`, and whether the mean is
        taken off.
    """
    d_model = residual.shape[-1]
    signs = np.where(np.arange(d_model) % 2, -1.0, 1.0)
    probes = jnp.asarray(np.stack([np.zeros(d_model), signs, np.ones(d_model)]), residual.dtype)[None]
    at_zero, at_signs, at_ones = np.asarray(lm.ln_final(probes), np.float64)[0]
    is_centring = bool(np.abs(at_ones - at_zero).max() < 1e-2 * np.abs(at_signs - at_zero).max())
    return (at_signs - at_zero) / (signs - signs.mean() if is_centring else signs), at_zero, is_centring


def _norm_scale(
    residual: np.ndarray, normed: np.ndarray, gain: np.ndarray, mask: np.ndarray, is_centring: bool, dtype: Any
) -> np.ndarray | None:
    """What the norm divided by at each position: the one factor between its input times the gain and its output.

    None where no one factor explains the output.
    """
    expected = gain * (residual - residual.mean(-1, keepdims=True) if is_centring else residual)
    expected, normed = (np.where(mask[..., None], values, 0.0) for values in (expected, normed))
    squares = (expected**2).sum(-1)
    factor = (expected * normed).sum(-1) / np.where(squares > 0, squares, 1.0)
    misfit = np.abs(normed - factor[..., None] * expected).max(-1)
    if (misfit > tolerance(dtype) * np.abs(normed).max(-1)).any():
        return None
    return 1 / np.where(factor != 0, factor, 1.0)
