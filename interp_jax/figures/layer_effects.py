"""Pictures of layer effects: one bar per layer and kind of write, up or down from the clean metric.

`effects_figure` draws it with matplotlib; `effects_page` is one HTML file whose bars tell their numbers, with all
of them in a table below.

    effects_figure(result, metric="logit(Mary) - logit(John)").savefig("effects.png")

>>> effects_figure.__name__, effects_page.__name__
('effects_figure', 'effects_page')

Sharp edges: one row of the batch a picture. A bar below zero means that the answer loses when the layer is silent.
The scale is linear; one huge bar (layer 0's MLP, in many models) makes the others small, and is then cut off and
labelled with its value.

Source: interp_jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.figures.effects_page import BODY, SCRIPT, STYLE
from interp_jax.figures.page import escape, html_page
from interp_jax.figures.plotting import INK, LINE, QUIET, SERIES, add_bar_legend, add_heading, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from interp_jax.methods.layer_effects import LayerEffectsResult

# A bar longer than this many times the third longest one is cut off.
_CUT = 2.5


def effects_by_name(result: LayerEffectsResult, *, row: int = 0) -> tuple[list[int], dict[str, list[float | None]]]:
    """The effects as one series per name of site, over the layers that have any.

    Args:
        result: Layer effects.
        row: Which row of the batch.

    Returns:
        The layers, and per name the effect in each of them, None where a layer has no such site. Sites outside the
        layers are left out.

    Raises:
        InvalidInputError: There is no such row, or no site within a layer.
    """
    effects = (
        {site: float(effect[row]) for site, effect in zip(result.sites, result.effects, strict=True)}
        if (0 <= row < len(result.clean))
        else {}
    )
    layers = sorted({site.layer for site in effects if site.layer is not None})
    if not layers:
        raise InvalidInputError(
            four_part(
                f"row={row} of a result with {len(result.sites)} sites was given",
                where="a picture of layer effects",
                expected=f"a row from 0 to {len(result.clean) - 1}, and at least one site within a layer.",
                fix="choose another row, or measure sites of layers.",
            )
        )
    names = list(dict.fromkeys(site.name for site in effects if site.layer is not None))
    by_place = {(site.layer, site.name): effect for site, effect in effects.items()}
    return layers, {name: [by_place.get((layer, name)) for layer in layers] for name in names}


def axis_range(series: dict[str, list[float | None]]) -> tuple[float, float]:
    """The range of the axis: the longest bar to each side, unless that would dwarf all but two.

    Args:
        series: Effects by name.

    Returns:
        A negative and a positive number.
    """
    effects = np.array([effect for row in series.values() for effect in row if effect is not None])
    sizes = np.sort(np.abs(effects))[::-1]
    third = sizes[min(2, len(sizes) - 1)]
    limit = (min(sizes[0], _CUT * third) if third > 0 else sizes[0]) or 1.0
    # Some room to each side for the values of the longest bars.
    low, high = max(-limit, min(0.0, effects.min())), min(limit, max(0.0, effects.max()))
    return float(low - 0.12 * limit), float(high + 0.12 * limit)


def effects_figure(
    result: LayerEffectsResult, *, row: int = 0, title: str = "", metric: str = "the metric", n_labels: int = 4
) -> Figure:
    """The effects as a matplotlib figure.

    Args:
        result: Layer effects.
        row: Which row of the batch.
        title: What to add to the heading, such as the model's name.
        metric: What the metric is, in words or symbols.
        n_labels: How many of the strongest bars carry their value.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: There is no such row, or no site within a layer.
    """
    layers, series = effects_by_name(result, row=row)
    heading = "Layer effects" + (f": {title}" if title else "")
    width, height = max(7.5, 1.8 + 0.32 * len(layers) * max(1.0, len(series) / 2)), 4.6
    edge = 0.85
    left, right, bottom, top = edge / width, 1 - 0.3 / width, 0.62 / height, 1 - 1.12 / height
    with drawing(width, height) as figure:
        axes = figure.add_axes((left, bottom, right - left, top - bottom))
        _draw_bars(axes, layers, series, n_labels)
        caption = (
            f"Change of {metric} (clean: {result.clean[row]:.2f}) when one write to the residual stream is zeroed."
        )
        add_heading(figure, heading, caption, left_inches=edge)
        add_bar_legend(figure, axes, left_inches=edge)
    return figure


def _draw_bars(axes: Axes, layers: list[int], series: dict[str, list[float | None]], n_labels: int) -> None:
    low, high = axis_range(series)
    axes.set_ylim(low, high)
    thickness = 0.8 / len(series)
    drawn = []
    for index, (name, effects) in enumerate(series.items()):
        offset = (index - (len(series) - 1) / 2) * thickness
        values = np.array([np.nan if effect is None else effect for effect in effects])
        places = np.arange(len(layers)) + offset
        colour = SERIES[index % len(SERIES)]
        axes.bar(places, np.clip(values, low, high), 0.9 * thickness, color=colour, label=name, zorder=2)
        drawn += [(abs(value), place, value) for place, value in zip(places, values, strict=True) if np.isfinite(value)]
    strongest = sorted(drawn, reverse=True)[:n_labels]
    for _, place, value in dict.fromkeys(strongest + [bar for bar in drawn if not low <= bar[2] <= high]):
        _label_bar(axes, place, value, thickness=thickness, is_left=place < len(layers) / 2)
    axes.axhline(0, color=QUIET, linewidth=0.8, zorder=3)
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_xticks(np.arange(len(layers)), [str(layer) for layer in layers], fontsize=8, color=INK)
    axes.tick_params(axis="y", labelsize=8, labelcolor=INK, length=0)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=LINE, linewidth=0.7, zorder=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer", fontsize=9, color=QUIET)
    axes.set_ylabel("effect (zeroed − clean)", fontsize=9, color=QUIET)


def _label_bar(axes: Axes, place: float, value: float, *, thickness: float, is_left: bool) -> None:
    """A bar's value at its end, or beside the end of a bar that is cut off, where there is room."""
    from matplotlib.patheffects import withStroke

    low, high = axes.get_ylim()
    sign = 1 if value > 0 else -1
    at, offset, align = (place, value), (0, 8 * sign), "center"
    if not low <= value <= high:
        side = 1 if is_left else -1
        at = (place + side * thickness / 2, low if value < 0 else high)
        offset, align = (3 * side, -6 * sign), "left" if is_left else "right"
    label = axes.annotate(
        f"{value:+.2f}".replace("-", "−"),
        at,
        xytext=offset,
        textcoords="offset points",
        ha=align,
        va="center",
        fontsize=8,
        color=INK,
        zorder=5,
    )
    # Neighbouring bars may reach behind the number.
    label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def effects_page(
    result: LayerEffectsResult, *, row: int = 0, title: str = "", metric: str = "the metric", text: str = ""
) -> str:
    """The effects as one HTML document that needs nothing else.

    Args:
        result: Layer effects.
        row: Which row of the batch.
        title: What to add to the heading, such as the model's name.
        metric: What the metric is, in words or symbols.
        text: The prompt, shown under the heading.

    Returns:
        The document.

    Raises:
        InvalidInputError: There is no such row, or no site within a layer.
    """
    layers, series = effects_by_name(result, row=row)
    heading = "Layer effects" + (f": {title}" if title else "")
    data: dict[str, Any] = {
        "layers": layers,
        "series": [
            {"name": name, "effects": [None if effect is None else float(f"{effect:.5g}") for effect in effects]}
            for name, effects in series.items()
        ],
        "clean": float(f"{result.clean[row]:.5g}"),
        "range": axis_range(series),
    }
    body = BODY.format(
        heading=escape(heading), text=escape(text), metric=escape(metric), clean=f"{result.clean[row]:.3f}"
    )
    return html_page(heading, body=body, style=STYLE, script=SCRIPT, data=data)
