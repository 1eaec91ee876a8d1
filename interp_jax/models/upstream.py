"""What `LanguageModel` knows of the code it runs: a configuration, and pure functions of parameters.

A model family somebody else wrote is known here only as an `Upstream`: its forward pass, the same pass with a
key-value cache, its final norm and unembedding, and how to read its weights under canonical names. Each function
runs upstream's own code, so nothing above this line depends on Flax, transformers or a family's parameter names.

>>> def forward(params, tokens):
...     return jax.nn.one_hot(tokens, 3) @ params["W_E"] @ params["W_U"]
>>> bigram = Upstream(name="bigram", forward=forward, weights={"W_E": lambda params: params["W_E"]})
>>> bigram.weight_names
('W_E',)

Sharp edges: only `forward` is required. What else is None is refused, with a reason, by the methods of
`LanguageModel` that need it. The functions should be made once per configuration, since compiled programs are kept
per function.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

PAD = -1
"""The token that is no token: padding, on either side of a row. The mask is `tokens >= 0`."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer, in this package's words whatever upstream calls it.

    Args:
        family: The upstream family, "llama" or "gpt2".
        n_layers: Number of layers.
        d_model: Width of the residual stream.
        n_heads: Number of query heads per layer.
        n_kv_heads: Number of key and value heads per layer; fewer than `n_heads` under grouped-query attention.
        d_head: Size of a head.
        d_mlp: Width of the MLP.
        d_vocab: Number of rows of the embedding.
        n_ctx: Most tokens the model can read.
        activation: Name of the MLP's nonlinearity, such as "silu" or "gelu_new".
        is_gated: Whether the nonlinearity gates a linear branch (`mlp_gate`, `mlp_pre`).
        is_tied: Whether the unembedding is the embedding.
        norm: "rmsnorm", "layernorm" or "none".
        norm_eps: What is added to the variance.
        rope_theta: The rotary base, None with learned positions.
        dtype: Name of the dtype of parameters and computation.
        window: How many positions, its own included, a token can look at; None for all before it. A tuple when the
            layers differ.
        is_parallel: Whether attention and MLP both read `resid_pre`, so that there is no `resid_mid`.
        score_cap: What keeps attention scores small: the softmax reads cap * tanh(score / cap). None without.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    activation: str
    is_gated: bool
    is_tied: bool
    norm: str
    norm_eps: float
    rope_theta: float | None
    dtype: str
    window: int | tuple[int | None, ...] | None = None
    is_parallel: bool = False
    score_cap: float | None = None

    def window_of(self, layer: int) -> int | None:
        """The window of one `layer`."""
        return self.window[layer] if isinstance(self.window, tuple) else self.window


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens a model has read so far.

    Args:
        layers: Upstream's own cache, room for `mask.shape[1]` tokens.
        mask: True where a token has been read, false at padding and in the room still free, `[batch, pos]`.
        length: How many columns of `mask` are used, padding included.
    """

    layers: Any
    mask: jax.Array
    length: jax.Array


jax.tree_util.register_dataclass(KVCache, data_fields=["layers", "mask", "length"], meta_fields=[])


@dataclass(frozen=True, eq=False)
class Upstream:
    """A model family's own code as pure functions, each run under its patch set.

    Args:
        name: Name of the module in `patches/`, for error messages and provenance.
        forward: `(params, tokens[batch, pos]) -> logits[batch, pos, d_vocab]`; padding is a negative token.
        patch_set: The patch set `forward` runs under, None when the model carries its tags in its own code.
        untagged: `forward` without the tags (but with everything else), to prove that tags change nothing.
        step: `(params, cache, tokens) -> (logits, cache)`: the tokens that follow those in the cache.
        init_cache: `(batch, length) -> KVCache`, empty, with room for `length` tokens.
        ln_final: `(params, residual) -> normalised`: the norm before the unembedding.
        unembed: `(params, normalised) -> logits`.
        weights: Canonical name to `(params) -> array`, for weights outside the layers.
        layer_weights: Canonical name to `(layer's params) -> array`.
        layer_params: `(params, layer) -> layer's params`.
        layout: `() -> pytree in the form of the parameters` that says which tensor of a Hugging Face directory each
            of them is (see `interp_jax.models.weights.layout`).
        stacked_layers: `(params) -> stacked subtrees`, as many as there are kinds of layers that alternate. None when
            the layers are not stacked.
        restacked: The same model with its layers stacked, or no longer stacked if they are.
        restack: `(params, donate=False) -> params` of `restacked`; with `donate`, the layers given are deleted.
    """

    name: str
    forward: Callable[[Any, Any], jax.Array]
    patch_set: Any = None
    untagged: Callable[[Any, Any], jax.Array] | None = None
    step: Callable[[Any, KVCache, Any], tuple[jax.Array, KVCache]] | None = None
    init_cache: Callable[[int, int], KVCache] | None = None
    ln_final: Callable[[Any, Any], jax.Array] | None = None
    unembed: Callable[[Any, Any], jax.Array] | None = None
    weights: Mapping[str, Callable[[Any], jax.Array]] = field(default_factory=dict)
    layer_weights: Mapping[str, Callable[[Any], jax.Array]] = field(default_factory=dict)
    layer_params: Callable[[Any, int], Any] | None = None
    layout: Callable[[], Any] | None = None
    stacked_layers: Callable[[Any], tuple[Any, ...]] | None = None
    restacked: Callable[[], Upstream] | None = None
    restack: Callable[..., Any] | None = None

    @property
    def is_stacked(self) -> bool:
        """Whether the layers are held as one subtree and run as a scan."""
        return self.stacked_layers is not None

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Canonical names of the weights this family has."""
        return (*self.weights, *self.layer_weights)
