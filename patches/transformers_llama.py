"""Patch set for transformers' Flax Llama (4.x): Llama 1 and 2, SmolLM2, and what else has `model_type: llama`.

`TAGS` make the sites and change nothing: with them alone the program lowers to the same StableHLO as without.
`MENDS` repair what upstream does differently from the model it means to be, so that its logits are those of
transformers' torch Llama:

- the rotary base is 10000 whatever the configuration says, and its table of sines for all of n_ctx is built, and
  compiled in as a constant, once per layer: angles are computed from the positions at hand, with `rope_theta` and
  `rope_scaling` (linear, dynamic, llama3);
- heads are d_model / n_heads wide whatever `head_dim` says: they are as wide as it says;
- each layer builds a causal mask of n_ctx x n_ctx (67 million entries for SmolLM2): only the block in use is built;
- tied embeddings are not tied: the unembedding attends with the embedding, and needs no second copy of it.

>>> sorted(REQUIRED_KEYS & {"rope_theta", "hidden_size"})
['hidden_size']

Sharp edges: biases in the MLP and other scalings of the rotary embedding (yarn, longrope) do not exist in upstream
and are refused. Under `dynamic` scaling the context is `factor` times as long as `max_position_embeddings`. `k`, `v`
and `rot_k` have `n_kv_heads` heads; upstream repeats them after the sites.

Source: transformers.models.llama.modeling_flax_llama; transformers' torch Llama for what is mended.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import ModelConfig, Upstream
from interp_jax.patches import flax_attention, rotary, transformers_flax, transformers_stacked
from interp_jax.transforms.patcher import Patcher, PatchSet

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint
    from interp_jax.models.weights.layout import Placement, Stored

MODULE = "transformers.models.llama.modeling_flax_llama"

# Without these there is no saying what the model is.
REQUIRED_KEYS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    }
)
HANDLED_KEYS = REQUIRED_KEYS | frozenset(
    {
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "tie_word_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_interleaved",
        "attention_bias",
        "mlp_bias",
    }
)
# Dropout is for training, tensor parallelism for speed; `is_llama_config` is a remark in SmolLM's files, and the first
# Llama's say `max_position_embeddings` twice.
IGNORABLE_KEYS = frozenset(
    {"attention_dropout", "pretraining_tp", "is_llama_config", "max_sequence_length", "transformers.js_config"}
)


TAGS = Patcher(
    MODULE,
    {
        "FlaxLlamaModule.__call__": [
            (
                'self.embed_tokens(input_ids.astype("i4"))',
                'sow(self.embed_tokens(input_ids.astype("i4")), name="embed")',
            ),
            ("self.norm(hidden_states)", 'sow(self.norm(hidden_states), name="ln_final")'),
        ],
        "FlaxLlamaDecoderLayer.__call__": [
            (
                """
                residual = hidden_states
                hidden_states = self.input_layernorm(hidden_states)
                """,
                """
                residual = hidden_states = sow(hidden_states, name="resid_pre")
                hidden_states = sow(self.input_layernorm(hidden_states), name="ln1")
                """,
            ),
            ("attn_output = outputs[0]", 'attn_output = sow(outputs[0], name="attn_out")'),
            ("residual + attn_output", 'sow(residual + attn_output, name="resid_mid")'),
            (
                "self.post_attention_layernorm(hidden_states)",
                'sow(self.post_attention_layernorm(hidden_states), name="ln2")',
            ),
            ("self.mlp(hidden_states)", 'sow(self.mlp(hidden_states), name="mlp_out")'),
            ("residual + hidden_states", 'sow(residual + hidden_states, name="resid_post")'),
        ],
        "FlaxLlamaAttention.__call__": [
            ("self._split_heads(query, self.num_heads)", 'sow(self._split_heads(query, self.num_heads), name="q")'),
            (
                "self._split_heads(key, self.num_key_value_heads)",
                'sow(self._split_heads(key, self.num_key_value_heads), name="k")',
            ),
            (
                "self._split_heads(value, self.num_key_value_heads)",
                'sow(self._split_heads(value, self.num_key_value_heads), name="v")',
            ),
            (
                "key, query = self.rotary_emb(key, query, position_ids)",
                """
                key, query = self.rotary_emb(key, query, position_ids)
                query, key = sow(query, name="rot_q"), sow(key, name="rot_k")
                """,
            ),
            (
                'jnp.einsum("...hqk,...khd->...qhd", attn_weights, value)',
                'sow(jnp.einsum("...hqk,...khd->...qhd", attn_weights, value), name="z")',
            ),
        ],
        "FlaxLlamaMLP.__call__": [
            ("self.up_proj(hidden_states)", 'sow(self.up_proj(hidden_states), name="mlp_pre")'),
            ("self.gate_proj(hidden_states)", 'sow(self.gate_proj(hidden_states), name="mlp_gate")'),
            ("up_proj_states * gate_states", 'sow(up_proj_states * gate_states, name="mlp_post")'),
        ],
        "FlaxLlamaForCausalLMModule.__call__": [
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
LAYER_LOOP = Patcher(MODULE, {"FlaxLlamaLayerCollection.__call__": [transformers_stacked.LAYER_LOOP]})
LAYER_SCAN = Patcher(
    MODULE,
    {"FlaxLlamaLayerCollection.__call__": [transformers_stacked.LAYER_SCAN]},
    names={"scan_blocks": transformers_stacked.scan_blocks},
)

MEND_NAMES = {"frequencies_of": rotary.frequencies_of, "head_size": rotary.head_size}
MENDS = Patcher(
    MODULE,
    {
        "FlaxLlamaRotaryEmbedding.setup": [
            (
                "self.sincos = create_sinusoidal_positions(self.config.max_position_embeddings, head_dim)",
                "self.sincos = None",
            ),
        ],
        "FlaxLlamaRotaryEmbedding.__call__": [
            (
                """
                sincos = self.sincos[position_ids]
                sin_pos, cos_pos = jnp.split(sincos, 2, axis=-1)
                """,
                """
                angles = position_ids[:, :, None, None].astype(jnp.float32) * frequencies_of(self.config, position_ids)
                sin_pos, cos_pos = jnp.sin(angles), jnp.cos(angles)
                """,
            ),
        ],
        "FlaxLlamaAttention.setup": [
            transformers_flax.NO_MASK_IN_SETUP,
            ("self.head_dim = self.embed_dim // self.num_heads", "self.head_dim = head_size(config)"),
        ],
        "FlaxLlamaAttention._merge_heads": [("(self.embed_dim,)", "(-1,)")],
        "FlaxLlamaAttention.__call__": list(transformers_flax.MASK_BLOCK_IN_CALL),
        "FlaxLlamaForCausalLMModule.__call__": [
            (
                "lm_logits = self.lm_head(hidden_states)",
                """
                if self.config.tie_word_embeddings:
                    lm_logits = self.model.embed_tokens.attend(hidden_states)
                else:
                    lm_logits = self.lm_head(hidden_states)
                """,
            ),
        ],
    },
    names=MEND_NAMES,
)

# What the patches were written against: transformers 4.57.6.
DIGESTS = {
    "FlaxLlamaRotaryEmbedding.setup": "528009089a5ac517850f452366e2a249414639f62b6c51fab3087a3134d62987",
    "FlaxLlamaRotaryEmbedding.__call__": "8e51d53406601865533661e936e3847131f23372ed737c90d5e62dc796feec6d",
    "FlaxLlamaAttention.setup": "c7ac02645712a7d8d66809a58c862a343237429a89162c2bdb58e6f02cee193c",
    "FlaxLlamaAttention._merge_heads": "f3b2200b0a20c8ebc4966768d0a568e0e9e015942cb139d67fe38e0f674305ce",
    "FlaxLlamaAttention.__call__": "c654aaf536d305b4574f1ee081cb125552dc4b45817a6022151809730123777a",
    "FlaxLlamaForCausalLMModule.__call__": "57590097089cb1bbb0f244dd3d0df8d90a67671ec11eb786e356eb032ed35494",
    "FlaxLlamaModule.__call__": "3168d8e145fef2237cf6412d4c975fe84ac0bc292f3e3824ffb35e4a2a72bcda",
    "FlaxLlamaLayerCollection.__call__": "d14722ddff517c6b6e4b510106bcc4c3c40d42890598b8cb21b8d112b63829e3",
    "FlaxLlamaDecoderLayer.__call__": "359f0a3c4d921f6b1c5b7fcb9e3b245a36706ff79c00fb1fa390e12a1b8a74af",
    "FlaxLlamaMLP.__call__": "b3b75b27269c55f116e9603ee4739c4f4770d471a5164257694934a44f6ca0bf",
}

PATCH_SET = PatchSet(
    "transformers_llama",
    tags=(TAGS, LAYER_LOOP, flax_attention.TAGS),
    mends=(MENDS,),
    versions={"transformers": ">=4.45,<5", "flax": ">=0.12"},
    upstream={**{f"{MODULE}:{member}": digest for member, digest in DIGESTS.items()}, **flax_attention.DIGESTS},
)
STACKED_PATCH_SET = dataclasses.replace(
    PATCH_SET, name="transformers_llama (stacked)", tags=(TAGS, flax_attention.TAGS), mends=(MENDS, LAYER_SCAN)
)


def from_checkpoint(
    checkpoint: Checkpoint, *, dtype: Any = "float32", stacked: bool = False, sharding: Placement | None = None
) -> LanguageModel:
    """A `LanguageModel` from the files of a Llama.

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
            "hidden_act": transformers_flax.activations(),
            "mlp_bias": (False,),
            "rope_interleaved": (False,),
        },
        divides=[
            *([] if "head_dim" in settings else [("num_attention_heads", "hidden_size")]),
            ("num_key_value_heads", "num_attention_heads"),
        ],
    )
    rotary.check_scaling(checkpoint)
    return read(checkpoint, _build, settings, dtype=dtype, stacked=stacked, sharding=sharding)


