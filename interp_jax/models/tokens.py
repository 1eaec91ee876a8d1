"""Tokens: what may be given where a model reads token ids, and what is refused before anything runs.

Integers of shape `[batch, pos]`; a token of -1 (`PAD`) is padding. Everything else a hand may put there (text, the
output of another tokenizer, a prompt without tokens) is refused with a remedy.

>>> check_tokens([[5, 2, 7]], d_vocab=10)
array([[5, 2, 7]], dtype=int32)
>>> check_tokens([[5, 12]], d_vocab=10, where="lm")
Traceback (most recent call last):
    ...
interp_jax.core.errors.InvalidInputError: Token ids 12 were given, the first at row 0, position 1 in lm.
  Expected: ids from 0 to 9, or -1 for padding.
  Fix: use this model's own tokenizer: lm.tokenize(text).

Sharp edges: one row needs its batch axis too (`tokens[None]`), since the results have one. Under `jax.jit` only
shape and dtype are known, and checked.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.models.upstream import PAD


def check_tokens(
    tokens: Any, *, d_vocab: int | None = None, n_ctx: int | None = None, where: str = "check_tokens"
) -> Any:
    """Tokens as int32, once they are known to be tokens.

    Args:
        tokens: Token ids, `[batch, pos]`, or a list of equally long lists of them.
        d_vocab: Size of the vocabulary, if known.
        n_ctx: Most tokens the model can read, if known.
        where: Name of the call, for error messages.

    Returns:
        The tokens: a NumPy array, or a JAX array if that is what was given.

    Raises:
        InvalidInputError: Text, an empty prompt, ids outside the vocabulary, or more tokens than the model can read.
        ShapeError: Not integers, or not of shape `[batch, pos]`.
    """
    if is_text(tokens):
        raise InvalidInputError(
            four_part(
                f"Text was given: {tokens!r:.60}",
                where=where,
                expected="token ids, integers [batch, pos].",
                fix="tokenize it first: lm.tokenize(text).",
            )
        )
    array = tokens if isinstance(tokens, jax.Array) else _as_array(tokens, where)
    if array.dtype == object:
        raise ShapeError(
            four_part(
                f"{tokens!r:.60} ({type(tokens).__name__}) was given",
                where=where,
                expected="integers [batch, pos].",
                fix='give token ids, as lm.tokenize returns them (of a tokenizer\'s dict, its ["input_ids"]).',
            )
        )
    if 0 not in array.shape and (array.dtype == bool or not jnp.issubdtype(array.dtype, jnp.integer)):
        raise ShapeError(
            four_part(
                f"Tokens of dtype {array.dtype} were given",
                where=where,
                expected="integers [batch, pos].",
                fix="give token ids, as lm.tokenize returns them.",
            )
        )
    if array.ndim != 2 and array.shape != (0,):
        raise ShapeError(
            four_part(
                f"Tokens of shape {list(array.shape)} were given",
                where=where,
                expected="two axes, [batch, pos].",
                fix="for one row write tokens[None]." if array.ndim == 1 else "give one row of ids per prompt.",
            )
        )
    if 0 in array.shape:
        raise InvalidInputError(
            four_part(
                f"An empty prompt (tokens of shape {list(array.shape)}) was given",
                where=where,
                expected="at least one row and one position.",
                fix="give a text of at least one token.",
            )
        )
    if n_ctx is not None and array.shape[1] > n_ctx:
        raise InvalidInputError(
            four_part(
                f"{array.shape[1]} tokens a row were given",
                where=where,
                expected=f"at most n_ctx = {n_ctx}.",
                fix="shorten or split the text.",
            )
        )
    if not isinstance(array, Tracer):
        _check_ids(np.asarray(array), d_vocab, where)
    return array.astype(np.int32)


def _check_ids(tokens: np.ndarray, d_vocab: int | None, where: str) -> None:
    outside = tokens < PAD if d_vocab is None else (tokens < PAD) | (tokens >= d_vocab)
    if outside.any():
        offenders = sorted({int(token) for token in tokens[outside]})
        shown = ", ".join(map(str, offenders[:5])) + (f", ... ({len(offenders)} in all)" if len(offenders) > 5 else "")
        row, position = (int(index) for index in np.argwhere(outside)[0])
        top = "" if d_vocab is None else f" to {d_vocab - 1}"
        raise InvalidInputError(
            four_part(
                f"Token ids {shown} were given, the first at row {row}, position {position}",
                where=where,
                expected=f"ids from 0{top}, or {PAD} for padding.",
                fix="use this model's own tokenizer: lm.tokenize(text).",
            )
        )
    empty = np.flatnonzero((tokens == PAD).all(axis=1))
    if empty.size:
        raise InvalidInputError(
            four_part(
                f"An empty prompt (row {int(empty[0])} is all padding) was given",
                where=where,
                expected="at least one token in every row.",
                fix="leave empty rows out.",
            )
        )


def _as_array(tokens: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(tokens)
    except ValueError:
        raise ShapeError(
            four_part(
                "Rows of different lengths were given",
                where=where,
                expected="integers [batch, pos].",
                fix=f"pad shorter rows on the left with {PAD}, as lm.tokenize(list_of_texts) does.",
            )
        ) from None


def is_text(value: Any) -> bool:
    """Whether a value is a text or a list of texts."""
    return isinstance(value, str) or (
        isinstance(value, Sequence) and len(value) > 0 and all(isinstance(one, str) for one in value)
    )
