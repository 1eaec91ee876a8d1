"""Patch set for transformers' Flax GPT-2 (4.x): GPT-2 of all sizes, DistilGPT-2 and their kin.

`TAGS` make the sites and change nothing: with them alone the program lowers to the same StableHLO as without.
`MENDS` keep each layer from building, and holding as a constant, a causal mask of n_ctx x n_ctx: only the block in
use is built. The numbers are the same.

>>> sorted(REQUIRED_KEYS)
['n_embd', 'n_head', 'n_layer', 'n_positions', 'vocab_size']

Sharp edges: upstream ignores `scale_attn_weights`, `scale_attn_by_inverse_layer_idx` and `reorder_and_upcast_attn`;
values other than GPT-2's own are refused. Its layer norm takes the variance as E[x^2] - E[x]^2.

Source: transformers.models.gpt2.modeling_flax_gpt2.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

import jax

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import ModelConfig, Upstream
from interp_jax.patches import flax_attention, transformers_flax, transformers_stacked
from interp_jax.transforms.patcher import Patcher, PatchSet

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint
    from interp_jax.models.weights.layout import Placement, Stored

MODULE = "transformers.models.gpt2.modeling_flax_gpt2"

# Without these there is no saying what the model is.
REQUIRED_KEYS = frozenset({"vocab_size", "n_positions", "n_embd", "n_layer", "n_head"})
HANDLED_KEYS = REQUIRED_KEYS | frozenset(
    {
        "n_inner",
        "activation_function",
        "layer_norm_epsilon",
        "tie_word_embeddings",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "add_cross_attention",
    }
)
# Dropout is for training, the summary for classification; n_ctx repeats n_positions. GPT-2 Medium's file has two keys
# of the first GPT.
IGNORABLE_KEYS = frozenset(
    {
        "n_ctx",
        "n_special",
        "predict_special_tokens",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "gradient_checkpointing",
    }
)

TAGS = Patcher(
    MODULE,
    {
        "FlaxGPT2Module.__call__": [
            ('self.wte(input_ids.astype("i4"))', 'sow(self.wte(input_ids.astype("i4")), name="embed")'),
            ('self.wpe(position_ids.astype("i4"))', 'sow(self.wpe(position_ids.astype("i4")), name="pos_embed")'),
            ("self.ln_f(hidden_states)", 'sow(self.ln_f(hidden_states), name="ln_final")'),
        ],
        "FlaxGPT2Block.__call__": [
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
            ("attn_output = attn_outputs[0]", 'attn_output = sow(attn_outputs[0], name="attn_out")'),
            ("attn_output + residual", 'sow(attn_output + residual, name="resid_mid")'),
            ("self.ln_2(hidden_states)", 'sow(self.ln_2(hidden_states), name="ln2")'),
            (
                "self.mlp(hidden_states, deterministic=deterministic)",
                'sow(self.mlp(hidden_states, deterministic=deterministic), name="mlp_out")',
            ),
            ("residual + feed_forward_hidden_states", 'sow(residual + feed_forward_hidden_states, name="resid_post")'),
        ],
        "FlaxGPT2Attention.__call__": [
            ("self._split_heads(query)", 'sow(self._split_heads(query), name="q")'),
            ("self._split_heads(key)", 'sow(self._split_heads(key), name="k")'),
            ("self._split_heads(value)", 'sow(self._split_heads(value), name="v")'),
            (
                'jnp.einsum("...hqk,...khd->...qhd", attn_weights, value)',
                'sow(jnp.einsum("...hqk,...khd->...qhd", attn_weights, value), name="z")',
            ),
        ],
        "FlaxGPT2MLP.__call__": [
            ("self.c_fc(hidden_states)", 'sow(self.c_fc(hidden_states), name="mlp_pre")'),
            ("self.act(hidden_states)", 'sow(self.act(hidden_states), name="mlp_post")'),
        ],
        "FlaxGPT2LMHeadModule.__call__": [
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

# One of these two goes with TAGS.
LAYER_LOOP = Patcher(MODULE, {"FlaxGPT2BlockCollection.__call__": [transformers_stacked.LAYER_LOOP]})
LAYER_SCAN = Patcher(
    MODULE,
    {"FlaxGPT2BlockCollection.__call__": [transformers_stacked.LAYER_SCAN]},
    names={"scan_blocks": transformers_stacked.scan_blocks},
)

MENDS = Patcher(
    MODULE,
    {
        "FlaxGPT2Attention.setup": [transformers_flax.NO_MASK_IN_SETUP],
        "FlaxGPT2Attention.__call__": list(transformers_flax.MASK_BLOCK_IN_CALL),
    },
)

# What the patches were written against: transformers 4.57.6.
DIGESTS = {
    "FlaxGPT2Attention.setup": "2545ec8ed696f905daafbd7abb9bd18edfa8a7e17e014156c9a80c97e528db55",
    "FlaxGPT2Attention.__call__": "c96bb3ac9ffc44c8b2717219969d0164818a8db077fd402e82f02b999853e2f3",
    "FlaxGPT2Module.__call__": "92a4325ae4a241f715901bd789c8e9341d742ab655236ef1129afb93bc50ad85",
    "FlaxGPT2BlockCollection.__call__": "04044132d77a48b3d0956da1c77870725e75bef14f699294fc790934656a380c",
    "FlaxGPT2Block.__call__": "36a2c560111221ded9768c46f011131056f4a9de1b3875d08114002d4cda95da",
    "FlaxGPT2MLP.__call__": "ebacff0d05869fd1da7687b411ed1013abc4783c8e748b7f6b81e8d57ba60210",
    "FlaxGPT2LMHeadModule.__call__": "7082e2fb684b2e3a0886f5a4d76458de2bda1055f4f75f4793902d84c4026be9",
}

PATCH_SET = PatchSet(
    "transformers_gpt2",
    tags=(TAGS, LAYER_LOOP, flax_attention.TAGS),
    mends=(MENDS,),
    versions={"transformers": ">=4.45,<5", "flax": ">=0.12"},
    upstream={**{f"{MODULE}:{member}": digest for member, digest in DIGESTS.items()}, **flax_attention.DIGESTS},
)
STACKED_PATCH_SET = dataclasses.replace(
    PATCH_SET, name="transformers_gpt2 (stacked)", tags=(TAGS, flax_attention.TAGS), mends=(MENDS, LAYER_SCAN)
)


def from_checkpoint(
    checkpoint: Checkpoint, *, dtype: Any = "float32", stacked: bool = False, sharding: Placement | None = None
) -> LanguageModel:
    """A `LanguageModel` from the files of a GPT-2.

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
    transformers_flax.check_values(
        checkpoint,
        required=REQUIRED_KEYS,
        allowed={
            "activation_function": transformers_flax.activations(),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
        },
        divides=[("n_head", "n_embd")],
    )
    settings = {key: checkpoint.config[key] for key in HANDLED_KEYS if checkpoint.config.get(key) is not None}
    upstream, config = _build(json.dumps(settings, sort_keys=True), transformers_flax.dtype_name(dtype), stacked)
    # Old files hold each layer's mask as a tensor.
    masks = ("*.attn.bias", "*.attn.masked_bias")
    return transformers_flax.read(checkpoint, upstream, config, buffers=masks, prefix="transformer.", sharding=sharding)


