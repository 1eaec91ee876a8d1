"""The pictures of layer effects: every bar has its value, and one huge bar does not hide the rest."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.core.sites import Site
from interp_jax.figures.layer_effects import axis_range, effects_by_name, effects_figure, effects_page
from interp_jax.methods.layer_effects import LayerEffectsResult

SITES = tuple(Site(layer, name) for layer in range(5) for name in ("attn_out", "mlp_out"))


@pytest.fixture
def result(rng):
    clean = rng.normal(size=2).astype(np.float32)
    effects = rng.uniform(0.2, 1, size=(len(SITES), 2)).astype(np.float32) * rng.choice([-1, 1], (len(SITES), 1))
    effects[1] = -50
    return LayerEffectsResult(clean, (clean[None] + effects).astype(np.float32), SITES)


def test_series_are_the_effects_by_layer(result):
    layers, series = effects_by_name(result, row=1)
    assert layers == [0, 1, 2, 3, 4]
    assert list(series) == ["attn_out", "mlp_out"]
    np.testing.assert_allclose(np.array(series["mlp_out"]), result.table("mlp_out")[:, 1])


def test_sites_that_a_layer_lacks_leave_a_gap():
    result = LayerEffectsResult(
        np.zeros(1), np.ones((3, 1)), (Site(None, "embed"), Site(0, "attn_out"), Site(2, "mlp_out"))
    )
    assert effects_by_name(result) == ([0, 2], {"attn_out": [1.0, None], "mlp_out": [None, 1.0]})
    effects_figure(result).savefig(io.BytesIO(), format="png")
    assert '"effects":[1.0,null]' in effects_page(result)


def test_the_page_holds_every_effect(result):
    page = effects_page(result, title="<toy>", metric="a < b", text="x & y")
    data = json.loads(re.search(r"^const DATA = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]
    for series in data["series"]:
        np.testing.assert_allclose(series["effects"], result.table(series["name"])[:, 0], rtol=1e-4)
    assert data["clean"] == pytest.approx(float(result.clean[0]), rel=1e-4)
    for escaped in ("&lt;toy&gt;", "a &lt; b", "x &amp; y"):
        assert escaped in page
    assert re.findall(r"\b(?:src|href|@import|url\()", page) == []


def test_bars_reach_their_values_and_the_huge_one_is_cut(result):
    figure = effects_figure(result, title="toy", metric="logit($a$)", n_labels=2)
    figure.savefig(io.BytesIO(), format="png")
    axes = figure.axes[0]
    heights = [bar.get_height() for container in axes.containers for bar in container]  # type: ignore[attr-defined]
    expected = np.concatenate([result.table("attn_out")[:, 0], result.table("mlp_out")[:, 0]])
    low, high = axis_range(effects_by_name(result)[1])
    assert -5 < low < 0 < high < 5
    np.testing.assert_allclose(heights, np.clip(expected, low, high), rtol=1e-6)
    labels = [text.get_text() for text in axes.texts]
    assert len(labels) == 2
    assert "−50.00" in labels


@pytest.mark.parametrize(
    ("series", "low", "high"),
    [
        ({"a": [1.0, -2.0, 1.5]}, -2.24, 1.74),
        ({"a": [1.0, -100.0], "b": [1.2, None]}, -2.8, 1.5),
        ({"a": [3.0, 2.0, 1.0]}, -0.3, 2.8),
        ({"a": [0.0, 0.0]}, -0.12, 0.12),
        ({"a": [-3.0]}, -3.36, 0.36),
    ],
)
def test_the_axis_reaches_the_longest_bar_unless_it_dwarfs_the_others(series, low, high):
    assert axis_range(series) == pytest.approx((low, high))


def test_rows_and_sites_that_cannot_be_drawn_are_refused(result):
    outside = LayerEffectsResult(np.zeros(1), np.ones((1, 1)), (Site(None, "embed"),))
    for draw in (effects_figure, effects_page):
        with pytest.raises(InvalidInputError, match=r"row=2[\s\S]*0 to 1[\s\S]*Fix:"):
            draw(result, row=2)
        with pytest.raises(InvalidInputError, match="at least one site within a layer"):
            draw(outside)
