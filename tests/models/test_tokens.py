"""What may be given as tokens, and the words in which everything else is refused.

Source: interp_jax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.models.tokens import check_tokens, is_text

REFUSED = {
    "a text": ("Mary went", InvalidInputError, "Text was given: 'Mary went' in lm", "lm.tokenize(text)"),
    "texts": (["Mary", "went"], InvalidInputError, "Text was given", "lm.tokenize(text)"),
    "floats": (np.ones((1, 2)), ShapeError, "Tokens of dtype float64", "as lm.tokenize returns"),
    "booleans": (np.ones((1, 2), bool), ShapeError, "Tokens of dtype bool", "as lm.tokenize returns"),
    "one row": (np.ones(3, int), ShapeError, "Tokens of shape [3]", "tokens[None]"),
    "a number": (5, ShapeError, "Tokens of shape []", "one row of ids per prompt"),
    "three axes": (np.ones((1, 2, 3), int), ShapeError, "Tokens of shape [1, 2, 3]", "one row of ids per prompt"),
    "no positions": (np.ones((2, 0), int), InvalidInputError, "An empty prompt (tokens of shape [2, 0])", "one token"),
    "no rows": (np.ones((0, 2), int), InvalidInputError, "An empty prompt", "one token"),
    "only padding": ([[1, 2], [-1, -1]], InvalidInputError, "row 1 is all padding", "leave empty rows out"),
    "too large": ([[1, 12], [10, 3]], InvalidInputError, "Token ids 10, 12 were given, the first at row 0, position 1",
                  "own tokenizer"),
    "below padding": ([[1, -2]], InvalidInputError, "Token ids -2", "own tokenizer"),
    "too long": (np.ones((1, 9), int), InvalidInputError, "9 tokens a row", "shorten or split"),
    "ragged": ([[1, 2], [3]], ShapeError, "Rows of different lengths", "pad shorter rows on the left with -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_refused(case: str) -> None:
    tokens, kind, what, fix = REFUSED[case]
    with pytest.raises(kind) as error:
        check_tokens(tokens, d_vocab=10, n_ctx=8, where="lm")
    assert what in str(error.value)
    assert fix in str(error.value).rpartition("Fix:")[2]
    assert "\n  Expected: " in str(error.value)


@pytest.mark.parametrize("kind", [list, np.uint8, np.int64, np.int32, jnp.int32])
def test_accepted(kind) -> None:
    rows = [[0, 9, 3], [7, 1, 2]]
    given = rows if kind is list else (jnp if kind is jnp.int32 else np).asarray(rows, kind)
    tokens = check_tokens(given, d_vocab=10, n_ctx=3)
    assert tokens.dtype == np.int32
    assert isinstance(tokens, jax.Array) == (kind is jnp.int32)
    np.testing.assert_array_equal(tokens, rows)


def test_padding_on_either_side_is_accepted() -> None:
    rows = [[-1, 4, -1]]
    np.testing.assert_array_equal(check_tokens(rows, d_vocab=10), rows)


def test_under_jit_shapes_are_checked_and_values_are_not() -> None:
    checked = jax.jit(lambda tokens: check_tokens(tokens, d_vocab=10))
    assert checked(np.array([[99]], np.int32)).tolist() == [[99]]
    with pytest.raises(ShapeError, match="two axes"):
        checked(np.array([1], np.int32))


def test_without_a_vocabulary_only_the_sign_is_known() -> None:
    assert check_tokens([[10**6]]).tolist() == [[10**6]]
    with pytest.raises(InvalidInputError, match=r"ids from 0, or -1"):
        check_tokens([[-5]])


@pytest.mark.parametrize(
    ("value", "expected"), [("a", True), (["a", "b"], True), ([], False), ([[1]], False), (3, False)]
)
def test_is_text(value, expected: bool) -> None:
    assert is_text(value) is expected
