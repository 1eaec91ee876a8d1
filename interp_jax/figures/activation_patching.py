"""Pictures of the effects of nodes: a map of layers by positions, or by heads, one per name of site.

Sites with a whole vector per node are drawn layer by position, heads layer by head. `patching_figure` draws the maps
with matplotlib; `patching_page` is one HTML file in which the cell under the pointer tells its node and number. Both
take exact effects (`activation_patching`, `ablation`) and estimates (`attribution_patching`) alike.

    patching_figure(result, labels=token_texts(lm.decode, tokens[0]), metric="logit(Mary) - logit(John)")

>>> patching_figure.__name__, patching_page.__name__
('patching_figure', 'patching_page')

Sharp edges: effects are means over the batch, with their sign. Of heads at several positions the sum over these is
drawn, unless one is chosen. Neurons have no map. Each map has a scale of its own, given in its heading. Rows run as in
the model seen from below: layer 0 at the bottom.

Source: Meng et al. 2022 (2202.05262), for maps of layers by positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.figures.grid_page import BODY, SCRIPT, STYLE
from interp_jax.figures.page import escape, html_page
from interp_jax.figures.plotting import INK, QUIET, add_heading, drawable, drawing, signed_colours
from interp_jax.figures.token_text import shorten_text
from interp_jax.forward.nodes import NEURONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from interp_jax.methods.activation_patching import PatchingResult
    from interp_jax.methods.atp import AttributionResult

_WHERE = "a picture of the effects of nodes"


class EffectMap(NamedTuple):
    """One map.

    Args:
        name: Name of the sites.
        rows: Labels of the rows, lowest first.
        columns: Labels of the columns.
        axis: What a column is: "position" or "head".
        values: The effects, `[row, column]`.
        covers: Which positions a head's cell covers; empty where columns are positions.
    """

    name: str
    rows: list[str]
    columns: list[str]
    axis: str
    values: np.ndarray
    covers: str


def effect_maps(
    result: PatchingResult | AttributionResult, *, labels: Sequence[str] | None = None, position: int | None = None
) -> list[EffectMap]:
    """What both pictures show: a map for each name of site.

    Args:
        result: Effects of nodes, or estimates of them.
        labels: Text of each token of the prompt, for the columns.
        position: Of heads, which position to draw, negative from the end; by default the sum over the nodes' positions.

    Returns:
        The maps; sites of neurons are left out.

    Raises:
        InvalidInputError: All nodes are neurons, or the heads have no nodes at the position.
        ShapeError: There is not one label per position.
    """
    nodes = result.nodes
    if labels is not None and len(labels) != nodes.n_pos:
        raise ShapeError(
            four_part(
                f"{len(labels)} labels were given for prompts of {nodes.n_pos} tokens",
                where=_WHERE,
                expected="one label per position.",
                fix="pass token_texts(lm.decode, tokens[0]).",
            )
        )
    maps = []
    for group in nodes.groups:
        if group.name in NEURONS:
            continue
        values = result.grid(group.name)
        rows = [group.name if layer is None else str(layer) for layer in group.layers]
        if group.n_units is None:
            columns = [str(p) if labels is None else f"{p} {labels[p]}" for p in group.positions]
            columns = ["all positions"] if group.is_pooled else columns
            maps.append(EffectMap(group.name, rows, columns, "position", values[:, :, 0], ""))
            continue
        covers = "all positions" if len(group.positions) == nodes.n_pos else f"positions {list(group.positions)}"
        covers = f"position {group.positions[0]}" if len(group.positions) == 1 else covers
        if position is not None:
            at = position + nodes.n_pos * (position < 0)
            if group.is_pooled or at not in group.positions:
                raise InvalidInputError(
                    four_part(
                        f"position={position} was given, and the nodes at {group.name!r} are at {covers}",
                        where=_WHERE,
                        expected="a position with nodes of its own.",
                        fix="choose one of these, or leave position out for the sum.",
                    )
                )
            values, covers = values[:, [group.positions.index(at)]], f"position {at}"
        elif not group.is_pooled and len(group.positions) > 1:
            covers = f"sum over {covers}"
        heads = [str(head) for head in range(values.shape[2])]
        maps.append(EffectMap(group.name, rows, heads, "head", values.sum(1), covers))
    if not maps:
        raise InvalidInputError(
            four_part(
                f"Nodes that are all neurons were given ({', '.join(group.name for group in nodes.groups)})",
                where=_WHERE,
                expected="heads or whole vectors, which have a map.",
                fix="list neurons by result.top(20), or compare estimates with scatter_figure.",
            )
        )
    return maps


def patching_figure(
    result: PatchingResult | AttributionResult,
    *,
    labels: Sequence[str] | None = None,
    position: int | None = None,
    title: str = "",
    metric: str = "the metric",
    n_labels: int = 4,
) -> Figure:
    """The maps as a matplotlib figure, side by side.

    Args:
        result: Effects of nodes, or estimates of them.
        labels: Text of each token of the prompt, for the columns.
        position: Of heads, which position to draw, negative from the end; by default the sum over the nodes' positions.
        title: What to add to the heading, such as the model's name.
        metric: What the metric is, in words or symbols.
        n_labels: How many of the largest cells of each map carry their value.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: All nodes are neurons, or the heads have no nodes at the position.
        ShapeError: There is not one label per position.
    """
    maps = effect_maps(result, labels=labels, position=position)
    widths = [max(1.5, 0.36 * len(one.columns)) for one in maps]
    tallest = max(1.2, 0.2 * max(len(one.rows) for one in maps))
    is_worded = any(one.axis == "position" for one in maps) and labels is not None
    below, above, gap = 1.35 if is_worded else 0.6, 1.3, 0.6
    width, height = max(8.5, 0.75 + sum(widths) + gap * (len(maps) - 1) + 0.3), above + tallest + below
    with drawing(width, height) as figure:
        left = 0.75
        for one, across in zip(maps, widths, strict=True):
            box = (left / width, below / height, across / width, tallest / height)
            _draw_map(figure.add_axes(box), one, n_labels)
            left += across + gap
        heading = _heading(result) + (f": {title}" if title else "")
        add_heading(figure, heading, *_caption(result, metric), left_inches=0.75)
    return figure


def _draw_map(axes: Axes, one: EffectMap, n_labels: int) -> None:
    limit = float(np.nanmax(np.abs(one.values), initial=0.0)) or 1.0
    axes.pcolormesh(one.values, cmap=signed_colours(), vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.6)
    order = np.argsort(-np.nan_to_num(np.abs(one.values)), axis=None, kind="stable")[:n_labels]
    for row, column in zip(*np.unravel_index(order, one.values.shape), strict=True):
        value = one.values[row, column]
        if not value or np.isnan(value):
            continue
        axes.text(
            column + 0.5,
            row + 0.47,
            f"{value:+.1f}".replace("-", "−") if limit >= 0.5 else f"{value:+.1g}".replace("-", "−"),
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if abs(value) > 0.7 * limit else INK,
        )
    axes.set_yticks(np.arange(len(one.rows)) + 0.5, one.rows)
    columns = [drawable(shorten_text(label, 22)) for label in one.columns]
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, parse_math=False)
    if any(not label.isdigit() for label in columns):
        axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=0, labelsize=7.5, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("layer", fontsize=8.5, color=QUIET, labelpad=2)
    axes.set_xlabel(one.axis + (f" ({one.covers})" if one.covers else ""), fontsize=8.5, color=QUIET)
    axes.set_title(f"{one.name}   ±{limit:.3g}", fontsize=9.5, color=INK, loc="left")


def patching_page(
    result: PatchingResult | AttributionResult,
    *,
    labels: Sequence[str] | None = None,
    position: int | None = None,
    title: str = "",
    metric: str = "the metric",
    text: str = "",
) -> str:
    """The maps as one HTML document that needs nothing else.

    Args:
        result: Effects of nodes, or estimates of them.
        labels: Text of each token of the prompt, for the columns.
        position: Of heads, which position to draw, negative from the end; by default the sum over the nodes' positions.
        title: What to add to the heading, such as the model's name.
        metric: What the metric is, in words or symbols.
        text: The prompt, shown under the heading.

    Returns:
        The document.

    Raises:
        InvalidInputError: All nodes are neurons, or the heads have no nodes at the position.
        ShapeError: There is not one label per position.
    """
    grids = [
        {
            "title": one.name + (f" ({one.covers})" if one.covers else ""),
            "corner": "layer",
            "rows": one.rows[::-1],
            # Words would be wider than their cells: the pointer tells them.
            "columns": [column.split(" ")[0] for column in one.columns],
            "column_names": one.columns,
            "values": [
                [float(f"{value:.5g}") if np.isfinite(value) else None for value in row] for row in one.values[::-1]
            ],
            "name": f"{one.name}, layer {{row}}, {one.axis} {{column}}",
        }
        for one in effect_maps(result, labels=labels, position=position)
    ]
    heading = _heading(result) + (f": {title}" if title else "")
    body = BODY.format(heading=escape(heading), text=escape(text), caption=escape(" ".join(_caption(result, metric))))
    return html_page(heading, body=body, style=STYLE, script=SCRIPT, data={"grids": grids})


def _heading(result: Any) -> str:
    kind = getattr(result, "kind", None)
    if kind is None:
        return "Attribution patching"
    return f"Activation patching, {kind}" if result.other is not None else f"Ablation, {kind}"


def _caption(result: Any, metric: str) -> tuple[str, str]:
    kind = getattr(result, "kind", None)
    ways = {
        None: "Estimated change of {} when one part takes its value from the corrupted prompt",
        "noising": "Change of {} when one part takes its value from the corrupted prompt",
        "denoising": "Change of {} on the corrupted prompt when one part takes its value from the clean one",
        "zero": "Change of {} when one part is set to zero",
        "mean": "Change of {} when one part is set to its mean",
        "resample": "Change of {} when one part takes its value from another prompt",
    }
    numbers = f"{np.mean(result.plain):.2f} unchanged"
    if getattr(result, "other", None) is not None:
        numbers += f", {np.mean(result.other):.2f} on the other prompt"
    n = len(result.plain)
    return f"{ways[kind].format(metric)}.", f"The metric is {numbers}; " + (
        "one prompt." if n == 1 else f"mean of {n}."
    )
