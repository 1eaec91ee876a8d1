"""Patch set for transformers' Flax GPT-Neo (4.x): GPT-Neo 125M to 2.7B, TinyStories and their kin.

Every other layer looks only at the last `window_size` positions. Stacked, the layers are scanned in groups of as many
as it takes for global and local attention to come round again: the weights of the first of each group are one subtree,
those of the second another.

`TAGS` make the sites and change nothing. `MENDS` keep each layer from building, and holding as a constant, a mask of
n_ctx x n_ctx: only the block in use is built. The numbers are the same.

>>> kinds_of({"attention_types": [[["global", "local"], 2]]})
('global', 'local', 'global', 'local')

Sharp edges: GPT-Neo was trained without the division of scores by sqrt(d_head). Upstream multiplies the query by
sqrt(d_head) to undo it; the site `q` is after that, so W_Q has the factor in it, and scores are q k / sqrt(d_head) as
in every family. There are no biases in q, k and v.

Source: transformers.models.gpt_neo.modeling_flax_gpt_neo.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from interp_jax.core.errors import UnsupportedModelError, four_part
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import ModelConfig, Upstream
from interp_jax.patches import flax_attention, transformers_flax, transformers_stacked
from interp_jax.patches.transformers_mistral import causal_block
from interp_jax.transforms.patcher import Patcher, PatchSet

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint
    from interp_jax.models.weights.layout import Placement, Stored

MODULE = "transformers.models.gpt_neo.modeling_flax_gpt_neo"

# Without these there is no saying what the model is.
REQUIRED_KEYS = frozenset(
    {"vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_heads", "window_size"}
)
HANDLED_KEYS = REQUIRED_KEYS | frozenset(
    {
        "intermediate_size",
        "activation_function",
        "layer_norm_epsilon",
        "tie_word_embeddings",
        "attention_types",
        "attention_layers",
    }
)
# Dropout is for training, the summary and the classifier for other tasks.
IGNORABLE_KEYS = frozenset(
    {
        "resid_dropout",
        "embed_dropout",
        "attention_dropout",
        "classifier_dropout",
        "gradient_checkpointing",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
    }
)
KINDS = ("global", "local")

TAGS = Patcher(
    MODULE,
    {
        "FlaxGPTNeoModule.__call__": [
            ('self.wte(input_ids.astype("i4"))', 'sow(self.wte(input_ids.astype("i4")), name="embed")'),
            ('self.wpe(position_ids.astype("i4"))', 'sow(self.wpe(position_ids.astype("i4")), name="pos_embed")'),
            # Upstream norms twice over and uses the second result.
            (
                """
                hidden_states = self.ln_f(hidden_states)
                if output_hidden_states:
                    $$with_states
                else:
                    $$without
                """,
                """
                hidden_states = sow(self.ln_f(hidden_states), name="ln_final")
                if output_hidden_states:
                    $$with_states
                else:
                    $$without
                """,
            ),
        ],
        "FlaxGPTNeoBlock.__call__": [
            (
                """
                residual = hidden_states
                hidden_states = self.ln_1(hidden_states)
                """,
                """
                residual = hidden_states = sow(hidden_states, name="resid_pre")
                hidden_states = sow(self.ln_1(hidden_states), name="ln1")
                """,
            ),
            ("attn_output = outputs[0]", 'attn_output = sow(outputs[0], name="attn_out")'),
            ("attn_output + residual", 'sow(attn_output + residual, name="resid_mid")'),
            ("self.ln_2(hidden_states)", 'sow(self.ln_2(hidden_states), name="ln2")'),
            (
                "self.mlp(hidden_states, deterministic=deterministic)",
                'sow(self.mlp(hidden_states, deterministic=deterministic), name="mlp_out")',
            ),
            ("residual + feed_forward_hidden_states", 'sow(residual + feed_forward_hidden_states, name="resid_post")'),
        ],
        "FlaxGPTNeoSelfAttention.__call__": [
            ("self._split_heads(query)", 'sow(self._split_heads(query), name="q")'),
            ("self._split_heads(key)", 'sow(self._split_heads(key), name="k")'),
            ("self._split_heads(value)", 'sow(self._split_heads(value), name="v")'),
            (
                'jnp.einsum("...hqk,...khd->...qhd", attn_weights, value)',
                'sow(jnp.einsum("...hqk,...khd->...qhd", attn_weights, value), name="z")',
            ),
        ],
        "FlaxGPTNeoMLP.__call__": [
            ("self.c_fc(hidden_states)", 'sow(self.c_fc(hidden_states), name="mlp_pre")'),
            ("self.act(hidden_states)", 'sow(self.act(hidden_states), name="mlp_post")'),
        ],
        "FlaxGPTNeoForCausalLMModule.__call__": [
            (
                """
                if not return_dict:
                    return (lm_logits,) + outputs[1:]
                """,
                """
                lm_logits = sow(lm_logits, name="logits")
                if not return_dict:
                    return (lm_logits,) + outputs[1:]
                """,
            ),
        ],
    },
)


def _scan_blocks(collection: Any, *args: Any, **options: Any) -> Any:
    """`scan_blocks` in groups of global and local layers."""
    kinds = collection.config.attention_layers
    return transformers_stacked.scan_blocks(collection, *args, kinds=kinds, **options)


# One of these two goes with TAGS.
LAYER_LOOP = Patcher(MODULE, {"FlaxGPTNeoBlockCollection.__call__": [transformers_stacked.LAYER_LOOP]})
LAYER_SCAN = Patcher(
    MODULE,
    {"FlaxGPTNeoBlockCollection.__call__": [transformers_stacked.LAYER_SCAN]},
    names={"scan_blocks": _scan_blocks},
)

MENDS = Patcher(
    MODULE,
    {
        "FlaxGPTNeoSelfAttention.setup": [
            (
                """
                self.causal_mask = make_causal_mask(
                    jnp.ones((1, config.max_position_embeddings), dtype="bool"), dtype="bool"
                )
                if self.attention_type == "local":
                    self.causal_mask = self.causal_mask ^ jnp.tril(self.causal_mask, -config.window_size)
                """,
                'self.window = config.window_size if self.attention_type == "local" else None',
            ),
        ],
        "FlaxGPTNeoSelfAttention.__call__": [
            (
                "lax.dynamic_slice(self.causal_mask, (0, 0, mask_shift, 0), (1, 1, query_length, max_decoder_length))",
                "causal_block(mask_shift, query_length, max_decoder_length, self.window)",
            ),
            (
                "self.causal_mask[:, :, :query_length, :key_length]",
                "causal_block(0, query_length, key_length, self.window)",
            ),
        ],
    },
    names={"causal_block": causal_block},
)

# What the patches were written against: transformers 4.57.6.
DIGESTS = {
    "FlaxGPTNeoSelfAttention.setup": "97cafbe806a0823653d22d3a3de05d9277f1dea00b87fc3e5ea48d71a377ac89",
    "FlaxGPTNeoSelfAttention.__call__": "c5c581730d3d606d8aca1598eccb01a365df81daa4afe4f372ab26a03e4f1b49",
    "FlaxGPTNeoModule.__call__": "454013b0367ee1e5b20a55db8d18c9270e01e7c1e3703434ff5bcf33d06a9e59",
    "FlaxGPTNeoBlock.__call__": "571e35b61caeb65c9a0cc66831130b7edf386ec33ac5f91202a90083ffdfb3f4",
    "FlaxGPTNeoMLP.__call__": "ebacff0d05869fd1da7687b411ed1013abc4783c8e748b7f6b81e8d57ba60210",
    "FlaxGPTNeoForCausalLMModule.__call__": "6ee8b200bd2c9eed1864a431f06c14aaf3b2c99d2304c83a3964283c046273d4",
    "FlaxGPTNeoBlockCollection.__call__": "b8ef35d7608750e43e685a8aadadb0d4507180271b64db9087478b9f824d8f8a",
}

PATCH_SET = PatchSet(
    "transformers_gpt_neo",
    tags=(TAGS, LAYER_LOOP, flax_attention.TAGS),
    mends=(MENDS,),
    versions={"transformers": ">=4.45,<5", "flax": ">=0.12"},
    upstream={**{f"{MODULE}:{member}": digest for member, digest in DIGESTS.items()}, **flax_attention.DIGESTS},
)
STACKED_PATCH_SET = dataclasses.replace(
    PATCH_SET, name="transformers_gpt_neo (stacked)", tags=(TAGS, flax_attention.TAGS), mends=(MENDS, LAYER_SCAN)
)


def kinds_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The kind of attention of each layer, which a configuration states in two ways.

    Args:
        config: Its keys: `attention_types`, pairs of kinds and how often they are repeated; or `attention_layers`.

    Returns:
        "global" or "local" for each layer, first to last.
    """
    if config.get("attention_types") is not None:
        return tuple(kind for kinds, n_times in config["attention_types"] for kind in list(kinds) * n_times)
    return tuple(config.get("attention_layers") or ())


