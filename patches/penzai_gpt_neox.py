"""Patch set for Penzai's GPT-NeoX: the Pythia suite, GPT-NeoX-20B, and what else has `model_type: gpt_neox`.

Attention and MLP read the same residual stream and are added to it at once, so there is no `resid_mid`. `TAGS` make the
sites and change nothing: with them alone the program lowers to the same StableHLO as without. Stacked, the layers are
Penzai's own `LayerStack`. `MENDS` repair two things:

- the norm before the unembedding has an epsilon of 1e-6 whatever the configuration says;
- stacked layers are compiled one by one, because Penzai unrolls its scan over them.

>>> sorted(REQUIRED_KEYS & {"rotary_pct", "hidden_size"})
['hidden_size']

Sharp edges: the two branches are always parallel and attention always has biases; other configurations are refused,
and so is float16, which does not hold the number Penzai masks with. The key-value cache is Penzai's too.

Source: penzai.models.transformer.variants.gpt_neox; transformers' torch GPTNeoX for what is mended.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import KVCache, ModelConfig, Upstream
from interp_jax.patches import penzai_layers, transformers_flax, transformers_stacked
from interp_jax.transforms.patcher import Patcher, PatchSet

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint
    from interp_jax.models.weights.layout import Placement, Stored

MODULE = "penzai.models.transformer.variants.gpt_neox"

# Without these there is no saying what the model is.
REQUIRED_KEYS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "layer_norm_eps",
    }
)
HANDLED_KEYS = REQUIRED_KEYS | frozenset(
    {
        "hidden_act",
        "rotary_pct",
        "rotary_emb_base",
        "partial_rotary_factor",
        "rope_theta",
        "rope_scaling",
        "use_parallel_residual",
        "attention_bias",
        "tie_word_embeddings",
    }
)
# Dropout is for training (GPT-NeoX 20B's file calls it otherwise), the classifier for classification.
IGNORABLE_KEYS = frozenset(
    {
        "attention_dropout",
        "hidden_dropout",
        "classifier_dropout",
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
    }
)

# Penzai's names of the nonlinearities, by those of Hugging Face, where three are the same function.
ACTIVATIONS: Mapping[str, str] = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu_approx",
    "gelu_fast": "gelu_approx",
    "gelu_pytorch_tanh": "gelu_approx",
    "relu": "relu",
    "silu": "silu",
}

TAGS = Patcher(
    MODULE,
    {
        "build_gpt_neox_transformer": [
            (
                "sublayers.append(pz.nn.EmbeddingLookup(emb_table));",
                """
                sublayers.append(pz.nn.EmbeddingLookup(emb_table))
                sublayers.append(Tag("embed", "batch", "seq", "embedding"))
                """,
            ),
            (
                'build_gpt_neox_block(f"{name}/block_{i}", init_base_rng, config)',
                'InLayer(i, build_gpt_neox_block(f"{name}/block_{i}", init_base_rng, config))',
            ),
            (
                "sublayers.append(pz.nn.Linear.from_config(name=$n, init_base_rng=$r, input_axes=$i, output_axes=$o));",
                """
                sublayers.append(Tag("ln_final", "batch", "seq", "embedding"))
                sublayers.append(pz.nn.Linear.from_config(name=$n, init_base_rng=$r, input_axes=$i, output_axes=$o))
                sublayers.append(Tag("logits", "batch", "seq", "vocabulary"))
                """,
            ),
        ],
        "build_gpt_neox_block": [
            (
                """
                pz.nn.BranchAndAddTogether([
                    $identity, pz.nn.Sequential([$norm_1, $attention]), pz.nn.Sequential([$norm_2, $mlp])
                ])
                """,
                """
                pz.nn.Sequential([
                    Tag("resid_pre", "batch", "seq", "embedding"),
                    pz.nn.BranchAndAddTogether([
                        $identity,
                        pz.nn.Sequential([
                            $norm_1,
                            Tag("ln1", "batch", "seq", "embedding"),
                            $attention,
                            Tag("attn_out", "batch", "seq", "embedding"),
                        ]),
                        pz.nn.Sequential([
                            $norm_2,
                            Tag("ln2", "batch", "seq", "embedding"),
                            $mlp,
                            Tag("mlp_out", "batch", "seq", "embedding"),
                        ]),
                    ]),
                    Tag("resid_post", "batch", "seq", "embedding"),
                ])
                """,
            ),
        ],
        "build_gpt_neox_attention": [
            (
                """
                pz.nn.Attention(
                    input_to_query=pz.nn.Sequential([$query, $rotate_query, $scale]),
                    input_to_key=pz.nn.Sequential([$key, $rotate_key]),
                    input_to_value=pz.nn.Sequential([$value]),
                    query_key_to_attn=pz.nn.Sequential([$product, $mask, $softmax]),
                    attn_value_to_output=pz.nn.Sequential([$average, $output]),
                )
                """,
                """
                pz.nn.Attention(
                    input_to_query=pz.nn.Sequential([
                        $query,
                        Tag("q", "batch", "seq", "heads", "projection"),
                        $rotate_query,
                        Tag("rot_q", "batch", "seq", "heads", "projection"),
                        $scale,
                    ]),
                    input_to_key=pz.nn.Sequential([
                        $key,
                        Tag("k", "batch", "seq", "heads", "projection"),
                        $rotate_key,
                        Tag("rot_k", "batch", "seq", "heads", "projection"),
                    ]),
                    input_to_value=pz.nn.Sequential([$value, Tag("v", "batch", "seq", "heads", "projection")]),
                    query_key_to_attn=pz.nn.Sequential([
                        $product,
                        $mask,
                        Tag("attn_scores", "batch", "heads", "seq", "kv_seq"),
                        $softmax,
                        Tag("pattern", "batch", "heads", "seq", "kv_seq"),
                    ]),
                    attn_value_to_output=pz.nn.Sequential([
                        $average, Tag("z", "batch", "seq", "heads", "projection"), $output
                    ]),
                )
                """,
            ),
        ],
        "build_gpt_neox_feedforward": [
            (
                "pz.nn.Elementwise(act_fn)",
                """
                pz.nn.Sequential([
                    Tag("mlp_pre", "batch", "seq", "neurons"),
                    pz.nn.Elementwise(act_fn),
                    Tag("mlp_post", "batch", "seq", "neurons"),
                ])
                """,
            ),
        ],
    },
    names={"Tag": penzai_layers.Tag, "InLayer": penzai_layers.InLayer},
)

MENDS = Patcher(
    MODULE,
    {
        "build_gpt_neox_transformer": [
            (
                """
                pz.nn.LayerNorm.from_config(
                    name=$n, init_base_rng=$r, across_axes=$a, dtype=config.parameter_dtype
                )
                """,
                """
                pz.nn.LayerNorm.from_config(
                    name=$n, init_base_rng=$r, across_axes=$a, epsilon=config.layernorm_epsilon,
                    dtype=config.parameter_dtype
                )
                """,
            ),
        ],
    },
)

# What the patches were written against: Penzai 0.2.5.
DIGESTS = {
    "build_gpt_neox_transformer": "094036d6fe97209d7100249fa1533c7b3b1d20ab806b55c5d0797728423ab8f8",
    "build_gpt_neox_block": "86f3cdca60215c94b3ab57dfcf2ea04ec7e40e3dd5d8af8040e23795cfc6631f",
    "build_gpt_neox_attention": "fd49094c10a6953cfe831cdbf16361f75a51a1341a5f87477d6fb86ead2fe0c7",
    "build_gpt_neox_feedforward": "c3db9ff6495c45d5d7583fb115d5a9a316804b1b73b2718bd1365459378b4ec7",
}

VERSIONS = {"penzai": ">=0.2.5,<0.3"}
PATCH_SET = PatchSet(
    "penzai_gpt_neox",
    tags=(TAGS,),
    mends=(MENDS,),
    versions=VERSIONS,
    upstream={f"{MODULE}:{member}": digest for member, digest in DIGESTS.items()},
)
STACKED_PATCH_SET = dataclasses.replace(
    PATCH_SET,
    name="penzai_gpt_neox (stacked)",
    tags=(TAGS, penzai_layers.SCANNED_LAYERS),
    mends=(MENDS, penzai_layers.ROLLED),
    upstream={**PATCH_SET.upstream, **penzai_layers.DIGESTS},
)

# The axes of Penzai's parameters as they lie in memory, by their labels in the model, and by those within a block.
AXES: Mapping[str, tuple[str, ...]] = {
    "embedder.embeddings": ("vocabulary", "embedding"),
    "final_norm/scale.weights": ("embedding",),
    "final_norm/shift.bias": ("embedding",),
    "lm_head.weights": ("vocabulary", "embedding"),
}
BLOCK_AXES: Mapping[str, tuple[str, ...]] = {
    "pre_attention_norm/scale.weights": ("embedding",),
    "pre_attention_norm/shift.bias": ("embedding",),
    "attention/query/Linear.weights": ("heads", "projection", "embedding"),
    "attention/query/AddBias.bias": ("heads", "projection"),
    "attention/key/Linear.weights": ("heads", "projection", "embedding"),
    "attention/key/AddBias.bias": ("heads", "projection"),
    "attention/value/Linear.weights": ("heads", "projection", "embedding"),
    "attention/value/AddBias.bias": ("heads", "projection"),
    "attention/output/Linear.weights": ("embedding", "heads", "projection"),
    "attention/output/AddBias.bias": ("embedding",),
    "pre_ffw_norm/scale.weights": ("embedding",),
    "pre_ffw_norm/shift.bias": ("embedding",),
    "mlp/in/Linear.weights": ("neurons", "embedding"),
    "mlp/in/AddBias.bias": ("neurons",),
    "mlp/out/Linear.weights": ("embedding", "neurons"),
    "mlp/out/AddBias.bias": ("embedding",),
}


def from_checkpoint(
    checkpoint: Checkpoint, *, dtype: Any = "float32", stacked: bool = False, sharding: Placement | None = None
) -> LanguageModel:
    """A `LanguageModel` from the files of a GPT-NeoX.

    Args:
        checkpoint: Configuration, weights and tokenizer in the Hugging Face convention.
        dtype: Of parameters and computation: float32 or bfloat16.
        stacked: Whether the layers are one `LayerStack`, run as a scan.
        sharding: Where the parameters go; see `interp_jax.models.loading.load`.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: A configuration that upstream's code does not compute.
        LoadError: Weights that do not fit the configuration.
        InvalidInputError: Upstream does not compute in this dtype.
        PatchError: Penzai is not installed, or in a version the patches are not for.
    """
    PATCH_SET.require_version()
    checkpoint.check_config(handled=HANDLED_KEYS, ignorable=IGNORABLE_KEYS)
    given = {key: value for key in HANDLED_KEYS if (value := checkpoint.config.get(key)) is not None}
    fraction, base = given.setdefault("rotary_pct", 0.25), given.setdefault("rotary_emb_base", 10000)
    transformers_flax.check_values(
        checkpoint,
        required=REQUIRED_KEYS,
        allowed={
            "hidden_act": tuple(ACTIVATIONS),
            "use_parallel_residual": (True,),
            "attention_bias": (True,),
            "rope_scaling": ({"rope_type": "default"}, {"type": "default"}),
            # Newer files say these twice.
            "partial_rotary_factor": (fraction,),
            "rope_theta": (base,),
        },
        divides=[("num_attention_heads", "hidden_size")],
        upstream="Penzai's GPT-NeoX",
    )
    dtype = transformers_flax.dtype_name_but_float16(dtype, upstream="Penzai", where="Penzai's GPT-NeoX")
    upstream, config = _build(json.dumps(given, sort_keys=True), dtype, stacked)
    # Old files hold each layer's mask and rotary frequencies as tensors.
    buffers = ("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq")
    return transformers_flax.read(
        checkpoint, upstream, config, buffers=buffers, unembedding="embed_out.weight", sharding=sharding
    )


# One Upstream per configuration, so that a model loaded twice compiles once.
@functools.lru_cache(maxsize=16)
def _build(settings: str, dtype: str, stacked: bool) -> tuple[Upstream, ModelConfig]:
    given = json.loads(settings)
    config = ModelConfig(
        family="gpt_neox",
        n_layers=given["num_hidden_layers"],
        d_model=given["hidden_size"],
        n_heads=given["num_attention_heads"],
        n_kv_heads=given["num_attention_heads"],
        d_head=given["hidden_size"] // given["num_attention_heads"],
        d_mlp=given["intermediate_size"],
        d_vocab=given["vocab_size"],
        n_ctx=given["max_position_embeddings"],
        activation=given.get("hidden_act", "gelu"),
        is_gated=False,
        is_tied=given.get("tie_word_embeddings", False),
        norm="layernorm",
        norm_eps=given["layer_norm_eps"],
        rope_theta=given["rotary_emb_base"],
        dtype=dtype,
        is_parallel=True,
    )
    patch_set = STACKED_PATCH_SET if stacked else PATCH_SET
    n_rotary = int(given["rotary_pct"] * config.d_head)
    layers = _layers(config, stacked)
    upstream = Upstream(
        name="penzai_gpt_neox",
        patch_set=patch_set,
        weights=_weights(config),
        layer_weights=_layer_weights(),
        layout=lambda: _layout(config, stacked),
        restacked=lambda: _build(settings, dtype, not stacked)[0],
        **layers.functions(),
        **_functions(config, n_rotary, patch_set, stacked),
    )
    return upstream, config


def unbound_model(config: ModelConfig, n_rotary: int, patchers: Sequence[Patcher], *, stacked: bool) -> Any:
    """Penzai's model as its builder makes it under some patchers, with slots where the parameters go.

    Args:
        config: Its shape.
        n_rotary: How many components of a head are turned by position.
        patchers: The patchers in force while it is built.
        stacked: Whether its layers are a `LayerStack`.

    Returns:
        A `penzai.models.transformer.model_parts.TransformerLM`.
    """
    from penzai.models.transformer.variants import gpt_neox

    dtype = jnp.dtype(config.dtype)
    penzai_config = gpt_neox.GPTNeoXTransformerConfig(
        num_attention_heads=config.n_heads,
        embedding_dim=config.d_model,
        projection_dim=config.d_head,
        mlp_hidden_dim=config.d_mlp,
        num_decoder_blocks=config.n_layers,
        vocab_size=config.d_vocab,
        activation_fn=ACTIVATIONS[config.activation],  # type: ignore[arg-type]
        rope_subset_size=n_rotary,
        rope_wavelength=config.rope_theta or 0.0,
        layernorm_epsilon=config.norm_eps,
        parameter_dtype=dtype,
        activation_dtype=dtype,
        use_layer_stack=stacked,
    )
    with transformers_flax.upstream_rules(patchers):
        return gpt_neox.build_gpt_neox_transformer(penzai_config)


def parameters(params: Any, config: ModelConfig, *, stacked: bool) -> list[Any]:
    """Penzai's named parameters, from arrays in our layout.

    Args:
        params: The arrays.
        config: The model's shape.
        stacked: Whether those of the layers have a leading layer axis.

    Returns:
        A `penzai.pz.ParameterValue` for each slot of the model.
    """
    from penzai import pz

    held = params["transformer"]
    blocks = {"blocks": held["blocks"]} if stacked else {f"block_{i}": block for i, block in held["blocks"].items()}
    stack_axis = ("blocks",) if stacked else ()
    arrays = {label: (held[label], axes) for label, axes in AXES.items() if label in held}
    if config.is_tied:
        arrays["lm_head.weights"] = (held["embedder.embeddings"], AXES["lm_head.weights"])
    for name, block in blocks.items():
        arrays |= {f"{name}/{label}": (block[label], (*stack_axis, *axes)) for label, axes in BLOCK_AXES.items()}
    return [
        pz.ParameterValue(value=pz.nx.wrap(array, *axes), label=f"transformer/{label}")
        for label, (array, axes) in arrays.items()
    ]


def _functions(config: ModelConfig, n_rotary: int, patch_set: PatchSet, stacked: bool) -> dict[str, Callable[..., Any]]:
    """The functions of the `Upstream`: Penzai's own model, bound to parameters at each trace."""
    from penzai import pz

    tagged = unbound_model(config, n_rotary, patch_set.patchers, stacked=stacked)
    plain = unbound_model(config, n_rotary, patch_set.mends, stacked=stacked)

    def bound(model: Any, params: Any) -> Any:
        return pz.bind_variables(model, parameters(params, config, stacked=stacked))

    def running(model: Any) -> Callable[[Any, Any], jax.Array]:
        def forward(params: Any, tokens: Any) -> jax.Array:
            ids, mask, positions = transformers_flax.read_tokens(tokens)
            logits = bound(model, params)(_named(ids), token_positions=_named(jnp.where(mask, positions, -1)))
            return logits.unwrap("batch", "seq", "vocabulary")

        return forward

    def caching(batch: int, length: int) -> tuple[Any, tuple[Any, ...]]:
        """The body of Penzai's model with key-value caches, and the empty caches."""
        from penzai.models.transformer.sampling_mode import KVCachingTransformerLM

        cached = KVCachingTransformerLM.from_uncached(tagged, cache_len=length, batch_axes={"batch": batch})
        return pz.unbind_state_vars(cached.body, freeze=True)

    def init_cache(batch: int, length: int) -> KVCache:
        _, empty = caching(batch, length)
        layers = [jax.tree.leaves(variable.value) for variable in empty]
        return KVCache(layers, jnp.zeros((batch, length), bool), jnp.int32(0))

    def step(params: Any, cache: KVCache, tokens: Any) -> tuple[jax.Array, KVCache]:
        ids, new_mask, positions = transformers_flax.read_tokens(
            tokens, cache.mask.sum(axis=1, keepdims=True, dtype=jnp.int32)
        )
        mask = lax.dynamic_update_slice(cache.mask, new_mask, (0, cache.length))
        body, empty = caching(*cache.mask.shape)
        filled = [
            dataclasses.replace(variable, value=jax.tree.unflatten(jax.tree.structure(variable.value), leaves))
            for variable, leaves in zip(empty, cache.layers, strict=True)
        ]
        logits, changed = bound(body, params).stateless_call(
            filled,
            _named(ids),
            token_positions=_named(jnp.where(new_mask, positions, -1)),
            kv_token_positions=_named(jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)),
            cache_end_index=cache.length,
        )
        layers = [
            jax.tree.leaves(pz.nx.order_like(new.value, old.value)) for new, old in zip(changed, filled, strict=True)
        ]
        return logits.unwrap("batch", "seq", "vocabulary"), KVCache(layers, mask, cache.length + tokens.shape[1])

    def part(index: int, out_axis: str) -> Callable[[Any, Any], Any]:
        def run(params: Any, value: Any) -> jax.Array:
            layer = bound(plain, params).body.sublayers[index]
            return layer(_named(value, "embedding")).unwrap("batch", "seq", out_axis)

        return run

    under = transformers_flax.under
    return {
        "forward": under(patch_set.patchers, running(tagged), name="gpt_neox.forward"),
        "untagged": under(patch_set.mends, running(plain), name="gpt_neox.forward"),
        "step": under(patch_set.patchers, step, name="gpt_neox.step"),
        "init_cache": init_cache,
        "ln_final": under((), part(-2, "embedding"), name="gpt_neox.ln_final"),
        "unembed": under((), part(-1, "vocabulary"), name="gpt_neox.unembed"),
    }


