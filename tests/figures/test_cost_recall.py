"""The pictures of cost against recall: each curve is the search's, best first, beside the oracle's."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.figures.cost_recall import cost_figure, cost_page, labelled_curves
from interp_jax.methods.cost_recall import cost_recall


@pytest.fixture
def results(rng):
    contributions = np.sort(rng.random(1200))[::-1]
    orders = {"random": rng.permutation(1200), "<good>": np.arange(1200), "": np.arange(1200)[::-1]}
    return [cost_recall(contributions, 4.0 + order, method=method) for method, order in orders.items()]


def test_curves_are_the_searches_best_first(results):
    curves = labelled_curves(results)
    assert [label for label, *_ in curves] == ["<good>", "random", "search 3"]
    _, score, k, costs = curves[0]
    assert score == results[1].score
    assert {1, 10, 100, 1000, 1200} <= set(k.tolist())
    assert len(k) < 320
    np.testing.assert_array_equal(costs, k + 3)


def test_one_node_is_a_curve(results):
    ((_, score, k, costs),) = labelled_curves([cost_recall([1.0], [5.0])])
    assert (score, k.tolist(), costs.tolist()) == (pytest.approx(5), [1], [5])
    cost_figure([cost_recall([1.0], [5.0])]).savefig(io.BytesIO(), format="png")


def test_the_figure_draws_them_on_logarithmic_axes(results):
    figure = cost_figure(results, title="toy $x$")
    figure.savefig(io.BytesIO(), format="png")
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    curves = labelled_curves(results)
    for line, (label, score, k, costs) in zip(axes.lines, curves, strict=False):
        np.testing.assert_array_equal(np.asarray(line.get_xdata()), k)
        np.testing.assert_array_equal(np.asarray(line.get_ydata()), costs)
        assert line.get_label() == f"{label}  ({score:.3g}×)"
    oracle = axes.lines[len(curves)]
    np.testing.assert_array_equal(np.asarray(oracle.get_xdata()), np.asarray(oracle.get_ydata()))


def test_the_page_holds_the_curves(results):
    page = cost_page(results, title="<toy>")
    data = json.loads(re.search(r"^const DATA = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]
    for curve, (label, score, k, costs) in zip(data["curves"], labelled_curves(results), strict=True):
        assert curve["name"] == label
        assert curve["score"] == pytest.approx(score, rel=1e-3)
        assert data["k"] == k.tolist()
        np.testing.assert_allclose(curve["costs"], costs, rtol=1e-5)
    assert "&lt;toy&gt;" in page
    assert re.findall(r"\b(?:src|href|@import|url\()", page) == []


@pytest.mark.parametrize("n_results", [0, 2])
def test_results_of_other_nodes_do_not_mix(results, n_results):
    mixed = [results[0], cost_recall([1.0, 2.0], [1.0, 2.0])][:n_results]
    with pytest.raises(InvalidInputError, match=rf"{n_results} results of .* nodes were given[\s\S]*Fix:"):
        cost_figure(mixed)
