"""Pictures of a logit lens: the top token of every view and position, coloured by its probability.

`lens_figure` draws it with matplotlib; `lens_page` is one HTML file in which the cell under the pointer shows its
best tokens, the rank of the target, divergences, and the target's probability from view to view.

    lens_figure(result, lm.decode, title="smollm2-135m").savefig("lens.png")
    Path("lens.html").write_text(lens_page(result, lm.decode), encoding="utf-8")

>>> lens_figure.__name__, lens_page.__name__
('lens_figure', 'lens_page')

Sharp edges: one row of the batch a picture; padding is left out. The PNG shows the last `max_positions` positions
and says so when there are more; the page has them all. Rows run as in the model seen from below: the input at the
bottom, the output at the top.

Source: nostalgebraist, "interpreting GPT: the logit lens", 2020, for the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.figures.lens_page import BODY, SCRIPT, STYLE
from interp_jax.figures.page import escape, html_page
from interp_jax.figures.plotting import INK, QUIET, add_heading, drawable, drawing
from interp_jax.figures.token_text import shorten_text, token_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

    from interp_jax.methods.logit_lens import LogitLensResult

TARGET_WORDS = {
    "final": "the model's answer",
    "next": "the token that follows in the text",
    "input": "the input token",
    "given": "the given token",
}
# Light to dark in one hue, even steps in lightness.
_SHADES = ("#f3f7fb", "#cfe1f2", "#8fbde3", "#3f86cc", "#1b5ba3", "#0a2f62")


class LensCells(NamedTuple):
    """One row of a result without its padding; arrays `[view, pos]`, or `[view, pos, k]` for the top tokens.

    Args:
        labels: Name of each view.
        positions: Position of each token in the row.
        inputs: The tokens read.
        targets: The tokens that follow them.
        defined: Whether a position has a target.
        texts: The top tokens, decoded.
        values: The statistics to draw, by name.
    """

    labels: list[str]
    positions: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray
    defined: np.ndarray
    texts: np.ndarray
    values: dict[str, np.ndarray]


def lens_cells(result: LogitLensResult, decode: Callable[[Any], str], *, row: int = 0) -> LensCells:
    """What both pictures show: one row of the batch, its tokens decoded, padding left out.

    Args:
        result: A logit lens.
        decode: From ids to text: `lm.decode`.
        row: Which row of the batch.

    Returns:
        The cells.

    Raises:
        InvalidInputError: There is no such row.
    """
    tokens = np.asarray(result.tokens)
    if not 0 <= row < len(tokens):
        raise InvalidInputError(
            four_part(
                f"row={row} was given",
                where="a picture of a logit lens",
                expected=f"a row of the batch, 0 to {len(tokens) - 1}.",
                fix="choose one of these rows.",
            )
        )
    keep = tokens[row] >= 0
    names = ("top_ids", "top_probabilities", "target_probability", "rank", "agrees", "kl", "kl_reverse", "entropy")
    values = {name: np.asarray(getattr(result, name))[:, row][:, keep] for name in names}
    return LensCells(
        labels=[str(site) for site in result.views],
        # Counted without the padding, as the model counts.
        positions=np.arange(keep.sum()),
        inputs=token_texts(decode, tokens[row, keep]),
        targets=token_texts(decode, np.asarray(result.target)[row, keep]),
        defined=np.asarray(result.mask)[row, keep],
        texts=token_texts(decode, values["top_ids"]),
        values=values,
    )


def lens_figure(
    result: LogitLensResult,
    decode: Callable[[Any], str],
    *,
    row: int = 0,
    title: str = "",
    max_positions: int = 40,
) -> Figure:
    """The lens as a matplotlib figure: a cell per view and position, shaded by the top token's probability.

    Args:
        result: A logit lens.
        decode: From ids to text: `lm.decode`.
        row: Which row of the batch.
        title: What to add to the heading, such as the model's name.
        max_positions: The most columns to draw; of a longer text the last ones are drawn.

    Returns:
        The figure; `.savefig(path)` writes it.

    Raises:
        InvalidInputError: There is no such row.
    """
    cells = lens_cells(result, decode, row=row)
    n_views, n_all = cells.values["rank"].shape
    first = max(0, n_all - max_positions)
    heading = "Logit lens" + (f": {title}" if title else "")
    caption = "The next token each place in the residual stream already suggests. Bold: the model's own answer."
    if first:
        caption += f" The last {n_all - first} of {n_all} positions."

    width, height = max(8.0, 2.2 + 0.86 * (n_all - first)), 2.1 + 0.29 * n_views
    left, right, bottom, top = 1.25 / width, 1 - 0.95 / width, 0.88 / height, 1 - 0.85 / height
    with drawing(width, height) as figure:
        axes = figure.add_axes((left, bottom, right - left, top - bottom))
        shades = _draw_cells(axes, cells, first)
        _draw_labels(axes, cells, first)
        add_heading(figure, heading, caption, left_inches=1.25)
        bar = figure.add_axes((right + 0.2 / width, bottom, 0.14 / width, top - bottom))
        figure.colorbar(shades, cax=bar).set_label("probability of the token shown", fontsize=8.5, color=QUIET)
        bar.tick_params(labelsize=8, length=2, colors=QUIET)
        bar.spines[:].set_visible(False)
    return figure


def _draw_cells(axes: Axes, cells: LensCells, first: int) -> QuadMesh:
    """Shades and tokens, from position `first` on."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("lens", _SHADES)
    probabilities = cells.values["top_probabilities"][:, first:, 0]
    shades = axes.pcolormesh(probabilities, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=1.2)
    for (view, pos), probability in np.ndenumerate(probabilities):
        axes.text(
            pos + 0.5,
            view + 0.47,
            drawable(shorten_text(cells.texts[view, first + pos, 0], 10)),
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if probability > 0.55 else INK,
            fontweight="bold" if cells.values["agrees"][view, first + pos] else "normal",
            parse_math=False,
        )
    return shades


