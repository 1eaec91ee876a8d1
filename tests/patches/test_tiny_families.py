"""What every Flax family of transformers keeps under its patch set: the same laws for each, on its tiny torch model.

GPT-2, Llama and Mistral have test modules of their own that say the same at more length.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

from interp_jax.core.errors import LoadError, UnsupportedModelError
from interp_jax.core.sites import Site
from interp_jax.models.check import stable_hlo
from interp_jax.models.loading import load, read_checkpoint
from interp_jax.patches import transformers_gpt_neo, transformers_gptj, transformers_opt
from interp_jax.transforms.compilations import count_compilations
from tests.conftest import ORACLES
from tests.patches.test_transformers_flax import calling, functions

# Each family: its patch set; upstream's names of its configuration and its model; sites outside and inside layers.
FAMILIES: dict[str, tuple[Any, str, str, int, int]] = {
    "gpt_neo": (transformers_gpt_neo, "GPTNeoConfig", "FlaxGPTNeoForCausalLMModule", 4, 15),
    "gptj": (transformers_gptj, "GPTJConfig", "FlaxGPTJForCausalLMModule", 3, 15),
    "opt": (transformers_opt, "OPTConfig", "FlaxOPTForCausalLMModule", 4, 15),
}
# Longer than the GPT-Neo's window of five.
TOKENS = np.array([[5, 80, 3, 7, 200, 9, 31, 4], [-1, -1, 6, 0, 9, 1, 12, 13]], np.int32)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A family's tiny model unstacked and stacked, each read from its files."""
    path = ORACLES / f"tiny_{request.param}"
    return load(path), load(path, stacked=True)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def vanilla(family: str, **changes: Any) -> Any:
    """Upstream's module as it comes."""
    patches, config_name, module_name, *_ = FAMILIES[family]
    config = json.loads((ORACLES / f"tiny_{family}" / "config.json").read_text())
    module = importlib.import_module(patches.MODULE)
    return getattr(module, module_name)(getattr(module, config_name)(**config | changes))


def altered(family: str, *, without: str | None = None, **changes: Any) -> Any:
    """The tiny model's files with another configuration (None takes a key away) or without a tensor."""
    checkpoint = read_checkpoint(ORACLES / f"tiny_{family}")
    config = {key: value for key, value in {**checkpoint.config, **changes}.items() if value is not None}
    tensors = checkpoint.tensors
    if without is not None:
        tensors = type(tensors).from_arrays({name: tensors[name] for name in tensors if name != without})
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def close(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    largest = max(float(np.abs(other).max()), 1.0)
    np.testing.assert_allclose(one, other, atol=tolerance * largest, rtol=tolerance)


def test_logits_are_those_of_torch(pair) -> None:
    for lm in pair:
        recorded = np.load(ORACLES / f"{lm.name}_logits.npz")
        np.testing.assert_allclose(lm(recorded["tokens"]), recorded["logits"], rtol=0, atol=5e-5)


def test_the_patched_model_is_upstream_to_the_bit(pair) -> None:
    plain, _ = pair
    family = plain.config.family
    upstream = jax.jit(calling(vanilla(family)))(plain.params, TOKENS)
    if family == "opt":
        # The mend that keeps batch and positions apart in the MLP has XLA round in another order; nothing else has.
        close(plain(TOKENS), upstream, 1e-6)
        mends = [transformers_opt.MASK_MEND]
        np.testing.assert_array_equal(jax.jit(calling(vanilla(family), mends))(plain.params, TOKENS), upstream)
    else:
        np.testing.assert_array_equal(plain(TOKENS), upstream)


def test_tags_alone_change_no_byte_of_upstreams_program(pair) -> None:
    plain, _ = pair
    family = plain.config.family
    module, (patches, _, _, n_outside, n_inside) = vanilla(family), FAMILIES[family]
    tagged = calling(module, patches.PATCH_SET.tags)
    assert stable_hlo(tagged, plain.params, TOKENS) == stable_hlo(calling(module), plain.params, TOKENS)
    n_sites = n_outside + n_inside * plain.config.n_layers
    assert str(jax.make_jaxpr(tagged)(plain.params, TOKENS)).count("sow[") == n_sites == len(plain.sites(TOKENS))


def test_contracts(pair) -> None:
    """They compare StableHLO with and without tags, too."""
    for lm in pair:
        report = lm.check(TOKENS)
        assert report.ok, report
        idle = [outcome.contract for outcome in report.outcomes if outcome.ok is None]
        assert idle == ["resid_mid = resid_pre + attn_out"] * lm.config.is_parallel


def test_stacked_and_unstacked_agree_at_every_site(pair) -> None:
    plain, stacked = pair
    close(stacked(TOKENS), plain(TOKENS))
    expected, values = plain.reap(TOKENS, "*"), stacked.reap(TOKENS, "*")
    assert set(values) == set(expected)
    assert len(expected) == len(plain.sites(TOKENS))
    for site, value in expected.items():
        close(values[site], value)


@pytest.mark.slow
def test_gradients_agree(pair) -> None:
    plain, stacked = pair

    def gradient(lm: Any) -> Any:
        def loss(params: Any) -> Any:
            return -jax.nn.log_softmax(lm.forward(params, TOKENS[:1]))[..., 7].mean()

        return jax.jit(jax.grad(loss))(lm.params)

    expected = gradient(plain)
    jax.tree.map(lambda one, other: close(one, other, 1e-4), stacked.upstream.restack(gradient(stacked)), expected)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(expected))


