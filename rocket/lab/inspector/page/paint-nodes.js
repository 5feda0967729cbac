// @ts-check
// The nodes' lanes: the primary, faults, incarnations, and the band between what the observer believed of a replica's
// replay and what later statuses proved.

/** Paints the intervals of faults, hatched so that they don't rest on colour alone. */
export function paintSpans({ pen, view, store, lanes, palette }) {
  for (const node of store.nodes) {
    const [laneTop, height] = [lanes.laneTop(node.number) + 1, lanes.node - 2];
    for (const span of node.spans) {
      if (span.to < view.left || span.from > view.right) continue;
      const from = Math.max(0, view.x(span.from));
      const to = Math.min(view.width, view.x(Math.min(span.to, view.now)));
      if (to <= from) continue;
      pen.globalAlpha = 0.13;
      pen.fillStyle = palette.fault;
      pen.fillRect(from, laneTop, to - from, height);
      pen.globalAlpha = 0.35;
      pen.fillStyle = palette.hatch(pen, "fault", 9);
      pen.fillRect(from, laneTop, to - from, height);
      pen.globalAlpha = 1;
      pen.fillStyle = palette.fault;
      pen.fillRect(view.x(span.from), laneTop, 1.5, height);
    }
  }
}

/** Paints the names of faults, and where a node became the primary, above everything else. */
export function paintNames({ pen, view, store, lanes, palette }) {
  pen.textBaseline = "top";
  pen.textAlign = "left";
  pen.font = "600 10px system-ui, sans-serif";
  for (const node of store.nodes) {
    let row = 0;
    for (const span of node.spans) {
      if (span.to < view.left || span.from > view.right) continue;
      const from = Math.max(0, view.x(span.from));
      if (Math.min(view.width, view.x(Math.min(span.to, view.now))) - from < 46) continue;
      label(pen, palette, span.kind, from + 5, lanes.laneTop(node.number) + 3 + 12 * (row++ % 3), palette.fault);
    }
  }
  store.primaries.forEach((primary, number) => {
    const x = view.x(primary.from);
    if (number && x > -100 && x < view.width) label(pen, palette, "▲ primary from here", x + 4, lanes.laneTop(primary.node) + 4, palette.commit);
  });
}

function label(pen, palette, text, x, y, colour) {
  pen.fillStyle = palette.surface;
  pen.globalAlpha = 0.85;
  pen.fillRect(x - 2, y - 1, pen.measureText(text).width + 4, 12);
  pen.globalAlpha = 1;
  pen.fillStyle = colour;
  pen.fillText(text, x, y);
}

/** Paints the baselines, thick where the node was the primary. */
export function paintBaselines({ pen, view, store, lanes, palette }) {
  pen.fillStyle = palette.line;
  for (const node of store.nodes) pen.fillRect(0, lanes.baseline(node.number) - 0.5, view.width, 1);
  for (let lane = 0; lane <= lanes.count; lane++) {
    pen.globalAlpha = 0.6;
    pen.fillRect(0, Math.round(lanes.session(lane === lanes.count ? 255 : lane)) - 0.5, view.width, 1);
  }
  pen.globalAlpha = 1;
  store.primaries.forEach((primary, number) => {
    const from = Math.max(0, view.x(number ? primary.from : store.horizon));
    const next = store.primaries[number + 1];
    const to = Math.min(view.width, view.x(next ? next.from : view.now));
    if (to <= from) return;
    const baseline = lanes.baseline(primary.node);
    pen.globalAlpha = 0.07;
    pen.fillStyle = palette.commit;
    pen.fillRect(from, lanes.laneTop(primary.node) + 2, to - from, lanes.node - 4);
    pen.globalAlpha = 1;
    pen.fillRect(from, baseline - 1.5, to - from, 3);
  });
}

/**
 * Walks through a replica's steps in view: what the primary had flushed, what the board said, and what the next status
 * proved. Calls `emit(from, to, believed, proved)`, in bytes behind the primary (believed NaN: no status; below
 * zero: the board was ahead of the truth by that much), at most once a slice of time.
 */
