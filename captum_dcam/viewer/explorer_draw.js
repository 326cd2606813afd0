// Draw: what is seen of the data at a state.

/** An element with properties, data and children; texts are never read as HTML. */
function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((c) => c != null && c !== false));
  return node;
}

const drawing = (tag, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text != null) node.textContent = text;
  return node;
};

const grounds = new Map();

/** An image at a size: its pixels, and the same with most of their colour withdrawn. */
function ground(image, width, height) {
  const key = [image, width, height].join();
  if (!grounds.has(key)) {
    const context = make("canvas", { width, height }).getContext("2d", { willReadFrequently: true });
    context.drawImage(images[image].element, 0, 0, width, height);
    const plain = context.getImageData(0, 0, width, height).data, muted = new Float32Array(plain.length);
    for (let i = 0; i < plain.length; i += 4) {
      const grey = 0.7 * (0.299 * plain[i] + 0.587 * plain[i + 1] + 0.114 * plain[i + 2]);
      for (let k = 0; k < 3; k++) muted[i + k] = plain[i + k] + 0.7 * (grey - plain[i + k]);
      muted[i + 3] = 255;
    }
    grounds.set(key, { plain, muted });
  }
  return grounds.get(key);
}

/** Heat over an image: the value sets colour and opacity. */
function paint(canvas, image, maps, { side, top = maps ? highest(maps) : 0, faint = false, outline = false }) {
  const { width: w, height: h } = images[image], scale = side / Math.max(w, h);
  const width = Math.max(1, Math.round(w * scale)), height = Math.max(1, Math.round(h * scale));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), out = context.createImageData(width, height);
  const { plain, muted } = ground(image, width, height);
  if (!state.heat || !maps) out.data.set(plain);
  else {
    const values = overImage(maps, image, width, height, state.smooth);
    const strongest = state.opacity * (faint ? 0.4 : 1);
    for (let p = 0, i = 0; p < values.length; p++, i += 4) {
      const value = top ? Math.min(1, values[p] / top) : 0, color = 3 * Math.round(255 * value);
      for (let k = 0; k < 3; k++) {
        out.data[i + k] = muted[i + k] + strongest * value * (heatColors[color + k] - muted[i + k]);
      }
      out.data[i + 3] = 255;
    }
  }
  const mask = outline && state.outline && image === 0 && words[state.word]?.inside;
  if (mask) edge(out.data, width, height, mask);
  context.putImageData(out, 0, 0);
}

/** White along the border of a mask, black beside it: seen on any ground. */
function edge(pixels, width, height, mask) {
  const inside = (x, y) => mask((x + 0.5) / width, (y + 0.5) / height);
  for (let y = 1; y < height - 1; y++) {
    for (let x = 1; x < width - 1; x++) {
      const own = inside(x, y);
      if (own === inside(x + 1, y) && own === inside(x, y + 1)) continue;
      const i = 4 * (y * width + x);
      pixels.fill(255, i, i + 3);
      pixels.fill(own ? 255 : 0, i + 4, i + 7);
    }
  }
}

/** A ring around the highest token of a map. */
function ring(canvas, image, maps) {
  let best = { value: 0 };
  maps.forEach((map, g) =>
    map.forEach((value, i) => { if (value > best.value) best = { value, g, i }; }));
  if (!best.value || grids[best.g].image !== image) return;
  const { x, y } = grids[best.g], wide = x.length, { width, height } = images[image];
  const [x0, x1] = x[best.i % wide], [y0, y1] = y[Math.floor(best.i / wide)];
  const context = canvas.getContext("2d"), k = canvas.width / width;
  for (const [color, line] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = color;
    context.lineWidth = line;
    context.beginPath();
    context.arc(((x0 + x1) / 2) * k, ((y0 + y1) / 2) * (canvas.height / height),
      Math.min(26, Math.max(8, ((x1 - x0) / 1.4) * k)), 0, 7);
    context.stroke();
  }
}

/** The maps of the chosen word that the large picture shows. */
const shownMaps = () => (words.length ? chosenMaps()(state.word) : null);

function drawPicture() {
  const maps = shownMaps(), word = words[state.word], canvas = $("picture");
  paint(canvas, state.image, maps, { side: 640, faint: word?.doubtful, outline: true });
  if (!word) return;
  const empty = maps.every((map) => map.every((v) => v === map[0]));
  if (state.heat && !empty) ring(canvas, state.image, maps);
  const failed = !method().complete[state.word] && (method().note || "unfinished");
  const said = failed ? `No map: ${failed}` : empty ? "Flat map: no place stands out." : word.said;
  $("where").replaceChildren(make("b", {}, word.text), ` · ${said || `by ${method().label}`}`);
  canvas.setAttribute("aria-label",
    `Image ${state.image + 1} with the map of “${word.text}” by ${method().label}. ${said}`);
  place($("drag"), state.region);
}

