"""Patch set for Tunix's NNX Qwen 3 (google-tunix): the dense models with `model_type: qwen3`.

Qwen 3 is Llama 3 with a norm on each query and key: `q` and `k` are the projections before it, `rot_q` and `rot_k` what
the scores are made of. `TAGS` make the sites and change nothing. `MENDS` repair the rotary base, which is a million in
upstream whatever the configuration says, tied unembeddings, which upstream does not have, and how JAX is asked for the
mesh in force.

>>> sorted(HANDLED_KEYS - tunix_llama3.HANDLED_KEYS)
['layer_types', 'sliding_window', 'use_sliding_window']

Sharp edges: mixtures of experts (`qwen3_moe`), sliding windows and rotary scaling are refused.

Source: tunix.models.qwen3.model; transformers' torch Qwen 3 for what is mended.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import ModelConfig, Upstream
from interp_jax.patches import transformers_flax, tunix_llama3, tunix_nnx
from interp_jax.transforms.patcher import Patcher, PatchSet

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint
    from interp_jax.models.weights.layout import Placement

MODULE = "tunix.models.qwen3.model"

# The size of a head does not follow from the width.
REQUIRED_KEYS = tunix_llama3.REQUIRED_KEYS | frozenset({"head_dim"})
HANDLED_KEYS = tunix_llama3.HANDLED_KEYS | frozenset({"use_sliding_window", "sliding_window", "layer_types"})
# Which layers would have a window if there were windows.
IGNORABLE_KEYS = tunix_llama3.IGNORABLE_KEYS | frozenset({"max_window_layers"})

TAGS = Patcher(MODULE, {**tunix_llama3.TAGGED, **tunix_llama3.tagged_model("Qwen3")})

# One of these two goes with TAGS.
LAYER_LOOP = Patcher(MODULE, {"Qwen3.__call__": [tunix_nnx.LAYER_LOOP]})
LAYER_SCAN = Patcher(MODULE, {"Qwen3.__call__": [tunix_nnx.LAYER_SCAN]}, names={"scan_module": tunix_nnx.scan_module})
MENDS = Patcher(
    MODULE,
    {
        "shard": [tunix_nnx.MESH],
        "Attention.block": [tunix_llama3.ROPE_BASE],
        "Qwen3.__call__": [
            ("self.lm_head(x)", 'self.lm_head(x) if hasattr(self, "lm_head") else self.embedder.decode(x)'),
        ],
    },
    names={"rope_with": tunix_llama3.rope_with},
)

# What the patches were written against: Tunix 0.1.5.
DIGESTS = {
    "shard": "aaa8a73e9e9c65404aaeb0ec675ca905a92de14b212ac3c79c1704cab1c3bbc7",
    "Attention.block": "768484009a27ff1fcf7d941f40e8191c0399a0fa6b1a358be2a024bcf0cd3d37",
    "Qwen3.__call__": "3539f5316cdd6807732ab85e162979908b4e41e5d9e839cbd6e100532a793d71",
    "DecoderLayer.__call__": "9729f4d44c253d3ad5851a4f55269dfdedfbb4ae16c2994b4d997f5aea7ba39c",
    "MLP.__call__": "8c8f6b0a9e8c230f81cdcbc939fae20eba984b37ed6db1192bc1e0c388e6c6d2",
}

PATCH_SET = PatchSet(
    "tunix_qwen3",
    tags=(TAGS, LAYER_LOOP),
    mends=(MENDS,),
    versions=tunix_nnx.VERSIONS,
    upstream={f"{MODULE}:{member}": digest for member, digest in DIGESTS.items()},
)
STACKED_PATCH_SET = dataclasses.replace(
    PATCH_SET, name="tunix_qwen3 (stacked)", tags=(TAGS,), mends=(MENDS, LAYER_SCAN)
)


def from_checkpoint(
    checkpoint: Checkpoint, *, dtype: Any = "float32", stacked: bool = False, sharding: Placement | None = None
) -> LanguageModel:
    """A `LanguageModel` from the files of a Qwen 3.

    Args:
        checkpoint: Configuration, weights and tokenizer in the Hugging Face convention.
        dtype: Of parameters and computation: float32 or bfloat16.
        stacked: Whether to hold the layers as one subtree and run them as a scan.
        sharding: Where the parameters go; see `interp_jax.models.loading.load`.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: A configuration that upstream's code does not compute.
        LoadError: Weights that do not fit the configuration.
        InvalidInputError: Upstream does not compute in this dtype.
        PatchError: Tunix is not installed, or in a version the patches are not for.
    """
    PATCH_SET.require_version()
    checkpoint.check_config(handled=HANDLED_KEYS, ignorable=IGNORABLE_KEYS)
    given = {key: value for key in HANDLED_KEYS if (value := checkpoint.config.get(key)) is not None}
    transformers_flax.check_values(
        checkpoint,
        required=REQUIRED_KEYS,
        allowed={
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "use_sliding_window": (False,),
            "layer_types": (["full_attention"] * given.get("num_hidden_layers", 0),),
            "rope_scaling": ({"rope_type": "default"}, {"type": "default"}),
        },
        divides=[("num_key_value_heads", "num_attention_heads")],
        upstream="Tunix's Qwen 3",
    )
    config = tunix_llama3.config_of(given, family="qwen3", dtype=tunix_nnx.dtype_name(dtype), rope_theta=10000.0)
    return tunix_nnx.read(checkpoint, _build(config, stacked), config, sharding=sharding)


# One Upstream per configuration, so that a model loaded twice compiles once.
@functools.lru_cache(maxsize=16)
def _build(config: ModelConfig, stacked: bool) -> Upstream:
    return tunix_nnx.upstream_of(
        FAMILY,
        config,
        STACKED_PATCH_SET if stacked else PATCH_SET,
        stacked=stacked,
        restacked=lambda: _build(config, not stacked),
    )


FAMILY = tunix_nnx.Family(
    name="tunix_qwen3",
    module=MODULE,
    class_name="Qwen3",
    make_config=tunix_llama3.tunix_config,
    norm="w",
    ties=False,
    weights=tunix_llama3.layer_weights,
    tensors=functools.partial(tunix_llama3.tensors, head_norms=True),
)
