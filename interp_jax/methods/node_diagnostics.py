"""Diagnostics of node scores: are the highest real, and what can the rest still hide?

Approximate scores (AtP and its like) err in two ways. False positives are found by patching the highest-scored nodes
for real: `verify_top_nodes`. False negatives among all the others are bounded by patching random subsets of them:
`bound_missed_nodes` gives a size that, at a stated confidence, no unverified node's effect exceeds.

    verified = verify_top_nodes(scores, effects_of, top_k=100)
    bound = bound_missed_nodes(subset_effects, n_nodes, n_subsets=500, probability=0.03, verified=verified.nodes)
    bound.bound(0.01)          # with confidence 99 %

Three nodes that only add up, so that subsets leave no doubt about them:

>>> effects = np.array([0.5, -2.0, 0.25])
>>> verify_top_nodes(np.abs(effects), lambda ids: effects[ids], top_k=2).ranking.tolist()
[1, 0]
>>> rest = bound_missed_nodes(lambda masks: masks @ effects, 3, n_subsets=400, probability=0.5, verified=[1])
>>> 0.5 < rest.bound(0.01) < 0.6
True

Sharp edges: the bound assumes that effects add up in expectation: what it bounds is a node's effect in the presence of
random other patches. It is one statement about the largest unverified node, so no correction for many nodes is due.

Source: Kramár et al., "AtP*" (2403.00745), sections on verification and diagnostics; Welch 1947.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.forward.subsets import SubsetEffects, SubsetEstimate, subset_moments

ALPHAS = (0.1, 0.01, 0.001)


@dataclass(frozen=True)
class VerificationResult:
    """The nodes with the highest scores, patched for real. Arrays are in descending order of the scores.

    Args:
        nodes: Ids of the nodes, `[k]`; of equal scores the lower id comes first.
        estimated: Their scores, `[k]`.
        measured: The mean over prompt pairs of the size of the real effect, `[k]`.
        signed: The mean over prompt pairs of the real effect itself, `[k]`.
        pearson: Correlation of estimated and measured; NaN where either is constant.
        spearman: The same of their ranks, ties sharing their mean rank.
        is_constant: Whether either is constant, so that there is no correlation.
    """

    nodes: np.ndarray
    estimated: np.ndarray
    measured: np.ndarray
    signed: np.ndarray
    pearson: float
    spearman: float
    is_constant: bool

    @property
    def ranking(self) -> np.ndarray:
        """The nodes by descending measured effect; of equal ones the lower id first, `[k]`."""
        return self.nodes[np.lexsort((self.nodes, -self.measured))]

    @property
    def n_patches(self) -> int:
        """How many patches it took: one per node."""
        return len(self.nodes)

    def __repr__(self) -> str:
        top = ", ".join(map(str, self.ranking[:5]))
        correlation = "none (constant)" if self.is_constant else f"{self.pearson:.3f}, of ranks {self.spearman:.3f}"
        return f"VerificationResult({len(self.nodes)} nodes; correlation {correlation}; largest: {top})"


def verify_top_nodes(scores: Any, effects_of: Callable[[np.ndarray], Any], *, top_k: int) -> VerificationResult:
    """Patch the nodes with the highest scores for real.

    measured_n = mean over pairs |effect_n|

    Args:
        scores: An estimate of each node's contribution, `[n_nodes]`; higher is looked at first.
        effects_of: From node ids, int `[m]`, to their effects when patched one at a time, `[m]` or `[batch, m]`.
        top_k: How many nodes to patch, 1 to n_nodes.

    Returns:
        Estimates and measurements.

    Raises:
        InvalidInputError: `top_k` is out of range, or a score or an effect is not a finite number.
        ShapeError: The scores are not `[n_nodes]`, or the effects not `[..., m]`.

    Source: Kramár et al. 2403.00745.
    """
    scores = _checked_scores(scores)
    if not 1 <= top_k <= len(scores):
        raise InvalidInputError(
            four_part(
                f"top_k={top_k} was given",
                where="verify_top_nodes",
                expected=f"1 to {len(scores)}, the number of nodes.",
                fix="choose a number in that range.",
            )
        )
    nodes = np.argsort(-scores, kind="stable")[:top_k]
    effects = np.asarray(effects_of(nodes))
    if effects.ndim not in (1, 2) or effects.shape[-1] != top_k or effects.shape[0] == 0:
        raise ShapeError(
            four_part(
                f"effects_of returned {effects.dtype}{list(effects.shape)} for {top_k} nodes",
                where="verify_top_nodes",
                expected=f"[{top_k}] or [batch, {top_k}].",
                fix="return one effect per node, or one per prompt pair and node.",
            )
        )
    effects = effects.astype(np.float64).reshape(-1, top_k)
    if not np.isfinite(effects).all():
        offenders = nodes[~np.isfinite(effects).all(0)]
        raise InvalidInputError(
            four_part(
                f"effects_of returned numbers that are not finite for nodes {offenders[:5].tolist()}",
                where="verify_top_nodes",
                expected="finite numbers.",
                fix="look at the metric and at the values that are patched in.",
            )
        )
    measured = np.abs(effects).mean(0)
    estimated = scores[nodes]
    return VerificationResult(
        nodes=nodes,
        estimated=estimated,
        measured=measured,
        signed=effects.mean(0),
        pearson=_correlation(estimated, measured),
        spearman=_correlation(_ranks(estimated), _ranks(measured)),
        is_constant=bool(np.ptp(estimated) == 0 or np.ptp(measured) == 0),
    )


@dataclass(frozen=True)
class MissedNodesResult:
    """How large the effect of a node that was not verified can still be.

    Args:
        nodes: Ids of the unverified nodes, `[node]`.
        estimate: Effect, standard error, degrees of freedom and count of each, after all subsets.
        budgets: Numbers of subsets, ascending, `[budget]`.
        bounds: The bound after so many subsets, `[budget, alpha]`; infinite where too few held (or lacked) some node.
        alphas: One minus the confidence of each bound.
        probability: With which each node was in a subset.
        seed: Of the random subsets.
    """

    nodes: np.ndarray
    estimate: SubsetEstimate
    budgets: np.ndarray
    bounds: np.ndarray
    alphas: tuple[float, ...]
    probability: float
    seed: int

    def bound(self, alpha: float) -> float:
        """A size that the effect of no unverified node exceeds, with confidence 1 - alpha, after all subsets.

        bound = max_n (|effect_n| + t_{dof_n, 1 - alpha} s_n)

        Args:
            alpha: Between 0 and 0.5.

        Returns:
            The bound.
        """
        return float(_bounds(self.estimate, _checked_alphas((alpha,), "MissedNodesResult.bound"))[0])

    def p_value(self, theta: float) -> float:
        """How probable data like these are, at most, if some unverified node's effect is at least theta.

        p = max_n F_{t, dof_n}((|effect_n| - theta) / s_n)

        Args:
            theta: Size of an effect, at least 0.

        Returns:
            The p-value: 1 where some node's effect cannot be told at all.
        """
        effects, errors, dof, _ = self.estimate
        with np.errstate(divide="ignore", invalid="ignore"):
            p = special.stdtr(dof, (np.abs(effects) - theta) / errors)
        p = np.where(errors > 0, p, np.abs(effects) >= theta)
        return float(np.where(np.isfinite(errors), p, 1.0).max())

    def __repr__(self) -> str:
        pairs = zip(self.bounds[-1], self.alphas, strict=True)
        last = ", ".join(f"{bound:.3g} ({1 - alpha:.1%})" for bound, alpha in pairs)
        return (
            f"MissedNodesResult({len(self.nodes)} unverified nodes, {self.budgets[-1]} subsets; none exceeds {last}, "
            "if effects add up in expectation)"
        )


def bound_missed_nodes(
    subset_effects: SubsetEffects,
    n_nodes: int,
    *,
    n_subsets: int,
    probability: float,
    seed: int = 0,
    verified: Any = (),
    alphas: Sequence[float] = ALPHAS,
    step: int | None = None,
) -> MissedNodesResult:
    """Bound the effects of all nodes that were not verified, by patching random subsets of them.

    effect_n = mean{y_i : n in S_i} - mean{y_i : n not in S_i}; bound = max_n (|effect_n| + t_{dof_n, 1 - alpha} s_n)

    That some node's effect reaches theta is the union of one hypothesis per node; it is rejected only if each of them
    is, so the largest p-value counts, and no correction for their number is needed.

    Args:
        subset_effects: From masks, bool `[m, n_nodes]`, to the effect of patching each row's nodes at once, averaged
            over the prompt pairs, `[m]`.
        n_nodes: How many nodes there are.
        n_subsets: How many subsets to patch; one forward pass each.
        probability: With which each unverified node is in a subset. Small ones are closer to a node's effect alone,
            and need about 1 / probability times as many subsets.
        seed: Of the random subsets.
        verified: Ids of the nodes that need no bound; they are in no subset.
        alphas: One minus the confidence of each bound, between 0 and 0.5.
        step: How many subsets to hand to `subset_effects` at once.

    Returns:
        The bounds, after all subsets and after each power of two of them.

    Raises:
        InvalidInputError: A number is out of range, no node is unverified, or an effect is not finite.
        ShapeError: `subset_effects` does not return one number per subset.

    Source: Kramár et al. 2403.00745, with Welch's t-test.
    """
    where = "bound_missed_nodes"
    levels = _checked_alphas(alphas, where)
    verified = np.asarray(verified, np.int64).reshape(-1)
    if verified.size and not 0 <= verified.min() <= verified.max() < n_nodes:
        raise InvalidInputError(
            four_part(
                f"Verified nodes from {verified.min()} to {verified.max()} were given",
                where=where,
                expected=f"ids from 0 to {n_nodes - 1}.",
                fix="give the ids that verify_top_nodes returned, of the same set of nodes.",
            )
        )
    nodes = np.setdiff1d(np.arange(n_nodes), verified)
    estimates = {
        budget: moments.estimate()
        for budget, moments in subset_moments(
            subset_effects,
            n_nodes,
            n_subsets=n_subsets,
            probability=probability,
            seed=seed,
            candidates=nodes,
            budgets=[2**i for i in range(2, int(n_subsets).bit_length())],
            step=step,
            where=where,
        )
    }
    return MissedNodesResult(
        nodes=nodes,
        estimate=estimates[n_subsets],
        budgets=np.array(list(estimates)),
        bounds=np.stack([_bounds(estimate, levels) for estimate in estimates.values()]),
        alphas=levels,
        probability=probability,
        seed=seed,
    )


def _bounds(estimate: SubsetEstimate, alphas: tuple[float, ...]) -> np.ndarray:
    """The largest confidence limit over nodes, for each alpha."""
    effects, errors, dof, _ = estimate
    limits = []
    for alpha in alphas:
        with np.errstate(invalid="ignore"):
            limit = np.abs(effects) + np.where(errors > 0, special.stdtrit(dof, 1 - alpha) * errors, 0.0)
        limits.append(np.where(np.isfinite(errors), limit, np.inf).max())
    return np.array(limits)


def _checked_alphas(alphas: Sequence[float], where: str) -> tuple[float, ...]:
    levels = tuple(float(alpha) for alpha in alphas)
    wrong = [alpha for alpha in levels if not 0 < alpha < 0.5]
    if wrong or not levels:
        raise InvalidInputError(
            four_part(
                f"alphas={wrong or list(levels)} was given",
                where=where,
                expected="one minus the confidence, between 0 and 0.5.",
                fix="for a confidence of 99 % give 0.01.",
            )
        )
    return levels


def _checked_scores(scores: Any) -> np.ndarray:
    array = np.asarray(scores)
    if array.ndim != 1 or array.size == 0:
        raise ShapeError(
            four_part(
                f"Scores of shape {list(array.shape)} were given",
                where="verify_top_nodes",
                expected="one score per node, [n_nodes], for at least one node.",
                fix="average the sizes over the prompt pairs: abs(effects).mean(0).",
            )
        )
    array = array.astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        raise InvalidInputError(
            four_part(
                f"{wrong.size} scores that are not finite were given, the first {array[wrong[0]]} for node {wrong[0]}",
                where="verify_top_nodes",
                expected="finite numbers.",
                fix="find out where they come from; give a low number to nodes that are to come last.",
            )
        )
    return array


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's correlation: Pearson's of the ranks, ties sharing their mean rank; NaN where either is constant.

    Args:
        a: Numbers, `[n]`.
        b: Numbers, `[n]`.

    Returns:
        From -1 to 1.
    """
    return _correlation(_ranks(np.asarray(a)), _ranks(np.asarray(b)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, NaN by definition where either is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
