"""Prompt families: with SmolLM2's real tokenizer and with one that knows only words, each pair is what it says."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, UnknownNameError
from interp_jax.data import prompts, words
from interp_jax.data.prompts import FAMILIES, induction_pairs, ioi_pairs, random_text_pairs
from interp_jax.models.loading import PUBLISHED
from interp_jax.models.tokenizers import from_gguf_metadata
from interp_jax.models.weights.fetching import fetched
from interp_jax.models.weights.gguf_file import open_file


class Words:
    """A tokenizer of words and marks; numbers fall into pairs of digits, and it begins each text with a token."""

    def __init__(self):
        self.known = ["<begin>"]

    def encode(self, text):
        pieces = re.findall(r"[A-Za-z]+|\d\d?|[^\w\s]", text)
        self.known += [piece for piece in dict.fromkeys(pieces) if piece not in self.known]
        return [0, *map(self.known.index, pieces)]

    def decode(self, tokens):
        return " ".join(self.known[i] for i in tokens)


@pytest.fixture(scope="module")
def smollm2_tokenizer():
    """Of the real model's file only the header is read."""
    return from_gguf_metadata(dict(open_file(fetched(PUBLISHED["smollm2-135m"])).metadata))


@pytest.fixture(params=["smollm2", "words"])
def tokenizer(request, smollm2_tokenizer):
    return smollm2_tokenizer if request.param == "smollm2" else Words()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_aligned(tokenizer, family):
    pairs = FAMILIES[family](tokenizer, 12, seed=7)
    assert pairs.clean.shape == pairs.corrupted.shape == (12, pairs.clean.shape[1])
    assert pairs.clean.dtype == pairs.corrupted.dtype == pairs.answer.dtype == pairs.wrong.dtype == np.int32
    assert (pairs.template, pairs.seed) == (family, 7)
    assert pairs.differs.any(1).all()
    assert (pairs.answer != pairs.wrong).all()
    assert (pairs.positions["end"] == pairs.clean.shape[1] - 1).all()
    rows = {
        (*clean, *corrupted) for clean, corrupted in zip(pairs.clean.tolist(), pairs.corrupted.tolist(), strict=True)
    }
    assert len(rows) > 8
    if family == "random text":
        return
    for row in range(12):
        clean, answer = pairs.clean_texts[row], pairs.answer_texts[row]
        assert tokenizer.encode(clean) == pairs.clean[row].tolist()
        assert tokenizer.encode(pairs.corrupted_texts[row]) == pairs.corrupted[row].tolist()
        assert tokenizer.encode(clean + answer) == [*pairs.clean[row], pairs.answer[row]]
        assert tokenizer.encode(clean + pairs.wrong_texts[row]) == [*pairs.clean[row], pairs.wrong[row]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides(smollm2_tokenizer, family):
    one, same, other = (FAMILIES[family](smollm2_tokenizer, 6, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.clean, same.clean)
    np.testing.assert_array_equal(one.answer, same.answer)
    assert one.dropped == same.dropped
    assert one.clean.shape != other.clean.shape or (one.clean != other.clean).any()


@pytest.mark.parametrize("corruption", prompts.CORRUPTIONS)
@pytest.mark.parametrize("order", prompts.ORDERS)
def test_indirect_objects(tokenizer, order, corruption):
    pairs = ioi_pairs(tokenizer, 10, order=order, corruption=corruption, seed=3)
    rows, places = np.arange(10), pairs.positions
    at = {name: pairs.clean[rows, place] for name, place in places.items()}
    # The subject is there twice, the indirect object once, and it is the answer.
    np.testing.assert_array_equal(at["S1"], at["S2"])
    np.testing.assert_array_equal((pairs.clean == at["S1"][:, None]).sum(1), 2)
    np.testing.assert_array_equal((pairs.clean == at["IO"][:, None]).sum(1), 1)
    assert [text.strip() for text in pairs.answer_texts] == [tokenizer.decode([i]).strip() for i in at["IO"]]
    assert [text.strip() for text in pairs.wrong_texts] == [tokenizer.decode([i]).strip() for i in at["S1"]]
    # One token differs, the second subject.
    np.testing.assert_array_equal(np.argwhere(pairs.differs), np.stack([rows, places["S2"]], axis=1))
    replaced = pairs.corrupted[rows, places["S2"]]
    if corruption == "swap":
        np.testing.assert_array_equal(replaced, at["IO"])
    else:
        assert not ((replaced == at["IO"]) | (replaced == at["S1"])).any()
    is_io_first = places["IO"] < places["S1"]
    assert is_io_first.all() if order == "ABBA" else not is_io_first.all()
    assert not is_io_first.any() if order == "BABA" else is_io_first.any()


def test_names_that_are_not_one_token_are_left_out(smollm2_tokenizer):
    names = ["Mary", "John", "Xanthippe", "Tom", "Zebulon"]
    pairs = ioi_pairs(smollm2_tokenizer, 8, names=names, templates=prompts.IOI_TEMPLATES[1:2])
    assert {text.strip() for text in pairs.answer_texts} <= {"Mary", "John", "Tom"}
    left_out = {one.what: one.why for one in pairs.dropped if one.what in names}
    assert set(left_out) == {"Xanthippe", "Zebulon"}
    assert re.fullmatch(r"' Xanthippe' is \d tokens", left_out["Xanthippe"])
    with pytest.raises(
        InvalidInputError, match=r"2 names that are one token remain of 3 \(Zebulon: [\s\S]*at least 3[\s\S]*Fix:"
    ):
        ioi_pairs(smollm2_tokenizer, 8, names=["Mary", "John", "Zebulon"])


def test_more_pairs_than_there_are(smollm2_tokenizer):
    with pytest.raises(InvalidInputError, match=r"Only \d+ remain [\s\S]*Expected: 600 pairs[\s\S]*Fix: ask for fewer"):
        prompts.city_country_pairs(smollm2_tokenizer, 600, cities={"France": ["Paris"], "Italy": ["Rome", "Milan"]})


def test_cities_and_their_countries(tokenizer):
    pairs = prompts.city_country_pairs(tokenizer, 15, seed=2)
    country_of = {city: country for country, cities in words.CITIES.items() for city in cities}
    for row in range(15):
        both = pairs.clean_texts[row] + pairs.corrupted_texts[row]
        clean, corrupted = re.findall(r"city of (\w+) is", both)
        assert (country_of[clean], country_of[corrupted]) == (pairs.answer_texts[row][1:], pairs.wrong_texts[row][1:])
        end = pairs.positions["city"][row] + 1
        assert tokenizer.decode(pairs.clean[row, :end].tolist()).endswith(clean)


def test_later_and_earlier_years(tokenizer):
    pairs = prompts.greater_than_pairs(tokenizer, 15, seed=2)
    n_digits = 2 if isinstance(tokenizer, Words) else 1  # SmolLM2 splits all digits
    for row in range(15):
        century, year, again = re.search(r"year (\d\d)(\d\d) to the year (\d\d)$", pairs.clean_texts[row]).groups()  # type: ignore[union-attr]
        assert century == again
        assert pairs.corrupted_texts[row] == pairs.clean_texts[row].replace(century + year, f"{century}01")
        answer, wrong = pairs.answer_texts[row], pairs.wrong_texts[row]
        assert len(answer) == len(wrong) == n_digits
        assert int(wrong) < int(year[:n_digits]) < int(answer)
        end = pairs.positions["year"][row] + 1
        assert tokenizer.decode(pairs.clean[row, :end].tolist()).replace(" ", "").endswith(century + year)


def test_a_tokenizer_that_does_not_cut_years_is_told_so():
    whole = SimpleNamespace(encode=lambda text: [hash(word) % 9973 for word in text.split()])
    with pytest.raises(InvalidInputError, match=r"Nothing remains [\s\S]*changes the tokens before it[\s\S]*Fix:"):
        prompts.greater_than_pairs(whole, 3)


def test_articles(tokenizer):
    pairs = prompts.a_an_pairs(tokenizer, 15, seed=2)
    assert set(pairs.answer_texts) == {" a", " an"}
    for row in range(15):
        clean, corrupted = (
            re.findall(r"one (\w+)\.", texts[row]) for texts in (pairs.clean_texts, pairs.corrupted_texts)
        )
        assert clean[0] == corrupted[0]
        assert clean[1] in words.NOUNS[pairs.answer_texts[row][1:]]
        assert corrupted[1] in words.NOUNS[pairs.wrong_texts[row][1:]]
        assert re.search(rf"called {'an' if clean[0][0] in 'aeiou' else 'a'} {clean[0]}", pairs.clean_texts[row])


def test_random_texts_go_on_as_they_do(tokenizer):
    pairs = random_text_pairs(tokenizer, 9, n_pos=11, seed=4)
    assert pairs.clean.shape == (9, 11)
    for row in range(9):
        assert tokenizer.encode(pairs.clean_texts[row])[:12] == [*pairs.clean[row], pairs.answer[row]]
        assert tokenizer.encode(pairs.corrupted_texts[row])[:12] == [*pairs.corrupted[row], pairs.wrong[row]]


def test_random_texts_of_ones_own():
    texts = ["one two three four", "five six seven eight", "too short"]
    pairs = random_text_pairs(Words(), 2, n_pos=3, texts=texts)
    assert sorted(pairs.clean_texts) == sorted(texts[:2])
    assert [one.what for one in pairs.dropped] == ["too short"]
    assert pairs.dropped[0].why == "3 tokens, where 4 are needed"
    for options, words_of_it in (
        ({"n_pairs": 3}, "which make 2 pairs"),
        ({"n_pairs": 1, "n_pos": 9}, "0 different texts of more than 9 tokens"),
        ({"n_pairs": 0}, "n_pairs=0"),
        ({"n_pairs": 1, "n_pos": 0}, "n_pos=0"),
    ):
        with pytest.raises(InvalidInputError, match=rf"{words_of_it}[\s\S]*Fix:"):
            random_text_pairs(Words(), options["n_pairs"], n_pos=options.get("n_pos", 3), texts=texts)


def test_induction():
    pairs = induction_pairs([*range(100, 140), 100], 6, n_period=7, n_repeated=3, prefix=[5, 6], seed=1)
    r, s = pairs.clean[:, 2:9], pairs.corrupted[:, 2:9]
    assert pairs.clean.shape == (6, 12)
    assert (pairs.clean[:, :2] == [5, 6]).all()
    assert (pairs.corrupted[:, :2] == [5, 6]).all()
    np.testing.assert_array_equal(pairs.clean[:, 9:], r[:, :3])
    np.testing.assert_array_equal(pairs.corrupted[:, 9:], r[:, :3])
    np.testing.assert_array_equal(pairs.answer, r[:, 3])
    np.testing.assert_array_equal(pairs.wrong, s[:, 3])
    assert all(len({*one, *other}) == 14 for one, other in zip(r.tolist(), s.tolist(), strict=True))
    assert set(r.ravel()) <= set(range(100, 140))
    assert {name: place.tolist() for name, place in pairs.positions.items()} == {
        "answer": [5] * 6,
        "previous": [4] * 6,
        "end": [11] * 6,
    }
    assert repr(pairs) == "PromptPairs(induction: 6 pairs of 12 tokens, seed 1)"
    assert induction_pairs(50, 2, n_period=25, n_repeated=24).clean.shape == (2, 49)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ioi_pairs(Words(), 2, order="ABAB"), UnknownNameError, r"order='ABAB'[\s\S]*ABBA, BABA, both"),
        (lambda: ioi_pairs(Words(), 2, corruption="swp"), UnknownNameError, "Did you mean 'swap'"),
        (lambda: ioi_pairs(Words(), 2, templates=["{A} {C}"]), UnknownNameError, r"the field 'C'[\s\S]*A, B, place"),
        (lambda: ioi_pairs(Words(), 0), InvalidInputError, "n_pairs=0"),
        (lambda: induction_pairs(100, 2, n_period=4, n_repeated=4), InvalidInputError, "n_repeated=4"),
        (lambda: induction_pairs(100, 2, n_repeated=0), InvalidInputError, "n_repeated=0"),
        (lambda: induction_pairs(15, 2), InvalidInputError, "and 15 tokens"),
        (lambda: induction_pairs(100, 0), InvalidInputError, "n_pairs=0"),
    ],
    ids=["order", "corruption", "field", "no pairs", "all repeated", "none repeated", "few tokens", "no induction"],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=rf"{message}[\s\S]*Fix:"):
        make()
