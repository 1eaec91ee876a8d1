"""What the matplotlib figures share: figures that pyplot does not hold, and text that a font can draw.

>>> drawable("·Mary"), drawable("\\U000e0001")
('·Mary', '▯')

Sharp edges: matplotlib is imported when a figure is drawn, never before. A character that no installed font has is
drawn as ▯; the HTML pages leave fonts to the browser.

Source: interp_jax.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK, QUIET, LINE = "#17202b", "#5c6b7c", "#dde3ea"
# Told apart by eyes that do not tell red from green, too.
SERIES = ("#1d6fc0", "#d9771a", "#6b4fa0", "#4b5a68")

# Asked for in this order, those that are there; the first comes with matplotlib.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "IPAexGothic",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Arial Unicode MS",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Noto Sans Symbols2",
)


@contextmanager
def drawing(width_inches: float, height_inches: float) -> Iterator[Figure]:
    """Context in which an empty figure is drawn upon, in the house's fonts; pyplot does not know about it.

    Args:
        width_inches: Width.
        height_inches: Height.

    Returns:
        The figure, 160 dots an inch; it uses Agg when saved to a PNG, whatever backend the session uses.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Text takes its fonts when it is made, so the setting need not outlive the drawing.
    with matplotlib.rc_context({"font.family": list(fonts()), "axes.unicode_minus": True}):
        yield Figure(figsize=(width_inches, height_inches), dpi=160, facecolor="white")


def add_heading(figure: Figure, heading: str, *captions: str, left_inches: float) -> None:
    """Write a heading and the lines below it at the top of a figure.

    Args:
        figure: The figure.
        heading: The heading.
        *captions: The lines; room for two is 1.3 inches with the heading.
        left_inches: How far from the left edge they begin.
    """
    width, height = figure.get_size_inches()
    left = left_inches / width
    figure.text(left, 1 - 0.36 / height, drawable(heading), fontsize=13, fontweight="bold", color=INK, parse_math=False)
    for line, text in enumerate(captions):
        y = 1 - (0.64 + 0.2 * line) / height
        figure.text(left, y, drawable(text), fontsize=9, color=QUIET, parse_math=False)


def add_bar_legend(figure: Figure, axes: Axes, *, left_inches: float) -> None:
    """Name the colours of bars in one row, under a heading with one caption.

    Args:
        figure: The figure.
        axes: Where the bars are, with their labels.
        left_inches: How far from the left edge the heading begins.
    """
    width, height = figure.get_size_inches()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=((left_inches - 0.06) / width, 1 - 0.74 / height),
        ncols=len(labels),
        frameon=False,
        fontsize=9,
        handlelength=0.9,
        handleheight=0.9,
        labelcolor=INK,
    )


def signed_colours() -> Colormap:
    """The colours of numbers below and above zero, which is nearly white."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signed", (SERIES[1], "#f5f7fa", SERIES[0]))


@functools.lru_cache(maxsize=1)
def fonts() -> tuple[str, ...]:
    """The fonts of `_FONTS` that are installed."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in _FONTS if name in installed)


@functools.lru_cache(maxsize=1)
def _known_characters() -> frozenset[int]:
    from matplotlib import font_manager, ft2font

    paths = [font_manager.findfont(name, fallback_to_default=True) for name in fonts()]
    return frozenset().union(*(ft2font.FT2Font(path).get_charmap() for path in paths))


def drawable(text: str) -> str:
    """The text with ▯ for each character that no font here can draw.

    Args:
        text: Any string.

    Returns:
        A string of the same length that can be drawn without warnings.
    """
    if text.isascii():
        return text
    known = _known_characters()
    return "".join(char if ord(char) in known else "▯" for char in text)
