"""Cost and recall: how many forward passes does a search need until it has verified all of the true top K nodes?

C_K is what a search has spent when the last of the true top K is verified. An oracle that knows the order needs K. The
summary is how many times the oracle's cost that is, as a geometric mean over K in which each K weighs 1/K: the area
between the search's curve and the oracle's, both axes logarithmic.

The oracle itself; a search that finds all four nodes only at cost 4; and one that spends 3 first:

>>> contributions = [4.0, 3.0, 2.0, 1.0]
>>> [round(cost_recall(contributions, cost).score, 4) for cost in ([1, 2, 3, 4], [4, 4, 4, 4], [4, 5, 6, 7])]
[1.0, 2.4056, 2.8962]

Sharp edges: nodes with equal contributions may be found in either order, and the one that is better for the search is
counted. Where most contributions are nearly zero the order of the tail is noise: `max_k` leaves it out.

Source: Kramár et al., "AtP*: An efficient and scalable method for localizing LLM behaviour to components" (2403.00745).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part


@dataclass(frozen=True)
class CostRecallResult:
    """The cost of finding the true top K, for each K.

    Args:
        costs: Forward passes spent when all of the true top K are verified, for K = 1, 2, ..., `[k]`.
        nodes: The true ranking, largest contribution first, `[k]`.
        score: The mean ratio of these costs to the oracle's, 1 at best.
        method: Name of the search.
    """

    costs: np.ndarray
    nodes: np.ndarray
    score: float
    method: str = ""

    def __repr__(self) -> str:
        name = f"{self.method}: " if self.method else ""
        return f"CostRecallResult({name}{self.score:.4g} times the oracle's cost, over the top {len(self.costs)})"


def cost_recall(contributions: Any, cost_of: Any, *, max_k: int | None = None, method: str = "") -> CostRecallResult:
    """What a search spends until it has the true top K.

    C_K = max over the true top K of cost_of
    score = exp(sum_K (1/K) log(C_K / K) / sum_K 1/K)

    Args:
        contributions: The true contribution of each node, at least 0, `[n_nodes]`: mean over pairs of |effect|.
        cost_of: Forward passes the search has spent when it verifies each node, by node id, `[n_nodes]`.
        max_k: The largest K to look at; all nodes by default.
        method: Name of the search.

    Returns:
        The curve and its summary.

    Raises:
        ShapeError: The two are not arrays of one length.
        InvalidInputError: A contribution is negative or NaN, a cost is not positive, or `max_k` is out of range.

    Source: Kramár et al. 2403.00745.
    """
    c, cost = np.asarray(contributions), np.asarray(cost_of)
    if c.ndim != 1 or c.shape != cost.shape or c.size == 0:
        raise ShapeError(
            four_part(
                f"Contributions of shape {list(c.shape)} and costs of shape {list(cost.shape)} were given",
                where="cost_recall",
                expected="one of each per node, [n_nodes], for at least one node.",
                fix="give the costs by node id (NodeSearchResult.cost_of), for the same set of nodes.",
            )
        )
    c, cost = c.astype(np.float64), cost.astype(np.float64)
    max_k = len(c) if max_k is None else max_k
    faults = [f"contribution {value} of node {i}" for i, value in enumerate(c) if not value >= 0]
    faults += [f"cost {value} of node {i}" for i, value in enumerate(cost) if not 0 < value < np.inf]
    faults += [] if 1 <= max_k <= len(c) else [f"max_k={max_k}"]
    if faults:
        raise InvalidInputError(
            four_part(
                f"{', '.join(faults[:4])}{', ...' if len(faults) > 4 else ''} was given",
                where="cost_recall",
                expected=f"contributions from 0, costs above 0, max_k from 1 to {len(c)}.",
                fix="give the mean over prompt pairs of the size of each effect: abs(effects).mean(0).",
            )
        )
    # Of equal contributions the cheaper one first: the best case for the search.
    nodes = np.lexsort((cost, -c))[:max_k]
    costs = np.maximum.accumulate(cost[nodes])
    k = np.arange(1, max_k + 1)
    score = float(np.exp((np.log(costs / k) / k).sum() / (1 / k).sum()))
    return CostRecallResult(costs, nodes, score, method)
