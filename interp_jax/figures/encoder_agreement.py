"""Pictures of how two encoders agree: the correlations of all latents, and the smallest activations of each.

    agreement_figure(agreement).savefig("agreement.png")

>>> agreement_figure.__name__
'agreement_figure'

Sharp edges: latents that have no correlation, or fire by one encoder only, are not drawn; captions count those drawn.

Source: Smith 2024, Replacing SAE Encoders with Inference-Time Optimisation, for the plot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.figures.plotting import INK, LINE, QUIET, SERIES, add_heading, drawable, drawing
from interp_jax.methods.encoder_agreement import EncoderAgreement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_N_BINS = 40


def agreement_figure(agreement: EncoderAgreement, *, title: str = "") -> Figure:
    """Histograms of the correlations, and each latent's smallest activations, as a matplotlib figure.

    Args:
        agreement: What `encoder_agreement` found.
        title: What to add to the heading, such as the site.

    Returns:
        The figure; `.savefig(path)` writes it.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    first, second = agreement.names
    with drawing(9.2, 4.9) as figure:
        correlations = figure.add_axes((0.075, 0.13, 0.4, 0.56))
        smallest = figure.add_axes((0.57, 0.13, 0.4, 0.56))
        parts = {"where either fires": agreement.pearson, "the low half": agreement.pearson_low}
        for (name, values), colour in zip(parts.items(), SERIES, strict=False):
            known = values[~np.isnan(values)]
            counts, edges = np.histogram(known, bins=_N_BINS, range=(-1, 1))
            median = f"median {np.median(known):.2f}, " if len(known) else ""
            label = f"{name}: {median}{len(known)} latents"
            correlations.stairs(counts, edges, color=colour, linewidth=1.5, label=label)
        correlations.set_xlabel(f"correlation of {first} and {second}", fontsize=9, color=QUIET, parse_math=False)
        correlations.set_ylabel("latents", fontsize=9, color=QUIET)
        correlations.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False, fontsize=8.5, labelcolor=INK, borderpad=0.2
        )

        one, other = agreement.smallest[:, ~np.isnan(agreement.smallest).any(axis=0)]
        smallest.scatter(one, other, s=7, color=SERIES[0], alpha=0.45, linewidths=0)
        if len(one):
            ends = np.array([min(one.min(), other.min()) / 1.5, max(one.max(), other.max()) * 1.5])
            smallest.plot(ends, ends, color=QUIET, linewidth=0.9, zorder=1)
            smallest.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
            for axis in (smallest.xaxis, smallest.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_locator(NullLocator())
        share = f"{np.mean(other > one):.0%} above the line" if len(one) else "none by both"
        smallest.set_title(f"{len(one)} latents, {share}", fontsize=8.5, color=INK, loc="left", parse_math=False, pad=4)
        smallest.set_xlabel(f"smallest activation by {first}", fontsize=9, color=QUIET, parse_math=False)
        smallest.set_ylabel(f"by {second}", fontsize=9, color=QUIET, parse_math=False)
        for axes in (correlations, smallest):
            _dress(axes)
        heading = f"{first} and {second}" + (f": {title}" if title else "")
        caption = "Of each latent, over the tokens on which either encoder has it: the correlation of its activations"
        caption += " (left), its smallest other than 0 (right)."
        more = f"{agreement.n_tokens:,} tokens. Low half: up to the median of what {first} gives."
        add_heading(figure, drawable(heading), caption, more, left_inches=0.69)
    return figure


def _dress(axes: Any) -> None:
    axes.set_axisbelow(True)
    axes.grid(color=LINE, linewidth=0.7)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=INK)
