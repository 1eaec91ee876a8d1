"""Pictures of SAE evaluations: how often latents fire, and what sparsity costs the model.

`density_figure` draws the histogram of log10(frequency + 10^-6.5) of each SAE, in which latents that never fire stand
in a spike at -6.5; `frontier_figure` draws loss recovered against L0, a line per series of SAEs. `evaluation_page` is
one HTML file with both and with all numbers.

    evaluations = {"relu": [evaluate_sae(lm, sae, tokens) for sae in sweep], "topk": evaluate_sae(lm, other, tokens)}
    frontier_figure(evaluations, ablation="zero").savefig("frontier.png")

>>> density_figure.__name__, frontier_figure.__name__, evaluation_page.__name__
('density_figure', 'frontier_figure', 'evaluation_page')

Sharp edges: compare frontiers of one site and one text only. Where ablation costs nothing there is no point; the
caption says how many are left out. Frequencies below one over the number of tokens read cannot be told from 0.

Source: Bricken et al. 2023 for the histogram; Rajamanoharan et al. 2024 (2404.16014) for the frontier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.figures.page import escape, html_page
from interp_jax.figures.plotting import INK, LINE, QUIET, SERIES, add_heading, drawable, drawing
from interp_jax.figures.sae_evaluation_page import BODY, SCRIPT, STYLE
from interp_jax.forward.spliced_losses import ABLATIONS
from interp_jax.methods.sae.evaluation import SAEEvaluation
from interp_jax.methods.sae.reconstruction import ULTRA_LOW, Reconstruction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Evaluations = Mapping[str, SAEEvaluation | Sequence[SAEEvaluation]]
_STYLES = ("-", "--", ":", "-.")
_N_BINS = 60


class FrontierPoint(NamedTuple):
    """An SAE in the plane of a frontier: its `l0`, and the share of the loss it has `recovered` (NaN: none)."""

    l0: float
    recovered: float


def series_of(evaluations: Evaluations) -> dict[str, list[SAEEvaluation]]:
    """The evaluations of each series by rising L0.

    Args:
        evaluations: Name to one evaluation or several, each of one SAE.

    Returns:
        Name to evaluations.

    Raises:
        InvalidInputError: There is none, or one of several SAEs at once.
    """
    lists = {name: [one] if isinstance(one, SAEEvaluation) else list(one) for name, one in evaluations.items()}
    if not any(lists.values()):
        raise InvalidInputError(
            four_part(
                "No evaluation was given",
                where="a picture of SAE evaluations",
                expected="a name and an evaluation, or several of each.",
                fix='write {"relu": evaluate_sae(lm, sae, tokens)}.',
            )
        )
    return {name: sorted(one, key=lambda each: each.reconstruction.l0) for name, one in lists.items() if one}


def frontier_points(evaluations: Evaluations, ablation: str) -> dict[str, list[FrontierPoint]]:
    """L0 and loss recovered of each evaluation, by rising L0.

    Args:
        evaluations: Name to one evaluation or several, each of one SAE.
        ablation: "zero" or "mean".

    Returns:
        Name to points.

    Raises:
        InvalidInputError: There is no evaluation.
        UnknownNameError: The ablation was not run.
    """
    return {
        name: [FrontierPoint(one.reconstruction.l0, one.loss_recovered(ablation)) for one in series]
        for name, series in series_of(evaluations).items()
    }


def _densities(evaluations: Evaluations) -> dict[str, Reconstruction]:
    """Each evaluation's reconstruction under a name of its own."""
    return {
        name
        if len(series) == 1
        else f"{name}, L0 {one.reconstruction.l0:.3g}" + f" ({i})" * is_double: one.reconstruction
        for name, series in series_of(evaluations).items()
        for i, one, is_double in _numbered(series)
    }


def _numbered(series: list[SAEEvaluation]) -> list[tuple[int, SAEEvaluation, bool]]:
    labels = [f"{one.reconstruction.l0:.3g}" for one in series]
    return [(i, one, labels.count(label) > 1) for i, (one, label) in enumerate(zip(series, labels, strict=True), 1)]


