// @ts-check
// Reads: from the session's lane on arrival to the node's lane on the decision, and back on completion.

import { rank } from "./paint-commits.js";
import { PRIMARY, REPLICA, STALE, WAITED, WAYS, stamp } from "./palette.js";

/** Pixels that each arrow needs to be drawn whole; without room, only its ends are drawn. */
const ROOM_PX = WAYS.map((_, way) => (way === REPLICA ? 3.5 : way === WAITED ? 9 : 4));
/** Above this number of reads per pixel, their ends become bars. */
const BARS_FROM = 0.9;
const BAR_PX = 3;
const lists = WAYS.map(() => new Int32Array(65536));

export function paintReads(scene) {
  const { pen, view, store } = scene;
  const reads = store.reads;
  const [from, to] = [reads.find(view.left), reads.find(view.right + store.longest)];
  const counts = WAYS.map(() => 0);
  for (let row = from; row < to; row++) {
    const way = reads.get("way", row);
    if (scene.hidden.has(way) || reads.get("at", row) > view.right) continue;
    lists[way][counts[way]++] = row;
  }
  if (from === to) return;
  const extent = Math.max(60, view.x(reads.t[(to - 1) & reads.mask]) - Math.max(0, view.x(reads.t[from & reads.mask])));
  scene.bars = (to - from) / extent > BARS_FROM;
  if (scene.bars) paintBars(scene, counts);
  for (let way = 0; way < WAYS.length; way++) {
    const share = way === STALE ? 1 : Math.min(1, extent / (ROOM_PX[way] * Math.max(1, counts[way])));
    if (way === REPLICA) scene.share = share;
    paintWay(scene, way, lists[way], counts[way], share, counts[way] / extent);
  }
  pen.globalAlpha = 1;
}

/** Paints bars of reads by way under each node's baseline, and activity on each session's lane. */
function paintBars({ pen, view, store, lanes, palette }, counts) {
  const slice = (view.span / view.width) * BAR_PX;
  const first = Math.floor(view.left / slice);
  const bins = Math.ceil(view.width / BAR_PX) + 2;
  const nodes = store.nodes.length;
  const heights = new Float32Array(WAYS.length * nodes * bins);
  const active = new Uint8Array((lanes.count + 1) * bins);
  const { t, at, node, lane } = store.reads.columns;
  const totals = new Float32Array(nodes * bins);
  let most = 1;
  counts.forEach((count, way) => {
    for (let number = 0; number < count; number++) {
      const cell = lists[way][number] & store.reads.mask;
      const bin = Math.floor(t[cell] / slice) - first;
      if (bin < 0 || bin >= bins) continue;
      const begun = Math.max(0, Math.floor(at[cell] / slice) - first);
      active[Math.min(lane[cell], lanes.count) * bins + begun] = 1;
      if (node[cell] >= nodes) continue;
      heights[(way * nodes + node[cell]) * bins + bin]++;
      most = Math.max(most, ++totals[node[cell] * bins + bin]);
    }
  });
  pen.globalAlpha = 0.8;
  totals.fill(0);
  for (let way = 0; way < WAYS.length; way++) {
    pen.fillStyle = palette.ways[way];
    for (let one = 0; one < nodes * bins; one++) {
      const count = heights[way * nodes * bins + one];
      if (!count) continue;
      const height = (count / most) * 8;
      const x = view.x((first + (one % bins)) * slice);
      pen.fillRect(x, lanes.baseline(Math.floor(one / bins)) + 1 + totals[one], BAR_PX - 0.5, Math.max(0.6, height));
      totals[one] += height;
    }
  }
  pen.globalAlpha = 0.3;
  pen.fillStyle = palette.ways[REPLICA];
  for (let one = 0; one < active.length; one++) {
    if (!active[one]) continue;
    const number = Math.floor(one / bins);
    pen.fillRect(view.x((first + (one % bins)) * slice), lanes.session(number === lanes.count ? 255 : number) - 2.5, BAR_PX - 0.5, 5);
  }
  pen.globalAlpha = 1;
}

