r"""The frame of every HTML figure: one file, no external resources, light and dark, data apart from markup.

>>> page = html_page("A < B", body="<p id=x></p>", script="x.textContent = DATA.text", data={"text": "</script>"})
>>> "A &lt; B" in page, page.count("</script>")
(True, 1)

Sharp edges: `body` and `script` are trusted markup, so text from models goes through `escape` or into `data`.
Numbers in `data` must be finite, since JSON has no NaN; pass None instead.

Source: interp_jax.
"""

from __future__ import annotations

import html
import json
from typing import Any

# Meaning first: a surface, ink, and the two ends of each scale, once for light and once for dark.
_STYLE = """
:root {
  color-scheme: light dark;
  --surface: #ffffff; --raised: #f5f7fa; --line: #dde3ea; --ink: #17202b; --quiet: #5c6b7c;
  --low: #f3f7fb; --mid: #3f86cc; --high: #0a2f62; --on-high: #ffffff; --accent: #c2410c;
  --series-1: #1d6fc0; --series-2: #d9771a; --series-3: #6b4fa0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --surface: #11161d; --raised: #19212b; --line: #2c3744; --ink: #e6ecf3; --quiet: #93a3b5;
    --low: #18202a; --mid: #3c7cba; --high: #b5defd; --on-high: #06121f; --accent: #fdba74;
    --series-1: #62aef5; --series-2: #f2a65a; --series-3: #b9a2ee;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 24px 28px; background: var(--surface); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
h1 { font-size: 20px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
p { margin: 0 0 6px; max-width: 110ch; }
.quiet { color: var(--quiet); }
.prompt { white-space: pre-wrap; max-height: 4.5em; overflow: auto; background: var(--raised); padding: 6px 10px;
  border-radius: 6px; font-size: 13px; }
.prompt:empty { display: none; }
.numbers { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
.numbers th { text-align: left; color: var(--quiet); font-weight: 500; }
.numbers td, .numbers th { padding: 2px 22px 2px 0; border-bottom: 1px solid var(--line); }
.numbers td.right, .numbers th.right { text-align: right; }
.mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
"""

# What every script uses: an element by its id, a new element, a new part of a drawing.
_SCRIPT = """
const byId = (id) => document.getElementById(id);
const make = (tag, text, cls) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (cls) node.className = cls;
  return node;
};
const svg = (tag, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
"""


def escape(text: str) -> str:
    """Text made safe for element content and for quoted attributes."""
    return html.escape(text, quote=True)


def script_data(data: Any) -> str:
    """Data as an expression of JavaScript, for a script in a page or in a file of its own.

    Args:
        data: Anything JSON can hold.

    Returns:
        The expression, on one line.

    Raises:
        ValueError: `data` holds a number that is not finite.
    """
    # `<` inside the data could close the script element or open a comment.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    # Valid in JSON; not in JavaScript before 2019.
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def html_page(title: str, *, body: str, style: str = "", script: str = "", data: Any = None) -> str:
    """A whole HTML document.

    Args:
        title: Title of the window; escaped here.
        body: Markup of the body.
        style: CSS after the frame's own.
        script: JavaScript, run after the body is there, in a block of its own; it finds the data in `DATA`, and
            `byId`, `make` and `svg` for elements.
        data: Anything JSON can hold.

    Returns:
        The document, to be written as UTF-8.

    Raises:
        ValueError: `data` holds a number that is not finite.
    """
    embedded = script_data(data)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}{style}</style>\n</head>\n<body>\n{body}\n"
        f'<script>"use strict";\nconst DATA = {embedded};{_SCRIPT}{{\n{script}}}</script>\n</body>\n</html>\n'
    )
