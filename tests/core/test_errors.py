"""The error family and the four parts of its messages.

Source: interp_jax.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp_jax.core import errors
from interp_jax.core.errors import (
    InterpError,
    InvalidInputError,
    UnknownNameError,
    check_choice,
    check_number,
    closest,
    four_part,
    shorten,
)

FAMILY = [
    member
    for _, member in inspect.getmembers(errors, inspect.isclass)
    if issubclass(member, BaseException) and member is not InterpError
]


@pytest.mark.parametrize("error", FAMILY, ids=lambda error: error.__name__)
def test_one_except_clause_catches_the_family(error: type[Exception]) -> None:
    with pytest.raises(InterpError, match="words"):
        raise error("words")


@pytest.mark.parametrize("error", FAMILY, ids=lambda error: error.__name__)
def test_each_error_is_also_a_builtin_one(error: type[Exception]) -> None:
    # Code that knows nothing of this package still catches the kind of mistake it is.
    assert issubclass(error, (ValueError, LookupError, RuntimeError, OSError))


def test_the_message_of_an_unknown_name_shows_the_text_not_its_repr() -> None:
    # KeyError shows repr(message), with its line breaks escaped; a LookupError must not.
    assert str(errors.UnknownNameError("line one\nline two")) == "line one\nline two"


def test_parts_come_in_order() -> None:
    message = four_part("Text was given", where="lm(tokens)", expected="integers.", fix="call lm.tokenize(text).")
    assert message == "Text was given in lm(tokens).\n  Expected: integers.\n  Fix: call lm.tokenize(text)."


def test_names_bring_the_nearest_one() -> None:
    message = four_part("Unknown 'mlp_outs'", names=["q", "mlp_out", "attn_out"], given="mlp_outs", fix="use one.")
    assert message.splitlines() == [
        "Unknown 'mlp_outs'. Did you mean 'mlp_out'?",
        "  Known: q, mlp_out, attn_out",
        "  Fix: use one.",
    ]


def test_nothing_near_means_no_suggestion() -> None:
    assert "Did you mean" not in four_part("Unknown 'zzz'", names=["mlp_out"], given="zzz", fix="use one.")


def test_no_names_at_all() -> None:
    assert "  Known: (none)\n" in four_part("Unknown 'q'", names=[], given="q", fix="add a tag.")


def test_a_note_follows_the_names() -> None:
    message = four_part("Unknown 'q'", names=["k", "v"], note="layers 0 to 3", fix="use one.")
    assert "  Known: k, v (layers 0 to 3)\n" in message


def test_names_may_be_an_iterator() -> None:
    # They are read twice: for the suggestion and for the list.
    message = four_part("Unknown 'kk'", names=iter(["k", "kv"]), given="kk", fix="use one.")
    assert "Did you mean" in message
    assert "Known: k, kv" in message


def test_a_choice_is_one_of_the_names() -> None:
    check_choice("wide", iter(["wide", "narrow"]), what="width", where="a test")
    with pytest.raises(UnknownNameError, match=r"Unknown width 'wid' in a test\. Did you mean 'wide'") as raised:
        check_choice("wid", iter(["wide", "narrow"]), what="width", where="a test")
    assert "Known: wide, narrow\n  Fix: use one of these." in str(raised.value)
    with pytest.raises(UnknownNameError, match=r"Unknown width \['wide'\]"):
        check_choice(["wide"], ("wide",), what="width", where="a test")


def test_closest_first() -> None:
    assert closest("mlp_outs", ["attn_out", "mlp_out", "mlp_pre"], n=3)[0] == "mlp_out"
    assert closest("mlp_out", ["mlp_out"]) == ["mlp_out"]
    assert closest("unrelated", ["q"]) == []


def test_shorten_counts_what_it_leaves_out() -> None:
    assert shorten(["a", "b"]) == "a, b"
    assert shorten(list("abcd"), limit=4) == "a, b, c, d"
    assert shorten(list("abcde"), limit=2) == "a, b, ... (5 in all)"
    assert shorten(iter("abc"), limit=1) == "a, ... (3 in all)"


@given(st.lists(st.text("abc_", min_size=1), max_size=40), st.integers(1, 30))
def test_shorten_keeps_order_and_limit(names: list[str], limit: int) -> None:
    text = shorten(names, limit=limit)
    if len(names) <= limit:
        assert text == ", ".join(names)
    else:
        assert text == ", ".join(names[:limit]) + f", ... ({len(names)} in all)"


def test_numbers_within_their_bounds() -> None:
    for number in (1, 3, np.int32(2)):
        check_number(number, what="k", where="top", is_whole=True, at_least=1, at_most=3)
    for number in (0.5, 0, np.float32(0.5)):
        check_number(number, what="beta", where="adam", at_least=0, below=1)
    for wrong in (0, 4, 2.0, True, "2", None, float("nan")):
        with pytest.raises(InvalidInputError) as info:
            check_number(wrong, what="k", where="top", is_whole=True, at_least=1, at_most=3)
        assert str(info.value) == (
            f"k = {wrong!r} was given in top.\n  Expected: a whole number (an int), at least 1, at most 3.\n"
            "  Fix: give such a number for k."
        )
    for wrong in (1, -0.1, float("nan"), float("inf"), False, 1j):
        with pytest.raises(InvalidInputError, match="a finite number, at least 0, below 1"):
            check_number(wrong, what="beta", where="adam", at_least=0, below=1)
    with pytest.raises(InvalidInputError, match="above 0"):
        check_number(0, what="scale", where="top", above=0)