function drawStrip() {
  if (images.length < 2) return;
  const strip = $("strip");
  const maps = shownMaps(), top = maps && highest(maps);
  images.forEach((one, image) => {
    const canvas = strip.children[image]?.firstChild ?? make("canvas");
    paint(canvas, image, maps, { side: 112, top });
    if (!canvas.parentNode) {
      const choose = () => set({ image, region: null });
      strip.append(make("button", { type: "button", onclick: choose, "aria-label": one.name }, canvas));
    }
    strip.children[image].setAttribute("aria-pressed", String(image === state.image));
  });
}

function chip(n, blank) {
  const word = words[n], color = stepColor(commit(n));
  const light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140;
  const at = `step${new Set(word.commits).size > 1 ? "s" : ""} ${[...new Set(word.commits)].join(", ")}`;
  const title = blank ? "not yet written" : [doc.forced ? `hidden in state ${word.commits}` : `committed at ${at}`,
    word.probability == null ? null : `probability ${percent(word.probability)}`, word.reason].filter(Boolean).join(" · ");
  const button = make("button", {
    type: "button", title, onclick: () => set({ word: n }),
    className: `chip${blank ? " blank" : ""}${word.doubtful ? " hollow" : ""}`,
    style: { "--own": `rgb(${color})`, "--own-ink": light ? "#111" : "#fff" },
    "aria-pressed": String(n === state.word),
    "aria-label": blank ? `blank: not yet written at step ${state.step}` : `${word.text}, ${title}`,
  }, word.text.trim() || "␣");
  if (steps && commit(n) === state.step) button.classList.add("new");
  return button;
}

/** The answer in its order: chips for explained words, plain text for the rest. */
function drawAnswer() {
  const shares = state.region && looking(state.region), most = shares && Math.max(...shares, 1e-9);
  const owner = new Map();
  words.forEach((word, n) => word.positions.forEach((p) => owner.has(p) || owner.set(p, n)));
  const written = (p) => !steps || tokens[p].commit == null || tokens[p].commit <= state.step;
  const done = new Set(), parts = [];
  tokens.forEach((token, p) => {
    const n = owner.get(p);
    if (n == null) {
      if (!token.text.trim()) return;
      parts.push(make("span", { className: `plain${written(p) ? "" : " blank"}` }, token.text.trim()));
    } else if (!done.has(n)) {
      const one = chip(n, !words[n].positions.every(written));
      if (shares) one.style.opacity = 0.25 + (0.75 * shares[n]) / most;
      parts.push(one);
      done.add(n);
    }
  });
  const focused = document.activeElement?.closest("#answer");
  $("answer").replaceChildren(...parts);
  if (focused) $("answer").querySelector("[aria-pressed=true]")?.focus({ preventScroll: true });
  drawLooking(shares);
}

function drawLooking(shares) {
  if (!shares) return $("looking").replaceChildren();
  const order = shares.map((share, n) => [share, n]).sort((a, b) => b[0] - a[0]);
  const rows = order.filter(([share]) => share >= 0.005).slice(0, 12).map(([share, n]) =>
    bar(make("button", { type: "button", onclick: () => set({ word: n }) }, words[n].text), share, order[0][0]));
  const clear = make("button", { type: "button", onclick: () => set({ region: null }) }, "clear");
  $("looking").replaceChildren(make("h2", {}, "Words that look there: the share of each word’s map in the region"),
    ...(rows.length ? rows : [make("p", {}, "None: no word’s map reaches it.")]), clear);
}

const bar = (label, share, most = 1) =>
  make("div", { className: "bar" }, label, make("i", { style: { width: `${(100 * share) / (most || 1)}%` } }),
    make("span", {}, percent(share)));

