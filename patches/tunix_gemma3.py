"""Patch set for Tunix's NNX Gemma 3 (google-tunix): text models with `model_type: gemma3_text`.

Of six layers five see only a window of positions, and turn heads by another rotary base than the sixth. All have the
same shapes, so that stacked they are one subtree, however many there are: window, rotary base and scale are numbers
that the scan takes along, and a layer without a window has one that is wider than any text.

What attention and MLP write is normed before it is added to the residual stream: `attn_out` and `mlp_out` are what is
added, `attn_proj` and `mlp_proj` what is normed. `q` and `k` are the projections, before their norms. Norms multiply by
1 + w; `ln1_w` and its like are that gain.

`TAGS` make the sites and change nothing. `MENDS` repair the window, which upstream measures from the first query when
there are more than one, wherever in the cache they lie, and how JAX is asked for the mesh in force.

>>> GROUP
('local', 'local', 'local', 'local', 'local', 'global')

Sharp edges: images, soft-caps, which are Gemma 2's, and norms with an epsilon other than 1e-6 are refused.

Source: tunix.models.gemma3.model; transformers' torch Gemma 3 for the configuration and what is mended.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import ModelConfig, Upstream
from interp_jax.patches import transformers_flax, transformers_stacked, tunix_nnx
from interp_jax.patches.ordered_axes import sow_in_order
from interp_jax.transforms.patcher import Patcher, PatchSet

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint
    from interp_jax.models.weights.layout import Placement, Stored

MODULE = "tunix.models.gemma3.model"

GROUP = ("local",) * 5 + ("global",)

# Without these there is no saying what the model is.
REQUIRED_KEYS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "max_position_embeddings",
    }
)
HANDLED_KEYS = REQUIRED_KEYS | frozenset(
    {
        "hidden_activation",
        "rms_norm_eps",
        "rope_theta",
        "rope_local_base_freq",
        "rope_scaling",
        "query_pre_attn_scalar",
        "layer_types",
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "attention_bias",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "tie_word_embeddings",
        "use_bidirectional_attention",
    }
)
# Dropout is for training, the implementation of the cache for speed.
IGNORABLE_KEYS = frozenset({"attention_dropout", "cache_implementation"})


def in_window(attn_mask: Any, cache: Any, n_queries: int, window: int) -> Any:
    """The mask without keys that are too far back.

    Args:
        attn_mask: Where queries may look, `[batch, query, key]`.
        cache: The layer's cache, which knows the column of the first query; None if that is the first column.
        n_queries: How many queries there are.
        window: How many positions a query sees, its own included.

    Returns:
        `[batch, query, key]`.
    """
    start = 0 if cache is None else cache["end_index"][0]
    ago = start + jnp.arange(n_queries)[:, None] - jnp.arange(attn_mask.shape[-1])[None, :]
    return attn_mask & (ago < window)[None]


TAGS = Patcher(
    MODULE,
    {
        "Gemma3.__call__": [
            ("self.embedder.encode(last_tokens)", 'sow(self.embedder.encode(last_tokens), name="embed")'),
            ("self.final_norm(x)", 'sow(self.final_norm(x), name="ln_final")'),
            ("return logits, new_cache", 'return sow(logits, name="logits"), new_cache'),
        ],
        "Block.__call__": [
            (
                "inputs_normalized = self.pre_attention_norm(x)",
                """
                x = sow(x, name="resid_pre")
                inputs_normalized = sow(self.pre_attention_norm(x), name="ln1")
                """,
            ),
            (
                "self.post_attention_norm(attn_output)",
                'sow(self.post_attention_norm(sow(attn_output, name="attn_proj")), name="attn_out")',
            ),
            (
                "attn_output += x",
                """
                attn_output += x
                attn_output = sow(attn_output, name="resid_mid")
                """,
            ),
            ("self.pre_ffw_norm(attn_output)", 'sow(self.pre_ffw_norm(attn_output), name="ln2")'),
            (
                "self.post_ffw_norm(outputs)",
                'sow(self.post_ffw_norm(sow(outputs, name="mlp_proj")), name="mlp_out")',
            ),
            ("return cache, outputs", 'return cache, sow(outputs, name="resid_post")'),
        ],
        "Attention.block": [
            (
                "query_proj = self._query_norm(query_proj)",
                """
                query_proj, key_proj = sow(query_proj, name="q"), sow(key_proj, name="k")
                value_proj = sow(value_proj, name="v")
                query_proj = self._query_norm(query_proj)
                """,
            ),
            (
                "query_scaled = query_proj * self.query_pre_attn_scalar",
                """
                query_proj = sow(query_proj, name="rot_q")
                query_scaled = query_proj * self.query_pre_attn_scalar
                """,
            ),
            (
                """
                if cache is not None:
                    end_index = cache['end_index'][0]
                    $$update
                """,
                """
                key_proj = sow(key_proj, name="rot_k")
                if cache is not None:
                    end_index = cache['end_index'][0]
                    $$update
                """,
            ),
            (
                "jax.nn.softmax(padded_logits, axis=-1).astype(key_proj.dtype)",
                """
                sow_in_order(
                    jax.nn.softmax(
                        sow_in_order(padded_logits, (0, 2, 1, 3), name="attn_scores"), axis=-1
                    ).astype(key_proj.dtype),
                    (0, 2, 1, 3),
                    name="pattern",
                )
                """,
            ),
            ("self.attn_vec_einsum(encoded)", 'self.attn_vec_einsum(sow(encoded, name="z"))'),
        ],
        "FeedForward.__call__": [
            ("self.gate_proj(x)", 'sow(self.gate_proj(x), name="mlp_gate")'),
            ("self.up_proj(x)", 'sow(self.up_proj(x), name="mlp_pre")'),
            ("gate_value * ff1", 'sow(gate_value * ff1, name="mlp_post")'),
        ],
    },
    names={"sow_in_order": sow_in_order},
)

# One of these two goes with TAGS.
LAYER_LOOP = Patcher(MODULE, {"Gemma3.__call__": [tunix_nnx.LAYER_LOOP]})
# In a scan `scale_factor` is traced, and cannot be compared; `from_checkpoint` has done so.
LAYER_SCAN = Patcher(
    MODULE,
    {
        "Gemma3.__call__": [tunix_nnx.LAYER_SCAN_SCOPED],
        "apply_rope": [
            (
                """
                if scale_factor < 1.0:
                    $$refuse
                sinusoid_inp /= scale_factor
                """,
                "sinusoid_inp /= scale_factor",
            ),
        ],
    },
    names={"scan_module": tunix_nnx.scan_module},
)

MENDS = Patcher(
    MODULE,
    {
        "shard": [tunix_nnx.MESH],
        "Attention.block": [
            (
                """
                if segment_pos.shape[1] == 1:
                    $$decoding
                else:
                    $$prefill
                attn_mask = sliding_mask * attn_mask
                """,
                "attn_mask = in_window(attn_mask, cache, seq_len, self.sliding_window_size)",
            ),
        ],
    },
    names={"in_window": in_window},
)

# What the patches were written against: Tunix 0.1.5.
DIGESTS = {
    "shard": "aaa8a73e9e9c65404aaeb0ec675ca905a92de14b212ac3c79c1704cab1c3bbc7",
    "Attention.block": "22d9df546137bc0f1540a087c031658d5268345d959b09a02fb871baae1232e0",
    "Gemma3.__call__": "3b6d35ea44e43527c62aee404e09fd177169a8c02de91aa10fc98eed56225494",
    "Block.__call__": "c018feb0222573261115fbff6c142d5042e2c031b598981519e2f6e77d7a9da9",
    "FeedForward.__call__": "59e2a51b53a971ea65fd466a96583486d7047196e652b57a2ab2bd87c41d0e77",
}

PATCH_SET = PatchSet(
    "tunix_gemma3",
    tags=(TAGS, LAYER_LOOP),
    mends=(MENDS,),
    versions=tunix_nnx.VERSIONS,
    upstream={f"{MODULE}:{member}": digest for member, digest in DIGESTS.items()},
)
STACKED_PATCH_SET = dataclasses.replace(
    PATCH_SET,
    name="tunix_gemma3 (stacked)",
    tags=(TAGS,),
    mends=(MENDS, LAYER_SCAN),
    upstream={
        **PATCH_SET.upstream,
        f"{MODULE}:apply_rope": "0bfd3068010ab9e49b5482f80280b2e40e9243ade60771b5368d5b0ceaa3c3f1",
    },
)


def from_checkpoint(
    checkpoint: Checkpoint, *, dtype: Any = "float32", stacked: bool = False, sharding: Placement | None = None
) -> LanguageModel:
    """A `LanguageModel` from the files of a Gemma 3.

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
    kinds = [_KIND[GROUP[i % len(GROUP)]] for i in range(given.get("num_hidden_layers", 0))]
    d_head, n_heads = given.get("head_dim", 0), max(given.get("num_attention_heads", 1), 1)
    factor = given.get("rope_scaling", {}).get("factor", 1.0)
    # What upstream takes.
    least_factor = factor if isinstance(factor, (int, float)) and factor >= 1.0 else 1.0
    transformers_flax.check_values(
        checkpoint,
        required=REQUIRED_KEYS,
        allowed={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "rms_norm_eps": (1e-6,),
            "layer_types": (kinds,),
            "sliding_window_pattern": (len(GROUP),),
            "_sliding_window_pattern": (len(GROUP),),
            "query_pre_attn_scalar": (d_head, given.get("hidden_size", 0) // n_heads),
            "rope_scaling": ({"rope_type": "default"}, {"rope_type": "linear", "factor": least_factor}),
            "attention_bias": (False,),
            "attn_logit_softcapping": (),
            "final_logit_softcapping": (),
            "tie_word_embeddings": (True,),
            "use_bidirectional_attention": (False,),
        },
        divides=[("num_key_value_heads", "num_attention_heads")],
        upstream="Tunix's Gemma 3",
    )
    window = given["sliding_window"]
    config = ModelConfig(
        family="gemma3",
        n_layers=given["num_hidden_layers"],
        d_model=given["hidden_size"],
        n_heads=n_heads,
        n_kv_heads=given["num_key_value_heads"],
        d_head=d_head,
        d_mlp=given["intermediate_size"],
        d_vocab=given["vocab_size"],
        n_ctx=given["max_position_embeddings"],
        activation="gelu_pytorch_tanh",
        is_gated=True,
        is_tied=True,
        norm="rmsnorm",
        norm_eps=1e-6,
        rope_theta=given.get("rope_theta", 1e6),
        dtype=tunix_nnx.dtype_name(dtype),
        window=tuple(window if kind == _KIND["local"] else None for kind in kinds),
    )
    scale = given.get("query_pre_attn_scalar", d_head)
    upstream = _build(config, scale, given.get("rope_local_base_freq", 1e4), factor, stacked)
    return tunix_nnx.read(checkpoint, upstream, config, sharding=sharding)


_KIND = {"local": "sliding_attention", "global": "full_attention"}


# One Upstream per configuration, so that a model loaded twice compiles once.
@functools.lru_cache(maxsize=16)
def _build(config: ModelConfig, query_scalar: float, local_base: float, factor: float, stacked: bool) -> Upstream:
    return tunix_nnx.upstream_of(
        family_of(query_scalar, local_base, factor),
        config,
        STACKED_PATCH_SET if stacked else PATCH_SET,
        stacked=stacked,
        restacked=lambda: _build(config, query_scalar, local_base, factor, not stacked),
    )


def family_of(query_scalar: float, local_base: float, factor: float) -> tunix_nnx.Family:
    """What is special to Gemma 3, and to one of its models what our configuration has no word for.

    Args:
        query_scalar: Scores are divided by its root.
        local_base: The rotary base of layers with a window.
        factor: What positions are divided by in layers without one.

    Returns:
        The family.
    """

    def make_config(upstream: Any, config: ModelConfig, n_layers: int) -> Any:
        scalings = upstream.QueryPreAttentionNormalisation
        by_head = query_scalar == config.d_head
        by_width = scalings.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
        return upstream.ModelConfig(
            num_layers=n_layers,
            num_embed=config.d_vocab,
            embed_dim=config.d_model,
            hidden_dim=config.d_mlp,
            num_heads=config.n_heads,
            head_dim=config.d_head,
            num_kv_heads=config.n_kv_heads,
            sliding_window_size=config.window_of(0),
            local_base_frequency=local_base,
            global_base_frequency=config.rope_theta,
            global_scale_factor=factor,
            query_pre_attn_norm=scalings.BY_ONE_OVER_SQRT_HEAD_DIM if by_head else by_width,
            param_dtype=jnp.dtype(config.dtype),
        )

    def differences(config: ModelConfig) -> dict[str, Any]:
        without_window = (jnp.iinfo(jnp.int32).max, config.rope_theta, factor)
        windows = [config.window_of(i) for i in range(config.n_layers)]
        layers = [without_window if window is None else (window, local_base, 1.0) for window in windows]
        sizes, bases, factors = zip(*layers, strict=True)
        return {
            "sliding_window_size": jnp.int32(sizes),
            "rope_base_frequency": jnp.float32(bases),
            "rope_scale_factor": jnp.float32(factors),
        }

    return tunix_nnx.Family(
        name="tunix_gemma3",
        module=MODULE,
        class_name="Gemma3",
        make_config=make_config,
        norm="scale",
        ties=True,
        weights=layer_weights,
        tensors=tensors,
        gain=_gain,
        differences=differences,
    )


def tensors(config: ModelConfig, layers: transformers_stacked.Layers) -> dict[str, Any]:
    """Tunix's parameters, as tensors in the layout of torch's `Linear`, `[out, in]`.

    Args:
        config: The model's shape.
        layers: Where the layers lie.

    Returns:
        The parameters in Tunix's form, those of the layers as `layers` has them.
    """
    d_model, d_mlp, d_head = config.d_model, config.d_mlp, config.d_head
    names = transformers_stacked.Names(layers)

    def norm(name: str, size: int = d_model) -> dict[str, Stored]:
        return {"scale": names.array(f"{name}.weight", size)}

    def kernel(name: str, d_out: int, d_in: int) -> dict[str, Stored]:
        return {"kernel": names.array(f"{name}.weight", d_out, d_in, turned=True)}

    def heads(name: str, n_heads: int, *parts: str) -> dict[str, Stored]:
        view: Callable[[Any], Any] = lambda tensor: tensor.reshape(n_heads, d_head, d_model).transpose(0, 2, 1)  # noqa: E731
        stored = names.array(f"{name}.weight", n_heads * d_head, d_model, view=view)
        return {"w": dataclasses.replace(stored, parts=parts or None)}

    def attention(at: str) -> dict[str, Any]:
        n_heads, n_kv_heads = config.n_heads, config.n_kv_heads
        if n_heads == n_kv_heads:
            projections = {"qkv_einsum": heads(f"{at}.{{part}}_proj", n_heads, "q", "k", "v")}
        else:
            projections = {
                "q_einsum": heads(f"{at}.q_proj", n_heads),
                "kv_einsum": heads(f"{at}.{{part}}_proj", n_kv_heads, "k", "v"),
            }
        out = names.array(
            f"{at}.o_proj.weight",
            d_model,
            n_heads * d_head,
            view=lambda tensor: tensor.reshape(d_model, n_heads, d_head).transpose(1, 2, 0),
        )
        return {
            **projections,
            "attn_vec_einsum": {"w": out},
            "_query_norm": norm(f"{at}.q_norm", d_head),
            "_key_norm": norm(f"{at}.k_norm", d_head),
        }

    def layer(at: str) -> dict[str, Any]:
        return {
            "pre_attention_norm": norm(f"{at}.input_layernorm"),
            "attn": attention(f"{at}.self_attn"),
            "post_attention_norm": norm(f"{at}.post_attention_layernorm"),
            "pre_ffw_norm": norm(f"{at}.pre_feedforward_layernorm"),
            "mlp": {
                "gate_proj": kernel(f"{at}.mlp.gate_proj", d_mlp, d_model),
                "up_proj": kernel(f"{at}.mlp.up_proj", d_mlp, d_model),
                "down_proj": kernel(f"{at}.mlp.down_proj", d_model, d_mlp),
            },
            "post_ffw_norm": norm(f"{at}.post_feedforward_layernorm"),
        }

    return {
        "embedder": {"input_embedding": names.array("model.embed_tokens.weight", config.d_vocab, d_model)},
        "layers": names.layers(layer, "model.layers.{}"),
        "final_norm": norm("model.norm"),
    }


def _gain(scale: Any) -> Any:
    return 1 + scale


def layer_weights(config: ModelConfig) -> dict[str, Any]:
    """One layer's weights under canonical names, for a model of this `config`."""
    is_fused = config.n_heads == config.n_kv_heads

    def heads(which: int) -> Callable[[Any], Any]:
        if is_fused:
            return lambda layer: layer["attn"]["qkv_einsum"]["w"][which]
        if which == 0:
            return lambda layer: layer["attn"]["q_einsum"]["w"]
        return lambda layer: layer["attn"]["kv_einsum"]["w"][which - 1]

    def gain(name: str) -> Callable[[Any], Any]:
        return lambda layer: _gain(layer[name]["scale"])

    return {
        "ln1_w": gain("pre_attention_norm"),
        "W_Q": heads(0),
        "W_K": heads(1),
        "W_V": heads(2),
        "W_O": lambda layer: layer["attn"]["attn_vec_einsum"]["w"],
        "ln2_w": gain("pre_ffw_norm"),
        "W_gate": lambda layer: layer["mlp"]["gate_proj"]["kernel"],
        "W_in": lambda layer: layer["mlp"]["up_proj"]["kernel"],
        "W_out": lambda layer: layer["mlp"]["down_proj"]["kernel"],
    }
