"""Patch set for transformers' Flax OPT (4.x): OPT 125M to 66B, all sizes but 350M.

The worked example of docs/adding_a_family.md, which explains it from top to bottom.

`TAGS` make the sites and change nothing. `MASK_MEND` keeps each layer from building, and holding as a constant, a mask
of n_ctx x n_ctx; the numbers are the same. `AXES_MEND` keeps the MLP from flattening batch and positions into one axis,
which its sites would be without; compiled, some sums then round in another order.

>>> sorted(REQUIRED_KEYS)[:3]
['ffn_dim', 'hidden_size', 'max_position_embeddings']

Sharp edges: OPT-350M norms after adding to the residual, not before reading from it, and has embeddings of another
width: `resid_mid` would not be the sum its name says, so it is refused. The first two rows of upstream's position
embedding stand for no position; `W_pos` is without them.

Source: transformers.models.opt.modeling_flax_opt.
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

MODULE = "transformers.models.opt.modeling_flax_opt"

# Without these there is no saying what the model is.
REQUIRED_KEYS = frozenset(
    {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "max_position_embeddings"}
)
HANDLED_KEYS = REQUIRED_KEYS | frozenset(
    {
        "activation_function",
        "do_layer_norm_before",
        "word_embed_proj_dim",
        "tie_word_embeddings",
        "enable_bias",
        "layer_norm_elementwise_affine",
        "_remove_final_layer_norm",
    }
)
# Dropout is for training.
IGNORABLE_KEYS = frozenset({"dropout", "attention_dropout", "activation_dropout", "layerdrop", "init_std"})

TAGS = Patcher(
    MODULE,
    {
        "FlaxOPTDecoder.__call__": [
            ("self.embed_tokens(input_ids)", 'sow(self.embed_tokens(input_ids), name="embed")'),
            ("self.embed_positions(position_ids)", 'sow(self.embed_positions(position_ids), name="pos_embed")'),
            ("self.final_layer_norm(hidden_state)", 'sow(self.final_layer_norm(hidden_state), name="ln_final")'),
        ],
        "FlaxOPTDecoderLayer.__call__": [
            (
                """
                residual = hidden_states
                if self.do_layer_norm_before:
                    hidden_states = self.self_attn_layer_norm(hidden_states)
                """,
                """
                residual = hidden_states = sow(hidden_states, name="resid_pre")
                if self.do_layer_norm_before:
                    hidden_states = sow(self.self_attn_layer_norm(hidden_states), name="ln1")
                """,
            ),
            (
                """
                hidden_states = self.dropout_layer(hidden_states, deterministic=deterministic)
                hidden_states = residual + hidden_states
                """,
                """
                hidden_states = self.dropout_layer(hidden_states, deterministic=deterministic)
                hidden_states = sow(hidden_states, name="attn_out")
                hidden_states = sow(residual + hidden_states, name="resid_mid")
                """,
            ),
            (
                """
                residual = hidden_states
                if self.do_layer_norm_before:
                    hidden_states = self.final_layer_norm(hidden_states)
                """,
                """
                residual = hidden_states
                if self.do_layer_norm_before:
                    hidden_states = sow(self.final_layer_norm(hidden_states), name="ln2")
                """,
            ),
            ("self.fc1(hidden_states)", 'sow(self.fc1(hidden_states), name="mlp_pre")'),
            ("self.activation_fn(hidden_states)", 'sow(self.activation_fn(hidden_states), name="mlp_post")'),
            (
                """
                hidden_states = self.dropout_layer(hidden_states, deterministic=deterministic)
                hidden_states = (residual + hidden_states).reshape(hidden_states_shape)
                """,
                """
                hidden_states = self.dropout_layer(hidden_states, deterministic=deterministic)
                hidden_states = sow(hidden_states, name="mlp_out")
                hidden_states = sow((residual + hidden_states).reshape(hidden_states_shape), name="resid_post")
                """,
            ),
        ],
        "FlaxOPTAttention.__call__": [
            ("self._split_heads(query_states)", 'sow(self._split_heads(query_states), name="q")'),
            ("self._split_heads(key_states)", 'sow(self._split_heads(key_states), name="k")'),
            ("self._split_heads(value_states)", 'sow(self._split_heads(value_states), name="v")'),
            (
                'jnp.einsum("...hqk,...khd->...qhd", attn_weights, value_states)',
                'sow(jnp.einsum("...hqk,...khd->...qhd", attn_weights, value_states), name="z")',
            ),
        ],
        "FlaxOPTForCausalLMModule.__call__": [
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
LAYER_LOOP = Patcher(
    MODULE,
    {"FlaxOPTDecoderLayerCollection.__call__": [transformers_stacked.layer_loop("decoder_layer", "self.layers")]},
)
LAYER_SCAN = Patcher(
    MODULE,
    {"FlaxOPTDecoderLayerCollection.__call__": [transformers_stacked.layer_scan("decoder_layer", "self.layers")]},
    names={"scan_blocks": transformers_stacked.scan_blocks},
)

MASK_MEND = Patcher(
    MODULE,
    {
        "FlaxOPTAttention.setup": [
            (
                """
                self.causal_mask = make_causal_mask(
                    jnp.ones((1, self.config.max_position_embeddings), dtype="bool"), dtype="bool"
                )
                """,
                "self.causal_mask = None",
            ),
        ],
        "FlaxOPTAttention.__call__": list(transformers_flax.MASK_BLOCK_IN_CALL),
    },
)
AXES_MEND = Patcher(
    MODULE,
    {"FlaxOPTDecoderLayer.__call__": [("hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1]);", "pass")]},
)

# What the patches were written against: transformers 4.57.6.
DIGESTS = {
    "FlaxOPTAttention.setup": "e5a2a9ed7478881a8bf4c9c724a4854cd61de4e87df2d0cd2abcf7d5fc155580",
    "FlaxOPTAttention.__call__": "f17e4261553208ddd852ee92ac52310d2fd23daae96e13e49c78fbd4e7e0ef71",
    "FlaxOPTDecoderLayer.__call__": "79746a7ffbbefd5b3f898d1524ceeddf5c2a91bf62dc3a4dc6c38367d3b72ff8",
    "FlaxOPTDecoder.__call__": "4dfca86b80e41e4b641702dbe533976d9ec46be851f6724b398b8b1d90b4668f",
    "FlaxOPTForCausalLMModule.__call__": "0db973461f7695667a9a591b67fa76ce3df5ae2239df372ddf6c44dacf35955d",
    "FlaxOPTDecoderLayerCollection.__call__": "e225f6058f8b0d6b52f8b0e60c98e498cec251a98955c15b2c7e7b24e9d49d40",
}

PATCH_SET = PatchSet(
    "transformers_opt",
    tags=(TAGS, LAYER_LOOP, flax_attention.TAGS),
    mends=(MASK_MEND, AXES_MEND),
    versions={"transformers": ">=4.45,<5", "flax": ">=0.12"},
    upstream={**{f"{MODULE}:{member}": digest for member, digest in DIGESTS.items()}, **flax_attention.DIGESTS},
)
STACKED_PATCH_SET = dataclasses.replace(
    PATCH_SET,
    name="transformers_opt (stacked)",
    tags=(TAGS, flax_attention.TAGS),
    mends=(MASK_MEND, AXES_MEND, LAYER_SCAN),
)


def from_checkpoint(
    checkpoint: Checkpoint, *, dtype: Any = "float32", stacked: bool = False, sharding: Placement | None = None
) -> LanguageModel:
    """A `LanguageModel` from the files of an OPT.

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
        allowed={
            "activation_function": transformers_flax.activations(),
            "do_layer_norm_before": (True,),
            "word_embed_proj_dim": (settings.get("hidden_size"),),
            "enable_bias": (True,),
            "layer_norm_elementwise_affine": (True,),
            "_remove_final_layer_norm": (False,),
        },
        divides=[("num_attention_heads", "hidden_size")],
    )
    upstream, config = _build(json.dumps(settings, sort_keys=True), transformers_flax.dtype_name(dtype), stacked)
    return transformers_flax.read(
        checkpoint, upstream, config, buffers=("*.version",), prefix="model.", sharding=sharding
    )


