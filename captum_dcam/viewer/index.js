"use strict";
// The index over images: cases sorted by a score, the worst one click away.
// captum_dcam/evaluation/browse.py and viewer/explorer_index.py make its document.

// -- data -----------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);
const doc = JSON.parse($("data").textContent);
const { cases, methods, scores } = doc;

const mean = (values) => {
  const found = (values ?? []).filter((v) => typeof v === "number");
  return found.length ? found.reduce((a, b) => a + b, 0) / found.length : null;
};
/** A case's score by the chosen method: the mean over its words. */
const scoreOf = (one) => mean(one.scores?.[methods[state.method]]?.[scores[state.score]]);
const number = (v) => (v == null ? "–" : typeof v === "number" ? v.toFixed(Math.abs(v) >= 10 ? 1 : 3) : String(v));

// -- state ----------------------------------------------------------------------------------------

const state = { method: 0, score: 0, order: "up", find: "", open: null };

/** The cases that are shown, in order; those without the score come last. */
function shown() {
  const asked = state.find.toLowerCase();
  const found = cases.map((one, n) => [scoreOf(one), n]).filter(([, n]) =>
    `${cases[n].name} ${cases[n].answer ?? ""}`.toLowerCase().includes(asked));
  if (state.order === "data") return found;
  const way = state.order === "up" ? 1 : -1;
  return found.sort((a, b) => (a[0] == null) - (b[0] == null) || way * (a[0] - b[0]) || a[1] - b[1]);
}

function set(changes) {
  Object.assign(state, changes);
  const hash = state.open == null ? "" : `case=${state.open + 1}`;
  if (location.protocol !== "about:" && location.hash.slice(1) !== hash) location.replace(`#${hash}`);
  draw();
  if ("open" in changes && state.open != null) $("detail").scrollIntoView({ block: "nearest" });
}

function readHash() {
  const open = Number.parseInt(new URLSearchParams(location.hash.slice(1)).get("case") ?? "", 10) - 1;
  return { open: open >= 0 && open < cases.length ? open : null };
}

function onKey(event) {
  if (event.target.matches("input, select") || state.open == null) return;
  const order = shown().map(([, n]) => n), way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") set({ open: null });
  else if (way) set({ open: order[Math.min(order.length - 1, Math.max(0, order.indexOf(state.open) + way))] });
}

// -- draw -----------------------------------------------------------------------------------------

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((c) => c != null));
  return node;
}

function drawCases() {
  const order = shown();
  $("count").textContent = order.length === cases.length ? `${cases.length} cases` : `${order.length} of ${cases.length} cases`;
  $("cases").replaceChildren(...order.map(([score, n]) => {
    const one = cases[n];
    return make("button", {
      type: "button", className: "case", onclick: () => set({ open: n }), "aria-pressed": String(n === state.open),
    }, make("div", {}, one.name, make("b", {}, scores.length ? number(score) : "")), one.picture && make("img", { src: one.picture, alt: "" }),
    make("div", { className: "note" }, one.error ?? one.answer ?? ""));
  }));
}

/** One case: its picture with the masks, its answer, and every word's score by every method. */
function drawDetail() {
  const one = cases[state.open], detail = $("detail");
  detail.hidden = one == null;
  if (one == null) return detail.replaceChildren();
  const left = make("div"), right = make("div");
  if (one.picture) left.append(pictureOf(one));
  if (one.masks?.length) left.append(make("p", { className: "note" }, `Outlined: ${one.masks.map((m) => m.name).join(", ")}.`));
  right.append(make("h2", {}, one.name), make("p", { className: "note" }, one.prompt ?? ""), make("p", {}, one.answer ?? one.error ?? ""));
  if (one.link) right.append(make("p", {}, make("a", { href: one.link }, "open the explorer of this answer")));
  if (one.words?.length) right.append(tableOf(one));
  if (one.command) right.append(make("p", { className: "note" }, "Its maps, step by step:"), make("pre", {}, one.command));
  right.append(make("button", { type: "button", id: "close", onclick: () => set({ open: null }) }, "close"));
  detail.replaceChildren(left, right);
}

function pictureOf(one) {
  const canvas = make("canvas", { role: "img", "aria-label": `${one.name}: ${one.answer ?? ""}` }), image = new Image();
  image.onload = async () => {
    Object.assign(canvas, { width: image.naturalWidth * 2, height: image.naturalHeight * 2 });
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    for (const mask of one.masks ?? []) outline(context, canvas, mask, await unpacked(mask));
  };
  image.src = one.picture;
  return canvas;
}

async function unpacked(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  if (!packed.deflated) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** A white line along the border of a mask, with black beside it. */
function outline(context, canvas, { size: [height, width] }, bits) {
  const inside = (x, y) => (bits[(y * width + x) >> 3] >> (7 - ((y * width + x) & 7))) & 1;
  const dx = canvas.width / width, dy = canvas.height / height;
  for (const [color, shift] of [["#000", 1], ["#fff", 0]]) {
    context.fillStyle = color;
    for (let y = 0; y < height - 1; y++) {
      for (let x = 0; x < width - 1; x++) {
        if (inside(x, y) !== inside(x + 1, y) || inside(x, y) !== inside(x, y + 1)) {
          context.fillRect(x * dx + shift, y * dy + shift, Math.max(2, dx), Math.max(2, dy));
        }
      }
    }
  }
}

function tableOf(one) {
  const name = scores[state.score], head = make("tr", {}, make("th", {}, "word"), make("th", {}, "committed"), make("th", {}, "probability"),
    ...methods.map((m) => make("th", {}, m)));
  const columns = methods.map((m) => one.scores?.[m]?.[name] ?? []);
  const rows = one.words.map((word, w) => {
    const values = columns.map((c) => c[w]), lowest = Math.min(...values.filter((v) => v != null));
    const cells = values.map((v) => make("td", { className: values.length > 1 && v === lowest ? "worst" : "" }, number(v)));
    return make("tr", {}, make("th", { scope: "row" }, word.text), make("td", {}, word.commit == null ? "–" : `step ${word.commit}`),
      make("td", {}, word.probability == null ? "–" : `${Math.round(100 * word.probability)}%`), ...cells);
  });
  return make("table", {}, make("caption", {}, name ? `${name} by word and method` : ""), make("thead", {}, head), make("tbody", {}, ...rows));
}

function draw() {
  drawDetail();
  drawCases();
}

// -- start ----------------------------------------------------------------------------------------

$("how").textContent = doc.how;
$("warnings").replaceChildren(...doc.warnings.map((text) => make("p", { role: "alert" }, text)));
$("facts").replaceChildren(...doc.facts.map(([k, v]) => make("div", {}, make("dt", {}, k), make("dd", {}, v))));
for (const [id, names] of [["method", methods], ["score", scores]]) {
  $(id).replaceChildren(...names.map((name, value) => make("option", { value }, name)));
  $(id).onchange = (event) => set({ [id]: Number(event.target.value) });
  $(`by-${id}`).hidden = !names.length;
}
$("order").onchange = (event) => set({ order: event.target.value });
$("find").oninput = (event) => set({ find: event.target.value });
document.addEventListener("keydown", onKey);
addEventListener("hashchange", () => set(readHash()));
Object.assign(state, readHash());
draw();
document.body.dataset.ready = "yes";
