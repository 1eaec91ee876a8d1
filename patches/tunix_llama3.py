"""Patch set for Tunix's NNX Llama 3 (google-tunix): another upstream for what has `model_type: llama`.

`TAGS` make the sites and change nothing: with them alone the program lowers to the same StableHLO as without. `MENDS`
repair the rotary base, which is a million in upstream whatever the configuration says, and ask JAX for the mesh in
force as JAX now wants to be asked.

>>> sorted(HANDLED_KEYS - REQUIRED_KEYS)[:2]
['attention_bias', 'head_dim']

Sharp edges: rotary scaling and biases do not exist in upstream and are refused. `k`, `v` and `rot_k` have `n_kv_heads`
heads. Only a family's first upstream is found by `load(name)`; this one is asked for:
`load(name, upstream="tunix_llama3")`.

Source: tunix.models.llama3.model; transformers' torch Llama for what is mended.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import ModelConfig, Upstream
from interp_jax.patches import transformers_flax, transformers_llama, transformers_stacked, tunix_nnx
from interp_jax.transforms.patcher import Patcher, PatchSet

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint
    from interp_jax.models.weights.layout import Placement, Stored

MODULE = "tunix.models.llama3.model"

REQUIRED_KEYS = transformers_llama.REQUIRED_KEYS
HANDLED_KEYS = transformers_llama.HANDLED_KEYS
IGNORABLE_KEYS = transformers_llama.IGNORABLE_KEYS


def rope_with(apply_rope: Callable[..., Any], theta: float) -> Callable[..., Any]:
    """Upstream's `apply_rope`, with `theta` as its rotary base."""
    return functools.partial(apply_rope, rope_theta=theta)


# Tunix's Qwen 3 is written as its Llama 3, but for the norms of queries and keys.
TAGGED: Mapping[str, list[tuple[str, str]]] = {
    "DecoderLayer.__call__": [
        (
            "inputs_normalized = self.input_layernorm(x)",
            """
            x = sow(x, name="resid_pre")
            inputs_normalized = sow(self.input_layernorm(x), name="ln1")
            """,
        ),
        (
            "attn_output += x",
            """
            attn_output = sow(attn_output, name="attn_out")
            attn_output += x
            attn_output = sow(attn_output, name="resid_mid")
            """,
        ),
        (
            "self.post_attention_layernorm(attn_output)",
            'sow(self.post_attention_layernorm(attn_output), name="ln2")',
        ),
        ("self.mlp(attn_output)", 'sow(self.mlp(attn_output), name="mlp_out")'),
        ("return cache, outputs", 'return cache, sow(outputs, name="resid_post")'),
    ],
    "Attention.block": [
        ("self.q_proj(x)", 'sow(self.q_proj(x), name="q")'),
        ("self.k_proj(x)", 'sow(self.k_proj(x), name="k")'),
        ("self.v_proj(x)", 'sow(self.v_proj(x), name="v")'),
        (
            """
            if cache is not None:
                end_index = cache['end_index'][0]
                $$update
            """,
            """
            query_proj, key_proj = sow(query_proj, name="rot_q"), sow(key_proj, name="rot_k")
            if cache is not None:
                end_index = cache['end_index'][0]
                $$update
            """,
        ),
        (
            "jax.nn.softmax(attn.astype(jnp.float32), axis=-1).astype(key_proj.dtype)",
            """
            sow(
                jax.nn.softmax(sow(attn, name="attn_scores").astype(jnp.float32), axis=-1).astype(key_proj.dtype),
                name="pattern",
            )
            """,
        ),
        ("self.o_proj(qkv)", 'self.o_proj(sow(qkv, name="z"))'),
    ],
    "MLP.__call__": [
        (
            "nnx.silu(self.gate_proj(x)) * self.up_proj(x)",
            """
            sow(
                nnx.silu(sow(self.gate_proj(x), name="mlp_gate")) * sow(self.up_proj(x), name="mlp_pre"),
                name="mlp_post",
            )
            """,
        ),
    ],
}


def tagged_model(class_name: str) -> dict[str, list[tuple[str, str]]]:
    """The tags of a whole model of class `class_name`, outside its layers."""
    return {
        f"{class_name}.__call__": [
            ("self.embedder.encode(input_tokens)", 'sow(self.embedder.encode(input_tokens), name="embed")'),
            ("self.final_norm(x)", 'sow(self.final_norm(x), name="ln_final")'),
            ("return logits, new_cache", 'return sow(logits, name="logits"), new_cache'),
        ],
    }


