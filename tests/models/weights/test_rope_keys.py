"""Configurations as transformers 5 writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp_jax.core.errors import UnsupportedModelError
from interp_jax.models.loading import load
from interp_jax.models.weights.rope_keys import with_older_rope_keys
from tests.conftest import ORACLES

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def rewritten(directory: Path, **keys: Any) -> Path:
    """The tiny Llama in `directory`, with other keys in its configuration (None takes one away)."""
    shutil.copytree(ORACLES / "tiny_llama", directory)
    config = json.loads((directory / "config.json").read_text()) | keys
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value}))
    return directory


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "default"}, LLAMA3], ids=["none", "default", "llama3"])
def test_a_model_saved_by_transformers_5_is_the_one_saved_before(tmp_path, rng, scaling) -> None:
    older = rewritten(tmp_path / "older", rope_theta=5000.0, rope_scaling=scaling)
    newer = rewritten(
        tmp_path / "newer", rope_theta=None, rope_scaling=None, rope_parameters={"rope_theta": 5000.0} | scaling
    )
    tokens = rng.integers(0, 50, (2, 24))
    one, other = load(older), load(newer)
    np.testing.assert_array_equal(one(tokens), other(tokens))
    assert np.abs(one(tokens) - load(ORACLES / "tiny_llama")(tokens)).max() > 1e-4  # The base and scaling are read.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            {
                "model_type": "gemma3_text",
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            {
                "model_type": "gpt_neox",
                "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "rope_type": "default"},
            },
            {"model_type": "gpt_neox", "rotary_emb_base": 1e4, "rotary_pct": 0.25},
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4}}, {"rope_theta": 1e4}),
        ({"rope_theta": 1e4}, {"rope_theta": 1e4}),
    ],
    ids=["gemma", "neox", "both", "older"],
)
def test_the_older_keys(given, expected) -> None:
    assert with_older_rope_keys(given) == expected


@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        {"rope_parameters": "default"},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "yarn"}}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "chunked_attention": {"rope_theta": 1e4}}},
    ],
    ids=["contradicts", "no object", "scaled windows", "other kinds"],
)
def test_what_older_keys_do_not_say_is_left(given) -> None:
    assert with_older_rope_keys(given) == given


def test_a_contradiction_is_refused(tmp_path) -> None:
    path = rewritten(tmp_path / "model", rope_theta=5000.0, rope_parameters={"rope_theta": 500.0})
    with pytest.raises(UnsupportedModelError, match="rope_parameters"):
        load(path)
