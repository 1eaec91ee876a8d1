r"""Token strings made visible: a space at the edge of a token, a line break or an empty token must be seen.

>>> visible(" Mary"), visible("a\nb"), visible(""), visible("\u200b")
('·Mary', 'a⏎b', '∅', '⟨U+200B⟩')
>>> [shorten_text(text, 6) for text in ("·Mary", "·electricity")]
['·Mary', '·elec…']

Sharp edges: a token that holds '·' itself looks like one with a space. A token that is a part of a UTF-8 character
decodes to '\ufffd'; the characters only exist once their parts stand side by side.

Source: interp_jax.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

_MARKS = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥"}
# Letters, marks, numbers, punctuation and symbols show themselves; separators and control codes do not.
_SHOWN_CATEGORIES = "LMNPS"


def visible(text: str) -> str:
    """The text with everything that cannot be seen replaced by a mark.

    Args:
        text: The string of a token.

    Returns:
        A string without white space or control characters, never empty.
    """
    marked = "".join(
        _MARKS.get(char) or (char if unicodedata.category(char)[0] in _SHOWN_CATEGORIES else f"⟨U+{ord(char):04X}⟩")
        for char in text
    )
    return marked or "∅"


def token_texts(decode: Callable[[Any], str], ids: Any) -> np.ndarray:
    """Visible strings of token ids, each distinct id decoded once.

    Args:
        decode: From a one-dimensional array of ids to their text: `lm.decode`.
        ids: Integers of any shape; negative ids are padding and become "".

    Returns:
        An object array of strings, of the shape of `ids`.
    """
    ids = np.asarray(ids)
    distinct, inverse = np.unique(ids, return_inverse=True)
    texts = np.empty(distinct.shape, object)
    texts[:] = ["" if token < 0 else visible(decode(np.array([token], np.int32))) for token in distinct.tolist()]
    return texts[inverse].reshape(ids.shape)


def shorten_text(text: str, n_columns: int) -> str:
    """The text cut to a width in terminal columns, with an ellipsis where something is missing.

    Args:
        text: A visible string.
        n_columns: Columns there are; wide (East Asian) characters take two.

    Returns:
        A string at most `n_columns` wide.
    """
    if text_width(text) <= n_columns:
        return text
    kept = ""
    for char in text:
        if text_width(kept + char) > n_columns - 1:
            break
        kept += char
    return kept + "…"


def text_width(text: str) -> int:
    """Columns a text takes in a terminal: 2 for wide characters, 0 for combining marks."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
