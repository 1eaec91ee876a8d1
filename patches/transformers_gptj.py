"""Patch set for transformers' Flax GPT-J (4.x): GPT-J 6B and its kin.

Attention and MLP run in parallel: both read one norm of `resid_pre`, and there is no `resid_mid` and no `ln2`. The
first `rotary_dim` components of each head are rotated, the others are not.

`TAGS` make the sites and change nothing. `MENDS` keep each layer from building, and holding as constants, a mask of
n_ctx x n_ctx, of which only the block in use is built, and a table of sines, of which there is now one for all layers.
The numbers are the same.

>>> sorted(REQUIRED_KEYS)
['n_embd', 'n_head', 'n_layer', 'n_positions', 'rotary_dim', 'vocab_size']

Sharp edges: `ln1` is what attention and MLP both read, so changing it changes both. The unembedding has a bias, `b_U`.
In half precision `rot_q` and `rot_k` are float32, as upstream's sines are. Upstream cannot tie the embeddings.

Source: transformers.models.gptj.modeling_flax_gptj.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import ModelConfig, Upstream
from interp_jax.patches import flax_attention, transformers_flax, transformers_stacked
from interp_jax.transforms.patcher import Patcher, PatchSet

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint
    from interp_jax.models.weights.layout import Placement, Stored

MODULE = "transformers.models.gptj.modeling_flax_gptj"

# Without these there is no saying what the model is.
REQUIRED_KEYS = frozenset({"vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim"})
HANDLED_KEYS = REQUIRED_KEYS | frozenset(
    {"n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings", "rotary", "scale_attn_weights"}
)
# Dropout is for training, the summary for classification.
IGNORABLE_KEYS = frozenset(
    {
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "gradient_checkpointing",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
    }
)


# One array per configuration, so that all layers refer to one constant.
@functools.lru_cache(maxsize=32)
def sinusoids(n_positions: int, d_rotary: int) -> np.ndarray:
    """Upstream's sines, then cosines, of the angle of each position, `[n_positions, d_rotary]`."""
    from transformers.models.gptj.modeling_flax_gptj import create_sinusoidal_positions

    with jax.ensure_compile_time_eval():
        return np.asarray(create_sinusoidal_positions(n_positions, d_rotary))