def read(
    checkpoint: Checkpoint,
    build: Callable[[str, str, bool], tuple[Upstream, ModelConfig]],
    settings: dict[str, Any],
    *,
    dtype: Any,
    stacked: bool,
    sharding: Placement | None,
) -> LanguageModel:
    """The model of a checkpoint whose configuration has been checked; its weights are named as Llama's.

    Args:
        checkpoint: The model on disk.
        build: `(settings as JSON, dtype, stacked) -> (upstream, config)`.
        settings: The configuration keys upstream gets.
        dtype: Of parameters and computation.
        stacked: Whether the layers are stacked.
        sharding: Where the parameters go.

    Returns:
        The model.

    Raises:
        InvalidInputError: Upstream does not compute in this dtype.
        LoadError: Weights that do not fit the configuration.
    """
    upstream, config = build(json.dumps(settings, sort_keys=True), transformers_flax.dtype_name(dtype), stacked)
    return transformers_flax.read(
        checkpoint, upstream, config, buffers=("*.rotary_emb.inv_freq",), prefix="model.", sharding=sharding
    )


# One Upstream per configuration, so that a model loaded twice compiles once.
@functools.lru_cache(maxsize=16)
def _build(settings: str, dtype: str, stacked: bool) -> tuple[Upstream, ModelConfig]:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_flax_llama import FlaxLlamaForCausalLMModule

    hf = LlamaConfig(**json.loads(settings))
    module = FlaxLlamaForCausalLMModule(hf, dtype=getattr(jax.numpy, dtype))
    return upstream_of(
        hf,
        module,
        name="llama",
        patch_set=STACKED_PATCH_SET if stacked else PATCH_SET,
        stacked=stacked,
        restacked=lambda: _build(settings, dtype, not stacked)[0],
    )


