"""Tokens made visible: nothing that cannot be seen is left, and nothing that can be seen is changed."""

from __future__ import annotations

import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp_jax.figures.plotting import drawable
from interp_jax.figures.token_text import shorten_text, text_width, token_texts, visible


@given(st.text(st.characters(codec=None)))
def test_what_is_shown_can_be_seen(text):
    shown = visible(text)
    assert shown
    assert all(unicodedata.category(char)[0] in "LMNPS" for char in shown)
    shown.encode("utf-8")


@given(st.text(st.characters(categories=["L", "N", "P"]), min_size=1))
def test_visible_text_stays_as_it_is(text):
    assert visible(text) == text


@given(st.text(), st.integers(1, 12))
def test_shortened_text_fits(text, n_columns):
    short = shorten_text(visible(text), n_columns)
    assert text_width(short) <= n_columns
    assert short == visible(text) or short.endswith("…")


def test_widths():
    assert [text_width(text) for text in ("abc", "日本", "e\u0301", "")] == [3, 4, 1, 0]
    assert shorten_text("日本語", 5) == "日本…"


def test_each_distinct_id_is_decoded_once():
    asked = []

    def decode(ids):
        asked.append(int(ids[0]))
        return f" {ids[0]}"

    texts = token_texts(decode, np.array([[3, -1, 3], [5, 3, 5]]))
    assert texts.tolist() == [["·3", "", "·3"], ["·5", "·3", "·5"]]
    assert asked == [3, 5]


@pytest.mark.parametrize("text", ["Mary", "·Mary", "⏎", "…", "−", "‖"])
def test_marks_are_in_the_font_that_comes_with_matplotlib(text):
    assert drawable(text) == text


def test_characters_without_a_glyph_are_boxes():
    assert drawable("a" + chr(sys.maxunicode - 2) + "b") == "a▯b"
