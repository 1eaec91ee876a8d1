"""Packing: the rules written out by hand on small texts, the order, the split, and the files of large texts.

Source: interp_jax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.data import tokenising
from interp_jax.data.documents import Documents
from interp_jax.data.text_streams import Packed, pack, packed_rows, shuffled
from interp_jax.models.tokenizers import from_gguf_metadata


def changed(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The options with some of them changed."""
    return options | changes


class Letters:
    """A tokenizer whose tokens are characters; it begins a text with BOS if it is told to."""

    bos_id, eos_id = 1, 2

    def __init__(self, *, adds_bos: bool):
        self.adds_bos = adds_bos

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self.bos_id] * (self.adds_bos and add_special_tokens) + [ord(letter) for letter in text]


PLAIN, WITH_BOS = Letters(adds_bos=False), Letters(adds_bos=True)
A, B, C, D, E, F = map(ord, "abcdef")


@pytest.mark.parametrize(
    ("tokenizer", "options", "rows"),
    [
        (PLAIN, {}, [[A, B, C], [2, D, E], [2, F, 2]]),
        (PLAIN, {"separator": None}, [[A, B, C], [D, E, F]]),
        (PLAIN, {"separator": 9}, [[A, B, C], [9, D, E], [9, F, 9]]),
        (PLAIN, {"bos": "sequence"}, [[1, A, B], [1, C, 2], [1, D, E], [1, 2, F]]),  # one token left over
        (PLAIN, {"bos": "document"}, [[1, A, B], [C, 2, 1], [D, E, 2], [1, F, 2]]),
        (PLAIN, {"bos": "document", "separator": None}, [[1, A, B], [C, 1, D], [E, 1, F]]),
        (WITH_BOS, {}, [[1, A, B], [1, C, 2], [1, D, E], [1, 2, F]]),  # as its tokenizer does
        (WITH_BOS, {"bos": None}, [[A, B, C], [2, D, E], [2, F, 2]]),
    ],
)
def test_the_rules_by_hand(tokenizer: Letters, options: dict[str, Any], rows: list[list[int]]) -> None:
    train, held_out = pack(["abc", "", "de", "f"], tokenizer, n_ctx=3, holdout=0, **options)
    assert [train[i].tolist() for i in range(len(train))] == train[:].tolist() == rows
    assert [row.tolist() for row in train] == rows
    assert (train.n_documents, train.n_tokens, train[0].dtype) == (3, 3 * len(rows), np.int32)
    assert train[[2, 0]].tolist() == [rows[2], rows[0]] if len(rows) > 2 else len(rows) == 2
    assert train[-1].tolist() == rows[-1]
    assert (len(held_out), held_out.part) == (0, "held_out")
    with pytest.raises(IndexError):
        train[len(rows)]


def test_the_rule_is_told() -> None:
    train, _ = pack(["abc", "de"], WITH_BOS, n_ctx=3, holdout=0)
    assert train.rule == (3, 2, 1, "sequence")
    assert train.rule.special_tokens == (1, 2)
    assert repr(train) == "Packed(3 x 3 tokens, 2 documents of 2 texts, separator 2, BOS 1 per sequence)"


def test_a_model_a_tokenizer_and_a_function_say_the_same(tiny) -> None:
    options: dict[str, Any] = {"n_ctx": 16, "separator": 7, "holdout": 0.2}
    tokenizer = tiny.tokenizer
    texts = [f"Document {i} about \u0628 and {i * i}." for i in range(20)]
    both = [
        pack(texts, given, **options)
        for given in (tiny, tokenizer, lambda text: tokenizer.encode(text, add_special_tokens=False))
    ]
    for train, held_out in both[1:]:
        assert (train[:] == both[0].train[:]).all()
        assert (held_out[:] == both[0].held_out[:]).all()
    # What is in the sequences is what the tokenizer says of the documents, whole but for the last tokens.
    told = [token for text in texts for token in [*tokenizer.encode(text, add_special_tokens=False), 7]]
    there = np.concatenate([part.tokens for part in both[0]]).tolist()
    assert sorted(there) == sorted(told)


def test_characters_without_a_token_are_left_out() -> None:
    letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": []}
    tokenizer = from_gguf_metadata({**metadata, "tokenizer.ggml.tokens": [c for c in letters if c != "q"]})
    train, _ = pack(["one q two " * 8], tokenizer, n_ctx=8, separator=None, holdout=0)
    assert tokenizer.decode(train.tokens) == "one  two " * 8


