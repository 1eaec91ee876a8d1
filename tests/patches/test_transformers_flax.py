"""The patch sets of transformers' Flax models: tags change nothing, mends change what they should, nothing is left.

Source: interp_jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, LoadError, PatchError, UnsupportedModelError
from interp_jax.models.check import stable_hlo
from interp_jax.models.weights.checkpoint import Checkpoint, Tensors
from interp_jax.patches import transformers_flax, transformers_gpt2, transformers_llama
from interp_jax.transforms.patcher import PatchSet
from tests.conftest import ORACLES

FAMILIES = {"gpt2": transformers_gpt2, "llama": transformers_llama}
TOKENS = np.array([[5, 80, 3, 7], [-1, -1, 6, 0]], np.int32)
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 90, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4},
    "llama": {
        "vocab_size": 90,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
    },
}


def tensors(family: str, config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random tensors under the names and in the layouts of Hugging Face's torch models, written out once more."""

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    if family == "gpt2":
        d, n = config["n_embd"], config["n_layer"]
        m = config.get("n_inner", 4 * d)
        shapes: dict[str, tuple[int, ...]] = {"wte.weight": (90, d), "wpe.weight": (config["n_positions"], d)}
        for i in range(n):
            for name in ("ln_1", "ln_2"):
                shapes |= {f"h.{i}.{name}.weight": (d,), f"h.{i}.{name}.bias": (d,)}
            for name, d_in, d_out in (
                ("attn.c_attn", d, 3 * d),
                ("attn.c_proj", d, d),
                ("mlp.c_fc", d, m),
                ("mlp.c_proj", m, d),
            ):
                shapes |= {f"h.{i}.{name}.weight": (d_in, d_out), f"h.{i}.{name}.bias": (d_out,)}
        shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
        named = {f"transformer.{name}": shape for name, shape in shapes.items()}
        head = not config.get("tie_word_embeddings", True)
    else:
        d, m, n = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        d_kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
        named = {"model.embed_tokens.weight": (90, d), "model.norm.weight": (d,)}
        for i in range(n):
            at = f"model.layers.{i}"
            named |= {f"{at}.input_layernorm.weight": (d,), f"{at}.post_attention_layernorm.weight": (d,)}
            for name, d_out in (("q", d), ("k", d_kv), ("v", d_kv), ("o", d)):
                named[f"{at}.self_attn.{name}_proj.weight"] = (d_out, d)
                if config.get("attention_bias"):
                    named[f"{at}.self_attn.{name}_proj.bias"] = (d_out,)
            for name, d_out, d_in in (("gate", m, d), ("up", m, d), ("down", d, m)):
                named[f"{at}.mlp.{name}_proj.weight"] = (d_out, d_in)
        head = not config.get("tie_word_embeddings", False)
    if head:
        named["lm_head.weight"] = (90, d)
    return {name: random(*shape) + (name.endswith(("norm.weight", "ln_f.weight"))) for name, shape in named.items()}


def checkpoint(family: str, rng: np.random.Generator, *, without: str = "", **changes: Any) -> Checkpoint:
    """A checkpoint in memory; a change to None takes a key away."""
    config = {key: value for key, value in (CONFIGS[family] | changes).items() if value is not None}
    arrays = tensors(family, CONFIGS[family] | {k: v for k, v in changes.items() if v is not None}, rng)
    arrays.pop(without, None)
    return Checkpoint(family, config, Tensors.from_arrays(arrays), tokenizer=None, source="memory")


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def vanilla(family: str, **changes: Any) -> Any:
    """Upstream's module as it comes."""
    if family == "gpt2":
        from transformers import GPT2Config
        from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2LMHeadModule

        return FlaxGPT2LMHeadModule(GPT2Config(**CONFIGS[family] | changes))
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_flax_llama import FlaxLlamaForCausalLMModule

    return FlaxLlamaForCausalLMModule(LlamaConfig(**CONFIGS[family] | changes))


def calling(module: Any, patchers: Any = ()) -> Any:
    """A new function of (params, tokens) that calls a module under patchers."""

    def forward(params: Any, tokens: Any) -> Any:
        ids, mask, positions = transformers_flax.read_tokens(tokens)
        with transformers_flax.upstream_rules(patchers):
            return module.apply({"params": params}, ids, attention_mask=mask, position_ids=positions).logits

    return forward