def test_the_loop_sees_and_changes_the_same_with_both_engines(pair) -> None:
    expected, logits = {}, None
    for lm, engine in zip((*pair, pair[1]), ("compiled", "compiled", "python"), strict=True):
        seen = {}
        for layer, name, value in (running_pass := lm.run(TOKENS, sites=["resid_pre", "z"], engine=engine)):
            # In there, values are not known yet.
            seen[Site(layer, name)] = None if isinstance(value, Tracer) else np.asarray(value)
            if (layer, name) == (1, "z"):
                running_pass.modified_value = value * 1.5
        if logits is None:
            expected, logits = seen, running_pass.retval
            assert float(jnp.abs(logits - lm(TOKENS)).max()) > 1e-2
        # Inside a scan, the python engine stops at one site of all layers before it goes on to the next.
        assert set(seen) == set(expected)
        if engine == "compiled":
            assert list(seen) == list(expected)
        for site, value in seen.items():
            if value is not None:
                close(value, expected[site])
        close(running_pass.retval, logits)


def test_the_layout_of_the_weights(pair) -> None:
    plain, stacked = pair
    made, back = plain.stacked(), stacked.unstacked()
    for one, other in ((made, stacked), (back, plain)):
        assert one.upstream is other.upstream
        assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    for name in plain.upstream.weight_names:
        np.testing.assert_array_equal(stacked.weight(name), plain.weight(name))
    for name in plain.upstream.layer_weights:
        assert plain.weight(name).shape[0] == plain.config.n_layers
        np.testing.assert_array_equal(stacked.weight(name, 2), plain.weight(name)[2])


def test_moving_to_another_layer_compiles_nothing(pair) -> None:
    _, stacked = pair

    def zeroed(layer: int) -> Any:
        for _, _, value in (running_pass := stacked.run(TOKENS, sites=f"{layer}.mlp_out")):
            running_pass.modified_value = value * 0.0
        return running_pass.retval

    n_layers = stacked.config.n_layers
    first = [zeroed(layer) for layer in range(n_layers)]
    with count_compilations() as new:
        again = [zeroed(layer) for layer in range(n_layers)]
    assert not new
    np.testing.assert_array_equal(first, again)


@pytest.mark.slow
def test_generation_with_and_without_cache_agrees(pair) -> None:
    change = {"1.resid_pre": lambda value: value * 1.5}
    cached, uncached = (
        lm.generate(TOKENS, max_new_tokens=6, use_cache=use_cache, interventions=change)
        for lm, use_cache in zip(pair, (False, True), strict=True)
    )
    np.testing.assert_array_equal(cached.tokens, uncached.tokens)
    close(cached.log_probs, uncached.log_probs, 1e-4)


