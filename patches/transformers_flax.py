"""What the Flax families of transformers (4.x) have in common: how their modules are called, cached and mended.

A family's own file holds its patches, its configuration keys and its names of weights; everything its modules share
(the call signature, the layout of the key-value cache, the full-size causal mask of every layer) is here.

>>> before, after = NO_MASK_IN_SETUP
>>> after
'self.causal_mask = None'

Sharp edges: upstream's code is written for JAX's default promotion rules and gets them, whatever the session's are.
Padding is a negative token: it is embedded as token 0 at position 0 and masked, so what it holds is meaningless but
finite, and no other position sees it.

Source: transformers.modeling_flax_utils and the modeling_flax files of the families.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.core.errors import InvalidInputError, UnsupportedModelError, four_part
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import KVCache, ModelConfig, Upstream
from interp_jax.models.weights import layout
from interp_jax.transforms.greenlets import local_context

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint
    from interp_jax.models.weights.layout import Placement
    from interp_jax.transforms.patcher import Patcher

DTYPES = ("float32", "bfloat16", "float16", "float64")

# Mends: each layer would build, and hold as a constant, a causal mask of n_ctx x n_ctx.
NO_MASK_IN_SETUP = (
    'self.causal_mask = make_causal_mask(jnp.ones((1, config.max_position_embeddings), dtype="bool"), dtype="bool")',
    "self.causal_mask = None",
)
MASK_BLOCK_IN_CALL = (
    (
        "lax.dynamic_slice(self.causal_mask, (0, 0, mask_shift, 0), (1, 1, query_length, max_decoder_length))",
        "(jnp.arange(max_decoder_length)[None, :] <= mask_shift + jnp.arange(query_length)[:, None])[None, None]",
    ),
    (
        "self.causal_mask[:, :, :query_length, :key_length]",
        "(jnp.arange(key_length)[None, :] <= jnp.arange(query_length)[:, None])[None, None]",
    ),
)


@contextlib.contextmanager
def upstream_rules(patchers: Sequence[Patcher] = ()) -> Iterator[None]:
    """Context in which upstream's code runs: JAX's default promotion rules, and these patchers in place."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        for patcher in patchers:
            stack.enter_context(patcher)
        yield


def under(patchers: Sequence[Patcher], fn: Callable[..., Any], *, name: str) -> Callable[..., Any]:
    """`fn` under another name and these patchers, which are out of force while a running pass is paused inside it."""
    patchers = tuple(patchers)

    def patched(*args: Any) -> Any:
        with local_context(lambda: upstream_rules(patchers)):
            return fn(*args)

    patched.__name__ = patched.__qualname__ = name
    return patched