def test_tags_alone_change_no_byte_of_the_program(family: str, rng: np.random.Generator) -> None:
    """On upstream as it comes, without our mends."""
    lm = FAMILIES[family].from_checkpoint(checkpoint(family, rng))
    module, patch_set = vanilla(family), FAMILIES[family].PATCH_SET
    untagged = stable_hlo(calling(module), lm.params, TOKENS)
    tagged = calling(module, patch_set.tags)
    assert stable_hlo(tagged, lm.params, TOKENS) == untagged
    # The tags were there, all the same.
    n_sows = str(jax.make_jaxpr(tagged)(lm.params, TOKENS)).count("sow[")
    assert n_sows == {"gpt2": 4 + 2 * 15, "llama": 3 + 2 * 18}[family]


def test_tags_change_no_byte_of_the_mended_program(tiny) -> None:
    tagged, untagged = (stable_hlo(fn, tiny.params, TOKENS) for fn in (tiny.forward, tiny.upstream.untagged))
    assert tagged == untagged


def test_real_weights_tags_change_no_byte(smollm2) -> None:
    tagged, untagged = (stable_hlo(fn, smollm2.params, TOKENS) for fn in (smollm2.forward, smollm2.upstream.untagged))
    assert tagged == untagged
    assert len(tagged) > 100_000


def test_gpt2_is_upstream_to_the_bit(rng: np.random.Generator) -> None:
    lm = transformers_gpt2.from_checkpoint(checkpoint("gpt2", rng))
    upstream = jax.jit(calling(vanilla("gpt2")))(lm.params, TOKENS)
    np.testing.assert_array_equal(lm(TOKENS), upstream)


def test_llama_is_upstream_where_upstream_is_right(rng: np.random.Generator) -> None:
    """With a base of 10000 and an unembedding of its own. Upstream makes its angles in double precision."""
    lm = transformers_llama.from_checkpoint(checkpoint("llama", rng, rope_theta=10000.0))
    upstream = jax.jit(calling(vanilla("llama")))(lm.params, TOKENS)
    np.testing.assert_allclose(np.asarray(lm(TOKENS))[TOKENS >= 0], np.asarray(upstream)[TOKENS >= 0], atol=2e-5)


def test_upstream_ignores_the_rotary_base_and_the_mend_does_not(rng: np.random.Generator) -> None:
    params = transformers_llama.from_checkpoint(checkpoint("llama", rng)).params
    upstream = [jax.jit(calling(vanilla("llama", rope_theta=base)))(params, TOKENS) for base in (1e4, 1e5)]
    np.testing.assert_array_equal(*upstream)
    mended = [
        jax.jit(calling(vanilla("llama", rope_theta=base), transformers_llama.PATCH_SET.mends))(params, TOKENS)
        for base in (1e4, 1e5)
    ]
    assert np.abs(np.asarray(mended[0]) - np.asarray(mended[1])).max() > 1e-3


def test_no_program_holds_a_mask_or_table_of_all_positions(family: str, rng: np.random.Generator) -> None:
    n_ctx = {"gpt2": "n_positions", "llama": "max_position_embeddings"}[family]
    lm = FAMILIES[family].from_checkpoint(checkpoint(family, rng, without="", **{n_ctx: 3001}))
    program = stable_hlo(lm.upstream.untagged, lm.params, TOKENS)
    # GPT-2's position embedding is a parameter; it is read, not copied.
    assert not re.findall(r"tensor<[^>]*3001[^>]*>", program.replace("tensor<3001x16xf32>", ""))
    assert "3001" in stable_hlo(calling(vanilla(family, **{n_ctx: 3001})), lm.params, TOKENS)


def test_a_tied_llama_has_no_second_embedding(rng: np.random.Generator) -> None:
    lm = transformers_llama.from_checkpoint(checkpoint("llama", rng, tie_word_embeddings=True))
    assert "lm_head" not in lm.params
    np.testing.assert_array_equal(lm.W_U, np.asarray(lm.W_E).T)
    activations = lm.reap(TOKENS, ["ln_final", "logits"])
    by_hand = np.asarray(activations["ln_final"]) @ np.asarray(lm.W_E).T
    np.testing.assert_allclose(activations["logits"], by_hand, atol=1e-4)
    assert lm.check(TOKENS).ok


