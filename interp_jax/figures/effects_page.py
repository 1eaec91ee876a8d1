"""Markup, style and script of the layer effects page; the data comes from `figures/layer_effects.py`.

>>> "{text}" in BODY, "DATA.series" in SCRIPT
(True, True)

Sharp edges: names reach the document through `textContent` alone, never as markup.

Source: interp_jax.
"""

from __future__ import annotations

BODY = """
<header>
  <h1>{heading}</h1>
  <p class="prompt mono">{text}</p>
  <p class="quiet">Change of {metric} (clean: {clean}) when one write to the residual stream is replaced by zeros.
  Below the line: the answer loses without it.</p>
</header>
<div class="legend" id="legend"></div>
<div class="plot"><svg id="plot" role="img" aria-label="Effects by layer; the table below has the numbers"></svg></div>
<p id="told" class="told" aria-live="polite">Point at a bar.</p>
<details open><summary>All effects, strongest first</summary><table id="table" class="numbers"></table></details>
"""

STYLE = """
.legend { display: flex; gap: 18px; font-size: 13px; margin: 10px 0 4px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.plot { overflow-x: auto; }
.plot svg { display: block; }
.plot text { fill: var(--quiet); font-size: 11px; font-variant-numeric: tabular-nums; }
.plot text.value { fill: var(--ink); stroke: var(--surface); stroke-width: 3px; paint-order: stroke;
  pointer-events: none; }
.plot .bar { cursor: default; }
.plot .hit { fill: transparent; }
.plot g:hover .bar, .plot g.here .bar { filter: brightness(1.15); stroke: var(--ink); stroke-width: 1; }
.told { min-height: 1.5em; margin: 4px 0 14px; }
summary { cursor: pointer; color: var(--quiet); font-size: 13px; margin-bottom: 6px; }
"""

SCRIPT = r"""
const plain = (x, digits = 3) => x.toFixed(digits).replace("-", "−");
const signed = (x) => (x > 0 ? "+" : "") + plain(x);
const COLOURS = ["var(--series-1)", "var(--series-2)", "var(--accent)", "var(--quiet)"];
const nLayers = DATA.layers.length, nSeries = DATA.series.length;

const slot = Math.max(16 * nSeries, Math.min(64, 1080 / nLayers)), thick = Math.min(24, 0.8 * slot / nSeries);
const left = 56, top = 14, height = 320, width = left + slot * nLayers + 16;
const [low, high] = DATA.range;
const y = (value) => top + height * (high - Math.max(low, Math.min(high, value))) / (high - low);
const plot = byId("plot");
plot.setAttribute("width", width);
plot.setAttribute("height", top + height + 40);

// Round steps: 1, 2 or 5 times a power of ten, six or so in all.
const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
for (let k = Math.ceil(low / step); k * step <= high; k++) {
  const at = y(k * step);
  plot.append(svg("line", { x1: left, x2: width - 8, y1: at, y2: at,
    stroke: k === 0 ? "var(--quiet)" : "var(--line)" }));
  const label = String(+(k * step).toPrecision(3)).replace("-", "−");
  plot.append(svg("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, label));
}
DATA.layers.forEach((layer, i) => plot.append(
  svg("text", { x: left + slot * (i + 0.5), y: top + height + 18, "text-anchor": "middle" }, layer)));
plot.append(svg("text", { x: left + slot * nLayers / 2, y: top + height + 33, "text-anchor": "middle" }, "layer"));

const all = [];
DATA.series.forEach((series, s) => {
  const item = make("span"), mark = make("i");
  mark.style.background = COLOURS[s % COLOURS.length];
  item.append(mark, series.name);
  byId("legend").append(item);
  series.effects.forEach((effect, i) => {
    if (effect !== null) all.push({ name: series.name, s, i, layer: DATA.layers[i], effect });
  });
});
all.sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));

function tell(bar) {
  for (const node of plot.querySelectorAll(".here")) node.classList.remove("here");
  bar.group.classList.add("here");
  byId("told").replaceChildren(make("b", bar.layer + "." + bar.name), " zeroed: " + signed(bar.effect) +
    ", from " + plain(DATA.clean) + " to " + plain(DATA.clean + bar.effect));
}
const labels = svg("g", {});
all.forEach((bar, order) => {
  const x = left + slot * (bar.i + 0.5) + (bar.s - nSeries / 2) * thick, end = y(bar.effect), zero = y(0);
  bar.group = svg("g", {});
  bar.group.append(
    svg("rect", { class: "bar", x: x + 1, width: thick - 2, y: Math.min(end, zero),
      height: Math.max(0.5, Math.abs(end - zero)), rx: 1.5, fill: COLOURS[bar.s % COLOURS.length] }),
    svg("rect", { class: "hit", x, width: thick, y: top, height }));
  plot.append(bar.group);
  bar.group.addEventListener("mouseenter", () => tell(bar));
  const isCut = bar.effect < low || bar.effect > high;
  if (!isCut && order >= 4) return;
  // A bar that is cut off carries its value beside its end, where there is room.
  const right = bar.i < nLayers / 2, below = bar.effect < 0;
  labels.append(isCut
    ? svg("text", { class: "value", x: right ? x + thick + 3 : x - 3, "text-anchor": right ? "start" : "end",
      y: end + (below ? -3 : 11) }, signed(bar.effect))
    : svg("text", { class: "value", x: x + thick / 2, "text-anchor": "middle", y: end + (below ? 13 : -5) },
      signed(bar.effect)));
});
plot.append(labels);

const head = byId("table").createTHead().insertRow();
for (const [text, cls] of [["site", ""], ["effect", "right"], ["metric", "right"]]) head.append(make("th", text, cls));
const rows = byId("table").createTBody();
for (const bar of all) {
  const row = rows.insertRow();
  row.append(make("td", bar.layer + "." + bar.name), make("td", signed(bar.effect), "right"),
    make("td", plain(DATA.clean + bar.effect), "right"));
  row.addEventListener("mouseenter", () => tell(bar));
}
"""
