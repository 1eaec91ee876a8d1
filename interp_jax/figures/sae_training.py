"""Training curves of SAEs: unexplained variance, L0 and dead latents, step by step.

>>> log = [{"step": step, "fvu": [1 / step], "l0": [32.0], "n_dead": [0]} for step in (1, 2, 3)]
>>> figure = training_figure(log, title="15.resid_post")
>>> [axes.get_ylabel() for axes in figure.axes]
['FVU of the batch', 'L0', 'dead latents']

Sharp edges: the numbers are of single training batches, before the step that was taken on them.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.figures.plotting import INK, LINE, QUIET, SERIES, add_heading, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {"fvu": "FVU of the batch", "l0": "L0", "n_dead": "dead latents"}


def training_figure(
    log: Sequence[Mapping[str, Any]], *, labels: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """The curves as a matplotlib figure, a panel for each number and a line for each SAE.

    Args:
        log: The log of `train`.
        labels: Names of the SAEs.
        title: What to add to the heading, such as the site.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: The log is empty.
    """
    if not log:
        raise InvalidInputError(
            four_part(
                "An empty log was given",
                where="training_figure",
                expected="at least one logged step.",
                fix="train with a smaller log_every.",
            )
        )
    steps = [entry["step"] for entry in log]
    with drawing(8.4, 3.6) as figure:
        for index, (name, label) in enumerate(_PANELS.items()):
            axes = figure.add_axes((0.08 + 0.32 * index, 0.16, 0.24, 0.56))
            for number, curve in enumerate(np.asarray([entry[name] for entry in log]).T):
                axes.plot(
                    steps,
                    curve,
                    color=SERIES[number % len(SERIES)],
                    linewidth=1.3,
                    marker="o" if len(steps) == 1 else None,
                    label=None if labels is None else labels[number],
                )
            axes.set_xlabel("step", fontsize=9, color=QUIET)
            axes.set_ylabel(label, fontsize=9, color=QUIET)
            axes.set_ylim(bottom=0)
            axes.grid(color=LINE, linewidth=0.7)
            axes.spines[:].set_visible(False)
            axes.tick_params(which="both", length=0, labelsize=8, labelcolor=INK)
        if labels is not None:
            figure.axes[0].legend(frameon=False, fontsize=8)
        add_heading(figure, f"Training: {title}" if title else "Training", left_inches=0.3)
    return figure