@pytest.mark.slow
def test_patch_sets_fit_what_is_installed_and_leave_nothing(family: str) -> None:
    patches = FAMILIES[family][0]
    for patch_set in (patches.PATCH_SET, patches.STACKED_PATCH_SET):
        assert not patch_set.check().is_broken, patch_set.check()
        assert set(patch_set.upstream) == set(patch_set.digests())
        before = functions(patch_set)
        with patch_set:
            assert functions(patch_set) != before
        assert functions(patch_set) == before


def test_no_program_holds_a_mask_of_all_positions(family: str) -> None:
    n_ctx = 3001
    changed = {"gptj": {"n_positions": n_ctx}}.get(family, {"max_position_embeddings": n_ctx})
    lm, _ = FAMILIES[family][0]._build(json.dumps(_settings(family) | changed), "float32", False)
    # Nothing is computed, so that the parameters may be anything of the right shape.
    params = jax.tree.map(lambda stored: jax.ShapeDtypeStruct(stored.param_shape, jnp.float32), lm.layout())
    program = stable_hlo(lm.untagged, params, TOKENS)
    assert f"{n_ctx}x{n_ctx}" not in program
    assert f"{n_ctx}x{n_ctx}" in stable_hlo(calling(vanilla(family, **changed)), params, TOKENS)
    # The table of sines is there once, not once per layer.
    n_tables = len(re.findall(rf"stablehlo.constant dense<.*tensor<{n_ctx}x4xf32>", program))
    assert n_tables == (family == "gptj")


def _settings(family: str) -> dict[str, Any]:
    patches = FAMILIES[family][0]
    config = json.loads((ORACLES / f"tiny_{family}" / "config.json").read_text())
    return {key: config[key] for key in patches.HANDLED_KEYS if config.get(key) is not None}


@pytest.mark.slow
def test_half_precision(pair) -> None:
    _, stacked = pair
    half = load(ORACLES / stacked.name, dtype="bfloat16", stacked=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    logits, expected = np.asarray(half(TOKENS), np.float32), np.asarray(stacked(TOKENS))
    assert np.abs(logits - expected)[TOKENS >= 0].max() < 0.05 * np.abs(expected).max()
    report = half.check(TOKENS)
    assert report.ok, report


def test_a_gptj_in_half_precision_caches_rotated_keys_as_upstream_makes_them() -> None:
    lm = load(ORACLES / "tiny_gptj", dtype="bfloat16", stacked=True)
    made = lm.upstream.init_cache
    assert made is not None
    cache = made(2, 9).layers["transformer"]["h"]["attn"]
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in cache.items()} == {
        "cached_key": ((3, 2, 9, 4, 6), "float32"),
        "cached_value": ((3, 2, 9, 4, 6), "bfloat16"),
        "cache_index": ((3,), "int32"),
    }
    one, other = (lm.generate(TOKENS, max_new_tokens=2, use_cache=use_cache).tokens for use_cache in (True, False))
    np.testing.assert_array_equal(one, other)


# What is refused.

