// State: what is chosen, how it is chosen, what is taken away, and the start.

const state = {
  word: 0, step: 0, method: 0, image: 0, refined: true, heat: true, opacity: 0.9, smooth: true,
  outline: true, region: null, playing: null,
};
/** Numbers that a link keeps, and how many of each there are. */
const LINKED = { word: words.length, step: doc.count, method: methods.length, image: images.length };

const commit = (word) => Math.max(...words[word].commits);
const method = () => methods[state.method];

/** Maps of the chosen method, as a function of a word: bare where these are asked for and there. */
function chosenMaps(m = method(), refined = state.refined) {
  return (refined ? m.refined : m.bare) || m.refined || m.bare;
}

function readHash() {
  const asked = new URLSearchParams(location.hash.slice(1)), found = {};
  for (const [name, count] of Object.entries(LINKED)) {
    const value = Number.parseInt(asked.get(name) ?? "", 10) - (name === "step" ? 0 : 1);
    if (value >= 0 && value < count) found[name] = value;
  }
  return found;
}

function writeHash() {
  if (location.protocol === "about:") return; // a frame of a notebook has no address
  const kept = Object.keys(LINKED).filter((n) => LINKED[n] > 1);
  const hash = "#" + kept.map((n) => `${n}=${state[n] + (n === "step" ? 0 : 1)}`).join("&");
  if (location.hash !== hash) location.replace(hash);
}

function set(changes) {
  const before = state.word;
  Object.assign(state, changes);
  if (state.word !== before && !("image" in changes)) state.image = words[state.word].image;
  writeHash();
  draw();
}

function play() {
  if (state.playing) {
    clearInterval(state.playing);
    return set({ playing: null });
  }
  const next = () => {
    if (state.step >= doc.count - 1) return play();
    set({ step: state.step + 1 });
  };
  set({ step: state.step >= doc.count - 1 ? 0 : state.step, playing: setInterval(next, 650) });
}

const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));

function onKey(event) {
  if (event.target.matches("input, select, pre") || event.ctrlKey || event.metaKey || event.altKey) return;
  const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (way && event.shiftKey && steps) set({ step: clamp(state.step + way, doc.count) });
  else if (way && words.length) {
    set({ word: clamp(state.word + way, words.length) });
    $("answer").querySelector("[aria-pressed=true]")?.scrollIntoView({ block: "nearest" });
  } else if (event.key === "Escape") set({ region: null });
  else if (event.key === " " && steps && !event.target.matches("button, summary")) play();
  else return;
  event.preventDefault();
}

/** A region under the pointer, in fractions of the image; a click is one about as large as a token. */
function onPicture() {
  const canvas = $("picture"), box = $("drag");
  let from = null;
  const at = (event) => {
    const r = canvas.getBoundingClientRect();
    return [clamp01((event.clientX - r.left) / r.width), clamp01((event.clientY - r.top) / r.height)];
  };
  const clamp01 = (v) => Math.min(1, Math.max(0, v));
  const region = ([x, y], [u, v]) => ({
    image: state.image, x0: Math.min(x, u), y0: Math.min(y, v), x1: Math.max(x, u), y1: Math.max(y, v),
  });
  canvas.onpointerdown = (event) => {
    from = at(event);
    canvas.setPointerCapture(event.pointerId);
  };
  canvas.onpointermove = (event) => {
    if (from) place(box, region(from, at(event)));
  };
  canvas.onpointercancel = () => (from = null);
  canvas.onpointerup = (event) => {
    if (!from) return;
    const to = at(event), shown = canvas.getBoundingClientRect();
    const moved = Math.hypot((to[0] - from[0]) * shown.width, (to[1] - from[1]) * shown.height);
    set({ region: moved > 5 ? region(from, to) : aroundPoint(from) });
    from = null;
  };
}

/** The box of the smallest token at a point. */
function aroundPoint([x, y]) {
  const { width, height } = images[state.image];
  const within = (edges, at) => edges.find((e) => at >= e[0] && at < e[1]);
  let best = { image: state.image, x0: x - 0.02, y0: y - 0.02, x1: x + 0.02, y1: y + 0.02 };
  for (const grid of grids.filter((g) => g.image === state.image)) {
    const across = within(grid.x, x * width), down = within(grid.y, y * height);
    if (!across || !down) continue;
    const own = { x0: across[0] / width, x1: across[1] / width, y0: down[0] / height, y1: down[1] / height };
    if (!best.token || own.x1 - own.x0 < best.x1 - best.x0) best = { image: state.image, token: true, ...own };
  }
  return best;
}

function place(box, region) {
  box.hidden = !region || region.image !== state.image;
  if (box.hidden) return;
  const { offsetWidth: w, offsetHeight: h, offsetLeft: left, offsetTop: top } = $("picture");
  box.style.left = `${left + region.x0 * w}px`;
  box.style.top = `${top + region.y0 * h}px`;
  box.style.width = `${(region.x1 - region.x0) * w}px`;
  box.style.height = `${(region.y1 - region.y0) * h}px`;
}

// -- what is taken away ---------------------------------------------------------------------------

/** Give a file to the reader; a frame of a notebook may not, so its buttons are hidden. */
function download(name, blob) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const slug = () => words[state.word].text.replace(/[^\p{L}\p{N}]+/gu, "-") || "word";

/** The large picture with word, numbers and model written below. */
function exportPng() {
  const picture = $("picture"), word = words[state.word], lines = 3 * 18 + 10;
  const canvas = make("canvas", { width: Math.max(picture.width, 420), height: picture.height + lines });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0);
  context.fillStyle = "#111";
  context.font = "14px system-ui, sans-serif";
  const facts = Object.fromEntries(doc.facts), at = [facts.family, facts.layer && `block ${facts.layer}`, facts.score && `${facts.score} score`];
  [`“${word.text}” by ${method().label}`, word.said,
    `${at.filter(Boolean).join(", ")} · heat: 0 to this map’s highest`].forEach((text, i) =>
    context.fillText(text, 4, picture.height + 20 + 18 * i, canvas.width - 8));
  canvas.toBlob((blob) => download(`${slug()}.png`, blob));
}