def upstream_of(
    hf: Any, module: Any, *, name: str, patch_set: PatchSet, stacked: bool, restacked: Callable[[], Upstream]
) -> tuple[Upstream, ModelConfig]:
    """What `LanguageModel` knows of a module built like Llama's.

    Args:
        hf: Its configuration in transformers.
        module: A `...ForCausalLMModule` whose submodules have the names of Llama's.
        name: The family.
        patch_set: Its patch set for this layout of the layers.
        stacked: Whether the layers are stacked.
        restacked: The same in the other layout.

    Returns:
        Its functions and its shape.
    """
    dtype = jax.numpy.dtype(module.dtype).name
    config = ModelConfig(
        family=name,
        n_layers=hf.num_hidden_layers,
        d_model=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        n_kv_heads=hf.num_key_value_heads,
        d_head=rotary.head_size(hf),
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        n_ctx=rotary.n_ctx_of(hf),
        activation=hf.hidden_act,
        is_gated=True,
        is_tied=hf.tie_word_embeddings,
        norm="rmsnorm",
        norm_eps=hf.rms_norm_eps,
        rope_theta=hf.rope_theta,
        dtype=dtype,
        window=getattr(hf, "sliding_window", None),
    )
    layers = _layers(config, stacked)
    is_biased = getattr(hf, "attention_bias", False)

    def empty_cache(batch: int, length: int) -> Any:
        def layer() -> Any:
            empty = transformers_flax.empty_layer_cache(batch, length, config.n_kv_heads, config.d_head, dtype)
            return {"self_attn": empty}

        return layers.cache(layer)

    def unembed(bound: Any, normalised: Any) -> Any:
        return bound.model.embed_tokens.attend(normalised) if config.is_tied else bound.lm_head(normalised)

    functions = transformers_flax.pure_functions(
        module,
        name=name,
        tags=patch_set.tags,
        mends=patch_set.mends,
        ln_final=lambda bound, residual: bound.model.norm(residual),
        unembed=unembed,
        empty_cache=empty_cache,
    )
    upstream = Upstream(
        name=f"transformers_{name}",
        patch_set=patch_set,
        weights=_weights(config),
        layer_weights=_layer_weights(config, is_biased=is_biased),
        layout=lambda: _layout(config, is_biased=is_biased, layers=layers),
        restacked=restacked,
        **layers.functions(),
        **functions,
    )
    return upstream, config


