"""Markup, style and script of the page of cost against recall; the data comes from `figures/cost_recall.py`.

>>> "{heading}" in BODY, "DATA.curves" in SCRIPT
(True, True)

Sharp edges: names reach the document through `textContent` alone, never as markup.

Source: interp_jax.
"""

from __future__ import annotations

BODY = """
<header>
  <h1>{heading}</h1>
  <p class="quiet">What each search has spent, in forward passes, when all of the true top K nodes are verified. Both
  axes are logarithmic. The number beside a name is how many times the oracle's cost that is, as a geometric mean in
  which each K weighs 1/K.</p>
</header>
<div class="legend" id="legend"></div>
<div class="plot"><svg id="plot" role="img" aria-label="Cost by K; the table below has the numbers"></svg></div>
<p id="told" class="told" aria-live="polite">Point at the plot.</p>
<table id="table" class="numbers"></table>
"""

STYLE = """
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; font-size: 13px; margin: 10px 0 4px; }
.legend i { display: inline-block; width: 14px; height: 3px; margin: 0 6px 4px 0; }
.plot { overflow-x: auto; }
.plot text { fill: var(--quiet); font-size: 11px; }
.told { min-height: 1.5em; }
"""

SCRIPT = r"""
const colour = (i) => "hsl(" + (210 + 137 * i) % 360 + " 62% 52%)";
const K = DATA.k, last = K[K.length - 1];
const left = 70, top = 12, width = 720, height = 380;
const most = Math.max(last, ...DATA.curves.flatMap((curve) => curve.costs)), least = 1;
const scale = (value, high) => Math.log(value / least) / Math.log(Math.max(high, 2) / least);
const x = (k) => left + width * scale(k, last);
const y = (cost) => top + height * (1 - scale(cost, most));
const plot = byId("plot");
plot.setAttribute("width", left + width + 20);
plot.setAttribute("height", top + height + 40);
for (let power = 1; power <= Math.max(most, last); power *= 10) {
  if (power <= last) plot.append(
    svg("line", { x1: x(power), x2: x(power), y1: top, y2: top + height, stroke: "var(--line)" }),
    svg("text", { x: x(power), y: top + height + 16, "text-anchor": "middle" }, power));
  if (power <= most) plot.append(
    svg("line", { x1: left, x2: left + width, y1: y(power), y2: y(power), stroke: "var(--line)" }),
    svg("text", { x: left - 8, y: y(power) + 4, "text-anchor": "end" }, power));
}
plot.append(svg("text", { x: left + width / 2, y: top + height + 34, "text-anchor": "middle" }, "K"));
const line = (costs, stroke, thick) => plot.append(svg("polyline", { fill: "none", stroke, "stroke-width": thick,
  points: costs.map((cost, i) => x(K[i]) + "," + y(cost)).join(" ") }));
line(K, "var(--quiet)", 1);
const entry = (name, stroke, score) => {
  const item = make("span"), mark = make("i");
  mark.style.background = stroke;
  item.append(mark, name + " (" + score + "×)");
  byId("legend").append(item);
};
DATA.curves.forEach((curve, i) => { line(curve.costs, colour(i), 2); entry(curve.name, colour(i), curve.score); });
entry("oracle", "var(--quiet)", 1);
const cursor = svg("line", { y1: top, y2: top + height, stroke: "var(--ink)", "stroke-dasharray": "3 3", opacity: 0 });
plot.append(cursor);
plot.addEventListener("mousemove", (event) => {
  const at = event.clientX - plot.getBoundingClientRect().left;
  let i = 0;
  K.forEach((k, j) => { if (Math.abs(x(k) - at) < Math.abs(x(K[i]) - at)) i = j; });
  for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(K[i]));
  cursor.setAttribute("opacity", 1);
  byId("told").textContent = "top " + K[i] + ": " +
    DATA.curves.map((curve) => curve.name + " " + curve.costs[i]).join(", ");
});
const shown = [1, 10, 100, 1000, 10000, 100000].map((k) => K.indexOf(k)).filter((i) => i >= 0);
if (!shown.includes(K.length - 1)) shown.push(K.length - 1);
const head = byId("table").createTHead().insertRow();
head.append(make("th", "search"), make("th", "times the oracle", "right"));
for (const i of shown) head.append(make("th", "top " + K[i], "right"));
const body = byId("table").createTBody();
for (const curve of DATA.curves) {
  const row = body.insertRow();
  row.append(make("td", curve.name), make("td", curve.score, "right"));
  for (const i of shown) row.append(make("td", curve.costs[i], "right"));
}
"""
