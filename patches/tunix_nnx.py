"""What Tunix's NNX families have in common: modules as pure functions, the loop over layers, masks and caches.

An NNX module holds its parameters. Here it is split once into a description and a state: the parameters are a plain
pytree of arrays, and at each trace the description is merged with them. Stacked, the description is that of a model
with one layer, whose arrays have a leading layer axis, and the loop over layers is a scan. Numbers in which layers
differ, such as windows, are then arrays of that layer too, and the scan takes them along as it does the parameters.

>>> before, after = LAYER_LOOP
>>> print(after)
for i, layer in enumerate(self.layers):
    with layer_scope(i):
        $$body

Sharp edges: importing any module of Tunix imports all of Tunix, which takes seconds, and turns off Flax's automatic
sharding of variables for the whole process. Tunix masks with -2.4e38, which float16 does not hold: refused.

Source: tunix.models.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import KVCache, ModelConfig, Upstream
from interp_jax.patches import transformers_flax, transformers_stacked
from interp_jax.transforms.layer_stack import scan_layers

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint
    from interp_jax.models.weights.layout import Placement
    from interp_jax.transforms.patcher import PatchSet

# 0.1.6 changed the models; 0.1.5 is the first release with Gemma 3 as it is here.
VERSIONS = {"google-tunix": ">=0.1.5,<0.1.6", "flax": ">=0.12"}

# The loop over layers, as a tag and as a scan.
LAYER_LOOP = (
    """\
for i, layer in enumerate(self.layers):
    $$body""",
    """\
for i, layer in enumerate(self.layers):
    with layer_scope(i):
        $$body""",
)
LAYER_SCAN = (
    """
    for i, layer in enumerate(self.layers):
        layer_name = f'layer_{i}'
        layer_cache = cache[layer_name] if cache else None
        layer_cache, x = $call
        if cache is not None:
            new_cache[layer_name] = layer_cache
    """,
    """
    x, new_cache = scan_module(self.layers[0], x, cache, lambda layer, x, layer_cache: $call)
    """,
)
# As Gemma writes it.
LAYER_SCAN_SCOPED = (
    """
    for i, layer in enumerate(self.layers):
        layer_name = f'layer_{i}'
        layer_cache = cache[layer_name] if cache else None
        with jax.named_scope(layer_name):
            layer_cache, x = $call
        if cache is not None:
            new_cache[layer_name] = layer_cache
    """,
    LAYER_SCAN[1],
)

# A mend: JAX is doing away with what Tunix asks for the mesh, and says what to ask instead.
MESH = ("mesh = pxla.thread_resources.env.physical_mesh", "mesh = jax.sharding.get_abstract_mesh()")


def scan_module(module: Any, x: Any, cache: Any, call: Callable[[Any, Any, Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Run stacked layers as a scan.

    Args:
        module: The layers as one module, whose arrays have a leading layer axis.
        x: What the first layer gets.
        cache: The stacked cache as "layer_0", or None.
        call: `(module, x, layer's cache) -> (layer's cache, x)`, upstream's own call of a layer.

    Returns:
        What the last layer returns, and the cache.
    """
    from flax import nnx

    graph, states = nnx.split(module)

    def run(x: Any, layer: Any) -> tuple[Any, Any]:
        state, layer_cache = layer
        layer_cache, x = call(nnx.merge(graph, state), x, layer_cache)
        return x, layer_cache

    x, new = scan_layers(run, x, (states, None if cache is None else cache["layer_0"]))
    return x, None if cache is None else {"layer_0": new}


def visible(mask: Any, start: Any, n_queries: int) -> jax.Array:
    """Where queries may look.

    Args:
        mask: True at tokens, `[batch, key]`.
        start: The column of the first query.
        n_queries: How many there are.

    Returns:
        True where there is a token that is not later, `[batch, query, key]`.
    """
    causal = jnp.arange(mask.shape[1])[None, :] <= start + jnp.arange(n_queries)[:, None]
    return causal[None] & mask[:, None, :]


@dataclasses.dataclass(frozen=True)
class Family:
    """What the functions of an `Upstream` need to know of a Tunix family.

    Args:
        name: The name of its module in `patches/`.
        module: The name of its module in Tunix.
        class_name: The class of its model there.
        make_config: `(Tunix's module, our config, number of layers) -> Tunix's config`.
        norm: The name of a norm's parameter.
        ties: Whether upstream can tie the unembedding to the embedding. If it cannot, a tied model is built without
            its unembedding, and a mend has it use the embedding.
        weights: `(config) -> canonical weights of a layer`.
        tensors: `(config, layers) -> the parameters as tensors of a Hugging Face directory`.
        gain: A norm's parameter to the gain it stands for.
        differences: `(config) -> numbers, one for each layer, by the attribute of the layer's attention that they are`:
            in what layers differ beside their parameters.
    """

    name: str
    module: str
    class_name: str
    make_config: Callable[[Any, ModelConfig, int], Any]
    norm: str
    ties: bool
    weights: Callable[[ModelConfig], dict[str, Any]]
    tensors: Callable[[ModelConfig, transformers_stacked.Layers], dict[str, Any]]
    gain: Callable[[Any], Any] = lambda parameter: parameter
    differences: Callable[[ModelConfig], Mapping[str, Any]] = lambda config: {}

    def unbound(self, config: ModelConfig, n_layers: int) -> tuple[Any, Any]:
        """Upstream's model without its parameters: the description, and an abstract state.

        Args:
            config: The model's shape.
            n_layers: How many layers to build.

        Returns:
            What `flax.nnx.merge` wants, the arrays replaced by their shapes.
        """
        from flax import nnx

        upstream = importlib.import_module(self.module)

        def make() -> Any:
            model = getattr(upstream, self.class_name)(self.make_config(upstream, config, n_layers), rngs=nnx.Rngs(0))
            if config.is_tied and not self.ties:
                del model.lm_head
            return model

        return nnx.split(nnx.eval_shape(make))


