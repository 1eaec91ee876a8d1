"""Alignment: what fits is kept, token by token; what does not is named with its reason."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.data.alignment import Dropped, Prompt, align_prompts, encoder, single_tokens

KNOWN = {word: 1000 + i for i, word in enumerate(("the", "cat", "dog", "sat", "ran", "on", "mat", "is", "a"))}


def by_words(text):
    """Known words are a token each, others one per letter; spaces say only where words end."""
    return [i for word in text.split() for i in ([KNOWN[word]] if word in KNOWN else [ord(c) for c in word])]


def test_pairs_become_ids_and_positions():
    prompts = [
        Prompt("the cat sat on", "the dog sat on", " the", " a", {"who": 7, "end": 14}),
        Prompt("a dog ran on", "a cat ran on", " mat", " cat", {"who": 5, "end": 12}),
    ]
    pairs = align_prompts(prompts, by_words, template="pets", seed=5)
    assert len(pairs) == 2
    assert pairs.clean.tolist() == [by_words("the cat sat on"), by_words("a dog ran on")]
    assert pairs.corrupted.tolist() == [by_words("the dog sat on"), by_words("a cat ran on")]
    assert pairs.answer.tolist() == [KNOWN["the"], KNOWN["mat"]]
    assert pairs.wrong.tolist() == [KNOWN["a"], KNOWN["cat"]]
    assert {array.dtype for array in (pairs.clean, pairs.corrupted, pairs.answer, pairs.wrong)} == {np.dtype(np.int32)}
    assert {name: place.tolist() for name, place in pairs.positions.items()} == {"who": [1, 1], "end": [3, 3]}
    assert pairs.differs.tolist() == [[False, True, False, False]] * 2
    assert (pairs.clean_texts[1], pairs.answer_texts[1], pairs.seed) == ("a dog ran on", " mat", 5)
    assert repr(pairs).splitlines() == [
        "PromptPairs(pets: 2 pairs of 4 tokens, seed 5)",
        "  clean      'the cat sat on' -> ' the', not ' a'",
        "  corrupted  'the dog sat on'",
    ]


GOOD = Prompt("the cat sat", "the dog sat", " on", " is")


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        (Prompt("the cat sat", "the bird sat", " on", " is"), "clean has 3 tokens, corrupted 6"),
        (Prompt("", "", " on", " is"), "clean has 0 tokens, corrupted 0"),
        (Prompt("the cat sat", "the  cat sat", " on", " is"), "clean and corrupted are the same"),
        (Prompt("the dog sat", "the cat sat", " at", " is"), "' at' is 2 tokens"),
        (Prompt("the dog sat", "the cat sat", " on", " "), "' ' is 0 tokens"),
        (Prompt("the dog sat", "the cat sat", "mat", " is"), "'mat' changes the tokens before it"),
        (Prompt("the dog sat", "the cat sat", " on", "  on"), "answer and wrong answer are the same token (' on')"),
        (Prompt("the cat", "the dog", " on", " is"), "2 tokens where the others have 3"),
        (
            Prompt("the dog sat", "the cat sat", " on", " is", {"who": 6}),
            "a token goes across the end of who ('the do')",
        ),
    ],
)
def test_what_does_not_fit_is_dropped_and_named(prompt, why):
    pairs = align_prompts([GOOD, prompt, GOOD._replace(answer=" a")], by_words, dropped=[Dropped("before", "a reason")])
    assert pairs.clean_texts == ("the cat sat", "the cat sat")
    assert pairs.dropped == (Dropped("before", "a reason"), Dropped(prompt.clean, why))
    assert why[:40] in repr(pairs)
    with pytest.raises(InvalidInputError) as caught:
        align_prompts([prompt._replace(slots={})] * 2 if "others" not in why and "across" not in why else [], by_words)
    assert "Nothing remains of" in str(caught.value)
    assert "Fix: ask for fewer, or give words that are one token" in str(caught.value)


def test_as_many_as_asked_all_different_and_no_more():
    looked_at = []

    def stream():
        for first in ("the", "the", "a", "is"):
            looked_at.append(first)
            yield Prompt(f"{first} cat sat", f"{first} dog sat", " on", " is")

    assert align_prompts(stream(), by_words, n_pairs=2).clean_texts == ("the cat sat", "a cat sat")
    assert looked_at == ["the", "the", "a"]
    with pytest.raises(
        InvalidInputError, match=r"Only 3 remain of 3 different pairs[\s\S]*Expected: 4 pairs[\s\S]*Fix:"
    ):
        align_prompts(stream(), by_words, n_pairs=4)
    with pytest.raises(InvalidInputError, match=r"n_pairs=0[\s\S]*Fix:"):
        align_prompts(stream(), by_words, n_pairs=0)


def test_the_most_frequent_length_is_kept():
    short = [Prompt(f"{word} cat", f"{word} dog", " on", " is") for word in ("the", "a")]
    pairs = align_prompts([GOOD, *short], by_words)
    assert pairs.clean.shape == (2, 2)
    assert pairs.dropped == (Dropped("the cat sat", "3 tokens where the others have 2"),)


def test_words_of_one_token():
    kept, dropped = single_tokens(["cat", "bird", "dog", "cat"], by_words)
    assert kept == ["cat", "dog"]
    assert dropped == [Dropped("bird", "' bird' is 4 tokens")]


FORMS = {
    "a function": by_words,
    "of an array": lambda text: np.array(by_words(text)),
    "of a batch": lambda text: np.array([by_words(text)]),
    "encode": SimpleNamespace(encode=by_words),
    "encode to ids": SimpleNamespace(encode=lambda text: SimpleNamespace(ids=by_words(text))),
    # transformers has both, and its tokenize gives strings.
    "encode and tokenize": SimpleNamespace(encode=by_words, tokenize=str.split),
    "tokenize": SimpleNamespace(tokenize=lambda text: np.array([by_words(text)], np.int32)),
}


@pytest.mark.parametrize("form", FORMS)
def test_tokenizers_of_any_form(form):
    assert encoder(FORMS[form])("the bird sat") == by_words("the bird sat")
    assert encoder(FORMS[form])("") == []


@pytest.mark.parametrize(
    "function", [str.split, lambda text: 5, lambda text: [[1], [2]], lambda text: {"input_ids": [1]}],
    ids=["strings", "number", "two rows", "mapping"],
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused(function):
    with pytest.raises(ShapeError, match=r"The tokenizer returned [\s\S]* for 'the cat'[\s\S]*Fix: wrap it"):
        encoder(function)("the cat")
    with pytest.raises(InvalidInputError, match=r"A tokenizer of type int[\s\S]*Fix: give the model itself"):
        encoder(5)
