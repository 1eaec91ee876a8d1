"""Markup, style and script of pages of coloured grids; the data comes from the file of the method.

A grid is rows of numbers with labels. Positive cells are blue, negative ones orange; the cell under the pointer tells
its name and number, and a table lists all cells by size.

>>> "{text}" in BODY, "DATA.grids" in SCRIPT
(True, True)

Sharp edges: names reach the document through `textContent` alone, never as markup. A cell without a number is null.
Columns may have longer names than their labels, in `column_names`.

Source: interp_jax.
"""

from __future__ import annotations

BODY = """
<header>
  <h1>{heading}</h1>
  <p class="prompt mono">{text}</p>
  <p class="quiet">{caption}</p>
</header>
<p id="told" class="told" aria-live="polite">Point at a cell.</p>
<div id="grids"></div>
<details><summary>All numbers, largest first</summary><table id="table" class="numbers"></table></details>
"""

STYLE = """
.told { position: sticky; top: 0; background: var(--surface); min-height: 1.5em; margin: 4px 0 10px; padding: 4px 0; }
h2 { font-size: 14px; margin: 14px 0 4px; }
.grid { display: grid; gap: 1px; width: max-content; max-width: 100%; overflow-x: auto; font-size: 11px; }
.grid .label { color: var(--quiet); padding: 0 6px; text-align: right; line-height: 18px; white-space: nowrap; }
.grid .top { text-align: center; padding: 0; }
.cell { min-width: 20px; height: 18px; background: var(--raised); }
.cell.here { outline: 2px solid var(--ink); outline-offset: -1px; }
.cell.none { background: none; }
summary { cursor: pointer; color: var(--quiet); font-size: 13px; margin: 14px 0 6px; }
"""

SCRIPT = r"""
const signed = (x) => (x > 0 ? "+" : "") + x.toPrecision(4).replace("-", "−");
const all = [];
let here = null;
function tell(cell) {
  if (here) here.classList.remove("here");
  here = cell.node;
  here.classList.add("here");
  byId("told").replaceChildren(make("b", cell.name), ": " + signed(cell.value));
}
for (const grid of DATA.grids) {
  byId("grids").append(make("h2", grid.title));
  const box = make("div", undefined, "grid");
  box.style.gridTemplateColumns = "auto repeat(" + grid.columns.length + ", minmax(20px, 34px))";
  const largest = Math.max(...grid.values.flat().map((x) => Math.abs(x ?? 0))) || 1;
  box.append(make("span", grid.corner, "label"));
  for (const column of grid.columns) box.append(make("span", column, "label top"));
  grid.rows.forEach((row, r) => {
    box.append(make("span", row, "label"));
    grid.columns.forEach((column, c) => {
      const value = grid.values[r][c], node = make("span", undefined, "cell");
      box.append(node);
      if (value === null) { node.classList.add("none"); return; }
      const hue = value > 0 ? "var(--series-1)" : "var(--series-2)";
      const share = Math.round(100 * Math.sqrt(Math.abs(value) / largest));
      node.style.background = "color-mix(in srgb, " + hue + " " + share + "%, var(--raised))";
      // Functions, since "$" in a replacement string has a meaning of its own.
      const long = (grid.column_names ?? grid.columns)[c];
      const cell = { name: grid.name.replace("{row}", () => row).replace("{column}", () => long), value, node };
      all.push(cell);
      node.addEventListener("mouseenter", () => tell(cell));
    });
  });
  byId("grids").append(box);
}
all.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
const rows = byId("table").createTBody();
for (const cell of all.slice(0, 2000)) {
  const row = rows.insertRow();
  row.append(make("td", cell.name), make("td", signed(cell.value), "right"));
}
"""