def from_checkpoint(
    checkpoint: Checkpoint, *, dtype: Any = "float32", stacked: bool = False, sharding: Placement | None = None
) -> LanguageModel:
    """A `LanguageModel` from the files of a GPT-Neo.

    Args:
        checkpoint: Configuration, weights and tokenizer in the Hugging Face convention.
        dtype: Of parameters and computation: float32, bfloat16 or float16.
        stacked: Whether to hold the layers as one subtree for each of a group and run them as a scan over groups.
        sharding: Where the parameters go; see `interp_jax.models.loading.load`.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: A configuration that upstream's code does not compute, or layers that do not repeat.
        LoadError: Weights that do not fit the configuration.
    """
    checkpoint.check_config(handled=HANDLED_KEYS, ignorable=IGNORABLE_KEYS)
    transformers_flax.check_values(
        checkpoint,
        required=REQUIRED_KEYS,
        allowed={"activation_function": transformers_flax.activations()},
        divides=[("num_heads", "hidden_size")],
    )
    _check_attention(checkpoint)
    settings = {key: checkpoint.config[key] for key in HANDLED_KEYS if checkpoint.config.get(key) is not None}
    settings.pop("attention_layers", None)
    settings["attention_types"] = [[list(kinds_of(checkpoint.config)), 1]]
    upstream, config = _build(json.dumps(settings, sort_keys=True), transformers_flax.dtype_name(dtype), stacked)
    # Old files hold each layer's mask as a tensor.
    masks = ("*.attn.attention.bias", "*.attn.attention.masked_bias")
    return transformers_flax.read(checkpoint, upstream, config, buffers=masks, prefix="transformer.", sharding=sharding)


