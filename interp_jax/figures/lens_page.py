"""Markup, style and script of the logit lens page; the data comes from `figures/logit_lens.py`.

>>> "{text}" in BODY, "DATA.views" in SCRIPT
(True, True)

Sharp edges: tokens reach the document through `textContent` alone, never as markup.

Source: interp_jax.
"""

from __future__ import annotations

BODY = """
<header>
  <h1>{heading}</h1>
  <p class="prompt mono">{text}</p>
  <p class="quiet">Each cell is the next token that place in the residual stream already suggests
  (norm: {norm}). Rows run from the input, at the bottom, to the output. <b>Bold</b>: the model's own answer.</p>
</header>
<div class="tools">
  <div class="choice" role="group" aria-label="Colour by" id="choice"></div>
  <div class="scale"><span id="low"></span><i></i><span id="high"></span></div>
</div>
<main>
  <div class="scroll" id="scroll" tabindex="0" aria-label="Views by positions; arrow keys move">
    <table id="grid"></table>
  </div>
  <aside id="panel" aria-live="polite"></aside>
</main>
"""

STYLE = """
body { height: 100vh; display: flex; flex-direction: column; }
.tools { display: flex; flex-wrap: wrap; gap: 10px 22px; align-items: center; margin: 6px 0 12px; }
.choice { display: inline-flex; border: 1px solid var(--line); border-radius: 7px; overflow: hidden; }
.choice button { font: inherit; font-size: 13px; padding: 3px 11px; border: 0; background: none; color: var(--quiet);
  cursor: pointer; }
.choice button + button { border-left: 1px solid var(--line); }
.choice button[aria-pressed=true] { background: var(--raised); color: var(--ink); font-weight: 600; }
.scale { display: inline-flex; align-items: center; gap: 8px; font-size: 12px; color: var(--quiet); }
.scale i { width: 130px; height: 10px; border-radius: 5px;
  background: linear-gradient(90deg in oklab, var(--low), var(--mid), var(--high)); border: 1px solid var(--line); }
main { display: flex; gap: 20px; align-items: flex-start; min-height: 0; flex: 1; }
.scroll { overflow: auto; max-height: 100%; outline: none; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 1px; font-size: 12px; line-height: 1; }
td, th { padding: 0 5px; height: 20px; white-space: nowrap; text-align: center; max-width: 84px; overflow: hidden;
  text-overflow: ellipsis; }
thead th { position: sticky; top: 0; z-index: 2; background: var(--surface); height: 36px; line-height: 1.25;
  border-bottom: 1px solid var(--line); }
thead small { display: block; font-weight: 400; color: var(--quiet); font-size: 10px; }
tbody th { position: sticky; left: 0; z-index: 1; background: var(--surface); text-align: right; font-weight: 500;
  color: var(--quiet); font-size: 11px; max-width: none; }
thead th:first-child { left: 0; z-index: 3; color: var(--quiet); font-weight: 400; font-size: 11px; }
td { --from: var(--low); --to: var(--mid); min-width: 56px; border-radius: 3px; cursor: default; color: var(--ink);
  background: color-mix(in oklab, var(--to) calc(var(--part) * 100%), var(--from)); }
td.hot { --from: var(--mid); --to: var(--high); color: var(--on-high); }
td.agrees { font-weight: 700; }
td.same { box-shadow: inset 0 0 0 1.5px var(--accent); }
td.here { box-shadow: inset 0 0 0 2.5px var(--accent); }
th.here { color: var(--accent); }
aside { flex: 0 0 292px; background: var(--raised); border: 1px solid var(--line); border-radius: 8px;
  padding: 14px 16px; max-height: 100%; overflow: auto; font-size: 13px; }
aside h2 { font-size: 14px; margin: 0; }
aside h3 { font-size: 11px; font-weight: 600; letter-spacing: .04em; text-transform: uppercase; color: var(--quiet);
  margin: 14px 0 5px; }
.bar { display: grid; grid-template-columns: 104px 1fr 66px; gap: 8px; align-items: center; height: 22px; }
.bar span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar i { height: 9px; border-radius: 2px; background: var(--series-1); min-width: 1px; }
.bar span:last-child { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: 1fr auto; gap: 2px 10px; margin: 0; }
aside p { margin: 12px 0 0; }
dt { color: var(--quiet); } dd { margin: 0; font-variant-numeric: tabular-nums; text-align: right; }
svg { display: block; width: 100%; height: 84px; overflow: visible; }
@media (max-width: 820px) {
  body { height: auto; padding: 16px; } main { flex-direction: column; } .scroll { max-height: 70vh; max-width: 100%; }
  aside { position: sticky; bottom: 0; width: 100%; flex: none; z-index: 4; max-height: 45vh; }
}
"""

