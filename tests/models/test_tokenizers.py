"""Tokenizers: the same ids as transformers' own, every text back as it was, mistakes in words.

The oracle is transformers' GPT2Tokenizer, which is plain Python (its own regular expression, its own merging) and
shares nothing with the `tokenizers` library. It knows GPT-2's rule only; the rule of "smollm" (every numeric character
is a word of its own) is put around it here.

Source: interp_jax.
"""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hugging_face
from hypothesis import given
from hypothesis import strategies as st

from interp_jax.core.errors import InvalidInputError, LoadError, UnsupportedModelError
from interp_jax.models.loading import PUBLISHED
from interp_jax.models.tokenizers import Tokenizer, from_directory, from_gguf_metadata
from interp_jax.models.weights.fetching import fetched
from interp_jax.models.weights.gguf_file import open_file
from tests.models.weights.gguf_files import ORACLES, TINY_LLAMA, byte_letters

# Pieces that the rules treat differently: contractions, digits of several scripts, spaces, marks, emoji, controls.
_SPACES = ("  ", "\n", "\n\n ", "\t", "\r\n", "\u00a0", "\u2003")
_MARKS = ("$3.50", "...", "—", "<|", "|>", "_x", "\u200d", "\u0000", "🙂")
_WORDS = ("'s", "'LL", "don't", "The", " the", "12", "½", "٣", "Ⅷ", "é", "e\u0301", "日本", "ß", "a1b2")
FRAGMENTS = st.sampled_from([*_SPACES, *_MARKS, *_WORDS])
TEXTS = st.one_of(st.lists(FRAGMENTS, max_size=12).map("".join), st.text(max_size=40))


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """The header of SmolLM2-135M's file."""
    return dict(open_file(fetched(PUBLISHED["smollm2-135m"])).metadata)


@pytest.fixture(scope="module")
def smollm2(metadata: dict[str, Any]) -> Tokenizer:
    return from_gguf_metadata(metadata)


@pytest.fixture(scope="module")
def plain_gpt2(metadata: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' GPT2Tokenizer in plain Python, with SmolLM2's vocabulary."""
    from transformers import GPT2Tokenizer

    directory = tmp_path_factory.mktemp("gpt2")
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#", *metadata["tokenizer.ggml.merges"], ""]), encoding="utf-8")
    files = (str(directory / "vocab.json"), str(directory / "merges.txt"))
    return GPT2Tokenizer(*files, clean_up_tokenization_spaces=False)


def words_of_smollm(text: str) -> list[str]:
    """A text cut around every numeric character, by Unicode's own tables."""
    cut = [unicodedata.category(character).startswith("N") for character in text]
    groups = itertools.groupby(range(len(text)), key=lambda i: (cut[i], i if cut[i] else None))
    return ["".join(text[i] for i in group) for _, group in groups]


def spellable(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.lost_bytes.isdisjoint(text.encode())


@given(text=TEXTS)
def test_smollm2_gives_the_ids_of_an_independent_implementation(text: str, smollm2: Tokenizer, plain_gpt2: Any):
    text = "".join(character for character in text if spellable(smollm2, character))
    expected = [
        token for word in words_of_smollm(text) for token in plain_gpt2.convert_tokens_to_ids(_cut(plain_gpt2, word))
    ]
    assert smollm2.encode(text) == expected


@given(text=TEXTS)
def test_the_rule_of_gpt2_gives_the_ids_of_an_independent_implementation(
    text: str, metadata: dict[str, Any], plain_gpt2: Any
):
    tokenizer = _with_rule(metadata, "gpt-2")
    text = "".join(character for character in text if spellable(tokenizer, character))
    assert tokenizer.encode(text) == plain_gpt2.convert_tokens_to_ids(_cut(plain_gpt2, text))


def _cut(plain_gpt2: Any, text: str) -> list[str]:
    # Below `tokenize`, which would look for special tokens first and strip the spaces around them.
    return plain_gpt2._tokenize(text)


_WITH_RULE: dict[str, Tokenizer] = {}


def _with_rule(metadata: dict[str, Any], rule: str) -> Tokenizer:
    if rule not in _WITH_RULE:
        _WITH_RULE[rule] = from_gguf_metadata(metadata | {"tokenizer.ggml.pre": rule})
    return _WITH_RULE[rule]


@given(text=TEXTS)
def test_every_text_comes_back(text: str, smollm2: Tokenizer):
    kept = "".join(character for character in text if spellable(smollm2, character))
    ids = smollm2.encode(kept)
    assert smollm2.decode(ids) == kept
    assert all(0 <= token < smollm2.d_vocab for token in ids)
    assert smollm2.encode(text, drop_unknown=True) == ids
    if kept != text:
        with pytest.raises(InvalidInputError, match=r"Character U\+[0-9A-F]{4,6} at position"):
            smollm2.encode(text)


@given(text=TEXTS)
def test_every_text_comes_back_from_a_vocabulary_of_all_bytes(text: str):
    tokenizer = from_directory(TINY_LLAMA)
    assert tokenizer is not None
    assert tokenizer.lost_bytes == frozenset()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("smollm", ["Pay", " $", "1", "2", "3", "4", ".", "5", "0", ",", " don", "'t", "!"]),
        ("gpt-2", ["Pay", " $", "1234", ".", "50", ",", " don", "'t", "!"]),
        # llama.cpp's default cuts marks off before it looks for words, and digits into threes.
        ("default", ["Pay", " ", "$", "123", "4", ".", "50", ",", " don", "'", "t", "!"]),
    ],
)
def test_what_each_rule_cuts(metadata: dict[str, Any], rule: str, pieces: list[str]):
    backend = _with_rule(metadata, rule).backend
    cut = backend.pre_tokenizer.pre_tokenize_str("Pay $1234.50, don't!")
    assert [piece.replace("Ġ", " ") for piece, _ in cut] == pieces


