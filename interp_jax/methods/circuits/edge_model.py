"""A language model as edge methods see it: its edge graph, its norms, and its weights by layer.

What is needed of a model: the sites where its heads and MLPs read and write the residual stream, the heads' weights,
and a norm that `normalised` computes. The model's own code still runs every pass; the norm is needed besides, since
each head is to read a residual of its own.

>>> normalised(jnp.array([3.0, -3.0]), kind="rmsnorm", eps=0.0).tolist()
[1.0, -1.0]
>>> normalised(jnp.array([3.0, 5.0]), kind="layernorm", eps=0.0).tolist()
[-1.0, 1.0]

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import UnsupportedModelError, four_part
from interp_jax.core.sites import Site
from interp_jax.methods.circuits.graph import EdgeGraph
from interp_jax.models.upstream import ModelConfig, Upstream

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

NORMS = ("rmsnorm", "layernorm", "none")


@dataclass(frozen=True)
class EdgeModel:
    """A model as the passes here see it; hashable, so that compiled programs are kept per model family and shape.

    Args:
        upstream: The model's own code.
        config: Its shape.
        graph: Its edge graph.
        mlp_norm: The site of the MLP's normalised input: "ln2", or "ln1" where attention and MLP share one norm.
        norms: Which of the sites "ln1" and "ln2" there are.
    """

    upstream: Upstream
    config: ModelConfig
    graph: EdgeGraph
    mlp_norm: str
    norms: tuple[str, ...]

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """Names of the sites a pass stops at."""
        names = ["resid_pre", "q", "k", "v", "z", "resid_post"]
        names += ["mlp_out", self.mlp_norm] if self.graph.has_mlps else []
        return (*names, *(() if self.graph.is_parallel or not self.graph.has_mlps else ("resid_mid",)))

    def weight(self, params: Any, name: str, layer: int) -> jax.Array:
        """The weight of a canonical `name` and `layer`, from `params`, in float32."""
        assert self.upstream.layer_params is not None
        weight = self.upstream.layer_weights[name](self.upstream.layer_params(params, layer))
        return weight.astype(jnp.float32)

    def norm(self, params: Any, name: str, layer: int) -> Callable[[jax.Array], jax.Array]:
        """The norm whose output is the site `name` of a `layer`, with its `params`: a function of the residual."""
        parts = [
            self.weight(params, f"{name}_{part}", layer) if f"{name}_{part}" in self.upstream.layer_weights else None
            for part in "wb"
        ]
        return lambda x: normalised(x, *parts, kind=self.config.norm, eps=self.config.norm_eps)

    def rows(self, layer: int, part: str) -> slice:
        """The rows of a `part` ("q", "k", "v" or "mlp") of a `layer` among the receivers."""
        graph = self.graph
        start = layer * (graph.n_heads + 2 * graph.n_kv_heads + graph.has_mlps)
        n_heads, n_kv = graph.n_heads, graph.n_kv_heads
        first = {"q": 0, "k": n_heads, "v": n_heads + n_kv, "mlp": n_heads + 2 * n_kv}[part]
        length = {"q": n_heads, "k": n_kv, "v": n_kv, "mlp": 1}[part]
        return slice(start + first, start + first + length)

    def attention_rows(self, layer: int) -> slice:
        """The rows of all receivers of a `layer`'s attention."""
        return slice(self.rows(layer, "q").start, self.rows(layer, "v").stop)


def normalised(x: Any, weight: Any = None, bias: Any = None, *, kind: str, eps: float) -> jax.Array:
    """A residual after its norm, in float32.

    layernorm: (x - mean x) / sqrt(var x + eps) w + b;  rmsnorm: x / sqrt(mean x^2 + eps) w;  none: x

    Args:
        x: Residuals, `[..., d_model]`.
        weight: The gain, `[d_model]`, if there is one.
        bias: The bias, likewise.
        kind: One of `NORMS`.
        eps: What is added to the variance.

    Returns:
        An array of the same shape.
    """
    x = x.astype(jnp.float32)
    if kind == "none":
        return x
    if kind == "layernorm":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    x = x if weight is None else x * jnp.broadcast_to(weight, x.shape)
    return x if bias is None else x + jnp.broadcast_to(bias, x.shape)


def edge_graph(lm: LanguageModel) -> EdgeGraph:
    """The edge graph of a model.

    Args:
        lm: The model.

    Returns:
        Its senders, receivers and edges.

    Raises:
        UnsupportedModelError: The model has not the sites, weights or norms that are needed.
    """
    return edge_model(lm, where="edge_graph").graph


def edge_model(lm: LanguageModel, *, where: str) -> EdgeModel:
    """What the passes need to know of a model `lm`; `where` names the caller in errors."""
    config, upstream = lm.config, lm.upstream
    # Their names depend on no tokens.
    sites = lm.sites(np.zeros((1, 1), np.int32)).sites
    has_mlps, names = Site(0, "mlp_out") in sites, {site.name for site in sites if site.layer == 0}
    mlp_norm = "ln2" if "ln2" in names else "ln1"
    missing = ["a config"] if config is None else []
    if config is not None:
        graph = EdgeGraph(config.n_layers, config.n_heads, config.n_kv_heads, config.is_parallel, has_mlps)
        model = EdgeModel(upstream, config, graph, mlp_norm, tuple(name for name in ("ln1", "ln2") if name in names))
        norms = ["ln1_w", *(["ln2_w"] if mlp_norm == "ln2" and has_mlps else [])] if config.norm != "none" else []
        needed = ["W_Q", "W_K", "W_V", "W_O", *norms]
        missing += [f"the site {name}" for name in (*model.stops, "attn_out") if name not in names]
        missing += [f"the weight {name}" for name in needed if name not in upstream.layer_weights]
        missing += [f"layer_params of {upstream.name}"] if upstream.layer_params is None else []
        missing += [] if config.norm in NORMS else [f"one of the norms {', '.join(NORMS)}"]
        if not missing:
            return model
    raise UnsupportedModelError(
        four_part(
            f"A model without {', '.join(missing)} was given",
            where=where,
            expected="a transformer whose heads and MLPs read and write one residual stream, with its sites tagged.",
            fix="give its Upstream what is missing (see lm.sites() and lm.upstream.weight_names).",
        )
    )
