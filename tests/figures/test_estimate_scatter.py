"""The pictures of estimates against the truth: each point is a node, each correlation SciPy's."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from scipy import stats

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.figures.estimate_scatter import scatter_figure, scatter_page
from interp_jax.forward.nodes import NodeGroup, NodeSet

NODES = NodeSet((NodeGroup("q", (0, 1), (3,), n_units=3), NodeGroup("mlp_post", (0, 1), (3,), n_units=20)), n_pos=4)


@pytest.fixture
def contributions(rng):
    truth = np.exp(rng.normal(size=len(NODES)))
    truth[4] = 0.0
    return {"AtP": truth * np.exp(rng.normal(size=len(NODES))), "<AtP*>": truth**2}, truth


def test_the_figure_has_a_point_per_node_and_the_correlation(contributions):
    estimates, truth = contributions
    figure = scatter_figure(estimates, truth, NODES, title="$toy$")
    figure.savefig(io.BytesIO(), format="png")
    for axes, (name, values) in zip(figure.axes, estimates.items(), strict=True):
        q, neurons = (np.asarray(points.get_offsets()) for points in axes.collections)
        np.testing.assert_allclose(neurons, np.stack([truth, values], 1)[6:])
        # A contribution of zero stands on the edge.
        low = axes.get_xlim()[0]
        assert (q[4] == low).all()
        expected = stats.spearmanr(values, truth)[0]
        assert axes.get_title(loc="left") == f"{name}   rank correlation {expected:.3f}"
        assert axes.get_xlim() == axes.get_ylim()
    assert any(f"{len(NODES)} nodes" in text.get_text() for text in figure.texts)


def test_the_page_keeps_what_matters_to_anybody(contributions):
    estimates, truth = contributions
    page = scatter_page(estimates, truth, NODES, title="<toy>", max_nodes=8)
    data = json.loads(re.search(r"^const DATA = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]
    assert len(data["names"]) == 8
    by_name = {str(node): i for i, node in enumerate(NODES)}
    kept = [by_name[name] for name in data["names"]]
    assert {int(values.argmax()) for values in (truth, *estimates.values())} <= set(kept)
    np.testing.assert_allclose(data["exact"], truth[kept], rtol=1e-3)
    assert data["rank"] == [1 + int((truth > truth[i]).sum()) for i in kept]
    assert [data["groups"][g] for g in data["group"]] == [NODES[i].site.name for i in kept]
    for method, (name, values) in zip(data["methods"], estimates.items(), strict=True):
        assert method["name"] == name
        np.testing.assert_allclose(method["estimate"], values[kept], rtol=1e-3)
        assert method["rank"] == [1 + int((values > values[i]).sum()) for i in kept]
    assert f"8 of {len(NODES)} nodes" in page
    assert "<AtP" not in page
    assert re.findall(r"\b(?:src|href|@import|url\()", page) == []


def test_numbers_that_are_no_contributions_are_refused(contributions):
    _, truth = contributions
    for draw in (scatter_figure, scatter_page):
        with pytest.raises(InvalidInputError, match=r"negative or not finite were given: AtP[\s\S]*Fix:"):
            draw({"AtP": -truth, "<AtP*>": truth}, truth, NODES)
        with pytest.raises(InvalidInputError, match="No estimates were given"):
            draw({}, truth, NODES)
        with pytest.raises(ShapeError, match=r"Contributions of 46 nodes with the shapes AtP \[45\]"):
            draw({"AtP": truth[:-1]}, truth, NODES)
