"""What a training run refuses before anything runs: wrong kinds, numbers out of range, parts that clash."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InterpError
from interp_jax.forward.batch_streams import ArrayStream
from interp_jax.methods.sae import (
    AuxK,
    GhostGrads,
    JumpReLU,
    MatchingPursuit,
    Matryoshka,
    Redraw,
    ReLU,
    Resample,
    StepRule,
    TopK,
    TrainConfig,
    train,
)
from interp_jax.methods.sae.train_config import as_json, check_settings

RULE = StepRule(TopK(k=2), n_steps=4)
CONFIG = TrainConfig(RULE, n_latents=8, sites=("x",), n_sample_batches=1)
NAN, INF = float("nan"), float("inf")

# Field, values nobody can train with, and what the message says is expected.
RUN: list[tuple[str, tuple[Any, ...], str]] = [
    ("rule", (TopK(k=2), "relu", None, {}), "StepRule("),
    ("n_latents", (0, -1, 8.0, 8.5, "8", True, None), "a whole number (an int), at least 1"),
    ("sites", ("x", (), None, 3), "a tuple with at least one in it"),
    ("sites", ((3,), (("x", "x", "x"),)), "a pair (read, write)"),
    ("coefficients", (0.1, (), "0.1", np.array([0.1, 0.2])), "a tuple with at least one in it"),
    ("coefficients", (("a",), (-0.1,), (NAN,), (INF,), (None,)), "a finite number, at least 0"),
    ("scaling", ("unit", None, 2.0), "unit_ms"),
    ("b_dec", ("median", 0, None), "geometric_median"),
    ("n_sample_batches", (0, 2.0, "2"), "at least 1"),
    ("n_refused_max", (0, -1, 1.5), "at least 1"),
    ("seed", (-1, 1.5, "a", 2**40), "from 0 to 2**31 - 1"),
    ("resampling", ("bricken", Resample), "Resample() or Redraw(at_steps=(1000,))"),
    ("resampling", (Resample(at_steps=1), Redraw(at_steps=())), "a tuple with at least one in it"),  # type: ignore[arg-type]
    ("resampling", (Resample(at_steps=(0,)), Redraw(at_steps=(1.5,))), "at least 1"),  # type: ignore[arg-type]
    ("resampling", (Resample(n_inputs=0), Resample(window_steps=-1)), "at least 1"),
    ("resampling", (Resample(encoder_norm=-1), Resample(encoder_norm=NAN)), "above 0"),
    ("resampling", (Redraw((1,), frequency=-1), Redraw((1,), frequency=NAN)), "at least 0, at most 1"),
]
STEP: list[tuple[str, tuple[Any, ...], str]] = [
    ("architecture", (ReLU, "relu", None), "TopK(k=32)"),
    ("architecture", (TopK(0), TopK(9), TopK(2.5), TopK("2"), TopK(2.0)), "a whole number from 1 to 8"),  # type: ignore[arg-type]
    ("architecture", (Matryoshka(2, [4, 4]), Matryoshka(2, (4.0, 4.0)), Matryoshka(2, 8)), "in a tuple of ints"),  # type: ignore[arg-type]
    ("architecture", (MatchingPursuit(2, tolerance=-1), MatchingPursuit(2, tolerance=NAN)), "at least 0"),
    ("n_steps", (0, 2.5, "3", 1e4), "a whole number (an int), at least 1"),
    ("learning_rate", (0.0, -1.0, NAN, INF, "1e-3"), "above 0"),
    ("beta1", (1.0, -0.1), "at least 0, below 1"),
    ("beta2", (1.0, 2.0), "at least 0, below 1"),
    ("epsilon", (-1.0, NAN), "at least 0"),
    ("n_warm_up_steps", (-1, 1.5), "at least 0"),
    ("n_coefficient_warm_up_steps", (-1, "a"), "at least 0"),
    ("n_decay_steps", (-1, 0.2), "at least 0"),
    ("n_decay_steps", (5,), "no more of both together than there are steps"),
    ("gradient_clip", (0.0, -1.0, "a"), "above 0"),
    ("decoder_norm", ("one", 1.0, None), "at_most_one"),
    ("dead_after_tokens", (0, -5, 2**40, 1e3), f"at least 1, at most {2**31 - 1}"),
    ("dead_term", ("auxk", AuxK), "AuxK() or GhostGrads()"),
    ("dtype", ("float99", "int32", jnp.bfloat16, None), "bfloat16"),
]
PARTS: dict[str, Any] = {
    "aux_k=0": lambda: AuxK(k=0),
    "aux_k=2.5": lambda: AuxK(k=2.5),  # type: ignore[arg-type]
    "aux_k=a": lambda: AuxK(k="a"),  # type: ignore[arg-type]
    "aux_coefficient": lambda: AuxK(coefficient=-1),
    "ghost_kind": lambda: GhostGrads("rescale"),
    "ghost_steps": lambda: GhostGrads(n_first_steps=-1),
    "threshold=inf": lambda: JumpReLU(threshold=INF),
    "threshold=a": lambda: JumpReLU(threshold="a"),  # type: ignore[arg-type]
    "bandwidth": lambda: JumpReLU(bandwidth=-1),
}


def refused(action: Any) -> str:
    with pytest.raises(InterpError) as info:
        action()
    text = str(info.value)
    assert " was given" in text or " were given" in text or text.startswith("Unknown"), text
    assert ("Expected:" in text or "Known:" in text) and "Fix:" in text, text
    return text


def test_what_is_right_passes() -> None:
    check_settings(CONFIG)
    resampling = Resample(at_steps=(2,), window_steps=1, n_inputs=np.int64(16))  # type: ignore[arg-type]
    check_settings(dataclasses.replace(CONFIG, coefficients=[0, np.float64(0.5)], resampling=resampling))  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "values", "expected"), RUN, ids=lambda part: part if isinstance(part, str) else "")
def test_a_run_that_cannot_be(field, values, expected) -> None:
    for value in values:
        assert expected in refused(lambda value=value: check_settings(dataclasses.replace(CONFIG, **{field: value})))


@pytest.mark.parametrize(("field", "values", "expected"), STEP, ids=lambda part: part if isinstance(part, str) else "")
def test_a_step_that_cannot_be(field, values, expected) -> None:
    for value in values:
        rule = dataclasses.replace(RULE, **{field: value})
        assert expected in refused(lambda rule=rule: check_settings(dataclasses.replace(CONFIG, rule=rule)))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_cannot_be(part) -> None:
    refused(PARTS[part])


def test_a_tied_transcoder_has_no_weights_to_tie() -> None:
    rule = StepRule(ReLU(is_tied=True, is_centred=False), n_steps=1)
    text = refused(lambda: check_settings(dataclasses.replace(CONFIG, rule=rule, sites=(("a", "b"),))))
    assert "not tied" in text and "the transcoder from a to b" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stream": np.ones((4, 3))}, "ndarray was given for the stream"),
        ({"stream": None}, "ArrayStream(rows, batch_size)"),
        ({"config": RULE}, "StepRule StepRule(architecture=TopK"),
        ({"config": TrainConfig}, "The class TrainConfig was given"),
        ({"save_every": 0}, "save_every = 0"),
        ({"save_every": 0.5}, "a whole number"),
        ({"log_every": 0}, "log_every = 0"),
        ({"directory": 3}, "int was given for directory"),
        ({"origin": "pydoc"}, "str was given for origin"),
    ],
    ids=["array", "none", "rule", "class", "save_0", "save_half", "log_0", "directory", "origin"],
)
def test_a_call_that_cannot_be(changes, words) -> None:
    given = {"config": CONFIG, "stream": ArrayStream(np.ones((8, 3)), batch_size=4)} | changes
    assert words in refused(lambda: train(**given, progress=False))


def test_numbers_of_numpy_are_numbers_in_json() -> None:
    config = dataclasses.replace(CONFIG, n_latents=np.int64(8), coefficients=[np.float64(0.5)])  # type: ignore[arg-type]
    assert json.loads(json.dumps(as_json(config)))["coefficients"] == [0.5]
