"""Markup, style and script of the site of an SAE's latents; the data comes from `figures/sae_site.py`.

Data stands in scripts, which a page may load from a folder as well as from a server: `data/index.js` declares INDEX,
by which latents are found, and CHUNKS; `data/latents-N.js` puts the latents of a file into CHUNKS when one of them is
looked at.

>>> "{heading}" in BODY, "INDEX.latents" in SCRIPT, "CHUNKS[" in SCRIPT
(True, True, True)

Sharp edges: texts of tokens reach the document through `textContent` alone, never as markup.

Source: interp_jax.
"""

from __future__ import annotations

BODY = """
<div class="panes">
<nav aria-label="Latents">
  <h1><a href="#">{heading}</a></h1>
  <p class="quiet">{caption}</p>
  <label class="search"><span>Token or number</span>
    <input id="query" type="search" placeholder="Search, or press /" autocomplete="off" spellcheck="false"></label>
  <div class="filters">
    <label><span>Fires on at least</span><input id="low" type="number" min="0" max="100" step="any"> %</label>
    <label><span>at most</span><input id="high" type="number" min="0" max="100" step="any"> %</label>
    <label><span>Order</span><select id="order">
      <option value="number">number</option>
      <option value="often">most often first</option>
      <option value="rarely">rarest first</option>
      <option value="largest">largest activation first</option>
    </select></label>
  </div>
  <p id="status" class="quiet" role="status"></p>
  <ol id="list"></ol>
  <button id="more" type="button" hidden>Show more</button>
</nav>
<main id="main" tabindex="-1"></main>
</div>
<script src="data/index.js"></script>
"""

STYLE = """
body { padding: 0; }
.panes { display: grid; grid-template-columns: 360px minmax(0, 1fr); height: 100vh; }
nav { border-right: 1px solid var(--line); padding: 18px 16px; display: flex; flex-direction: column; min-height: 0; }
nav h1 { font-size: 17px; }
nav h1 a { color: inherit; text-decoration: none; }
nav p { font-size: 12px; }
main { padding: 22px 28px; overflow-y: auto; outline: none; }
label span { color: var(--quiet); font-size: 12px; }
input, select, button { font: inherit; color: inherit; background: var(--raised); border: 1px solid var(--line);
  border-radius: 6px; padding: 4px 8px; }
button { cursor: pointer; }
:focus-visible { outline: 2px solid var(--series-1); outline-offset: 1px; }
.search span { display: block; }
.search input { width: 100%; }
.filters { display: flex; flex-wrap: wrap; gap: 6px 10px; margin: 8px 0; font-size: 12px; align-items: center; }
.filters input { width: 58px; padding: 2px 4px; margin-left: 4px; }
.filters select { padding: 2px 4px; margin-left: 4px; }
#list { list-style: none; margin: 0; padding: 0; overflow-y: auto; flex: 1; min-height: 0; }
#list a { display: grid; grid-template-columns: 48px 62px minmax(0, 1fr); gap: 6px; padding: 3px 6px;
  border-radius: 5px; color: inherit; text-decoration: none; font-size: 12px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
#list a:hover { background: var(--raised); }
#list a[aria-current] { background: var(--series-1); color: var(--surface); }
#list a[aria-current] .quiet { color: inherit; }
#list .words { overflow: hidden; text-overflow: ellipsis; }
h2 { font-size: 18px; margin: 0; }
h3 { font-size: 13px; margin: 20px 0 6px; }
h3 .quiet { font-weight: 400; }
.bar { display: flex; gap: 12px; align-items: center; justify-content: space-between; margin-bottom: 8px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 0 0 8px; }
.facts dt { color: var(--quiet); font-size: 12px; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.columns { display: flex; flex-wrap: wrap; gap: 0 26px; align-items: flex-start; }
.plots { display: flex; flex-wrap: wrap; gap: 0 26px; flex: 1 1 270px; }
.columns table { font-size: 12px; }
.columns td { white-space: nowrap; max-width: 190px; overflow: hidden; text-overflow: ellipsis; }
.example { display: grid; grid-template-columns: 64px minmax(0, 1fr); gap: 10px; padding: 4px 0;
  border-bottom: 1px solid var(--line); font-size: 13px; }
.example .number { text-align: right; color: var(--quiet); font-variant-numeric: tabular-nums; font-size: 12px; }
.context { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55; }
.context span { border-radius: 2px; }
.context .peak { font-weight: 700; border-bottom: 2px solid var(--accent); }
main svg { display: block; max-width: 100%; overflow: visible; }
main svg text { font-size: 10px; fill: var(--quiet); }
kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 5px; background: var(--raised); font-size: 12px; }
a { color: var(--series-1); }
@media (max-width: 860px) {
  .panes { display: block; height: auto; }
  nav { border-right: 0; border-bottom: 1px solid var(--line); }
  #list { max-height: 32vh; }
  main { padding: 16px; }
}
"""