TAGS = Patcher(
    MODULE,
    {
        "FlaxGPTJModule.__call__": [
            ('self.wte(input_ids.astype("i4"))', 'sow(self.wte(input_ids.astype("i4")), name="embed")'),
            ("self.ln_f(hidden_states)", 'sow(self.ln_f(hidden_states), name="ln_final")'),
        ],
        "FlaxGPTJBlock.__call__": [
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
            (
                "self.mlp(hidden_states, deterministic=deterministic)",
                'sow(self.mlp(hidden_states, deterministic=deterministic), name="mlp_out")',
            ),
            (
                "attn_output + feed_forward_hidden_states + residual",
                'sow(attn_output + feed_forward_hidden_states + residual, name="resid_post")',
            ),
        ],
        "FlaxGPTJAttention.__call__": [
            ("self._split_heads(query)", 'sow(self._split_heads(query), name="q")'),
            ("self._split_heads(key)", 'sow(self._split_heads(key), name="k")'),
            ("self._split_heads(value)", 'sow(self._split_heads(value), name="v")'),
            (
                "query_length, key_length = query.shape[1], key.shape[1]",
                """
                query, key = sow(query, name="rot_q"), sow(key, name="rot_k")
                query_length, key_length = query.shape[1], key.shape[1]
                """,
            ),
            (
                'jnp.einsum("...hqk,...khd->...qhd", attn_weights, value)',
                'sow(jnp.einsum("...hqk,...khd->...qhd", attn_weights, value), name="z")',
            ),
        ],
        "FlaxGPTJMLP.__call__": [
            ("self.fc_in(hidden_states)", 'sow(self.fc_in(hidden_states), name="mlp_pre")'),
            ("self.act(hidden_states)", 'sow(self.act(hidden_states), name="mlp_post")'),
        ],
        "FlaxGPTJForCausalLMModule.__call__": [
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
LAYER_LOOP = Patcher(MODULE, {"FlaxGPTJBlockCollection.__call__": [transformers_stacked.LAYER_LOOP]})
LAYER_SCAN = Patcher(
    MODULE,
    {"FlaxGPTJBlockCollection.__call__": [transformers_stacked.LAYER_SCAN]},
    names={"scan_blocks": transformers_stacked.scan_blocks},
)

MENDS = Patcher(
    MODULE,
    {
        "FlaxGPTJAttention.setup": [
            transformers_flax.NO_MASK_IN_SETUP,
            (
                "create_sinusoidal_positions(config.max_position_embeddings, pos_embd_dim)",
                "sinusoids(config.max_position_embeddings, pos_embd_dim)",
            ),
        ],
        "FlaxGPTJAttention.__call__": list(transformers_flax.MASK_BLOCK_IN_CALL),
    },
    names={"sinusoids": sinusoids},
)

# What the patches were written against: transformers 4.57.6.
DIGESTS = {
    "FlaxGPTJAttention.setup": "7fa41804195898634daa6d66e6b7016b6d20801433350e6821de43dc7c490323",
    "FlaxGPTJAttention.__call__": "f86743bd0e8e0e1958278b47afbab8b89b11fbb89a983c762460120fca2370e8",
    "FlaxGPTJModule.__call__": "8e89135c71b09af304a2b4f45ef707fd213c5849c2d66ec393f3408cba3e2f8b",
    "FlaxGPTJBlock.__call__": "442998dd9ad314cb1b37f43b0f52ebe34f9456d70b60c420cb871f9fc1905fe6",
    "FlaxGPTJMLP.__call__": "b5ef655e25794a02ee7f0ed8b20d863cc5949d2335d4564de14ae9903d51a85b",
    "FlaxGPTJForCausalLMModule.__call__": "6ee8b200bd2c9eed1864a431f06c14aaf3b2c99d2304c83a3964283c046273d4",
    "FlaxGPTJBlockCollection.__call__": "215807d08118bb0d36d814a3bd85daa99dd9be7e38856440787ac8f33f4a4af1",
}

PATCH_SET = PatchSet(
    "transformers_gptj",
    tags=(TAGS, LAYER_LOOP, flax_attention.TAGS),
    mends=(MENDS,),
    versions={"transformers": ">=4.45,<5", "flax": ">=0.12"},
    upstream={**{f"{MODULE}:{member}": digest for member, digest in DIGESTS.items()}, **flax_attention.DIGESTS},
)
STACKED_PATCH_SET = dataclasses.replace(
    PATCH_SET, name="transformers_gptj (stacked)", tags=(TAGS, flax_attention.TAGS), mends=(MENDS, LAYER_SCAN)
)


def from_checkpoint(
    checkpoint: Checkpoint, *, dtype: Any = "float32", stacked: bool = False, sharding: Placement | None = None
) -> LanguageModel:
    """A `LanguageModel` from the files of a GPT-J.

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
    d_head = settings.get("n_embd", 0) // max(settings.get("n_head", 1), 1)
    transformers_flax.check_values(
        checkpoint,
        required=REQUIRED_KEYS,
        allowed={
            "activation_function": transformers_flax.activations(),
            "rotary_dim": range(2, d_head + 1, 2),
            "rotary": (True,),
            "scale_attn_weights": (True,),
            "tie_word_embeddings": (False,),
        },
        divides=[("n_head", "n_embd")],
    )
    upstream, config = _build(json.dumps(settings, sort_keys=True), transformers_flax.dtype_name(dtype), stacked)
    # Old files hold each layer's mask as a tensor.
    masks = ("*.attn.bias", "*.attn.masked_bias")
    return transformers_flax.read(checkpoint, upstream, config, buffers=masks, prefix="transformer.", sharding=sharding)


# One Upstream per configuration, so that a model loaded twice compiles once.
@functools.lru_cache(maxsize=16)
def _build(settings: str, dtype: str, stacked: bool) -> tuple[Upstream, ModelConfig]:
    from transformers.models.gptj.configuration_gptj import GPTJConfig
    from transformers.models.gptj.modeling_flax_gptj import FlaxGPTJForCausalLMModule

    hf = GPTJConfig(**json.loads(settings))
    module = FlaxGPTJForCausalLMModule(hf, dtype=getattr(jax.numpy, dtype))
    config = ModelConfig(
        family="gptj",
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
        is_tied=False,
        norm="layernorm",
        norm_eps=hf.layer_norm_epsilon,
        rope_theta=10000.0,
        dtype=dtype,
        is_parallel=True,
    )
    layers = _layers(config, stacked)
    patch_set = STACKED_PATCH_SET if stacked else PATCH_SET

    def empty_cache(batch: int, length: int) -> Any:
        def layer() -> Any:
            empty = transformers_flax.empty_layer_cache(batch, length, config.n_heads, config.d_head, dtype)
            # Keys are cached once rotated, in the dtype of the sines if that is the wider one.
            rotated = np.promote_types(jax.numpy.dtype(dtype), sinusoids(hf.n_positions, hf.rotary_dim).dtype)
            return {"attn": {**empty, "cached_key": empty["cached_key"].astype(rotated)}}

        return layers.cache(layer)

    functions = transformers_flax.pure_functions(
        module,
        name="gptj",
        tags=patch_set.tags,
        mends=patch_set.mends,
        ln_final=lambda bound, residual: bound.transformer.ln_f(residual),
        unembed=lambda bound, normalised: bound.lm_head(normalised),
        empty_cache=empty_cache,
    )
    upstream = Upstream(
        name="transformers_gptj",
        patch_set=patch_set,
        weights=_weights(),
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
    """Upstream's parameters, as tensors in the layout of torch's `Linear`, `[out, in]`."""
    d_model, d_mlp = config.d_model, config.d_mlp
    names = transformers_stacked.Names(_layers(config, stacked))

    def norm(name: str) -> dict[str, Stored]:
        return {"scale": names.array(f"{name}.weight", d_model), "bias": names.array(f"{name}.bias", d_model)}

    def dense(name: str, d_out: int, d_in: int, *, bias: bool = True) -> dict[str, Stored]:
        params = {"kernel": names.array(f"{name}.weight", d_out, d_in, turned=True)}
        return params | ({"bias": names.array(f"{name}.bias", d_out)} if bias else {})

    def layer(at: str) -> dict[str, Any]:
        return {
            "ln_1": norm(f"{at}.ln_1"),
            "attn": {
                name: dense(f"{at}.attn.{name}", d_model, d_model, bias=False)
                for name in ("q_proj", "k_proj", "v_proj", "out_proj")
            },
            "mlp": {
                "fc_in": dense(f"{at}.mlp.fc_in", d_mlp, d_model),
                "fc_out": dense(f"{at}.mlp.fc_out", d_model, d_mlp),
            },
        }

    return {
        "transformer": {
            "wte": {"embedding": names.array("transformer.wte.weight", config.d_vocab, d_model)},
            "h": names.layers(layer, "transformer.h.{}"),
            "ln_f": norm("transformer.ln_f"),
        },
        "lm_head": dense("lm_head", config.d_vocab, d_model),
    }


def _weights() -> dict[str, Any]:
    """Weights outside the layers under canonical names."""
    return {
        "W_E": lambda params: params["transformer"]["wte"]["embedding"],
        "W_U": lambda params: params["lm_head"]["kernel"],
        "b_U": lambda params: params["lm_head"]["bias"],
        "ln_final_w": lambda params: params["transformer"]["ln_f"]["scale"],
        "ln_final_b": lambda params: params["transformer"]["ln_f"]["bias"],
    }


def _layer_weights(config: ModelConfig) -> dict[str, Any]:
    """One layer's weights under canonical names; heads are a view of the columns of upstream's kernels."""
    d_model, d_head = config.d_model, config.d_head

    def heads(name: str) -> Any:
        return lambda layer: layer["attn"][name]["kernel"].reshape(d_model, -1, d_head).transpose(1, 0, 2)

    return {
        "ln1_w": lambda layer: layer["ln_1"]["scale"],
        "ln1_b": lambda layer: layer["ln_1"]["bias"],
        "W_Q": heads("q_proj"),
        "W_K": heads("k_proj"),
        "W_V": heads("v_proj"),
        "W_O": lambda layer: layer["attn"]["out_proj"]["kernel"].reshape(-1, d_head, d_model),
        "W_in": lambda layer: layer["mlp"]["fc_in"]["kernel"],
        "b_in": lambda layer: layer["mlp"]["fc_in"]["bias"],
        "W_out": lambda layer: layer["mlp"]["fc_out"]["kernel"],
        "b_out": lambda layer: layer["mlp"]["fc_out"]["bias"],
    }
