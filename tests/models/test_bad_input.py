"""What a newcomer may hand a model by mistake: each is an error in four parts, and leaves the model usable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InterpError, InvalidInputError, ShapeError, UnknownNameError
from interp_jax.models.language_model import LanguageModel

TOKENS = np.array([[1, 2, 3, 4]])

# What is done, the error, and what it says in place of each of its parts.
MISTAKES: dict[str, tuple[Callable[[Any], Any], type[InterpError], tuple[str, ...]]] = {
    "None as tokens": (lambda lm: lm(None), ShapeError, ("None (NoneType) was given", "integers [batch, pos]")),
    "a tokenizer's dict": (lambda lm: lm({"input_ids": TOKENS}), ShapeError, ("(dict) was given", '["input_ids"]')),
    "no rows": (lambda lm: lm([]), InvalidInputError, ("An empty prompt", "at least one row")),
    "tokenize None": (lambda lm: lm.tokenize(None), InvalidInputError, ("None (NoneType)", "one text")),
    "tokenize ids": (lambda lm: lm.tokenize([1, 2]), InvalidInputError, ("[1, 2] (list)", "need no tokenize")),
    "tokenize tokens": (lambda lm: lm.tokenize(TOKENS), InvalidInputError, ("(ndarray)", "need no tokenize")),
    "decode logits": (
        lambda lm: lm.decode(lm(TOKENS)[0, 0]),
        InvalidInputError,
        ("no list of token", "argmax(-1)"),
    ),
    "interventions as a list": (
        lambda lm: lm.intervene(TOKENS, ["mlp_out"]),
        InvalidInputError,
        ("Interventions of type list", "a dict, selector to"),
    ),
    "interventions as a function": (
        lambda lm: lm.generate("a", interventions=lambda value: value),
        InvalidInputError,
        ("Interventions of type function", "generate", "a dict, selector to"),
    ),
    "half a token": (
        lambda lm: lm.generate("a", max_new_tokens=1.5),
        InvalidInputError,
        ("max_new_tokens=1.5", "a whole number"),
    ),
    "temperature in words": (
        lambda lm: lm.generate("a", temperature="hot"),
        InvalidInputError,
        ("temperature='hot'", "0 or a positive number"),
    ),
    "seed in words": (lambda lm: lm.generate("a", seed="x"), InvalidInputError, ("seed='x'", "an integer, or a key")),
    "a layer in words": (
        lambda lm: lm.weight("W_Q", "1"),
        UnknownNameError,
        ("Layer '1'", "0 to 2"),
    ),
    "half a layer": (
        lambda lm: lm.weight("W_Q", 1.0),
        UnknownNameError,
        ("Layer 1.0", "0 to 2"),
    ),
    "a residual too narrow": (
        lambda lm: lm.ln_final(jnp.ones((1, 2, 3))),
        ShapeError,
        ("shape [1, 2, 3]", ".ln_final", "[batch, pos, 24]"),
    ),
    "one vector": (lambda lm: lm.unembed(jnp.ones(24)), ShapeError, ("shape [24]", ".unembed", "vector[None, None]")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(mistake: str, tiny: LanguageModel) -> None:
    do, kind, words = MISTAKES[mistake]
    before = tiny(TOKENS)
    with pytest.raises(kind) as error:
        do(tiny)
    message = str(error.value)
    assert all(word in message for word in (*words, " in ", "Expected: ", "Fix: ")), message
    np.testing.assert_array_equal(tiny(TOKENS), before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_generated_from_logits_that_are_not_numbers(tiny: LanguageModel, temperature: float) -> None:
    spoilt = dataclasses.replace(tiny, params=jax.tree.map(lambda leaf: leaf * jnp.nan, tiny.params))
    with pytest.raises(InvalidInputError) as error:
        spoilt.generate("a", max_new_tokens=2, temperature=temperature)
    message = str(error.value)
    assert "Logits that are not numbers (NaN), row 0, at new token 0 in generate" in message
    assert "Expected: finite logits" in message and "Fix: look for the first site" in message
    assert not spoilt.check().ok
