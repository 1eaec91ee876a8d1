"""Edge attribution: the effect of corrupting each edge of a model, for all edges at once, to first order.

EAP takes the gradient of the metric with respect to every receiver's input (before its norm) at the clean run and
multiplies it with what every sender would write otherwise. EAP-IG averages that gradient over runs whose input lies
between the corrupted and the clean one, so that a saturated nonlinearity does not hide an edge.

    score(u -> v) = mean over examples of sum over positions of (corrupted_u - clean_u) . d metric / d input_v

    result = edge_attribution(lm, tokens, corrupted, logit_difference(mary, john), method="eap_ig")
    circuit = result.greedy(200).pruned()

>>> points, weights = integration_points("right", 5)
>>> round(sum(weight * 3 * x**2 for x, weight in zip(points, weights)), 4)      # the integral of 3 x^2, which is 1
1.32

Sharp edges: a score estimates metric(edge corrupted) - metric(clean); an edge the answer needs has a negative one
where the metric is high for the right answer. The gradient passes through the norms as they are. `mask_gradient` and
`mask_ig` differentiate `patched_edges` by its mask: at a mask of zeros the same numbers as EAP by another route
(slower), and along the mask from zeros to ones another integral than EAP-IG's, through edges instead of inputs.

Source: Syed et al. (2310.10348) for EAP; Hanna et al. (2403.17806) for EAP-IG, whose paper says "right" and whose
code does "left".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from interp_jax.core.errors import InvalidInputError, check_choice, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.metrics import Metric, finite, metric_values, prepared
from interp_jax.forward.nodes import check_pair
from interp_jax.methods.circuits.edge_model import EdgeModel, edge_model
from interp_jax.methods.circuits.edge_passes import Mixing, checked_run, run_edges
from interp_jax.methods.circuits.graph import Circuit, EdgeGraph, greedy_edges, top_edges
from interp_jax.transforms.compilations import counted_jit
from interp_jax.transforms.harvest import site_gradients

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

METHODS = ("eap", "eap_ig", "mask_gradient", "mask_ig")
RULES = ("right", "left", "midpoint", "trapezoid")


@dataclass(frozen=True, repr=False)
class EdgeAttributionResult:
    """A score per edge.

    Args:
        graph: The edge graph.
        scores: Estimates of metric(edge corrupted) - metric(clean), `[sender, receiver]`; 0 where there is no edge.
        clean: The metric of the clean run, `[batch]`.
        corrupted: The metric of the corrupted run, `[batch]`.
    """

    graph: EdgeGraph
    scores: np.ndarray
    clean: np.ndarray
    corrupted: np.ndarray

    def score(self, sender: str, receiver: str) -> float:
        """The score of the edge from `sender` to `receiver`, by name."""
        return float(self.scores[self.graph.sender(sender), self.graph.receiver(receiver)])

    def top(self, n: int, *, by: str = "size") -> Circuit:
        """The circuit of the `n` edges that come first `by` "size", "lowest" or "highest"; see `top_edges`."""
        return top_edges(self.graph, self.scores, n, by=by)

    def greedy(self, n: int, *, by: str = "size") -> Circuit:
        """The circuit of `n` edges that grows from the logits, ranked `by` as in `top`; see `greedy_edges`."""
        return greedy_edges(self.graph, self.scores, n, by=by)

    def strongest(self, n: int) -> list[tuple[str, str, float]]:
        """The `n` edges with the largest scores, whatever their sign: sender, receiver, score."""
        edges = self.top(n).edges
        return sorted(((u, v, self.score(u, v)) for u, v in edges), key=lambda edge: -abs(edge[2]))

    def __repr__(self) -> str:
        strongest = ", ".join(f"{u} -> {v} {score:+.2f}" for u, v, score in self.strongest(min(3, self.graph.n_edges)))
        return f"EdgeAttributionResult({self.graph.n_edges} edges; strongest: {strongest})"


def integration_points(rule: str, n_steps: int) -> tuple[list[float], list[float]]:
    """Where an integral over [0, 1] is evaluated, and with what weights.

    Args:
        rule: "right" (i/n, i = 1..n), "left" (i = 0..n-1), "midpoint" ((i - 1/2)/n), or "trapezoid" (i = 0..n, the
            ends by half; with one step the mean of both ends).
        n_steps: How many steps.

    Returns:
        Points and weights, which add up to 1.

    Raises:
        UnknownNameError: An unknown rule.
        InvalidInputError: No step.
    """
    check_choice(rule, RULES, what="rule", where="edge_attribution")
    if isinstance(n_steps, bool) or n_steps < 1:
        raise InvalidInputError(
            four_part(
                f"n_steps={n_steps} was given", where="edge_attribution", expected="1 or more.", fix="choose 5, say."
            )
        )
    if rule == "trapezoid":
        weights = [1 / n_steps] * (n_steps + 1)
        weights[0] = weights[-1] = 0.5 / n_steps
        return [i / n_steps for i in range(n_steps + 1)], weights
    shift = {"right": 1.0, "left": 0.0, "midpoint": 0.5}[rule]
    return [(i + shift) / n_steps for i in range(n_steps)], [1 / n_steps] * n_steps


def edge_attribution(
    lm: LanguageModel,
    tokens: Any,
    corrupted: Any,
    metric: Metric,
    *,
    method: str = "eap",
    n_steps: int = 5,
    rule: str = "midpoint",
    progress: bool = True,
) -> EdgeAttributionResult:
    """Estimate for every edge how the metric changes when its receiver hears the sender's corrupted write.

    Args:
        lm: The model.
        tokens: Clean token ids, `[batch, pos]`.
        corrupted: Corrupted token ids, aligned with the clean ones.
        metric: A function from logits to `[batch]` floats.
        method: "eap" (one gradient, at the clean run), "eap_ig" (gradients at inputs between corrupted and clean),
            "mask_gradient" or "mask_ig" (gradients of `patched_edges` by its mask).
        n_steps: Gradients to average, for the two integrals.
        rule: Where they are taken: "right", "left", "midpoint" or "trapezoid". 0 is the corrupted run for "eap_ig";
            for "mask_ig" it is the clean one.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        A score per edge.

    Raises:
        ShapeError: Tokens of two lengths, or a metric that does not return one float per row.
        InvalidInputError: Padding at different places, a metric that is not finite, no steps.
        UnknownNameError: An unknown method or rule.
        UnsupportedModelError: The model's residual stream is no sum of heads and MLPs.

    Source: Syed et al. 2310.10348; Hanna et al. 2403.17806.
    """
    check_choice(method, METHODS, what="method", where="edge_attribution")
    points, weights = integration_points(rule, n_steps)
    if method in ("eap", "mask_gradient"):
        points, weights = [1.0 if method == "eap" else 0.0], [1.0]
    model = edge_model(lm, where="edge_attribution")
    clean_tokens, other = check_pair(lm, tokens, corrupted, where="edge_attribution")
    metric = prepared(metric, lm, clean_tokens, where="edge_attribution")
    runs = [checked_run(model, lm.params, part, where="edge_attribution") for part in (clean_tokens, other)]
    (_, clean_writes), (_, corrupted_writes) = runs
    ends = [np.asarray(metric_values(metric, logits, where="edge_attribution")) for logits, _ in runs]
    step = _input_step if method.startswith("eap") else _mask_step
    scores = np.zeros(model.graph.shape, np.float64)
    bar = tqdm(list(zip(points, weights, strict=True)), desc=method, disable=None if progress else True, leave=False)
    for point, weight in bar:
        at = jnp.float32(point)
        scores += weight * np.asarray(step(model, lm.params, clean_tokens, clean_writes, corrupted_writes, metric, at))
    finite(ends, where="edge_attribution")
    finite(scores, what="A score", where="edge_attribution")
    return EdgeAttributionResult(model.graph, scores.astype(np.float32), *ends)


def _scores_at_input(
    model: EdgeModel, params: Any, tokens: Any, clean: jax.Array, corrupted: jax.Array, metric: Any, at: jax.Array
) -> jax.Array:
    """The scores with gradients at one input between the corrupted (0) and the clean one (1), `[sender, receiver]`."""
    last = model.graph.n_layers - 1
    sites = [name for name in model.stops if name not in ("z", "mlp_out", "resid_post")] + [f"{last}.resid_post"]
    first = (1 - at) * corrupted[0] + at * clean[0]

    def at_input(value: jax.Array) -> jax.Array:
        return first.astype(value.dtype)

    gradients_of = site_gradients(
        model.upstream.forward,
        sites,
        lambda logits: metric_values(metric, logits, where="edge_attribution"),
        interventions=[(Site(0, "resid_pre"), at_input)],
    )
    _, values, gradients = gradients_of(params, tokens)
    difference, columns, n_before = corrupted - clean, [], 1
    for layer in range(model.graph.n_layers):
        attention, mlp = _receiver_gradients(model, params, layer, values, gradients)
        columns.append(_contract(difference, n_before, attention))
        n_before += model.graph.n_heads
        if model.graph.has_mlps:
            n_heard = n_before - model.graph.n_heads if model.graph.is_parallel else n_before
            columns.append(_contract(difference, n_heard, mlp))
            n_before += 1
    columns.append(_contract(difference, n_before, gradients[Site(last, "resid_post")].astype(jnp.float32)[None]))
    return jnp.concatenate(columns, axis=1)


def _receiver_gradients(
    model: EdgeModel, params: Any, layer: int, values: Any, gradients: Any
) -> tuple[jax.Array, jax.Array]:
    """Gradients with respect to the inputs of a layer's receivers, before their norms: of attention, of the MLP."""

    def gradient(name: str) -> jax.Array:
        return gradients[Site(layer, name)].astype(jnp.float32)

    def before_norm(name: str, by: jax.Array) -> jax.Array:
        is_mid = name == "ln2" and not model.graph.is_parallel
        resid = values[Site(layer, "resid_mid" if is_mid else "resid_pre")].astype(jnp.float32)
        _, pull = jax.vjp(model.norm(params, name, layer), resid)
        return jax.vmap(lambda one: pull(one)[0])(by)

    by_head = [
        jnp.einsum(
            "bthd,hmd->hbtm", gradient(part), model.weight(params, f"W_{part.upper()}", layer), precision="highest"
        )
        for part in "qkv"
    ]
    normed = jnp.concatenate(by_head)
    attention = before_norm("ln1", normed)
    if not model.graph.has_mlps:
        return attention, attention[:0]
    of_mlp = gradient(model.mlp_norm)[None]
    if model.mlp_norm == "ln1":
        # Attention reads the same normalised input; what is left is the MLP's.
        of_mlp = of_mlp - normed.sum(0, keepdims=True)
    return attention, before_norm(model.mlp_norm, of_mlp)


def _contract(difference: jax.Array, n_senders: int, gradients: jax.Array) -> jax.Array:
    """Scores of the edges from the first senders; rows of zeros for those that come later."""
    scores = jnp.einsum("ubtd,vbtd->uv", difference[:n_senders], gradients, precision="highest")
    return jnp.pad(scores / difference.shape[1], ((0, len(difference) - n_senders), (0, 0)))


def _scores_at_mask(
    model: EdgeModel, params: Any, tokens: Any, clean: jax.Array, corrupted: jax.Array, metric: Any, at: jax.Array
) -> jax.Array:
    """The derivative of the mean metric by the mask, with all edges corrupted to the same degree."""

    def mean(mask: jax.Array) -> jax.Array:
        logits = run_edges(model, params, tokens, Mixing(mask, corrupted))
        return metric_values(metric, logits, where="edge_attribution").mean()

    return jax.grad(mean)(jnp.broadcast_to(at, model.graph.shape))


_input_step = counted_jit(_scores_at_input, name="edge attribution", static_argnums=0)
_mask_step = counted_jit(_scores_at_mask, name="edge attribution by mask", static_argnums=0)