function walk(view, store, node, emit) {
  const [flush, beliefs, proofs] = [store.flush, node.beliefs, node.proofs];
  const end = Math.min(view.right, view.now);
  const slice = (view.span / view.width) * 1.5;
  let [f, b, p] = [flush.last(view.left), beliefs.last(view.left), proofs.find(view.left)];
  let t = Math.max(view.left, store.horizon);
  while (t < end) {
    const nextFlush = f + 1 < flush.tail ? flush.get("t", f + 1) : Infinity;
    const nextBelief = b + 1 < beliefs.tail ? beliefs.get("t", b + 1) : Infinity;
    while (p < proofs.tail && proofs.get("t", p) <= t) p++;
    const nextEnd = node.endAfter(t);
    const nextProof = p < proofs.tail ? proofs.get("t", p) : Infinity;
    // Steps within one slice are too fine to be seen: its beginning stands for all of it.
    const slot = (Math.floor(t / slice) + 1) * slice;
    const step = Math.max(Math.min(nextFlush, nextBelief, nextProof, nextEnd), t);
    const until = Math.min(end, step > t ? Math.max(step, slot) : t);
    const primary = f >= flush.head ? flush.get("lsn", f) : NaN;
    const believed = b >= beliefs.head ? beliefs.get("lsn", b) : NaN;
    const next = p < proofs.tail && nextEnd > nextProof ? proofs.get("lsn", p) : NaN;
    const ahead = next < believed ? believed - next : 0;
    if (until > t) emit(t, until, Math.max(0, primary - believed), Math.max(0, primary - next), ahead);
    t = until;
    if (until >= end) break;
    while (f + 1 < flush.tail && flush.get("t", f + 1) <= t) f++;
    while (b + 1 < beliefs.tail && beliefs.get("t", b + 1) <= t) b++;
  }
}

/** Paints the band of each replica. @param {any} scene */
export function paintBands(scene) {
  const { pen, view, store, lanes, palette } = scene;
  for (const node of store.nodes) {
    if (!node.beliefs.size) continue;
    const baseline = lanes.baseline(node.number);
    const [steps, overstated] = [[], []];
    walk(view, store, node, (from, to, believed, proved, ahead) => {
      if (Number.isNaN(believed)) return;
      const [x0, x1] = [Math.round(view.x(from)), Math.round(view.x(to))];
      const least = Number.isNaN(proved) ? 0 : Math.min(proved, believed);
      steps.push([x0, x1, lanes.lift(believed), lanes.lift(least)]);
      if (ahead > 0) overstated.push([x0, x1, lanes.lift(Math.max(proved, ahead))]);
    });
    // Rectangles that meet at whole pixels: paths with that many corners take several times as long to fill.
    pen.fillStyle = palette.behind;
    pen.globalAlpha = 0.16;
    for (const [x0, x1, high, least] of steps) if (high > least) pen.fillRect(x0, baseline - 1 - high, x1 - x0, high - least);
    pen.globalAlpha = 0.45;
    for (const [x0, x1, , least] of steps) if (least > 0) pen.fillRect(x0, baseline - 1 - least, x1 - x0, least);
    pen.globalAlpha = 0.95;
    let [end, level] = [NaN, 0];
    for (const [x0, x1, high] of steps) {
      if (x0 === end && high !== level) pen.fillRect(x0 - 0.5, baseline - 1.5 - Math.max(high, level), 1, Math.abs(high - level) + 1);
      pen.fillRect(x0, baseline - 1.6 - high, x1 - x0, 1.25);
      [end, level] = [x1, high];
    }
    for (const [x0, x1, lift] of overstated) {
      pen.globalAlpha = 0.25;
      pen.fillStyle = palette.ahead;
      pen.fillRect(x0, baseline - lift, x1 - x0, lift);
      pen.globalAlpha = 0.9;
      pen.fillStyle = palette.hatch(pen, "ahead", 6);
      pen.fillRect(x0, baseline - lift, x1 - x0, lift);
    }
    pen.globalAlpha = 1;
  }
}

/** Paints when the observer asked, and where a node began another incarnation. */
export function paintStatuses({ pen, view, store, lanes, palette }) {
  for (const node of store.nodes) {
    const baseline = lanes.baseline(node.number);
    const [from, to] = [node.beliefs.find(view.left), node.beliefs.find(view.right + 100)];
    if (to - from < view.width / 5) {
      pen.fillStyle = palette.muted;
      for (let row = from; row < to; row++) {
        const [asked, answered] = [view.x(node.beliefs.get("asked", row)), view.x(node.beliefs.get("t", row))];
        pen.fillRect(answered - 0.5, baseline - 4, 1, 4);
        if (answered - asked > 2) pen.fillRect(asked, baseline - 2, answered - asked, 2);
      }
    }
    pen.textBaseline = "middle";
    pen.textAlign = "center";
    pen.font = "700 12px system-ui, sans-serif";
    for (const incarnation of node.incarnations) {
      const x = view.x(incarnation.t);
      if (x < -8 || x > view.width + 8) continue;
      pen.fillStyle = palette.fault;
      pen.fillRect(x - 0.75, lanes.laneTop(node.number) + 2, 1.5, lanes.node - 4);
      pen.beginPath();
      pen.arc(x, lanes.laneTop(node.number) + 9, 7, 0, 7);
      pen.fill();
      pen.fillStyle = palette.surface;
      pen.fillText("↻", x, lanes.laneTop(node.number) + 9.5);
    }
  }
}
