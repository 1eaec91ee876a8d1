"""Pictures of estimates against the truth: a point per node, a panel per method, with the rank correlation.

Both axes are logarithmic: contributions span many orders of magnitude. Points below the diagonal are underestimated:
those far to the right there are what a search by estimates misses. `scatter_figure` draws it with matplotlib;
`scatter_page` is one HTML file in which the point under the pointer tells its node, both numbers, and its ranks.

    scatter_figure({"AtP*": estimated.contribution}, exact.contribution, exact.nodes)

>>> scatter_figure.__name__, scatter_page.__name__
('scatter_figure', 'scatter_page')

Sharp edges: contributions are means of sizes, without sign. Zeros stand on the edge of the picture. The axes end a
millionth below the largest, and so does what is drawn; the correlation is over all nodes. The page keeps the nodes
that are largest by the truth or by some method, and says how many.

Source: Kramár et al., "AtP*" (2403.00745), for the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.figures.page import escape, html_page
from interp_jax.figures.plotting import INK, LINE, QUIET, SERIES, add_heading, drawable, drawing
from interp_jax.methods.node_diagnostics import rank_correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp_jax.forward.nodes import NodeSet

_LOWEST = 1e-6
_COLOURS = (*SERIES, "#1a8a6b", "#b0355b")


def checked_estimates(
    estimates: Mapping[str, Any], exact: Any, nodes: NodeSet
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, float]]:
    """Estimates and truth as arrays, with the rank correlation of each method.

    Args:
        estimates: Per method the estimated contribution of each node, `[node]`.
        exact: The true contributions, `[node]`.
        nodes: The nodes.

    Returns:
        The estimates, the truth, and Spearman's correlation of each.

    Raises:
        InvalidInputError: There is no method, or a contribution is negative or not finite.
        ShapeError: There is not one contribution per node.
    """
    where = "a picture of estimates against the truth"
    given = {"exact": np.asarray(exact)} | {name: np.asarray(values) for name, values in estimates.items()}
    if wrong := [f"{name} {list(values.shape)}" for name, values in given.items() if values.shape != (len(nodes),)]:
        raise ShapeError(
            four_part(
                f"Contributions of {len(nodes)} nodes with the shapes {', '.join(wrong)} were given",
                where=where,
                expected=f"one per node, [{len(nodes)}].",
                fix="pass result.contribution, and the nodes of the same result.",
            )
        )
    wrong = [name for name, values in given.items() if not ((values >= 0) & (values < np.inf)).all()]
    if wrong or not estimates:
        raise InvalidInputError(
            four_part(
                f"Contributions that are negative or not finite were given: {', '.join(wrong)}"
                if wrong
                else "No estimates were given",
                where=where,
                expected="the contributions by one method or more: finite numbers from 0.",
                fix="pass result.contribution: the mean over the prompts of the size of each effect.",
            )
        )
    truth = given.pop("exact")
    return given, truth, {name: rank_correlation(values, truth) for name, values in given.items()}


def scatter_figure(estimates: Mapping[str, Any], exact: Any, nodes: NodeSet, *, title: str = "") -> Figure:
    """Estimated against true contributions as a matplotlib figure, a panel per method.

    Args:
        estimates: Per method the estimated contribution of each node, `[node]`.
        exact: The true contributions, `[node]`.
        nodes: The nodes.
        title: What to add to the heading, such as the model's name.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: There is no method, or a contribution is negative or not finite.
        ShapeError: There is not one contribution per node.
    """
    given, truth, correlations = checked_estimates(estimates, exact, nodes)
    low, high = _ends(given, truth)
    n_columns = min(2, len(given))
    n_rows = -(-len(given) // n_columns)
    size, gap = 3.3, 0.75
    width, height = 0.8 + n_columns * (size + gap) + 1.0, 1.1 + n_rows * (size + gap)
    with drawing(width, height) as figure:
        for index, (name, values) in enumerate(given.items()):
            row, column = divmod(index, n_columns)
            corner = (0.8 + column * (size + gap), height - 1.2 - size - row * (size + gap))
            axes = figure.add_axes((corner[0] / width, corner[1] / height, size / width, size / height))
            axes.plot([low, high], [low, high], color=QUIET, linewidth=0.8, zorder=1)
            for (group, ids), colour in zip(nodes.with_ids(), _cycled(len(nodes.groups)), strict=True):
                here = slice(ids.start, ids.stop)
                axes.scatter(
                    np.maximum(truth[here], low),
                    np.maximum(values[here], low),
                    s=9 if group.n_nodes < 2000 else 2.5,
                    color=colour,
                    alpha=0.85 if group.n_nodes < 2000 else 0.35,
                    linewidths=0,
                    label=group.name,
                    # Few nodes over many.
                    zorder=3 if group.n_nodes < 2000 else 2,
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(low, high)
            axes.set_ylim(low, high)
            axes.grid(color=LINE, linewidth=0.6)
            axes.spines[:].set_visible(False)
            axes.tick_params(which="both", length=0, labelsize=7.5, labelcolor=INK)
            axes.set_title(
                drawable(f"{name}   rank correlation {correlations[name]:.3f}"),
                fontsize=9.5,
                color=INK,
                loc="left",
                parse_math=False,
            )
            axes.set_xlabel("true contribution", fontsize=8.5, color=QUIET)
            axes.set_ylabel("estimate", fontsize=8.5, color=QUIET)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        legend = figure.legend(
            handles,
            labels,
            loc="upper right",
            bbox_to_anchor=(0.995, 1 - 1.1 / height),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)
                handle.set_sizes([22])  # type: ignore[attr-defined]  # points of a scatter
        heading = "Estimates against exact patching" + (f": {title}" if title else "")
        caption = f"Contributions of {len(nodes)} nodes; on the line the estimate is right."
        add_heading(figure, heading, caption, left_inches=0.8)
    return figure


def scatter_page(
    estimates: Mapping[str, Any], exact: Any, nodes: NodeSet, *, title: str = "", max_nodes: int = 3000
) -> str:
    """The points as one HTML document that needs nothing else.

    Args:
        estimates: Per method the estimated contribution of each node, `[node]`.
        exact: The true contributions, `[node]`.
        nodes: The nodes.
        title: What to add to the heading, such as the model's name.
        max_nodes: How many nodes to keep: those of the lowest rank, by the truth or by any method.

    Returns:
        The document.

    Raises:
        InvalidInputError: There is no method, or a contribution is negative or not finite.
        ShapeError: There is not one contribution per node.
    """
    given, truth, correlations = checked_estimates(estimates, exact, nodes)
    ranks = {name: _ranks(nodes, values) for name, values in {"": truth, **given}.items()}
    best = np.minimum.reduce(list(ranks.values()))
    kept = np.sort(np.argsort(best, kind="stable")[:max_nodes])
    names = [group.name for group in nodes.groups]
    data: dict[str, Any] = {
        "names": [str(nodes[int(i)]) for i in kept],
        "group": [names.index(nodes[int(i)].site.name) for i in kept],
        "groups": names,
        "colours": _cycled(len(names)),
        "exact": _short(truth[kept]),
        "rank": ranks[""][kept].tolist(),
        "methods": [
            {
                "name": name,
                "estimate": _short(values[kept]),
                "rank": ranks[name][kept].tolist(),
                "spearman": f"{correlations[name]:.3f}",
            }
            for name, values in given.items()
        ],
        "ends": _ends_of_shown([values[kept] for values in (truth, *given.values())], _ends(given, truth)),
    }
    heading = "Estimates against exact patching" + (f": {title}" if title else "")
    body = _BODY.format(heading=escape(heading), n_kept=len(kept), n_nodes=len(nodes))
    return html_page(heading, body=body, style=_STYLE, script=_SCRIPT, data=data)


def _ends_of_shown(shown: list[np.ndarray], ends: tuple[float, float]) -> tuple[float, float]:
    """The same ends, but no lower than the smallest number that is shown."""
    numbers = np.concatenate(shown)
    low = float(numbers.min(where=numbers > 0, initial=np.inf)) / 1.6
    return (max(low, ends[0]) if np.isfinite(low) else ends[0]), ends[1]


def _ends(given: Mapping[str, np.ndarray], truth: np.ndarray) -> tuple[float, float]:
    high = max(float(values.max()) for values in (truth, *given.values())) or 1.0
    return _LOWEST * high, 1.6 * high


def _ranks(nodes: NodeSet, values: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(nodes), int)
    ranks[nodes.order(values)] = np.arange(1, len(nodes) + 1)
    return ranks


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def _cycled(n: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(n)]


_BODY = """
<header>
  <h1>{heading}</h1>
  <p class="quiet">True contributions to the right, estimates upwards, both on logarithmic axes; on the line the
  estimate is right. {n_kept} of {n_nodes} nodes are shown, those that rank first by the truth or by some method;
  correlations of ranks are over all.</p>