TAGS = Patcher(MODULE, {**TAGGED, **tagged_model("Llama3")})

# One of these two goes with TAGS.
LAYER_LOOP = Patcher(MODULE, {"Llama3.__call__": [tunix_nnx.LAYER_LOOP]})
LAYER_SCAN = Patcher(MODULE, {"Llama3.__call__": [tunix_nnx.LAYER_SCAN]}, names={"scan_module": tunix_nnx.scan_module})

ROPE_BASE = ("apply_rope", "rope_with(apply_rope, self.config.rope_theta)", 2)
MENDS = Patcher(MODULE, {"shard": [tunix_nnx.MESH], "Attention.block": [ROPE_BASE]}, names={"rope_with": rope_with})

# What the patches were written against: Tunix 0.1.5.
DIGESTS = {
    "shard": "aaa8a73e9e9c65404aaeb0ec675ca905a92de14b212ac3c79c1704cab1c3bbc7",
    "Attention.block": "750f970d3eed21190208e717e646f5058c01898c0cab3daee3ad41509edd2786",
    "Llama3.__call__": "967bc56a1cf0ee07e4f17ab54f53462ca5d282659189bfa12944d9681c2fbf04",
    "DecoderLayer.__call__": "ee100bab8f957c334da15a718c786380189f318bc37e6964d6e9c65aa0c7960d",
    "MLP.__call__": "8c8f6b0a9e8c230f81cdcbc939fae20eba984b37ed6db1192bc1e0c388e6c6d2",
}

PATCH_SET = PatchSet(
    "tunix_llama3",
    tags=(TAGS, LAYER_LOOP),
    mends=(MENDS,),
    versions=tunix_nnx.VERSIONS,
    upstream={f"{MODULE}:{member}": digest for member, digest in DIGESTS.items()},
)
STACKED_PATCH_SET = dataclasses.replace(
    PATCH_SET, name="tunix_llama3 (stacked)", tags=(TAGS,), mends=(MENDS, LAYER_SCAN)
)


