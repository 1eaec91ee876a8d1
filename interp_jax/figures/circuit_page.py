"""Markup, style and script of the circuit page; the data comes from `figures/circuits.py`.

>>> "{text}" in BODY, "DATA.edges" in SCRIPT
(True, True)

Sharp edges: names reach the document through `textContent` alone, never as markup.

Source: interp_jax.
"""

from __future__ import annotations

BODY = """
<header>
  <h1>{heading}</h1>
  <p class="prompt mono">{text}</p>
  <p class="quiet">{caption}</p>
</header>
<div class="plot"><svg id="plot" role="img" aria-label="The circuit; the table below has its edges"></svg></div>
<p id="told" class="told" aria-live="polite">Point at a node or an edge.</p>
<details open><summary>Edges, strongest first</summary><table id="table" class="numbers"></table></details>
"""

STYLE = """
.plot { overflow: auto; max-height: 80vh; }
.plot svg { display: block; }
.plot rect { fill: var(--surface); stroke-width: 1.4; }
.plot text { fill: var(--ink); font-size: 12px; text-anchor: middle; pointer-events: none; }
.plot path { fill: none; stroke-opacity: 0.5; }
.plot path:hover, .plot path.here { stroke-opacity: 1; }
.plot.some path:not(.here) { stroke-opacity: 0.06; }
.told { min-height: 1.5em; margin: 4px 0 14px; }
summary { cursor: pointer; color: var(--quiet); font-size: 13px; margin-bottom: 6px; }
"""

SCRIPT = r"""
const signed = (x) => x === null ? "" : (x > 0 ? "+" : "") + x.toFixed(3).replace("-", "−");
const COLOURS = { head: "var(--series-1)", mlp: "var(--series-3)" };

const widest = Math.max(...DATA.nodes.map((n) => Math.abs(n.x))), rows = Math.max(...DATA.nodes.map((n) => n.y)) + 1;
const stepX = 96, stepY = 58, width = Math.max(480, stepX * (2 * widest + 1.6)), height = stepY * rows + 12;
const x = (n) => width / 2 + stepX * n.x, y = (n) => height - stepY * (n.y + 0.5) - 6;
const plot = byId("plot"), frame = plot.parentNode;
plot.setAttribute("width", width);
plot.setAttribute("height", height);
const byName = new Map(DATA.nodes.map((n) => [n.name, n]));
const largest = Math.max(...DATA.edges.map((e) => Math.abs(e.score ?? 0))) || 1;

const words = (e) => e.sender + " → " + e.receiver + (e.score === null ? "" : ": " + signed(e.score));
function show(edges, heading) {
  for (const node of plot.querySelectorAll(".here")) node.classList.remove("here");
  frame.classList.toggle("some", edges.length > 0);
  for (const edge of edges) edge.path.classList.add("here");
  if (heading) byId("told").textContent = heading;
}
for (const edge of [...DATA.edges].reverse()) {
  const a = byName.get(edge.sender), b = byName.get(edge.target), middle = (y(a) + y(b)) / 2;
  edge.path = svg("path", {
    d: `M${x(a)},${y(a)} C${x(a)},${middle} ${x(b)},${middle} ${x(b)},${y(b)}`,
    stroke: edge.score === null ? "var(--quiet)" : edge.score > 0 ? "var(--series-1)" : "var(--series-2)",
    "stroke-width": edge.score === null ? 1.4 : 0.6 + 5 * Math.abs(edge.score) / largest });
  edge.path.addEventListener("mouseenter", () => show([edge], words(edge)));
  edge.path.addEventListener("mouseleave", () => show([]));
  plot.append(edge.path);
}
for (const node of DATA.nodes) {
  const group = svg("g", {}), mine = DATA.edges.filter((e) => e.sender === node.name || e.target === node.name);
  group.append(
    svg("rect", { x: x(node) - 40, y: y(node) - 12, width: 80, height: 24, rx: 6,
      stroke: COLOURS[node.part] || "var(--quiet)" }),
    svg("text", { x: x(node), y: y(node) + 4 }, node.name));
  group.addEventListener("mouseenter", () => show(mine, node.name + ": " + mine.map(words).slice(0, 12).join(", ") +
    (mine.length > 12 ? ", … (" + mine.length + " in all)" : "")));
  group.addEventListener("mouseleave", () => show([]));
  plot.append(group);
}
const head = byId("table").createTHead().insertRow();
for (const [text, cls] of [["from", ""], ["to", ""], ["score", "right"]]) head.append(make("th", text, cls));
const body = byId("table").createTBody();
// An edge into a key-value head is drawn once per head of its group, and told once.
const once = new Map();
for (const edge of DATA.edges) {
  const key = edge.sender + " " + edge.receiver;
  if (!once.has(key)) once.set(key, []);
  once.get(key).push(edge);
}
for (const [edge, ...others] of once.values()) {
  const row = body.insertRow();
  row.append(make("td", edge.sender), make("td", edge.receiver), make("td", signed(edge.score), "right"));
  row.addEventListener("mouseenter", () => show([edge, ...others], words(edge)));
  row.addEventListener("mouseleave", () => show([]));
}
"""
