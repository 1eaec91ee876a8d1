"""Pictures of cost against recall: for each search, what it spends until it has the true top K nodes.

Both axes are logarithmic, so the area between a curve and the oracle's diagonal is the summary in the legend.
`cost_figure` draws it with matplotlib; `cost_page` is one HTML file in which the curve under the pointer tells its
numbers.

    cost_figure([cost_recall(c, search.cost_of, method=search.method) for search in searches]).savefig("cost.png")

>>> cost_figure.__name__, cost_page.__name__
('cost_figure', 'cost_page')

Sharp edges: the results must be of one set of nodes; what is at fault otherwise is told. A page keeps a few hundred
points of each curve.

Source: Kramár et al., "AtP*" (2403.00745), for the axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.figures.cost_page import BODY, SCRIPT, STYLE
from interp_jax.figures.page import escape, html_page
from interp_jax.figures.plotting import INK, LINE, QUIET, SERIES, add_heading, drawable, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp_jax.methods.cost_recall import CostRecallResult

_STYLES = ("-", "--", ":", "-.")
_N_POINTS = 300


def labelled_curves(results: Sequence[CostRecallResult]) -> list[tuple[str, float, np.ndarray, np.ndarray]]:
    """Each search's label, score, and points, best first; a few hundred points where there are more.

    Args:
        results: Results of `cost_recall` for the same nodes.

    Returns:
        Label, score, K and cost of each.

    Raises:
        InvalidInputError: There is none, or they are of different numbers of nodes.
    """
    lengths = sorted({len(result.costs) for result in results})
    if len(lengths) != 1:
        raise InvalidInputError(
            four_part(
                f"{len(results)} results of {', '.join(map(str, lengths)) or 'no'} nodes were given",
                where="a picture of cost against recall",
                expected="one result or more, all of the same nodes.",
                fix="call cost_recall with the same contributions (and max_k) for each search.",
            )
        )
    n = lengths[0]
    # Even steps on a logarithmic axis, and the round numbers that the page's table shows.
    k = np.round(np.geomspace(1, n, min(n, _N_POINTS))).astype(int)
    k = np.unique([*k, *(10**power for power in range(len(str(n))))])
    curves = [
        (result.method or f"search {i}", result.score, k, result.costs[k - 1]) for i, result in enumerate(results, 1)
    ]
    return sorted(curves, key=lambda curve: curve[1])


def cost_figure(results: Sequence[CostRecallResult], *, title: str = "") -> Figure:
    """The curves as a matplotlib figure.

    Args:
        results: Results of `cost_recall` for the same nodes, one per search.
        title: What to add to the heading, such as the model's name.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: There is no result, or they are of different numbers of nodes.
    """
    curves = labelled_curves(results)
    width, height = 8.4, 5.0
    with drawing(width, height) as figure:
        axes = figure.add_axes((0.1, 0.12, 0.6, 0.7))
        for index, (label, score, k, costs) in enumerate(curves):
            colour, style = SERIES[index % len(SERIES)], _STYLES[index // len(SERIES) % len(_STYLES)]
            axes.plot(
                k, costs, style, color=colour, linewidth=1.8, label=drawable(f"{label}  ({score:.3g}×)"), zorder=3
            )
        k = curves[0][2]
        axes.plot(k, k, color=QUIET, linewidth=1, label="oracle  (1×)", zorder=2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(color=LINE, linewidth=0.7)
        axes.spines[:].set_visible(False)
        axes.tick_params(which="both", length=0, labelsize=8, labelcolor=INK)
        axes.set_xlabel("K: the true top K nodes are verified", fontsize=9, color=QUIET)
        axes.set_ylabel("cost (forward passes)", fontsize=9, color=QUIET)
        legend = axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=9, labelcolor=INK)
        for text in legend.get_texts():
            text.set_parse_math(False)
        heading = "Cost against recall" + (f": {title}" if title else "")
        caption = "In brackets: how many times the oracle's cost, a geometric mean in which each K weighs 1/K."
        add_heading(figure, heading, caption, left_inches=0.84)
    return figure


def cost_page(results: Sequence[CostRecallResult], *, title: str = "") -> str:
    """The curves as one HTML document that needs nothing else.

    Args:
        results: Results of `cost_recall` for the same nodes, one per search.
        title: What to add to the heading, such as the model's name.

    Returns:
        The document.

    Raises:
        InvalidInputError: There is no result, or they are of different numbers of nodes.
    """
    curves = labelled_curves(results)
    data: dict[str, Any] = {
        "curves": [
            {"name": label, "score": float(f"{score:.4g}"), "costs": [float(f"{cost:.6g}") for cost in costs]}
            for label, score, _, costs in curves
        ],
        "k": curves[0][2].tolist(),
    }
    heading = "Cost against recall" + (f": {title}" if title else "")
    return html_page(heading, body=BODY.format(heading=escape(heading)), style=STYLE, script=SCRIPT, data=data)
