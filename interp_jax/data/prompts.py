"""Families of prompt pairs: what circuits are looked for on, made from small templates, a seed, and a tokenizer.

    pairs = ioi_pairs(lm, 32, seed=0)
    metric = logit_difference(pairs.answer, pairs.wrong)
    lm(pairs.clean), lm(pairs.corrupted)                 # aligned: same length, same places

A function from a text to the numbers of its words is a tokenizer, too:

>>> pairs = ioi_pairs(lambda text: [int(word.encode().hex(), 16) % 9973 for word in text.split()], 2, seed=1)
>>> len(pairs), pairs.differs.sum(1).tolist(), sorted(pairs.positions)
(2, [1, 1], ['IO', 'S1', 'S2', 'end'])

Sharp edges: words that are not one token for the tokenizer are left out and listed in `dropped`. Templates of different
lengths do not mix in one batch; give one template to fix what each position means. Same seed, tokenizer and words: same
pairs.

Source: the tasks are those of Wang et al. (2211.00593; IOI), Hanna et al. (2305.00586; greater-than), Olsson et al.
(2209.11895; induction) and Kramár et al. (2403.00745; pairs of facts, articles and random texts); the texts are ours.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, UnknownNameError, four_part
from interp_jax.data import words
from interp_jax.data.alignment import Dropped, Prompt, PromptPairs, align_prompts, encoder, single_tokens

IOI_TEMPLATES = (
    "After the long meeting {A} and {B} walked to the {place}, and {S} handed the {object} to",
    "Yesterday {A} and {B} were at the {place} when {S} decided to give the {object} to",
    "While {A} and {B} were waiting at the {place}, {S} offered the {object} to",
    "On the day that {A} met {B} at the {place}, {S} passed the {object} to",
)
ORDERS = ("ABBA", "BABA", "both")
CORRUPTIONS = ("third name", "swap")

CITY_TEMPLATE = "The city of {city} is in the country of"
YEAR_TEMPLATE = "The {event} lasted from the year {year} to the year {century}"
ARTICLE_TEMPLATE = "Here is one {first}. It is called {article} {first}. Here is one {second}. It is called"


def ioi_pairs(
    tokenizer: Any,
    n_pairs: int,
    *,
    seed: int = 0,
    order: str = "both",
    corruption: str = "third name",
    templates: Sequence[str] = IOI_TEMPLATES,
    names: Sequence[str] = words.NAMES,
) -> PromptPairs:
    """Indirect objects: two people, one of whom gives something "to" the other.

    The answer is the name mentioned once (IO), the wrong one the name mentioned twice (S).

    Args:
        tokenizer: A LanguageModel, a tokenizer, or a function from a text to token ids.
        n_pairs: How many pairs.
        seed: Of names, places, objects, templates and orders.
        order: "ABBA" (the indirect object comes first), "BABA" (the subject does) or "both", at random.
        corruption: What replaces the second mention of S: a "third name", so that nothing tells the two apart; or
            the indirect object's ("swap"), so that the answers change places.
        templates: Texts with {A}, {B}, {S}, {place} and {object} in them.
        names: Given names.

    Returns:
        The pairs, with the positions IO, S1, S2 and end.

    Raises:
        UnknownNameError: `order` or `corruption` is not one of its values, or a template's field is unknown.
        InvalidInputError: Fewer than `n_pairs` can be made for this tokenizer.

    Source: Wang et al. 2211.00593. Their corrupted prompts replace all names; ours one, as Kramár et al. 2403.00745.
    """
    _check_choice("order", order, ORDERS)
    _check_choice("corruption", corruption, CORRUPTIONS)
    encode, rng = encoder(tokenizer), np.random.default_rng(seed)
    kept, dropped = _usable(names, encode, n_least=3, kind="names")
    places, no_places = _usable(words.PLACES, encode, kind="places")
    objects, no_objects = _usable(words.OBJECTS, encode, kind="objects")

    def candidates() -> Iterator[Prompt]:
        for _ in range(_most(n_pairs)):
            io, s, third = (str(name) for name in rng.choice(kept, 3, replace=False))
            is_io_first = order == "ABBA" or (order == "both" and bool(rng.integers(2)))
            fields = {"A": io, "B": s} if is_io_first else {"A": s, "B": io}
            fields |= {"place": str(rng.choice(places)), "object": str(rng.choice(objects))}
            template = templates[int(rng.integers(len(templates)))]
            clean, ends = _filled(template, fields | {"S": s})
            corrupted, _ = _filled(template, fields | {"S": io if corruption == "swap" else third})
            slots = {"IO": ends["A" if is_io_first else "B"], "S1": ends["B" if is_io_first else "A"], "S2": ends["S"]}
            yield Prompt(clean, corrupted, f" {io}", f" {s}", slots | {"end": len(clean)})

    given = [*dropped, *no_places, *no_objects]
    return align_prompts(candidates(), encode, template="ioi", seed=seed, n_pairs=n_pairs, dropped=given)


def city_country_pairs(
    tokenizer: Any, n_pairs: int, *, seed: int = 0, cities: Mapping[str, Sequence[str]] = words.CITIES
) -> PromptPairs:
    """Recall of a fact: which country is this city in? The corrupted prompt names a city of another country.

    Args:
        tokenizer: A LanguageModel, a tokenizer, or a function from a text to token ids.
        n_pairs: How many pairs.
        seed: Of the cities.
        cities: Country to its cities. Countries must be one token; a city may be several.

    Returns:
        The pairs, with the positions city (its last token) and end.

    Raises:
        InvalidInputError: Fewer than `n_pairs` can be made for this tokenizer.

    Source: Kramár et al. 2403.00745, for the kind of pair.
    """
    encode, rng = encoder(tokenizer), np.random.default_rng(seed)
    countries, dropped = _usable(cities, encode, n_least=2, kind="countries")

    def candidates() -> Iterator[Prompt]:
        for _ in range(_most(n_pairs)):
            one, other = (str(country) for country in rng.choice(countries, 2, replace=False))
            clean, ends = _filled(CITY_TEMPLATE, {"city": str(rng.choice(cities[one]))})
            corrupted, _ = _filled(CITY_TEMPLATE, {"city": str(rng.choice(cities[other]))})
            yield Prompt(clean, corrupted, f" {one}", f" {other}", {**ends, "end": len(clean)})

    return align_prompts(candidates(), encode, template="city/country", seed=seed, n_pairs=n_pairs, dropped=dropped)


def greater_than_pairs(tokenizer: Any, n_pairs: int, *, seed: int = 0) -> PromptPairs:
    """Order of numbers: what lasted from 1732 lasted to a later year of the century. Corrupted: from its year 01.

    Answers are the last two digits of a later and of an earlier year; for a tokenizer that splits digits, the first of
    these two: a later and an earlier decade.

    Args:
        tokenizer: A LanguageModel, a tokenizer, or a function from a text to token ids.
        n_pairs: How many pairs.
        seed: Of events and years.

    Returns:
        The pairs, with the positions year (the last token of the first year) and end.

    Raises:
        InvalidInputError: Fewer than `n_pairs` can be made; the tokenizer may not cut years after the century.

    Source: Hanna et al. 2305.00586, who sum the probabilities of all later years; here one of them stands for all.
    """
    encode, rng = encoder(tokenizer), np.random.default_rng(seed)
    probe = YEAR_TEMPLATE.format(event="war", year=1732, century=17)
    has_pairs = encode(probe + "45")[:-1] == encode(probe)

    def candidates() -> Iterator[Prompt]:
        for _ in range(_most(n_pairs)):
            century, year = int(rng.integers(11, 18)), int(rng.integers(10, 90))
            fields = {"event": str(rng.choice(words.EVENTS)), "century": str(century)}
            clean, ends = _filled(YEAR_TEMPLATE, fields | {"year": f"{century}{year:02d}"})
            corrupted, _ = _filled(YEAR_TEMPLATE, fields | {"year": f"{century}01"})
            if has_pairs:
                answer, wrong = f"{rng.integers(year + 1, 100):02d}", f"{rng.integers(2, year):02d}"
            else:
                answer, wrong = f"{rng.integers(year // 10 + 1, 10)}", f"{rng.integers(0, year // 10)}"
            yield Prompt(clean, corrupted, answer, wrong, {"year": ends["year"], "end": len(clean)})

    return align_prompts(candidates(), encode, template="greater-than", seed=seed, n_pairs=n_pairs)


def a_an_pairs(tokenizer: Any, n_pairs: int, *, seed: int = 0) -> PromptPairs:
    """Agreement of the article: "a" or "an", by a noun that was mentioned. Corrupted: a noun of the other article.

    Args:
        tokenizer: A LanguageModel, a tokenizer, or a function from a text to token ids.
        n_pairs: How many pairs.
        seed: Of nouns and articles.

    Returns:
        The pairs, with the positions noun (its last token) and end.

    Raises:
        InvalidInputError: Fewer than `n_pairs` can be made for this tokenizer.

    Source: Kramár et al. 2403.00745, for the kind of pair.
    """
    encode, rng = encoder(tokenizer), np.random.default_rng(seed)

    def candidates() -> Iterator[Prompt]:
        for _ in range(_most(n_pairs)):
            answer, wrong = ("a", "an") if rng.integers(2) else ("an", "a")
            article = "a" if rng.integers(2) else "an"
            first, second = str(rng.choice(words.NOUNS[article])), str(rng.choice(words.NOUNS[answer]))
            if first == second:
                continue
            fields = {"first": first, "article": article}
            clean, ends = _filled(ARTICLE_TEMPLATE, fields | {"second": second})
            corrupted, _ = _filled(ARTICLE_TEMPLATE, fields | {"second": str(rng.choice(words.NOUNS[wrong]))})
            slots = {"noun": ends["second"], "end": len(clean)}
            yield Prompt(clean, corrupted, f" {answer}", f" {wrong}", slots)

    return align_prompts(candidates(), encode, template="a/an", seed=seed, n_pairs=n_pairs)


def random_text_pairs(
    tokenizer: Any, n_pairs: int, *, n_pos: int = 16, seed: int = 0, texts: Sequence[str] | None = None
) -> PromptPairs:
    """Random texts against random texts: the first tokens of each, and as answers the tokens that follow them.

    Args:
        tokenizer: A LanguageModel, a tokenizer, or a function from a text to token ids.
        n_pairs: How many pairs.
        n_pos: How many tokens of each text, from 1.
        seed: Of the texts, or of which of the given ones are paired.
        texts: Texts of more than `n_pos` tokens; by default sentences made of random words.

    Returns:
        The pairs. Their texts are the whole texts; `answer_texts` and `wrong_texts` are empty.

    Raises:
        InvalidInputError: Fewer than `n_pairs` can be made, or a number is out of range.

    Source: Kramár et al. 2403.00745, for the kind of pair.
    """
    _check_counts("random_text_pairs", n_pairs=n_pairs, n_pos=n_pos)
    encode, rng = encoder(tokenizer), np.random.default_rng(seed)
    if texts is None:
        texts = [_sentences(rng, n_pos) for _ in range(2 * n_pairs + 16)]
    tokens, dropped = {}, []
    for text in dict.fromkeys(texts):
        ids = encode(text)
        if len(ids) > n_pos:
            tokens[text] = ids[: n_pos + 1]
        else:
            dropped.append(Dropped(text, f"{len(ids)} tokens, where {n_pos + 1} are needed"))
    rows, seen = [], set()
    for _ in range(_most(n_pairs) if len(tokens) > 1 else 0):
        one, other = (int(i) for i in rng.choice(len(tokens), 2, replace=False))
        pair = tuple(list(tokens)[i] for i in (one, other))
        clean, corrupted = (tokens[text] for text in pair)
        if clean[-1] != corrupted[-1] and clean[:-1] != corrupted[:-1] and pair not in seen:
            seen.add(pair)
            rows.append((clean, corrupted, pair))
        if len(rows) == n_pairs:
            break
    if len(rows) < n_pairs:
        raise InvalidInputError(
            four_part(
                f"{len(tokens)} different texts of more than {n_pos} tokens were given, which make {len(rows)} pairs",
                where="random_text_pairs",
                expected=f"enough for {n_pairs} pairs that differ and go on with different tokens.",
                fix="give more or longer texts, or ask for fewer pairs or positions.",
            )
        )
    clean, corrupted = (np.array([row[i] for row in rows], np.int32) for i in (0, 1))
    empty = ("",) * n_pairs
    return PromptPairs(
        clean=clean[:, :-1],
        corrupted=corrupted[:, :-1],
        answer=clean[:, -1],
        wrong=corrupted[:, -1],
        clean_texts=tuple(row[2][0] for row in rows),
        corrupted_texts=tuple(row[2][1] for row in rows),
        answer_texts=empty,
        wrong_texts=empty,
        template="random text",
        seed=seed,
        positions={"end": np.full(n_pairs, n_pos - 1, np.int32)},
        dropped=tuple(dropped),
    )


def induction_pairs(
    vocabulary: Any, n_pairs: int, *, n_period: int = 8, n_repeated: int = 4, prefix: Sequence[int] = (), seed: int = 0
) -> PromptPairs:
    """Induction: random tokens, then the first of them again; how does it go on? Corrupted: other tokens before.

    clean = prefix, r_0 ... r_{P-1}, r_0 ... r_{k-1}; answer r_k. corrupted = prefix, s_0 ... s_{P-1}, r_0 ... r_{k-1}

    Args:
        vocabulary: The number of tokens, of which all are used; or the ids to use, `[token]`.
        n_pairs: How many pairs.
        n_period: P, the tokens before they repeat, from 2.
        n_repeated: k, how many are repeated, 1 to P - 1.
        prefix: Ids that stand before all, such as the token that begins a text.
        seed: Of the tokens.

    Returns:
        The pairs, without texts; with the positions answer (r_k in its first place), previous (r_{k-1} there) and end.

    Raises:
        InvalidInputError: A number is out of range, or the vocabulary has fewer than 2 P tokens.

    Source: Olsson et al. 2209.11895.
    """
    ids = np.arange(vocabulary) if np.ndim(vocabulary) == 0 else np.unique(np.asarray(vocabulary))
    _check_counts("induction_pairs", n_pairs=n_pairs)
    if not 1 <= n_repeated < n_period or len(ids) < 2 * n_period:
        raise InvalidInputError(
            four_part(
                f"n_period={n_period}, n_repeated={n_repeated} and {len(ids)} tokens were given",
                where="induction_pairs",
                expected="n_repeated from 1 to n_period - 1, and 2 n_period tokens or more, so that all can differ.",
                fix="give the model's own number of tokens: lm.config.d_vocab.",
            )
        )
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(ids, 2 * n_period, replace=False) for _ in range(n_pairs)])
    r, s = drawn[:, :n_period], drawn[:, n_period:]
    before = np.broadcast_to(np.asarray(prefix, np.int64).reshape(1, -1), (n_pairs, len(prefix)))
    empty, at = ("",) * n_pairs, len(prefix) + n_repeated
    n_pos = len(prefix) + n_period + n_repeated
    return PromptPairs(
        clean=np.concatenate([before, r, r[:, :n_repeated]], axis=1).astype(np.int32),
        corrupted=np.concatenate([before, s, r[:, :n_repeated]], axis=1).astype(np.int32),
        answer=r[:, n_repeated].astype(np.int32),
        wrong=s[:, n_repeated].astype(np.int32),
        clean_texts=empty,
        corrupted_texts=empty,
        answer_texts=empty,
        wrong_texts=empty,
        template="induction",
        seed=seed,
        positions={
            name: np.full(n_pairs, place, np.int32)
            for name, place in (("answer", at), ("previous", at - 1), ("end", n_pos - 1))
        },
    )


FAMILIES: Mapping[str, Callable[..., PromptPairs]] = {
    "ioi": ioi_pairs,
    "city/country": city_country_pairs,
    "greater-than": greater_than_pairs,
    "a/an": a_an_pairs,
    "random text": random_text_pairs,
}
"""The families that need a tokenizer, all called as `(tokenizer, n_pairs, seed=...)`."""


def _most(n_pairs: int) -> int:
    """How many candidates to draw at most."""
    return 40 * max(n_pairs, 1) + 400


def _filled(template: str, fields: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """The template with its fields filled in, and where each field's text ends (its last occurrence)."""
    text, ends = "", {}
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name is None:
            continue
        if name not in fields:
            raise UnknownNameError(
                four_part(
                    f"A template with the field {name!r} was given: {template!r}",
                    where="a family of prompts",
                    names=list(fields),
                    given=name,
                    fix="use these fields.",
                )
            )
        text += fields[name]
        ends[name] = len(text)
    return text, ends


