"""Llama 3's rule for GGUF files: the ids of a tokenizer in plain Python, with Hugging Face's own expression.

Source: interp_jax.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from interp_jax.models.tokenizers import Tokenizer, from_gguf_metadata
from tests.models.weights.gguf_files import byte_letters

# What Llama 3's tokenizer.json says, but for its inline flag, which is spelt out.
EXPRESSION = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "2 3", "12 3", "' L"]
# The last but one is a token no merge leads to.
TOKENS = [*byte_letters(), "Ġt", "he", "Ġthe", "12", "23", "123", "'L", "Ġtomato", "<|begin_of_text|>"]
BOS = len(TOKENS) - 1
TEXTS = st.one_of(
    st.lists(
        st.sampled_from(
            ["the", " the", " tomato", "tomato", "12345", "'LL", "don't", "\n", "  ", "\r\n\n", "!?", "é", "٣", "_x"]
        ),
        max_size=10,
    ).map("".join),
    st.text(max_size=30),
)


def made(**changes: Any) -> Tokenizer:
    return from_gguf_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.token_type": [1] * BOS + [3],
            "tokenizer.ggml.bos_token_id": BOS,
            **changes,
        }
    )


TOKENIZER = made()


def ids_by_hand(text: str) -> list[int]:
    """The same ids by the textbook: cut, spell as bytes, take whole tokens, else merge the best pair first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    found = []
    for piece in regex.findall(EXPRESSION, text):
        parts = [letters[byte] for byte in piece.encode()]
        if "".join(parts) in TOKENS:
            parts = ["".join(parts)]
        while ranks := [
            (MERGES.index(pair), i) for i, pair in enumerate(map(" ".join, itertools.pairwise(parts))) if pair in MERGES
        ]:
            _, i = min(ranks)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [TOKENS.index(part) for part in parts]
    return found


@given(text=TEXTS)
def test_ids_are_those_of_the_textbook(text: str) -> None:
    if "<|begin_of_text|>" not in text:
        assert TOKENIZER.encode(text, add_special_tokens=False) == ids_by_hand(text)


def test_a_piece_that_is_a_token_is_that_token() -> None:
    assert TOKENIZER.strings(TOKENIZER.encode(" tomato 123", add_special_tokens=False)) == [" tomato", " ", "123"]
    # Not so under GPT-2's rule.
    assert len(made(**{"tokenizer.ggml.pre": "gpt-2"}).encode(" tomato", add_special_tokens=False)) > 1


@pytest.mark.parametrize(("said", "begins"), [(None, True), (True, True), (False, False)])
def test_texts_begin_with_the_first_token_unless_told_otherwise(said: bool | None, begins: bool) -> None:
    changes = {} if said is None else {"tokenizer.ggml.add_bos_token": said}
    ids = made(**changes).encode(" the")
    assert ids == ([BOS] if begins else []) + [TOKENS.index("Ġthe")]