def test_smollm2_is_what_its_authors_published(smollm2: Tokenizer):
    assert repr(smollm2) == "Tokenizer(49,152 tokens, bos_id=1, eos_id=2)"
    assert smollm2.strings([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    prompt = "<|im_start|>user\nHi 42<|im_end|>\n"
    assert smollm2.encode(prompt)[0] == 1
    assert smollm2.encode(prompt).count(2) == 1
    assert smollm2.decode(smollm2.encode(prompt)) == prompt
    assert smollm2.decode(smollm2.encode(prompt), skip_special_tokens=True) == "user\nHi 42\n"
    assert smollm2.encode("") == []
    # Twenty-one bytes have no token: five controls that occur in text, and bytes UTF-8 hardly uses.
    assert len(smollm2.lost_bytes) == 21
    assert 0xC0 in smollm2.lost_bytes


def test_ids_agree_with_the_recorded_ones_of_transformers(smollm2: Tokenizer):
    with np.load(ORACLES / "smollm2_torch.npz") as recorded:
        for i, prompt in enumerate(recorded["prompts"].tolist()):
            assert smollm2.encode(prompt) == recorded[f"tokens_{i}"].tolist()


def test_strings_and_single_tokens(smollm2: Tokenizer):
    ids = smollm2.encode("When Mary 日 left")
    assert smollm2.strings(ids)[:2] == ["When", " Mary"]
    assert "\ufffd" in "".join(smollm2.strings(smollm2.encode("🙂")))
    assert smollm2.strings(np.array([-1, *ids[:2]])) == ["", "When", " Mary"]
    assert smollm2.token_id(" Mary") == ids[1]
    with pytest.raises(InvalidInputError) as caught:
        smollm2.token_id("Mary Poppins")
    assert "'Mary Poppins' is not one token but " in str(caught.value)
    assert "['M', 'ary', " in str(caught.value) or "['Mary', " in str(caught.value)
    assert "words inside a text carry their leading space" in str(caught.value)


def test_padding_says_nothing_and_other_ids_are_checked(smollm2: Tokenizer):
    ids = smollm2.encode("to the store")
    assert smollm2.decode([-1, -1, *ids]) == "to the store"
    assert smollm2.decode(np.array(ids, np.int32)) == "to the store"
    with pytest.raises(InvalidInputError) as caught:
        smollm2.decode([*ids, 49152, 50000])
    assert str(caught.value) == (
        "Token ids outside the vocabulary: [49152, 50000] in decode.\n"
        "  Expected: ids from 0 to 49151, or negative for padding.\n"
        "  Fix: pass token ids, not positions or logits."
    )


@pytest.mark.parametrize("text", [None, 3, ["a", "b"], b"bytes"])
def test_what_is_no_text(smollm2: Tokenizer, text: Any):
    with pytest.raises(InvalidInputError, match="Not a text: ") as caught:
        smollm2.encode(text)
    assert f"({type(text).__name__}) in encode." in str(caught.value)
    assert "use lm.tokenize(list)" in str(caught.value)


def test_half_a_character(smollm2: Tokenizer):
    with pytest.raises(InvalidInputError, match=r"lone surrogate\) at position 2"):
        smollm2.encode("ab\ud83d")


def test_a_character_without_a_token(smollm2: Tokenizer):
    with pytest.raises(InvalidInputError) as caught:
        smollm2.encode("é ab\x04c")
    assert str(caught.value) == (
        "Character U+0004 at position 4, which the vocabulary cannot spell in encode.\n"
        "  Expected: text made of characters the model has tokens for.\n"
        "  Fix: remove it, or pass drop_unknown=True to leave such characters out."
    )


def test_a_tokenizer_can_be_sent_to_another_process(smollm2: Tokenizer):
    copy = pickle.loads(pickle.dumps(smollm2))
    assert copy.encode("to the store 12") == smollm2.encode("to the store 12")
    assert (copy.bos_id, copy.lost_bytes) == (smollm2.bos_id, smollm2.lost_bytes)


# -- descriptions in GGUF metadata


def description(**changes: Any) -> dict[str, Any]:
    tokens = [*byte_letters(), "Ġt", "<s>", "</s>", "<tool>"]
    made = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": ["Ġ t"]}
    made |= {"token_type": [1] * 257 + [3, 3, 4], "bos_token_id": 257, "eos_token_id": 258}
    return {f"tokenizer.ggml.{key}": value for key, value in (made | changes).items() if value is not None}


def test_first_and_last_tokens_are_added_when_the_file_says_so():
    assert from_gguf_metadata(description()).encode(" t") == [256]
    assert from_gguf_metadata(description(add_bos_token=True)).encode(" t") == [257, 256]
    both = from_gguf_metadata(description(add_bos_token=True, add_eos_token=True))
    assert both.encode(" t") == [257, 256, 258]
    assert both.encode(" t", add_special_tokens=False) == [256]
    assert from_gguf_metadata(description(add_eos_token=True)).encode("") == [258]


def test_control_and_user_defined_tokens():
    tokenizer = from_gguf_metadata(description())
    ids = tokenizer.encode("<s> t<tool>")
    assert ids == [257, 256, 259]
    assert tokenizer.decode(ids) == "<s> t<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == " t<tool>"  # a tool's name is text


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": "llama"}, UnsupportedModelError, "Tokenizer of kind 'llama' (tokenizer.ggml.model) in file."),
        (
            {"pre": "smollm2"},
            UnsupportedModelError,
            "Unknown pre-tokenizer 'smollm2' (tokenizer.ggml.pre) in file. Did you ",
        ),
        ({"tokens": None}, LoadError, "Damaged tokenizer.ggml.tokens (none) in file."),
        ({"merges": None}, LoadError, "Damaged tokenizer.ggml.merges (none) in file."),
        ({"merges": ["Ġ q"]}, LoadError, "Damaged tokenizer.ggml.merges ("),
        ({"merges": ["Ġ t x"]}, LoadError, "Damaged tokenizer.ggml.merges ("),
        ({"tokens": [1, 2]}, LoadError, "Damaged tokenizer.ggml.tokens ([1, 2]) in file."),
        ({"tokens": ["a", "a"]}, LoadError, "Damaged tokenizer.ggml.tokens (some of them twice) in file."),
        ({"token_type": [1, 3]}, LoadError, "Damaged tokenizer.ggml.token_type ([1, 3]) in file."),
        ({"bos_token_id": 260}, LoadError, "Damaged tokenizer.ggml.bos_token_id (260) in file."),
    ],
)
def test_descriptions_that_are_refused(changes: dict[str, Any], kind: type[Exception], words: str):
    with pytest.raises(kind) as caught:
        from_gguf_metadata(description(**changes), source="file")
    assert words in str(caught.value)
    assert "  Fix: " in str(caught.value)


