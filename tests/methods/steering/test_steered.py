"""Steered passes and steered text: what is added where, and nothing anywhere else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.core.sites import Site
from interp_jax.methods.steering.steered import Sampling, additions, steered_generation, steered_logits
from interp_jax.methods.steering.steering_vector import SteeringVector
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import PAD

TOKENS = np.array([[5, 80, 3, 7, 200, 1, 9, 33], [PAD, PAD, 12, 41, 6, 0, 50, 51]], np.int32)
SITE = Site(1, "resid_pre")
D_MODEL = 24


@pytest.fixture
def vector(rng: np.random.Generator) -> SteeringVector:
    return SteeringVector(rng.normal(size=(3, D_MODEL)), SITE, "middle")


def test_a_coefficient_of_zero_changes_no_bit(lm, vector) -> None:
    # Cut at the same places, so that the arithmetic is the same.
    plain = lm.intervene(TOKENS, {"1.resid_pre": lambda value: value})
    np.testing.assert_array_equal(steered_logits(lm, TOKENS, vector, coefficient=0).logits, plain)
    np.testing.assert_allclose(plain, lm(TOKENS), atol=1e-4)


def test_what_stands_before_the_first_steered_position_keeps_its_bits(lm, vector) -> None:
    steered, plain = (np.asarray(steered_logits(lm, TOKENS, vector, coefficient=c).logits) for c in (5, 0))
    # Rows of 8 tokens and, after two of padding, of 6: two are free before the vector, and one.
    for row, start, first in ((0, 0, 2), (1, 2, 3)):
        np.testing.assert_array_equal(steered[row, start:first], plain[row, start:first])
        assert (np.abs(steered[row, first:] - plain[row, first:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("site", ["0.resid_pre", "2.resid_pre", "1.resid_mid", "2.resid_post"])
def test_adding_the_difference_to_another_text_gives_the_other_run(lm, site: str, rng) -> None:
    other = np.where(TOKENS >= 0, rng.integers(0, 250, TOKENS.shape), PAD)
    h, h_other = (np.asarray(lm.reap(tokens, site)[site]) for tokens in (TOKENS[:1], other[:1]))
    vector = SteeringVector((h_other - h)[0], Site(int(site[0]), site[2:]))
    steered = steered_logits(lm, TOKENS[:1], vector).logits
    np.testing.assert_allclose(steered, lm(other[:1]), atol=2e-4)
    assert np.abs(np.asarray(lm(other[:1]) - lm(TOKENS[:1]))).max() > 0.1


def test_vectors_add_up_in_any_order(tiny_llama, vector, rng) -> None:
    front = SteeringVector(rng.normal(size=(2, D_MODEL)), SITE)
    later = SteeringVector(rng.normal(size=D_MODEL), Site(2, "resid_mid"), "everywhere")
    one_way = steered_logits(tiny_llama, TOKENS, [vector, front, later], coefficient=2.0)
    other_way = steered_logits(tiny_llama, TOKENS, [later, front, vector], coefficient=2.0)
    np.testing.assert_allclose(one_way.logits, other_way.logits, atol=1e-4)
    assert list(one_way.sizes) == list(other_way.sizes) == [SITE, later.site]
    # As a function of the values, written out.
    table = {}
    for site, vectors in ((SITE, [vector, front]), (later.site, [later])):
        rows = np.zeros((2, 8, D_MODEL), np.float32)
        for row, start in enumerate((0, 2)):
            for one in vectors:
                n = 8 - start
                places = {"front": (0, 2), "middle": ((n - 3) // 2, (n - 3) // 2 + 3), "everywhere": (0, n)}
                first, end = places[str(one.placement)]
                rows[row, start + first : start + end] += one.values
        table[str(site)] = lambda value, rows=rows: value + 2.0 * rows
    np.testing.assert_allclose(one_way.logits, tiny_llama.intervene(TOKENS, table), atol=1e-4)
    by_additions = tiny_llama.intervene(TOKENS, additions(tiny_llama, TOKENS, [vector, front, later], coefficient=2.0))
    np.testing.assert_allclose(one_way.logits, by_additions, atol=1e-5)


def test_sizes_are_told_position_by_position(tiny_llama, vector, rng) -> None:
    later = SteeringVector(rng.normal(size=(2, D_MODEL)), Site(2, "resid_pre"), "back")
    steered = steered_logits(tiny_llama, TOKENS, [vector, later], coefficient=-3.0)
    first = steered.sizes[SITE]
    residual = np.linalg.norm(tiny_llama.reap(TOKENS, "1.resid_pre")["1.resid_pre"], axis=-1)
    norms = 3 * np.linalg.norm(vector.values, axis=-1)
    np.testing.assert_allclose(first.residual[0], residual[0], rtol=1e-5)
    np.testing.assert_allclose(first.added[0], [0, 0, *norms, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(first.ratio[1, 3:6], norms / residual[1, 3:6], rtol=1e-5)
    assert np.isnan(first.ratio[1, :2]).all() and np.isfinite(first.ratio[1, 2:]).all()
    assert repr(first).startswith("|added| / |resid| by position: 0.00 0.00 ")
    # The later residual has the earlier addition in it.
    both = [Site(1, "resid_pre"), Site(2, "resid_pre")]
    rows = additions(tiny_llama, TOKENS, vector)[SITE].value
    seen = {}
    for layer, _, value in (running_pass := tiny_llama.run(TOKENS, sites=both)):
        seen[layer] = np.asarray(value)
        running_pass.modified_value = value - 3.0 * rows if layer == 1 else value
    expected = np.linalg.norm(seen[2][0], axis=-1)
    np.testing.assert_allclose(steered.sizes[later.site].residual[0], expected, rtol=1e-4)


# Generation.
PROMPT, N_NEW = TOKENS[1:, 2:], 5
N_PROMPT = PROMPT.shape[1]
GREEDY = Sampling(
    n_samples=1, max_new_tokens=N_NEW, temperature=0.0, top_p=None, frequency_penalty=0.0, stop_at_eos=False
)


def without_cache(lm: LanguageModel) -> LanguageModel:
    return dataclasses.replace(lm, upstream=dataclasses.replace(lm.upstream, step=None, init_cache=None))


def steered_by_hand(
    lm: LanguageModel, prompt: list[int], vectors: list[SteeringVector], c: float, at: str
) -> list[int]:
    """The definition: run the whole text so far, add the rows where they belong, take the best token, start over."""
    tokens, n_total = list(prompt), len(prompt) + N_NEW
    for _ in range(N_NEW):
        rows = np.zeros((n_total, D_MODEL), np.float32)
        for vector in vectors:
            n = len(vector)
            if at in ("prompt", "all"):
                start = {"front": 0, "back": len(prompt) - n, "everywhere": 0}[str(vector.placement)]
                end = len(prompt) if vector.placement == "everywhere" else start + n
                rows[start:end] += vector.values
            if at in ("generated", "all"):
                rows[len(prompt) :] += vector.values
        text = np.array([tokens + [PAD] * (n_total - len(tokens))])
        site = str(vectors[0].site)
        logits = lm.intervene(text, {site: lambda value, rows=rows: value + np.float32(c) * rows[None]})
        tokens.append(int(np.asarray(logits)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("has_cache", [True, False])
@pytest.mark.parametrize(
    ("at", "placement", "n_rows"),
    [
        ("prompt", "front", 3),
        ("prompt", "back", 1),
        ("generated", "back", 1),
        ("all", "back", 1),
        ("all", "everywhere", 1),
    ],
)
def test_steered_text_is_its_definition(tiny_llama, rng, at, placement, n_rows: int, has_cache: bool) -> None:
    """With a key-value cache and with everything computed again, on the prompt alone and at every new token."""
    vector = SteeringVector(rng.normal(size=(n_rows, D_MODEL)), SITE, placement)
    lm = tiny_llama if has_cache else without_cache(tiny_llama)
    sampling = dataclasses.replace(GREEDY, at=at)
    steered = steered_generation(lm, PROMPT, vector, coefficient=1.5, sampling=sampling)
    expected = steered_by_hand(tiny_llama, PROMPT[0].tolist(), [vector], 1.5, at)
    assert steered.generation.new_tokens[0].tolist() == expected


def test_a_prompt_of_one_token_is_steered_once(tiny_llama, rng) -> None:
    """A step that reads one token has the shape of such a prompt, and is not steered again."""
    vector = SteeringVector(3 * rng.normal(size=(1, D_MODEL)), SITE)
    for lm in (tiny_llama, without_cache(tiny_llama)):
        new = steered_generation(lm, [[7]], vector, sampling=GREEDY).generation.new_tokens[0]
        assert new.tolist() == steered_by_hand(tiny_llama, [7], [vector], 1.0, "prompt")


@pytest.mark.slow
def test_samples_are_the_same_with_and_without_cache(tiny_llama, vector) -> None:
    sampling = Sampling(n_samples=3, max_new_tokens=4, temperature=1.5, top_p=0.9, seed=3, stop_at_eos=False)
    both = [
        steered_generation(lm, TOKENS, vector, coefficient=2.0, sampling=sampling)
        for lm in (tiny_llama, without_cache(tiny_llama))
    ]
    np.testing.assert_array_equal(both[0].generation.tokens, both[1].generation.tokens)
    assert both[0].generation.tokens.shape == (6, 12) and len(both[0].texts) == 6
    np.testing.assert_array_equal(both[0].generation.tokens[:3, :8], TOKENS[[0, 0, 0]])
    assert str(both[0]) == "\n".join(both[0].texts)
    # Sizes of the prompt's positions, for each row.
    size = both[0].sizes[SITE]
    assert size.ratio.shape == (6, 8)
    np.testing.assert_allclose(size.added[0, 2:5], 2 * np.linalg.norm(vector.values, axis=-1), rtol=1e-5)
    plain = steered_generation(tiny_llama, TOKENS, vector, coefficient=0.0, sampling=sampling)
    unsteered = tiny_llama.generate(
        np.repeat(TOKENS, 3, 0),
        max_new_tokens=4,
        temperature=1.5,
        top_p=0.9,
        frequency_penalty=1.0,
        seed=3,
        stop_at_eos=False,
    )
    np.testing.assert_array_equal(plain.generation.tokens, unsteered.tokens)


def test_sizes_at_every_new_token(tiny_llama, rng) -> None:
    vector = SteeringVector(rng.normal(size=(1, D_MODEL)), SITE, "everywhere")
    sampling = dataclasses.replace(GREEDY, at="generated")
    steered = steered_generation(tiny_llama, PROMPT, vector, coefficient=2.0, sampling=sampling)
    size = steered.sizes[SITE]
    # The last new token is never read.
    assert size.ratio.shape == (1, N_PROMPT + N_NEW - 1)
    assert (size.added[0, :N_PROMPT] == 0).all()
    np.testing.assert_allclose(size.added[0, N_PROMPT:], 2 * np.linalg.norm(vector.values), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"vectors": SteeringVector(np.ones((9, D_MODEL)), SITE)}, InvalidInputError, ["target of 6 tokens", "of 9"]),
        ({"vectors": SteeringVector(np.ones((2, 5)), SITE)}, ShapeError, ["2 x 5", "rows of width 24"]),
        ({"vectors": SteeringVector(np.ones(24), Site(3, "resid_pre"))}, UnknownNameError, ["3.resid_pre"]),
        ({"vectors": SteeringVector(np.ones(24), Site(1, "rezid_pre"))}, UnknownNameError, ["Did you mean"]),
        ({"vectors": SteeringVector(np.ones(24), Site(1, "z"))}, ShapeError, ["one vector per position"]),
        ({"vectors": []}, InvalidInputError, ["No steering vector"]),
        ({"coefficient": float("nan")}, InvalidInputError, ["coefficient", "one finite number"]),
        ({"coefficient": 1e39}, InvalidInputError, ["one finite number"]),
        ({"coefficient": [0.0, 50.0]}, InvalidInputError, ["[0.0, 50.0]", "one finite number"]),
        (
            {"at": "all"},
            InvalidInputError,
            ["A vector of 3 rows to be added at every generated token", "vector.row(2)"],
        ),
        ({"at": "always"}, InvalidInputError, ["at='always'", "'prompt', 'generated' or 'all'"]),
        ({"n_samples": 0}, InvalidInputError, ["n_samples=0", "from 1"]),
        ({"max_new_tokens": 1.5}, InvalidInputError, ["max_new_tokens=1.5"]),
        ({"top_p": 2.0}, InvalidInputError, ["top_p"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_steered(tiny_llama, vector, change: dict, error, words) -> None:
    given = {"vectors": vector, "coefficient": 1.0} | change
    vectors, coefficient = given.pop("vectors"), given.pop("coefficient")
    with pytest.raises(error) as raised:
        steered_generation(
            tiny_llama, PROMPT, vectors, coefficient=coefficient, sampling=dataclasses.replace(GREEDY, **given)
        )
    for word in [*words, "Fix:"]:
        assert word in str(raised.value)
    if not given:
        with pytest.raises(error):
            steered_logits(tiny_llama, PROMPT, vectors, coefficient=coefficient)
