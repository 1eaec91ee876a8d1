"""Configurations whose values are of an impossible kind are refused before any code of the family sees them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from interp_jax.core.errors import LoadError
from interp_jax.models.loading import load
from interp_jax.models.weights.config_values import wrong_values
from tests.models.weights.gguf_files import ORACLES

FAMILIES = {
    "tiny_llama": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps"),
    "tiny_gpt2": ("n_embd", "n_layer", "n_head", "n_positions", "layer_norm_epsilon"),
}
NO_NUMBERS = ["24", [24], {"is": 24}, True, -24, 0, 2**40, float("nan")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_a_number_that_is_none(family: str, value: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ORACLES / family, model)
    config = json.loads((model / "config.json").read_text())
    for key in FAMILIES[family]:
        if value == 2**40 and "eps" in key:
            continue
        (model / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(LoadError) as error:
            load(model)
        message = str(error.value)
        assert f"Configuration with {key}={value!r} in {model}" in message
        assert f"Expected: {key}: a " in message and "Fix: take the config.json" in message


def test_every_offender_is_listed() -> None:
    config = {"n_embd": 1.5, "n_layer": 3, "n_inner": None, "scale_attn_weights": 1, "layer_norm_epsilon": "x", "y": {}}
    config |= {"rope_theta": 10**30, "rope_local_base_freq": 10**9, "rope_scaling": "linear"}
    assert list(wrong_values(config)) == [
        "n_embd", "scale_attn_weights", "layer_norm_epsilon", "rope_theta", "rope_scaling"
    ]  # fmt: skip


@pytest.mark.parametrize("value", [{}, [], "linear", 8.0], ids=repr)
def test_a_scaling_that_is_no_object(value: Any) -> None:
    assert wrong_values({"rope_scaling": value}) == {"rope_scaling": "an object with rope_type, or null"}
    assert not wrong_values({"rope_scaling": None})