def _check_attention(checkpoint: Checkpoint) -> None:
    """Refuse a configuration that does not say, or says in two ways, how each layer attends."""
    config = checkpoint.config
    n_layers, listed, wrong = config["num_layers"], config.get("attention_layers"), []
    try:
        kinds = [str(kind) for kind in kinds_of(config)]
        also = kinds if listed is None else [str(kind) for kind in listed]
    except (TypeError, ValueError):
        wrong.append(f"attention_types={config.get('attention_types')!r:.80} and attention_layers={listed!r:.80}")
    else:
        if len(kinds) != n_layers or not set(kinds) <= set(KINDS):
            wrong.append(f"{len(kinds)} kinds of attention ({', '.join(kinds) or 'none'}) for num_layers={n_layers}")
        if also != kinds:
            wrong.append(f"attention_layers ({', '.join(also)}) that contradict attention_types ({', '.join(kinds)})")
    if wrong:
        raise UnsupportedModelError(
            four_part(
                "Configuration with " + "; ".join(wrong),
                where=checkpoint.source,
                expected="'global' or 'local' for each layer, in attention_layers, in attention_types (such as "
                '[[["global", "local"], 6]]) or in both alike.',
                fix="check that config.json is complete and belongs to this model.",
            )
        )


# One Upstream per configuration, so that a model loaded twice compiles once.
@functools.lru_cache(maxsize=16)
def _build(settings: str, dtype: str, stacked: bool) -> tuple[Upstream, ModelConfig]:
    from transformers.models.gpt_neo.configuration_gpt_neo import GPTNeoConfig
    from transformers.models.gpt_neo.modeling_flax_gpt_neo import FlaxGPTNeoForCausalLMModule

    hf = GPTNeoConfig(**json.loads(settings))
    module = FlaxGPTNeoForCausalLMModule(hf, dtype=getattr(jax.numpy, dtype))
    config = ModelConfig(
        family="gpt_neo",
        n_layers=hf.num_layers,
        d_model=hf.hidden_size,
        n_heads=hf.num_heads,
        n_kv_heads=hf.num_heads,
        d_head=hf.hidden_size // hf.num_heads,
        d_mlp=hf.intermediate_size if hf.intermediate_size is not None else 4 * hf.hidden_size,
        d_vocab=hf.vocab_size,
        n_ctx=hf.max_position_embeddings,
        activation=hf.activation_function,
        is_gated=False,
        is_tied=hf.tie_word_embeddings,
        norm="layernorm",
        norm_eps=hf.layer_norm_epsilon,
        rope_theta=None,
        dtype=dtype,
        window=tuple(hf.window_size if kind == "local" else None for kind in hf.attention_layers),
    )
    layers = _layers(config, stacked)
    patch_set = STACKED_PATCH_SET if stacked else PATCH_SET

    def empty_cache(batch: int, length: int) -> Any:
        def layer() -> Any:
            empty = transformers_flax.empty_layer_cache(batch, length, config.n_heads, config.d_head, dtype)
            return {"attn": {"attention": empty}}

        return layers.cache(layer)

    functions = transformers_flax.pure_functions(
        module,
        name="gpt_neo",
        tags=patch_set.tags,
        mends=patch_set.mends,
        ln_final=lambda bound, residual: bound.transformer.ln_f(residual),
        unembed=transformers_flax.unembedding_of(
            config, lambda bound: bound.transformer.variables["params"]["wte"]["embedding"]
        ),
        empty_cache=empty_cache,
    )
    upstream = Upstream(
        name="transformers_gpt_neo",
        patch_set=patch_set,
        weights=_weights(config),
        layer_weights=_layer_weights(config),
        layout=lambda: _layout(config, stacked),
        restacked=lambda: _build(settings, dtype, not stacked)[0],
        **layers.functions(),
        **functions,
    )
    return upstream, config


