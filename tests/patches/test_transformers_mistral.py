"""Mistral under its patch set: PyTorch's numbers in its sliding window, stacked and unstacked, and what is refused.

Source: interp_jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from interp_jax.patches import transformers_mistral
from tests.conftest import ORACLES
from tests.patches.test_transformers_flax import calling

TINY = ORACLES / "tiny_mistral"
WINDOW = 7
TOKENS = np.array([[5, 80, 3, 7, 200, 9, 31, 4, 66, 2], [-1, -1, 6, 0, 9, 1, 12, 13, 14, 15]], np.int32)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The tiny model unstacked and stacked."""
    return load(TINY), load(TINY, stacked=True)


def altered(**changes: Any) -> Any:
    """The tiny model's files with another configuration; `KeyError` stands for a key that is not there."""
    checkpoint = read_checkpoint(TINY)
    config = {key: value for key, value in {**checkpoint.config, **changes}.items() if value is not KeyError}
    return dataclasses.replace(checkpoint, config=config)


def vanilla(**changes: Any) -> Any:
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_flax_mistral import FlaxMistralForCausalLMModule

    config = json.loads((TINY / "config.json").read_text())
    return FlaxMistralForCausalLMModule(MistralConfig(**config | changes))


@pytest.mark.parametrize("which", [0, 1], ids=["unstacked", "stacked"])
def test_logits_are_those_of_torch(models, which: int) -> None:
    lm, recorded = models[which], np.load(ORACLES / "tiny_mistral_logits.npz")
    assert recorded["tokens"].shape[1] > 6 * WINDOW
    np.testing.assert_allclose(lm(recorded["tokens"]), recorded["logits"], atol=2e-4, rtol=1e-3)
    assert lm.config.window == WINDOW
    assert lm.config.rope_theta == 100000.0


def test_stacked_and_unstacked_agree_at_every_site(models) -> None:
    plain, stacked = models
    expected, values = plain.reap(TOKENS, "*"), stacked.reap(TOKENS, "*")
    assert set(values) == set(expected)
    assert len(expected) == 3 + 3 * 18
    for site, value in expected.items():
        np.testing.assert_allclose(values[site], value, atol=1e-5 * max(1, float(np.abs(value).max())))


@pytest.mark.slow
def test_gradients_agree(models) -> None:
    plain, stacked = models

    def gradient(lm: Any) -> Any:
        def loss(params: Any) -> Any:
            return -jax.nn.log_softmax(lm.forward(params, TOKENS[:1]))[..., 7].mean()

        return jax.jit(jax.grad(loss))(lm.params)

    expected, found = gradient(plain), stacked.upstream.restack(gradient(stacked))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(other).max())
        assert scale > 0
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["compiled", "python"])
def test_the_loop_sees_and_changes_the_same(models, engine: Any) -> None:
    seen, logits = [], []
    for lm in models:
        seen.append({})
        for layer, name, value in (running_pass := lm.run(TOKENS, sites=["resid_pre", "pattern"], engine=engine)):
            # In there, values are not known yet.
            seen[-1][Site(layer, name)] = None if isinstance(value, Tracer) else np.asarray(value)
            if (layer, name) == (1, "pattern"):
                running_pass.modified_value = value[:, ::-1]
            del value
        logits.append(np.asarray(running_pass.retval))
    assert set(seen[0]) == set(seen[1]) and len(seen[0]) == 6
    for site, value in seen[1].items():
        if value is not None:
            np.testing.assert_allclose(value, seen[0][site], atol=1e-5 * max(1, float(np.abs(value).max())))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5 * float(np.abs(logits[0]).max()))
    assert np.abs(logits[0] - np.asarray(models[0](TOKENS))).max() > 1e-2


def test_stacking_is_what_loading_stacked_gives(models) -> None:
    plain, stacked = models
    for made, loaded in ((plain.stacked(), stacked), (stacked.unstacked(), plain)):
        assert made.upstream is loaded.upstream
        assert jax.tree.structure(made.params) == jax.tree.structure(loaded.params)
        jax.tree.map(np.testing.assert_array_equal, made.params, loaded.params)


@pytest.mark.slow
def test_it_is_upstream_where_upstream_is_right() -> None:
    """Within the window, with a base of 10000. Upstream makes its angles in double precision."""
    lm = transformers_mistral.from_checkpoint(altered(rope_theta=10000.0))
    tokens = TOKENS[:, :WINDOW]
    upstream = jax.jit(calling(vanilla(rope_theta=10000.0)))(lm.params, tokens)
    np.testing.assert_allclose(np.asarray(lm(tokens))[tokens >= 0], np.asarray(upstream)[tokens >= 0], atol=2e-5)


