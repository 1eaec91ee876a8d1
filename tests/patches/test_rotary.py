"""Rotary frequencies: their formulas against loops of plain Python, and models under each scaling against PyTorch.

Source: interp_jax.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from interp_jax.core.errors import UnsupportedModelError
from interp_jax.models.loading import load
from interp_jax.models.weights.checkpoint import Checkpoint, Tensors
from interp_jax.patches import rotary
from tests.conftest import ORACLES
from tests.oracles.record_rotary_torch import CASES, EVERY, weights

LLAMA3 = CASES["llama3"]["rope_scaling"]
LLAMA32 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def directory(tmp_path: Path, case: str, **changes: Any) -> Path:
    """The tiny Llama with what a case changes."""
    target = Path(shutil.copytree(ORACLES / "tiny_llama", tmp_path / case))
    config = json.loads((target / "config.json").read_text()) | CASES[case] | changes
    (target / "config.json").write_text(json.dumps(config))
    save_file(weights(load_file(target / "model.safetensors"), case), target / "model.safetensors")
    return target


def by_hand(theta: float, d_head: int, scaling: Mapping[str, Any], length: int, n_ctx: int) -> list[float]:
    """The same frequencies, one at a time, by wavelengths."""
    kind = scaling.get("rope_type")
    if kind == "dynamic" and length > n_ctx:
        stretch = scaling["factor"] * length / n_ctx - (scaling["factor"] - 1)
        theta = theta * stretch ** (d_head / (d_head - 2))
    found = []
    for i in range(d_head // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / d_head)
        if kind == "linear":
            wavelength *= scaling["factor"]
        if kind == "llama3":
            old, low, high = (
                scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
            )
            if wavelength > old / low:
                wavelength *= scaling["factor"]
            elif wavelength >= old / high:
                share = (old / wavelength - low) / (high - low)
                wavelength = 1 / ((1 - share) / (scaling["factor"] * wavelength) + share / wavelength)
        found.append(2 * math.pi / wavelength)
    return found * 2


@pytest.mark.parametrize(
    ("scaling", "theta", "d_head"),
    [
        ({}, 10000.0, 64),
        ({"rope_type": "linear", "factor": 4.0}, 10000.0, 64),
        (LLAMA32, 500000.0, 64),
        (LLAMA32 | {"factor": 8.0}, 500000.0, 128),
        (LLAMA3, 1000.0, 6),
        ({"rope_type": "dynamic", "factor": 3.0}, 10000.0, 32),
    ],
)
@pytest.mark.parametrize("length", [5, 40])
def test_frequencies_are_those_of_the_formula(scaling: dict[str, Any], theta: float, d_head: int, length: int) -> None:
    positions = np.stack([np.arange(length), np.arange(length) // 2])
    found = rotary.scaled_frequencies(theta, d_head, scaling, n_ctx=16, positions=positions)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(theta, d_head, scaling, length, 16), rtol=3e-6)


def test_llama3_scales_slow_components_only() -> None:
    plain = rotary.rotary_frequencies(500000.0, 64)
    ratio = rotary.scaled_frequencies(500000.0, 64, LLAMA32, n_ctx=131072) / plain
    assert ratio[0] == 1
    np.testing.assert_allclose(ratio[31], 1 / 32, rtol=1e-6)
    assert ((ratio[:32] < 0.99) & (ratio[:32] > 0.04)).sum() >= 2
    assert (np.diff(ratio[:32]) <= 1e-6).all()


def test_one_array_per_configuration() -> None:
    frequencies = rotary.rotary_frequencies(100.0, 4)
    np.testing.assert_allclose(frequencies, [1, 0.1, 1, 0.1], rtol=1e-6)
    assert rotary.rotary_frequencies(100, 4) is frequencies
    again = [rotary.scaled_frequencies(1000.0, 6, dict(LLAMA3), n_ctx=48) for _ in range(2)]
    assert again[0] is again[1]


@pytest.mark.parametrize("case", CASES)
def test_every_logit_is_that_of_pytorch(case: str, tmp_path: Path) -> None:
    lm = load(directory(tmp_path, case))
    assert lm.config is not None
    assert lm.config.n_ctx == 48
    assert lm.config.d_head == (10 if case == "wide_heads" else 6)
    with np.load(ORACLES / "rotary_torch.npz") as recorded:
        logits = np.asarray(lm(recorded["tokens"]))[:, ::EVERY]
        np.testing.assert_allclose(logits, recorded[case], rtol=0, atol=1e-4)
        unscaled = np.load(ORACLES / "tiny_llama_logits.npz")["logits"][:, ::EVERY]
        assert np.abs(unscaled - recorded[case]).max() > 0.1  # the case makes a difference


def test_wide_heads_stacked_and_with_a_cache(tmp_path: Path) -> None:
    lm = load(directory(tmp_path, "wide_heads"), stacked=True)
    tokens = np.load(ORACLES / "rotary_torch.npz")["tokens"]
    np.testing.assert_allclose(
        np.asarray(lm(tokens))[:, ::EVERY], np.load(ORACLES / "rotary_torch.npz")["wide_heads"], rtol=0, atol=1e-4
    )
    one, other = (lm.generate(tokens[:, :6], max_new_tokens=4, use_cache=use_cache) for use_cache in (True, False))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert lm.W_Q.shape == (3, 4, 24, 10)
    assert lm.W_O.shape == (3, 4, 10, 24)


def test_wide_heads_of_a_mistral_without_a_window_are_those_of_a_llama(tmp_path: Path) -> None:
    llama = directory(tmp_path, "wide_heads")
    mistral = Path(shutil.copytree(llama, tmp_path / "mistral"))
    config = json.loads((llama / "config.json").read_text())
    config = {key: value for key, value in config.items() if "bias" not in key and key not in _ONLY_LLAMAS}
    (mistral / "config.json").write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": None}))
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    np.testing.assert_allclose(load(mistral)(tokens), load(llama)(tokens), rtol=0, atol=1e-5)


_ONLY_LLAMAS = ("pretraining_tp", "rope_scaling")


def test_dynamic_frequencies_can_be_traced() -> None:
    config = SimpleNamespace(
        rope_scaling=CASES["dynamic"]["rope_scaling"],
        rope_theta=100.0,
        hidden_size=24,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    found = jax.jit(lambda positions: rotary.frequencies_of(config, positions))(jnp.arange(40)[None])
    np.testing.assert_allclose(found, by_hand(100.0, 6, {"rope_type": "dynamic", "factor": 3.0}, 40, 16), rtol=3e-6)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, ["its kind is 'yarn'"]),
        ("linear", ["its kind is ''"]),
        ({"rope_type": "llama3", "factor": 8.0}, ["low_freq_factor is missing", "high_freq_factor is missing"]),
        ({"type": "linear", "factor": -1, "beta": 3}, ["beta=3 is not understood", "factor=-1 is no positive number"]),
        ({"type": "linear", "factor": True}, ["factor=True is no positive number"]),
        (LLAMA3 | {"low_freq_factor": 4.0}, ["high_freq_factor is not above low_freq_factor"]),
    ],
)
def test_scalings_that_are_not_understood(scaling: Any, words: list[str]) -> None:
    checkpoint = Checkpoint("llama", {"rope_scaling": scaling}, Tensors({}), tokenizer=None, source="here/model")
    with pytest.raises(UnsupportedModelError) as caught:
        rotary.check_scaling(checkpoint)
    for word in words:
        assert word in str(caught.value)
    assert "in here/model." in str(caught.value)
    assert "Expected: one of default; linear (factor); dynamic (factor); llama3 (factor, low_freq" in str(caught.value)
