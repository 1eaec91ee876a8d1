"""Sweeps of SAEs as curves over L0: a panel for each number, a line for each way of training.

A line goes through the means over seeds at each coefficient; the small dots are the seeds.

    sweep_figure(sweep, title="ghost gradients").savefig("frontier.png")

>>> sweep_figure.__name__, PANELS["fvu"]
('sweep_figure', 'FVU')

Sharp edges: L0 is on a logarithmic axis. An SAE without a latent above 0, or without a number (ablation costs nothing),
has no dot, and its mean no place on the line.

Source: Rajamanoharan et al. 2024 (2404.16014) for the frontier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.figures.plotting import INK, LINE, QUIET, SERIES, add_heading, drawable, drawing
from interp_jax.methods.sae.sweeps import SAESweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS: Mapping[str, str] = {
    "loss_recovered_mean": "loss recovered (from the mean)",
    "fvu": "FVU",
    "dead_share": "share of latents dead at the end",
}
# A colour stands for up to three lines, told apart by their strokes and marks.
_STROKES, _MARKS = ("-", "--", ":"), ("o", "s", "^")


def sweep_figure(sweep: SAESweep, *, panels: Sequence[str] = tuple(PANELS), title: str = "") -> Figure:
    """The curves as a matplotlib figure.

    Args:
        sweep: The SAEs.
        panels: Which numbers, as in `SAESweep.table`; those of `PANELS` have words.
        title: What to add to the heading, such as the question.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: No number was asked for.
        UnknownNameError: There is no such number.
    """
    if not panels:
        raise InvalidInputError(
            four_part("No number was given", where="sweep_figure", expected="one or more.", fix="leave panels out.")
        )
    if len(sweep.names) > len(SERIES) * len(_STROKES):
        raise InvalidInputError(
            four_part(
                f"{len(sweep.names)} ways of training were given",
                where="sweep_figure",
                expected=f"at most {len(SERIES) * len(_STROKES)}, which can be told apart.",
                fix="draw some of them: SAESweep(sweep.model, sweep.site, rows of these).",
            )
        )
    places, tables = sweep.table("l0"), {number: sweep.table(number) for number in panels}
    n_seeds = len({row.seed for row in sweep.rows})
    height, left, legend = 4.6, 0.8, 0.75 + 0.08 * max(len(name) for name in sweep.names)
    width = 0.4 + 3.7 * len(panels) + legend
    with drawing(width, height) as figure:
        for index, number in enumerate(panels):
            x = (left + 3.7 * index) / width
            axes = figure.add_axes((x, 0.62 / height, 2.95 / width, (height - 1.75) / height))
            axes.set_xscale("log")
            for place, name in enumerate(sweep.names):
                _draw(axes, places[name], tables[number][name], place, label=drawable(name))
            axes.set_ylabel(PANELS.get(number, number), fontsize=9, color=QUIET)
            axes.set_xlabel("L0: latents above 0 per token", fontsize=9, color=QUIET)
            _finish(axes)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        box = figure.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=((width - legend) / width, 1 - 1.05 / height),
            frameon=False,
            fontsize=8.5,
            labelcolor=INK,
            handlelength=3.0,
        )
        for text in box.get_texts():
            text.set_parse_math(False)
        first = sweep.rows[0].evaluation
        told = f"{n_seeds} seeds: lines join their means, dots are the seeds" if n_seeds > 1 else "1 seed"
        caption = f"{first.reconstruction.n_tokens:,} held-out tokens. {told}; each dot is one coefficient."
        heading = f"SAEs at {sweep.site} of {sweep.model}" + (f": {title}" if title else "")
        add_heading(figure, heading, caption, left_inches=0.3)
    return figure


def _draw(axes: Any, l0: np.ndarray, values: np.ndarray, place: int, *, label: str) -> None:
    """One way's seeds and the line through their means."""
    colour, kind = SERIES[place % len(SERIES)], place // len(SERIES)
    shown = (l0 > 0) & np.isfinite(values)
    axes.plot(l0[shown], values[shown], linestyle="", marker=_MARKS[kind], markersize=2.6, color=colour, alpha=0.55)
    whole = shown.all(axis=0)
    x, y = np.exp(np.log(l0[:, whole]).mean(axis=0)), values[:, whole].mean(axis=0)
    order = np.argsort(x)
    axes.plot(
        x[order],
        y[order],
        linestyle=_STROKES[kind],
        marker=_MARKS[kind],
        markersize=4.5,
        linewidth=1.3,
        color=colour,
        label=label,
    )


def _finish(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_axisbelow(True)
    axes.grid(color=LINE, linewidth=0.7)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=INK)
