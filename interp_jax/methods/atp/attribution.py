"""Attribution patching: estimates of the effect of every node at once; AtP, the QK fix, GradDrop, and AtP*.

AtP:       estimate = (value on corrupted - value on clean) . d metric / d value, on the clean pass
QK fix:    for queries and keys, the response of the attention pattern in full (`interp_jax.methods.atp.qk_fix`)
GradDrop:  score = mean over layers l of |estimate with no gradient through what layer l writes|, so that a direct and
           an indirect effect that cancel are both seen
AtP*:      both

Two forwards and one backward for AtP, one backward more per layer for GradDrop, whatever the number of nodes. Blocking
layer l means that its input has the gradient of its output: one pullback from each layer's input gives the terms of all
nodes before it, those after it keep their gradient, and those inside have none.

    result = attribution_patching(lm, clean, corrupted, metric, node_set(lm, clean, ["q", "k", "v", "z"]))
    result.top(10)

In a linear model without attention, the estimate is the effect:

>>> from interp_jax.forward.nodes import node_set
>>> from interp_jax.models.language_model import LanguageModel, Upstream
>>> from interp_jax.transforms.sowing import sow
>>> def forward(params, tokens):
...     return 2.0 * sow(params[tokens], name="embed")
>>> lm = LanguageModel(Upstream("double", forward), jnp.eye(3), name="double")
>>> clean, corrupted = np.array([[0, 1]]), np.array([[0, 2]])
>>> nodes = node_set(lm, clean, ["embed"])
>>> result = attribution_patching(lm, clean, corrupted, lambda logits: logits[:, -1, 2], nodes, grad_drop=False)
>>> result.estimates.tolist()
[[0.0, 2.0]]

Sharp edges: an estimate, first order in all but the QK fix: verify the top nodes by `activation_patching`. Whole
residual vectors are large perturbations, and poorly estimated. A node in no layer (an embedding, the residual stream)
keeps its gradient in every term, one inside a layer in all but one; the mean is over the terms a node keeps.

Source: Kramar et al. 2024 (2403.00745).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from interp_jax.core.errors import InvalidInputError, UnsupportedModelError, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.metrics import Metric, column_read, finite, metric_values, prepared
from interp_jax.forward.nodes import NEURONS, Node, NodeGroup, NodeSet, check_nodes, check_pair
from interp_jax.methods.atp.qk_fix import key_effects, query_effects
from interp_jax.transforms.compilations import counted_jit
from interp_jax.transforms.harvest import reap_sites, site_vjp

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

LN_FINAL = Site(None, "ln_final")
# The residual stream itself: what a layer writes is added to it, so no layer holds it.
_STREAM = ("resid_pre", "resid_mid", "resid_post")
# Scores of masked keys are far below any other.
_MASKED = -1e20
_SCALE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AttributionResult:
    """Estimated effects of nodes.

    Args:
        estimates: Estimated effect of each node, with its sign, `[batch, node]`.
        scores: What ranks the nodes, `[batch, node]`: |estimates|, or under GradDrop the mean of its terms.
        plain: Metric of the clean pass, `[batch]`.
        nodes: The nodes.
        has_qk_fix: Whether queries and keys went through the softmax in full.
        has_grad_drop: Whether `scores` are GradDrop's.
    """

    estimates: np.ndarray
    scores: np.ndarray
    plain: np.ndarray
    nodes: NodeSet
    has_qk_fix: bool
    has_grad_drop: bool

    @property
    def contribution(self) -> np.ndarray:
        """Mean score over the batch, `[node]`: the estimate of `PatchingResult.contribution`."""
        return self.scores.mean(0)

    def grid(self, name: str) -> np.ndarray:
        """Mean estimates of the nodes of one `name`, `[layer, position, unit]`."""
        return self.nodes.grid(name, self.estimates.mean(0))

    def top(self, n: int = 10) -> list[tuple[Node, float]]:
        """The `n` nodes with the largest contribution, with it."""
        return self.nodes.top(self.contribution, n)

    def __repr__(self) -> str:
        parts = ["AtP*"] if self.has_qk_fix and self.has_grad_drop else ["AtP"]
        if len(parts) == 1 and parts[0] == "AtP":
            parts += ["QK fix"] * self.has_qk_fix + ["GradDrop"] * self.has_grad_drop
        return f"AttributionResult({' + '.join(parts)}, batch {len(self.scores)}, {self.nodes.n_nodes} nodes)"


class Setup(NamedTuple):
    """What decides the program of an attribution; hashable."""

    forward: Callable[..., Any]
    unembed: Callable[..., Any] | None
    nodes: NodeSet
    layers: tuple[int, ...]
    qk_sites: tuple[str, str] | None
    grad_drop: bool
    layers_per_step: int
    score_cap: float | None


def attribution_patching(
    lm: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    nodes: NodeSet,
    *,
    qk_fix: bool = True,
    grad_drop: bool = True,
    layers_per_step: int = 8,
) -> AttributionResult:
    """Estimates of the effect of patching each node from the corrupted into the clean pass: AtP* by default.

    Args:
        lm: The model.
        clean: Token ids, `[batch, pos]`.
        corrupted: Token ids, `[batch, pos]`, position-aligned with `clean`.
        metric: A function from logits to `[batch]`; each row's value must depend on its own row's logits only.
        nodes: Which nodes, from `node_set`.
        qk_fix: Whether the effects of "q" and "k" nodes go through the softmax in full.
        grad_drop: Whether scores are GradDrop's.
        layers_per_step: How many of GradDrop's backward passes run side by side.

    Returns:
        The estimates and scores.

    Raises:
        ShapeError: The prompts differ in shape, or the metric does not return one float per row.
        InvalidInputError: The prompts are padded at different places, the metric reads a token or a position that is
            not there, it or an estimate is NaN, GradDrop of fewer than two layers, or nodes of prompts of another
            length.
        UnsupportedModelError: The QK fix of a model whose scores are not scaled products of queries and keys.

    Source: Kramar et al. 2024 (2403.00745), equations 4 to 12.
    """
    where = "attribution_patching"
    clean, corrupted = check_pair(lm, clean, corrupted, where=where)
    check_nodes(nodes, clean, where=where)
    metric = prepared(metric, lm, clean, where=where)
    table = lm.sites(clean)
    layers = tuple(sorted({site.layer for site in table.sites if site.layer is not None}))
    if grad_drop and len(layers) < 2:
        raise InvalidInputError(
            four_part(
                f"GradDrop of a model with {len(layers)} layer(s) was asked for",
                where=where,
                expected="at least two layers: the mean leaves out the layer a node is in.",
                fix="pass grad_drop=False.",
            )
        )
    if layers_per_step < 1:
        raise InvalidInputError(
            four_part(f"layers_per_step={layers_per_step} was given", where=where, expected="1 or more.", fix="use 8.")
        )
    names = {site.name for site in table.sites}
    has_qk = qk_fix and any(group.name in _QK for group in nodes.groups)
    qk_sites = ("rot_q", "rot_k") if {"rot_q", "rot_k"} <= names else ("q", "k")
    column = (
        column_read(metric, clean.shape[1]) if lm.upstream.unembed is not None and LN_FINAL in table.sites else None
    )
    position, of_logits = column if column is not None else (0, metric)
    setup = Setup(
        lm.forward,
        lm.upstream.unembed if column is not None else None,
        nodes,
        layers,
        qk_sites if has_qk else None,
        grad_drop,
        layers_per_step,
        None if lm.config is None else lm.config.score_cap,
    )
    estimates, scores, plain, scale_error = map(
        np.asarray, _attribute(setup, lm.params, clean, corrupted, np.int32(position), of_logits)
    )
    if scale_error > _SCALE_TOLERANCE:
        raise UnsupportedModelError(
            four_part(
                f"Attention scores differ from scaled products of queries and keys by {scale_error:.1e} of their size",
                where=f"the QK fix in {lm.name}",
                expected="scores = scale * q . k, capped as config.score_cap says (no bias by position).",
                fix="pass qk_fix=False; or give the model's config its score_cap.",
            )
        )
    finite(plain, what="The metric of the clean pass", where=where)
    finite(scores, what="A score", where=where)
    # Two programs round differently; equal prompts have equal values all the same.
    is_same = (clean == corrupted).all(1)[:, None]
    estimates, scores = np.where(is_same, np.float32(0), estimates), np.where(is_same, np.float32(0), scores)
    return AttributionResult(estimates, scores, plain, nodes, has_qk, grad_drop)


_QK = ("q", "k")


def _attribution(
    setup: Setup, params: Any, clean: Any, corrupted: Any, position: Any, metric: Metric
) -> tuple[Any, Any, Any, Any]:
    """Estimates, scores, the plain metric, and how badly scores are explained by queries and keys."""

    def forward(params: Any, tokens: Any) -> Any:
        logits = setup.forward(params, tokens)
        return logits if setup.unembed is None else None  # Nobody needs the others: they are not computed.

    patched = _patched_sites(setup)
    stream = [Site(layer, name) for layer in setup.layers for name in ("resid_pre", "resid_post") if setup.grad_drop]
    fixed = _fixed_layers(setup)
    inside = [Site(layer, name) for layer in fixed for name in ("attn_scores", "v", "z")]
    ends = [LN_FINAL] if setup.unembed is not None else []
    other = reap_sites(forward, patched)(params, corrupted)
    select = list(dict.fromkeys([*patched, *stream, *inside, *ends]))
    logits, values, pullback = site_vjp(forward, select)(params, clean)

    def of_end(end: Any) -> Any:
        logits = end
        if setup.unembed is not None:
            logits = setup.unembed(params, lax.dynamic_slice_in_dim(end, position, 1, axis=1))
        return metric_values(metric, logits, where="attribution_patching")

    plain, of_metric = jax.vjp(of_end, logits if setup.unembed is None else values[LN_FINAL])
    (at_end,) = of_metric(jnp.ones_like(plain))
    gradients = pullback(at_end, {}) if setup.unembed is None else pullback(None, {LN_FINAL: at_end})
    attention = {layer: _Attention.of(setup, layer, values, other) for layer in fixed}
    error = jnp.stack([each.scale_error for each in attention.values()]).max() if fixed else jnp.zeros(())
    estimates = _estimates(setup, values, other, gradients, attention)
    if not setup.grad_drop:
        return estimates, jnp.abs(estimates), plain, error

    zero = None if setup.unembed is not None else jnp.zeros_like(logits)
    layer_of, keeps_all = _layers_of_nodes(setup)
    first_after = _first_layer_after(setup)

    def term(number: Any) -> Any:
        """|estimates| with layer `number` of `setup.layers` blocked."""
        cotangents = {
            Site(layer, "resid_pre"): jnp.where(
                number == i, gradients[Site(layer, "resid_post")], jnp.zeros((), values[Site(layer, "resid_pre")].dtype)
            )
            for i, layer in enumerate(setup.layers)
        }
        reached = dict(pullback(zero, cotangents))
        for i, layer in enumerate(setup.layers):
            # Between the two writes of a blocked layer only the stream itself goes on.
            if (middle := Site(layer, "resid_mid")) in reached:
                reached[middle] = jnp.where(number == i, gradients[Site(layer, "resid_post")], reached[middle])
        before = _estimates(setup, values, other, reached, attention)
        is_before = jnp.asarray(first_after) <= number
        is_inside = (jnp.asarray(layer_of) == number) & ~jnp.asarray(keeps_all)
        return jnp.abs(jnp.where(is_inside, 0.0, jnp.where(is_before, before, estimates)))

    def add(total: Any, numbers: Any) -> tuple[Any, None]:
        terms = jax.vmap(term)(jnp.maximum(numbers, 0))
        # A product, not a sum over the axis: XLA's CPU code for that sum gives every row the first row's numbers when
        # there are some ten thousand nodes (jaxlib 0.10.2).
        kept = (numbers >= 0).astype(terms.dtype)
        return total + jnp.einsum("lbn,l->bn", terms, kept, precision="highest"), None

    n_layers, size = len(setup.layers), min(setup.layers_per_step, len(setup.layers))
    steps = -(-n_layers // size)
    numbers = jnp.asarray([*range(n_layers), *[-1] * (steps * size - n_layers)], jnp.int32).reshape(steps, size)
    total, _ = lax.scan(add, jnp.zeros_like(estimates), numbers)
    n_terms = jnp.where(jnp.asarray(keeps_all), n_layers, n_layers - 1).astype(total.dtype)
    return estimates, total / n_terms[None], plain, error


_attribute = counted_jit(_attribution, name="attribution patching", static_argnums=0)


def _patched_sites(setup: Setup) -> list[Site]:
    """The sites whose values on both prompts are compared."""
    of_nodes = [site for site in setup.nodes.sites if not _is_fixed(setup, site.name)]
    of_scores = [Site(layer, name) for layer in _fixed_layers(setup) for name in setup.qk_sites or ()]
    return list(dict.fromkeys([*of_nodes, *of_scores]))


def _is_fixed(setup: Setup, name: str) -> bool:
    return setup.qk_sites is not None and name in _QK


def _fixed_layers(setup: Setup) -> list[int]:
    """The layers with nodes that the QK fix is for."""
    groups = [group for group in setup.nodes.groups if _is_fixed(setup, group.name)]
    return sorted({layer for group in groups for layer in group.layers if layer is not None})


def _layers_of_nodes(setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    """For each node the number of its layer (-1 for none), and whether it keeps its gradient in every layer's term."""
    layers, keeps = [], []
    for group in setup.nodes.groups:
        numbers = [-1 if layer is None else setup.layers.index(layer) for layer in group.layers]
        layers.append(np.repeat(numbers, group.n_nodes // len(numbers)))
        is_kept = group.name in _STREAM or group.layers == (None,)
        keeps.append(np.full(group.n_nodes, is_kept))
    return np.concatenate(layers), np.concatenate(keeps)


def _first_layer_after(setup: Setup) -> np.ndarray:
    """For each node, the number of the first layer whose blocking changes its gradient."""
    numbers = []
    for group in setup.nodes.groups:
        for layer in group.layers:
            if layer is None:
                # Before all layers or after them.
                first = len(setup.layers) if group.name in ("ln_final",) else 0
            else:
                first = setup.layers.index(layer) + (0 if group.name in ("resid_pre", "resid_mid") else 1)
            numbers.append(np.full(group.n_nodes // len(group.layers), first))
    return np.concatenate(numbers)


class _Attention(NamedTuple):
    """What the QK fix needs of one layer; scores `[batch, kv_head, group, query, key]`, changes likewise."""

    scores: Any
    of_query: Any
    of_key: Any
    visible: Any
    v: Any
    scale_error: Any

    @classmethod
    def of(cls, setup: Setup, layer: int, values: Mapping[Site, Any], other: Mapping[Site, Any]) -> _Attention:
        assert setup.qk_sites is not None
        (q, q_other), (k, k_other) = (
            [each[Site(layer, name)].astype(jnp.float32) for each in (values, other)] for name in setup.qk_sites
        )
        scores = values[Site(layer, "attn_scores")].astype(jnp.float32)
        n_kv = k.shape[2]

        def products(q: Any, k: Any) -> Any:
            grouped = q.reshape(*q.shape[:2], n_kv, -1, q.shape[-1])
            return jnp.einsum("bqgrd,bkgd->bgrqk", grouped, k, precision="highest")

        scores = scores.reshape(scores.shape[0], n_kv, -1, *scores.shape[2:])
        visible = scores > _MASKED
        raw, seen = jnp.where(visible, products(q, k), 0.0), jnp.where(visible, scores, 0.0)
        before, slope = _uncapped(seen, setup.score_cap)
        # The scale is upstream's own, whatever it is: read off its scores, where the cap does not flatten them.
        scale = (raw * before * slope).sum() / jnp.maximum((raw * raw * slope).sum(), 1e-30)
        error = jnp.abs(seen - _capped(scale * raw, setup.score_cap)).max() / jnp.maximum(jnp.abs(seen).max(), 1e-30)
        v = values[Site(layer, "v")].astype(jnp.float32)

        def change(product: Any) -> Any:
            if setup.score_cap is None:
                return scale * product
            return _capped(scale * (raw + product), setup.score_cap) - seen

        return cls(scores, change(products(q_other - q, k)), change(products(q, k_other - k)), visible, v, error)

    def effects(self, name: str, of_z: Any) -> Any:
        """Effects of queries `[batch, pos, head]` or keys `[batch, pos, kv_head]`, given the gradient at z."""
        grouped = of_z.astype(jnp.float32).reshape(*of_z.shape[:2], self.v.shape[2], -1, of_z.shape[-1])
        g = jnp.einsum("bqgrd,bkgd->bgrqk", grouped, self.v, precision="highest")
        if name == "q":
            effects = query_effects(self.scores, g, self.of_query, self.visible)
            return effects.reshape(effects.shape[0], -1, effects.shape[-1]).swapaxes(1, 2)
        return key_effects(self.scores, g, self.of_key, self.visible).sum((2, 3)).swapaxes(1, 2)


def _capped(scores: Any, cap: float | None) -> Any:
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _uncapped(scores: Any, cap: float | None) -> tuple[Any, Any]:
    """The scores before the cap, and how much it lets through of a change of each."""
    if cap is None:
        return scores, jnp.ones_like(scores)
    share = jnp.clip(scores / cap, -1 + 1e-6, 1 - 1e-6)
    return cap * jnp.arctanh(share), 1 - share**2


def _estimates(
    setup: Setup,
    values: Mapping[Site, Any],
    other: Mapping[Site, Any],
    gradients: Mapping[Site, Any],
    attention: Mapping[int, _Attention],
) -> Any:
    """The estimate of every node, `[batch, node]`."""
    parts = []
    for group in setup.nodes.groups:
        masks = group.position_masks(setup.nodes.n_pos).astype(np.float32)
        for site in group.sites:
            if _is_fixed(setup, group.name):
                assert site.layer is not None
                by_unit = attention[site.layer].effects(group.name, gradients[Site(site.layer, "z")])
            else:
                by_unit = _first_order(group, values[site], other[site], gradients[site])
            at = jnp.einsum("bpu,np->bnu", by_unit, masks, precision="highest")
            parts.append(at.reshape(at.shape[0], -1))
    return jnp.concatenate(parts, axis=1)


def _first_order(group: NodeGroup, value: Any, new: Any, gradient: Any) -> Any:
    """The difference of two values times the gradient, summed over each node's own axes, `[batch, pos, unit]`."""
    products = (new.astype(jnp.float32) - value.astype(jnp.float32)) * gradient.astype(jnp.float32)
    if group.n_units is None:
        return products.sum(tuple(range(2, products.ndim)))[..., None]
    return products if group.name in NEURONS else products.sum(-1)
