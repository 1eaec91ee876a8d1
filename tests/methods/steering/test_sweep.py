"""Success and loss by coefficient: against a model whose probabilities are known, and against plain loops."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.core.results import load_result, save_result
from interp_jax.core.sites import Site
from interp_jax.methods.steering.spliced_loss import counted_targets, spliced_loss
from interp_jax.methods.steering.steered import Sampling, additions
from interp_jax.methods.steering.steering_vector import SteeringVector
from interp_jax.methods.steering.success import Vocabulary
from interp_jax.methods.steering.sweep import SteeringResult, steering_sweep
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import layer_scope, sow

WEDDING = Vocabulary(("wedding",), ("s",))


# A model that says "wedding" a quarter of the time, and exp(c) times as likely as "day" when steered by c.


class TwoWords:
    bos_id = eos_id = None

    def decode(self, tokens, *, skip_special_tokens: bool = False) -> str:
        return "".join((" wedding", " day")[token] for token in tokens if token >= 0)


def rigged_forward(params, tokens):
    with layer_scope(0):
        h = sow(jnp.zeros((*tokens.shape, 2)), name="resid_pre")
    return h @ params + jnp.array([-jnp.log(3.0), 0.0])[None, None]


RIGGED_TOKENIZER: Any = TwoWords()
RIGGED = LanguageModel(Upstream("rigged", rigged_forward), jnp.eye(2), tokenizer=RIGGED_TOKENIZER, name="rigged")


def test_a_rigged_model_succeeds_as_often_as_it_must() -> None:
    mask = np.array([False, True])
    vector = SteeringVector(np.array([[1.0, 0.0]]), Site(0, "resid_pre"), mask, name="rigged")
    coefficients = np.array([0.0, 1.0, -1.0, 30.0])
    n = 500
    result = steering_sweep(
        RIGGED,
        [[0, 1]],
        vector,
        coefficients,
        WEDDING,
        np.array([[0, 0, 1, 1, 0]]),
        sampling=Sampling(n_samples=n, max_new_tokens=1, top_p=None, frequency_penalty=0.0, rows_per_step=300),
        progress=False,
    )
    odds = np.exp(coefficients) / 3
    p = odds / (1 + odds)
    assert (np.abs(result.p_success - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()
    assert result.n_successes[3] == n and {len(texts) for texts in result.completions} == {n}
    assert set(result.completions[3]) == {" wedding"} and set(result.completions[0]) == {" wedding", " day"}
    # Positions do not see each other, so what is counted costs the same at each coefficient: tokens 3 and 4, 1 and 0.
    expected = -(np.log(0.75) + np.log(0.25)) / 2
    np.testing.assert_allclose(result.loss, expected, rtol=1e-5)
    assert result.n_targets == 2 and result.baseline == pytest.approx(expected, rel=1e-5)


# The spliced loss.


def test_what_is_counted() -> None:
    is_steered = np.zeros((4, 10), bool)
    is_steered[0, 4:7] = is_steered[1, 0] = is_steered[2, 8] = True
    tokens = np.arange(40).reshape(4, 10)
    tokens[1, 6:] = -1
    counted = [np.flatnonzero(row).tolist() for row in counted_targets(is_steered, tokens)]
    assert counted == [[8, 9], [2, 3, 4, 5], [], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    tokens[3, :4] = -1
    # The first token of a text is predicted by nothing.
    assert np.flatnonzero(counted_targets(is_steered, tokens)[3]).tolist() == [5, 6, 7, 8, 9]


def losses_by_hand(lm, tokens, vectors, coefficient: float, first: int) -> float:
    """One pass, one text, one target after another, in double precision."""
    found = []
    for row in tokens:
        logits = np.asarray(lm.intervene(row[None], additions(lm, row[None], vectors, coefficient=coefficient)))[0]
        for target in range(first, len(row)):
            of_target = logits[target - 1].astype(np.float64)
            found.append(np.logaddexp.reduce(of_target) - of_target[row[target]])
    return float(np.mean(found))


def test_the_loss_is_its_definition(lm, rng) -> None:
    tokens = rng.integers(0, 250, (3, 10))
    mask = np.isin(np.arange(10), [4, 5, 6])
    vectors = [
        SteeringVector(rng.normal(size=(3, 24)), Site(1, "resid_pre"), mask),
        SteeringVector(rng.normal(size=(2, 24)), Site(2, "resid_mid")),
    ]
    coefficients = [0.0, 2.0, -7.0]
    # Two texts at a time, so that the last pass is filled up.
    result = spliced_loss(lm, tokens, vectors, coefficients, texts_per_pass=2, progress=False)
    assert result.n_targets == 3 * 2
    expected = [losses_by_hand(lm, tokens, vectors, c, first=8) for c in coefficients]
    np.testing.assert_allclose(result.loss, expected, atol=1e-4)
    assert result.baseline == result.loss[0] and np.ptp(expected) > 1e-2
    assert repr(result).splitlines()[0].endswith("nats per token unsteered, over 6 targets")
    one = spliced_loss(lm, tokens, vectors, 2.0, progress=False)
    np.testing.assert_allclose(one.loss, expected[1:2], atol=1e-4)


VECTOR = SteeringVector(np.ones((3, 24)), Site(1, "resid_pre"), name="ones")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"placement": "back"}, ["Texts of 10 tokens", "last steered one is number 9", "two positions after"]),
        ({"tokens": np.ones((1, 4), int)}, ["last steered one is number 2", "longer texts"]),
        ({"tokens": np.ones((1, 2), int)}, ["A target of 2 tokens"]),
        ({"coefficients": []}, ["finite numbers, at least one"]),
        ({"coefficients": [np.inf]}, ["finite numbers"]),
        ({"coefficients": [1e39]}, ["finite numbers"]),
        ({"coefficients": [[1.0, 2.0]]}, ["[[1.0, 2.0]]", "[coefficient]"]),
        ({"texts_per_pass": 0}, ["texts_per_pass=0"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_losses_that_cannot_be_counted(tiny_llama, change: dict, words) -> None:
    given = {"tokens": np.ones((2, 10), int), "coefficients": [1.0]} | change
    vector = dataclasses.replace(VECTOR, placement=given.pop("placement", "front"))
    with pytest.raises(InvalidInputError) as error:
        spliced_loss(tiny_llama, given.pop("tokens"), vector, given.pop("coefficients"), progress=False, **given)
    for word in [*words, "Expected:", "Fix:"]:
        assert word in str(error.value)


# The sweep.
PROMPT = np.array([[259, 80, 3, 7, 200]])
TEXT = np.arange(40).reshape(2, 20) + 60
SAMPLING = Sampling(n_samples=3, max_new_tokens=3, temperature=1.0, top_p=0.9, rows_per_step=8, stop_at_eos=False)


@pytest.fixture(scope="module")
def swept(tiny_llama):
    letters = Vocabulary(tuple("abcdefghijklmnopqrstuvwxyz"))

    def sweep(coefficients) -> SteeringResult:
        return steering_sweep(
            tiny_llama, PROMPT, VECTOR, coefficients, letters, TEXT, sampling=SAMPLING, progress=False
        )

    return sweep, sweep([0.0, 1.0, 4.0])


def test_no_coefficient_is_compiled(swept) -> None:
    sweep, first = swept
    with count_compilations() as new:
        other = sweep([0.0, -2.5, 9.0])
    assert new == []
    # And they are others: 0 alone gives what it gave.
    assert other.loss[0] == first.loss[0] and (np.abs(other.loss[1:] - first.loss[1:]) > 1e-3).all()


def test_a_sweep_is_what_it_is_made_of(tiny_llama, swept, tmp_path) -> None:
    _, result = swept
    assert result.method == "ones" and result.sites == ("1.resid_pre",)
    alone = spliced_loss(tiny_llama, TEXT, VECTOR, [0.0, 1.0, 4.0], progress=False)
    np.testing.assert_allclose(result.loss, alone.loss, atol=1e-6)
    assert (result.baseline, result.n_targets) == (alone.baseline, alone.n_targets)
    assert [len(texts) for texts in result.completions] == [3, 3, 3]
    ratios = result.ratios["1.resid_pre"]
    residual = np.linalg.norm(np.asarray(tiny_llama.reap(PROMPT, "1.resid_pre")["1.resid_pre"])[0], axis=-1)
    norms = np.array([0.0, 1.0, 4.0])[:, None] * np.array([24**0.5] * 3 + [0, 0])
    np.testing.assert_allclose(ratios, norms / residual, rtol=1e-5)
    assert "by position" not in repr(result) and repr(result).count("\n") == 5
    assert result.prompt == tiny_llama.decode(PROMPT[0], skip_special_tokens=True)
    path = save_result(result, name="steer", root=tmp_path)
    saved = load_result(path).result
    np.testing.assert_array_equal(saved["loss"], result.loss)
    assert saved["completions"] == [list(texts) for texts in result.completions]


def test_frontiers_of_results(swept) -> None:
    _, result = swept
    fixed = dataclasses.replace(result, n_successes=np.array([0, 3, 1]), loss=np.array([1.0, 2.0, 3.0]))
    assert fixed.frontier.tolist() == [0, 1]
    np.testing.assert_allclose(fixed.p_success, [0, 1, 1 / 3])
    better = dataclasses.replace(fixed, n_successes=np.array([1, 3, 3]), loss=np.array([0.9, 2.0, 2.5]))
    assert better.dominates(fixed) and not fixed.dominates(better)
    assert fixed.intervals.shape == (3, 2) and (fixed.intervals[:, 0] <= fixed.p_success).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": np.ones((2, 5), int)}, ["2 prompts"]),
        ({"coefficients": [[1.0]]}, ["coefficient [[1.0]]", "[coefficient]"]),
        ({"vocabulary": ["rain"]}, ["The vocabulary ['rain']", "Vocabulary("]),
        ({"prompt": [[1, 2]]}, ["A target of 2 tokens", "steering vector of 3"]),
        ({"text": np.ones((1, 4), int)}, ["two positions after the last steered one"]),
        ({"sampling": Sampling(n_samples=0)}, ["n_samples=0"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_sweeps_that_cannot_be_run(tiny_llama, change, words) -> None:
    given = {"prompt": PROMPT, "coefficients": [1.0], "text": TEXT, "sampling": SAMPLING} | change
    with pytest.raises(InvalidInputError) as error:
        steering_sweep(
            tiny_llama,
            given["prompt"],
            VECTOR,
            given["coefficients"],
            given.get("vocabulary", WEDDING),
            given["text"],
            sampling=given["sampling"],
            progress=False,
        )
    for word in [*words, "Expected:", "Fix:"]:
        assert word in str(error.value)
