"""Pictures of a sparsity sweep: loss recovered and FVU against L0, side by side for each dictionary or each encoder.

One panel per dictionary compares its encoders; one per encoder compares the dictionaries.

    sparsity_figure(sweep, panels="encoder").savefig("pareto.png")

>>> sparsity_figure.__name__, PANELS
('sparsity_figure', ('dictionary', 'encoder'))

Sharp edges: L0 is logarithmic. What recovers less than nothing is below the axis; the caption counts such points, and
those without a number.

Source: Smith 2024, Replacing SAE Encoders with Inference-Time Optimisation, for the axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, check_choice, four_part
from interp_jax.figures.plotting import INK, LINE, QUIET, SERIES, add_heading, drawable, drawing
from interp_jax.methods.sparsity_sweep import SparsityCurve, SparsitySweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = ("dictionary", "encoder")
_MARKERS = ("o", "s", "^", "D", "v")
_COLOURS = (*SERIES, "#b0386a")
_LOWEST = -0.05
_PANEL_INCHES, _LEFT, _TOP, _LEGEND = 2.55, 0.85, 1.35, 0.5


def sparsity_figure(
    sweep: SparsitySweep, *, panels: str = "dictionary", ablation: str = "zero", title: str = ""
) -> Figure:
    """Loss recovered and FVU by L0, as a matplotlib figure.

    Args:
        sweep: The sweep.
        panels: What has a panel of its own, "dictionary" or "encoder"; the other is told by colours.
        ablation: What the loss is recovered from, "zero" or "mean".
        title: What to add to the heading, such as the site.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        UnknownNameError: No such panels, or the ablation was not run.
        InvalidInputError: There is nothing in the sweep.
    """
    rows = _lines(sweep, panels, ablation)
    columns = list(dict.fromkeys(column for column, *_ in rows))
    series = list(dict.fromkeys(line for _, line, *_ in rows))
    every = np.concatenate([recovered for *_, recovered in rows])
    n_low, n_without = int((every < _LOWEST).sum()), int(np.isnan(every).sum())
    width, height = _LEFT + _PANEL_INCHES * len(columns) + 0.15, 6.35
    width = max(width, 5.6)
    with drawing(width, height) as figure:
        panel_height = (height - _TOP - _LEGEND - 0.75) / 2
        grid: list[list[Any]] = [[], []]
        for row in range(2):
            bottom = _LEGEND + 0.45 + (1 - row) * (panel_height + 0.3)
            for column in range(len(columns)):
                box = (
                    (_LEFT + _PANEL_INCHES * column) / width,
                    bottom / height,
                    (_PANEL_INCHES - 0.2) / width,
                    panel_height / height,
                )
                shared = {"sharex": grid[0][0], "sharey": grid[row][0] if column else None} if grid[0] else {}
                grid[row].append(figure.add_axes(box, **shared))
        for column, line, curve, recovered in rows:
            look = _look(series.index(line))
            label = drawable(line)
            for axes, values in zip(
                (part[columns.index(column)] for part in grid), (recovered, curve.fvu), strict=True
            ):
                _draw(axes, curve, values, look, label)
        _dress(grid, columns)
        handles: dict[str, Any] = {}
        for axes in grid[0]:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        legend = figure.legend(
            [handles[drawable(name)] for name in series],
            [drawable(name) for name in series],
            loc="lower left",
            bbox_to_anchor=((_LEFT - 0.1) / width, 0.02),
            ncols=min(len(series), 6 if width > 8 else 3),
            frameon=False,
            fontsize=8.5,
            labelcolor=INK,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        heading = f"Sparsity, by {panels}" + (f": {title}" if title else "")
        there = "zeros" if ablation == "zero" else "its mean"
        caption = f"Loss recovered: 1 is the clean loss, 0 the loss with {there} at the site. Stars: own sparsity."
        more = f"{sweep.n_tokens:,} tokens of {sweep.n_sequences} held-out sequences."
        more += f" Below the axis: {n_low}." * bool(n_low) + f" Without a number: {n_without}." * bool(n_without)
        add_heading(figure, heading, caption, more, left_inches=_LEFT)
    return figure


def _lines(sweep: SparsitySweep, panels: str, ablation: str) -> list[tuple[str, str, SparsityCurve, np.ndarray]]:
    """Panel, line, and what is drawn there; an encoder with a sparsity of its own is a point in every panel."""
    check_choice(panels, PANELS, what="panels", where="sparsity_figure")
    pairs = [(dictionary, encoder) for dictionary, several in sweep.curves.items() for encoder in several]
    if not pairs:
        raise InvalidInputError(
            four_part(
                "A sweep of nothing was given",
                where="sparsity_figure",
                expected="a sweep of one coder or more.",
                fix="give what sparsity_sweep returned.",
            )
        )
    by_steps = [encoder for dictionary, encoder in pairs if sweep.curve(dictionary, encoder).targets is not None]
    found = []
    for dictionary, encoder in pairs:
        curve, recovered = sweep.curve(dictionary, encoder), sweep.loss_recovered(dictionary, encoder, ablation)
        if panels == "dictionary":
            found.append((dictionary, encoder, curve, recovered))
        else:
            columns = [encoder] if curve.targets is not None or not by_steps else list(dict.fromkeys(by_steps))
            found += [(column, dictionary, curve, recovered) for column in columns]
    return found


def _look(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}


def _draw(axes: Any, curve: SparsityCurve, values: np.ndarray, look: dict[str, Any], label: str) -> None:
    shown = ~np.isnan(values)
    if curve.targets is None:
        look = look | {"marker": "*", "markersize": 11, "linestyle": "none", "zorder": 4}
        look |= {"markeredgecolor": "white", "markeredgewidth": 0.6}
        # Where the dictionary has a line in the panel, that is what the legend shows.
        label = label if label not in axes.get_legend_handles_labels()[1] else "_nolegend_"
    else:
        look = look | {"markersize": 4, "linewidth": 1.4}
    axes.plot(curve.l0[shown], values[shown], label=label, **look)


def _dress(grid: list[list[Any]], columns: list[str]) -> None:
    for row, name in enumerate(("loss recovered", "FVU")):
        low, high = grid[row][0].get_ylim()
        grid[row][0].set_ylim(max(low, _LOWEST) if row == 0 else max(low, 0.0), high)
        grid[row][0].set_ylabel(name, fontsize=9, color=QUIET)
        for column, axes in enumerate(grid[row]):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_axisbelow(True)
            axes.grid(color=LINE, linewidth=0.7)
            axes.spines[:].set_visible(False)
            axes.tick_params(which="both", length=0, labelsize=8, labelcolor=INK)
            axes.tick_params(labelleft=column == 0, labelbottom=row == 1)
            if row == 0:
                axes.set_title(drawable(columns[column]), fontsize=9.5, color=INK, loc="left", parse_math=False)
            else:
                axes.set_xlabel("L0 (latents per token)", fontsize=9, color=QUIET)
