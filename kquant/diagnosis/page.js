"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const PRINT_WIDTH = 680; // A4 less its margins, in CSS pixels
const SHOWN = 20; // quantizers, before "Show all"

// ---- charts -----------------------------------------------------------------------------------------------------

async function loadPlotly() {
  const packed = Uint8Array.from(atob(byId("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

// plotly reads a little HTML in labels: layer names must not be taken for it
const literal = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const shorten = (text, limit) =>
  text.length <= limit ? text : text.slice(0, Math.ceil(limit / 2)) + "…" + text.slice(1 - Math.floor(limit / 2));
const four = (value) => String(Number(value.toPrecision(4))).replace("-", "−");
const fixed = (value) => (value === null ? "–" : value.toFixed(data.decimals).replace("-", "−"));
const signed = (value) => (value === null ? "–" : (value > 0 ? "+" : "") + fixed(value));
const isPrint = () => document.documentElement.classList.contains("print");
const isNarrow = (id) => byId(id).clientWidth < 520;

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function axis(more) {
  const line = color("line");
  return { gridcolor: line, zerolinecolor: color("grey"), linecolor: line, automargin: true, ...more };
}

function draw(id, traces, layout) {
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("text") },
    margin: { l: 8, r: 12, t: 28, b: 8 }, hovermode: "closest", bargap: 0.25,
    hoverlabel: { bgcolor: color("card"), bordercolor: color("grey"), font: { color: color("text") } },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...(isPrint() ? { width: PRINT_WIDTH, autosize: false } : { autosize: true }),
    ...layout,
  };
  const config = { responsive: true, displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "pan2d", "zoom2d"] };
  return Plotly.react(id, traces, base, config);
}

const PATTERNS = { float: "", stage: "", quantized: "/", target: "x", recommended: "." };
const COLORS = { float: "grey", stage: "blue", quantized: "red", target: "orange", recommended: "green" };

function drawWaterfall() {
  const rows = data.waterfall.filter((row) => row.score !== null);
  const start = data.float === null ? 0 : data.float;
  const narrow = isNarrow("waterfall");
  const said = (row) => `<b>${fixed(row.score)}</b>` + (row.kind === "float" ? "" : ` (${signed(row.score - start)})`);
  const names = rows.map((row) => literal(shorten(row.name, narrow ? 20 : 40)) + (narrow ? "<br>" + said(row) : ""));
  const low = Math.min(start, ...rows.map((row) => row.score)), high = Math.max(start, ...rows.map((row) => row.score));
  const width = isPrint() ? PRINT_WIDTH : byId("waterfall").clientWidth;
  const room = (high - low || 1) * (narrow ? 0.05 : 120 / (width - 320)); // left of the bars, for their labels
  const trace = {
    type: "bar", orientation: "h", base: rows.map(() => start), x: rows.map((row) => row.score - start),
    y: rows.map((_, i) => i), textposition: "none", showlegend: false,
    marker: { color: rows.map((row) => color(COLORS[row.kind])),
      pattern: { shape: rows.map((row) => PATTERNS[row.kind]), fillmode: "overlay", fgcolor: color("card"), size: 7, solidity: 0.25 } },
    hovertext: rows.map((row) => `${literal(row.name)}: ${fixed(row.score)} (${signed(row.score - start)})`),
    hoverinfo: "text",
  };
  const labels = narrow ? [] : rows.map((row, i) => ({
    x: Math.min(row.score, start), y: i, xanchor: "right", xshift: -6, showarrow: false, text: said(row) }));
  draw("waterfall", [trace], {
    height: 60 + (narrow ? 44 : 34) * rows.length, annotations: labels,
    xaxis: axis({ title: { text: literal(data.metric) }, range: [low - room, high + (high - low || 1) * 0.02], zeroline: false }),
    yaxis: axis({ tickvals: rows.map((_, i) => i), ticktext: names, range: [rows.length - 0.5, -0.5], showgrid: false, zeroline: false, ticklabelstandoff: 8 }),
    shapes: [{ type: "line", x0: start, x1: start, y0: -0.5, y1: rows.length - 0.5, line: { color: color("text"), width: 2 } }],
  });
}

function drawSensitivity() {
  if (!byId("sensitivity-chart")) return;
  const kind = byId("sensitivity-kind").value, button = byId("sensitivity-all");
  const all = data.sensitivity.filter((row) => !kind || row.type === kind);
  const open = button.getAttribute("aria-expanded") === "true";
  button.textContent = open ? `Show the worst ${SHOWN}` : `Show all ${all.length}`;
  button.hidden = all.length <= SHOWN;
  const rows = open ? all : all.slice(0, SHOWN);
  const name = (row) => `${row.node} · ${row.type === "weights" ? "w" : "a"}${row.bits}`;
  const labels = rows.map((row) => literal(shorten(name(row), isNarrow("sensitivity-chart") ? 18 : 44)));
  const bars = (key, title, hue, shape) => ({
    type: "bar", orientation: "h", name: title, x: rows.map((row) => row[key]), y: rows.map((_, i) => i),
    marker: { color: color(hue), pattern: { shape, fillmode: "overlay", fgcolor: color("card"), size: 6, solidity: 0.3 } },
    hovertext: rows.map((row) => `${literal(name(row))}<br>${title}: ${fixed(row[key])}`), hoverinfo: "text",
  });
  const traces = [bars("lost", "lost, alone on", "blue", "")];
  if (rows.some((row) => row.won !== null)) traces.push(bars("won", "won back, alone off", "orange", "/"));
  draw("sensitivity-chart", traces, {
    height: 90 + (traces.length > 1 ? 28 : 22) * Math.max(1, rows.length), showlegend: true,
    xaxis: axis({ title: { text: literal(data.metric) + ", difference" } }), margin: { l: 8, r: 12, t: 44, b: 8 },
    yaxis: axis({ tickvals: rows.map((_, i) => i), ticktext: labels, range: [rows.length - 0.5, -0.5], showgrid: false, zeroline: false, ticklabelstandoff: 6 }),
  });
}

function drawChannels() {
  if (!byId("channels-chart")) return;
  const layer = data.channels[Number(byId("channels-layer").value)];
  const panels = [["before", "before equalization", "red"], ["after", "after equalization", "blue"]]
    .filter(([key]) => layer[key].length > 0);
  const traces = panels.map(([key, title, hue], i) => {
    const [lowerfence, q1, median, q3, upperfence] = layer[key];
    return {
      type: "box", name: title, xaxis: "x", yaxis: i ? "y2" : "y", showlegend: false,
      lowerfence, q1, median, q3, upperfence, x: q1.map((_, c) => (c + 0.5) * layer.per - 0.5), width: layer.per * 0.7,
      line: { width: 1, color: color(hue) }, whiskerwidth: 0, hoverinfo: "y", hoveron: "boxes",
    };
  });
  const both = panels.length > 1;
  const titles = panels.map(([, title], i) => ({ text: `<b>${title}</b>`, x: 0, xref: "paper", xanchor: "left", showarrow: false,
    y: both && i ? 0.44 : 1, yref: "paper", yanchor: "bottom" }));
  const grouped = layer.per > 1 ? ` (each box is the widest of ${layer.per})` : "";
  draw("channels-chart", traces, {
    height: both ? 480 : 280, annotations: titles,
    xaxis: axis({ title: { text: "output channel" + grouped }, anchor: both ? "y2" : "y", showgrid: false, zeroline: false }),
    yaxis: axis({ domain: both ? [0.56, 1] : [0, 1], title: { text: "weight" } }),
    ...(both ? { yaxis2: axis({ domain: [0, 0.44], title: { text: "weight" } }) } : {}),
  });
}

function drawHistogram() {
  if (!byId("histogram-chart")) return;
  const tensor = data.tensors[Number(byId("histogram-tensor").value)], { counts, edges, low, high } = tensor;
  const log = byId("histogram-log").checked;
  const trace = {
    type: "bar", x: counts.map((_, i) => (edges[i] + edges[i + 1]) / 2), y: counts.map((c) => (log && !c ? null : c)),
    width: counts.map((_, i) => edges[i + 1] - edges[i]), marker: { color: color("blue"), line: { width: 0 } },
    hovertext: counts.map((c, i) => `${four(edges[i])} to ${four(edges[i + 1])}<br>${c.toLocaleString("en")} values`), hoverinfo: "text",
  };
  const ends = [...edges, low, high].filter((v) => v !== null);
  const left = Math.min(...ends), right = Math.max(...ends), room = (right - left || 1) * 0.05;
  const line = (x) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: color("red"), width: 2, dash: "dash" } });
  const area = (x0, x1) => ({ type: "rect", x0, x1, y0: 0, y1: 1, yref: "paper", line: { width: 0 }, fillcolor: color("red"), opacity: 0.1, layer: "below" });
  const label = (x, text, side) => ({ x, y: 1, yref: "paper", yanchor: "bottom", xanchor: side, showarrow: false, text, font: { color: color("bad") } });
  const known = low !== null && high !== null, near = known && high - low < (right - left) * 0.3;
  draw("histogram-chart", [trace], {
    height: 340, bargap: 0, showlegend: false,
    shapes: known ? [line(low), line(high), area(left - room, low), area(high, right + room)] : [],
    annotations: !known ? [] : near ? [label((low + high) / 2, `grid from ${four(low)} to ${four(high)}`, low + high < left + right ? "left" : "right")]
      : [label(low, `grid from ${four(low)}`, "left"), label(high, `to ${four(high)}`, "right")],
    xaxis: axis({ title: { text: "value" }, range: [left - room, right + room] }),
    yaxis: axis({ title: { text: "values per bin" }, type: log ? "log" : "linear", exponentformat: "power", ...(log ? { dtick: 1 } : {}) }),
  });
}