def _named(array: Any, *more_axes: str) -> Any:
    """A `NamedArray` of the axes batch, seq and those given."""
    from penzai import pz

    return pz.nx.wrap(array, "batch", "seq", *more_axes)


def _layers(config: ModelConfig, stacked: bool) -> transformers_stacked.Layers:
    return transformers_stacked.Layers(("transformer", "blocks"), config.n_layers, stacked)


def _layout(config: ModelConfig, stacked: bool) -> dict[str, Any]:
    """Penzai's parameters, as the tensors of transformers' torch GPT-NeoX; q, k and v are fused head by head there."""
    d_model, d_mlp, n_heads, d_head = config.d_model, config.d_mlp, config.n_heads, config.d_head
    names = transformers_stacked.Names(_layers(config, stacked))

    def norm(label: str, name: str) -> dict[str, Stored]:
        return {
            f"{label}/scale.weights": names.array(f"{name}.weight", d_model),
            f"{label}/shift.bias": names.array(f"{name}.bias", d_model),
        }

    def part(name: str, i: int) -> dict[str, Stored]:
        return {
            "Linear.weights": names.array(
                f"{name}.weight",
                3 * d_model,
                d_model,
                view=lambda tensor: tensor.reshape(n_heads, 3, d_head, d_model)[:, i],
            ),
            "AddBias.bias": names.array(
                f"{name}.bias", 3 * d_model, view=lambda tensor: tensor.reshape(n_heads, 3, d_head)[:, i]
            ),
        }

    def block(at: str) -> dict[str, Stored]:
        parts = {name: part(f"{at}.attention.query_key_value", i) for i, name in enumerate(("query", "key", "value"))}
        dense = f"{at}.attention.dense"
        heads: Callable[[Any], Any] = lambda tensor: tensor.reshape(d_model, n_heads, d_head)  # noqa: E731
        return {
            **norm("pre_attention_norm", f"{at}.input_layernorm"),
            **{f"attention/{name}/{label}": one for name, both in parts.items() for label, one in both.items()},
            "attention/output/Linear.weights": names.array(f"{dense}.weight", d_model, d_model, view=heads),
            "attention/output/AddBias.bias": names.array(f"{dense}.bias", d_model),
            **norm("pre_ffw_norm", f"{at}.post_attention_layernorm"),
            "mlp/in/Linear.weights": names.array(f"{at}.mlp.dense_h_to_4h.weight", d_mlp, d_model),
            "mlp/in/AddBias.bias": names.array(f"{at}.mlp.dense_h_to_4h.bias", d_mlp),
            "mlp/out/Linear.weights": names.array(f"{at}.mlp.dense_4h_to_h.weight", d_model, d_mlp),
            "mlp/out/AddBias.bias": names.array(f"{at}.mlp.dense_4h_to_h.bias", d_model),
        }

    params = {
        "embedder.embeddings": names.array("gpt_neox.embed_in.weight", config.d_vocab, d_model),
        "blocks": names.layers(block, "gpt_neox.layers.{}"),
        **norm("final_norm", "gpt_neox.final_layer_norm"),
    }
    if not config.is_tied:
        params["lm_head.weights"] = names.array("embed_out.weight", config.d_vocab, d_model)
    return {"transformer": params}