def density_figure(evaluations: Evaluations, *, title: str = "") -> Figure:
    """Histograms of how often latents fire, as a matplotlib figure.

    Args:
        evaluations: Name to one evaluation or several, each of one SAE.
        title: What to add to the heading, such as the site.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: There is no evaluation.
    """
    densities = _densities(evaluations)
    with drawing(8.4, 4.6) as figure:
        axes = figure.add_axes((0.09, 0.13, 0.58, 0.66))
        for index, (name, reconstruction) in enumerate(densities.items()):
            counts, edges = reconstruction.histogram(_N_BINS)
            dead, low = int(reconstruction.is_dead.sum()), int(reconstruction.is_ultra_low.sum())
            label = drawable(f"{name}\n  {dead} dead, {low} ultra-low of {reconstruction.n_latents}")
            axes.stairs(counts, edges, color=_colour(index), linestyle=_style(index), linewidth=1.5, label=label)
        axes.axvline(np.log10(ULTRA_LOW), color=QUIET, linewidth=0.8, linestyle=":")
        axes.set_xlabel("log10(frequency + 10^-6.5)", fontsize=9, color=QUIET)
        axes.set_ylabel("latents", fontsize=9, color=QUIET)
        n_tokens = " and ".join(f"{n:,}" for n in sorted({one.n_tokens for one in densities.values()}))
        caption = f"Over {n_tokens} tokens. Left spike: never fired. Left of the dotted line: ultra-low."
        _finish(figure, axes, "Densities of latents", title, caption)
    return figure


def frontier_figure(evaluations: Evaluations, *, ablation: str = "zero", title: str = "") -> Figure:
    """Loss recovered against L0, as a matplotlib figure.

    Args:
        evaluations: Name to one evaluation or several, each of one SAE.
        ablation: What the loss is recovered from, "zero" or "mean".
        title: What to add to the heading, such as the site.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: There is no evaluation.
        UnknownNameError: The ablation was not run.
    """
    points = frontier_points(evaluations, ablation)
    n_without = sum(bool(np.isnan(point.recovered)) for series in points.values() for point in series)
    with drawing(8.4, 4.6) as figure:
        axes = figure.add_axes((0.09, 0.13, 0.58, 0.66))
        for index, (name, series) in enumerate(points.items()):
            shown = [point for point in series if not np.isnan(point.recovered)]
            axes.plot(
                [point.l0 for point in shown],
                [point.recovered for point in shown],
                _style(index),
                color=_colour(index),
                marker="o",
                markersize=4,
                linewidth=1.3,
                label=drawable(name),
            )
        axes.set_xlabel("L0: latents above 0 per token", fontsize=9, color=QUIET)
        axes.set_ylabel("loss recovered", fontsize=9, color=QUIET)
        caption = f"1: the clean loss; 0: the loss with the {'site at zero' if ablation == 'zero' else 'mean there'}."
        caption += f" Without a number: {n_without}." if n_without else ""
        _finish(figure, axes, "Loss recovered by L0", title, caption)
    return figure


def _colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def _style(index: int) -> str:
    return _STYLES[index // len(SERIES) % len(_STYLES)]


def _finish(figure: Any, axes: Any, heading: str, title: str, caption: str) -> None:
    """Grid, legend, heading and caption, the same for both figures."""
    axes.set_axisbelow(True)
    axes.grid(color=LINE, linewidth=0.7)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=INK)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8.5, labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
    left_inches = axes.get_position().x0 * figure.get_figwidth()
    add_heading(figure, heading + (f": {title}" if title else ""), caption, left_inches=left_inches)


def evaluation_page(evaluations: Evaluations, *, title: str = "") -> str:
    """Frontier, densities and all numbers as one HTML document that needs nothing else.

    Args:
        evaluations: Name to one evaluation or several, each of one SAE.
        title: What to add to the heading, such as the site.

    Returns:
        The document.

    Raises:
        InvalidInputError: There is no evaluation.
    """
    series = series_of(evaluations)
    flat = [(name, one) for name, all_of in series.items() for one in all_of]
    shared = [name for name in ABLATIONS if all(name in one.losses for _, one in flat)]
    data: dict[str, Any] = {
        "ablations": shared,
        "edges": [_number(edge) for edge in flat[0][1].reconstruction.histogram(_N_BINS)[1]],
        "ultraLow": float(np.log10(ULTRA_LOW)),
        "saes": [
            {
                "series": list(series).index(name),
                "label": label,
                "numbers": {key: _number(number) for key, number in one.numbers().items()},
                "counts": one.reconstruction.histogram(_N_BINS)[0].tolist(),
            }
            for (name, one), label in zip(flat, _densities(evaluations), strict=True)
        ],
        "series": list(series),
    }
    heading = "SAE evaluation" + (f": {title}" if title else "")
    body = BODY.format(heading=escape(heading))
    return html_page(heading, body=body, style=STYLE, script=SCRIPT, data=data)


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