# One Upstream per configuration, so that a model loaded twice compiles once.
@functools.lru_cache(maxsize=16)
def _build(settings: str, dtype: str, stacked: bool) -> tuple[Upstream, ModelConfig]:
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config
    from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2LMHeadModule

    hf = GPT2Config(**json.loads(settings))
    module = FlaxGPT2LMHeadModule(hf, dtype=getattr(jax.numpy, dtype))
    config = ModelConfig(
        family="gpt2",
        n_layers=hf.n_layer,
        d_model=hf.n_embd,
        n_heads=hf.n_head,
        n_kv_heads=hf.n_head,
        d_head=hf.n_embd // hf.n_head,
        d_mlp=hf.n_inner if hf.n_inner is not None else 4 * hf.n_embd,
        d_vocab=hf.vocab_size,
        n_ctx=hf.n_positions,
        activation=hf.activation_function,
        is_gated=False,
        is_tied=hf.tie_word_embeddings,
        norm="layernorm",
        norm_eps=hf.layer_norm_epsilon,
        rope_theta=None,
        dtype=dtype,
    )

    layers = _layers(config, stacked)
    patch_set = STACKED_PATCH_SET if stacked else PATCH_SET

    def empty_cache(batch: int, length: int) -> Any:
        def layer() -> Any:
            return {"attn": transformers_flax.empty_layer_cache(batch, length, config.n_heads, config.d_head, dtype)}

        return layers.cache(layer)

    functions = transformers_flax.pure_functions(
        module,
        name="gpt2",
        tags=patch_set.tags,
        mends=patch_set.mends,
        ln_final=lambda bound, residual: bound.transformer.ln_f(residual),
        unembed=transformers_flax.unembedding_of(
            config, lambda bound: bound.transformer.variables["params"]["wte"]["embedding"]
        ),
        empty_cache=empty_cache,
    )
    upstream = Upstream(
        name="transformers_gpt2",
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
    return transformers_stacked.Layers(("transformer", "h"), config.n_layers, stacked)


def _layout(config: ModelConfig, stacked: bool) -> dict[str, Any]:
    """Upstream's parameters, as tensors in the layout of torch's `Conv1D`, `[in, out]`, which Flax turns round."""
    d_model, d_mlp = config.d_model, config.d_mlp
    names = transformers_stacked.Names(_layers(config, stacked))

    def norm(name: str) -> dict[str, Stored]:
        return {"scale": names.array(f"{name}.weight", d_model), "bias": names.array(f"{name}.bias", d_model)}

    def conv(name: str, d_in: int, d_out: int) -> dict[str, Stored]:
        kernel = names.array(f"{name}.weight", d_in, d_out, turned=True)
        return {"kernel": kernel, "bias": names.array(f"{name}.bias", d_out)}

    def layer(at: str) -> dict[str, Any]:
        return {
            "ln_1": norm(f"{at}.ln_1"),
            "attn": {
                "c_attn": conv(f"{at}.attn.c_attn", d_model, 3 * d_model),
                "c_proj": conv(f"{at}.attn.c_proj", d_model, d_model),
            },
            "ln_2": norm(f"{at}.ln_2"),
            "mlp": {
                "c_fc": conv(f"{at}.mlp.c_fc", d_model, d_mlp),
                "c_proj": conv(f"{at}.mlp.c_proj", d_mlp, d_model),
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
        params["lm_head"] = {"kernel": names.array("lm_head.weight", config.d_vocab, d_model, turned=True)}
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
    """One layer's weights under canonical names. Upstream holds kernels as `[out, in]`, and q, k, v as one."""
    d_model, d_head = config.d_model, config.d_head

    def heads(part: int) -> Any:
        rows = slice(part * d_model, (part + 1) * d_model)
        return lambda layer: layer["attn"]["c_attn"]["kernel"][rows].reshape(-1, d_head, d_model).transpose(0, 2, 1)

    def head_biases(part: int) -> Any:
        rows = slice(part * d_model, (part + 1) * d_model)
        return lambda layer: layer["attn"]["c_attn"]["bias"][rows].reshape(-1, d_head)

    return {
        "ln1_w": lambda layer: layer["ln_1"]["scale"],
        "ln1_b": lambda layer: layer["ln_1"]["bias"],
        "W_Q": heads(0),
        "W_K": heads(1),
        "W_V": heads(2),
        "W_O": lambda layer: layer["attn"]["c_proj"]["kernel"].T.reshape(-1, d_head, d_model),
        "b_Q": head_biases(0),
        "b_K": head_biases(1),
        "b_V": head_biases(2),
        "b_O": lambda layer: layer["attn"]["c_proj"]["bias"],
        "ln2_w": lambda layer: layer["ln_2"]["scale"],
        "ln2_b": lambda layer: layer["ln_2"]["bias"],
        "W_in": lambda layer: layer["mlp"]["c_fc"]["kernel"].T,
        "b_in": lambda layer: layer["mlp"]["c_fc"]["bias"],
        "W_out": lambda layer: layer["mlp"]["c_proj"]["kernel"].T,
        "b_out": lambda layer: layer["mlp"]["c_proj"]["bias"],
    }
