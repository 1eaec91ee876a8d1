"""Stacked layers of the Flax families: the same sites, loop and numbers as unstacked, and programs that stay put.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import LoadError, ShapeError, UnsupportedModelError
from interp_jax.core.interventions import Masked
from interp_jax.core.sites import Site
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loading import load
from interp_jax.models.upstream import Upstream
from interp_jax.patches import transformers_gpt2, transformers_llama
from interp_jax.patches.transformers_stacked import scan_blocks
from interp_jax.transforms.compilations import count_compilations
from tests.conftest import ORACLES, TINY
from tests.patches.test_transformers_flax import checkpoint

TOKENS = np.array([[5, 80, 3, 7, 200], [-1, -1, 6, 0, 9]], np.int32)
FAMILIES = {"gpt2": transformers_gpt2, "llama": transformers_llama}


@pytest.fixture(scope="module", params=TINY)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A tiny model unstacked and stacked, each read from its files."""
    return load(ORACLES / request.param), load(ORACLES / request.param, stacked=True)


def close(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    largest = max(float(np.abs(other).max()), 1.0)
    np.testing.assert_allclose(one, other, atol=tolerance * largest, rtol=tolerance)


def test_logits_are_those_of_torch(pair) -> None:
    _, stacked = pair
    recorded = np.load(ORACLES / f"{stacked.name}_logits.npz")
    np.testing.assert_allclose(stacked(recorded["tokens"]), recorded["logits"], atol=2e-4, rtol=1e-3)


def test_logits_and_every_site_agree(pair) -> None:
    plain, stacked = pair
    close(stacked(TOKENS), plain(TOKENS))
    assert sorted(map(str, stacked.sites(TOKENS).sites)) == sorted(map(str, plain.sites(TOKENS).sites))
    expected, values = plain.reap(TOKENS, "*"), stacked.reap(TOKENS, "*")
    assert len(expected) == len(plain.sites(TOKENS))
    for site, value in expected.items():
        close(values[site], value)


def test_gradients_agree(pair) -> None:
    plain, stacked = pair

    def loss(lm: Any) -> Any:
        def of_params(params: Any) -> Any:
            logits = lm.forward(params, TOKENS[:1])
            return -jax.nn.log_softmax(logits)[..., 7].mean()

        return jax.jit(jax.grad(of_params))(lm.params)

    gradients = stacked.upstream.restack(loss(stacked))
    jax.tree.map(lambda one, other: close(one, other, 1e-4), gradients, loss(plain))


def test_gradients_through_the_loop_agree(pair) -> None:
    def of_scale(lm: Any) -> Any:
        def loss(scale: Any) -> Any:
            for layer, _, value in (running_pass := lm.run(TOKENS, sites="mlp_out")):
                if layer == 1:
                    running_pass.modified_value = value * scale
            return (running_pass.retval[:, -1] ** 2).mean()

        return jax.value_and_grad(loss)(jnp.float32(0.5))

    for one, other in zip(*map(of_scale, pair), strict=True):
        close(one, other, 1e-4)


def test_the_layout_of_the_weights(pair) -> None:
    plain, stacked = pair
    made = plain.stacked()
    assert (plain.upstream.is_stacked, stacked.upstream.is_stacked) == (False, True)
    assert jax.tree.structure(made.params) == jax.tree.structure(stacked.params)
    jax.tree.map(np.testing.assert_array_equal, made.params, stacked.params)
    back = stacked.unstacked()
    assert jax.tree.structure(back.params) == jax.tree.structure(plain.params)
    jax.tree.map(np.testing.assert_array_equal, back.params, plain.params)
    # The functions are those of a model that was loaded so, which are compiled once.
    assert back.upstream is plain.upstream
    assert made.upstream is stacked.upstream
    assert (stacked.stacked() is stacked, plain.unstacked() is plain) == (True, True)
    assert "3 stacked" in repr(stacked)


def test_weights_under_canonical_names(pair) -> None:
    plain, stacked = pair
    assert stacked.upstream.weight_names == plain.upstream.weight_names
    for name in plain.upstream.weight_names:
        np.testing.assert_array_equal(stacked.weight(name), plain.weight(name))
    for name in plain.upstream.layer_weights:
        np.testing.assert_array_equal(stacked.weight(name, 2), plain.weight(name, 2))


def test_donated_layers_are_gone() -> None:
    lm = load(ORACLES / "tiny_llama")
    logits, layers = np.asarray(lm(TOKENS)), jax.tree.leaves(lm.params["model"]["layers"])
    stacked = lm.stacked(donate=True)
    assert all(leaf.is_deleted() for leaf in layers)
    np.testing.assert_allclose(stacked(TOKENS), logits, atol=1e-5, rtol=1e-4)
    unstacked = stacked.unstacked(donate=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stacked.params["model"]["layers"]))
    np.testing.assert_array_equal(unstacked(TOKENS), logits)


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("at", ["all", "generated"])
def test_generation_agrees(pair, use_cache: bool, at: str) -> None:
    generations = []
    for lm in pair:
        value = np.zeros((1, 1, lm.config.d_model), np.float32)
        value[..., 3] = 4.0
        generations += [
            lm.generate(
                TOKENS,
                max_new_tokens=6,
                interventions={"1.resid_pre": lambda x, v=value: x + v},
                at=at,
                use_cache=use_cache,
            ),
            lm.generate(TOKENS, max_new_tokens=6, use_cache=use_cache),
        ]
    for one, other in zip(generations[:2], generations[2:], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        close(one.log_probs, other.log_probs, 1e-4)
    assert not np.allclose(generations[0].log_probs, generations[1].log_probs, atol=1e-3)


def test_contracts(pair) -> None:
    report = pair[1].check()
    assert report.ok, report
    assert sum(outcome.ok is None for outcome in report.outcomes) == sum(
        outcome.ok is None for outcome in pair[0].check().outcomes
    )


def test_the_stacked_patch_set_fits(pair) -> None:
    patch_set = pair[1].upstream.patch_set
    assert patch_set.name == f"{pair[1].upstream.name} (stacked)"
    assert not patch_set.check().is_broken
    assert set(patch_set.upstream) == set(patch_set.digests())


@pytest.mark.parametrize("engine", ["compiled", "python"])
def test_the_same_loop(pair, engine: str) -> None:
    passes = []
    for lm in pair:
        seen = {}
        for layer, name, value in (running_pass := lm.run(TOKENS, sites=["resid_pre", "pattern"], engine=engine)):
            if engine == "compiled":
                seen[Site(layer, name)] = np.asarray(value)
            else:
                seen[Site(layer, name)] = np.zeros(value.shape)
            if (layer, name) == (1, "resid_pre"):
                running_pass.modified_value = value * 1.5
        passes.append((seen, running_pass.retval))
    (expected, logits), (values, result) = passes
    assert set(values) == set(expected)
    for site, value in expected.items():
        close(values[site], value)
    close(result, logits)
    assert float(jnp.abs(result - pair[1](TOKENS)).max()) > 1e-2


def test_moving_to_another_layer_compiles_nothing(pair) -> None:
    _, stacked = pair

    def passes(layer: int) -> Any:
        for _, _, value in (running_pass := stacked.run(TOKENS, sites=f"{layer}.mlp_out")):
            running_pass.modified_value = value * 0.0
        mask = np.arange(TOKENS.shape[1])[None, :, None] == 2
        stacked.reap(TOKENS, f"{layer}.resid_mid")
        stacked.intervene(TOKENS, {f"{layer}.resid_pre": Masked(1.0, mask)})
        return running_pass.retval

    zeroed = [passes(0), passes(1)]  # The first layer has no layers before it, a middle one has.
    with count_compilations() as new:
        zeroed.append(passes(2))
        zeroed.append(passes(1))
    assert not new
    np.testing.assert_array_equal(zeroed[1], zeroed[3])
    assert all(float(jnp.abs(one - stacked(TOKENS)).max()) > 1e-3 for one in zeroed)


def test_a_deeper_model_compiles_no_more_programs(rng: np.random.Generator) -> None:
    counts = []
    for n_layers in (3, 7):
        lm = transformers_llama.from_checkpoint(
            checkpoint("llama", rng, num_hidden_layers=n_layers, hidden_size=16 + 8 * n_layers), stacked=True
        )
        with count_compilations() as new:
            for _ in (running_pass := lm.run(TOKENS % 90, sites="2.mlp_out")):
                pass
            running_pass.retval.block_until_ready()
        counts.append(len(new))
    assert counts[0] == counts[1] <= 8


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_half_precision_is_rounded_once(family: str, seed: int) -> None:
    plain, stacked = (
        FAMILIES[family].from_checkpoint(
            checkpoint(family, np.random.default_rng(seed)), dtype="bfloat16", stacked=is_stacked
        )
        for is_stacked in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, plain.stacked().params, stacked.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stacked.params)} == {"bfloat16"}
    assert stacked.check().ok


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_missing_weights_of_a_layer_are_told(family: str, rng: np.random.Generator) -> None:
    name = {"gpt2": "transformer.h.1.ln_2.bias", "llama": "model.layers.1.mlp.up_proj.weight"}[family]
    with pytest.raises(LoadError, match=rf"missing \(1\): {name}"):
        FAMILIES[family].from_checkpoint(checkpoint(family, rng, without=name), stacked=True)


