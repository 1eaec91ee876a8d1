"""Markup, style and script of the page of SAE evaluations; the data comes from `figures/sae_evaluation.py`.

>>> "{heading}" in BODY, "DATA.saes" in SCRIPT
(True, True)

Sharp edges: names reach the document through `textContent` alone, never as markup. A number that is none is null.

Source: interp_jax.
"""

from __future__ import annotations

BODY = """
<header>
  <h1>{heading}</h1>
  <p class="quiet">Loss recovered: 1 is the clean loss, 0 the loss with the site ablated. Densities:
  log10(frequency + 10^-6.5) of the latents; the spike on the left never fired, what is left of the dotted line is
  ultra-low.</p>
</header>
<div class="legend" id="legend"></div>
<h2 id="frontiers-title">Loss recovered by L0</h2>
<div class="plots" id="frontiers"></div>
<h2>Densities of latents</h2>
<p id="told" class="told" aria-live="polite">Point at a bar or a dot.</p>
<div class="plots" id="densities"></div>
<h2>All numbers</h2>
<div class="scroll"><table id="table" class="numbers"></table></div>
"""

STYLE = """
h2 { font-size: 14px; margin: 16px 0 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; font-size: 13px; margin: 10px 0 4px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 50%; margin: 0 6px -1px 0; }
.plots { display: flex; flex-wrap: wrap; gap: 14px 26px; }
.plots figure { margin: 0; }
.plots figcaption { font-size: 13px; }
.plots text { fill: var(--quiet); font-size: 11px; }
.told { min-height: 1.5em; }
.scroll { overflow-x: auto; }
"""

SCRIPT = r"""
const colour = (i) => "hsl(" + (210 + 137 * i) % 360 + " 62% 52%)";
const short = (x) => x === null ? "n/a" : Number.isInteger(x) ? String(x) : x.toPrecision(4);
const tell = (name, text) => byId("told").replaceChildren(make("b", name), ": " + text);
DATA.series.forEach((name, i) => {
  const item = make("span"), mark = make("i");
  mark.style.background = colour(i);
  item.append(mark, name);
  byId("legend").append(item);
});
const figure = (home, caption, width, height) => {
  const box = make("figure"), plot = svg("svg", { width, height, role: "img", "aria-label": caption });
  box.append(make("figcaption", caption), plot);
  byId(home).append(box);
  return plot;
};
const span = (values) => {
  const low = Math.min(...values), high = Math.max(...values), pad = (high - low || Math.abs(high) || 1) * 0.08;
  return [low - pad, high + pad];
};
for (const ablation of DATA.ablations) {
  const points = DATA.saes.map((sae) => ({ sae, l0: sae.numbers.l0, y: sae.numbers["loss_recovered_" + ablation] }))
    .filter((point) => point.y !== null);
  if (!points.length) continue;
  const left = 56, top = 10, width = 380, height = 240;
  const plot = figure("frontiers", "against " + ablation + " ablation", left + width + 12, top + height + 38);
  const [x0, x1] = span(points.map((p) => p.l0)), [y0, y1] = span(points.map((p) => p.y));
  const x = (value) => left + width * (value - x0) / (x1 - x0), y = (value) => top + height * (y1 - value) / (y1 - y0);
  for (let i = 0; i <= 4; i++) {
    const atX = x0 + (x1 - x0) * i / 4, atY = y0 + (y1 - y0) * i / 4;
    plot.append(svg("line", { x1: x(atX), x2: x(atX), y1: top, y2: top + height, stroke: "var(--line)" }),
      svg("line", { x1: left, x2: left + width, y1: y(atY), y2: y(atY), stroke: "var(--line)" }),
      svg("text", { x: x(atX), y: top + height + 15, "text-anchor": "middle" }, atX.toPrecision(3)),
      svg("text", { x: left - 6, y: y(atY) + 4, "text-anchor": "end" }, atY.toPrecision(4)));
  }
  plot.append(svg("text", { x: left + width / 2, y: top + height + 32, "text-anchor": "middle" }, "L0"));
  DATA.series.forEach((name, i) => {
    const mine = points.filter((point) => point.sae.series === i);
    plot.append(svg("polyline", { fill: "none", stroke: colour(i), "stroke-width": 1.5,
      points: mine.map((p) => x(p.l0) + "," + y(p.y)).join(" ") }));
    for (const p of mine) {
      const dot = svg("circle", { cx: x(p.l0), cy: y(p.y), r: 4, fill: colour(i) });
      dot.addEventListener("mouseenter", () => tell(p.sae.label, "L0 " + short(p.l0) + ", recovered " + short(p.y)));
      plot.append(dot);
    }
  });
}
if (!byId("frontiers").children.length) byId("frontiers-title").remove();
for (const sae of DATA.saes) {
  const left = 46, top = 8, width = 330, height = 120, edges = DATA.edges, n = sae.counts.length;
  const plot = figure("densities", sae.label, left + width + 10, top + height + 22);
  const low = edges[0], high = edges[n], most = Math.max(...sae.counts, 1);
  const x = (value) => left + width * (value - low) / (high - low);
  sae.counts.forEach((count, i) => {
    const tall = height * count / most;
    const bar = svg("rect", { x: x(edges[i]), y: top + height - tall, width: width / n - 0.5, height: tall,
      fill: colour(sae.series) });
    const over = svg("rect", { x: x(edges[i]), y: top, width: width / n, height, fill: "transparent" });
    over.addEventListener("mouseenter", () => tell(sae.label,
      count + " latents at " + edges[i].toFixed(2) + " to " + edges[i + 1].toFixed(2)));
    plot.append(bar, over);
  });
  plot.append(svg("line", { x1: x(DATA.ultraLow), x2: x(DATA.ultraLow), y1: top, y2: top + height,
    stroke: "var(--quiet)", "stroke-dasharray": "2 3" }));
  plot.append(svg("text", { x: left - 6, y: top + 9, "text-anchor": "end" }, most));
  for (let power = Math.ceil(low); power <= 0; power++)
    plot.append(svg("text", { x: x(power), y: top + height + 14, "text-anchor": "middle" }, power));
}
const names = [...new Set(DATA.saes.flatMap((sae) => Object.keys(sae.numbers)))];
const head = byId("table").createTHead().insertRow();
head.append(make("th", ""), ...DATA.saes.map((sae) => make("th", sae.label, "right")));
const body = byId("table").createTBody();
for (const name of names) {
  const row = body.insertRow();
  row.append(make("td", name.replaceAll("_", " ")),
    ...DATA.saes.map((sae) => make("td", short(sae.numbers[name] ?? null), "right")));
}
"""