def _layers(config: ModelConfig, stacked: bool) -> transformers_stacked.Layers:
    return transformers_stacked.Layers(("model", "layers"), config.n_layers, stacked)


def _layout(config: ModelConfig, *, is_biased: bool, layers: transformers_stacked.Layers) -> dict[str, Any]:
    """Upstream's parameters, as tensors in the layout of torch's `Linear`, `[out, in]`."""
    d_model, d_mlp = config.d_model, config.d_mlp
    d_q, d_kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    names = transformers_stacked.Names(layers)

    def dense(name: str, d_out: int, d_in: int, *, bias: bool = False) -> dict[str, Stored]:
        params = {"kernel": names.array(f"{name}.weight", d_out, d_in, turned=True)}
        return params | ({"bias": names.array(f"{name}.bias", d_out)} if bias else {})

    def layer(at: str) -> dict[str, Any]:
        return {
            "input_layernorm": {"weight": names.array(f"{at}.input_layernorm.weight", d_model)},
            "post_attention_layernorm": {"weight": names.array(f"{at}.post_attention_layernorm.weight", d_model)},
            "self_attn": {
                "q_proj": dense(f"{at}.self_attn.q_proj", d_q, d_model, bias=is_biased),
                "k_proj": dense(f"{at}.self_attn.k_proj", d_kv, d_model, bias=is_biased),
                "v_proj": dense(f"{at}.self_attn.v_proj", d_kv, d_model, bias=is_biased),
                "o_proj": dense(f"{at}.self_attn.o_proj", d_model, d_q, bias=is_biased),
            },
            "mlp": {
                "gate_proj": dense(f"{at}.mlp.gate_proj", d_mlp, d_model),
                "up_proj": dense(f"{at}.mlp.up_proj", d_mlp, d_model),
                "down_proj": dense(f"{at}.mlp.down_proj", d_model, d_mlp),
            },
        }

    params: dict[str, Any] = {
        "model": {
            "embed_tokens": {"embedding": names.array("model.embed_tokens.weight", config.d_vocab, d_model)},
            "layers": names.layers(layer, "model.layers.{}"),
            "norm": {"weight": names.array("model.norm.weight", d_model)},
        }
    }
    if not config.is_tied:
        params["lm_head"] = dense("lm_head", config.d_vocab, d_model)
    return params


def _weights(config: ModelConfig) -> dict[str, Any]:
    """Weights outside the layers under canonical names."""
    return {
        "W_E": lambda params: params["model"]["embed_tokens"]["embedding"],
        "W_U": lambda params: (
            params["model"]["embed_tokens"]["embedding"].T if config.is_tied else params["lm_head"]["kernel"]
        ),
        "ln_final_w": lambda params: params["model"]["norm"]["weight"],
    }


def _layer_weights(config: ModelConfig, *, is_biased: bool) -> dict[str, Any]:
    """One layer's weights under canonical names; heads are a view of the columns of upstream's kernels."""
    d_model, d_head = config.d_model, config.d_head

    def heads(name: str) -> Any:
        return lambda layer: layer["self_attn"][name]["kernel"].reshape(d_model, -1, d_head).transpose(1, 0, 2)

    def head_biases(name: str) -> Any:
        return lambda layer: layer["self_attn"][name]["bias"].reshape(-1, d_head)

    biases = {
        "b_Q": head_biases("q_proj"),
        "b_K": head_biases("k_proj"),
        "b_V": head_biases("v_proj"),
        "b_O": lambda layer: layer["self_attn"]["o_proj"]["bias"],
    }
    return {
        "ln1_w": lambda layer: layer["input_layernorm"]["weight"],
        "W_Q": heads("q_proj"),
        "W_K": heads("k_proj"),
        "W_V": heads("v_proj"),
        "W_O": lambda layer: layer["self_attn"]["o_proj"]["kernel"].reshape(-1, d_head, d_model),
        **(biases if is_biased else {}),
        "ln2_w": lambda layer: layer["post_attention_layernorm"]["weight"],
        "W_gate": lambda layer: layer["mlp"]["gate_proj"]["kernel"],
        "W_in": lambda layer: layer["mlp"]["up_proj"]["kernel"],
        "W_out": lambda layer: layer["mlp"]["down_proj"]["kernel"],
    }
