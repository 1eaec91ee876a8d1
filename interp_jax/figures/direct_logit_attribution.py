"""Pictures of direct logit attribution: a bar per write, and a layer by head map of what attention adds.

`attribution_figure` draws both with matplotlib; `attribution_page` is one HTML file of coloured grids whose cells tell
their numbers, with all of them in a table below.

    attribution_figure(result, metric="logit(Mary) - logit(John)").savefig("attribution.png")

>>> attribution_figure.__name__, attribution_page.__name__
('attribution_figure', 'attribution_page')

Sharp edges: one row of the batch a picture; of a result with all positions, its last position. Bars and the rest (what
no write adds) sum to the total in the caption. Colours run from minus to plus the largest head's size.

Source: interp_jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.figures.grid_page import BODY, SCRIPT, STYLE
from interp_jax.figures.page import escape, html_page
from interp_jax.figures.plotting import INK, LINE, QUIET, SERIES, add_bar_legend, add_heading, drawing, signed_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

    from interp_jax.methods.direct_logit_attribution import DirectLogitAttributionResult

_REST = "rest"


def contributions_by_name(
    result: DirectLogitAttributionResult, *, row: int = 0
) -> tuple[list[str], dict[str, list[float | None]]]:
    """The contributions of one row as series over columns: one column per layer, and one per part outside of them.

    Args:
        result: A direct logit attribution.
        row: Which row of the batch; with all positions, its last position.

    Returns:
        The columns' labels, such as "embed", "0", "1", "rest"; and per name of site one number a column, or None.

    Raises:
        InvalidInputError: There is no such row.
    """
    if not 0 <= row < len(result.total):
        raise InvalidInputError(
            four_part(
                f"row={row} was given",
                where="a picture of direct logit attribution",
                expected=f"a row of the batch, 0 to {len(result.total) - 1}.",
                fix="choose one of these rows.",
            )
        )
    values = {site: _last(result.contributions[i, row]) for i, site in enumerate(result.sites)}
    outside = [site.name for site in values if site.layer is None]
    layers = sorted({site.layer for site in values if site.layer is not None})
    series: dict[str, list[float | None]] = {"outside the layers": [None] * (len(outside) + len(layers) + 1)}
    for site, value in values.items():
        if site.layer is None:
            series["outside the layers"][outside.index(site.name)] = value
        else:
            column = series.setdefault(site.name, [None] * (len(outside) + len(layers) + 1))
            column[len(outside) + layers.index(site.layer)] = value
    series["outside the layers"][-1] = _last(result.remainder[row])
    return [*outside, *map(str, layers), _REST], series


def attribution_figure(
    result: DirectLogitAttributionResult,
    *,
    row: int = 0,
    title: str = "",
    metric: str = "the logit",
    n_labels: int = 4,
) -> Figure:
    """The contributions as a matplotlib figure.

    Args:
        result: A direct logit attribution.
        row: Which row of the batch.
        title: What to add to the heading, such as the model's name.
        metric: What was split, in words or symbols.
        n_labels: How many of the largest bars, and of the heads, carry their value.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: There is no such row.
    """
    columns, series = contributions_by_name(result, row=row)
    n_heads = 0 if result.heads is None else result.heads.shape[1]
    width, bars, cells = max(7.5, 1.6 + 0.3 * len(columns)), 3.0, 0.22 * n_heads
    height = 1.8 + bars + (1.0 + cells if n_heads else 0)
    edge = 0.9
    left, across = edge / width, 1 - 1.3 / width
    with drawing(width, height) as figure:
        axes = figure.add_axes((left, 1 - (1.2 + bars) / height, across, bars / height))
        _draw_bars(axes, columns, series, n_labels)
        if result.heads is not None:
            below = figure.add_axes((left, 0.6 / height, across, cells / height))
            _draw_heads(below, result, row, n_labels)
        heading = "Direct logit attribution" + (f": {title}" if title else "")
        caption = f"What each write adds to {metric} ({_last(result.total[row]):.2f} in all)."
        add_heading(figure, heading, caption, left_inches=edge)
        add_bar_legend(figure, axes, left_inches=edge)
    return figure


def _draw_bars(axes: Axes, columns: list[str], series: dict[str, list[float | None]], n_labels: int) -> None:
    inside = [name for name in series if name != "outside the layers"]
    thickness = 0.8 / max(1, len(inside))
    drawn = []
    for index, (name, given) in enumerate(series.items()):
        values = np.array([np.nan if value is None else value for value in given])
        is_outside = name not in inside
        offset = 0.0 if is_outside else (inside.index(name) - (len(inside) - 1) / 2) * thickness
        places = np.arange(len(columns)) + offset
        # The first two colours for what stands in every layer.
        colour = SERIES[3] if is_outside else SERIES[(index - 1) % 3]
        axes.bar(places, values, (0.6 if is_outside else 0.9) * thickness, color=colour, label=name, zorder=2)
        drawn += [(abs(value), place, value) for place, value in zip(places, values, strict=True) if np.isfinite(value)]
    for _, place, value in sorted(drawn, reverse=True)[:n_labels]:
        axes.annotate(
            f"{value:+.2f}".replace("-", "−"),
            (place, value),
            xytext=(0, 8 if value > 0 else -8),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.axhline(0, color=QUIET, linewidth=0.8, zorder=3)
    axes.margins(y=0.12)
    axes.set_xlim(-0.7, len(columns) - 0.3)
    axes.set_xticks(np.arange(len(columns)), columns, fontsize=8, color=INK)
    # Words are wider than a column.
    for label in axes.get_xticklabels():
        label.set_rotation(0 if label.get_text().isdigit() else 90)
    axes.tick_params(axis="both", length=0, labelsize=8, labelcolor=INK)
    axes.grid(axis="y", color=LINE, linewidth=0.7, zorder=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("contribution", fontsize=9, color=QUIET)


def _draw_heads(axes: Axes, result: DirectLogitAttributionResult, row: int, n_labels: int) -> QuadMesh:
    """A map with one column per layer and one row per head."""
    assert result.heads is not None
    values = np.array([[_last(head[row]) for head in layer] for layer in result.heads]).T
    limit = float(np.abs(values).max()) or 1.0
    mesh = axes.pcolormesh(values, cmap=signed_colours(), vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.8)
    for layer, head, value in result.strongest_heads(n_labels, row=row):
        axes.text(
            result.layers.index(layer) + 0.5,
            head + 0.5,
            f"{value:+.1f}".replace("-", "−"),
            ha="center",
            va="center",
            fontsize=6.5,
            color=INK if abs(value) < 0.75 * limit else "white",
        )
    axes.set_xticks(np.arange(len(result.layers)) + 0.5, [str(layer) for layer in result.layers])
    axes.set_yticks(np.arange(len(values)) + 0.5, [str(head) for head in range(len(values))])
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer", fontsize=9, color=QUIET)
    axes.set_ylabel("head", fontsize=9, color=QUIET)
    return mesh


def attribution_page(
    result: DirectLogitAttributionResult,
    *,
    row: int = 0,
    title: str = "",
    metric: str = "the logit",
    text: str = "",
) -> str:
    """The contributions as one HTML document that needs nothing else.

    Args:
        result: A direct logit attribution.
        row: Which row of the batch.
        title: What to add to the heading, such as the model's name.
        metric: What was split, in words or symbols.
        text: The prompt, shown under the heading.

    Returns:
        The document.

    Raises:
        InvalidInputError: There is no such row.
    """
    columns, series = contributions_by_name(result, row=row)
    grids: list[dict[str, Any]] = [
        {
            "title": "Writes to the residual stream",
            "corner": "",
            "rows": list(series),
            "columns": columns,
            "values": [
                [None if value is None else float(f"{value:.5g}") for value in given] for given in series.values()
            ],
            "name": "{column}, {row}",
        }
    ]
    if result.heads is not None:
        heads = [[float(f"{_last(head[row]):.5g}") for head in layer] for layer in result.heads]
        grids.append(
            {
                "title": "Heads",
                "corner": "layer",
                "rows": [str(layer) for layer in result.layers],
                "columns": [str(head) for head in range(result.heads.shape[1])],
                "values": heads,
                "name": "layer {row}, head {column}",
            }
        )
    heading = "Direct logit attribution" + (f": {title}" if title else "")
    caption = f"What each write adds to {metric} ({_last(result.total[row]):.3f} in all)."
    body = BODY.format(heading=escape(heading), text=escape(text), caption=escape(caption))
    return html_page(heading, body=body, style=STYLE, script=SCRIPT, data={"grids": grids})


def _last(values: Any) -> float:
    """The number, or the last position's."""
    return float(np.asarray(values).reshape(-1)[-1])