/** Every token's commit, and the chosen word's probability, by step. */
function drawLane() {
  const lane = $("lane"), wide = Math.max(320, lane.clientWidth), left = 40, top = 8;
  const column = (wide - left - 8) / doc.count, x = (s) => left + (s + 0.5) * column;
  const every = Math.ceil(22 / column);
  lane.setAttribute("viewBox", `0 0 ${wide} 150`);
  const parts = [drawing("defs", {}), drawing("rect", {
    x: left + state.step * column, y: 0, width: column, height: 136, fill: "var(--line)",
  })];
  parts[0].innerHTML = '<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" ' +
    'patternTransform="rotate(45)"><path d="M0 0V7" stroke="var(--line)" stroke-width="2"/></pattern>';
  steps.holds.forEach((holds, s) => {
    if (!holds) parts.push(drawing("rect", { x: left + s * column, y: 0, width: column + 0.5, height: 136, fill: "url(#hatch)" }));
    if (s % every === 0) parts.push(drawing("text", { x: x(s), y: 148, "text-anchor": "middle" }, s));
  });
  const shown = tokens.map((t, p) => [t, p]).filter(([t]) => t.commit != null && t.text.trim());
  const own = new Set(words[state.word]?.positions);
  shown.forEach(([token, p], i) => {
    const dot = drawing("circle", {
      cx: x(token.commit), cy: top + (i * 50) / Math.max(shown.length - 1, 1), r: own.has(p) ? 6 : 4,
      fill: `rgb(${stepColor(token.commit)})`, stroke: own.has(p) ? "var(--mark)" : "var(--paper)", "stroke-width": own.has(p) ? 3 : 1,
    });
    dot.append(drawing("title", {}, `“${token.text.trim()}”: committed at step ${token.commit}`));
    parts.push(dot);
  });
  parts.push(drawing("text", { x: 0, y: 36 }, "words"));
  lane.replaceChildren(...parts, ...probabilityLine(x));
  lane.setAttribute("aria-label", `The answer’s words by the step that committed them. ${$("lane-note").textContent}`);
  lane.onclick = (event) => {
    const r = lane.getBoundingClientRect();
    const at = ((event.clientX - r.left) / r.width) * wide;
    set({ step: clamp(Math.floor((at - left) / column), doc.count) });
  };
}

function probabilityLine(x) {
  const row = steps.probability?.[state.word], y = (p) => 132 - 56 * p, word = words[state.word];
  const cache = steps.holds.some((h) => !h) ? " Hatched: the step reads the image from a cache, and its own states hold none." : "";
  if (!row) {
    $("lane-note").textContent = `No probability by step was saved: explain(…, trust=True).${cache}`;
    return [];
  }
  const parts = [["100%", 1], ["50%", 0.5], ["0", 0]].map(([text, p]) => drawing("text", { x: 0, y: y(p) + 4 }, text));
  const end = commit(state.word);
  row.forEach((p, s) => {
    if (p == null) return;
    const late = s > end, color = late ? "var(--soft)" : "var(--mark)", before = row[s - 1];
    if (before != null) {
      parts.push(drawing("line", { x1: x(s - 1), y1: y(before), x2: x(s), y2: y(p), stroke: color,
        "stroke-width": 2, "stroke-dasharray": late ? "3 3" : "none" }));
    }
    const dot = drawing("circle", { cx: x(s), cy: y(p), r: 3, fill: color });
    dot.append(drawing("title", {}, `${percent(p)} at step ${s}`));
    parts.push(dot);
  });
  const now = row[state.step];
  $("lane-note").textContent = `Probability of “${word.text}”: ${now == null ? "not computed" : percent(now)} at step ${state.step}, ` +
    `committed at step ${end}. Grey after it: the word is then in the model’s sight, and nothing trained what the model says there.${cache}`;
  return parts;
}

function drawTime() {
  $("step").value = state.step;
  $("at").textContent = `step ${state.step} of 0 … ${doc.count - 1}`;
  $("play").textContent = state.playing ? "❚❚" : "▶";
  $("play").setAttribute("aria-label", state.playing ? "Pause" : "Play the steps");
}

/** The map at the chosen step beside the map at commit, on one scale of all of the word's steps. */
function drawPair() {
  if (!doc.stepMaps) return;
  const end = commit(state.word), of = (s) => doc.stepMaps(s, state.word);
  const top = Math.max(255, highest(of(end)), highest(of(state.step)));
  const probability = steps.probability?.[state.word];
  const shown = [[state.step, `step ${state.step}`], [end, `commit: step ${end}`]].map(([s, title]) => {
    const canvas = make("canvas", { role: "img", "aria-label": `Map at ${title}` });
    paint(canvas, state.image, of(s), { side: 150, top });
    const p = probability?.[s];
    return make("figure", {}, canvas, make("b", {}, title), p == null ? "" : ` · ${percent(p)}`);
  });
  $("pair").replaceChildren(make("h2", {}, "Map by step (one scale for this word’s steps)"), make("div", { className: "row" }, ...shown));
}