def test_biases_of_attention(rng: np.random.Generator) -> None:
    lm = transformers_llama.from_checkpoint(checkpoint("llama", rng, attention_bias=True))
    assert lm.b_Q.shape == (2, 4, 4)
    assert lm.b_K.shape == (2, 2, 4)
    assert lm.b_O.shape == (2, 16)
    report = lm.check(TOKENS)
    assert report.ok, report


@pytest.mark.parametrize("changes", [{"n_inner": 20}, {"activation_function": "relu"}, {"tie_word_embeddings": False}])
def test_other_gpt2s(rng: np.random.Generator, changes: dict[str, Any]) -> None:
    lm = transformers_gpt2.from_checkpoint(checkpoint("gpt2", rng, **changes))
    report = lm.check(TOKENS)
    assert report.ok, report
    assert ("lm_head" in lm.params) == ("tie_word_embeddings" in changes)


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", jnp.float16), ("llama", "bfloat16")])
def test_half_precision(family: str, rng: np.random.Generator, dtype: Any) -> None:
    seed = rng.integers(1000)
    full, half = (
        FAMILIES[family].from_checkpoint(checkpoint(family, np.random.default_rng(seed)), dtype=d)
        for d in ("float32", dtype)
    )
    assert half.config.dtype == jnp.dtype(dtype).name
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(dtype)}
    logits, expected = half(TOKENS), np.asarray(full(TOKENS))
    assert logits.dtype == dtype
    difference = np.abs(np.asarray(logits, np.float32) - expected)[TOKENS >= 0]
    assert difference.max() < 0.05 * np.abs(expected).max()
    report = half.check(TOKENS)
    assert report.ok, report


# What is left behind: nothing.


def functions(patch_set: PatchSet) -> dict[str, Any]:
    """The code of every function of the modules a patch set touches."""
    found = {}
    for name in {patcher.module_name for patcher in patch_set.patchers}:
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            members = vars(value).items() if inspect.isclass(value) and value.__module__ == name else [("", value)]
            for member, function in members:
                inner = inspect.unwrap(function) if callable(function) else function
                if inspect.isfunction(inner):
                    found[name, attribute, member] = inner.__code__
    return found


def names(patch_set: PatchSet) -> dict[str, set[str]]:
    return {
        patcher.module_name: set(vars(importlib.import_module(patcher.module_name))) for patcher in patch_set.patchers
    }


def test_upstream_is_itself_again_after_every_use(tiny) -> None:
    patch_set = tiny.upstream.patch_set
    before = functions(patch_set), names(patch_set)
    tiny(TOKENS)
    tiny.reap(TOKENS, "mlp_out")
    for _ in tiny.run(TOKENS, engine="python", sites="resid_post"):
        # Paused inside upstream's code, upstream is as it comes for everybody else.
        assert functions(patch_set) == before[0]
        with pytest.raises(ValueError, match="rank_promotion"):
            jnp.add(jnp.ones(2), jnp.ones((2, 2)))
        with pytest.raises(ValueError, match="dtype promotion"):
            jnp.add(jnp.ones(2, jnp.int8), jnp.ones(2, jnp.float32))
        break
    with contextlib.suppress(ZeroDivisionError), tiny.run(TOKENS, engine="python") as running_pass:
        for _ in running_pass:
            raise ZeroDivisionError
    assert (functions(patch_set), names(patch_set)) == before


def test_the_patch_changes_the_same_functions(tiny) -> None:
    """The test above would pass if the functions it looks at were not the ones that change."""
    patch_set = tiny.upstream.patch_set
    before = functions(patch_set)
    with patch_set:
        changed = {key for key, code in functions(patch_set).items() if key in before and code != before[key]}
    assert len(changed) >= 7
    assert functions(patch_set) == before


def test_patch_sets_fit_what_is_installed(family: str) -> None:
    report = FAMILIES[family].PATCH_SET.check()
    assert not report.is_broken, report
    assert set(FAMILIES[family].PATCH_SET.upstream) == set(FAMILIES[family].PATCH_SET.digests())