def test_an_order_is_a_permutation_of_each_epoch() -> None:
    packed = packed_rows(np.arange(14).reshape(7, 2))
    stream = packed.order(start=0, count=21, seed=3)
    for epoch in range(3):
        assert sorted(stream[7 * epoch : 7 * (epoch + 1)]) == [*range(7)]
    assert stream[:7].tolist() != stream[7:14].tolist()
    # Any part of the stream can be had without what came before.
    assert packed.order(start=5, count=11, seed=3).tolist() == stream[5:16].tolist()
    assert packed.order(start=0, count=21, seed=4).tolist() != stream.tolist()


def test_a_permutation_is_the_same_on_every_machine() -> None:
    # Written down once: a stream that was saved elsewhere goes on here.
    assert shuffled(8, 5, 0, 2).tolist() == [1, 3, 0, 5, 4, 6, 7, 2]
    with pytest.raises(ValueError, match="read-only"):
        shuffled(8, 5, 0, 2)[0] = 1


def test_permutations_are_uniform() -> None:
    # Where the first of 5 lands, 2000 times: 400 each, give or take; six standard deviations are 107.
    first = np.array([shuffled.__wrapped__(5, seed)[0] for seed in range(2000)])
    assert (abs(np.bincount(first, minlength=5) - 400) < 107).all()


def documents_of(packed: Packed) -> set[int]:
    """The numbers of the documents in a part; document i is made of the token i alone."""
    return set(packed.tokens.tolist()) - {10_000}


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("share", [0.1, 0.35, 0.9])
def test_no_document_lies_on_both_sides(share: float, rng) -> None:
    # Documents of many lengths, each of them two or three times, in random order.
    lengths = rng.integers(1, 40, 300)
    texts = [" ".join([str(i)] * int(n)) for i, n in enumerate(lengths)]
    many = [*texts, *texts, *texts[:50]]
    many = [many[i] for i in rng.permutation(len(many))]
    train, held_out = pack(many, numbers, n_ctx=4, separator=10_000, holdout=share)
    assert documents_of(train) | documents_of(held_out) == set(range(300))
    assert documents_of(train) & documents_of(held_out) == set()
    assert train.n_documents + held_out.n_documents == len(many)
    characters = [
        sum(len(text) for text in many if int(text.split()[0]) in documents_of(part)) for part in (train, held_out)
    ]
    # It is nearer than any document could bring it.
    assert abs(characters[1] / sum(characters) - share) < 0.02
    # The order of the documents does not change which are held out.
    _, again = pack(texts, numbers, n_ctx=4, separator=10_000, holdout=share)
    twice = pack([*texts, *texts], numbers, n_ctx=4, separator=10_000, holdout=share).held_out
    assert documents_of(again) == documents_of(twice)


def test_the_smallest_share_holds_out_one_document() -> None:
    texts = ["1 " * 100, "2 " * 50, "3 " * 20]
    train, held_out = pack(texts, numbers, n_ctx=4, separator=None, holdout=0.001)
    assert (documents_of(train), documents_of(held_out)) == ({1, 2}, {3})
    train, held_out = pack(texts, numbers, n_ctx=4, separator=None, holdout=0.999)
    assert documents_of(train)


