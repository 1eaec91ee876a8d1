"""Prompt pairs: a positive and a negative prompt, aligned, and the model's activations on both.

The difference of their activations, position by position, is the classic steering vector. The shorter prompt is
padded on the right until both have one length; the rows at the padding are real vectors and act. BOS comes first in
both, so row 0 is exactly 0: what a causal model computes at a position depends on what stands before it alone.

    pair = prompt_pair(lm, "I talk about weddings constantly", "I do not talk about weddings constantly", 6)
    pair.vector()                                            # the difference itself
    pair.vector(pair.latents(sae.encode, sae.W_dec).top(5))  # what five latents of an SAE say of it

>>> aligned([5, 1, 2], [5, 1], pad=9)
array([[5, 1, 2],
       [5, 1, 9]], dtype=int32)

Sharp edges: without padding the overhanging positions would be activations from which nothing is subtracted, a hundred
times as large as a difference, so they are refused unless `allow_unpaired=True`. A model whose tokenizer names no BOS
gets none: then row 0 is a difference like any other.

Source: Turner et al. 2023 (2308.10248).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, UnknownNameError, four_part
from interp_jax.core.sites import Selector, Site
from interp_jax.methods.steering.latents import LatentDifference
from interp_jax.methods.steering.steering_vector import SteeringVector, residual_site
from interp_jax.models.tokens import is_text
from interp_jax.models.upstream import PAD

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

# How much activations at equal beginnings may differ, against their size, before the model counts as not causal.
_CAUSAL_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False, repr=False)
class PromptPair:
    """The activations of a site on two aligned prompts.

    Args:
        site: Where they were read.
        positive: Activations on the positive prompt, float32 `[pos, d_model]`; 0 where it has no token.
        negative: On the negative one, likewise.
        tokens: Both prompts, int32 `[2, pos]`; -1 where one has no token (only if unpaired positions were allowed).
        name: Both prompts in words.
    """

    site: Site
    positive: np.ndarray
    negative: np.ndarray
    tokens: np.ndarray
    name: str = ""

    @property
    def n_shared(self) -> int:
        """How many tokens both prompts begin with; the difference there is exactly 0."""
        return int(np.cumprod(self.tokens[0] == self.tokens[1]).sum())

    @property
    def difference(self) -> np.ndarray:
        """positive - negative, `[pos, d_model]`."""
        return self.positive - self.negative

    def vector(self, values: Any = None, *, placement: str | np.ndarray = "front", name: str = "") -> SteeringVector:
        """A steering vector at the pair's site.

        Args:
            values: What is added, `[pos, d_model]`; the difference by default.
            placement: Where, as in `SteeringVector`.
            name: What to call it; by default the prompts.

        Returns:
            The vector.
        """
        values = self.difference if values is None else np.asarray(values)
        return SteeringVector(values, self.site, placement, name or self.name)

    def latents(self, encode: Callable[[Any], Any], W_dec: Any, *, frequencies: Any | None = None) -> LatentDifference:
        """The pair in terms of an SAE's latents.

        Args:
            encode: From activations `[pos, d_model]` to latents `[pos, latent]`, such as `sae.encode`.
            W_dec: What each latent writes, `[latent, d_model]`, in the units of the activations.
            frequencies: How often each latent fires on ordinary text, `[latent]`, to tell dense ones.

        Returns:
            The latents on both prompts.
        """
        both = [
            np.asarray(encode(part), np.float32) * (ids >= 0)[:, None]
            for part, ids in zip((self.positive, self.negative), self.tokens, strict=True)
        ]
        return LatentDifference(both[0], both[1], np.asarray(W_dec), frequencies)

    def __repr__(self) -> str:
        n_pos = self.tokens.shape[1]
        return f"PromptPair({self.name}; {n_pos} positions at {self.site}, the first {self.n_shared} shared)"


def prompt_tokens(lm: LanguageModel, prompt: Any, *, bos: int | str | None = "auto") -> np.ndarray:
    """Prompts as tokens, each with BOS, shorter ones padded on the left.

    Args:
        lm: The model.
        prompt: A text or several; token ids `[pos]` or `[batch, pos]` are taken as they are.
        bos: A token id; "auto" for the tokenizer's own, if it names one; None for none. A prompt that begins with it
            gets no second one.

    Returns:
        Token ids, int32 `[batch, pos]`.

    Raises:
        InvalidInputError: There is no prompt, or an empty one.
        UnknownNameError: `bos` is another word than "auto".
    """
    if not is_text(prompt):
        return np.asarray(lm.check_tokens(np.atleast_2d(np.asarray(prompt)), where="prompt_tokens"))
    is_id = isinstance(bos, int | np.integer) and not isinstance(bos, bool) and bos >= 0
    if bos != "auto" and bos is not None and not is_id:
        raise UnknownNameError(
            four_part(
                f"bos={bos!r} was given",
                where="prompt_tokens",
                expected='"auto", a token id, or None.',
                fix=f"write bos=lm.tokenizer.token_id({bos!r}).",
            )
        )
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    rows = [row[row >= 0].tolist() for row in lm.tokenize(texts)]
    first = (None if lm.tokenizer is None else lm.tokenizer.bos_id) if bos == "auto" else bos
    if first is not None:
        rows = [row if row[0] == first else [int(first), *row] for row in rows]
    n_pos = max(map(len, rows))
    tokens = np.array([[PAD] * (n_pos - len(row)) + row for row in rows], np.int32)
    return np.asarray(lm.check_tokens(tokens, where="prompt_tokens"))


def aligned(positive: Sequence[int], negative: Sequence[int], *, pad: int | None) -> np.ndarray:
    """Two prompts as rows of one length.

    Args:
        positive: Token ids.
        negative: Token ids.
        pad: The token that the shorter one is padded with on the right; None leaves -1 there.

    Returns:
        int32 `[2, pos]`.
    """
    n_pos = max(len(positive), len(negative))
    fill = PAD if pad is None else pad
    return np.array([[*row, *[fill] * (n_pos - len(row))] for row in (positive, negative)], np.int32)


def prompt_pair(
    lm: LanguageModel,
    positive: Any,
    negative: Any,
    site: Selector,
    *,
    pad: int | str | None = "space",
    allow_unpaired: bool = False,
    bos: int | str | None = "auto",
) -> PromptPair:
    """Read a site on two prompts.

    Args:
        lm: The model.
        positive: What to steer towards: a text, or token ids `[pos]`.
        negative: What to steer away from, likewise.
        site: Where, such as "6.resid_pre"; a layer alone means its `resid_pre`.
        pad: What the shorter prompt is padded with: "space" for the token of one space, or a token id; None for
            nothing.
        allow_unpaired: With `pad=None`, whether positions that only one prompt has may stand without a counterpart.
        bos: As for `prompt_tokens`.

    Returns:
        The activations on both.

    Raises:
        InvalidInputError: The prompts cannot be aligned, or the model is not causal.
        UnknownNameError: The model has no such site.

    Source: Turner et al. 2308.10248, section 3.
    """
    chosen = residual_site(lm, site, where="prompt_pair")
    if is_text(positive) != is_text(negative):
        raise _refuse(
            "A text and token ids were given",
            "two texts, which get a BOS each, or two rows of token ids, which are taken as they are.",
            "give both as texts, or both as tokens: prompt_tokens(lm, text)[0] is what a text becomes.",
        )
    rows = [prompt_tokens(lm, prompt, bos=bos) for prompt in (positive, negative)]
    if any(len(row) != 1 for row in rows):
        raise _refuse(
            f"{len(rows[0])} positive and {len(rows[1])} negative prompts were given",
            "one of each.",
            "make a pair for each two prompts; their vectors can be added.",
        )
    ids = [row[0][row[0] >= 0].tolist() for row in rows]
    n_positive, n_negative = map(len, ids)
    pad_id = None
    if n_positive != n_negative:
        pad_id = _pad_id(lm, pad)
        if pad_id is None and not allow_unpaired:
            raise _refuse(
                f"Prompts of {n_positive} and {n_negative} tokens and pad=None were given",
                "prompts of one length, or a token to pad with.",
                'pad with pad="space" or a token id, or pass allow_unpaired=True to add whole activations there.',
            )
    tokens = aligned(*ids, pad=pad_id)
    # Passes of one shape, one prompt each: equal beginnings are then computed by equal arithmetic. What follows the
    # end of an unpaired prompt cannot be seen from before it; its own activations are left out.
    read = [np.asarray(lm.reap(row[None], chosen)[chosen], np.float32)[0] for row in tokens]
    h_positive, h_negative = (np.where((row >= 0)[:, None], h, 0) for row, h in zip(tokens, read, strict=True))
    pair = PromptPair(chosen, h_positive, h_negative, tokens, name=_name(positive, negative))
    return _with_equal_beginnings(lm, pair)


def _pad_id(lm: LanguageModel, pad: Any) -> int | None:
    """The token to pad with."""
    if pad is None:
        return None
    if isinstance(pad, str) and pad != "space":
        raise UnknownNameError(
            four_part(
                f"pad={pad!r} was given",
                where="prompt_pair",
                expected='"space", a token id, or None.',
                fix=f"write pad=lm.tokenizer.token_id({pad!r}).",
            )
        )
    if isinstance(pad, str):
        ids = [] if lm.tokenizer is None else lm.tokenizer.encode(" ", add_special_tokens=False)
        if len(ids) != 1:
            raise _refuse(
                f'Prompts of different lengths and pad="space" were given, and a space is {len(ids)} tokens here',
                "a tokenizer with a token for one space, or another token to pad with.",
                "give a token id: pad=lm.tokenizer.eos_id, or the last token of a word of your own.",
            )
        return ids[0]
    if isinstance(pad, bool) or not isinstance(pad, int | np.integer) or pad < 0:
        raise _refuse(
            f"pad={pad!r} was given",
            "a token id from 0: the activations at masked padding (-1) mean nothing.",
            'use pad="space".',
        )
    return int(pad)


def _with_equal_beginnings(lm: LanguageModel, pair: PromptPair) -> PromptPair:
    """The pair with a difference of exactly 0 where both prompts are the same so far."""
    n = pair.n_shared
    gap = float(np.abs(pair.difference[:n]).max(initial=0.0))
    if gap > _CAUSAL_TOLERANCE * float(np.abs(pair.positive[:n]).max(initial=1.0)):
        raise _refuse(
            f"A model whose activations at {pair.site} differ by {gap:.3g} where both prompts are the same so far",
            "a causal model: position 0 depends on token 0 alone.",
            f"check the model ({lm.name or lm.upstream.name}) with lm.check().",
        )
    negative = np.concatenate([pair.positive[:n], pair.negative[n:]])
    return PromptPair(pair.site, pair.positive, negative, pair.tokens, pair.name)


def _name(positive: Any, negative: Any) -> str:
    return f"{positive!r} - {negative!r}" if is_text(positive) and is_text(negative) else "tokens"


def _refuse(what: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where="prompt_pair", expected=expected, fix=fix))