def from_checkpoint(
    checkpoint: Checkpoint, *, dtype: Any = "float32", stacked: bool = False, sharding: Placement | None = None
) -> LanguageModel:
    """A `LanguageModel` from the files of a Llama, run by Tunix's Llama 3.

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
            "mlp_bias": (False,),
            "rope_interleaved": (False,),
            "rope_scaling": ({"rope_type": "default"}, {"type": "default"}),
        },
        divides=[
            *([] if "head_dim" in given else [("num_attention_heads", "hidden_size")]),
            ("num_key_value_heads", "num_attention_heads"),
        ],
        upstream="Tunix's Llama 3",
    )
    config = config_of(given, family="llama", dtype=tunix_nnx.dtype_name(dtype), rope_theta=10000.0)
    return tunix_nnx.read(checkpoint, _build(config, stacked), config, sharding=sharding)


def config_of(given: Mapping[str, Any], *, family: str, dtype: str, rope_theta: float) -> ModelConfig:
    """The shape of a model whose configuration has Llama's keys.

    Args:
        given: The keys and values of `config.json`.
        family: The name of the family.
        dtype: Of parameters and computation.
        rope_theta: The rotary base if none is given.

    Returns:
        The shape.
    """
    n_heads = given["num_attention_heads"]
    return ModelConfig(
        family=family,
        n_layers=given["num_hidden_layers"],
        d_model=given["hidden_size"],
        n_heads=n_heads,
        n_kv_heads=given.get("num_key_value_heads", n_heads),
        d_head=given.get("head_dim", given["hidden_size"] // n_heads),
        d_mlp=given["intermediate_size"],
        d_vocab=given["vocab_size"],
        n_ctx=given["max_position_embeddings"],
        activation=given.get("hidden_act", "silu"),
        is_gated=True,
        is_tied=given.get("tie_word_embeddings", False),
        norm="rmsnorm",
        norm_eps=given["rms_norm_eps"],
        rope_theta=given.get("rope_theta", rope_theta),
        dtype=dtype,
    )


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


def tunix_config(upstream: Any, config: ModelConfig, n_layers: int) -> Any:
    """Tunix's configuration of a Llama 3 or a Qwen 3.

    Args:
        upstream: Tunix's module.
        config: The model's shape.
        n_layers: How many layers to build.

    Returns:
        A `ModelConfig` of Tunix.
    """
    fields = {field.name for field in dataclasses.fields(upstream.ModelConfig)}
    return upstream.ModelConfig(
        num_layers=n_layers,
        vocab_size=config.d_vocab,
        embed_dim=config.d_model,
        hidden_dim=config.d_mlp,
        num_heads=config.n_heads,
        head_dim=config.d_head,
        num_kv_heads=config.n_kv_heads,
        rope_theta=config.rope_theta,
        norm_eps=config.norm_eps,
        **({"weight_tying": config.is_tied} if "weight_tying" in fields else {}),
    )


def tensors(config: ModelConfig, layers: transformers_stacked.Layers, *, head_norms: bool = False) -> dict[str, Any]:
    """Tunix's parameters, as tensors in the layout of torch's `Linear`, `[out, in]`.

    Args:
        config: The model's shape.
        layers: Where the layers lie.
        head_norms: Whether queries and keys have norms.

    Returns:
        The parameters in Tunix's form, those of the layers as `layers` has them.
    """
    d_model, d_mlp, d_head = config.d_model, config.d_mlp, config.d_head
    names = transformers_stacked.Names(layers)

    def heads(name: str, n_heads: int) -> dict[str, Stored]:
        rows = n_heads * d_head
        view: Callable[[Any], Any] = lambda tensor: tensor.reshape(n_heads, d_head, d_model).transpose(2, 0, 1)  # noqa: E731
        return {"w": names.array(f"{name}.weight", rows, d_model, view=view)}

    def kernel(name: str, d_out: int, d_in: int) -> dict[str, Stored]:
        return {"kernel": names.array(f"{name}.weight", d_out, d_in, turned=True)}

    def layer(at: str) -> dict[str, Any]:
        norms = {f"{which}_norm": {"w": names.array(f"{at}.self_attn.{which}_norm.weight", d_head)} for which in "qk"}
        return {
            "input_layernorm": {"w": names.array(f"{at}.input_layernorm.weight", d_model)},
            "attn": {
                "q_proj": heads(f"{at}.self_attn.q_proj", config.n_heads),
                "k_proj": heads(f"{at}.self_attn.k_proj", config.n_kv_heads),
                "v_proj": heads(f"{at}.self_attn.v_proj", config.n_kv_heads),
                "o_proj": {
                    "w": names.array(
                        f"{at}.self_attn.o_proj.weight",
                        d_model,
                        config.n_heads * d_head,
                        view=lambda tensor: tensor.reshape(d_model, -1, d_head).transpose(1, 2, 0),
                    )
                },
                **(norms if head_norms else {}),
            },
            "post_attention_layernorm": {"w": names.array(f"{at}.post_attention_layernorm.weight", d_model)},
            "mlp": {
                "gate_proj": kernel(f"{at}.mlp.gate_proj", d_mlp, d_model),
                "up_proj": kernel(f"{at}.mlp.up_proj", d_mlp, d_model),
                "down_proj": kernel(f"{at}.mlp.down_proj", d_model, d_mlp),
            },
        }

    params: dict[str, Any] = {
        "embedder": {"input_embedding": names.array("model.embed_tokens.weight", config.d_vocab, d_model)},
        "layers": names.layers(layer, "model.layers.{}"),
        "final_norm": {"w": names.array("model.norm.weight", d_model)},
    }
    if not config.is_tied:
        params["lm_head"] = {"w": names.array("lm_head.weight", config.d_vocab, d_model, turned=True)}
    return params


def layer_weights(config: ModelConfig) -> dict[str, Any]:
    """One layer's weights under canonical names, for a model of this `config`."""

    def heads(name: str) -> Callable[[Any], Any]:
        return lambda layer: layer["attn"][name]["w"].transpose(1, 0, 2)

    return {
        "ln1_w": lambda layer: layer["input_layernorm"]["w"],
        "W_Q": heads("q_proj"),
        "W_K": heads("k_proj"),
        "W_V": heads("v_proj"),
        "W_O": lambda layer: layer["attn"]["o_proj"]["w"],
        "ln2_w": lambda layer: layer["post_attention_layernorm"]["w"],
        "W_gate": lambda layer: layer["mlp"]["gate_proj"]["kernel"],
        "W_in": lambda layer: layer["mlp"]["up_proj"]["kernel"],
        "W_out": lambda layer: layer["mlp"]["down_proj"]["kernel"],
    }


FAMILY = tunix_nnx.Family(
    name="tunix_llama3",
    module=MODULE,
    class_name="Llama3",
    make_config=tunix_config,
    norm="w",
    ties=True,
    weights=layer_weights,
    tensors=tensors,
)
