"""Pictures of sparsity sweeps and of agreement hold the results' own numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, UnknownNameError
from interp_jax.core.sites import Site
from interp_jax.figures.encoder_agreement import agreement_figure
from interp_jax.figures.sparsity_sweep import sparsity_figure
from interp_jax.methods.encoder_agreement import EncoderAgreement
from interp_jax.methods.sparsity_sweep import SparsityCurve, SparsitySweep

LOSSES = {"clean": 3.0, "zero": 8.0, "mean": 3.0}


@pytest.fixture
def sweep(rng):
    def curve(targets):
        n = 1 if targets is None else len(targets)
        l0, fvu, losses = rng.uniform(1, 9, n), rng.random(n), rng.uniform(3, 9, n)
        return SparsityCurve(targets, np.sort(l0), fvu, losses, losses - 3)

    mine = {"own $x$": curve(None), "GP": curve((2, 4, 8)), "MP": curve((2, 4, 8))}
    return SparsitySweep({"mine": mine, "random": {"GP": curve((2, 4, 8))}}, LOSSES, 50, 49, 3, Site(3, "mlp_out"))


def drawn(axes):
    """The points of each line, by its label, or without one by its marker."""
    return {
        str(line.get_label()) if not str(line.get_label()).startswith("_") else str(line.get_marker()): np.asarray(
            line.get_xydata()
        )
        for line in axes.lines
    }


def test_each_dictionary_has_a_panel_with_its_encoders(sweep):
    figure = sparsity_figure(sweep, title="3.mlp_out $x$")
    figure.savefig(io.BytesIO(), format="png")
    above, below = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title(loc="left") for axes in above] == ["mine", "random"]
    for column, (name, several) in enumerate(sweep.curves.items()):
        for axes, is_recovered in ((above[column], True), (below[column], False)):
            lines = drawn(axes)
            assert set(lines) == set(several)
            for encoder, curve in several.items():
                values = sweep.loss_recovered(name, encoder) if is_recovered else curve.fvu
                np.testing.assert_array_equal(lines[encoder], np.stack([curve.l0, values], axis=1))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["own $x$", "GP", "MP"]
    every = np.concatenate([sweep.loss_recovered(*pair) for pair in (("mine", "GP"), ("mine", "MP"), ("random", "GP"))])
    every = np.append(every, sweep.loss_recovered("mine", "own $x$"))
    words = " ".join(text.get_text() for text in figure.texts)
    assert "50 tokens of 3 held-out sequences" in words
    assert ("Below the axis" in words) == bool((every < -0.05).any())


def test_each_encoder_has_a_panel_with_the_dictionaries(sweep):
    figure = sparsity_figure(sweep, panels="encoder")
    figure.savefig(io.BytesIO(), format="png")
    above = figure.axes[:2]
    assert [axes.get_title(loc="left") for axes in above] == ["GP", "MP"]
    # What has a sparsity of its own is a star everywhere.
    assert [len(axes.lines) for axes in above] == [3, 2]
    for axes in above:
        stars = [line.get_xydata() for line in axes.lines if line.get_marker() == "*"]
        own = sweep.curve("mine", "own $x$")
        np.testing.assert_array_equal(stars, [[[own.l0[0], sweep.loss_recovered("mine", "own $x$")[0]]]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mine", "random"]


def test_what_has_no_number_is_counted(sweep):
    words = [text.get_text() for text in sparsity_figure(sweep, ablation="mean").texts]
    assert any("Without a number: 10." in text for text in words)
    assert any("its mean at the site" in text for text in words)


def test_mistakes_are_named(sweep):
    with pytest.raises(UnknownNameError, match=r"Unknown panels 'encoders'[\s\S]*Did you mean 'encoder'"):
        sparsity_figure(sweep, panels="encoders")
    with pytest.raises(InvalidInputError, match=r"A sweep of nothing was given[\s\S]*Fix:"):
        sparsity_figure(SparsitySweep({}, LOSSES, 50, 49, 3, Site(3, "mlp_out")))
    without = SparsitySweep(sweep.curves, {"clean": 3.0, "zero": 8.0}, 50, 49, 3, Site(3, "mlp_out"))
    with pytest.raises(UnknownNameError, match=r"'mean' was asked for[\s\S]*Known: zero"):
        sparsity_figure(without, ablation="mean")


@pytest.mark.parametrize("n", [40, 0])
def test_agreement_shows_the_latents_that_have_numbers(rng, n):
    numbers = rng.uniform(-1, 1, (2, n + 2))
    numbers[:, :2] = np.nan
    smallest = np.exp(rng.normal(size=(2, n + 2)))
    smallest[0, :1], smallest[1, 1:2] = np.nan, np.nan
    counts = np.ones(n + 2, np.int64)
    both, where = np.stack([counts, counts]), Site(3, "mlp_out")
    agreement = EncoderAgreement(
        numbers[0], numbers[1], counts, counts, counts * 1.0, both, smallest, 99, where, ("a", "$b$")
    )
    figure = agreement_figure(agreement, title="3.mlp_out")
    figure.savefig(io.BytesIO(), format="png")
    left, right = figure.axes
    for patch, values in zip(left.patches, numbers, strict=True):
        np.testing.assert_array_equal(patch.get_data().values, np.histogram(values[2:], 40, (-1, 1))[0])  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.asarray(right.collections[0].get_offsets()), smallest[:, 2:].T)
    share = f"{np.mean(smallest[1, 2:] > smallest[0, 2:]):.0%} above the line" if n else "none by both"
    assert right.get_title(loc="left") == f"{n} latents, {share}"
    assert any("99 tokens" in text.get_text() for text in figure.texts)
