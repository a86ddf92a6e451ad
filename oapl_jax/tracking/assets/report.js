// The page of the run report: figures, tables, and the rollout viewer. Texts go in as text only.
"use strict";
(() => {
const PAGE = 50;          // responses of a page of the list
const SCALE = 1000;       // thousandths of a nat
const UNKNOWN = -32768;   // a gap that no step has computed
const FULL = 1;           // nats of gap at which a color is full
const EVERY = 5000;       // milliseconds between two looks at a live run, or as many as one took
const RANGES = ["step", "reward", "version", "length"];
const CHOICES = ["run", "finish", "verdict", "state"];
const NUMBERS = new Set(RANGES);
const byId = (id) => document.getElementById(id);
let data = null;          // of the newest state
let rows = [];            // a response: its group, and its index among all
let shown = [];           // rows that the filters leave
let first = 0;            // of the page, in shown
let chosen = null;        // key of the response whose group is open

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value; else made.setAttribute(key, value);
  }
  made.append(...children.map((child) => child instanceof Node ? child : String(child)));
  return made;
}

// Data

async function unpack(buffer) {
  const stream = new Blob([buffer]).stream().pipeThrough(new DecompressionStream("gzip"));
  const content = await new Response(stream).arrayBuffer();
  const size = new DataView(content).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(content, 4, size)));
  let at = 4 + size;
  for (const [name, dtype, length] of header.arrays) {
    const kind = {int32: Int32Array, int16: Int16Array}[dtype];
    header[name] = new kind(content, at, length);
    at += Math.ceil(length * kind.BYTES_PER_ELEMENT / 4) * 4;
  }
  return header;
}

function prepare(header) {
  rows = [];
  let index = 0, start = 0;
  for (const group of header.groups) {
    group.first = index;
    for (let i = 0; i < group.size; i++, index++) {
      const length = header.responses.length[index];
      rows.push({group, index, start, length, sample: i, key: `${group.run} ${group.index} ${i}`});
      start += length;
    }
  }
  data = header;
}

const of = (row, name) => data.responses[name][row.index];

function text(row) {
  if (row.text === undefined) {
    let joined = "";
    for (let i = row.start; i < row.start + row.length; i++) joined += data.strings[data.tokens[i]];
    row.text = joined;
  }
  return row.text;
}

// Figures

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// Replaces the names of colors below the keys color and fillcolor.
function themed(value, key = "") {
  if (Array.isArray(value)) return value.map((item) => themed(item));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, themed(item, name)]));
  }
  if (key !== "color" && key !== "fillcolor") return value;
  const [name, opacity] = value.split("/"), full = color(name);
  const parts = [1, 3, 5].map((i) => parseInt(full.slice(i, i + 2), 16));
  return opacity ? `rgba(${parts.join(",")},${opacity})` : full;
}

function merged(base, over) {
  const out = {...base};
  for (const [key, value] of Object.entries(over)) {
    const deep = value && typeof value === "object" && !Array.isArray(value) && typeof out[key] === "object";
    out[key] = deep ? merged(out[key], value) : value;
  }
  return out;
}

function draw() {
  const axis = {
    gridcolor: color("grid"), zerolinecolor: color("line"), linecolor: color("line"),
    tickfont: {size: 11}, title: {font: {size: 12}, standoff: 6}, automargin: true,
  };
  const base = {
    autosize: true, margin: {l: 48, r: 10, t: 8, b: 36}, showlegend: true,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: color("text"), size: 12, family: getComputedStyle(document.body).fontFamily},
    legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: {size: 11}, traceorder: "normal"},
    hoverlabel: {bgcolor: color("back"), bordercolor: color("line"), font: {color: color("text")}},
    xaxis: axis, yaxis: axis,
  };
  const figures = data.figures.filter((figure) => figure.data.length);
  const plots = frames(figures);
  figures.forEach((figure, i) => {
    const names = figure.data.filter((trace) => trace.showlegend).map((trace) => trace.name);
    const columns = names.some((name) => name.length > 20) ? 1 : 2;
    plots[i].style.height = `${255 + 20 * Math.ceil(names.length / columns)}px`;  // the legend grows
    Plotly.react(plots[i], themed(figure.data), merged(base, themed(figure.layout)),
      {responsive: true, displaylogo: false, displayModeBar: false});
  });
  const empty = data.figures.filter((figure) => !figure.data.length).map((figure) => figure.title);
  byId("empty").textContent = empty.length ? `Without data so far: ${empty.join("; ")}.` : "";
}

// The places of the plots, under the headings of their sections; made anew when others are drawn.
function frames(figures) {
  const place = byId("figures"), titles = figures.map((figure) => figure.title).join();
  if (place.dataset.titles !== titles) {
    place.dataset.titles = titles;
    place.replaceChildren();
    for (const section of new Set(figures.map((figure) => figure.section))) {
      place.append(element("h3", {}, section), element("div", {class: "figures"},
        ...figures.filter((figure) => figure.section === section).map((figure) =>
          element("div", {class: "figure"}, element("h4", {}, figure.title),
            element("p", {class: "note"}, figure.note), element("div", {class: "plot"})))));
    }
  }
  return place.querySelectorAll(".plot");
}