def _weights(config: ModelConfig) -> dict[str, Any]:
    """Weights outside the layers under canonical names."""
    unembedding = "embedder.embeddings" if config.is_tied else "lm_head.weights"
    return {
        "W_E": lambda params: params["transformer"]["embedder.embeddings"],
        "W_U": lambda params: params["transformer"][unembedding].T,
        "ln_final_w": lambda params: params["transformer"]["final_norm/scale.weights"],
        "ln_final_b": lambda params: params["transformer"]["final_norm/shift.bias"],
    }


def _layer_weights() -> dict[str, Any]:
    """One layer's weights under canonical names."""

    def turned(label: str, *axes: int) -> Callable[[Any], Any]:
        return lambda block: block[label].transpose(axes)

    def same(label: str) -> Callable[[Any], Any]:
        return lambda block: block[label]

    return {
        "ln1_w": same("pre_attention_norm/scale.weights"),
        "ln1_b": same("pre_attention_norm/shift.bias"),
        "W_Q": turned("attention/query/Linear.weights", 0, 2, 1),
        "W_K": turned("attention/key/Linear.weights", 0, 2, 1),
        "W_V": turned("attention/value/Linear.weights", 0, 2, 1),
        "W_O": turned("attention/output/Linear.weights", 1, 2, 0),
        "b_Q": same("attention/query/AddBias.bias"),
        "b_K": same("attention/key/AddBias.bias"),
        "b_V": same("attention/value/AddBias.bias"),
        "b_O": same("attention/output/AddBias.bias"),
        "ln2_w": same("pre_ffw_norm/scale.weights"),
        "ln2_b": same("pre_ffw_norm/shift.bias"),
        "W_in": turned("mlp/in/Linear.weights", 1, 0),
        "b_in": same("mlp/in/AddBias.bias"),
        "W_out": turned("mlp/out/Linear.weights", 1, 0),
        "b_out": same("mlp/out/AddBias.bias"),
    }