def read_tokens(tokens: Any, n_before: Any = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token ids, mask and position ids as upstream wants them, from tokens with padding.

    Args:
        tokens: Token ids, negative at padding, `[batch, pos]`.
        n_before: Number of tokens each row has read before these, `[batch, 1]` or 0.

    Returns:
        Ids, mask (true at tokens) and positions (counted from 0 over the tokens of the row), each `[batch, pos]`.
    """
    mask = tokens >= 0
    positions = n_before + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    return jnp.maximum(tokens, 0), mask, jnp.maximum(positions, 0)


def pure_functions(
    module: Any,
    *,
    name: str,
    tags: Sequence[Patcher],
    mends: Sequence[Patcher],
    ln_final: Callable[[Any, Any], Any],
    unembed: Callable[[Any, Any], Any],
    empty_cache: Callable[[int, int], Any],
) -> dict[str, Callable[..., Any]]:
    """The functions of an `Upstream`, from a Flax module of transformers.

    Args:
        module: A `...ForCausalLMModule`.
        name: The family's name, for messages.
        tags: The patchers that make the sites.
        mends: The patchers that repair upstream.
        ln_final: `(bound module, residual) -> normalised`.
        unembed: `(bound module, normalised) -> logits`.
        empty_cache: `(batch, length) -> cache` in upstream's own layout.

    Returns:
        `forward`, `untagged`, `step`, `init_cache`, `ln_final` and `unembed`.
    """

    def forward(params: Any, tokens: Any) -> jax.Array:
        ids, mask, positions = read_tokens(tokens)
        return module.apply({"params": params}, ids, attention_mask=mask, position_ids=positions).logits

    def step(params: Any, cache: KVCache, tokens: Any) -> tuple[jax.Array, KVCache]:
        ids, new_mask, positions = read_tokens(tokens, cache.mask.sum(axis=1, keepdims=True, dtype=jnp.int32))
        mask = lax.dynamic_update_slice(cache.mask, new_mask, (0, cache.length))
        out, changed = module.apply(
            {"params": params, "cache": cache.layers},
            ids,
            attention_mask=mask,
            position_ids=positions,
            mutable=["cache"],
        )
        return out.logits, KVCache(changed["cache"], mask, cache.length + tokens.shape[1])

    def init_cache(batch: int, length: int) -> KVCache:
        return KVCache(empty_cache(batch, length), jnp.zeros((batch, length), bool), jnp.int32(0))

    def part(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda params, value: module.apply({"params": params}, value, method=method)

    return {
        "forward": under((*mends, *tags), forward, name=f"{name}.forward"),
        "untagged": under(mends, forward, name=f"{name}.forward"),
        "step": under((*mends, *tags), step, name=f"{name}.step"),
        "init_cache": init_cache,
        "ln_final": under(mends, part(ln_final), name=f"{name}.ln_final"),
        "unembed": under(mends, part(unembed), name=f"{name}.unembed"),
    }


def empty_layer_cache(batch: int, length: int, n_kv_heads: int, d_head: int, dtype: Any) -> dict[str, jax.Array]:
    """One attention layer's part of upstream's key-value cache, `[batch, length, n_kv_heads, d_head]` of a dtype."""
    shape = (batch, length, n_kv_heads, d_head)
    return {
        "cached_key": jnp.zeros(shape, dtype),
        "cached_value": jnp.zeros(shape, dtype),
        "cache_index": jnp.int32(0),
    }


def check_values(
    checkpoint: Checkpoint,
    *,
    required: Collection[str],
    allowed: Mapping[str, Collection[Any]],
    divides: Collection[tuple[str, str]],
    upstream: str = "",
) -> None:
    """Refuse configurations that upstream's code cannot compute.

    Args:
        checkpoint: The model on disk.
        required: Keys that must be there.
        allowed: For some keys, the values upstream's code is right for. A missing key or None passes.
        divides: Pairs of keys of which the first must divide the second.
        upstream: What the code is called; by default transformers' Flax code of the family.

    Raises:
        UnsupportedModelError: A key is missing or has another value.
    """
    missing = sorted(key for key in required if checkpoint.config.get(key) is None)
    if missing:
        raise UnsupportedModelError(
            four_part(
                f"Configuration without {', '.join(missing)}",
                where=checkpoint.source,
                expected=f"a {checkpoint.family} configuration with {', '.join(sorted(required))}.",
                fix="check that config.json is complete and belongs to this model.",
            )
        )
    wrong = {
        key: (value, values)
        for key, values in allowed.items()
        if (value := checkpoint.config.get(key)) is not None and value not in values
    }
    if wrong:
        code = upstream or f"transformers' Flax {checkpoint.family}"
        raise UnsupportedModelError(
            four_part(
                "Configuration with " + ", ".join(f"{key}={value!r}" for key, (value, _) in wrong.items()),
                where=checkpoint.source,
                expected="; ".join(f"{key} to be {_one_of(values)}" for key, (_, values) in wrong.items())
                + f": {code} does not have the other cases.",
                fix="use another model, or teach the family's patch set (a mend) what this setting means.",
            )
        )
    config, odd = checkpoint.config, []
    for part, whole in divides:
        small, large = config.get(part), config.get(whole)
        if small is not None and large is not None and (small < 1 or large % small):
            odd.append((part, whole))
    if odd:
        raise UnsupportedModelError(
            four_part(
                "Configuration with "
                + "; ".join(f"{part}={config[part]} and {whole}={config[whole]}" for part, whole in odd),
                where=checkpoint.source,
                expected="; ".join(f"{part} to divide {whole}" for part, whole in odd) + ".",
                fix="check that config.json belongs to this model.",
            )
        )


def read(
    checkpoint: Checkpoint,
    upstream: Upstream,
    config: ModelConfig,
    *,
    buffers: Collection[str] = (),
    unembedding: str = "lm_head.weight",
    prefix: str = "",
    sharding: Placement | None = None,
) -> LanguageModel:
    """The model of a checkpoint whose configuration has been checked.

    Args:
        checkpoint: The model on disk.
        upstream: Its functions.
        config: Its shape.
        buffers: Names, with globs, of tensors that are in some files and are no parameters.
        unembedding: Name of the tensor that a model with tied embeddings has no use for.
        prefix: What the names in some files begin with and in others do not.
        sharding: Where the parameters go.

    Returns:
        The model.

    Raises:
        LoadError: Weights that do not fit the configuration.
    """
    assert upstream.layout is not None
    ignorable = (*buffers, *((unembedding,) if config.is_tied else ()))
    with checkpoint.intake(ignorable=ignorable, optional_prefix=prefix) as intake:
        params = layout.read(upstream.layout(), intake, dtype=config.dtype, sharding=sharding)
    return LanguageModel(
        config=config,
        params=params,
        upstream=upstream,
        tokenizer=checkpoint.tokenizer,
        source=checkpoint.source,
    )


def unembedding_of(config: ModelConfig, embedding: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """The unembedding of a module whose head takes the embedding as its kernel when they are tied.

    Args:
        config: The model's shape.
        embedding: From the bound module to the embedding, `[d_vocab, d_model]`.

    Returns:
        `(bound module, normalised) -> logits`, as `pure_functions` wants it.
    """

    def unembed(bound: Any, normalised: Any) -> Any:
        if not config.is_tied:
            return bound.lm_head(normalised)
        return bound.lm_head.apply({"params": {"kernel": embedding(bound).T}}, normalised)

    return unembed


def activations() -> tuple[str, ...]:
    """The names of the nonlinearities the installed transformers has for Flax."""
    from transformers.modeling_flax_utils import ACT2FN

    return tuple(ACT2FN)


def dtype_name(dtype: Any) -> str:
    """The name of a parameter dtype, once it is known to be one upstream computes in.

    Args:
        dtype: A dtype or its name.

    Returns:
        One of `DTYPES`.

    Raises:
        InvalidInputError: Anything else.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES or jax.dtypes.canonicalize_dtype(name).name != name:
        raise InvalidInputError(
            four_part(
                f"dtype={name!r} was given",
                where="load",
                names=DTYPES[:3],
                given=name,
                fix="use one of these; float64 needs jax.config.update('jax_enable_x64', True) first.",
            )
        )
    return name


def dtype_name_but_float16(dtype: Any, *, upstream: str, where: str) -> str:
    """The name of a `dtype`, once it is known to hold the -2.4e38 that an `upstream` masks with.

    Args:
        dtype: A dtype or its name.
        upstream: The library.
        where: What is loaded, for the error message.

    Returns:
        "float32" or "bfloat16".

    Raises:
        InvalidInputError: Anything else.
    """
    name = dtype_name(dtype)
    if name == "float16":
        raise InvalidInputError(
            four_part(
                "dtype='float16' was given",
                where=f"load, for {where}",
                expected=f"float32 or bfloat16: {upstream} masks with -2.4e38, which is infinite in float16.",
                fix='load in "bfloat16".',
            )
        )
    return name


def _one_of(values: Collection[Any]) -> str:
    return " or ".join(map(repr, values))
