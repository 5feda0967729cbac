// @ts-check
// The frame of the diagram: grid, axis, flags for all lanes, the edge of "now", and the crosshair.

import { ticksOf } from "./axis.js";
import { clock, offset } from "./format.js";

export function paintGrid({ pen, view, store, lanes, palette }, zeroMs) {
  const { ticks } = ticksOf(view, zeroMs);
  pen.textBaseline = "middle";
  pen.textAlign = "left";
  const anchored = !ticks.some((tick) => tick.whole);
  for (const tick of ticks) {
    const x = Math.round(view.x(tick.t)) + 0.5;
    pen.fillStyle = palette.line;
    pen.globalAlpha = tick.whole ? 0.9 : 0.5;
    pen.fillRect(x - 0.5, lanes.axis - 5, 1, lanes.height);
    pen.globalAlpha = 1;
    pen.fillStyle = tick.whole ? palette.ink : palette.muted;
    pen.font = `${tick.whole ? "600 " : ""}11px ui-monospace, "SF Mono", Menlo, Consolas, monospace`;
    if (x > 2 && x < view.width - 24 && (!anchored || x > 96)) pen.fillText(tick.text, x + 4, 11);
  }
  pen.fillStyle = palette.line;
  pen.fillRect(0, lanes.axis, view.width, 1);
  if (store.horizon > view.left) {
    const x = Math.min(view.width, view.x(store.horizon));
    pen.globalAlpha = 0.35;
    pen.fillStyle = palette.hatch(pen, "faint", 8);
    pen.fillRect(0, lanes.axis + 1, x, lanes.height);
    pen.globalAlpha = 1;
    if (x > 210) {
      pen.fillStyle = palette.muted;
      pen.font = "11px system-ui, sans-serif";
      pen.fillText("nothing is kept from before", 8, lanes.flags);
    }
  }
}

/** Without a whole tick in view, the left edge names the second (or millisecond) from which the offsets count. */
export function paintAnchor({ pen, view, palette }, zeroMs) {
  const { ticks, anchor } = ticksOf(view, zeroMs);
  if (ticks.some((tick) => tick.whole)) return;
  pen.font = '600 11px ui-monospace, "SF Mono", Menlo, Consolas, monospace';
  pen.textBaseline = "middle";
  pen.textAlign = "left";
  pen.fillStyle = palette.surface;
  pen.fillRect(0, 2, 94, 18);
  pen.fillStyle = palette.ink;
  pen.fillText(anchor, 4, 11);
}

/** The text of a flag in the strip below the axis. */
export function flagOf(event) {
  if (event.kind === "routing") return `routing: ${event.routing}`;
  if (event.kind === "simulator") return event.rate === 0 ? "simulator: paused" : `simulator: ${event.rate ?? "one client"}`;
  if (event.kind === "scenario") return event.phase === "step" ? event.name : `${event.name} ${event.phase}`;
  if (event.kind === "skipped") return `${event.count} left out`;
  if (event.name === "delay" && !event.delay_ms) return `no delay ${event.node}`;
  return `${event.name} ${event.node ?? ""}`.trim();
}

/** Paints the flags of the marks in view. Where they would overlap, the text is left out. */
export function paintFlags({ pen, view, store, lanes, palette }) {
  const texts = [];
  pen.font = "600 10.5px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "left";
  for (const event of store.marks) {
    const x = view.x(event.t);
    if (x < -160 || x > view.width + 4) continue;
    const colour = event.kind === "fault" || event.phase === "failed" ? palette.fault : event.kind === "skipped" ? palette.faint : palette.accent;
    pen.fillStyle = colour;
    if (event.kind === "routing" || event.phase === "began") {
      pen.globalAlpha = 0.5;
      pen.fillRect(x - 0.5, lanes.axis, 1, lanes.height);
      pen.globalAlpha = 1;
    }
    if (event.kind === "fault") faultMark(pen, palette, store, lanes, event, x);
    pen.fillStyle = colour;
    pen.beginPath();
    pen.moveTo(x, lanes.flags - 6);
    pen.lineTo(x + 6, lanes.flags - 2.5);
    pen.lineTo(x, lanes.flags + 1);
    pen.fill();
    pen.fillRect(x - 0.75, lanes.flags - 6, 1.5, 13);
    texts.push([flagOf(event), x + 9, colour]);
  }
  let free = -Infinity;
  for (const [text, x, colour] of texts) {
    if (x < free) continue;
    const width = pen.measureText(text).width;
    pen.fillStyle = palette.surface;
    pen.fillRect(x - 2, lanes.flags - 7, width + 6, 14);
    pen.fillStyle = colour;
    pen.fillText(text, x, lanes.flags);
    free = x + width + 18;
  }
}