def _layers(config: ModelConfig, stacked: bool) -> transformers_stacked.Layers:
    kinds = tuple("global" if config.window_of(i) is None else "local" for i in range(config.n_layers))
    return transformers_stacked.Layers(("transformer", "h"), config.n_layers, stacked, kinds)


def _layout(config: ModelConfig, stacked: bool) -> dict[str, Any]:
    """Upstream's parameters, as tensors in the layout of torch's `Linear`, `[out, in]`."""
    d_model, d_mlp = config.d_model, config.d_mlp
    names = transformers_stacked.Names(_layers(config, stacked))

    def norm(name: str) -> dict[str, Stored]:
        return {"scale": names.array(f"{name}.weight", d_model), "bias": names.array(f"{name}.bias", d_model)}

    def dense(name: str, d_out: int, d_in: int, *, bias: bool = True) -> dict[str, Stored]:
        params = {"kernel": names.array(f"{name}.weight", d_out, d_in, turned=True)}
        return params | ({"bias": names.array(f"{name}.bias", d_out)} if bias else {})

    def layer(at: str) -> dict[str, Any]:
        attention = f"{at}.attn.attention"
        return {
            "ln_1": norm(f"{at}.ln_1"),
            "attn": {
                "attention": {
                    "q_proj": dense(f"{attention}.q_proj", d_model, d_model, bias=False),
                    "k_proj": dense(f"{attention}.k_proj", d_model, d_model, bias=False),
                    "v_proj": dense(f"{attention}.v_proj", d_model, d_model, bias=False),
                    "out_proj": dense(f"{attention}.out_proj", d_model, d_model),
                }
            },
            "ln_2": norm(f"{at}.ln_2"),
            "mlp": {
                "c_fc": dense(f"{at}.mlp.c_fc", d_mlp, d_model),
                "c_proj": dense(f"{at}.mlp.c_proj", d_model, d_mlp),
            },
        }

    params: dict[str, Any] = {
        "transformer": {
            "wte": {"embedding": names.array("transformer.wte.weight", config.d_vocab, d_model)},
            "wpe": {"embedding": names.array("transformer.wpe.weight", config.n_ctx, d_model)},
            "h": names.layers(layer, "transformer.h.{}"),
            "ln_f": norm("transformer.ln_f"),
        }
    }
    if not config.is_tied:
        params["lm_head"] = dense("lm_head", config.d_vocab, d_model, bias=False)
    return params


def _weights(config: ModelConfig) -> dict[str, Any]:
    """Weights outside the layers under canonical names."""
    return {
        "W_E": lambda params: params["transformer"]["wte"]["embedding"],
        "W_pos": lambda params: params["transformer"]["wpe"]["embedding"],
        "W_U": lambda params: (
            params["transformer"]["wte"]["embedding"].T if config.is_tied else params["lm_head"]["kernel"]
        ),
        "ln_final_w": lambda params: params["transformer"]["ln_f"]["scale"],
        "ln_final_b": lambda params: params["transformer"]["ln_f"]["bias"],
    }


def _layer_weights(config: ModelConfig) -> dict[str, Any]:
    """One layer's weights under canonical names; heads are a view of the columns of upstream's kernels."""
    d_model, d_head = config.d_model, config.d_head

    def heads(name: str, scale: float | None = None) -> Any:
        def weight(layer: Any) -> Any:
            kernel = layer["attn"]["attention"][name]["kernel"]
            kernel = kernel if scale is None else kernel * scale
            return kernel.reshape(d_model, -1, d_head).transpose(1, 0, 2)

        return weight

    return {
        "ln1_w": lambda layer: layer["ln_1"]["scale"],
        "ln1_b": lambda layer: layer["ln_1"]["bias"],
        "W_Q": heads("q_proj", math.sqrt(d_head)),
        "W_K": heads("k_proj"),
        "W_V": heads("v_proj"),
        "W_O": lambda layer: layer["attn"]["attention"]["out_proj"]["kernel"].reshape(-1, d_head, d_model),
        "b_O": lambda layer: layer["attn"]["attention"]["out_proj"]["bias"],
        "ln2_w": lambda layer: layer["ln_2"]["scale"],
        "ln2_b": lambda layer: layer["ln_2"]["bias"],
        "W_in": lambda layer: layer["mlp"]["c_fc"]["kernel"],
        "b_in": lambda layer: layer["mlp"]["c_fc"]["bias"],
        "W_out": lambda layer: layer["mlp"]["c_proj"]["kernel"],
        "b_out": lambda layer: layer["mlp"]["c_proj"]["bias"],
    }