def test_contracts_know_the_window(models) -> None:
    plain, stacked = models
    for lm in models:
        report = lm.check(TOKENS)
        assert report.ok, report
    # Judged by another window, the same patterns fail.
    for window in (WINDOW - 1, None):
        upstream, config = plain.upstream, dataclasses.replace(plain.config, window=window)
        report = dataclasses.replace(plain, upstream=upstream, config=config).check(TOKENS)
        assert not report.ok
    pattern = np.asarray(stacked.reap(TOKENS, "1.pattern")["1.pattern"])
    assert (pattern[0, :, 9, :3] == 0).all()
    assert (pattern[0, :, 9, 3:] > 0).all()


def test_generation_leaves_the_window_with_and_without_cache(models) -> None:
    texts = [
        lm.generate(TOKENS, max_new_tokens=8, use_cache=use_cache).tokens
        for lm in models
        for use_cache in (True, False)
    ]
    for tokens in texts[1:]:
        np.testing.assert_array_equal(tokens, texts[0])


@pytest.mark.slow
def test_upstream_sees_one_position_more_and_without_a_window_only_itself(models) -> None:
    """What the mends are for."""
    plain, _ = models
    tokens = TOKENS[:1]

    def pattern(module: Any, patchers: Any) -> np.ndarray:
        def forward(params: Any, tokens: Any) -> Any:
            return calling(module, patchers)(params, tokens)

        from interp_jax.models.passes import read

        return np.asarray(read(forward, (plain.params, tokens), "0.pattern").popitem()[1])[0, 0]

    tags, mends = transformers_mistral.PATCH_SET.tags, transformers_mistral.PATCH_SET.mends
    assert (pattern(vanilla(), tags)[9] > 0).sum() == WINDOW + 1
    assert (pattern(vanilla(), (*mends, *tags))[9] > 0).sum() == WINDOW
    # In transformers 4.45 a window of None is not even accepted.
    with contextlib.suppress(TypeError):
        assert (pattern(vanilla(sliding_window=None), tags) == np.eye(10)).all()
    assert ((pattern(vanilla(sliding_window=None), (*mends, *tags)) > 0) == np.tril(np.ones((10, 10), bool))).all()


def test_tags_alone_change_no_byte_of_the_program(models) -> None:
    plain, _ = models
    programs = [
        stable_hlo(calling(vanilla(), patchers), plain.params, TOKENS)
        for patchers in ((), transformers_mistral.PATCH_SET.tags)
    ]
    assert programs[0] == programs[1]
    for lm in models:
        assert stable_hlo(lm.forward, lm.params, TOKENS) == stable_hlo(lm.upstream.untagged, lm.params, TOKENS)


@pytest.mark.slow
def test_no_window_and_no_word_of_one_differ() -> None:
    without = transformers_mistral.from_checkpoint(altered(sliding_window=None))
    unsaid = transformers_mistral.from_checkpoint(altered(sliding_window=KeyError))
    windows = [lm.config.window for lm in (without, unsaid) if lm.config is not None]
    assert windows == [None, 4096]
    np.testing.assert_array_equal(without(TOKENS), unsaid(TOKENS))  # Ten positions see no difference.
    assert float(jnp.abs(without(TOKENS) - load(TINY)(TOKENS))[0].max()) > 1e-3
    assert without.check(TOKENS).ok


def test_causal_block_against_its_definition() -> None:
    for start, n_queries, n_keys, window in ((0, 4, 4, None), (2, 3, 6, 2), (5, 1, 9, 3)):
        expected = [
            [k <= start + q and (window is None or start + q - k < window) for k in range(n_keys)]
            for q in range(n_queries)
        ]
        block = jax.jit(transformers_mistral.causal_block, static_argnums=(1, 2, 3))(start, n_queries, n_keys, window)
        np.testing.assert_array_equal(block[0, 0], expected)


@pytest.mark.slow
def test_patch_sets_fit_what_is_installed() -> None:
    for patch_set in (transformers_mistral.PATCH_SET, transformers_mistral.STACKED_PATCH_SET):
        report = patch_set.check()
        assert not report.is_broken, report
        assert set(patch_set.upstream) == set(patch_set.digests())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": None}, "Configuration without num_key_value_heads"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling="),
        ({"hidden_act": "relu6"}, "hidden_act='relu6'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads to divide num_attention_heads"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        transformers_mistral.from_checkpoint(altered(**changes))
    assert words in str(error.value)
    assert "Fix: " in str(error.value)


def test_shapes_that_contradict_the_configuration() -> None:
    with pytest.raises(LoadError, match=r"mlp\.down_proj\.weight has shape"):
        transformers_mistral.from_checkpoint(altered(intermediate_size=41))
    with pytest.raises(LoadError, match=r"self_attn\.q_proj\.weight has shape \(24, 24\), expected \(32, 24\)"):
        transformers_mistral.from_checkpoint(altered(head_dim=8))
