"""The pictures of steering: each coefficient where it was measured, frontiers joined, intervals as they are."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.figures.steering import checked_results, coefficient_figure, pareto_figure
from interp_jax.methods.steering import SteeringResult


@pytest.fixture
def results() -> list[SteeringResult]:
    raw = SteeringResult(
        method="raw $x$",
        sites=("6.resid_pre",),
        coefficients=np.array([4.0, 0.0, 1.0, 8.0]),
        n_successes=np.array([5, 0, 3, 4]),
        n_rollouts=8,
        loss=np.array([3.2, 3.0, 3.1, 3.5]),
        baseline=3.0,
        n_targets=1200,
        ratios={},
        completions=(("a",) * 8,) * 4,
        prompt="I said",
    )
    return [raw, dataclasses.replace(raw, method="<top>", n_successes=np.array([8, 0, 1, 2]))]


def test_points_and_frontiers(results) -> None:
    figure = pareto_figure(results, title="toy")
    figure.savefig(io.BytesIO(), format="png")
    (axes,) = figure.axes
    by_label = {str(line.get_label()): line for line in axes.lines}
    for result in results:
        line = by_label[f"{result.method}\n  6.resid_pre"]
        drawn = np.stack([np.asarray(line.get_ydata()), np.asarray(line.get_xdata())], axis=1)
        np.testing.assert_array_equal(drawn, result.points[result.frontier])
    # 0, 1 and 4 of the first: 8 succeeds less than 4 at a greater loss.
    assert len(np.asarray(by_label["raw $x$\n  6.resid_pre"].get_xdata())) == 3
    assert sorted(text.get_text() for text in axes.texts) == ["0", "0", "1", "1", "4", "4"]
    everything = [line for line in axes.lines if len(np.asarray(line.get_xdata())) == 4]
    np.testing.assert_array_equal(np.asarray(everything[0].get_ydata()), results[0].p_success)
    # The intervals, as the ends of the bars.
    bars: Any = axes.collections[0]
    ends = [[segment[0, 1], segment[1, 1]] for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, results[0].intervals)
    assert np.asarray(by_label["unsteered loss"].get_xdata()).tolist() == [3.0, 3.0]
    assert any("toy" in text.get_text() for text in figure.texts)


def test_by_coefficient(results) -> None:
    figure = coefficient_figure(results)
    figure.savefig(io.BytesIO(), format="png")
    upper, lower = figure.axes
    for number, result in enumerate(results):
        order = [1, 2, 0, 3]
        for axes, values in ((upper, result.p_success), (lower, result.loss)):
            line = axes.lines[number]
            assert np.asarray(line.get_xdata()).tolist() == [0, 1, 4, 8]
            np.testing.assert_array_equal(np.asarray(line.get_ydata()), values[order])


def test_results_that_do_not_belong_together(results) -> None:
    other = dataclasses.replace(results[0], prompt="You said")
    for wrong, words in (([], "0 results of 0 prompts"), ([*results, other], "3 results of 2 prompts or texts")):
        with pytest.raises(InvalidInputError, match=rf"{words}(.|\n)*Expected(.|\n)*Fix: draw a picture"):
            checked_results(wrong)
