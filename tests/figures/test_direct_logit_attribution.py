"""The pictures of direct logit attribution: every part is in them, and together they make the total."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.core.sites import Site
from interp_jax.figures.direct_logit_attribution import attribution_figure, attribution_page, contributions_by_name
from interp_jax.methods.direct_logit_attribution import DirectLogitAttributionResult

SITES = (Site(None, "embed"), *(Site(layer, name) for layer in range(3) for name in ("attn_out", "mlp_out")))


def make(rng, *, n_pos=None, has_heads=True) -> Any:
    tail = () if n_pos is None else (n_pos,)
    contributions, remainder = rng.normal(size=(7, 2, *tail)), rng.normal(size=(2, *tail))
    return DirectLogitAttributionResult(
        contributions=contributions,
        remainder=remainder,
        total=contributions.sum(0) + remainder,
        mask=np.ones((2, *tail), bool),
        sites=SITES,
        heads=rng.normal(size=(3, 4, 2, *tail)) if has_heads else None,
        attn_biases=np.zeros((3, 2, *tail)) if has_heads else None,
        layers=(0, 1, 2) if has_heads else (),
    )


def test_columns_hold_every_part(rng):
    result = make(rng)
    columns, series = contributions_by_name(result, row=1)
    assert columns == ["embed", "0", "1", "2", "rest"]
    assert series["outside the layers"] == [result.contributions[0, 1], None, None, None, result.remainder[1]]
    assert series["mlp_out"] == [None, *result.table("mlp_out")[:, 1], None]
    everything = [value for row in series.values() for value in row if value is not None]
    assert sum(everything) == pytest.approx(result.total[1])


def test_of_all_positions_the_last_is_drawn(rng):
    result = make(rng, n_pos=3)
    _, series = contributions_by_name(result)
    assert series["attn_out"][1] == result.contributions[1, 0, 2]
    attribution_figure(result).savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("has_heads", [True, False])
def test_the_figure_has_a_bar_a_part_and_a_cell_a_head(rng, has_heads):
    result = make(rng, has_heads=has_heads)
    figure = attribution_figure(result, row=1, title="toy", metric="logit($a$)", n_labels=2)
    figure.savefig(io.BytesIO(), format="png")
    bars, *maps = figure.axes
    heights = [bar.get_height() for container in bars.containers for bar in container]  # type: ignore[attr-defined]
    drawn = sorted(height for height in heights if np.isfinite(height))
    np.testing.assert_allclose(drawn, np.sort([*result.contributions[:, 1], result.remainder[1]]))
    assert len(bars.texts) == 2
    assert len(maps) == has_heads
    for axes in maps:
        cells = np.asarray(axes.collections[0].get_array()).reshape(4, 3)
        np.testing.assert_allclose(cells, result.heads[:, :, 1].T)
        layer, head, value = result.strongest_heads(1, row=1)[0]
        label = axes.texts[0]
        assert label.get_position() == (layer + 0.5, head + 0.5)
        assert label.get_text() == f"{value:+.1f}".replace("-", "−")
    assert any(f"{result.total[1]:.2f} in all" in text.get_text() for text in figure.texts)


def test_the_page_holds_every_number(rng):
    result = make(rng)
    page = attribution_page(result, title="<toy>", metric="a < b", text="x & y")
    data = json.loads(re.search(r"^const DATA = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]
    writes, heads = data["grids"]
    columns, series = contributions_by_name(result)
    assert (writes["columns"], writes["rows"]) == (columns, list(series))
    for row, name in enumerate(series):
        assert [value is None for value in writes["values"][row]] == [value is None for value in series[name]]
    np.testing.assert_allclose(heads["values"], result.heads[:, :, 0], rtol=1e-4)
    for escaped in ("&lt;toy&gt;", "a &lt; b", "x &amp; y"):
        assert escaped in page
    assert re.findall(r"\b(?:src|href|@import|url\()", page) == []


def test_rows_that_are_not_there_are_refused(rng):
    for draw in (attribution_figure, attribution_page):
        with pytest.raises(InvalidInputError, match=r"row=2[\s\S]*0 to 1[\s\S]*Fix:"):
            draw(make(rng), row=2)