function drawAll() {
  for (const drawOne of [drawWaterfall, drawSensitivity, drawChannels, drawHistogram]) drawOne();
}

// ---- tables -----------------------------------------------------------------------------------------------------

const TEXT = new Intl.Collator("en", { numeric: true });

function compare(a, b, falling) {
  const [x, y] = [a.dataset.key, b.dataset.key];
  if (x === undefined) return (falling ? -1 : 1) * TEXT.compare(a.textContent, b.textContent);
  if (x === "" || y === "") return (x === "") - (y === ""); // what was not measured comes last either way
  const number = (key) => Number(key.replace("inf", "Infinity"));
  return (falling ? -1 : 1) * (number(x) < number(y) ? -1 : number(x) > number(y) ? 1 : 0);
}

function sortBy(head) {
  const falling = head.getAttribute("aria-sort") === "none" ? head.classList.contains("number") : head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.children) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const body = head.closest("table").tBodies[0];
  body.append(...[...body.rows].sort((a, b) => compare(a.cells[head.cellIndex], b.cells[head.cellIndex], falling)));
}

function filterTensors() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean), kind = byId("tensors-kind").value;
  const rows = [...byId("tensors-table").tBodies[0].rows];
  for (const row of rows) {
    const text = [...row.cells].slice(0, 4).map((cell) => cell.textContent.toLowerCase());
    row.hidden = (kind && text[3] !== kind) || !words.every((word) => text.join(" ").includes(word));
  }
  byId("tensors-count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
}