CASES: dict[str, tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "neo-two-unknown-keys": (
        "gpt_neo", {"rope_theta": 1e4, "n_experts": 8}, UnsupportedModelError, ("rope_theta=10000.0", "n_experts=8")
    ),
    "neo-missing-key": ("gpt_neo", {"window_size": None}, UnsupportedModelError, ("without window_size",)),
    "neo-no-kinds": (
        "gpt_neo", {"attention_types": None, "attention_layers": None}, UnsupportedModelError,
        ("0 kinds of attention (none) for num_layers=4",),
    ),
    "neo-contradiction": (
        "gpt_neo", {"attention_layers": ["local"] * 4, "num_layers": 5}, UnsupportedModelError,
        (
            "4 kinds of attention (global, local, global, local) for num_layers=5",
            "attention_layers (local, local, local, local) that contradict attention_types (global, local",
        ),
    ),
    "neo-other-kind": (
        "gpt_neo", {"attention_types": [[["sparse"], 4]], "attention_layers": None}, UnsupportedModelError,
        ("4 kinds of attention (sparse, sparse, sparse, sparse)", "'global' or 'local' for each layer"),
    ),
    "neo-no-pairs": (
        "gpt_neo", {"attention_types": [["global", "local"], 2], "attention_layers": 7}, UnsupportedModelError,
        ("attention_types=[['global', 'local'], 2] and attention_layers=7",),
    ),
    "neo-shape": ("gpt_neo", {"intermediate_size": 90}, LoadError, ("h.{0..3}.mlp.c_fc.weight", "expected (90, 24)")),
    "neo-tensor": (
        "gpt_neo", {"without": "transformer.h.3.ln_2.bias"}, LoadError, ("missing (1): transformer.h.3.ln_2.bias",)
    ),
    "gptj-unknown-key": ("gptj", {"parallel": True}, UnsupportedModelError, ("Unknown configuration keys parallel",)),
    "gptj-tied": ("gptj", {"tie_word_embeddings": True}, UnsupportedModelError, ("tie_word_embeddings to be False",)),
    "gptj-no-rotary": ("gptj", {"rotary_dim": None}, UnsupportedModelError, ("without rotary_dim",)),
    "gptj-rotary": ("gptj", {"rotary_dim": 8}, UnsupportedModelError, ("rotary_dim to be 2 or 4 or 6",)),
    "gptj-scale": (
        "gptj", {"scale_attn_weights": False, "rotary": False}, UnsupportedModelError,
        ("scale_attn_weights=False", "rotary=False"),
    ),
    "gptj-heads": ("gptj", {"n_head": 5, "rotary_dim": 2}, UnsupportedModelError, ("n_head=5 and n_embd=24",)),
    "gptj-shape": ("gptj", {"vocab_size": 261}, LoadError, ("lm_head.bias", "expected (261,)", "wte.weight")),
    "opt-unknown-key": ("opt", {"ffn_dims": 40}, UnsupportedModelError, ("'ffn_dims' resembles 'ffn_dim'",)),
    "opt-350m": (
        "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 12}, UnsupportedModelError,
        ("do_layer_norm_before to be True", "word_embed_proj_dim to be 24"),
    ),
    "opt-no-bias": ("opt", {"enable_bias": False}, UnsupportedModelError, ("enable_bias=False",)),
    "opt-positions": (
        "opt", {"max_position_embeddings": 50}, LoadError, ("embed_positions.weight", "(50, 24), expected (52, 24)")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    family, changes, kind, words = CASES[case]
    for stacked in (False, True):
        with pytest.raises(kind) as error:
            FAMILIES[family][0].from_checkpoint(altered(family, **changes), stacked=stacked)
        message = str(error.value)
        assert [word for word in words if word not in message] == [], message
        assert "Fix: " in message


def test_what_real_files_hold_besides_is_let_through() -> None:
    """Keys and tensors of the published GPT-Neo 125M, GPT-J 6B and OPT 125M."""
    summary = {"summary_type": "cls_index", "summary_use_proj": True, "summary_first_dropout": 0.1}
    lm = transformers_gpt_neo.from_checkpoint(altered("gpt_neo", gradient_checkpointing=False, **summary))
    assert lm.config is not None
    bare = altered("gpt_neo")
    names = {name.removeprefix("transformer."): bare.tensors[name] for name in bare.tensors}
    names |= {"h.0.attn.attention.bias": np.ones((1, 1, 48, 48), bool), "lm_head.weight": names["wte.weight"]}
    old = dataclasses.replace(bare, tensors=type(bare.tensors).from_arrays(names))
    np.testing.assert_array_equal(transformers_gpt_neo.from_checkpoint(old)(TOKENS), lm(TOKENS))
    transformers_gptj.from_checkpoint(altered("gptj", rotary=True, scale_attn_weights=True, **summary))
    transformers_opt.from_checkpoint(altered("opt", activation_dropout=0.0, prefix="</s>"))
