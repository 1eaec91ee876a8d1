"""The figure of a sweep holds the sweep's own numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, UnknownNameError
from interp_jax.core.sites import Site
from interp_jax.figures.sae_frontier import sweep_figure
from interp_jax.methods.sae.evaluation import SAEEvaluation
from interp_jax.methods.sae.reconstruction import Reconstruction
from interp_jax.methods.sae.sweeps import SAESweep, SweepRow


def row(name: str, coefficient: float, seed: int, *, l0: float, fvu: float, spliced: float = 3.5) -> SweepRow:
    numbers = dict.fromkeys(("l1", "l1_weighted", "squared_error", "error_variance", "cosine"), 0.5)
    reconstruction = Reconstruction(
        n_tokens=1000,
        l0=l0,
        fvu=fvu,
        norm_ratio=0.9,
        shrinkage=0.95,
        encoder_decoder_cosine=float("nan"),
        n_fired=np.arange(40),
        rare_encoder_cosines=np.zeros(0),
        rare_decoder_cosines=np.zeros(0),
        read=Site(3, "mlp_out"),
        write=Site(3, "mlp_out"),
        **numbers,
    )
    losses = {"clean": 3.0, "spliced": spliced, "zero": 8.0, "mean": 4.0}
    evaluation = SAEEvaluation((reconstruction,), losses, {"spliced": 0.4}, n_targets=100, n_sequences=10)
    return SweepRow(name, coefficient, seed, 10, 1.0, evaluation)


@pytest.fixture
def sweep() -> SAESweep:
    l0s = {("a $x$", 0): (30.0, 10.0, 3.0), ("a $x$", 1): (40.0, 12.0, 0.0), ("b", 0): (25.0, 5.0, 1.0)}
    return SAESweep(
        "a model",
        "3.mlp_out",
        tuple(
            row(name, coefficient, seed, l0=l0, fvu=0.1 * (i + 1) + 0.02 * seed, spliced=3.1 + 0.2 * i)
            for (name, seed), values in l0s.items()
            for i, (coefficient, l0) in enumerate(zip((0.1, 0.2, 0.4), values, strict=True))
        ),
    )


def test_lines_are_means_over_seeds(sweep):
    figure = sweep_figure(sweep, title="what $for$")
    figure.savefig(io.BytesIO(), format="png")
    recovered, fvu, dead = figure.axes
    assert [axes.get_xscale() for axes in figure.axes] == ["log"] * 3
    seeds_a, mean_a, seeds_b, mean_b = fvu.lines
    assert np.asarray(seeds_a.get_xydata())[:, 0].tolist() == [30.0, 10.0, 3.0, 40.0, 12.0]  # no dot at L0 = 0
    # By rising L0, and without the coefficient whose mean one seed has no part in.
    x, y = np.asarray(mean_a.get_xydata()).T
    assert x == pytest.approx([np.sqrt(120.0), np.sqrt(1200.0)]) and y == pytest.approx([0.21, 0.11])
    assert np.asarray(mean_b.get_xydata())[:, 0] == pytest.approx([1.0, 5.0, 25.0])
    assert np.asarray(recovered.lines[3].get_xydata())[:, 1] == pytest.approx([0.5, 0.7, 0.9])
    assert np.asarray(dead.lines[3].get_xydata())[:, 1] == pytest.approx([0.25] * 3)
    assert seeds_b.get_color() != seeds_a.get_color() == mean_a.get_color()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a $x$", "b"]
    told = " ".join(text.get_text() for text in figure.texts)
    assert "3.mlp_out of a model: what $for$" in told and "1,000 held-out tokens. 2 seeds" in told


def test_other_panels(sweep):
    figure = sweep_figure(sweep, panels=["kl_spliced"])
    (axes,) = figure.axes
    assert axes.get_ylabel() == "kl_spliced"
    assert np.asarray(axes.lines[3].get_xydata())[:, 1] == pytest.approx([0.4] * 3)


def test_mistakes_are_named(sweep):
    with pytest.raises(InvalidInputError, match=r"No number was given[\s\S]*Fix: leave panels out"):
        sweep_figure(sweep, panels=[])
    with pytest.raises(UnknownNameError, match=r"Unknown number 'l00' in SAESweep\. Did you mean 'l0'"):
        sweep_figure(sweep, panels=["l00"])
    many = SAESweep("m", "s", tuple(row(str(i), 0.1, 0, l0=5.0, fvu=0.1) for i in range(13)))
    with pytest.raises(InvalidInputError, match=r"13 ways of training were given[\s\S]*at most 12"):
        sweep_figure(many)
