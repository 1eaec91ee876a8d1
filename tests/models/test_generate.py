"""Generation: the cache changes nothing, rows do not disturb each other, interventions act where they should.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnsupportedModelError
from interp_jax.core.interventions import Added, Masked
from interp_jax.models.generate import Settings, generate
from interp_jax.models.sampling import Sampler, penalised, sample
from interp_jax.models.upstream import PAD, Upstream
from interp_jax.transforms.compilations import count_compilations

PROMPTS = np.array([[5, 80, 3, 7, 200, 1], [PAD, PAD, PAD, 41, 6, 0]], np.int32)
N_NEW = 5
N_PROMPT, TOTAL = PROMPTS.shape[1], PROMPTS.shape[1] + N_NEW


def greedy_by_hand(lm, row: np.ndarray, interventions=None) -> tuple[list[int], list[float]]:
    """The definition: run the model on everything so far, take the most probable token, start over.

    What is not there yet is padding on the right, so that all steps have one shape.
    """
    tokens, log_probs = row[row >= 0].tolist(), []
    for _ in range(N_NEW):
        text = np.array([tokens + [PAD] * (TOTAL - len(tokens))])
        logits = np.asarray(lm.intervene(text, interventions or {}))[0, len(tokens) - 1].astype(np.float64)
        tokens.append(int(logits.argmax()))
        log_probs.append(-np.log(np.exp(logits - logits.max()).sum()))
    return tokens[-N_NEW:], log_probs


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_its_definition(tiny, use_cache: bool) -> None:
    """Batched and padded, each row gives what it gives alone."""
    generation = tiny.generate(PROMPTS, max_new_tokens=N_NEW, use_cache=use_cache, stop_at_eos=False)
    np.testing.assert_array_equal(generation.tokens[:, :N_PROMPT], PROMPTS)
    assert generation.new_tokens.shape == (2, N_NEW)
    for row, new, log_probs in zip(PROMPTS, generation.new_tokens, generation.log_probs, strict=True):
        expected, expected_log_probs = greedy_by_hand(tiny, row)
        assert new.tolist() == expected
        np.testing.assert_allclose(log_probs, expected_log_probs, atol=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 20},
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 3.0, "top_k": 50, "top_p": 0.7},
    ],
    ids=str,
)
def test_sampling_is_the_same_with_and_without_cache(tiny_llama, seed: int, sampling) -> None:
    both = [
        tiny_llama.generate(
            PROMPTS, max_new_tokens=N_NEW, seed=seed, use_cache=use_cache, stop_at_eos=False, **sampling
        )
        for use_cache in (True, False)
    ]
    np.testing.assert_array_equal(both[0].tokens, both[1].tokens)
    np.testing.assert_allclose(both[0].log_probs, both[1].log_probs, atol=1e-4)


def test_seeds(tiny_llama, seed: int) -> None:
    def new(seed, prompts=PROMPTS):
        return tiny_llama.generate(prompts, max_new_tokens=8, temperature=2.0, seed=seed, stop_at_eos=False).new_tokens

    np.testing.assert_array_equal(new(seed), new(seed))
    np.testing.assert_array_equal(new(seed), new(jax.random.key(seed)))
    assert (new(seed) != new(seed + 1)).any()
    same_prompt = new(seed, np.repeat(PROMPTS[:1], 2, axis=0))
    assert (same_prompt[0] != same_prompt[1]).any()


SITE = "1.resid_post"
COLUMN_MASK = np.zeros((TOTAL, 1), bool)
COLUMN_MASK[[2, 4, N_PROMPT + 1, N_PROMPT + 3]] = True
PROMPT_MASK = np.zeros((1, N_PROMPT, 1), bool)
PROMPT_MASK[:, [1, 5]] = True
RAMP = np.linspace(-1, 1, TOTAL * 24, dtype=np.float32).reshape(TOTAL, 24)


IS_NEW = np.arange(TOTAL)[:, None] >= N_PROMPT


def put(mask, value):
    """The function that puts a value in at the columns of a mask, which ends where it ends."""
    full = np.zeros((TOTAL, 1), bool)
    flat = np.asarray(mask).reshape(-1, 1)
    full[: len(flat)] = flat
    return lambda old: jnp.where(full, value, old)


# What is given, at which positions it acts, and the function of all columns that it stands for.
CASES = {
    "a function": (lambda v: v * 0.5, "all", lambda v: v * 0.5),
    "a function on the prompt": (lambda v: v * 0.5, "prompt", lambda v: jnp.where(IS_NEW, v, v * 0.5)),
    "a function on new tokens": (lambda v: v * 0.5, "generated", lambda v: jnp.where(IS_NEW, v * 0.5, v)),
    "a value everywhere": (Masked(0.3, np.array(True)), "all", lambda v: v * 0 + 0.3),
    "a value for one axis": (Masked(2.0, np.arange(24) < 3), "all", lambda v: jnp.where(np.arange(24) < 3, 2.0, v)),
    "a mask over all columns": (Masked(1.5, COLUMN_MASK), "all", put(COLUMN_MASK, 1.5)),
    "a mask over the prompt": (Masked(1.5, PROMPT_MASK), "all", put(PROMPT_MASK, 1.5)),
    "a row of values per column": (Masked(RAMP, COLUMN_MASK), "all", put(COLUMN_MASK, RAMP)),
    "an array over the prompt": (RAMP[None, :N_PROMPT], "all", put(~IS_NEW, RAMP)),
    "an array over everything": (RAMP[None], "all", put(IS_NEW | True, RAMP)),
    "an addition everywhere": (Added(RAMP[0], 2.0), "all", lambda v: v + 2.0 * RAMP[None, :1]),
    "an addition to the prompt": (
        Added(RAMP[None, :N_PROMPT]),
        "all",
        lambda v: v + np.where(IS_NEW, np.float32(0), RAMP)[None],
    ),
    "an addition per column": (Added(RAMP, np.float32(0.5)), "all", lambda v: v + 0.5 * RAMP[None]),
    "an addition to new tokens": (Added(RAMP), "generated", lambda v: v + np.where(IS_NEW, RAMP, np.float32(0))[None]),
    "a coefficient per column": (
        Added(RAMP[0], 1.0 * ~IS_NEW),
        "all",
        lambda v: v + np.where(IS_NEW, 0, RAMP[0])[None],
    ),
    "a mask on new tokens": (Masked(1.5, COLUMN_MASK), "generated", put(COLUMN_MASK & IS_NEW, 1.5)),
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_interventions_act_where_they_should(tiny_llama, case: str, use_cache: bool) -> None:
    intervention, at, function = CASES[case]
    generation = tiny_llama.generate(
        PROMPTS[:1],
        max_new_tokens=N_NEW,
        interventions={SITE: intervention},
        at=at,
        use_cache=use_cache,
        stop_at_eos=False,
    )
    assert generation.new_tokens[0].tolist() == greedy_by_hand(tiny_llama, PROMPTS[0], {SITE: function})[0]


@pytest.mark.parametrize("site", ["0.pattern", "2.k", "logits", "embed"])
def test_other_sites_with_and_without_cache(tiny_llama, site: str) -> None:
    both = [
        tiny_llama.generate(
            PROMPTS,
            max_new_tokens=N_NEW,
            interventions={site: lambda value: value * 0.5},
            use_cache=use_cache,
            stop_at_eos=False,
        ).tokens
        for use_cache in (True, False)
    ]
    np.testing.assert_array_equal(both[0], both[1])


def test_pattern_masks_have_a_query_and_a_key_axis(tiny_llama) -> None:
    """Forbid every later query to look at column 2, and give what it loses to nobody."""
    mask = np.zeros((TOTAL, TOTAL), bool)
    mask[3:, 2] = True
    both = [
        tiny_llama.generate(
            PROMPTS[:1],
            max_new_tokens=N_NEW,
            interventions={"pattern": Masked(0.0, mask)},
            use_cache=use_cache,
            stop_at_eos=False,
        ).tokens
        for use_cache in (True, False)
    ]
    np.testing.assert_array_equal(both[0], both[1])
    by_hand, _ = greedy_by_hand(tiny_llama, PROMPTS[0], {"pattern": Masked(0.0, mask)})
    assert both[0][0, N_PROMPT:].tolist() == by_hand


def test_padded_rows_under_interventions_are_what_they_are_alone(tiny_llama) -> None:
    interventions = {"1.mlp_out": lambda value: value * 0.2, "2.attn_out": lambda value: value + 0.1}
    generation = tiny_llama.generate(PROMPTS, max_new_tokens=N_NEW, interventions=interventions, stop_at_eos=False)
    for row, new in zip(PROMPTS, generation.new_tokens, strict=True):
        assert new.tolist() == greedy_by_hand(tiny_llama, row, interventions)[0]


def test_rows_end_at_the_end_of_text(tiny_llama) -> None:
    free = tiny_llama.generate(PROMPTS, max_new_tokens=N_NEW, stop_at_eos=False)
    # Take the token row 0 gives in its third step for the end of text.
    eos_id = int(free.new_tokens[0, 2])
    assert eos_id not in free.new_tokens[1, :4]
    for use_cache in (True, False):
        settings = Settings(max_new_tokens=N_NEW, eos_id=eos_id, use_cache=use_cache)
        ended = generate(tiny_llama.upstream, tiny_llama.params, PROMPTS, settings)
        end = int(np.flatnonzero(free.new_tokens[0] == eos_id)[0]) + 1
        np.testing.assert_array_equal(ended.new_tokens[0, :end], free.new_tokens[0, :end])
        assert (ended.new_tokens[0, end:] == PAD).all()
        assert (ended.log_probs[0, end:] == 0).all()
        np.testing.assert_array_equal(ended.new_tokens[1], free.new_tokens[1, : ended.new_tokens.shape[1]])
        alone = generate(tiny_llama.upstream, tiny_llama.params, PROMPTS[:1], settings)
        assert alone.new_tokens.shape == (1, end)


def test_text_in_text_out(tiny_llama) -> None:
    generation = tiny_llama.generate(["the cat", "a"], max_new_tokens=4, stop_at_eos=False)
    assert generation.texts == tuple(tiny_llama.decode(row, skip_special_tokens=True) for row in generation.new_tokens)
    assert str(generation) == "\n".join(generation.texts)
    assert len(tiny_llama.generate("the cat", max_new_tokens=1).texts) == 1


def test_steps_share_programs(tiny_llama) -> None:
    def go(layer: int, n_new: int, temperature: float):
        intervention = {f"{layer}.mlp_out": Masked(np.float32(layer), COLUMN_MASK[:N_PROMPT])}
        tiny_llama.generate(
            PROMPTS, max_new_tokens=n_new, temperature=temperature, interventions=intervention, stop_at_eos=False
        )

    for layer in (0, 1, 2):
        go(layer, 3, 1.0)
    with count_compilations() as new:
        for layer in (2, 0, 1):
            go(layer, 5, 1.0 + layer)
    assert new == []


REFUSED = {
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens=0"),
    "too many tokens": ({"max_new_tokens": 43}, "at most 42 (n_ctx 48 less the prompt)"),
    "negative temperature": ({"temperature": -1.0}, "temperature=-1.0"),
    "nan temperature": ({"temperature": float("nan")}, "temperature=nan"),
    "top_k": ({"top_k": 0}, "top_k=0"),
    "top_p": ({"top_p": 1.5}, "top_p above 0 and at most 1"),
    "at": ({"at": "promt"}, "at='promt'"),
    "frequency_penalty": ({"frequency_penalty": float("inf")}, "frequency_penalty=inf"),
    "several": ({"top_k": 0, "temperature": -1.0}, "temperature=-1.0, top_k=0"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_settings_out_of_range(tiny_llama, case: str) -> None:
    settings, words = REFUSED[case]
    with pytest.raises(InvalidInputError) as error:
        tiny_llama.generate(PROMPTS, **settings)
    assert words in str(error.value)


def test_prompts_that_are_refused(tiny_llama) -> None:
    with pytest.raises(InvalidInputError, match=r"padded on the right \(row 0\)(.|\n)*padding on the left"):
        tiny_llama.generate([[3, PAD], [3, 4]])
    with pytest.raises(InvalidInputError, match="Empty text"):
        tiny_llama.generate("")
    with pytest.raises(InvalidInputError, match="Token ids 260"):
        tiny_llama.generate([[260]])


def test_interventions_that_do_not_fit(tiny_llama) -> None:
    cases = [
        (Masked(1.0, np.zeros((7, 1), bool)), r"1 position, the 6 of the prompt, or all 11"),
        (np.zeros((1, 7, 24), np.float32), r"1 position, the 6 of the prompt, or all 11"),
        (Masked(1.0, np.zeros((6, 5), bool)), r"1\.resid_post"),
        (np.zeros((6, 23), np.float32), r"1\.resid_post"),
        (Added(np.zeros((1, 7, 24), np.float32)), r"value float32\[1, 7, 24\], coefficient(.|\n)*or all 11"),
        (Added(np.zeros((6, 23), np.float32)), r"1\.resid_post(.|\n)*a row per position"),
    ]
    for intervention, words in cases:
        with pytest.raises(ShapeError, match=words):
            tiny_llama.generate(PROMPTS, max_new_tokens=N_NEW, interventions={SITE: intervention})


def test_a_model_without_a_cache() -> None:
    count = Upstream("count", lambda params, tokens: 9.0 * jax.nn.one_hot((tokens + 1) % 7, 7))
    with pytest.raises(UnsupportedModelError, match=r"count has no key-value cache(.|\n)*use_cache=False"):
        generate(count, {}, np.array([[1]]), Settings())
    new = generate(count, {}, np.array([[1], [4]]), Settings(max_new_tokens=4, use_cache=False)).new_tokens
    assert new.tolist() == [[2, 3, 4, 5], [5, 6, 0, 1]]


def test_settings_are_data() -> None:
    assert dataclasses.asdict(Settings())["use_cache"] is True


# Sampling against the distribution written out in NumPy.


def allowed_by_hand(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Probabilities after temperature, top-k and top-p, in double precision, by sorting."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    keep = np.zeros(len(scaled), bool)
    keep[order[: top_k or len(order)]] = True
    p = np.where(keep, np.exp(scaled - scaled.max()), 0)
    p /= p.sum()
    if top_p is not None:
        total, kept = 0.0, np.zeros(len(p), bool)
        for token in order:
            kept[token] = True
            total += p[token]
            if total >= top_p:
                break
        p = np.where(kept, p, 0)
    return p / p.sum()


@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 100])
def test_sample_draws_from_the_distribution(rng: np.random.Generator, key: jax.Array, top_k, top_p) -> None:
    logits = rng.normal(0, 2, 12).astype(np.float32)
    temperature, n = 1.7, 4000
    p = allowed_by_hand(logits, temperature, top_k, top_p)
    sampler = Sampler(is_greedy=False, top_k=top_k, has_top_p=top_p is not None)
    drawn = sample(
        jnp.broadcast_to(logits, (n, 12)),
        jax.random.split(key, n),
        sampler,
        temperature=temperature,
        top_p=top_p or 1.0,
    )
    counts = np.bincount(drawn, minlength=12)
    assert counts[p == 0].sum() == 0
    # Five standard deviations of each count, and one for the rare ones.
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()


def test_sample_greedily() -> None:
    logits = jnp.array([[0.0, 3.0, 1.0], [5.0, 5.0, 1.0]])
    sampler = Sampler(is_greedy=True, top_k=None, has_top_p=False)
    assert sample(logits, jax.random.split(jax.random.key(0), 2), sampler, temperature=0.0, top_p=1.0).tolist() == [
        1,
        0,
    ]


def test_the_penalty_counts_the_text_so_far(rng: np.random.Generator) -> None:
    logits = rng.normal(0, 3, (5, 12)).astype(np.float32)
    text = rng.integers(-1, 12, (5, 30)).astype(np.int32)
    expected = np.array(
        [
            [z - 0.7 * list(row).count(token) for token, z in enumerate(of_row)]
            for of_row, row in zip(logits, text, strict=True)
        ]
    )
    np.testing.assert_allclose(penalised(jnp.asarray(logits), jnp.asarray(text), 0.7), expected, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_under_a_penalty_is_its_definition(tiny_llama, use_cache: bool) -> None:
    """The logits of everything so far, less the penalty times the counts, prompt included; the greatest wins."""
    penalty = 1.5
    generation = tiny_llama.generate(
        PROMPTS, max_new_tokens=N_NEW, frequency_penalty=penalty, use_cache=use_cache, stop_at_eos=False
    )
    for row, new, log_probs in zip(PROMPTS, generation.new_tokens, generation.log_probs, strict=True):
        tokens = row[row >= 0].tolist()
        for token, log_prob in zip(new, log_probs, strict=True):
            text = np.array([tokens + [PAD] * (TOTAL - len(tokens))])
            logits = np.asarray(tiny_llama(text))[0, len(tokens) - 1].astype(np.float64)
            counts = np.bincount(tokens, minlength=len(logits))
            assert token == (logits - penalty * counts).argmax()
            # What is reported is the model's own, without the penalty.
            assert log_prob == pytest.approx(logits[token] - np.logaddexp.reduce(logits), abs=1e-4)
            tokens.append(int(token))
    assert generation.tokens.tolist() != tiny_llama.generate(PROMPTS, max_new_tokens=N_NEW).tokens.tolist()


def test_top_p_on_ties_and_extremes() -> None:
    """Equal logits stay or go together, minus infinity never stays, negative logits are in order too."""
    inf = np.inf
    rows = jnp.array(
        [
            [0.0, 0.0, -1.0, -9.0, -inf],
            [-5.0, -4.0, -3.0, -80.0, -inf],
            [7.0, -inf, -inf, -inf, -inf],
            [1e30, 0, 0, 0, 0],
        ]
    )
    keys = jax.random.split(jax.random.key(0), 2000)
    sampler = Sampler(is_greedy=False, top_k=None, has_top_p=True)
    expected = {0.3: ({0, 1}, {2}, {0}, {0}), 0.8: ({0, 1}, {1, 2}, {0}, {0}), 0.95: ({0, 1, 2}, {0, 1, 2}, {0}, {0})}
    for top_p, tokens in expected.items():
        for row, allowed in zip(rows, tokens, strict=True):
            many = jnp.broadcast_to(row, (2000, 5))
            drawn = sample(many, keys, sampler, temperature=1.0, top_p=top_p)
            assert set(np.unique(drawn).tolist()) == allowed