// Tables

function table(head, body) {
  const isNumber = (cell) => typeof cell === "number";
  const show = (cell) => cell === null || cell === undefined ? "" : isNumber(cell) ? number(cell) : cell;
  const numeric = head.map((_, i) => body.length && body.every((row) => isNumber(row[i])));
  const line = (name, cells) => element("tr", {}, ...cells.map((cell, i) =>
    element(name, numeric[i] ? {class: "number"} : {}, show(cell))));
  return element("div", {class: "scroll"}, element("table", {},
    element("thead", {}, line("th", head)), element("tbody", {}, ...body.map((row) => line("td", row)))));
}

const number = (value) => Number.isInteger(value) ? value.toLocaleString("en-US")
  : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en-US") : String(+value.toPrecision(4));

function tables() {
  byId("about").textContent = data.about;
  byId("curves-note").textContent = data.curves_note;
  byId("runs").replaceChildren(table(data.runs.head, data.runs.rows));
  byId("ledger-tables").replaceChildren(...data.ledgers.map((ledger) => element("div", {class: "box"},
    element("h3", {}, ledger.title),
    element("p", {class: ledger.balanced ? "note" : "fault"}, ledger.sentence),
    element("div", {class: "row"}, ...ledger.tables.map((part) => table(part.head, part.rows))))));
  byId("differences").replaceChildren(data.differences.rows.length
    ? table(data.differences.head, data.differences.rows) : element("p", {class: "note"}, data.differences.none));
  byId("kept-note").textContent = data.kept_note;
}

// Rollout viewer

const value = (row, name) => ({
  step: row.group.step, version: row.group.version, run: row.group.run, state: row.group.state,
}[name] ?? (name in data.responses ? of(row, name) : null));

function choices() {
  for (const name of CHOICES) {
    const select = byId(name), before = select.value;
    const found = [...new Set(rows.map((row) => value(row, name) || "none"))].sort();
    select.replaceChildren(element("option", {value: ""}, "any"),
      ...found.map((item) => element("option", {value: item}, item)));
    select.value = found.includes(before) ? before : "";
  }
}

function filter() {
  const search = byId("search").value.toLowerCase(), prompt = byId("prompt").value;
  const exact = CHOICES.map((name) => [name, byId(name).value]).filter(([, wanted]) => wanted);
  const bounds = RANGES.map((name) => {
    const [low, high] = ["min", "max"].map((end) => byId(`${name}-${end}`).value);
    return [name, low === "" ? -Infinity : +low, high === "" ? Infinity : +high, low !== "" || high !== ""];
  }).filter(([, , , set]) => set);
  shown = rows.filter((row) =>
    exact.every(([name, wanted]) => (value(row, name) || "none") === wanted) &&
    (!prompt || row.group.prompt.includes(prompt)) &&
    bounds.every(([name, low, high]) => {
      const found = value(row, name);
      return found !== null && found >= low && found <= high;
    }) &&
    (!search || [row.group.question, row.group.reference, of(row, "extracted"), text(row)]
      .some((part) => part.toLowerCase().includes(search))));
  first = Math.min(first, Math.max(0, Math.ceil(shown.length / PAGE - 1) * PAGE));
  list();
}

const COLUMNS = [
  ["run", (row) => row.group.run], ["step", (row) => row.group.step], ["version", (row) => row.group.version],
  ["prompt", (row) => row.group.prompt], ["reward", (row) => of(row, "reward")],
  ["verdict", (row) => of(row, "verdict")], ["extracted", (row) => of(row, "extracted")],
  ["length", (row) => row.length], ["finish", (row) => of(row, "finish")], ["end", (row) => row.group.state],
  ["response", text],
];

const colored = (name, item) => name === "verdict" ? {"data-verdict": item} : {};

function list() {
  const pages = Math.max(1, Math.ceil(shown.length / PAGE)), page = first / PAGE + 1;
  byId("where").textContent = `${number(shown.length)} of ${number(rows.length)} responses, page ` +
    `${number(page)} of ${number(pages)}`;
  byId("rollouts").classList.toggle("none", !rows.length);
  byId("earlier").disabled = page === 1;
  byId("later").disabled = page === pages;
  const columns = COLUMNS.filter(([name]) => name !== "run" || byId("run").options.length > 2);
  byId("list").tHead.replaceChildren(element("tr", {}, ...columns.map(([name]) =>
    element("th", NUMBERS.has(name) ? {class: "number"} : {}, name))));
  byId("list").tBodies[0].replaceChildren(...shown.slice(first, first + PAGE).map((row) => {
    const line = element("tr", {tabindex: "0", "data-key": row.key, class: row.key === chosen ? "chosen" : ""},
      ...columns.map(([name, get]) => {
        const cell = get(row) ?? "";
        return element("td", {class: NUMBERS.has(name) ? "number" : "text", ...colored(name, cell)},
          typeof cell === "string" ? cell.slice(0, 200) : number(cell));
      }));
    const look = () => { open(row); byId("group").scrollIntoView({block: "nearest"}); };
    line.addEventListener("click", look);
    line.addEventListener("keydown", (event) => { if (event.key === "Enter") look(); });
    return line;
  }));
  if (!shown.length) byId("list").tBodies[0].append(
    element("tr", {}, element("td", {colspan: columns.length}, "No response fits the filters.")));
}

