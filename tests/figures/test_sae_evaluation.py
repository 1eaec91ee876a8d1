"""Pictures of SAE evaluations: densities and frontiers hold the evaluations' own numbers."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, UnknownNameError
from interp_jax.core.sites import Site
from interp_jax.figures.sae_evaluation import density_figure, evaluation_page, frontier_figure, frontier_points
from interp_jax.methods.sae.evaluation import SAEEvaluation
from interp_jax.methods.sae.reconstruction import Reconstruction


def evaluation(rng, *, l0=5.0, spliced=3.5, zero=8.0, n_latents=200):
    counts = np.where(rng.random(n_latents) < 0.2, 0, rng.integers(1, 50_000, n_latents))
    numbers = dict.fromkeys(("l1", "l1_weighted", "squared_error", "fvu", "error_variance", "cosine"), 0.5)
    reconstruction = Reconstruction(
        n_tokens=50_000,
        l0=l0,
        norm_ratio=0.9,
        shrinkage=0.95,
        encoder_decoder_cosine=float("nan"),
        n_fired=counts,
        rare_encoder_cosines=np.zeros(0),
        rare_decoder_cosines=np.zeros(0),
        read=Site(3, "mlp_out"),
        write=Site(3, "mlp_out"),
        **numbers,
    )
    losses = {"clean": 3.0, "spliced": spliced, "zero": zero, "mean": 4.0}
    return SAEEvaluation((reconstruction,), losses, {"spliced": 0.4}, n_targets=100, n_sequences=10)


@pytest.fixture
def evaluations(rng):
    sweep = [evaluation(rng, l0=l0, spliced=spliced) for l0, spliced in ((40.0, 3.1), (10.0, 3.4), (20.0, 3.2))]
    return {"relu": sweep, "<topk>": evaluation(rng, l0=16, spliced=3.15)}


def test_points_are_loss_recovered_by_rising_l0(evaluations):
    points = frontier_points(evaluations, "zero")
    assert list(points) == ["relu", "<topk>"]
    assert points["relu"] == [(10, pytest.approx(0.92)), (20, pytest.approx(0.96)), (40, pytest.approx(0.98))]
    assert frontier_points(evaluations, "mean")["<topk>"] == [(16, pytest.approx(0.85))]


def test_the_frontier_draws_them_and_says_what_has_no_number(evaluations, rng):
    evaluations["none $x$"] = evaluation(rng, zero=3.0)
    figure = frontier_figure(evaluations, title="3.mlp_out $x$")
    figure.savefig(io.BytesIO(), format="png")
    (axes,) = figure.axes
    for line, (name, series) in zip(axes.lines, frontier_points(evaluations, "zero").items(), strict=True):
        shown = [point for point in series if not np.isnan(point.recovered)]
        np.testing.assert_array_equal(np.asarray(line.get_xydata()).reshape(-1, 2), np.reshape(shown, (-1, 2)))
        assert line.get_label() == name
    assert any("Without a number: 1." in text.get_text() for text in figure.texts)
    assert any("mean there" in text.get_text() for text in frontier_figure(evaluations, ablation="mean").texts)


def test_the_densities_are_histograms_of_all_latents(evaluations):
    figure = density_figure(evaluations)
    figure.savefig(io.BytesIO(), format="png")
    (axes,) = figure.axes
    everything = [*sorted(evaluations["relu"], key=lambda one: one.reconstruction.l0), evaluations["<topk>"]]
    assert len(axes.patches) == 4
    for patch, one in zip(axes.patches, everything, strict=True):
        values, edges, _ = patch.get_data()  # type: ignore[attr-defined]
        np.testing.assert_array_equal(values, one.reconstruction.histogram()[0])
        assert values.sum() == 200
        assert values[0] == one.reconstruction.is_dead.sum()
        assert edges[0] == -6.5
    assert any("Over 50,000 tokens" in text.get_text() for text in figure.texts)


def test_the_page_holds_all_numbers(evaluations):
    same = evaluations["relu"][0]
    evaluations["relu"].append(same)  # two of one name and one L0 are told apart
    page = evaluation_page(evaluations, title="<toy>")
    data = json.loads(re.search(r"^const DATA = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]
    assert data["ablations"] == ["zero", "mean"]
    assert [sae["label"] for sae in data["saes"]] == [
        *("relu, L0 10", "relu, L0 20", "relu, L0 40 (3)", "relu, L0 40 (4)", "<topk>")
    ]
    for sae, one in zip(data["saes"][-2:], (same, evaluations["<topk>"]), strict=True):
        assert sum(sae["counts"]) == 200
        for name, number in one.numbers().items():
            assert sae["numbers"][name] == (None if np.isnan(number) else pytest.approx(number, rel=1e-5))
    assert "&lt;toy&gt;" in page
    assert "<topk>" not in page
    assert re.findall(r"\b(?:src|href|@import|url\()", page) == []


def test_mistakes_are_named(evaluations):
    for draw in (density_figure, frontier_figure, evaluation_page):
        with pytest.raises(InvalidInputError, match=r"No evaluation was given[\s\S]*Expected:[\s\S]*Fix:"):
            draw({"relu": []})
    one = evaluations["<topk>"]
    several = replace(one, reconstructions=one.reconstructions * 2)
    with pytest.raises(InvalidInputError, match="The reconstruction of 2 SAEs was asked for"):
        density_figure({"both": several})
    without = replace(one, losses={name: one.losses[name] for name in ("clean", "spliced", "zero")})
    with pytest.raises(UnknownNameError, match=r"'mean' was asked for[\s\S]*Known: zero"):
        frontier_figure({"one": without}, ablation="mean")