def test_a_version_out_of_range_is_refused_before_anything_changes(family: str) -> None:
    patch_set = dataclasses.replace(FAMILIES[family].PATCH_SET, versions={"transformers": ">=5", "flax": ">=0.12"})
    before = functions(patch_set)
    with pytest.raises(PatchError, match=r"transformers 4\.(.|\n)*transformers >=5"), patch_set:
        pass
    assert functions(patch_set) == before


# Configurations and weights that are refused.


REFUSED = {
    "unknown key": ("llama", {"sliding_window": 4096}, UnsupportedModelError, "sliding_window=4096"),
    "rotary scaling": ("llama", {"rope_scaling": {"rope_type": "yarn"}}, UnsupportedModelError, "its kind is 'yarn'"),
    "bias in the MLP": ("llama", {"mlp_bias": True}, UnsupportedModelError, "mlp_bias=True"),
    "head size": ("llama", {"head_dim": 8}, LoadError, "q_proj.weight has shape (16, 16), expected (32, 16)"),
    "unknown nonlinearity": ("llama", {"hidden_act": "relu6"}, UnsupportedModelError, "hidden_act='relu6'"),
    "missing key": ("llama", {"rms_norm_eps": None}, UnsupportedModelError, "Configuration without rms_norm_eps"),
    "several": ("llama", {"mlp_bias": True, "hidden_act": "x"}, UnsupportedModelError, "hidden_act='x', mlp_bias=True"),
    "scaling by layer": (
        "gpt2", {"scale_attn_by_inverse_layer_idx": True}, UnsupportedModelError, "scale_attn_by_inverse_layer_idx=True"
    ),
    "no scaling": ("gpt2", {"scale_attn_weights": False}, UnsupportedModelError, "scale_attn_weights=False"),
    "heads that do not divide": ("gpt2", {"n_head": 3}, UnsupportedModelError, "n_head=3 and n_embd=16"),
    "key heads that do not divide": (
        "llama", {"num_key_value_heads": 3}, UnsupportedModelError, "num_key_value_heads to divide num_attention_heads"
    ),
    "both kinds of heads": (
        "llama", {"num_attention_heads": 5, "num_key_value_heads": 3, "head_dim": None}, UnsupportedModelError,
        "num_attention_heads=5 and hidden_size=16; num_key_value_heads=3 and num_attention_heads=5",
    ),
    "gpt2 missing key": ("gpt2", {"n_layer": None}, UnsupportedModelError, "Configuration without n_layer"),
    "missing weight": ("llama", {"without": "model.norm.weight"}, LoadError, "missing (1): model.norm.weight"),
    "gpt2 missing weight": ("gpt2", {"without": "transformer.h.1.ln_2.bias"}, LoadError, "transformer.h.1.ln_2.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_refused(case: str, rng: np.random.Generator) -> None:
    name, changes, kind, words = REFUSED[case]
    with pytest.raises(kind) as error:
        FAMILIES[name].from_checkpoint(checkpoint(name, rng, **changes))
    assert words in str(error.value)
    assert "Fix: " in str(error.value)


def test_weights_that_are_left_over(rng: np.random.Generator) -> None:
    fitting = checkpoint("llama", rng)
    extra = Tensors.from_arrays({**fitting.tensors, "model.layers.2.mlp.up_proj.weight": np.ones((24, 16), np.float32)})
    with pytest.raises(LoadError, match=r"left over \(1\): model\.layers\.2\.mlp\.up_proj\.weight"):
        transformers_llama.from_checkpoint(dataclasses.replace(fitting, tensors=extra))


def test_dtypes_that_are_refused(rng: np.random.Generator) -> None:
    for dtype in ("int8", "float8", "float64"):
        with pytest.raises(InvalidInputError, match=rf"dtype='{dtype}' was given"):
            transformers_llama.from_checkpoint(checkpoint("llama", rng), dtype=dtype)


def test_keys_that_change_nothing_are_let_through(rng: np.random.Generator) -> None:
    """Real checkpoints carry many."""
    real = json.loads((ORACLES / "tiny_llama" / "config.json").read_text())
    harmless = {key: value for key, value in real.items() if key not in transformers_llama.HANDLED_KEYS}
    lm = transformers_llama.from_checkpoint(checkpoint("llama", rng, **harmless, is_llama_config=True))
    assert lm(TOKENS).shape == (2, 4, 90)