def bound(unbound: tuple[Any, Any], params: Any) -> Any:
    """Upstream's model with its parameters.

    Args:
        unbound: What `Family.unbound` returned.
        params: The parameters, the layers' by their numbers as strings.

    Returns:
        The NNX module.
    """
    from flax import nnx

    graph, state = unbound
    numbered = {**params, "layers": {int(number): layer for number, layer in params["layers"].items()}}
    leaves = jax.tree.leaves(numbered)
    assert jax.tree.structure(numbered) == jax.tree.structure(nnx.to_pure_dict(state))
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))


def _let_differ(attention: Any, differences: Mapping[str, Any]) -> None:
    """Give the attention of a stacked layer arrays for attributes that upstream's `__init__` sets to one number."""
    from flax import nnx

    for name, numbers in differences.items():
        setattr(attention, name, nnx.data(jnp.asarray(numbers)))


def upstream_of(
    family: Family, config: ModelConfig, patch_set: PatchSet, *, stacked: bool, restacked: Callable[[], Upstream]
) -> Upstream:
    """What `LanguageModel` knows of a Tunix model.

    Args:
        family: Its family.
        config: Its shape.
        patch_set: Its patch set for this layout of the layers.
        stacked: Whether the layers are stacked.
        restacked: The same in the other layout.

    Returns:
        Its functions.
    """
    layers = transformers_stacked.Layers(("layers",), config.n_layers, stacked)
    n_modules, short = 1 if stacked else config.n_layers, family.name.removeprefix("tunix_")
    unbound = family.unbound(config, n_modules)

    def model(params: Any) -> Any:
        if not stacked:
            return bound(unbound, params)
        whole = bound(unbound, {**params, "layers": {"0": params["layers"]}})
        _let_differ(whole.layers[0].attn, family.differences(config))
        return whole

    def forward(params: Any, tokens: Any) -> jax.Array:
        ids, mask, positions = transformers_flax.read_tokens(tokens)
        return model(params)(ids, positions, None, visible(mask, 0, ids.shape[1]))[0]

    def step(params: Any, cache: KVCache, tokens: Any) -> tuple[jax.Array, KVCache]:
        ids, new_mask, positions = transformers_flax.read_tokens(
            tokens, cache.mask.sum(axis=1, keepdims=True, dtype=jnp.int32)
        )
        mask = lax.dynamic_update_slice(cache.mask, new_mask, (0, cache.length))
        seen = visible(mask, cache.length, ids.shape[1])
        logits, held = model(params)(ids, positions, cache.layers, seen)
        return logits, KVCache(held, mask, cache.length + ids.shape[1])

    def init_cache(batch: int, length: int) -> KVCache:
        lead = (config.n_layers,) if stacked else ()
        values = jnp.zeros((*lead, batch, length, config.n_kv_heads, config.d_head), config.dtype)
        layer = {"k": values, "v": values, "end_index": jnp.zeros((*lead, batch), jnp.int32)}
        held = {f"layer_{i}": dict(layer) for i in range(n_modules)}
        return KVCache(held, jnp.zeros((batch, length), bool), jnp.int32(0))

    def unembed(params: Any, normalised: Any) -> jax.Array:
        whole = model(params)
        return whole.lm_head(normalised) if hasattr(whole, "lm_head") else whole.embedder.decode(normalised)

    under = transformers_flax.under
    return Upstream(
        name=family.name,
        patch_set=patch_set,
        forward=under(patch_set.patchers, forward, name=f"{short}.forward"),
        untagged=under(patch_set.mends, forward, name=f"{short}.forward"),
        step=under(patch_set.patchers, step, name=f"{short}.step"),
        init_cache=init_cache,
        ln_final=under(
            patch_set.mends, lambda params, value: model(params).final_norm(value), name=f"{short}.ln_final"
        ),
        unembed=under(patch_set.mends, unembed, name=f"{short}.unembed"),
        weights=_weights(family, config),
        layer_weights=family.weights(config),
        layout=lambda: family.tensors(config, layers),
        restacked=restacked,
        **layers.functions(),
    )


def _weights(family: Family, config: ModelConfig) -> dict[str, Any]:
    """Weights outside the layers under canonical names."""

    def unembedding(params: Any) -> Any:
        return params["embedder"]["input_embedding"].T if config.is_tied else params["lm_head"]["w"]

    return {
        "W_E": lambda params: params["embedder"]["input_embedding"],
        "W_U": unembedding,
        "ln_final_w": lambda params: family.gain(params["final_norm"][family.norm]),
    }


def read(
    checkpoint: Checkpoint, upstream: Upstream, config: ModelConfig, *, sharding: Placement | None = None
) -> LanguageModel:
    """The model of a `checkpoint` whose `config` has been checked: `upstream` its functions, `sharding` its place."""
    return transformers_flax.read(
        checkpoint, upstream, config, buffers=("*.rotary_emb.inv_freq",), prefix="model.", sharding=sharding
    )


def dtype_name(dtype: Any) -> str:
    """The name of a `dtype`, once it is known to hold what Tunix masks with; `InvalidInputError` if it does not."""
    return transformers_flax.dtype_name_but_float16(dtype, upstream="Tunix", where="a model of Tunix")
