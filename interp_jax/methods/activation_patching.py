"""Activation patching: which parts of a model carry the difference between two prompts.

Noising puts a node's value from the corrupted prompt into the clean pass, denoising the clean value into the corrupted
pass. Ablation puts zeros, a mean, or another example's value there. All are exact: one pass for each node.

    result = activation_patching(lm, clean, corrupted, logit_difference(mary, john), node_set(lm, clean, ["resid_pre"]))
    result.grid("resid_pre")[..., 0]         # [layer, position], mean over the batch: a heatmap
    result.top(10)

>>> from interp_jax.forward.nodes import NodeGroup
>>> nodes = NodeSet((NodeGroup("mlp_out", (0, 1), (0,)),), n_pos=1)
>>> result = PatchingResult(np.array([[1.0, -3.0], [1.0, 3.0]]), np.zeros(2), np.ones(2), nodes, "noising")
>>> result.contribution.tolist(), result.mean_effect.tolist()
([1.0, 3.0], [1.0, 0.0])

Sharp edges: noising finds what is necessary (all parts of an AND), denoising what is sufficient (each part of an OR).
Effects of single nodes do not add up. The absolute value is taken per prompt pair, before the mean.

Source: Kramar et al. 2024 (2403.00745), section 2; Heimersheim and Nanda 2024 (2404.15255) on noising and denoising.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, check_choice, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.metrics import Metric, prepared
from interp_jax.forward.node_effects import node_effects, plain_metric
from interp_jax.forward.nodes import Node, NodeSet, check_nodes, check_pair

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

DIRECTIONS = ("noising", "denoising")
ABLATIONS = ("zero", "mean", "resample")


@dataclass(frozen=True)
class PatchingResult:
    """The effect of each node.

    Args:
        effects: Metric of the patched pass less that of the plain one, `[batch, node]`; NaN where not computed.
        plain: Metric of the pass that is patched, `[batch]`.
        other: Metric of the pass the values come from, `[batch]`; None for an ablation.
        nodes: The nodes.
        kind: "noising", "denoising", or the ablation: "zero", "mean", "resample".
    """

    effects: np.ndarray
    plain: np.ndarray
    other: np.ndarray | None
    nodes: NodeSet
    kind: str

    @property
    def is_complete(self) -> bool:
        """Whether every node was computed."""
        return not np.isnan(self.effects).any()

    @property
    def contribution(self) -> np.ndarray:
        """Mean over the batch of the absolute effect, `[node]`."""
        return np.abs(self.effects).mean(0)

    @property
    def mean_effect(self) -> np.ndarray:
        """Mean over the batch of the effect with its sign, `[node]`."""
        return self.effects.mean(0)

    @property
    def normalised(self) -> np.ndarray:
        """Effects as shares of the difference between the two prompts, `[batch, node]`: 1 is all of it.

        share = effect / (metric(other) - metric(plain))
        """
        if self.other is None:
            raise InvalidInputError(
                four_part(
                    f"The shares of an ablation ({self.kind}) were asked for",
                    where="PatchingResult.normalised",
                    expected="effects of patching between two prompts.",
                    fix="use effects, or compare with plain.",
                )
            )
        gap = (self.other - self.plain)[:, None]
        return np.where(gap == 0.0, np.nan, self.effects / np.where(gap == 0.0, 1.0, gap))

    def grid(self, name: str) -> np.ndarray:
        """Mean effects of the nodes of one `name`, `[layer, position, unit]`."""
        return self.nodes.grid(name, self.mean_effect)

    def top(self, n: int = 10) -> list[tuple[Node, float]]:
        """The `n` nodes with the largest contribution, with their mean effects."""
        order = self.nodes.order(self.contribution)[:n]
        return [(self.nodes[int(i)], float(self.mean_effect[i])) for i in order]

    def __repr__(self) -> str:
        done = "" if self.is_complete else f", {int(np.isnan(self.effects).any(0).sum())} not computed"
        return f"PatchingResult({self.kind}, batch {len(self.effects)}, {self.nodes.n_nodes} nodes{done})"


def activation_patching(
    lm: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    nodes: NodeSet,
    *,
    direction: Literal["noising", "denoising"] = "noising",
    rows_per_step: int | None = None,
    resume: PatchingResult | None = None,
    progress: bool = True,
) -> PatchingResult:
    """The exact effect of patching each node from one prompt into the other.

    noising: effect = metric(clean | node <- its value on corrupted) - metric(clean)

    Args:
        lm: The model.
        clean: Token ids, `[batch, pos]`.
        corrupted: Token ids, `[batch, pos]`, position-aligned with `clean`.
        metric: A function from logits to `[batch]`, in its own units.
        nodes: Which nodes, from `node_set`.
        direction: "noising", or "denoising" with the roles of the prompts exchanged.
        rows_per_step: How many nodes run side by side; by default as many as fit.
        resume: A result that Ctrl-C cut short, of the same call; what it has is not run again.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The effects.

    Raises:
        ShapeError: The prompts differ in shape, or the metric does not return one float per row.
        UnknownNameError: There is no such direction.
        InvalidInputError: The prompts are padded at different places, the nodes are those of prompts of another length,
            or the metric is NaN or reads a token or a position that is not there.

    Source: Kramar et al. 2024 (2403.00745), equations 1 to 3.
    """
    check_choice(direction, DIRECTIONS, what="direction", where="activation_patching")
    clean, corrupted = check_pair(lm, clean, corrupted, where="activation_patching")
    check_nodes(nodes, clean, where="activation_patching")
    metric = prepared(metric, lm, clean, where="activation_patching")
    tokens, source = (clean, corrupted) if direction == "noising" else (corrupted, clean)
    done = None if resume is None else resume.effects
    effects, plain = node_effects(
        lm, tokens, nodes, source, metric, rows_per_step=rows_per_step, done=done, progress=progress
    )
    return PatchingResult(effects, plain, plain_metric(lm, source, metric), nodes, direction)


def ablation(
    lm: LanguageModel,
    tokens: Any,
    metric: Metric,
    nodes: NodeSet,
    *,
    kind: Literal["zero", "mean", "resample"] = "zero",
    reference: Any = None,
    key: Any = None,
    rows_per_step: int | None = None,
    resume: PatchingResult | None = None,
    progress: bool = True,
) -> PatchingResult:
    """The exact effect of ablating each node.

    effect = metric(pass | node <- 0, its mean, or its value on another example) - metric(pass)

    Args:
        lm: The model.
        tokens: Token ids, `[batch, pos]`.
        metric: A function from logits to `[batch]`.
        nodes: Which nodes.
        kind: "zero"; "mean": over all tokens of `reference`; "resample": the value of another row of the batch.
        reference: For "mean": token ids, `[batch, pos]`, of any shape; by default `tokens`.
        key: For "resample": a PRNG key that decides which row.
        rows_per_step: How many nodes run side by side.
        resume: A result that Ctrl-C cut short, of the same call.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The effects.

    Raises:
        UnknownNameError: There is no such kind.
        ShapeError: The metric does not return one float per row.
        InvalidInputError: Resampling without a key or from one row, nodes of prompts of another length, or a metric
            that is NaN or reads a token or a position that is not there.

    Source: Wang et al. 2022 (2211.00593), section 2, on mean ablation.
    """
    check_choice(kind, ABLATIONS, what="kind", where="ablation")
    tokens = np.asarray(lm.check_tokens(tokens, where="ablation"))
    check_nodes(nodes, tokens, where="ablation")
    metric = prepared(metric, lm, tokens, where="ablation")
    source: Any
    if kind == "zero":
        source = _zero
    elif kind == "mean":
        source = _mean_source(lm, tokens if reference is None else reference, nodes)
    else:
        if key is None or len(tokens) < 2:
            raise InvalidInputError(
                four_part(
                    f"kind='resample' was given with key={key} and {len(tokens)} row(s)",
                    where="ablation",
                    expected="a PRNG key, and a batch of at least two rows to take values from.",
                    fix="pass key=jax.random.key(0) and more prompts.",
                )
            )
        # A shift by 1 to n - 1 rows: no row gets its own value.
        shift = int(jax.random.randint(key, (), 1, len(tokens)))
        source = np.roll(tokens, shift, axis=0)
    done = None if resume is None else resume.effects
    effects, plain = node_effects(
        lm, tokens, nodes, source, metric, rows_per_step=rows_per_step, done=done, progress=progress
    )
    return PatchingResult(effects, plain, None, nodes, kind)


def _zero(site: Site, value: Any) -> Any:
    return jnp.zeros_like(value)


def _mean_source(lm: LanguageModel, reference: Any, nodes: NodeSet) -> Any:
    """Each site's mean over all tokens that are not padding."""
    reference = np.asarray(lm.check_tokens(reference, where="ablation"))
    is_token = jnp.asarray(reference >= 0)

    def mean(value: Any) -> Any:
        weights = jnp.expand_dims(is_token, tuple(range(2, value.ndim))).astype(jnp.float32)
        return (value.astype(jnp.float32) * weights).sum((0, 1)) / weights.sum()

    means = {site: mean(value) for site, value in lm.reap(reference, nodes.sites).items()}
    return lambda site, value: jnp.broadcast_to(means[site][None, None], value.shape).astype(value.dtype)