</header>
<div class="legend" id="legend"></div>
<p id="told" class="told" aria-live="polite">Point at a node.</p>
<div id="panels" class="panels"></div>
"""

_STYLE = """
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; font-size: 13px; margin: 10px 0 4px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin: 0 6px 0 0; }
.told { position: sticky; top: 0; background: var(--surface); min-height: 1.5em; padding: 4px 0; }
.panels { display: flex; flex-wrap: wrap; gap: 18px; }
h2 { font-size: 14px; margin: 6px 0 4px; font-weight: 500; }
svg { background: var(--raised); border-radius: 6px; }
svg text { fill: var(--quiet); font-size: 10px; }
circle.here { stroke: var(--ink); stroke-width: 2; }
"""

_SCRIPT = r"""
const size = 420, left = 44, below = 22, [low, high] = DATA.ends;
const at = (value) => size * Math.log(Math.max(value, low) / low) / Math.log(high / low);
DATA.groups.forEach((name, g) => {
  const item = make("span"), mark = make("i");
  mark.style.background = DATA.colours[g];
  item.append(mark, name);
  byId("legend").append(item);
});
const panels = DATA.methods.map((method) => {
  const box = make("section"), plot = svg("svg", { width: left + size + 8, height: size + below + 8 });
  box.append(make("h2", method.name + ": rank correlation " + method.spearman), plot);
  byId("panels").append(box);
  for (let power = Math.ceil(Math.log10(low)); 10 ** power <= high; power++) {
    const p = at(10 ** power), label = "1e" + power;
    plot.append(
      svg("line", { x1: left + p, x2: left + p, y1: 8, y2: 8 + size, stroke: "var(--line)" }),
      svg("line", { x1: left, x2: left + size, y1: 8 + size - p, y2: 8 + size - p, stroke: "var(--line)" }),
      svg("text", { x: left + p, y: size + below, "text-anchor": "middle" }, label),
      svg("text", { x: left - 6, y: 11 + size - p, "text-anchor": "end" }, label));
  }
  plot.append(svg("line", { x1: left, y1: 8 + size, x2: left + size, y2: 8, stroke: "var(--quiet)" }));
  const points = DATA.names.map((name, i) => {
    const point = svg("circle", { cx: left + at(DATA.exact[i]), cy: 8 + size - at(method.estimate[i]), r: 3,
      fill: DATA.colours[DATA.group[i]], "fill-opacity": 0.7 });
    plot.append(point);
    return point;
  });
  plot.addEventListener("mousemove", (event) => {
    const box = plot.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, least = 15 ** 2;
    for (let i = 0; i < DATA.names.length; i++) {
      const distance = (left + at(DATA.exact[i]) - x) ** 2 + (8 + size - at(method.estimate[i]) - y) ** 2;
      if (distance < least) { least = distance; best = i; }
    }
    if (best >= 0) tell(best);
  });
  return points;
});
let here = [];
function tell(i) {
  for (const point of here) point.classList.remove("here");
  // The same node in every panel.
  here = panels.map((points) => points[i]);
  for (const point of here) { point.classList.add("here"); point.parentNode.append(point); }
  byId("told").replaceChildren(make("b", DATA.names[i]), ": true " + DATA.exact[i] + " (rank " + DATA.rank[i] + "); " +
    DATA.methods.map((method) => method.name + " " + method.estimate[i] + " (" + method.rank[i] + ")").join(", "));
}
"""