/** Paints the moment of a fault on the lane of its node. */
function faultMark(pen, palette, store, lanes, event, x) {
  const node = store.nodes[store.numbers.get(event.node) ?? -1];
  if (!node) return;
  const [laneTop, baseline] = [lanes.laneTop(node.number), lanes.baseline(node.number)];
  pen.fillStyle = palette.fault;
  pen.fillRect(x - 0.75, laneTop + 2, 1.5, baseline - laneTop - 2);
  pen.beginPath();
  pen.moveTo(x - 5, laneTop + 2);
  pen.lineTo(x + 5, laneTop + 2);
  pen.lineTo(x, laneTop + 9);
  pen.fill();
}

/** Tints the time in which another routing than never-stale was in force, and stale reads are to be expected. */
export function paintRouting({ pen, view, store, lanes, palette }) {
  let routing = store.marks.find((mark) => mark.kind === "routing")?.before ?? store.hello?.routing ?? "never-stale";
  let from = -Infinity;
  const spans = [];
  for (const mark of store.marks) {
    if (mark.kind !== "routing") continue;
    if (routing !== "never-stale") spans.push([from, mark.t]);
    [routing, from] = [mark.routing, mark.t];
  }
  if (routing !== "never-stale") spans.push([from, view.now]);
  for (const [begin, end] of spans) {
    const [x0, x1] = [Math.max(0, view.x(begin)), Math.min(view.width, view.x(end))];
    if (x1 <= x0) continue;
    pen.globalAlpha = 0.05;
    pen.fillStyle = palette.ways[5];
    pen.fillRect(x0, lanes.axis + 1, x1 - x0, lanes.height);
    pen.globalAlpha = 0.9;
    pen.fillRect(x0, lanes.axis - 1, x1 - x0, 3);
    pen.globalAlpha = 1;
  }
}

export function paintNow({ pen, view, lanes, palette }) {
  const x = view.x(view.now);
  if (x > view.width) return;
  pen.globalAlpha = 0.6;
  pen.fillStyle = palette.ground;
  pen.fillRect(x + 1, lanes.axis + 1, view.width - x, lanes.height);
  pen.globalAlpha = 1;
  pen.fillStyle = palette.accent;
  pen.fillRect(x, lanes.axis - 4, 1.5, lanes.height);
}

/** Paints the time under the pointer, and its distance from the pinned item. */
export function paintCrosshair({ pen, view, lanes, palette }, x, pinned, zeroMs) {
  const t = view.time(x);
  pen.fillStyle = palette.ink;
  pen.globalAlpha = 0.35;
  pen.fillRect(x - 0.5, lanes.axis, 1, lanes.height);
  pen.globalAlpha = 1;
  const text = clock(zeroMs + t, view.span < 20 ? 6 : 3) + (pinned ? `  ${offset(t - pinned.to)} from pinned` : "");
  pen.font = '600 11px ui-monospace, "SF Mono", Menlo, Consolas, monospace';
  const width = pen.measureText(text).width + 10;
  const left = Math.max(0, Math.min(view.width - width, x - width / 2));
  pen.fillStyle = palette.ink;
  pen.beginPath();
  pen.roundRect(left, 2, width, 18, 4);
  pen.fill();
  pen.fillStyle = palette.surface;
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  pen.fillText(text, left + 5, 11.5);
}