def test_a_large_text_is_tokenised_once_into_a_file(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Document {i}. " * 5 for i in range(30)]
    options: dict[str, Any] = {"holdout": 0.2, "cache": tmp_path / "cache"}
    in_memory = pack(texts, tiny, n_ctx=12, **options)
    assert not (tmp_path / "cache").exists()
    first = pack(texts, tiny, n_ctx=12, in_memory_bytes=0, **options)
    assert isinstance(first.train.tokens, np.memmap)
    for part, other in zip(first, in_memory, strict=True):
        assert (part[:] == other[:]).all()
        assert (part.n_documents, part.fingerprint) == (other.n_documents, other.fingerprint)

    def never(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patched:
        patched.setattr(tokenising, "_write", never)
        again = pack(texts, tiny, n_ctx=12, in_memory_bytes=0, **options)
        assert (again.train[:] == first.train[:]).all()
        longer = pack(texts, tiny, n_ctx=20, in_memory_bytes=0, **options)  # another cut of the same tokens
        assert (longer.train.tokens == first.train.tokens).all()
        for change in ({"holdout": 0.3}, {"separator": 5}):
            with pytest.raises(AssertionError, match="tokenised again"):
                pack(texts, tiny, n_ctx=12, in_memory_bytes=0, **changed(options, **change))
        with pytest.raises(AssertionError, match="tokenised again"):
            pack([*texts[:-1], "another"], tiny, n_ctx=12, in_memory_bytes=0, **options)
    # A file that was cut off is no file.
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "train").write_bytes((folder / "train").read_bytes()[:-4])
    repaired = pack(texts, tiny, n_ctx=12, in_memory_bytes=0, **options)
    assert (repaired.train[:] == in_memory.train[:]).all()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_tokens_that_cannot_be_written(tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInputError, match=r"The tokens could not be written(.|\n)*Fix: free some space"):
        pack(["one text " * 9, "another"], tiny, n_ctx=4, in_memory_bytes=0, cache=tmp_path / "file")


def test_a_fingerprint_tells_texts_rules_and_tokenizers_apart(tiny) -> None:
    texts = ["one text " * 9, "another " * 5]
    options: dict[str, Any] = {"n_ctx": 4, "separator": 5, "holdout": 0}
    prints = [
        pack(texts, tiny, **options).train.fingerprint,
        pack(texts[::-1], tiny, **options).train.fingerprint,
        pack(texts, tiny, **changed(options, n_ctx=5)).train.fingerprint,
        pack(texts, tiny, **changed(options, separator=6)).train.fingerprint,
        pack(texts, tiny, bos="sequence", **options).train.fingerprint,
        pack(texts, tiny, bos="document", **options).train.fingerprint,
        pack(texts, lambda text: [ord(letter) for letter in text], **options).train.fingerprint,
        pack(texts, lambda text: [ord(letter) + 1 for letter in text], **options).train.fingerprint,
        *(part.fingerprint for part in pack(texts, tiny, **changed(options, holdout=0.3))),
    ]
    assert len(set(prints)) == len(prints)
    assert pack(list(texts), tiny, **options).train.fingerprint == prints[0]


def test_rows_of_ones_own() -> None:
    rows = packed_rows([[3, 4, 5], [6, -1, -1]])
    assert rows[1].tolist() == [6, -1, -1]
    assert rows.rule.special_tokens == ()
    for wrong in ([1, 2], [[0.5]], np.zeros((0, 3), np.int32)):
        with pytest.raises(ShapeError, match=r"packed_rows(.|\n)*integers \[n, n_ctx\](.|\n)*Fix: give one row"):
            packed_rows(wrong)


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([], {}, ("An empty text (0 texts: 0 documents, none with a character", "Fix: look at where the text")),
        (["", ""], {}, ("An empty text (2 texts: 2 documents", "at least one document that is not empty")),
        (
            ["abc", "de"],
            {"n_ctx": 50, "holdout": 0},
            ("A text of 7 tokens (2 documents", "at least 50 tokens", "smaller n_ctx"),
        ),
        (
            ["abc" * 9, "d"],
            {"n_ctx": 4},
            ("A text of 2 tokens (1 documents of 2 texts, held_out)", "hold out another share"),
        ),
        (["abc"], {}, ("holdout=0.1 was given for a text of one document", "whole documents", "pass holdout=0")),
        (["abc", "abc"], {}, ("a text of one document",)),
        (["abc"], {"holdout": 1}, ("holdout=1 was given", "a share from 0")),
        (["abc"], {"holdout": True}, ("holdout=True",)),
        (["abc"], {"n_ctx": 1}, ("n_ctx=1 was given", "at least 2")),
        (["abc"], {"n_ctx": 2.5}, ("n_ctx=2.5",)),
        (["abc"], {"separator": "EOS"}, ("separator='EOS'", 'a token id, "eos", or None', "lm.tokenizer.token_id")),
        (["abc"], {"bos": "documents"}, ("bos='documents'", "Did you mean 'document'?")),
    ],
)
def test_what_cannot_be_packed(texts: list[str], options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises((InvalidInputError, UnknownNameError)) as error:
        pack(texts, PLAIN, **changed({"n_ctx": 3}, **options))
    assert [word for word in words if word not in str(error.value)] == []


def test_a_tokenizer_without_special_tokens_is_not_asked_for_them() -> None:
    with pytest.raises(InvalidInputError, match=r'separator="eos" was given for a tokenizer that has no end of text'):
        pack(["abc"], numbers, holdout=0)
    with pytest.raises(InvalidInputError, match=r"bos='document' was given for a tokenizer that has no BOS"):
        pack(["abc"], numbers, separator=None, bos="document", holdout=0)
    with pytest.raises(InvalidInputError, match=r"A tokenizer of type int was given"):
        pack(["abc"], 7, separator=None, holdout=0)


def test_a_text_that_cannot_be_spelt_is_named(tiny) -> None:
    broken = Documents("a file", lambda: iter(["whole", "half a character: \ud800"]))
    with pytest.raises(InvalidInputError, match="lone surrogate") as error:
        pack(broken, tiny, n_ctx=3, holdout=0)
    assert error.value.__notes__ == ["  In document 1 of a file."]


def test_sequences_spread_over_a_text() -> None:
    packed = packed_rows(np.arange(30).reshape(10, 3))
    assert packed.spread(4)[:, 0].tolist() == [0, 9, 18, 27]
    assert packed.spread(1)[:, 0].tolist() == [0]