/** The chosen word's map, a line per token of the image. */
function exportCsv() {
  const cell = (v) => `"${String(v).replace(/^[=+\-@\t]/, "'$&").replaceAll('"', '""')}"`;
  const maps = shownMaps(), top = Math.max(...maps.map((m) => m.reduce((a, b) => Math.max(a, b), 0))) || 1;
  const rows = ["word,method,image,grid,row,column,x0,y0,x1,y1,value"];
  grids.forEach(({ x, y, image }, g) => y.forEach((down, r) => x.forEach((across, c) => {
    const value = (maps[g][r * x.length + c] / top).toFixed(4);
    rows.push([cell(words[state.word].text), cell(method().name), image + 1, g + 1, r, c,
      across[0], down[0], across[1], down[1], value].join());
  })));
  download(`${slug()}.csv`, new Blob([rows.join("\n") + "\n"], { type: "text/csv" }));
}

async function copyCode() {
  const code = $("code").querySelector("pre");
  getSelection().selectAllChildren(code); // where the clipboard is closed, Ctrl-C takes it
  if (navigator.clipboard && location.protocol !== "about:") await navigator.clipboard.writeText(code.textContent);
}

// -- start ----------------------------------------------------------------------------------------

async function start() {
  await Promise.all(images.map(async (one) => (one.element = await loaded(one.source))));
  for (const one of methods) {
    one.refined = await mapsOf(one.refined);
    one.bare = await mapsOf(one.bare);
  }
  doc.stepMaps = steps && (await mapsOf(steps.maps));
  for (const word of words) word.inside = word.mask && maskOf(word.mask, await unpacked(word.mask));
  const shows = { steps: steps && words.length, pair: doc.stepMaps, word: words.length, relevance: words.length && doc.text,
    multiples: words.length && (methods.length > 1 || methods[0].bare), choices: methods.length > 1 || methods.some((m) => m.bare),
    exports: words.length && location.protocol !== "about:", outlined: words.some((w) => w.inside), looking: words.length };
  for (const [id, there] of Object.entries(shows)) $(id).hidden = !there;
  write();
  wire();
  const first = words.findIndex((w) => w.first);
  Object.assign(state, { word: Math.max(first, 0), step: Math.max(doc.count - 1, 0), method: Math.max(methods.findIndex((m) => m.complete.some(Boolean)), 0) });
  if (words.length) Object.assign(state, { image: words[state.word].image, step: steps ? lastCommit : 0 });
  Object.assign(state, readHash());
  draw();
  document.body.dataset.ready = "yes";
}

/** What does not change with the state. */
function write() {
  $("warnings").replaceChildren(...doc.warnings.map((text) => make("p", { role: "alert" }, `Beware: ${text}`)));
  $("prompt").textContent = doc.prompt;
  $("answer").setAttribute("aria-label", doc.forced ? "Given answer" : "Answer");
  const ramp = make("i", { className: "ramp", style: { background: `linear-gradient(90deg, ${[0, 1, 2, 3, 4]
    .map((i) => `rgb(${stepColor(firstCommit + (i * (lastCommit - firstCommit)) / 4)})`)})` } });
  $("chips-legend").hidden = !commits.length;
  $("chips-legend").replaceChildren(`${doc.forced ? "given answer: hidden in state" : "committed at step"} ${firstCommit}`, ramp, `${lastCommit}`,
    words.some((w) => w.doubtful) ? " · dashed: its map localises nothing" : "");
  $("no-steps").hidden = Boolean(steps) || !words.length;
  $("no-steps").textContent = doc.forced ? "No steps to move through: this answer was given, not written step by step."
    : "No steps to move through: a comparison reads every word once. “captum-dcam explain --every-step” shows them.";
  $("step").max = doc.count - 1;
  $("method").replaceChildren(...methods.map((m, value) => make("option", { value, disabled: !m.complete.some(Boolean) }, m.label)));
  $("code").querySelector("pre").textContent = doc.python;
  $("facts").replaceChildren(...doc.facts.map(([k, v]) => make("div", {}, make("dt", {}, k), make("dd", {}, v))));
  $("exports").replaceChildren(
    make("button", { type: "button", id: "png", onclick: exportPng }, "picture (PNG)"),
    make("button", { type: "button", id: "csv", onclick: exportCsv }, "map (CSV)"),
    ...(steps ? [make("span", {}, "animation (GIF): the last line of the code below")] : []));
  const context = $("ramp").getContext("2d"), row = context.createImageData(128, 1);
  for (let i = 0; i < 128; i++) row.data.set([...heatColors.subarray(6 * i, 6 * i + 3), 255], 4 * i);
  context.putImageData(row, 0, 0);
}

function wire() {
  for (const name of ["heat", "smooth", "outline"]) {
    $(name).checked = state[name];
    $(name).onchange = (event) => set({ [name]: event.target.checked });
  }
  $("opacity").value = state.opacity;
  $("opacity").oninput = (event) => set({ opacity: Number(event.target.value) });
  $("step").oninput = (event) => set({ step: Number(event.target.value) });
  $("method").onchange = (event) => set({ method: Number(event.target.value) });
  $("refined").onchange = (event) => set({ refined: Boolean(event.target.value) });
  $("play").onclick = play;
  $("copy").onclick = copyCode;
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => set(readHash()));
  addEventListener("resize", draw);
  onPicture();
}

start();
