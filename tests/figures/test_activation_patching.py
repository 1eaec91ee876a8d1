"""The pictures of effects of nodes: each cell is its node's effect, under the node's name."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.figures.activation_patching import effect_maps, patching_figure, patching_page
from interp_jax.forward.nodes import NodeGroup, NodeSet
from interp_jax.methods.activation_patching import PatchingResult
from interp_jax.methods.atp import AttributionResult

LABELS = ["The", "·cat", "·$sat$", "·<on>"]
NODES = NodeSet(
    (
        NodeGroup("resid_pre", (0, 1, 2), (1, 3)),
        NodeGroup("z", (0, 1, 2), (0, 3), n_units=5),
        NodeGroup("mlp_post", (0, 1, 2), (3,), n_units=7),
        NodeGroup("q", (0, 2), (0, 1, 2, 3), n_units=4, is_pooled=True),
    ),
    n_pos=4,
)


@pytest.fixture
def result(rng):
    return PatchingResult(rng.normal(size=(2, len(NODES))), np.array([1.0, 2.0]), np.ones(2), NODES, "noising")


def by_hand(result, site, position, unit):
    """The mean effect of the one node with this name."""
    (number,) = [
        i for i, node in enumerate(NODES) if (str(node.site), node.position, node.unit) == (site, position, unit)
    ]
    return result.effects[:, number].mean()


def test_maps_hold_each_node_in_its_place(result):
    residual, z, q = effect_maps(result, labels=LABELS)
    assert (residual.name, residual.axis, residual.rows) == ("resid_pre", "position", ["0", "1", "2"])
    assert residual.columns == ["1 ·cat", "3 ·<on>"]
    assert residual.values[2, 1] == pytest.approx(by_hand(result, "2.resid_pre", 3, None))
    assert (z.covers, z.columns) == ("sum over positions [0, 3]", list("01234"))
    assert z.values[1, 4] == pytest.approx(by_hand(result, "1.z", 0, 4) + by_hand(result, "1.z", 3, 4))
    assert (q.covers, q.rows) == ("all positions", ["0", "2"])
    assert q.values[1, 2] == pytest.approx(by_hand(result, "2.q", None, 2))


def test_heads_at_one_position(result):
    nodes = NodeSet(NODES.groups[1:2], n_pos=4)
    at_z = result.effects[:, 6:36]
    some = PatchingResult(at_z, result.plain, None, nodes, "zero")
    (z,) = effect_maps(some, position=-1)
    assert z.covers == "position 3"
    np.testing.assert_allclose(z.values, at_z.mean(0).reshape(3, 2, 5)[:, 1])
    with pytest.raises(
        InvalidInputError, match=r"position=1 was given, and the nodes at 'z' are at positions \[0, 3\]"
    ):
        effect_maps(some, position=1)


def test_the_figure_draws_the_maps(result):
    figure = patching_figure(result, labels=LABELS, title="toy", metric="logit($a$)", n_labels=1)
    figure.savefig(io.BytesIO(), format="png")
    for axes, one in zip(figure.axes, effect_maps(result, labels=LABELS), strict=True):
        mesh = axes.collections[0]
        np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(one.values.shape), one.values)
        low, high = mesh.get_clim()
        assert -low == high == pytest.approx(np.abs(one.values).max())
        row, column = np.unravel_index(np.abs(one.values).argmax(), one.values.shape)
        (label,) = axes.texts
        assert label.get_position() == (column + 0.5, pytest.approx(row + 0.47))
        assert axes.get_title(loc="left").startswith(one.name)
        # Layer 0 below.
        assert not axes.yaxis_inverted()
    words = " ".join(text.get_text() for text in figure.texts)
    assert "Activation patching, noising: toy" in words
    assert "The metric is 1.50 unchanged, 1.00 on the other prompt; mean of 2." in words


def test_the_page_holds_every_number_under_its_name(result):
    page = patching_page(result, labels=LABELS, title="<toy>", metric="a < b", text="x & y")
    data = json.loads(re.search(r"^const DATA = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]
    for grid, one in zip(data["grids"], effect_maps(result, labels=LABELS), strict=True):
        assert grid["rows"] == one.rows[::-1]
        np.testing.assert_allclose(grid["values"], one.values[::-1], rtol=1e-4)
    residual = data["grids"][0]
    assert (residual["columns"], residual["column_names"]) == (["1", "3"], ["1 ·cat", "3 ·<on>"])
    assert residual["name"] == "resid_pre, layer {row}, position {column}"
    for escaped in ("&lt;toy&gt;", "a &lt; b", "x &amp; y"):
        assert escaped in page
    assert "<on>" not in page
    assert re.findall(r"\b(?:src|href|@import|url\()", page) == []


def test_what_was_not_computed_is_empty(result):
    result.effects[:, 0] = np.nan
    patching_figure(result).savefig(io.BytesIO(), format="png")
    data = json.loads(re.search(r"^const DATA = (.*);$", patching_page(result), re.MULTILINE)[1])  # type: ignore[index]
    assert data["grids"][0]["values"][2] == [None, pytest.approx(by_hand(result, "0.resid_pre", 3, None), rel=1e-4)]


def test_estimates_are_drawn_and_called_so(result, rng):
    estimates = rng.normal(size=(2, len(NODES)))
    found = AttributionResult(estimates, np.abs(estimates), np.ones(2), NODES, True, True)
    np.testing.assert_allclose(effect_maps(found)[0].values, estimates[:, :6].mean(0).reshape(3, 2))
    page = patching_page(found)
    assert "Attribution patching" in page
    assert "Estimated change of the metric" in page


def test_what_has_no_map_is_refused(result):
    neurons = PatchingResult(np.ones((1, 21)), np.ones(1), None, NodeSet(NODES.groups[2:3], n_pos=4), "zero")
    for draw in (patching_figure, patching_page):
        with pytest.raises(InvalidInputError, match=r"all neurons were given \(mlp_post\)[\s\S]*Fix:"):
            draw(neurons)
        with pytest.raises(ShapeError, match=r"3 labels were given for prompts of 4 tokens[\s\S]*Fix:"):
            draw(result, labels=LABELS[:3])
