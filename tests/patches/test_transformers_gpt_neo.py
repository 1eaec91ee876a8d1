"""GPT-Neo under its patch set: layers of two kinds, stacked in groups, and what cannot be stacked.

What it shares with other families is in test_tiny_families.py.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from interp_jax.core.errors import UnsupportedModelError
from interp_jax.models.loading import load
from interp_jax.patches import transformers_gpt_neo
from interp_jax.patches.transformers_stacked import Layers, stride_of
from tests.conftest import ORACLES
from tests.patches.test_tiny_families import TOKENS, altered

WINDOW = 5


@pytest.fixture(scope="module")
def neo() -> Any:
    return load(ORACLES / "tiny_gpt_neo")


def other_kinds(*kinds: str) -> dict[str, Any]:
    return {"attention_types": [[list(kinds), 1]], "attention_layers": list(kinds)}


def test_every_other_layer_looks_through_a_window(neo) -> None:
    assert neo.config.window == (None, WINDOW, None, WINDOW)
    distance = np.arange(8)[:, None] - np.arange(8)[None, :]
    for lm in (neo, neo.stacked()):
        patterns = lm.reap(TOKENS[:1], "pattern")
        for layer in range(4):
            seen = (distance >= 0) & (distance < WINDOW) if layer % 2 else distance >= 0
            np.testing.assert_array_equal(np.asarray(patterns[f"{layer}.pattern"][0] > 0), np.array([seen] * 4))


def test_contracts_tell_a_wrong_window(neo) -> None:
    for window in (WINDOW, None, (WINDOW, None) * 2, (None, WINDOW + 1) * 2, (None, WINDOW - 1) * 2):
        config = dataclasses.replace(neo.config, window=window)
        failed = [outcome.contract for outcome in dataclasses.replace(neo, config=config).check(TOKENS).failures]
        assert any(contract.startswith(("pattern is 0", "attn_scores")) for contract in failed), window


def test_the_query_is_what_scores_are_made_of(neo) -> None:
    """GPT-Neo has no 1/sqrt(d_head); upstream undoes the one there is, and W_Q says so."""
    activations = neo.reap(TOKENS, ["0.ln1", "0.q"])
    kernel = neo.params["transformer"]["h"]["0"]["attn"]["attention"]["q_proj"]["kernel"]
    by_hand = np.asarray(activations["0.ln1"]) @ np.asarray(kernel) * np.float32(np.sqrt(6))
    np.testing.assert_allclose(np.asarray(activations["0.q"]).reshape(2, 8, 24), by_hand, atol=1e-5)
    np.testing.assert_allclose(neo.weight("W_Q", 0)[1], kernel[:, 6:12] * np.float32(np.sqrt(6)), rtol=1e-6)


def test_stacked_layers_are_a_subtree_for_each_of_a_group(neo) -> None:
    stacked = neo.stacked()
    layers, groups = neo.params["transformer"]["h"], stacked.params["transformer"]["h"]
    assert set(groups) == {"0", "1"}
    for offset, layer in ((0, 0), (1, 1), (0, 2), (1, 3)):
        own = jax.tree.map(lambda leaf, i=layer // 2: leaf[i], groups[str(offset)])
        jax.tree.map(np.testing.assert_array_equal, own, layers[str(layer)])
    assert "4 stacked" in repr(stacked)


def test_donated_layers_are_gone() -> None:
    lm = load(ORACLES / "tiny_gpt_neo")
    logits, leaves = np.asarray(lm(TOKENS)), jax.tree.leaves(lm.params["transformer"]["h"])
    stacked = lm.stacked(donate=True)
    assert all(leaf.is_deleted() for leaf in leaves)
    np.testing.assert_array_equal(stacked.unstacked(donate=True)(TOKENS), logits)


@pytest.mark.parametrize("kinds", [("local",) * 4, ("global", "global", "local", "local")], ids=["one-kind", "pairs"])
def test_other_orders_of_kinds(kinds: tuple[str, ...]) -> None:
    checkpoint = altered("gpt_neo", **other_kinds(*kinds))
    plain = transformers_gpt_neo.from_checkpoint(checkpoint)
    assert plain.config is not None
    assert plain.config.window == tuple(WINDOW if kind == "local" else None for kind in kinds)
    if len(set(kinds)) == 1:
        np.testing.assert_allclose(plain.stacked()(TOKENS), plain(TOKENS), atol=1e-4)
        return
    for request in (plain.stacked, lambda: transformers_gpt_neo.from_checkpoint(checkpoint, stacked=True)):
        with pytest.raises(UnsupportedModelError) as error:
            request()
        message = str(error.value)
        assert message.startswith("Layers that differ: 0 global, 1 global, 2 local, 3 local in a request for stacked")
        assert "Fix: leave the layers of this model unstacked" in message


def test_kinds_are_stated_in_two_ways() -> None:
    for key in ("attention_types", "attention_layers"):
        lm = transformers_gpt_neo.from_checkpoint(altered("gpt_neo", **{key: None}))
        assert lm.config is not None
        assert lm.config.window == (None, WINDOW, None, WINDOW)


def test_strides() -> None:
    cases = {"": 1, "a": 1, "aaaa": 1, "ab": 2, "abab": 2, "aabaab": 3, "aabb" * 2: 4, "abc": 3}
    assert {kinds: stride_of(kinds) for kinds in cases} == cases
    for kinds in ("aab", "aabb", "abababa"):
        with pytest.raises(UnsupportedModelError, match="Layers that differ: 0 a, 1 "):
            stride_of(kinds)


def test_groups_lie_at_any_depth(rng: np.random.Generator) -> None:
    plain, stacked = (Layers(("a", "b", "c"), 6, is_stacked, tuple("xyzxyz")) for is_stacked in (False, True))
    layers = {str(i): {"w": rng.standard_normal((2, 3)), f"of {'xyz'[i % 3]}": np.ones(i % 3 + 1)} for i in range(6)}
    params = {"a": {"b": {"c": layers, "kept": np.ones(1)}}, "also kept": np.ones(2)}
    made = stacked.restack(params)
    assert made["a"]["b"]["c"]["2"]["of z"].shape == (2, 3)
    assert made["a"]["b"]["kept"] is params["a"]["b"]["kept"]
    for i in range(6):
        jax.tree.map(np.testing.assert_array_equal, stacked.params(made, i), layers[str(i)])
    back = plain.restack(made)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert jax.tree.map(np.shape, stacked.cache(lambda: {"k": np.zeros((4, 5), np.float32)})) == {
        "a": {"b": {"c": {str(offset): {"k": (2, 4, 5)} for offset in range(3)}}}
    }