function tokens(row) {
  const body = element("div", {class: "response"});
  for (let i = row.start; i < row.start + row.length; i++) {
    const token = element("span", {}, data.strings[data.tokens[i]]);
    const logp = data.logp[i] / SCALE, known = data.gap[i] !== UNKNOWN, gap = data.gap[i] / SCALE;
    token.title = `sampler ${logp.toFixed(3)} nats` +
      (known ? `\nlearner ${(logp + gap).toFixed(3)}\ngap ${gap.toFixed(3)}` : "");
    if (known) {
      const strength = Math.sqrt(Math.min(Math.abs(gap) / FULL, 1)) * 0.6;  // small gaps are seen too
      token.style.backgroundColor = `rgba(var(--${gap < 0 ? "less" : "more"}), ${strength.toFixed(3)})`;
    }
    body.append(token);
  }
  return body;
}

function open(row) {
  chosen = row.key;
  const group = row.group, place = byId("group");
  const members = Array.from({length: group.size}, (_, i) => rows[group.first + i]);
  const pair = (name, item) => item === null || item === undefined || item === "" ? []
    : [element("dt", {}, name), element("dd", colored(name, item),
      typeof item === "number" ? number(item) : item)];
  place.replaceChildren(
    element("div", {class: "box"},
      element("h3", {}, `${group.run}: prompt ${group.prompt}, version ${group.version}, ` +
        (group.step === null ? group.state || "end unknown"
          : `${group.state} at step ${group.step}, lag ${group.step - 1 - group.version}`)),
      element("p", {class: "question"}, group.question),
      element("p", {class: "note"}, `Reference: ${group.reference.slice(0, 2000)}`),
      element("div", {id: "scale"}, element("span", {}, `less likely to the learner (−${FULL} nat)`),
        element("i"), element("span", {}, `more likely (+${FULL} nat); no color: not trained on`))),
    element("div", {id: "side"}, ...members.map((member) => element("div",
      {class: member === row ? "box chosen" : "box"},
      element("h3", {}, `Response ${member.sample + 1} of ${group.size}`),
      element("dl", {}, ...pair("reward", of(member, "reward")), ...pair("verdict", of(member, "verdict")),
        ...pair("because", of(member, "reason")), ...pair("extracted", of(member, "extracted")),
        ...pair("length", member.length), ...pair("finish", of(member, "finish")),
        ...pair("log-ratio", of(member, "log_ratio")), ...pair("A / β₂", of(member, "target"))),
      tokens(member)))));
  place.hidden = false;
  for (const line of byId("list").tBodies[0].rows) line.classList.toggle("chosen", line.dataset.key === chosen);
}

// Start

function show(header) {
  prepare(header);
  tables();
  draw();
  choices();
  filter();
  const opened = rows.find((row) => row.key === chosen);
  if (opened) open(opened);
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light" : "Dark";
  if (data) draw();
}

function problem(sentence) {
  byId("problem").hidden = !sentence;
  byId("problem").textContent = sentence;
}

async function follow() {
  const asked = performance.now();
  try {
    const reply = await fetch(`data?stamp=${data ? encodeURIComponent(data.stamp) : ""}`);
    if (reply.status === 200) show(await unpack(await reply.arrayBuffer()));
    problem(reply.status >= 400 ? await reply.text() : "");
  } catch (error) {
    problem(`the server of this page does not answer (${error.message}); the page shows what it had`);
  }
  setTimeout(follow, Math.max(EVERY, performance.now() - asked));
}

async function start() {
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  theme(preferred.matches ? "dark" : "light");
  preferred.addEventListener("change", () => theme(preferred.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () =>
    theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  let waiting = 0;
  const again = () => { clearTimeout(waiting); waiting = setTimeout(() => { first = 0; filter(); }, 150); };
  byId("filters").addEventListener("input", again);
  byId("filters").addEventListener("reset", again);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("earlier").addEventListener("click", () => { first -= PAGE; list(); });
  byId("later").addEventListener("click", () => { first += PAGE; list(); });
  const embedded = byId("data").textContent;
  if (!embedded) { await follow(); return; }
  const bytes = Uint8Array.from(atob(embedded), (character) => character.charCodeAt(0));
  show(await unpack(bytes.buffer));
}

start();
})();