def _draw_labels(axes: Axes, cells: LensCells, first: int) -> None:
    """Views on the left; input tokens and their positions below."""
    axes.set_yticks(np.arange(len(cells.labels)) + 0.5, cells.labels, fontsize=8, color=INK)
    inputs = [drawable(shorten_text(text, 11)) for text in cells.inputs[first:]]
    axes.set_xticks(np.arange(len(inputs)) + 0.5, inputs, fontsize=8.5, fontweight="bold", color=INK, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for column in range(len(inputs)):
        axes.annotate(
            str(first + column),
            (column + 0.5, 0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, -25),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            color=QUIET,
        )
    axes.set_xlabel("input token and its position", fontsize=8.5, color=QUIET, labelpad=22)


def lens_page(
    result: LogitLensResult, decode: Callable[[Any], str], *, row: int = 0, title: str = "", text: str | None = None
) -> str:
    """The lens as one HTML document that needs nothing else, not even a server.

    Args:
        result: A logit lens.
        decode: From ids to text: `lm.decode`.
        row: Which row of the batch.
        title: What to add to the heading, such as the model's name.
        text: The prompt, shown under the heading; by default the row's tokens decoded.

    Returns:
        The document.

    Raises:
        InvalidInputError: There is no such row.
    """
    cells = lens_cells(result, decode, row=row)
    distinct, indices = np.unique(cells.texts, return_inverse=True)
    if text is None:
        tokens = np.asarray(result.tokens)[row]
        text = decode(tokens[tokens >= 0])
    heading = "Logit lens" + (f": {title}" if title else "")
    data = {
        "views": cells.labels,
        "inputs": cells.inputs.tolist(),
        "targets": [
            text if is_defined else None for text, is_defined in zip(cells.targets, cells.defined, strict=True)
        ],
        "target": TARGET_WORDS[result.target_name],
        "texts": distinct.tolist(),
        "top": indices.reshape(cells.texts.shape).tolist(),
        "p": _numbers(cells.values["top_probabilities"]),
        "target_p": _numbers(cells.values["target_probability"]),
        "rank": cells.values["rank"].tolist(),
        "agrees": cells.values["agrees"].astype(int).tolist(),
        "kl": _numbers(cells.values["kl"]),
        "kl_reverse": _numbers(cells.values["kl_reverse"]),
        "entropy": _numbers(cells.values["entropy"]),
    }
    body = BODY.format(heading=escape(heading), text=escape(text), norm=escape(result.norm))
    return html_page(heading, body=body, style=STYLE, script=SCRIPT, data=data)


def _numbers(values: np.ndarray) -> Any:
    """Nested lists of numbers cut to four digits, with None where a value is not finite."""
    if values.ndim > 1:
        return [_numbers(part) for part in values]
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
