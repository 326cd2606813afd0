"use strict";
// Data: what the page holds, and what can be computed of it. viewer/explorer.py makes the document
// and puts these files one behind the other: data, draw, then state (explorer.js). Parts that an
// answer lacks are null in the document, and hidden here.

const $ = (id) => document.getElementById(id);
const doc = JSON.parse($("data").textContent);
const { words, methods, grids, images, tokens, steps } = doc;

/** The bytes of a packed array. */
async function unpacked(packed) {
  if (!packed) return null;
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  if (!packed.deflated) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Bytes of every grid's maps, as functions of a word (and a step) that give one map each. */
async function mapsOf(packedGrids) {
  if (!packedGrids) return null;
  const all = await Promise.all(packedGrids.map(unpacked));
  return (...index) =>
    all.map((bytes, g) => {
      const size = grids[g].y.length * grids[g].x.length;
      const place = index.length > 1 ? index[0] * words.length + index[1] : index[0];
      return bytes.subarray(place * size, (place + 1) * size);
    });
}

async function loaded(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

/** A mask as a function of a point in fractions of the image. */
function maskOf(mask, bits) {
  const [height, width] = mask.size;
  return (x, y) => {
    const at = Math.min(height - 1, Math.floor(y * height)) * width + Math.min(width - 1, Math.floor(x * width));
    return (bits[at >> 3] >> (7 - (at & 7))) & 1;
  };
}

const heatColors = Uint8Array.from(atob(doc.palettes.heat), (c) => c.charCodeAt(0));
const stepColors = Uint8Array.from(atob(doc.palettes.steps), (c) => c.charCodeAt(0));

/** The first and the last step that committed a word. */
const commits = tokens.filter((t) => t.commit != null && t.text.trim()).map((t) => t.commit);
const [firstCommit, lastCommit] = [Math.min(...commits), Math.max(...commits)];

function stepColor(step) {
  const at = Math.round(12 + (230 * (step - firstCommit)) / Math.max(lastCommit - firstCommit, 1));
  return [...stepColors.subarray(3 * at, 3 * at + 3)];
}

/** For every pixel of an axis the two cells that it lies between, and the share of the second. */
function weights(edges, size, pixels, smooth) {
  const first = new Int32Array(pixels).fill(-1), second = new Int32Array(pixels);
  const part = new Float32Array(pixels), count = edges.length;
  const low = Math.min(...edges.map((e) => e[0])), high = Math.max(...edges.map((e) => e[1]));
  const centers = edges.map((e) => (e[0] + e[1]) / 2);
  for (let p = 0; p < pixels; p++) {
    const at = ((p + 0.5) * size) / pixels;
    if (at < low || at >= high) continue;
    if (!smooth || count === 1) {
      first[p] = second[p] = smooth ? 0 : edges.findIndex((e) => at >= e[0] && at < e[1]);
      continue;
    }
    let right = 1;
    while (right < count - 1 && centers[right] < at) right++;
    first[p] = right - 1;
    second[p] = right;
    const share = (at - centers[right - 1]) / (centers[right] - centers[right - 1]);
    part[p] = Math.min(1, Math.max(0, share));
  }
  return { first, second, part };
}

const axes = new Map();

function axis(grid, name, pixels, smooth) {
  const key = [grid, name, pixels, smooth].join();
  const { x, y } = grids[grid], { width, height } = images[grids[grid].image];
  if (!axes.has(key)) {
    axes.set(key, weights(name === "x" ? x : y, name === "x" ? width : height, pixels, smooth));
  }
  return axes.get(key);
}

/** Maps, one per grid, in the pixels of an image; where grids overlap they add up. */
function overImage(maps, image, width, height, smooth) {
  const out = new Float32Array(width * height);
  grids.forEach((grid, g) => {
    if (grid.image !== image) return;
    const columns = axis(g, "x", width, smooth), rows = axis(g, "y", height, smooth);
    const wide = grid.x.length, map = maps[g];
    for (let y = 0; y < height; y++) {
      if (rows.first[y] < 0) continue;
      const a = rows.first[y] * wide, b = rows.second[y] * wide, v = rows.part[y];
      for (let x = 0; x < width; x++) {
        const i = columns.first[x], j = columns.second[x], u = columns.part[x];
        if (i < 0) continue;
        const upper = map[a + i] * (1 - u) + map[a + j] * u;
        out[y * width + x] += upper * (1 - v) + (map[b + i] * (1 - u) + map[b + j] * u) * v;
      }
    }
  });
  return out;
}

/** What is brightest of a map over all images, on a coarse raster: its own scale. */
function highest(maps) {
  let top = 0;
  images.forEach((_, image) => {
    for (const v of overImage(maps, image, 96, 96, state.smooth)) top = Math.max(top, v);
  });
  return top;
}

const overlap = (a, b, low, high) => Math.max(0, Math.min(b, high) - Math.max(a, low)) / (b - a);

/** The share of every word's map that lies in a region of an image, in fractions of the image. */
function looking(region) {
  const { width, height } = images[region.image];
  const maps = chosenMaps();
  return words.map((_, n) => {
    let inside = 0, total = 0;
    maps(n).forEach((map, g) => {
      const { x, y, image } = grids[g], here = image === region.image;
      for (let r = 0, i = 0; r < y.length; r++) {
        const down = here ? overlap(...y[r], region.y0 * height, region.y1 * height) : 0;
        for (let c = 0; c < x.length; c++, i++) {
          total += map[i];
          if (down && map[i]) inside += map[i] * down * overlap(...x[c], region.x0 * width, region.x1 * width);
        }
      }
    });
    return total ? inside / total : 0;
  });
}

const percent = (p) => (p > 0 && p < 0.005 ? "<1" : Math.round(100 * p)) + "%";
const number = (v) => (typeof v !== "number" ? String(v) : v && Math.abs(v) < 5e-4 ? "≈ 0" : String(+v.toPrecision(3)));
