"""GPT-J under its patch set: attention and MLP in parallel, and heads of which a part is rotated.

What it shares with other families is in test_tiny_families.py.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from interp_jax.core.errors import UnknownNameError
from interp_jax.models.loading import load
from interp_jax.patches import transformers_gptj
from tests.conftest import ORACLES
from tests.patches.test_tiny_families import TOKENS

ROTARY_DIM = 4


@pytest.fixture(scope="module")
def gptj() -> Any:
    return load(ORACLES / "tiny_gptj")


def test_there_is_no_resid_mid_and_every_verb_says_why(gptj) -> None:
    names = {site.name for site in gptj.sites(TOKENS).sites}
    assert not {"resid_mid", "ln2"} & names
    assert gptj.config.is_parallel
    verbs = {
        "reap": lambda: gptj.reap(TOKENS, "resid_mid"),
        "run": lambda: list(gptj.run(TOKENS, sites="1.resid_mid")),
        "intervene": lambda: gptj.intervene(TOKENS, {"blocks.1.hook_resid_mid": lambda value: value}),
        "generate": lambda: gptj.generate(TOKENS, max_new_tokens=1, interventions={"resid_mid": lambda value: value}),
    }
    for verb, call in verbs.items():
        with pytest.raises(UnknownNameError, match="Unknown site") as error:
            call()
        assert "where attention and MLP run in parallel, both read resid_pre and there is no resid_mid" in str(
            error.value
        ), verb


def test_attention_and_mlp_both_write_to_what_they_read(gptj) -> None:
    for lm in (gptj, gptj.stacked()):
        values = lm.reap(TOKENS, "*")
        for i in range(3):
            written = values[f"{i}.resid_pre"] + values[f"{i}.attn_out"] + values[f"{i}.mlp_out"]
            np.testing.assert_allclose(values[f"{i}.resid_post"], written, atol=1e-5)
        # What attention writes does not change what the MLP of the same layer reads.
        changed = {}
        for layer, name, value in (running_pass := lm.run(TOKENS, sites=[(1, "attn_out"), (1, "mlp_pre")])):
            if name == "attn_out":
                running_pass.modified_value = value * 0.0
            changed[layer, name] = np.asarray(value)
        np.testing.assert_allclose(changed[1, "mlp_pre"], values["1.mlp_pre"], atol=1e-6)


def test_contracts_know_that_the_mlp_reads_the_norm_of_attention(gptj) -> None:
    weights = {**gptj.upstream.layer_weights, "b_in": lambda layer: layer["mlp"]["fc_in"]["bias"] + 1}
    wrong = dataclasses.replace(gptj, upstream=dataclasses.replace(gptj.upstream, layer_weights=weights))
    (failure,) = wrong.check(TOKENS).failures
    assert failure.contract.startswith("q, k, v, mlp_pre")
    assert "mlp_pre" in failure.detail


def test_a_part_of_each_head_is_rotated(gptj) -> None:
    values = gptj.reap(TOKENS, ["1.q", "1.rot_q", "1.k", "1.rot_k"])
    positions = np.maximum(np.cumsum(TOKENS >= 0, axis=1) - 1, 0)
    angles = positions[..., None] * 10000.0 ** (-np.arange(0, ROTARY_DIM, 2) / ROTARY_DIM)
    sin, cos = np.sin(angles)[:, :, None], np.cos(angles)[:, :, None]
    for name in ("q", "k"):
        before, after = (np.asarray(values[f"1.{prefix}{name}"]) for prefix in ("", "rot_"))
        np.testing.assert_array_equal(after[..., ROTARY_DIM:], before[..., ROTARY_DIM:])
        even, odd = before[..., 0:ROTARY_DIM:2], before[..., 1:ROTARY_DIM:2]
        np.testing.assert_allclose(after[..., 0:ROTARY_DIM:2], even * cos - odd * sin, atol=1e-5)
        np.testing.assert_allclose(after[..., 1:ROTARY_DIM:2], odd * cos + even * sin, atol=1e-5)


def test_the_unembedding_has_a_bias(gptj) -> None:
    values = gptj.reap(TOKENS, ["ln_final", "logits"])
    by_hand = np.asarray(values["ln_final"]) @ np.asarray(gptj.W_U) + np.asarray(gptj.weight("b_U"))
    np.testing.assert_allclose(values["logits"], by_hand, atol=1e-4)


def test_all_layers_share_one_table_of_sines() -> None:
    table = transformers_gptj.sinusoids(48, ROTARY_DIM)
    assert transformers_gptj.sinusoids(48, ROTARY_DIM) is table
    assert (table.shape, table.dtype) == ((48, ROTARY_DIM), np.float32)
    np.testing.assert_allclose(table[3], [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)], rtol=1e-6)