def test_parameters_of_other_layers_are_not_stacked() -> None:
    lm = load(ORACLES / "tiny_gpt2")
    layers = lm.params["transformer"]["h"]
    others = {"0": layers["0"], "2": layers["2"], "7": layers["1"]}
    params = {"transformer": {**lm.params["transformer"], "h": others}}
    with pytest.raises(ShapeError) as error:
        dataclasses.replace(lm, params=params).stacked()
    message = str(error.value)
    assert "other layers than the model has: layer 1 is missing, layer 7 is not known in a request for" in message
    assert "Expected: layers 0 to 2" in message and "Fix: " in message


@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states", "deterministic"])
def test_what_a_scan_does_not_return_is_refused(option: str) -> None:
    lm = load(ORACLES / "tiny_gpt2", stacked=True)
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2LMHeadModule

    module = FlaxGPT2LMHeadModule(GPT2Config(n_embd=24, n_layer=3, n_head=4, n_positions=48, vocab_size=260))
    words = {"output_attentions": "attentions", "output_hidden_states": "hidden states", "deterministic": "dropout"}
    with (
        lm.upstream.patch_set,
        jax.numpy_rank_promotion("allow"),
        pytest.raises(UnsupportedModelError, match=rf"^{words[option]} were asked for in FlaxGPT2BlockCollection"),
    ):
        positions = np.arange(3)[None]
        module.apply(
            {"params": lm.params},
            TOKENS[:1, :3],
            np.ones((1, 3), bool),
            positions,
            rngs={"dropout": jax.random.key(0)},
            **cast("dict[str, Any]", {option: option != "deterministic"}),
        )
    assert scan_blocks.__module__ == "interp_jax.patches.transformers_stacked"


def test_a_model_without_a_stacked_form_says_so() -> None:
    lm = LanguageModel(Upstream("bigram", lambda params, tokens: params[tokens]), jnp.eye(3), name="bigram")
    with pytest.raises(UnsupportedModelError, match="bigram does not say what its restacked form is"):
        lm.stacked()
    assert lm.unstacked() is lm
