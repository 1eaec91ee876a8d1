"""Pictures of steering: success against loss, and both against the coefficient.

`pareto_figure` draws each coefficient as a point, with the 95 % interval of its P(success); a line joins the points of
a method that no other of its points beats at both, and the others are hollow. `coefficient_figure` draws success and
loss by coefficient, one above the other.

    pareto_figure([steering_sweep(lm, prompt, v, cs, words, text) for v in vectors]).savefig("pareto.png")

>>> pareto_figure.__name__, coefficient_figure.__name__
('pareto_figure', 'coefficient_figure')

Sharp edges: results belong in one picture if prompt, vocabulary and text are the same. Losses far beyond the others (a
collapsed model) are not cut off; leave such coefficients out to see the rest.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.figures.plotting import INK, LINE, QUIET, SERIES, add_heading, drawable, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp_jax.methods.steering.sweep import SteeringResult

_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def checked_results(results: Sequence[SteeringResult]) -> list[SteeringResult]:
    """The results, once it is known that they can stand in one picture.

    Args:
        results: Sweeps.

    Returns:
        A list of at least one.

    Raises:
        InvalidInputError: There is none, or they are of different prompts or texts.
    """
    found = list(results)
    baselines = {f"{result.prompt!r} ({result.baseline:.4f} nats)" for result in found}
    if len(baselines) != 1:
        raise InvalidInputError(
            four_part(
                f"{len(found)} results of {len(baselines)} prompts or texts were given: {', '.join(sorted(baselines))}",
                where="a picture of steering",
                expected="one result or more, all of one prompt and one text.",
                fix="draw a picture for each prompt.",
            )
        )
    return found


def pareto_figure(results: Sequence[SteeringResult], *, title: str = "") -> Figure:
    """Success against loss as a matplotlib figure.

    Args:
        results: Sweeps, one per method.
        title: What to add to the heading, such as the model's name.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: There is no result, or they are of different prompts or texts.
    """
    found = checked_results(results)
    with drawing(9.4, 5.2) as figure:
        axes = figure.add_axes((0.085, 0.115, 0.585, 0.69))
        for index, result in enumerate(found):
            _draw_points(axes, result, index)
        axes.axvline(found[0].baseline, color=QUIET, linewidth=0.9, linestyle=":", label="unsteered loss", zorder=1)
        axes.set_ylim(*_success_range(found))
        axes.margins(x=0.06)
        axes.set_xlabel("loss on ordinary text after the steered positions (nats per token)", fontsize=9, color=QUIET)
        axes.set_ylabel("P(success)", fontsize=9, color=QUIET)
        _finish(axes)
        heading = "Steering: success against loss" + (f": {title}" if title else "")
        captions = (
            f"Upper left is better. {found[0].n_rollouts} completions per coefficient (the numbers), 95 % Wilson "
            f"intervals, {found[0].n_targets:,} targets.",
            f"Continuing {found[0].prompt!r}. Filled and joined: beaten by no other coefficient of the same method.",
        )
        add_heading(figure, heading, *captions, left_inches=0.8)
    return figure


def _draw_points(axes: Any, result: SteeringResult, index: int) -> None:
    """One method's points, its frontier and its intervals."""
    colour, style = SERIES[index % len(SERIES)], _STYLES[index // len(SERIES) % len(_STYLES)]
    marker = _marker(index)
    success, loss = result.points.T
    frontier = result.frontier
    below, above = success - result.intervals[:, 0], result.intervals[:, 1] - success
    axes.errorbar(loss, success, yerr=(below, above), fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.35, zorder=2)
    axes.plot(loss, success, marker, color=colour, markerfacecolor="white", markersize=5, zorder=3)
    label = drawable(f"{result.method}\n  {', '.join(result.sites)}")
    axes.plot(
        loss[frontier],
        success[frontier],
        style,
        marker=marker,
        color=colour,
        markersize=5,
        linewidth=1.5,
        label=label,
        zorder=4,
    )
    for i in frontier:
        axes.annotate(
            f"{result.coefficients[i]:.3g}",
            (loss[i], success[i]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
            color=colour,
        )


def coefficient_figure(results: Sequence[SteeringResult], *, title: str = "") -> Figure:
    """Success and loss by coefficient as a matplotlib figure.

    Args:
        results: Sweeps, one per method.
        title: What to add to the heading, such as the model's name.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: There is no result, or they are of different prompts or texts.
    """
    found = checked_results(results)
    with drawing(9.4, 6.4) as figure:
        upper = figure.add_axes((0.085, 0.5, 0.585, 0.345))
        lower = figure.add_axes((0.085, 0.09, 0.585, 0.345), sharex=upper)
        for index, result in enumerate(found):
            order = np.argsort(result.coefficients)
            c = result.coefficients[order]
            options: dict[str, Any] = {
                "color": SERIES[index % len(SERIES)],
                "linestyle": _STYLES[index // len(SERIES) % len(_STYLES)],
                "marker": _marker(index),
                "markersize": 4,
                "linewidth": 1.5,
            }
            label = drawable(f"{result.method}\n  {', '.join(result.sites)}")
            upper.plot(c, result.p_success[order], label=label, **options)
            success, (low, high) = result.p_success[order], result.intervals[order].T
            # Side by side, so that intervals at one coefficient can be told apart.
            beside = c + (index - (len(found) - 1) / 2) * 0.012 * max(float(np.ptp(c)), 1e-9)
            upper.errorbar(
                beside,
                success,
                yerr=(success - low, high - success),
                fmt="none",
                ecolor=options["color"],
                elinewidth=1.1,
                alpha=0.35,
            )
            lower.plot(c, result.loss[order], **options)
        lower.axhline(found[0].baseline, color=QUIET, linewidth=0.9, linestyle=":")
        upper.set_ylim(*_success_range(found))
        upper.tick_params(labelbottom=False)
        upper.set_ylabel("P(success)", fontsize=9, color=QUIET)
        lower.set_ylabel("loss (nats per token)", fontsize=9, color=QUIET)
        lower.set_xlabel("coefficient", fontsize=9, color=QUIET)
        _finish(upper)
        _finish(lower, has_legend=False)
        heading = "Steering by coefficient" + (f": {title}" if title else "")
        caption = (
            f"Continuing {found[0].prompt!r}; {found[0].n_rollouts} completions each, bars: 95 % intervals. "
            "Dotted: unsteered loss."
        )
        add_heading(figure, heading, caption, left_inches=0.8)
    return figure


def _marker(index: int) -> str:
    """Another one where colours begin anew."""
    return _MARKERS[(index + index // len(SERIES)) % len(_MARKERS)]


def _success_range(results: Sequence[SteeringResult]) -> tuple[float, float]:
    """The axis of P(success): from 0 to the highest interval."""
    top = max(float(result.intervals.max()) for result in results)
    return -0.03 * top, min(1.0, top) * 1.04


def _finish(axes: Any, *, has_legend: bool = True) -> None:
    """Grid, ticks and legend, the same for all axes."""
    axes.set_axisbelow(True)
    axes.grid(color=LINE, linewidth=0.7)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=INK)
    if has_legend:
        legend = axes.legend(
            loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8.5, labelcolor=INK, labelspacing=0.8
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