async function copy(button) {
  const source = byId(button.dataset.copies);
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    getSelection().selectAllChildren(source);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

// ---- wiring -----------------------------------------------------------------------------------------------------

function wire() {
  for (const button of document.querySelectorAll(".sortable th button")) button.addEventListener("click", () => sortBy(button.parentNode));
  for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));
  if (byId("search")) {
    byId("search").addEventListener("input", filterTensors);
    byId("tensors-kind").addEventListener("change", filterTensors);
    filterTensors();
  }
}

function wireCharts() {
  const on = (id, event, act) => byId(id)?.addEventListener(event, act);
  on("sensitivity-kind", "change", drawSensitivity);
  on("sensitivity-all", "click", () => {
    const button = byId("sensitivity-all");
    button.setAttribute("aria-expanded", String(button.getAttribute("aria-expanded") !== "true"));
    drawSensitivity();
  });
  on("channels-layer", "change", drawChannels);
  on("histogram-tensor", "change", drawHistogram);
  on("histogram-log", "change", drawHistogram);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("(max-width: 40rem)").addEventListener("change", drawAll);
}

function print(begins) {
  document.documentElement.classList.toggle("print", begins);
  for (const part of document.querySelectorAll("details")) {
    if (begins) part.dataset.was = String(part.open);
    part.open = begins || part.dataset.was === "true";
  }
  if (window.Plotly) drawAll();
}

wire();
addEventListener("beforeprint", () => print(true));
addEventListener("afterprint", () => print(false));
loadPlotly().then(() => {
  drawAll();
  wireCharts();
  document.documentElement.dataset.ready = "true";
}).catch((error) => {
  byId("problem").textContent = `The charts could not be drawn (${error}); all numbers are in the text and the tables.`;
  byId("problem").hidden = false;
});