# -- directories


def test_a_directory_without_a_tokenizer(tmp_path: Path):
    assert from_directory(tmp_path) is None


def test_special_tokens_are_named_by_any_of_three_files(tmp_path: Path):
    shutil.copy(TINY_LLAMA / "tokenizer.json", tmp_path)

    def ids() -> tuple[int | None, int | None]:
        tokenizer = from_directory(tmp_path)
        assert tokenizer is not None
        return tokenizer.bos_id, tokenizer.eos_id

    assert ids() == (None, None)
    (tmp_path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": [8, 9]}')
    assert ids() == (7, 8)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert ids() == (7, 259)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>", "eos_token": null}')
    assert ids() == (259, 259)


def test_gpt2s_older_pair_of_files(tmp_path: Path):
    whole = json.loads((TINY_LLAMA / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = whole["vocab"] | {"<|endoftext|>": 259}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [" ".join(pair) for pair in whole["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    older, newer = from_directory(tmp_path), from_directory(TINY_LLAMA)
    assert older is not None
    assert newer is not None
    for text in ("the  theatre's\n 1234", "end<|endoftext|>the", "", "日本 the"):
        assert older.encode(text) == newer.encode(text)
        assert older.decode(older.encode(text)) == text


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_damaged_files(tmp_path: Path, file: str):
    shutil.copy(TINY_LLAMA / "tokenizer.json", tmp_path)
    for damage in ("{", "", "[1]"):
        (tmp_path / file).write_text(damage)
        with pytest.raises(LoadError) as caught:
            from_directory(tmp_path)
        assert str(caught.value).startswith("Damaged ")
        assert f"{file} (" in str(caught.value)
        assert f"in {tmp_path}" in str(caught.value)


def test_vocabularies_that_are_not_byte_level_have_no_lost_bytes(tmp_path: Path):
    backend = hugging_face.Tokenizer(hugging_face.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = from_directory(tmp_path)
    assert tokenizer is not None
    assert tokenizer.lost_bytes == frozenset()
    assert tokenizer.encode("b") == [1]


@pytest.mark.parametrize("tokens", ["abc", [1.5, 2.0], [True, False], [None]], ids=repr)
def test_what_is_no_token_id_is_not_decoded(tokens: Any) -> None:
    tokenizer = from_directory(TINY_LLAMA)
    assert tokenizer is not None
    with pytest.raises(InvalidInputError) as error:
        tokenizer.decode(tokens)
    message = str(error.value)
    assert "is no list of token ids in decode" in message
    assert "Expected: integers" in message and "Fix: for the most probable tokens" in message


def test_a_file_that_makes_the_backend_panic(tmp_path: Path) -> None:
    content = json.loads((TINY_LLAMA / "tokenizer.json").read_text())
    # Longer than the tokens it is taken off: Rust slices a text beyond its end.
    content["model"]["continuing_subword_prefix"] = "far too long a prefix"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(LoadError, match=r"(?s)Damaged tokenizer file tokenizer\.json.*Expected.*Fix"):
        from_directory(tmp_path)
