"""Random subsets: what each of many nodes contributes, told from patching many of them at once.

Each of m subsets holds each node independently with probability p; y_i is what patching all of subset i at once does.
The difference between the mean of y over the subsets with a node and over those without it estimates that node's
effect. Counts, sums and sums of squares per node are enough, so memory does not grow with m.

Two nodes with effects 1 and -2, every subset of them as likely as any other:

>>> masks = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], bool)
>>> moments = SubsetMoments.of(2).add(masks, masks @ np.array([1.0, -2.0]))
>>> moments.estimate().effects.tolist()
[1.0, -2.0]

Sharp edges: this is a node's effect in the presence of random other patches (at p = 1/2 its Banzhaf value), which is
its effect alone only where effects add up. A small p lessens that difference, and raises the variance as 1 / (p m). A
node that fewer than two subsets hold, or fewer than two lack, has no error estimate: infinity.

Source: Kramár et al., "AtP*: An efficient and scalable method for localizing LLM behaviour to components" (2403.00745).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part

SubsetEffects: TypeAlias = Callable[[np.ndarray], Any]
"""`bool[m, n_nodes] -> float[m]`: what patching all nodes of each row at once does to the metric."""

# The most entries of masks that are handed out, or counted, in one step.
_STEP_ENTRIES = 2**24


class SubsetEstimate(NamedTuple):
    """What subsets tell of each node.

    Args:
        effects: Mean with the node minus mean without it, `[node]`; NaN where either has no subset.
        standard_errors: Welch's standard error of that, `[node]`; infinite where it cannot be told.
        dof: Welch's degrees of freedom, `[node]`; NaN where they cannot be told.
        counts: How many subsets held the node, `[node]`.
    """

    effects: np.ndarray
    standard_errors: np.ndarray
    dof: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class SubsetMoments:
    """Running sums over subsets, in float64.

    Args:
        weight: Sum of the weights of all subsets: their number, unless weights were given.
        shift: Taken off every y before it is summed, so that squares lose no digits.
        total: Sum and sum of squares of y, `[2]`.
        counts: Sum of the weights of the subsets with each node, `[node]`.
        sums: Sum and sum of squares of y over these, `[2, node]`.
    """

    weight: float
    shift: float | None
    total: np.ndarray
    counts: np.ndarray
    sums: np.ndarray

    @classmethod
    def of(cls, n_nodes: int) -> SubsetMoments:
        """Sums over no subsets of `n_nodes` nodes."""
        return cls(0.0, None, np.zeros(2), np.zeros(n_nodes), np.zeros((2, n_nodes)))

    def add(self, masks: Any, y: Any, weights: Any = None) -> SubsetMoments:
        """The sums with more subsets in them.

        Args:
            masks: Which nodes each subset holds, bool `[subset, node]`.
            y: What patching each subset does, `[subset]`.
            weights: How often each counts, `[subset]`; once, by default.

        Returns:
            The new sums.
        """
        masks, y = np.asarray(masks, np.float64), np.asarray(y, np.float64)
        weights = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
        shift = float(y[0]) if self.shift is None else self.shift
        powers = weights * np.stack([y - shift, (y - shift) ** 2])
        return SubsetMoments(
            self.weight + float(weights.sum()),
            shift,
            self.total + powers.sum(1),
            self.counts + weights @ masks,
            self.sums + powers @ masks,
        )

    def estimate(self) -> SubsetEstimate:
        """Each node's effect with its uncertainty.

        effect_n = mean{y_i : n in S_i} - mean{y_i : n not in S_i}
        s_n = sqrt(var+ / c+ + var- / c-)

        Returns:
            The estimate.

        Source: Welch 1947, for the degrees of freedom.
        """
        counts = np.stack([self.counts, self.weight - self.counts])
        sums = np.stack([self.sums, self.total[:, None] - self.sums])
        with np.errstate(all="ignore"):
            means = sums[:, 0] / counts
            variances = np.maximum(sums[:, 1] - counts * means**2, 0) / (counts - 1)
            parts = variances / counts
            errors = np.sqrt(parts.sum(0))
            dof = parts.sum(0) ** 2 / (parts**2 / (counts - 1)).sum(0)
        can_tell = (counts >= 2).all(0)
        return SubsetEstimate(
            effects=np.where((counts > 0).all(0), means[0] - means[1], np.nan),
            standard_errors=np.where(can_tell, errors, np.inf),
            # Variances can be so small that their squares are not: then the fewest degrees there can be.
            dof=np.where(can_tell, np.where(np.isfinite(dof), dof, counts.min(0) - 1), np.nan),
            counts=self.counts,
        )


def subset_moments(
    subset_effects: SubsetEffects,
    n_nodes: int,
    *,
    n_subsets: int,
    probability: float,
    seed: int = 0,
    candidates: Any = None,
    budgets: Sequence[int] = (),
    step: int | None = None,
    where: str = "subset_moments",
) -> Iterator[tuple[int, SubsetMoments]]:
    """Patch random subsets and keep the sums.

    Args:
        subset_effects: From masks, bool `[m, n_nodes]`, to what patching each row's nodes does, `[m]`.
        n_nodes: How many nodes there are.
        n_subsets: How many subsets to patch in all, at least 1.
        probability: With which each candidate is in a subset, between 0 and 1.
        seed: Of the random subsets. They do not depend on `step` or `budgets`.
        candidates: Ids of the nodes that may be in a subset, `[candidate]`; all by default.
        budgets: Numbers of subsets after which to hand out the sums so far.
        step: How many subsets to hand to `subset_effects` at once; by default 64, or fewer where there are many nodes.
        where: The public call, for error messages.

    Returns:
        Pairs of number of subsets and sums (over candidates, in their order), the last one after all subsets.

    Raises:
        InvalidInputError: A number is out of its range, there is no candidate, or an effect is not finite.
        ShapeError: `subset_effects` does not return one number per subset.
    """
    ids = np.arange(n_nodes) if candidates is None else np.asarray(candidates, np.int64)
    step = max(1, min(64, _STEP_ENTRIES // max(1, n_nodes))) if step is None else step
    _check(n_subsets=n_subsets, probability=probability, n_candidates=len(ids), step=step, where=where)
    # After the checks, so that a mistake raises at the call and not at the first step of a loop.
    return _run(subset_effects, n_nodes, ids, n_subsets, probability, seed, sorted({*budgets, n_subsets}), step, where)


def _run(
    subset_effects: SubsetEffects,
    n_nodes: int,
    ids: np.ndarray,
    n_subsets: int,
    probability: float,
    seed: int,
    budgets: list[int],
    step: int,
    where: str,
) -> Iterator[tuple[int, SubsetMoments]]:
    rng = np.random.default_rng(seed)
    moments, done = SubsetMoments.of(len(ids)), 0
    for budget in budgets:
        while done < min(budget, n_subsets):
            m = min(step, budget - done)
            chosen = rng.random((m, len(ids))) < probability
            masks = np.zeros((m, n_nodes), bool)
            masks[:, ids] = chosen
            moments = moments.add(chosen, checked_effects(subset_effects, masks, where=where))
            done += m
        if 1 <= budget <= n_subsets:
            yield budget, moments


def checked_effects(subset_effects: SubsetEffects, masks: np.ndarray, *, where: str) -> np.ndarray:
    """What patching the nodes of each row does, once it is known to be one finite number per row.

    Args:
        subset_effects: The callable.
        masks: Which nodes, bool `[m, n_nodes]`.
        where: The public call, for error messages.

    Returns:
        The effects, float64 `[m]`.

    Raises:
        ShapeError: It does not return one number per row.
        InvalidInputError: A number is not finite.
    """
    y = np.asarray(subset_effects(masks))
    if y.shape != (len(masks),) or y.dtype.kind not in "fiuV":
        raise ShapeError(
            four_part(
                f"subset_effects returned {y.dtype}{list(y.shape)} for {len(masks)} subsets",
                where=where,
                expected=f"one number per subset, float[{len(masks)}].",
                fix="average over the batch of prompt pairs inside it: effects.mean(0).",
            )
        )
    y = y.astype(np.float64)
    if not np.isfinite(y).all():
        row = int(np.flatnonzero(~np.isfinite(y))[0])
        raise InvalidInputError(
            four_part(
                f"subset_effects returned {y[row]} for a subset of {int(masks[row].sum())} nodes",
                where=where,
                expected="finite numbers.",
                fix="look at the metric and at the values that are patched in: one of them is not finite.",
            )
        )
    return y


def _check(*, n_subsets: int, probability: float, n_candidates: int, step: int, where: str) -> None:
    faults = []
    if n_subsets < 1:
        faults.append(f"n_subsets={n_subsets}")
    if not 0 < probability < 1:
        faults.append(f"probability={probability}")
    if n_candidates < 1:
        faults.append("an empty set of nodes")
    if step < 1:
        faults.append(f"step={step}")
    if faults:
        raise InvalidInputError(
            four_part(
                f"{', '.join(faults)} was given",
                where=where,
                expected="at least one node, n_subsets and step from 1, a probability between 0 and 1.",
                fix="a few hundred subsets with probability 0.01 to 0.1 are usual.",
            )
        )