def _usable(
    given: Sequence[str] | Mapping[str, Any], encode: Any, *, kind: str, n_least: int = 1
) -> tuple[list[str], list[Dropped]]:
    """The words of one token, if there are enough of them."""
    kept, dropped = single_tokens(given, encode)
    if len(kept) < n_least:
        shown = "; ".join(f"{one.what}: {one.why}" for one in dropped[:4]) or "none were given"
        raise InvalidInputError(
            four_part(
                f"{len(kept)} {kind} that are one token remain of {len(given)} ({shown})",
                where="a family of prompts",
                expected=f"at least {n_least}.",
                fix=f"give {kind} that are one token for this tokenizer, with a leading space.",
            )
        )
    return kept, dropped


def _sentences(rng: np.random.Generator, n_words: int) -> str:
    """Sentences of random words, more than `n_words` words in all."""
    text = ""
    while len(text.split()) <= n_words:
        adjective, other = (str(word) for word in rng.choice(words.ADJECTIVES, 2, replace=False))
        one, place = str(rng.choice(words.NOUNS["a"])), str(rng.choice(words.PLACES))
        rest = f"{rng.choice(words.VERBS)} the {other} {place} {rng.choice(words.TIMES)}."
        start = f"{rng.choice(words.NAMES)} and the {adjective} {one}" if rng.integers(2) else f"The {adjective} {one}"
        text += f"{' ' if text else ''}{start} {rest}"
    return text


def _check_choice(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise UnknownNameError(
            four_part(
                f"{name}={given!r} was given",
                where="ioi_pairs",
                names=allowed,
                given=str(given),
                fix="use one of these values.",
            )
        )


def _check_counts(where: str, **counts: int) -> None:
    wrong = [f"{name}={count}" for name, count in counts.items() if count < 1]
    if wrong:
        raise InvalidInputError(
            four_part(f"{', '.join(wrong)} was given", where=where, expected="at least 1.", fix="ask for one or more.")
        )
