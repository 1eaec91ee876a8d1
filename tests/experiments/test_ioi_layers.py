"""The demo's experiment: at smoke size on SmolLM2, and whole on a tiny model."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.core.results import load_result, save_result
from interp_jax.experiments import ioi_layers
from interp_jax.experiments.ioi_layers import SMOKE, Config, one_token
from interp_jax.models.loading import load
from tests.conftest import ORACLES


@pytest.fixture(scope="module")
def smoke(smollm2):
    return ioi_layers.run(SMOKE, lm=smollm2, progress=False)


def test_smoke_on_smollm2(smollm2, smoke):
    result = smoke
    tokens = smollm2.tokenize(SMOKE.prompt)
    logits = np.asarray(smollm2(tokens))[0, -1]
    mary, john = one_token(smollm2, " Mary"), one_token(smollm2, " John")

    assert result.effects.clean[0] == pytest.approx(float(logits[mary] - logits[john]), abs=1e-3)
    assert result.max_difference < 1e-3
    assert np.abs(result.effects.effects).min() > 1e-3
    # The last view is what the model says, to the bit.
    assert not np.any(np.asarray(result.lens.kl[-1]))
    assert int(result.lens.top1[-1, 0, -1]) == int(logits.argmax())
    assert np.all(np.asarray(result.lens.rank[-1]) == 1)
    # The first view has seen one token only, so equal tokens look equal there, and nowhere later.
    first, second = np.flatnonzero(tokens[0] == john)
    assert float(result.lens.entropy[0, 0, first]) == pytest.approx(float(result.lens.entropy[0, 0, second]), abs=1e-5)
    assert abs(float(result.lens.entropy[-1, 0, first] - result.lens.entropy[-1, 0, second])) > 1e-3
    assert sorted(ioi_layers.plot(result)) == [
        "layer_effects.html",
        "layer_effects.png",
        "logit_lens.html",
        "logit_lens.png",
    ]


def test_a_zeroed_write_is_a_write_subtracted(smollm2, smoke):
    # The last layer's MLP writes straight into the final norm: its effect can be computed without a second pass.
    values = smollm2.reap(smollm2.tokenize(SMOKE.prompt), ["29.resid_post", "29.mlp_out"])
    without = smollm2.unembed(smollm2.ln_final(values["29.resid_post"] - values["29.mlp_out"]))[0, -1]
    mary, john = one_token(smollm2, " Mary"), one_token(smollm2, " John")
    assert smoke.effects.zeroed[1, 0] == pytest.approx(float(without[mary] - without[john]), abs=1e-3)


@pytest.fixture(scope="module")
def tiny_result():
    lm = load(ORACLES / "tiny_gpt2")
    config = Config(model="tiny_gpt2", prompt="the cat to", answer=" the", other=" t", top_k=3)
    return ioi_layers.run(config, lm=lm, progress=False), config, lm


def test_all_writes_of_a_tiny_model_by_both_routes(tiny_result):
    result, config, lm = tiny_result
    assert len(result.effects.sites) == 2 * lm.config.n_layers
    np.testing.assert_allclose(result.effects.zeroed, result.effects_by_loop.zeroed, atol=1e-4)
    assert result.max_difference == np.abs(result.effects.effects - result.effects_by_loop.effects).max()
    assert {route: len(times) for route, times in result.seconds.items()} == {"sweep": 2, "loop": 2}
    tokens = lm.tokenize(config.prompt)
    by_hand = lm.intervene(tokens, {"1.attn_out": jnp.zeros_like})[0, -1]
    expected = by_hand[one_token(lm, " the")] - by_hand[one_token(lm, " t")]
    assert result.effects.zeroed[2, 0] == pytest.approx(float(expected), abs=1e-4)


def test_a_result_draws_itself_without_its_model(tiny_result, tmp_path):
    result, config, lm = tiny_result
    assert result.decode(lm.tokenize(config.prompt)[0]) == config.prompt
    path = save_result(result, name="demo", config=config, figures=ioi_layers.plot(result), root=tmp_path)
    record = load_result(path)
    assert record.config == {**dataclasses.asdict(config), "sites": list(config.sites)}
    assert "".join(record.result["texts"][str(token)] for token in record.result["lens"]["tokens"][0]) == config.prompt


def test_an_answer_of_two_tokens_is_refused(tiny_result):
    lm = tiny_result[2]
    with pytest.raises(InvalidInputError, match=r"The answer ' cat' is 4 tokens, \[' ', 'c', 'a', 't'\]"):
        ioi_layers.run(Config(prompt="the cat", answer=" cat", other=" t"), lm=lm)