function drawWord() {
  const word = words[state.word], parts = [make("h2", {}, `“${word.text}”`)];
  if (word.foil) parts.push(make("p", {}, "Why ", make("b", {}, word.text), " and not ", make("b", {}, word.foil), "."));
  if (word.reason) parts.push(make("p", {}, word.reason));
  word.candidates?.forEach((token) => {
    parts.push(make("p", { className: "note" }, "Likeliest in its place when it was read:"));
    token.forEach(([text, p]) => parts.push(bar(make("span", {}, text.trim() || "␣"), p)));
  });
  const scores = { ...word.scores, ...method().scores?.[state.word] };
  const table = (found) => make("table", {}, ...found.map(([k, v]) => make("tr", {}, make("th", { scope: "row" }, k), make("td", {}, number(v)))));
  const [rows, more] = [scores, word.more].map((found) => Object.entries(found).filter(([, v]) => v != null));
  if (rows.length) parts.push(table(rows));
  if (more.length) {
    const open = Boolean($("word").querySelector("details")?.open);
    parts.push(make("details", { open }, make("summary", {}, "Is the word so? What the steps say"), table(more)));
  }
  $("word").replaceChildren(...(parts.length > 1 ? parts : []));
}

/** What of prompt and answer speaks for the chosen word, and what against it. */
function drawRelevance() {
  const values = method().text?.[state.word];
  if (!values) return $("relevance").replaceChildren();
  const top = Math.max(...values.map((v) => Math.abs(v ?? 0))) || 1, own = new Set(words[state.word].positions);
  const spans = doc.text.tokens.map((text, k) => {
    const value = values[k] ?? 0, color = value > 0 ? "--for" : "--against";
    const line = text.replace(/\n/g, "↵"), mine = own.has(k - doc.text.prompt);
    if (!text && !mine) return null; // what ends the answer
    return make("span", {
      title: values[k] == null ? "no value" : number(values[k]), className: mine ? "own" : "",
      style: value ? { background: `rgba(var(${color}), ${(0.6 * Math.abs(value)) / top})` } : {},
    }, line);
  });
  const cut = doc.text.prompt, ramp = "linear-gradient(90deg, rgba(var(--against), .6), transparent, rgba(var(--for), .6))";
  $("relevance").replaceChildren(
    make("h2", {}, `What of the text speaks for “${words[state.word].text}”`),
    make("p", { className: "tokens" }, make("small", {}, "prompt "), ...spans.slice(0, cut).filter(Boolean)),
    make("p", { className: "tokens" }, make("small", {}, "answer "), ...spans.slice(cut).filter(Boolean)),
    make("p", { className: "scale" }, "against", make("i", { className: "ramp", style: { background: ramp } }), "for the word"));
}

/** All methods for the chosen word, bare and refined. */
function drawMultiples() {
  if (methods.length < 2 && !methods[0].bare) return;
  const cards = methods.map((one, m) => {
    const ready = one.complete[state.word];
    const pictures = [["bare", false], ["refined", true]].filter(([kind]) => ready && one[kind]).map(([kind, refined]) => {
      const canvas = make("canvas", { title: kind, role: "img", "aria-label": kind });
      paint(canvas, state.image, chosenMaps(one, refined)(state.word), { side: 86, outline: true });
      return canvas;
    });
    const facts = [one.seconds == null ? null : `${number(one.seconds)} s`, one.passes, ready ? null : one.note || one.status];
    const f3 = one.scores?.[state.word]?.F3;
    if (f3 != null) facts.unshift(`F3 ${f3.toFixed(2)}`);
    return make("button", {
      type: "button", className: "method", "aria-pressed": String(m === state.method && methods.length > 1), onclick: () => set({ method: m }),
    }, make("b", {}, one.label), ...pictures, make("div", {}, facts.filter(Boolean).join(" · ")));
  });
  $("multiples").replaceChildren(make("h2", {}, `Maps of “${words[state.word].text}”${methods.some((m) => m.bare) ? ", bare and refined" : ""}: each on its own scale`),
    make("div", { className: "row" }, ...cards));
}

function draw() {
  $("method").value = state.method;
  drawPicture();
  drawStrip();
  drawAnswer();
  if (!words.length) return;
  if (steps) {
    drawTime();
    drawLane();
    drawPair();
  }
  drawWord();
  drawRelevance();
  drawMultiples();
}
