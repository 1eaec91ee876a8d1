"""Pairs of prompts that differ in one thing and agree, token by token, in where everything else is.

Patching puts a value from one prompt's pass into another's at the same position, so a clean and a corrupted prompt must
have equally many tokens, and their answers must be single tokens as they follow the prompt. Whether that is so depends
on the tokenizer; `align_prompts` finds out, keeps the pairs that fit, and says why it dropped the others.

A tokenizer for which every character is a token:

>>> letters = lambda text: [ord(character) for character in text]
>>> pairs = align_prompts([Prompt("2+2=", "2+3=", "4", "5"), Prompt("9+1=", "9+11=", "10", "20")], letters)
>>> pairs.clean.shape, pairs.answer_texts, pairs.dropped[0].why
((1, 4), ('4',), 'clean has 4 tokens, corrupted 5')

Sharp edges: answers are looked at as continuations, so they carry their leading space. All rows have one length: of
pairs that are aligned in themselves, those of the most frequent length are kept. There is no padding.

Source: interp_jax.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part


class Prompt(NamedTuple):
    """Two prompts that are to be compared, as text.

    Args:
        clean: The prompt.
        corrupted: The same with something replaced.
        answer: How `clean` goes on, with its leading space.
        wrong: What it is compared with, such as how `corrupted` goes on.
        slots: Name of a place to where its text ends in `clean` (and in `corrupted`): a number of characters.
    """

    clean: str
    corrupted: str
    answer: str
    wrong: str
    slots: Mapping[str, int] = {}


class Dropped(NamedTuple):
    """Something that could not be used.

    Args:
        what: The text, or how many there were of a kind.
        why: Why not.
    """

    what: str
    why: str


@dataclass(frozen=True, repr=False)
class PromptPairs:
    """Clean and corrupted prompts, aligned position by position.

    Args:
        clean: Token ids, int32 `[pair, pos]`.
        corrupted: Token ids, int32 `[pair, pos]`.
        answer: Id of the token that `clean` is to be followed by, int32 `[pair]`.
        wrong: Id of the token it is compared with, int32 `[pair]`.
        clean_texts: The clean prompts; empty where tokens were drawn at random.
        corrupted_texts: The corrupted prompts, likewise.
        answer_texts: The answers, likewise.
        wrong_texts: What they are compared with, likewise.
        template: The family of the prompts.
        seed: What they were drawn with; None if they were given.
        positions: Name of a place in the prompt to the position of its last token, int32 `[pair]`.
        dropped: What could not be used, and why.
    """

    clean: np.ndarray
    corrupted: np.ndarray
    answer: np.ndarray
    wrong: np.ndarray
    clean_texts: tuple[str, ...]
    corrupted_texts: tuple[str, ...]
    answer_texts: tuple[str, ...]
    wrong_texts: tuple[str, ...]
    template: str
    seed: int | None = None
    positions: Mapping[str, np.ndarray] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()

    @property
    def differs(self) -> np.ndarray:
        """Where the two prompts differ, bool `[pair, pos]`."""
        return self.clean != self.corrupted

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        n_pairs, n_pos = self.clean.shape
        origin = "" if self.seed is None else f", seed {self.seed}"
        lines = [f"PromptPairs({self.template}: {n_pairs} pairs of {n_pos} tokens{origin})"]
        if self.clean_texts[0]:
            lines.append(
                f"  clean      {self.clean_texts[0]!r} -> {self.answer_texts[0]!r}, not {self.wrong_texts[0]!r}"
            )
            lines.append(f"  corrupted  {self.corrupted_texts[0]!r}")
        if self.dropped:
            lines.append(f"  dropped    {len(self.dropped)}: {_listed(self.dropped, limit=3)}")
        return "\n".join(lines)


Encoder = Callable[[str], list[int]]


def encoder(tokenizer: Any) -> Encoder:
    """One function from a text to its token ids, whatever the tokenizer's own form.

    Args:
        tokenizer: An object with `encode` (ours, `tokenizers`, transformers) or `tokenize` (a LanguageModel), or a
            function from a text to token ids.

    Returns:
        The function.

    Raises:
        InvalidInputError: It is none of these.
        ShapeError: What it returns for a text is no sequence of ids of one text.
    """
    function = getattr(tokenizer, "encode", None) or getattr(tokenizer, "tokenize", None) or tokenizer
    if not callable(function):
        raise InvalidInputError(
            four_part(
                f"A tokenizer of type {type(tokenizer).__name__} was given",
                where="encoder",
                expected="an object with encode or tokenize, or a function from a text to token ids.",
                fix="give the model itself (lm), its tokenizer (lm.tokenizer), or a function.",
            )
        )

    def encode(text: str) -> list[int]:
        given = function(text)
        ids = np.asarray(getattr(given, "ids", given))
        is_one_row = ids.ndim == 1 or (ids.ndim == 2 and len(ids) == 1)
        if not is_one_row or (ids.size and ids.dtype.kind not in "iu"):
            raise ShapeError(
                four_part(
                    f"The tokenizer returned {ids.dtype}{list(ids.shape)} for {text!r:.60}",
                    where="encoder",
                    expected="the token ids of that text, integers [pos].",
                    fix="wrap it in a function that returns a list of ids: lambda text: tokenizer(text)['input_ids'].",
                )
            )
        return [int(i) for i in ids.reshape(-1)]

    return encode


def single_tokens(words: Iterable[str], encode: Encoder, *, after: str = "It is") -> tuple[list[str], list[Dropped]]:
    """The words that are one token inside a text, with their leading space.

    Args:
        words: Words without spaces around them.
        encode: From a text to token ids.
        after: The text they are looked at behind.

    Returns:
        Those that are, and the others with the reason.
    """
    before = encode(after)
    kept, dropped = [], []
    for word in dict.fromkeys(words):
        fault = _continuation(before, encode(f"{after} {word}"), f" {word}")[1]
        kept += [] if fault else [word]
        dropped += [Dropped(word, fault)] if fault else []
    return kept, dropped


class _Aligned(NamedTuple):
    """One pair that is aligned in itself."""

    prompt: Prompt
    clean: list[int]
    corrupted: list[int]
    answer: int
    wrong: int
    positions: dict[str, int]


def align_prompts(
    prompts: Iterable[Prompt],
    tokenizer: Any,
    *,
    template: str = "given",
    seed: int | None = None,
    n_pairs: int | None = None,
    dropped: Sequence[Dropped] = (),
) -> PromptPairs:
    """The prompts that are aligned for a tokenizer, as token ids.

    Args:
        prompts: The candidates; with `n_pairs` no more of them are looked at than needed.
        tokenizer: See `encoder`.
        template: What to call them.
        seed: What they were drawn with, if they were.
        n_pairs: How many to find, all different and of one length. None: look at all and keep what fits.
        dropped: What was dropped before.

    Returns:
        The pairs.

    Raises:
        InvalidInputError: Nothing remains, or fewer than `n_pairs`.
        ShapeError: The tokenizer does not return token ids.
    """
    where = f"align_prompts({template!r})"
    if n_pairs is not None and n_pairs < 1:
        raise InvalidInputError(
            four_part(
                f"n_pairs={n_pairs} was given", where=where, expected="at least 1.", fix="ask for a pair or more."
            )
        )
    encode, faults = encoder(tokenizer), list(dropped)
    by_length: dict[int, list[_Aligned]] = {}
    seen, best = set(), 0
    for prompt in prompts:
        if (prompt.clean, prompt.corrupted, prompt.answer, prompt.wrong) in seen:
            continue
        seen.add((prompt.clean, prompt.corrupted, prompt.answer, prompt.wrong))
        pair = _aligned(prompt, encode)
        if isinstance(pair, str):
            faults.append(Dropped(prompt.clean, pair))
            continue
        row = by_length.setdefault(len(pair.clean), [])
        row.append(pair)
        # The first length with the most pairs.
        best = len(pair.clean) if len(row) > len(by_length.get(best, [])) else best
        if n_pairs is not None and len(row) == n_pairs:
            best = len(pair.clean)
            break
    found = by_length.get(best, [])
    others = [pair for length, row in by_length.items() if length != best for pair in row]
    faults += [Dropped(pair.prompt.clean, f"{len(pair.clean)} tokens where the others have {best}") for pair in others]
    if not found or len(found) < (n_pairs or 1):
        raise InvalidInputError(_too_few(len(found), n_pairs, len(seen), faults, where))
    return _pairs(found, template, seed, tuple(faults))


def _aligned(prompt: Prompt, encode: Encoder) -> _Aligned | str:
    """The pair as token ids, or what is wrong with it."""
    clean, corrupted = encode(prompt.clean), encode(prompt.corrupted)
    if not clean or len(clean) != len(corrupted):
        return f"clean has {len(clean)} tokens, corrupted {len(corrupted)}"
    if clean == corrupted:
        return "clean and corrupted are the same"
    ids = []
    for text in (prompt.answer, prompt.wrong):
        token, fault = _continuation(clean, encode(prompt.clean + text), text)
        if token is None:
            return fault
        ids.append(token)
    if ids[0] == ids[1]:
        return f"answer and wrong answer are the same token ({prompt.answer!r})"
    positions = {}
    for name, end in prompt.slots.items():
        start = encode(prompt.clean[:end])
        if not start or clean[: len(start)] != start:
            return f"a token goes across the end of {name} ({prompt.clean[:end]!r})"
        positions[name] = len(start) - 1
    return _Aligned(prompt, clean, corrupted, ids[0], ids[1], positions)


def _continuation(before: list[int], whole: list[int], text: str) -> tuple[int | None, str]:
    """The one token by which a text goes on, or why it is none."""
    if whole[: len(before)] != before:
        return None, f"{text!r} changes the tokens before it"
    n = len(whole) - len(before)
    return (whole[-1], "") if n == 1 else (None, f"{text!r} is {n} tokens")


def _pairs(found: list[_Aligned], template: str, seed: int | None, dropped: tuple[Dropped, ...]) -> PromptPairs:
    names = dict.fromkeys(name for pair in found for name in pair.positions)
    return PromptPairs(
        clean=np.array([pair.clean for pair in found], np.int32),
        corrupted=np.array([pair.corrupted for pair in found], np.int32),
        answer=np.array([pair.answer for pair in found], np.int32),
        wrong=np.array([pair.wrong for pair in found], np.int32),
        clean_texts=tuple(pair.prompt.clean for pair in found),
        corrupted_texts=tuple(pair.prompt.corrupted for pair in found),
        answer_texts=tuple(pair.prompt.answer for pair in found),
        wrong_texts=tuple(pair.prompt.wrong for pair in found),
        template=template,
        seed=seed,
        positions={name: np.array([pair.positions[name] for pair in found], np.int32) for name in names},
        dropped=dropped,
    )


def _too_few(n_found: int, n_pairs: int | None, n_seen: int, dropped: Sequence[Dropped], where: str) -> str:
    remains = "Nothing remains" if not n_found else f"Only {n_found} remain"
    return four_part(
        f"{remains} of {n_seen} different pairs of prompts: {_listed(dropped) or 'none were given'}",
        where=where,
        expected=f"{n_pairs or 'one or more'} pairs with equally many tokens in all prompts, and answers of one token.",
        fix="ask for fewer, or give words that are one token for this tokenizer; answers carry their leading space.",
    )


def _listed(dropped: Sequence[Dropped], *, limit: int = 4) -> str:
    """The reasons, most frequent first, each with one example."""
    counts = Counter(one.why for one in dropped)
    examples = {one.why: one.what for one in reversed(dropped)}
    listed = [f"{why} ({n} times, as {examples[why]!r:.50})" for why, n in counts.most_common(limit)]
    return "; ".join(listed) + ("; ..." if len(counts) > limit else "")