function paintWay(scene, way, rows, count, share, density) {
  const { pen, view, store, lanes, palette } = scene;
  const { t, at, decided, node, lane, id, tried } = store.reads.columns;
  const mask = store.reads.mask;
  const [go, wait, retries] = [new Path2D(), new Path2D(), new Path2D()];
  const [shapes, back] = [[], []];
  const colour = palette.ways[way];
  const width = WAYS[way].width;
  const roomy = density < 0.12;
  pen.fillStyle = colour;
  pen.globalAlpha = way === REPLICA ? Math.max(0.3, Math.min(0.85, 0.4 / Math.sqrt(density + 0.1))) : way === WAITED && !roomy ? 0.65 : 0.9;
  for (let number = 0; number < count; number++) {
    const cell = rows[number] & mask;
    const [x0, x2] = [view.x(at[cell]), view.x(t[cell])];
    const x1 = Math.min(x2, view.x(decided[cell]));
    const y0 = lanes.session(lane[cell]);
    const home = node[cell] === 255 ? -1 : node[cell];
    const y1 = home < 0 ? lanes.bottomOfNodes + 4 : lanes.baseline(home);
    // Each read leaves a tick under the baseline and one on its session's lane, unless bars stand for them.
    if (!scene.bars && home >= 0) pen.fillRect(x1 - 0.5, y1 + 2, Math.max(way === REPLICA ? 1 : 1.6, x2 - x1), way === REPLICA ? 4 : 5.5);
    if (!scene.bars) pen.fillRect(x0 - 0.75, y0 - 2.5, 1.5, 5);
    if (rank(id[cell]) >= share) continue;
    if (x2 - x0 < 1.6) pen.fillRect(x1 - width / 2, y1, width, y0 - y1);
    else {
      if (x1 - x0 > 3) {
        wait.moveTo(x0, y0);
        wait.lineTo(x1, y0);
        go.moveTo(x1, y0);
      } else go.moveTo(x0, y0);
      go.lineTo(x1, y1);
      if (x2 - x1 > 1.5) {
        go.moveTo(x1, y1);
        go.lineTo(x2, y1);
      }
      back.push(x2, y1, y0 - y1);
    }
    if (tried[cell]) {
      for (const { number: other } of store.nodes) {
        if (!(tried[cell] & (1 << other)) || other === home) continue;
        retries.moveTo(x1, y0);
        retries.lineTo(x1 - 4, lanes.baseline(other));
        if (roomy) shapes.push(["cross", x1 - 4, lanes.baseline(other), 3]);
      }
    }
    if (way !== REPLICA || roomy) shapes.push([WAYS[way].shape, x1, y1, way === REPLICA ? 2.4 : roomy ? 3.8 : 2.6]);
  }
  strokeWay(scene, way, { go, back, wait, retries });
  for (const [shape, x, y, size] of shapes) {
    const big = shape === "diamond" ? 6.5 : size;
    stamp(pen, shape, x, y, big, colour, palette.surface);
  }
  if (way === STALE && count < 12) labelStale(scene, rows, count);
}

function strokeWay({ pen, palette }, way, { go, back, wait, retries }) {
  const alpha = pen.globalAlpha;
  const width = WAYS[way].width;
  if (way === STALE) {
    // A halo in the background's colour separates it from what it crosses.
    pen.globalAlpha = 1;
    pen.strokeStyle = palette.surface;
    pen.lineWidth = width + 4;
    pen.stroke(go);
  }
  pen.strokeStyle = palette.ways[way];
  pen.lineWidth = width;
  pen.stroke(go);
  pen.setLineDash([1, 3]);
  pen.lineWidth = way === WAITED || way === PRIMARY ? 2.5 : 1.5;
  pen.stroke(wait);
  pen.setLineDash([4, 3]);
  pen.lineWidth = 1.25;
  pen.stroke(retries);
  pen.setLineDash([]);
  pen.globalAlpha = way === STALE ? 0.8 : alpha * 0.45;
  const broad = way === STALE ? 2 : 1;
  for (let at = 0; at < back.length; at += 3) pen.fillRect(back[at] - broad / 2, back[at + 1], broad, back[at + 2]);
  pen.globalAlpha = alpha;
}

function labelStale({ pen, view, store, lanes, palette }, rows, count) {
  pen.font = "700 11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.globalAlpha = 1;
  const taken = new Map();
  for (let number = 0; number < count; number++) {
    const [x, y] = [view.x(store.reads.get("t", rows[number])), lanes.baseline(store.reads.get("node", rows[number]))];
    if (x - (taken.get(y) ?? -Infinity) < 62) continue;
    taken.set(y, x);
    const right = x < view.width - 70;
    pen.textAlign = right ? "left" : "right";
    const at = right ? x + 14 : x - 14;
    pen.fillStyle = palette.surface;
    pen.fillRect(right ? at - 3 : at - 41, y - 16, 44, 14);
    pen.fillStyle = palette.ways[STALE];
    pen.fillText("STALE", at, y - 9);
  }
}