SCRIPT = r"""
const MARKS = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
const shown = (text) => text.replace(/[\n\r\t]/g, (mark) => MARKS[mark])
  .replace(/\p{C}/gu, (char) => "⟨" + char.codePointAt(0).toString(16) + "⟩");
const marked = (text) => text === "" ? "∅" : shown(text).replaceAll(" ", "·");
const percent = (share) => share === 0 ? "never" : Number((100 * share).toPrecision(2)) + " %";
const signed = (x) => (x > 0 ? "+" : "") + x.toPrecision(3).replace("-", "−");
const PAGE_ROWS = 200;
const lowered = INDEX.texts.map((text) => text.toLowerCase());
const rowOf = new Map(INDEX.latents.map((latent, row) => [latent, row]));
let matches = [], nShown = 0;

// The list: what fits the search, in the order asked for.
function search() {
  const query = byId("query").value.toLowerCase().replaceAll("·", " "), number = query.trim();
  const low = byId("low").value === "" ? -1 : byId("low").value / 100;
  const high = byId("high").value === "" ? 2 : byId("high").value / 100;
  const hits = new Set();
  if (query) lowered.forEach((text, i) => { if (text.includes(query)) hits.add(i); });
  const isExact = (row) => String(INDEX.latents[row]) === number;
  const fits = (row) => INDEX.density[row] >= low && INDEX.density[row] <= high
    && (!query || isExact(row) || INDEX.words[row].some((word) => hits.has(word)));
  matches = INDEX.latents.map((_, row) => row).filter(fits);
  const by = { number: (row) => INDEX.latents[row], often: (row) => -INDEX.density[row],
    rarely: (row) => INDEX.density[row], largest: (row) => -INDEX.largest[row] }[byId("order").value];
  // The latent of that number stands first whatever the order.
  matches.sort((a, b) => isExact(b) - isExact(a) || by(a) - by(b) || INDEX.latents[a] - INDEX.latents[b]);
  nShown = 0;
  byId("list").replaceChildren();
  byId("status").textContent = matches.length.toLocaleString("en") + " of "
    + INDEX.latents.length.toLocaleString("en") + " latents";
  more();
}
function more() {
  for (const row of matches.slice(nShown, nShown + PAGE_ROWS)) {
    const link = make("a"), item = make("li");
    link.href = "#" + INDEX.latents[row];
    link.append(make("b", INDEX.latents[row]), make("span", percent(INDEX.density[row]), "quiet"),
      make("span", INDEX.words[row].slice(0, 8).map((word) => marked(INDEX.texts[word])).join(" "), "words"));
    item.append(link);
    byId("list").append(item);
  }
  nShown = Math.min(nShown + PAGE_ROWS, matches.length);
  byId("more").hidden = nShown === matches.length;
  mark();
}
function mark() {
  for (const link of document.querySelectorAll("#list a")) {
    const isHere = link.hash === location.hash && location.hash.length > 1;
    if (isHere) { link.setAttribute("aria-current", "page"); link.scrollIntoView({ block: "nearest" }); }
    else link.removeAttribute("aria-current");
  }
}

// One latent.
function facts(pairs) {
  const list = make("dl", undefined, "facts");
  for (const [name, value] of pairs) {
    const box = make("div");
    box.append(make("dt", name), make("dd", value));
    list.append(box);
  }
  return list;
}
function table(heading, rows) {
  const box = make("section"), grid = make("table", undefined, "numbers");
  for (const [name, value, link] of rows) {
    const row = grid.insertRow(), cell = make("td");
    if (link === undefined) cell.textContent = name;
    else { const a = make("a", name); a.href = "#" + link; cell.append(a); }
    cell.title = name;
    row.append(cell, make("td", value, "right"));
  }
  box.append(make("h3", heading), grid);
  return box;
}
function bars(heading, counts, low, high, colour) {
  const box = make("section"), width = 270, height = 80, most = Math.max(...counts, 1);
  const plot = svg("svg", { viewBox: "0 0 " + width + " " + (height + 16), width, height: height + 16, role: "img" });
  const edge = (i) => low + (high - low) * i / counts.length;
  plot.append(svg("title", {}, heading));
  counts.forEach((count, i) => {
    // A bar of one token is still to be seen.
    const tall = count ? Math.max(1.5, height * Math.log1p(count) / Math.log1p(most)) : 0;
    const bar = svg("rect", { x: width * i / counts.length, y: height - tall,
      width: Math.max(1, width / counts.length - 1), height: tall, fill: colour(edge(i + 0.5)) });
    const from = edge(i), to = edge(i + 1);
    const range = " from " + from.toPrecision(3) + " to " + to.toPrecision(3);
    bar.append(svg("title", {}, count.toLocaleString("en") + range));
    plot.append(bar);
  });
  const ends = [[0, "start", low], [width, "end", high]];
  for (const [x, anchor, value] of ends)
    plot.append(svg("text", { x, y: height + 13, "text-anchor": anchor }, Number(value.toPrecision(3))));
  const title = make("h3", heading + " ");
  title.append(make("span", "log counts", "quiet"));
  box.append(title, plot);
  return box;
}
function example(one, texts, largest) {
  const box = make("div", undefined, "example"), context = make("div", undefined, "context");
  one.tokens.forEach((token, i) => {
    const value = one.values[i], span = make("span", shown(texts[token]));
    if (value > 0) {
      const share = Math.round(12 + 68 * Math.min(1, value / largest));
      span.style.background = "color-mix(in srgb, var(--series-2) " + share + "%, transparent)";
    }
    span.title = marked(texts[token]) + "  " + value;
    if (i === one.at) span.className = "peak";
    context.append(span);
  });
  const number = make("span", one.value, "number");
  number.title = "sequence " + one.sequence + ", position " + one.position;
  box.append(number, context);
  return box;
}
function latentPage(latent, record, texts) {
  const row = rowOf.get(latent), largest = INDEX.largest[row], main = make("article");
  const head = make("div", undefined, "bar"), steps = make("span");
  for (const [label, step, name] of [["←", -1, "Previous latent"], ["→", 1, "Next latent"]]) {
    const button = make("button", label);
    button.type = "button";
    button.setAttribute("aria-label", name);
    button.title = name;
    button.addEventListener("click", () => go(step));
    steps.append(button, " ");
  }
  head.append(make("h2", "Latent " + latent), steps);
  main.append(head, facts([["fires on", record.fired ? percent(INDEX.density[row]) + " of tokens" : "no token"],
    ["tokens", record.fired.toLocaleString("en")], ["largest activation", largest]]));
  const columns = make("div", undefined, "columns");
  if (record.up) {
    const rows = (effects) => effects.map(([token, effect]) => [marked(texts[token]), signed(effect)]);
    columns.append(table("More likely next", rows(record.up)), table("Less likely next", rows(record.down)));
  }
  columns.append(table("Nearest decoder rows", record.neighbours.map(([other, cosine]) =>
    ["latent " + other, signed(cosine), rowOf.has(other) ? other : undefined])));
  const plots = make("div", undefined, "plots");
  if (record.fired) plots.append(bars("Activations", record.bars, 0, largest, () => "var(--series-2)"));
  const sides = (effect) => effect < 0 ? "var(--quiet)" : "var(--series-1)";
  if (record.up)
    plots.append(bars("Logit effects of all tokens", record.effects, record.down[0][1], record.up[0][1], sides));
  columns.append(plots);
  main.append(columns);
  if (!record.fired) main.append(make("p", "It never fires on this text.", "quiet"));
  if (record.top.length) main.append(make("h3", "Strongest examples, one per sequence"));
  for (const one of record.top) main.append(example(one, texts, largest));
  for (const interval of record.intervals) {
    if (!interval.examples.length) continue;
    const title = make("h3", interval.low + " to " + interval.high + " ");
    title.append(make("span", interval.count.toLocaleString("en") + " tokens, " + percent(interval.share)
      + " of those it fires on; a random sample", "quiet"));
    main.append(title);
    for (const one of interval.examples) main.append(example(one, texts, largest));
  }
  return main;
}
function overview() {
  const main = make("article");
  main.append(make("h2", "Overview"), facts(INDEX.about));
  const histogram = INDEX.histogram;
  main.append(bars("log10 of the densities", histogram.counts, histogram.low, histogram.high, () => "var(--series-1)"));
  const keys = make("p", undefined, "quiet");
  for (const [key, meaning] of [["/", "search"], ["j", "next latent"], ["k", "previous latent"], ["Esc", "overview"]])
    keys.append(make("kbd", key), " " + meaning + "   ");
  main.append(make("h3", "Keys"), keys);
  main.append(make("h3", "How to read this"));
  for (const line of INDEX.notes) main.append(make("p", line));
  return main;
}

// Which page is on: its number stands after the #.
function show() {
  const latent = Number(location.hash.slice(1)), main = byId("main");
  mark();
  main.scrollTop = 0;
  if (location.hash.length < 2) { main.replaceChildren(overview()); return; }
  if (!rowOf.has(latent)) {
    main.replaceChildren(make("p", "There is no latent " + location.hash.slice(1) + " here."));
    return;
  }
  const file = Math.floor(rowOf.get(latent) / INDEX.perFile);
  const draw = () => {
    // Another one may have been asked for in the meantime.
    if (Number(location.hash.slice(1)) !== latent) return;
    const chunk = CHUNKS[file];
    main.replaceChildren(latentPage(latent, chunk.latents[rowOf.get(latent) - file * INDEX.perFile], chunk.texts));
  };
  if (CHUNKS[file]) { draw(); return; }
  const script = make("script"), source = "data/latents-" + file + ".js";
  script.src = source;
  script.addEventListener("load", draw);
  script.addEventListener("error", () => {
    main.replaceChildren(make("p", source + " cannot be read: is the site complete?"));
  });
  document.head.append(script);
}
function go(step) {
  const latent = Number(location.hash.slice(1));
  const here = location.hash.length > 1 ? matches.indexOf(rowOf.get(latent)) : -1;
  const next = here < 0 ? 0 : here + step;
  if (next < 0 || next >= matches.length) return;
  while (next >= nShown) more();
  location.hash = INDEX.latents[matches[next]];
}
for (const id of ["query", "low", "high", "order"]) byId(id).addEventListener("input", search);
byId("more").addEventListener("click", more);
byId("query").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !matches.length) return;
  location.hash = INDEX.latents[matches[0]];
  byId("query").blur();  // Keys mean j and k again.
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isTyping = ["INPUT", "SELECT"].includes(event.target.tagName);
  if (event.key === "Escape") { if (isTyping) event.target.blur(); else location.hash = ""; return; }
  if (isTyping) return;
  if (event.key === "/") { event.preventDefault(); byId("query").focus(); byId("query").select(); }
  if (event.key === "j") go(1);
  if (event.key === "k") go(-1);
});
addEventListener("hashchange", show);
search();
show();
"""
