"""Patch set for transformers' Flax Mistral (4.x): Llama's code copied by upstream, with attention in a sliding window.

Where upstream copied, tags and mends are Llama's under Mistral's names; only attention has its own. `MENDS` besides:

- a window of w lets a token look at w + 1 positions in upstream, at w in transformers' torch Mistral: it is w;
- without a window (`sliding_window: null`, all newer models) upstream's mask leaves each token itself alone: it is
  causal;
- heads are as wide as `head_dim` says (Mistral Nemo), not d_model / n_heads;
- as in Llama, only the block of the mask that is in use is built.

>>> print(causal_block(1, 2, 4, 2)[0, 0].astype(int))
[[1 1 0 0]
 [0 1 1 0]]

Sharp edges: the key-value cache holds all positions, those outside the window too.

Source: transformers.models.mistral.modeling_flax_mistral; transformers' torch Mistral for what is mended.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import ModelConfig, Upstream
from interp_jax.patches import flax_attention, transformers_flax, transformers_llama, transformers_stacked
from interp_jax.transforms.patcher import Patcher, PatchSet

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint
    from interp_jax.models.weights.layout import Placement

MODULE = "transformers.models.mistral.modeling_flax_mistral"

# `num_key_value_heads` has a default upstream that most models would contradict.
REQUIRED_KEYS = transformers_llama.REQUIRED_KEYS | {"num_key_value_heads"}
HANDLED_KEYS = REQUIRED_KEYS | {"head_dim", "hidden_act", "tie_word_embeddings", "rope_theta", "sliding_window"}
IGNORABLE_KEYS = frozenset({"attention_dropout"})


def causal_block(start: Any, n_queries: int, n_keys: int, window: int | None) -> jax.Array:
    """Where queries may look: not ahead, and not further back than the window.

    0 <= query - key < window

    Args:
        start: Position of the first query; it may be traced.
        n_queries: Number of queries.
        n_keys: Number of keys; the first is at position 0.
        window: Positions a query sees, its own included; None for all.

    Returns:
        The mask, `[1, 1, query, key]`.
    """
    distance = start + jnp.arange(n_queries)[:, None] - jnp.arange(n_keys)[None, :]
    visible = distance >= 0
    return (visible if window is None else visible & (distance < window))[None, None]


def _as_in_llama(patcher: Patcher) -> dict[str, Any]:
    """Llama's patches under Mistral's names, but for attention."""
    return {
        member.replace("Llama", "Mistral"): list(pairs)
        for member, pairs in patcher.members.items()
        if not member.startswith("FlaxLlamaAttention")
    }


TAGS = Patcher(
    MODULE,
    {
        **_as_in_llama(transformers_llama.TAGS),
        "FlaxMistralAttention.__call__": [
            (
                "self._split_heads(query_states, self.num_heads)",
                'sow(self._split_heads(query_states, self.num_heads), name="q")',
            ),
            (
                "self._split_heads(key_states, self.num_key_value_heads)",
                'sow(self._split_heads(key_states, self.num_key_value_heads), name="k")',
            ),
            (
                "self._split_heads(value_states, self.num_key_value_heads)",
                'sow(self._split_heads(value_states, self.num_key_value_heads), name="v")',
            ),
            (
                "key_states, query_states = self.rotary_emb(key_states, query_states, position_ids)",
                """
                key_states, query_states = self.rotary_emb(key_states, query_states, position_ids)
                query_states, key_states = sow(query_states, name="rot_q"), sow(key_states, name="rot_k")
                """,
            ),
            (
                'jnp.einsum("...hqk,...khd->...qhd", attn_weights, value_states)',
                'sow(jnp.einsum("...hqk,...khd->...qhd", attn_weights, value_states), name="z")',
            ),
        ],
    },
)

# One of these two goes with TAGS.
LAYER_LOOP = Patcher(MODULE, {"FlaxMistralLayerCollection.__call__": [transformers_stacked.LAYER_LOOP]})
LAYER_SCAN = Patcher(
    MODULE,
    {"FlaxMistralLayerCollection.__call__": [transformers_stacked.LAYER_SCAN]},
    names={"scan_blocks": transformers_stacked.scan_blocks},
)

MENDS = Patcher(
    MODULE,
    {
        **_as_in_llama(transformers_llama.MENDS),
        "FlaxMistralAttention.setup": [
            (
                # In 4.45 the mask has another name, and the window may not be None.
                """
                $mask = make_causal_mask(jnp.ones((1, config.max_position_embeddings), dtype="bool"), dtype="bool")
                self.causal_mask = jnp.triu($same_mask, k=$window)
                """,
                "self.causal_mask = None",
            ),
            ("self.head_dim = self.hidden_size // self.num_heads", "self.head_dim = head_size(config)"),
            ("(self.head_dim * self.num_heads) != self.hidden_size", "False"),
        ],
        "FlaxMistralAttention._merge_heads": [("(self.hidden_size,)", "(-1,)")],
        "FlaxMistralAttention.__call__": [
            (
                "lax.dynamic_slice(self.causal_mask, (0, 0, mask_shift, 0), (1, 1, query_length, max_decoder_length))",
                "causal_block(mask_shift, query_length, max_decoder_length, self.config.sliding_window)",
            ),
            (
                "self.causal_mask[:, :, :query_length, :key_length]",
                "causal_block(0, query_length, key_length, self.config.sliding_window)",
            ),
        ],
    },
    names={**transformers_llama.MEND_NAMES, "causal_block": causal_block},
)

# What the patches were written against: transformers 4.57.6.
DIGESTS = {
    "FlaxMistralRotaryEmbedding.setup": "528009089a5ac517850f452366e2a249414639f62b6c51fab3087a3134d62987",
    "FlaxMistralRotaryEmbedding.__call__": "8e51d53406601865533661e936e3847131f23372ed737c90d5e62dc796feec6d",
    "FlaxMistralForCausalLMModule.__call__": "57590097089cb1bbb0f244dd3d0df8d90a67671ec11eb786e356eb032ed35494",
    "FlaxMistralAttention.setup": "208a2bf37e5dd16102c42c9b7c307366c66f09b6e9ae1f75cbd0c8b25a63a73c",
    "FlaxMistralAttention._merge_heads": "6a8de62c0f18d1d61ef5edb39437d33a7fc67553c5cd516f9a66b4a1c25dc4ed",
    "FlaxMistralAttention.__call__": "d887f3403df7c3c94b296f0e2eb2f38975102f55909632bf6918e66312d339dc",
    "FlaxMistralModule.__call__": "3168d8e145fef2237cf6412d4c975fe84ac0bc292f3e3824ffb35e4a2a72bcda",
    "FlaxMistralDecoderLayer.__call__": "359f0a3c4d921f6b1c5b7fcb9e3b245a36706ff79c00fb1fa390e12a1b8a74af",
    "FlaxMistralMLP.__call__": "b3b75b27269c55f116e9603ee4739c4f4770d471a5164257694934a44f6ca0bf",
    "FlaxMistralLayerCollection.__call__": "d14722ddff517c6b6e4b510106bcc4c3c40d42890598b8cb21b8d112b63829e3",
}

PATCH_SET = PatchSet(
    "transformers_mistral",
    tags=(TAGS, LAYER_LOOP, flax_attention.TAGS),
    mends=(MENDS,),
    versions={"transformers": ">=4.45,<5", "flax": ">=0.12"},
    upstream={**{f"{MODULE}:{member}": digest for member, digest in DIGESTS.items()}, **flax_attention.DIGESTS},
)
STACKED_PATCH_SET = dataclasses.replace(
    PATCH_SET, name="transformers_mistral (stacked)", tags=(TAGS, flax_attention.TAGS), mends=(MENDS, LAYER_SCAN)
)


def from_checkpoint(
    checkpoint: Checkpoint, *, dtype: Any = "float32", stacked: bool = False, sharding: Placement | None = None
) -> LanguageModel:
    """A `LanguageModel` from the files of a Mistral.

    Args:
        checkpoint: Configuration, weights and tokenizer in the Hugging Face convention.
        dtype: Of parameters and computation: float32, bfloat16 or float16.
        stacked: Whether to hold the layers as one subtree and run them as a scan.
        sharding: Where the parameters go; see `interp_jax.models.loading.load`.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: A configuration that upstream's code does not compute.
        LoadError: Weights that do not fit the configuration.
    """
    checkpoint.check_config(handled=HANDLED_KEYS, ignorable=IGNORABLE_KEYS)
    settings = {key: checkpoint.config[key] for key in HANDLED_KEYS if checkpoint.config.get(key) is not None}
    transformers_flax.check_values(
        checkpoint,
        required=REQUIRED_KEYS,
        allowed={"hidden_act": transformers_flax.activations()},
        divides=[
            *([] if "head_dim" in settings else [("num_attention_heads", "hidden_size")]),
            ("num_key_value_heads", "num_attention_heads"),
        ],
    )
    # None says that there is no window; a missing key, that it is the default.
    if "sliding_window" in checkpoint.config:
        settings["sliding_window"] = checkpoint.config["sliding_window"]
    return transformers_llama.read(checkpoint, _build, settings, dtype=dtype, stacked=stacked, sharding=sharding)


# One Upstream per configuration, so that a model loaded twice compiles once.
@functools.lru_cache(maxsize=16)
def _build(settings: str, dtype: str, stacked: bool) -> tuple[Upstream, ModelConfig]:
    from transformers.models.mistral.configuration_mistral import MistralConfig
    from transformers.models.mistral.modeling_flax_mistral import FlaxMistralForCausalLMModule

    hf = MistralConfig(**json.loads(settings))
    return transformers_llama.upstream_of(
        hf,
        FlaxMistralForCausalLMModule(hf, dtype=getattr(jnp, dtype)),
        name="mistral",
        patch_set=STACKED_PATCH_SET if stacked else PATCH_SET,
        stacked=stacked,
        restacked=lambda: _build(settings, dtype, not stacked)[0],
    )
