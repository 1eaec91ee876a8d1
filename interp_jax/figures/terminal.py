"""Results as text for a terminal: tables and bars that fit its width.

>>> print(token_table(["·Mary", "·the"], [0.75, 0.125], n_columns=40))
  1  ·Mary  ████████████▊       75.0 %
  2  ·the   ██▏                 12.5 %

Sharp edges: widths count wide characters as two columns, as terminals do; some terminals disagree about new emoji.
Colour is added only where asked for.

Source: interp_jax.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from interp_jax.figures.logit_lens import lens_cells
from interp_jax.figures.token_text import shorten_text, text_width

if TYPE_CHECKING:
    from interp_jax.methods.layer_effects import LayerEffectsResult
    from interp_jax.methods.logit_lens import LogitLensResult

_EIGHTHS = " ▏▎▍▌▋▊▉█"
# Backgrounds from low to high probability in the 256 colours of terminals, and the ink that is read on each.
_BACKGROUNDS = ((236, 252), (24, 255), (25, 255), (32, 255), (39, 16), (117, 16))


def padded(text: str, n_columns: int, *, align: str = "<") -> str:
    """The text cut or filled up to a width in terminal columns.

    Args:
        text: A visible string.
        n_columns: Width.
        align: "<" left, ">" right or "^" centre.

    Returns:
        A string exactly that wide.
    """
    text = shorten_text(text, n_columns)
    room = n_columns - text_width(text)
    left = {"<": 0, ">": room, "^": room // 2}[align]
    return " " * left + text + " " * (room - left)


def bar(fraction: float, n_columns: int) -> str:
    """A bar of blocks, an eighth of a column fine.

    Args:
        fraction: Length as a part of the whole, 0 to 1.
        n_columns: Length of the whole.

    Returns:
        A string of `n_columns` columns.
    """
    eighths = round(8 * n_columns * min(1.0, max(0.0, fraction)))
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(n_columns)


def token_table(texts: Sequence[str], probabilities: Sequence[float], *, n_columns: int = 80) -> str:
    """Tokens with their probabilities, one a line.

    Args:
        texts: Visible strings, best first.
        probabilities: Their probabilities.
        n_columns: Width of the terminal.

    Returns:
        Lines without a line break at the end.
    """
    widest = min(24, max(map(text_width, texts)))
    n_bar = max(4, min(40, n_columns - widest - 18))
    return "\n".join(
        f"{rank:3d}  {padded(text, widest)}  {bar(probability, n_bar)}  {100 * probability:5.1f} %"
        for rank, (text, probability) in enumerate(zip(texts, probabilities, strict=True), 1)
    )


def lens_table(
    result: LogitLensResult,
    decode: Callable[[Any], str],
    *,
    row: int = 0,
    n_columns: int = 80,
    is_coloured: bool = False,
    n_lines: int = 40,
) -> str:
    """The lens as a table of top tokens, the output on top; of a long text the last positions that fit.

    Args:
        result: A logit lens.
        decode: From ids to text: `lm.decode`.
        row: Which row of the batch.
        n_columns: Width of the terminal.
        is_coloured: Whether cells are shaded by probability, for terminals that can.
        n_lines: The most views to list; of more views every second, third, ... is listed, and the last one always.

    Returns:
        Lines without a line break at the end. Where the cells are not shaded, "*" marks the model's own answer.
    """
    cells = lens_cells(result, decode, row=row)
    n_views = len(cells.labels)
    stride = -(-n_views // n_lines)
    # The last view is the model's answer and the first one the input: both stay.
    views = sorted({*range(n_views - 1, -1, -stride), 0}, reverse=True)
    label = max(text_width(cells.labels[view]) for view in views)
    shown = cells.texts[views][:, :, 0]
    widest = max(map(text_width, [*shown.ravel(), *cells.inputs]))
    cell = max(4, min(widest + 1, 11, n_columns - label - 2))
    n_shown = max(1, min(len(cells.inputs), (n_columns - label - 2) // (cell + 1)))
    first = len(cells.inputs) - n_shown

    def line(view: int, pos: int) -> str:
        text = cells.texts[view, pos, 0]
        agrees = cells.values["agrees"][view, pos]
        if not is_coloured:
            return padded(text + "*" if agrees else text, cell)
        level = min(len(_BACKGROUNDS) - 1, int(len(_BACKGROUNDS) * cells.values["top_probabilities"][view, pos, 0]))
        background, ink = _BACKGROUNDS[level]
        bold = "1;" if agrees else ""
        return f"\x1b[{bold}38;5;{ink};48;5;{background}m{padded(text, cell)}\x1b[0m"

    lines = [
        f"{padded(cells.labels[view], label, align='>')}  "
        + " ".join(line(view, pos) for pos in range(first, first + n_shown))
        for view in views
    ]
    inputs = " ".join(padded(text, cell) for text in cells.inputs[first:])
    lines += [
        "─" * label + "  " + " ".join("─" * cell for _ in range(n_shown)),
        f"{padded('input', label, align='>')}  {inputs}",
    ]
    return "\n".join(line.rstrip() for line in lines)


def effects_table(result: LayerEffectsResult, *, row: int = 0, n: int = 8, n_columns: int = 80) -> str:
    """The strongest effects with bars to the left (the metric falls) or right (it rises) of a line.

    Args:
        result: Layer effects.
        row: Which row of the batch.
        n: How many to list.
        n_columns: Width of the terminal.

    Returns:
        Lines without a line break at the end.
    """
    strongest = result.strongest(n, row=row)
    name = max(len(str(site)) for site, _ in strongest)
    half = max(4, min(24, (n_columns - name - 16) // 2))
    largest = max(abs(effect) for _, effect in strongest) or 1.0
    lines = []
    for site, effect in strongest:
        length = round(half * min(1.0, abs(effect) / largest))
        blocks = "█" * max(length, effect != 0)
        sides = (blocks.rjust(half), " " * half) if effect < 0 else (" " * half, blocks.ljust(half))
        number = f"{effect:+.2f}".replace("-", "−")
        lines.append(f"  {site!s:<{name}}  {sides[0]}│{sides[1]}  {number:>7}".rstrip())
    return "\n".join(lines)


def effect_sentences(result: LayerEffectsResult, answer: str, other: str, *, row: int = 0, n: int = 3) -> list[str]:
    """The strongest effects on a difference of two answers, in words.

    Args:
        result: Layer effects of a metric that is positive where the first answer wins.
        answer: The first answer, a visible string.
        other: The second one.
        row: Which row of the batch.
        n: How many sentences.

    Returns:
        Sentences, the strongest effect first.
    """
    clean = float(result.clean[row])
    parts = {"attn_out": "the attention", "mlp_out": "the MLP"}
    sentences = []
    for site, effect in result.strongest(n, row=row):
        part = parts.get(site.name, site.name) + ("" if site.layer is None else f" of layer {site.layer}")
        zeroed = clean + effect
        if (clean > 0) != (zeroed > 0):
            before, after = (answer, other) if clean > 0 else (other, answer)
            outcome = f"{after} overtakes {before}"
        else:
            leader = answer if clean > 0 else other
            outcome = f"the lead of {leader} {'shrinks' if abs(zeroed) < abs(clean) else 'grows'}"
        numbers = f"({clean:+.2f} to {zeroed:+.2f})".replace("-", "−")
        sentences.append(f"Without {part}, {outcome} {numbers}.")
    return sentences


def size_table(tokens: Sequence[str], ratios: Sequence[float], *, n_columns: int = 80) -> str:
    """How large what was added is against the residual stream, one position a line.

    Args:
        tokens: The target's tokens, visible strings.
        ratios: |added| / |resid| at each.
        n_columns: Width of the terminal.

    Returns:
        Lines without a line break at the end.
    """
    widest = min(24, max(map(text_width, tokens)))
    n_bar = max(4, min(40, n_columns - widest - 18))
    largest = max(*ratios, 1e-9)
    return "\n".join(
        f"{position:3d}  {padded(token, widest)}  {bar(ratio / largest, n_bar)}  {ratio:8.2f}"
        for position, (token, ratio) in enumerate(zip(tokens, ratios, strict=True))
    )


def numbered_texts(texts: Sequence[str], *, n_columns: int = 80) -> str:
    """Texts one after the other, numbered from 1 and wrapped, each as one paragraph.

    Args:
        texts: The texts.
        n_columns: Width of the terminal.

    Returns:
        Lines without a line break at the end.
    """
    paragraphs = [
        textwrap.fill(text, max(20, n_columns - 1), initial_indent=f"{i:3d}  ", subsequent_indent=" " * 5)
        for i, text in enumerate(texts, 1)
    ]
    return "\n".join(paragraph.rstrip() or f"{i:3d}  (nothing)" for i, paragraph in enumerate(paragraphs, 1))