# One Upstream per configuration, so that a model loaded twice compiles once.
@functools.lru_cache(maxsize=16)
def _build(settings: str, dtype: str, stacked: bool) -> tuple[Upstream, ModelConfig]:
    from transformers.models.opt.configuration_opt import OPTConfig
    from transformers.models.opt.modeling_flax_opt import FlaxOPTForCausalLMModule

    hf = OPTConfig(**json.loads(settings))
    module = FlaxOPTForCausalLMModule(hf, dtype=getattr(jax.numpy, dtype))
    config = ModelConfig(
        family="opt",
        n_layers=hf.num_hidden_layers,
        d_model=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        n_kv_heads=hf.num_attention_heads,
        d_head=hf.hidden_size // hf.num_attention_heads,
        d_mlp=hf.ffn_dim,
        d_vocab=hf.vocab_size,
        n_ctx=hf.max_position_embeddings,
        activation=hf.activation_function,
        is_gated=False,
        is_tied=hf.tie_word_embeddings,
        norm="layernorm",
        norm_eps=1e-5,
        rope_theta=None,
        dtype=dtype,
    )
    layers = _layers(config, stacked)
    patch_set = STACKED_PATCH_SET if stacked else PATCH_SET

    def empty_cache(batch: int, length: int) -> Any:
        def layer() -> Any:
            empty = transformers_flax.empty_layer_cache(batch, length, config.n_heads, config.d_head, dtype)
            return {"self_attn": empty}

        return layers.cache(layer)

    functions = transformers_flax.pure_functions(
        module,
        name="opt",
        tags=patch_set.tags,
        mends=patch_set.mends,
        ln_final=lambda bound, residual: bound.model.decoder.final_layer_norm(residual),
        unembed=transformers_flax.unembedding_of(
            config, lambda bound: bound.model.variables["params"]["decoder"]["embed_tokens"]["embedding"]
        ),
        empty_cache=empty_cache,
    )
    upstream = Upstream(
        name="transformers_opt",
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
    return transformers_stacked.Layers(("model", "decoder", "layers"), config.n_layers, stacked)


def _layout(config: ModelConfig, stacked: bool) -> dict[str, Any]:
    """Upstream's parameters, as tensors in the layout of torch's `Linear`, `[out, in]`."""
    d_model, d_mlp = config.d_model, config.d_mlp
    names = transformers_stacked.Names(_layers(config, stacked))

    def norm(name: str) -> dict[str, Stored]:
        return {"scale": names.array(f"{name}.weight", d_model), "bias": names.array(f"{name}.bias", d_model)}

    def dense(name: str, d_out: int, d_in: int) -> dict[str, Stored]:
        kernel = names.array(f"{name}.weight", d_out, d_in, turned=True)
        return {"kernel": kernel, "bias": names.array(f"{name}.bias", d_out)}

    def layer(at: str) -> dict[str, Any]:
        return {
            "self_attn_layer_norm": norm(f"{at}.self_attn_layer_norm"),
            "self_attn": {
                name: dense(f"{at}.self_attn.{name}", d_model, d_model)
                for name in ("q_proj", "k_proj", "v_proj", "out_proj")
            },
            "final_layer_norm": norm(f"{at}.final_layer_norm"),
            "fc1": dense(f"{at}.fc1", d_mlp, d_model),
            "fc2": dense(f"{at}.fc2", d_model, d_mlp),
        }

    decoder = "model.decoder"
    params: dict[str, Any] = {
        "model": {
            "decoder": {
                "embed_tokens": {"embedding": names.array(f"{decoder}.embed_tokens.weight", config.d_vocab, d_model)},
                "embed_positions": {
                    "embedding": names.array(f"{decoder}.embed_positions.weight", _OFFSET + config.n_ctx, d_model)
                },
                "layers": names.layers(layer, f"{decoder}.layers.{{}}"),
                "final_layer_norm": norm(f"{decoder}.final_layer_norm"),
            }
        }
    }
    if not config.is_tied:
        params["lm_head"] = {"kernel": names.array("lm_head.weight", config.d_vocab, d_model, turned=True)}
    return params


# Rows of the position embedding before that of position 0.
_OFFSET = 2


def _weights(config: ModelConfig) -> dict[str, Any]:
    """Weights outside the layers under canonical names."""

    def decoder(params: Any) -> Any:
        return params["model"]["decoder"]

    return {
        "W_E": lambda params: decoder(params)["embed_tokens"]["embedding"],
        "W_pos": lambda params: decoder(params)["embed_positions"]["embedding"][_OFFSET:],
        "W_U": lambda params: (
            decoder(params)["embed_tokens"]["embedding"].T if config.is_tied else params["lm_head"]["kernel"]
        ),
        "ln_final_w": lambda params: decoder(params)["final_layer_norm"]["scale"],
        "ln_final_b": lambda params: decoder(params)["final_layer_norm"]["bias"],
    }


def _layer_weights(config: ModelConfig) -> dict[str, Any]:
    """One layer's weights under canonical names; heads are a view of the columns of upstream's kernels."""
    d_model, d_head = config.d_model, config.d_head

    def heads(name: str) -> Any:
        return lambda layer: layer["self_attn"][name]["kernel"].reshape(d_model, -1, d_head).transpose(1, 0, 2)

    def head_biases(name: str) -> Any:
        return lambda layer: layer["self_attn"][name]["bias"].reshape(-1, d_head)

    return {
        "ln1_w": lambda layer: layer["self_attn_layer_norm"]["scale"],
        "ln1_b": lambda layer: layer["self_attn_layer_norm"]["bias"],
        "W_Q": heads("q_proj"),
        "W_K": heads("k_proj"),
        "W_V": heads("v_proj"),
        "W_O": lambda layer: layer["self_attn"]["out_proj"]["kernel"].reshape(-1, d_head, d_model),
        "b_Q": head_biases("q_proj"),
        "b_K": head_biases("k_proj"),
        "b_V": head_biases("v_proj"),
        "b_O": lambda layer: layer["self_attn"]["out_proj"]["bias"],
        "ln2_w": lambda layer: layer["final_layer_norm"]["scale"],
        "ln2_b": lambda layer: layer["final_layer_norm"]["bias"],
        "W_in": lambda layer: layer["fc1"]["kernel"],
        "b_in": lambda layer: layer["fc1"]["bias"],
        "W_out": lambda layer: layer["fc2"]["kernel"],
        "b_out": lambda layer: layer["fc2"]["bias"],
    }
