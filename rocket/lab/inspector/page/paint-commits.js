// @ts-check
// Writes on their way to the primary, commits, and the edges to where each replica had replayed them: the interval
// between the last status without the commit and the first one with it.

import { stamp } from "./palette.js";

/** A fixed number in 0..1 for thinning out: an item left out at one zoom stays out as time moves on. */
export const rank = (id) => (Math.imul(id, 2654435761) >>> 0) / 4294967296;

/** Pixels for one commit with its edges: more where statuses are far apart, so that edges spread widely. */
const EDGE_ROOM_PX = 60;
const FAN_ROOM_PX = 190;
const LINE_ROOM_PX = 7;

export function paintCommits(scene) {
  const { pen, view, store, lanes, palette } = scene;
  const writes = store.writes;
  const [from, to] = [writes.find(view.left), writes.find(view.right + store.longest)];
  const between = ((store.hello.interval_ms || 500) / view.span) * view.width;
  const share = Math.min(1, view.width / Math.max(EDGE_ROOM_PX, Math.min(FAN_ROOM_PX, between)) / Math.max(1, to - from));
  const lines = Math.min(1, view.width / LINE_ROOM_PX / Math.max(1, to - from));
  for (let row = from; row < to; row++) {
    if (!scene.chosenWrites.has(row) && rank(writes.get("id", row)) < share) paintEdges(scene, row, false);
  }
  for (const row of scene.chosenWrites) paintEdges(scene, row, true);
  const [trips, dots] = [new Path2D(), new Path2D()];
  const dense = to - from > view.width / 8;
  const size = dense ? 2.2 : to - from > view.width / 30 ? 3 : 4;
  pen.fillStyle = palette.commit;
  const odd = [];
  for (let row = from; row < to; row++) {
    const [at, done] = [view.x(writes.get("at", row)), view.x(writes.get("t", row))];
    if (done < -20 || at > view.width + 20) continue;
    const node = writes.get("node", row);
    const baseline = lanes.baseline(node === 255 ? store.primaryAt(writes.get("t", row)) : node);
    const session = lanes.session(writes.get("lane", row));
    if (rank(writes.get("id", row)) < lines) {
      trips.moveTo(at, session);
      trips.lineTo(done, baseline);
    }
    if (writes.get("ok", row) !== 1) {
      odd.push([done, baseline, writes.get("ok", row) === 2]);
      continue;
    }
    // Where dots touch each other, squares look the same and take a fraction of the time.
    if (dense) pen.fillRect(done - 2, baseline - 2, 4, 4);
    else {
      dots.moveTo(done + size, baseline);
      dots.arc(done, baseline, size, 0, 7);
    }
  }
  pen.globalAlpha = (0.18 + 0.3 * lines * share) * (dense ? 0.6 : 1);
  pen.strokeStyle = palette.commit;
  pen.lineWidth = 1;
  if (!dense) pen.setLineDash([2, 2]);
  pen.stroke(trips);
  pen.setLineDash([]);
  pen.globalAlpha = 1;
  pen.fillStyle = palette.commit;
  pen.fill(dots);
  for (const [x, y, unknown] of odd) {
    stamp(pen, unknown ? "ring" : "cross", x, y, 4, palette.fault, palette.surface);
    if (!unknown) continue;
    pen.fillStyle = palette.fault;
    pen.fillText("?", x, y - 9);
  }
}

function paintEdges(scene, row, chosen) {
  const { pen, view, store, lanes, palette } = scene;
  const writes = store.writes;
  const home = writes.get("node", row);
  if (writes.get("ok", row) !== 1 || home === 255) return;
  const [x, y] = [view.x(writes.get("t", row)), lanes.baseline(home)];
  for (const { number } of store.nodes) {
    if (number === home) continue;
    const baseline = lanes.baseline(number);
    const hi = writes.get(`hi${number}`, row);
    if (Number.isNaN(hi)) {
      if (chosen) paintOpen(pen, palette, x, y, view.x(view.now), baseline);
      continue;
    }
    const [first, last] = [view.x(writes.get(`lo${number}`, row)), view.x(hi)];
    pen.fillStyle = pen.strokeStyle = palette.commit;
    pen.lineWidth = chosen ? 1.75 : 1;
    pen.beginPath();
    pen.moveTo(x, y);
    if (last - first > 1.5) {
      pen.lineTo(first, baseline);
      pen.lineTo(last, baseline);
      pen.closePath();
      pen.globalAlpha = chosen ? 0.16 : scene.chosenWrites.size ? 0.015 : 0.045;
      pen.fill();
      pen.beginPath();
      pen.moveTo(x, y);
    }
    pen.lineTo(last, baseline);
    pen.globalAlpha = chosen ? 0.9 : scene.chosenWrites.size ? 0.12 : 0.3;
    pen.stroke();
    pen.globalAlpha = chosen ? 1 : scene.chosenWrites.size ? 0.3 : 0.6;
    pen.fillRect(first, baseline - 2.5, Math.max(2, last - first), chosen ? 4 : 2.5);
  }
  pen.globalAlpha = 1;
}

/** The open edge of a commit that a replica has not replayed yet. */
function paintOpen(pen, palette, x, y, now, baseline) {
  pen.setLineDash([3, 4]);
  pen.strokeStyle = palette.commit;
  pen.globalAlpha = 0.7;
  pen.beginPath();
  pen.moveTo(x, y);
  pen.lineTo(now, baseline);
  pen.stroke();
  pen.setLineDash([]);
  pen.globalAlpha = 1;
}
