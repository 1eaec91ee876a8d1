"""Prompt pairs: aligned, padded, and with a difference of exactly 0 where both prompts are the same so far."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.methods.steering.prompt_pair import prompt_pair, prompt_tokens
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.sowing import layer_scope, sow

BOS, SPACE = 259, 220


def test_the_difference_is_that_of_two_passes(lm) -> None:
    pair = prompt_pair(lm, "the cat", "the tree there", "1.resid_post")
    short, long = (lm.tokenize(text)[0].tolist() for text in ("the cat", "the tree there"))
    padded = [[BOS, *short, *[SPACE] * (len(long) - len(short))], [BOS, *long]]
    assert pair.tokens.tolist() == padded
    together = np.asarray(lm.reap(np.array(padded), "1.resid_post")["1.resid_post"])
    np.testing.assert_allclose(pair.difference, together[0] - together[1], atol=1e-5)
    # Causal: equal beginnings, equal values; BOS among them.
    assert pair.n_shared >= 2
    assert (pair.difference[: pair.n_shared] == 0).all()
    assert (np.abs(pair.difference[pair.n_shared :]).max(-1) > 1e-3).all()
    vector = pair.vector(placement="back", name="trees")
    np.testing.assert_array_equal(vector.values, pair.difference)
    assert (vector.site, vector.placement, vector.name) == (pair.site, "back", "trees")
    assert pair.vector().name == "'the cat' - 'the tree there'" and "shared" in repr(pair)


def test_equal_prompts_give_a_vector_of_zeros(tiny_llama) -> None:
    pair = prompt_pair(tiny_llama, "the cat", "the cat", 2)
    assert str(pair.site) == "2.resid_pre" and not pair.difference.any()


def test_the_sides_are_each_others_opposites(tiny_llama) -> None:
    one, other = (prompt_pair(tiny_llama, *texts, 1).difference for texts in (("cat", "to be"), ("to be", "cat")))
    np.testing.assert_array_equal(one, -other)


def test_the_padding_acts(tiny_llama) -> None:
    """The rows at the padding are real vectors, and depend on what is padded with."""
    by_space, by_e = (prompt_pair(tiny_llama, "a", "the tree", 2, pad=pad) for pad in ("space", 68))
    n = len(tiny_llama.tokenize("a")[0])
    np.testing.assert_array_equal(by_space.difference[: n + 1], by_e.difference[: n + 1])
    assert by_e.tokens[0, n + 1 :].tolist() == [68] * (by_e.tokens.shape[1] - n - 1)
    assert (np.abs(by_space.difference[n + 1 :] - by_e.difference[n + 1 :]).max(-1) > 1e-3).all()


def test_unpaired_positions_hold_whole_activations(tiny_llama) -> None:
    for texts, sign in ((("the tree", "a"), 1), (("a", "the tree"), -1)):
        pair = prompt_pair(tiny_llama, *texts, 1, pad=None, allow_unpaired=True)
        n_short = 1 + len(tiny_llama.tokenize("a")[0])
        alone = np.asarray(tiny_llama.reap(prompt_tokens(tiny_llama, "the tree"), "1.resid_pre")["1.resid_pre"])[0]
        np.testing.assert_allclose(pair.difference[n_short:], sign * alone[n_short:], atol=1e-5)
        assert (pair.tokens == -1).sum() == len(alone) - n_short
        # An SAE's latents of positions that are not there are none, whatever its bias says of a zero.
        latents = pair.latents(lambda h: np.abs(h) + 1.0, np.eye(24))
        short = latents.negative if sign == 1 else latents.positive
        assert not short[n_short:].any() and (short[:n_short] >= 1).all()


def test_prompts_get_one_bos(tiny_llama) -> None:
    plain = tiny_llama.tokenize("the cat")[0].tolist()
    assert prompt_tokens(tiny_llama, "the cat").tolist() == [[BOS, *plain]]
    assert prompt_tokens(tiny_llama, "the cat", bos=None).tolist() == [plain]
    assert prompt_tokens(tiny_llama, "the cat", bos=plain[0]).tolist() == [plain]
    assert prompt_tokens(tiny_llama, [1, 2]).tolist() == [[1, 2]]
    both = prompt_tokens(tiny_llama, ["the cat", "a"])
    assert both[0].tolist() == [BOS, *plain] and both[1, -2] == BOS and (both[1, :-2] == -1).all()
    nameless = dataclasses.replace(tiny_llama, tokenizer=dataclasses.replace(tiny_llama.tokenizer, bos_id=None))
    assert prompt_tokens(nameless, "the cat").tolist() == [plain]
    # Then row 0 is a difference like any other.
    assert prompt_pair(nameless, "to", "a", 1).difference[0].any()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pad": None}, InvalidInputError, ["Prompts of", "and pad=None", "allow_unpaired=True"]),
        ({"pad": -1}, InvalidInputError, ["pad=-1", "mean nothing"]),
        ({"pad": True}, InvalidInputError, ["pad=True"]),
        ({"pad": "<pad>"}, UnknownNameError, ["pad='<pad>'", "token_id('<pad>')"]),
        ({"pad": 1000}, InvalidInputError, ["Token ids 1000"]),
        ({"bos": "<s>"}, UnknownNameError, ["bos='<s>'", "token_id('<s>')"]),
        ({"site": "1.resid_prr"}, UnknownNameError, ["prompt_pair", "Did you mean"]),
        ({"site": "resid_post"}, InvalidInputError, ["picks 3 sites"]),
        ({"site": "0.q"}, ShapeError, ["0.q", "resid_pre"]),
        ({"negative": ["a", "b"]}, InvalidInputError, ["1 positive and 2 negative"]),
        ({"negative": ""}, InvalidInputError, ["Empty text"]),
        ({"negative": [1, 2]}, InvalidInputError, ["A text and token ids", "give both as texts"]),
        ({"bos": True}, UnknownNameError, ["bos=True"]),
        ({"bos": 1.5}, UnknownNameError, ["bos=1.5"]),
        ({"bos": -1}, UnknownNameError, ["bos=-1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_pairs_that_cannot_be_made(tiny_llama, options, error, words) -> None:
    given = {"positive": "the cat", "negative": "a", "site": 1} | options
    with pytest.raises(error) as raised:
        prompt_pair(tiny_llama, given.pop("positive"), given.pop("negative"), given.pop("site"), **given)
    for word in [*words, "Fix:"]:
        assert word in str(raised.value)


def test_a_vocabulary_without_a_space(tiny_llama) -> None:
    class Letters:
        bos_id = eos_id = None

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [ord(character) for character in text.replace(" ", "__")]

    tokenizer: Any = Letters()
    lm = dataclasses.replace(tiny_llama, tokenizer=tokenizer)
    with pytest.raises(
        InvalidInputError, match=r'pad="space" were given, and a space is 2 tokens here(.|\n)*Fix: give a token id'
    ):
        prompt_pair(lm, "ab", "a", 1)
    assert prompt_pair(lm, "ab", "a", 1, pad=7).tokens.tolist() == [[97, 98], [97, 7]]


def test_a_model_that_looks_ahead_is_refused() -> None:
    def forward(params, tokens):
        with layer_scope(0):
            h = jax.nn.one_hot(tokens, 5)
            h = sow(h + h.sum(1, keepdims=True), name="resid_pre")
        return h @ jnp.eye(5)

    lm = LanguageModel(Upstream("bag", forward), {}, name="bag")
    with pytest.raises(InvalidInputError, match=r"differ by 1 where both prompts(.|\n)*Expected: a causal model"):
        prompt_pair(lm, [0, 1], [0, 2], 0)
