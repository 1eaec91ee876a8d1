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