SCRIPT = r"""
const nViews = DATA.views.length, nPos = DATA.inputs.length;
const percent = (p) => p === null ? "–" : p >= 0.0995 ? (100 * p).toFixed(1) + " %" : p >= 0.0001 ?
  (100 * p).toFixed(2) + " %" : p === 0 ? "0 %" : "< 0.01 %";
const number = (x) => x === null ? "–" : x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(1) : x.toFixed(3);
const largest = (rows) => Math.max(1e-6, ...rows.map((row) => Math.max(...row)));
const undefinedHere = (pos) => DATA.targets[pos] === null;

// Each way to colour: a value in 0..1 per cell, and words for the ends of the scale.
const maxRank = largest(DATA.rank), maxKl = largest(DATA.kl), maxEntropy = largest(DATA.entropy);
const WAYS = {
  "Probability": { of: (v, t) => DATA.p[v][t][0], low: "0", high: "1" },
  "Rank of target": { of: (v, t) => undefinedHere(t) ? 0 : 1 - Math.log(DATA.rank[v][t]) / Math.log(maxRank + 1),
    low: String(maxRank), high: "1st" },
  "KL to output": { of: (v, t) => DATA.kl[v][t] / maxKl, low: "0", high: maxKl.toFixed(1) + " nats" },
  "Entropy": { of: (v, t) => DATA.entropy[v][t] / maxEntropy, low: "0", high: maxEntropy.toFixed(1) + " nats" },
};

const grid = byId("grid"), head = grid.createTHead().insertRow(), tbody = grid.createTBody();
head.append(make("th", "view \\ token"));
const columns = DATA.inputs.map((text, pos) => {
  const th = make("th", text, "mono");
  th.append(make("small", pos));
  th.title = text;
  head.append(th);
  return th;
});
const cells = [], rowHeads = [];
for (let v = nViews - 1; v >= 0; v--) {
  const row = tbody.insertRow();
  rowHeads[v] = make("th", DATA.views[v]);
  row.append(rowHeads[v]);
  cells[v] = DATA.inputs.map((_, t) => {
    const td = make("td", DATA.texts[DATA.top[v][t][0]], "mono" + (DATA.agrees[v][t] ? " agrees" : ""));
    td.dataset.v = v; td.dataset.t = t;
    row.append(td);
    return td;
  });
}

function colour(name) {
  const way = WAYS[name];
  for (let v = 0; v < nViews; v++) for (let t = 0; t < nPos; t++) {
    const p = Math.min(1, Math.max(0, way.of(v, t)));
    // The two halves of the scale have colours of their own: low to mid, and mid to high.
    cells[v][t].style.setProperty("--part", (p > 0.5 ? 2 * p - 1 : 2 * p).toFixed(3));
    cells[v][t].classList.toggle("hot", p > 0.5);
  }
  byId("low").textContent = way.low;
  byId("high").textContent = way.high;
  for (const button of byId("choice").children) button.setAttribute("aria-pressed", button.textContent === name);
}
for (const name of Object.keys(WAYS)) {
  const button = make("button", name);
  button.type = "button";
  button.onclick = () => colour(name);
  byId("choice").append(button);
}

function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}
// The target's probability from view to view, at one position.
function course(v, t) {
  const plot = svg("svg", { viewBox: "0 0 260 84", preserveAspectRatio: "none" });
  const x = (i) => nViews > 1 ? 4 + 252 * i / (nViews - 1) : 130, y = (p) => 78 - 72 * p;
  for (const p of [0, 0.5, 1]) plot.append(svg("line", { x1: 0, x2: 260, y1: y(p), y2: y(p), stroke: "var(--line)" }));
  const points = DATA.target_p.map((row, i) => x(i) + "," + y(row[t])).join(" ");
  plot.append(svg("polyline", { points, fill: "none", stroke: "var(--series-1)", "stroke-width": 2,
    "stroke-linejoin": "round" }));
  plot.append(svg("circle", { cx: x(v), cy: y(DATA.target_p[v][t]), r: 4.5, fill: "var(--accent)" }));
  return plot;
}

let at = null, pinned = false;
function show(v, t) {
  if (at) {
    for (const node of grid.querySelectorAll(".same, .here")) node.classList.remove("same", "here");
  }
  at = [v, t];
  const top = DATA.top[v][t][0];
  for (let i = 0; i < nViews; i++) for (let j = 0; j < nPos; j++) {
    if (DATA.top[i][j][0] === top) cells[i][j].classList.add("same");
  }
  cells[v][t].classList.add("here");
  rowHeads[v].classList.add("here");
  columns[t].classList.add("here");

  const panel = byId("panel");
  panel.replaceChildren();
  const title = make("h2", DATA.views[v]);
  const where = make("div", "after ", "quiet");
  where.append(make("b", DATA.inputs[t], "mono"), " (position " + t + ")");
  panel.append(title, where, make("h3", "Most probable next tokens"));
  DATA.top[v][t].forEach((index, k) => {
    const bar = make("div", undefined, "bar"), length = make("i");
    length.style.width = Math.max(1, 100 * DATA.p[v][t][k]) + "%";
    const text = make("span", DATA.texts[index], "mono");
    text.title = DATA.texts[index];
    bar.append(text, length, make("span", percent(DATA.p[v][t][k])));
    panel.append(bar);
  });
  if (!undefinedHere(t)) {
    panel.append(make("h3", "Target: " + DATA.target));
    const list = make("dl");
    for (const [name, value] of [["token", DATA.targets[t]], ["rank", DATA.rank[v][t].toLocaleString("en")],
      ["probability", percent(DATA.target_p[v][t])]]) list.append(make("dt", name), make("dd", value));
    panel.append(list, make("h3", "Its probability from view to view"), course(v, t));
  }
  panel.append(make("h3", "Whole distribution, in nats"));
  const list = make("dl");
  for (const [name, value] of [["KL(output ‖ view)", DATA.kl[v][t]], ["KL(view ‖ output)", DATA.kl_reverse[v][t]],
    ["entropy", DATA.entropy[v][t]]]) list.append(make("dt", name), make("dd", number(value)));
  panel.append(list, make("p", pinned ? "Pinned. Click again to release." : "Click to pin; arrow keys move.", "quiet"));
}

const cellOf = (event) => event.target.closest("td");
tbody.addEventListener("mouseover", (event) => {
  const td = cellOf(event);
  if (td && !pinned) show(+td.dataset.v, +td.dataset.t);
});
tbody.addEventListener("click", (event) => {
  const td = cellOf(event);
  if (!td) return;
  pinned = !(pinned && td.classList.contains("here"));
  show(+td.dataset.v, +td.dataset.t);
});
byId("scroll").addEventListener("keydown", (event) => {
  const step = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (event.key === "Escape") { pinned = false; show(...at); }
  if (!step) return;
  event.preventDefault();
  const v = Math.min(nViews - 1, Math.max(0, at[0] + step[0])), t = Math.min(nPos - 1, Math.max(0, at[1] + step[1]));
  show(v, t);
  cells[v][t].scrollIntoView({ block: "nearest", inline: "nearest" });
});
colour("Probability");
show(nViews - 1, nPos - 1);
// The last position is the one asked about; a long text starts there.
byId("scroll").scrollLeft = byId("scroll").scrollWidth;
"""
