// @ts-check
// Items, which can be pointed at, focused and pinned: `{kind, id, from, to, row?, event?, node?}`. `kind` is read, write,
// mark, incarnation, or lane (an empty place in a node's lane).

import { rank } from "./paint-commits.js";
import { REPLICA } from "./palette.js";

const REACH_PX = 9;

export const readItem = (store, row) => ({ kind: "read", id: store.reads.get("id", row), row, from: store.reads.get("at", row), to: store.reads.get("t", row) });
export const writeItem = (store, row) => ({ kind: "write", id: store.writes.get("id", row), row, from: store.writes.get("at", row), to: store.writes.get("t", row) });
export const incarnationItem = (node, incarnation) => ({ kind: "incarnation", id: incarnation.id, incarnation, node, from: incarnation.t, to: incarnation.t });
export const laneItem = (node, time) => ({ kind: "lane", id: -1, node, from: time, to: time });
export const markItem = (event) => ({ kind: "mark", id: event.id, event, from: event.t, to: event.t });

/** The item under a point of the diagram; null: none. */
export function itemAt(scene, x, y, reach = REACH_PX) {
  const { view, store, lanes } = scene;
  if (y < lanes.axis) return null;
  let best = null;
  let nearest = reach;
  const offer = (distance, item) => {
    if (distance < nearest) [nearest, best] = [distance, item];
  };
  if (y < lanes.top) {
    for (const event of store.marks) offer(Math.abs(view.x(event.t) + 3 - x), () => markItem(event));
    return best && best();
  }
  const slack = (reach / view.width) * view.span;
  const [time, far] = [view.time(x), store.longest + slack];
  const { reads, writes } = store;
  for (let row = reads.find(time - slack); row < reads.tail && reads.get("t", row) < time + far; row++) {
    const way = reads.get("way", row);
    if (scene.hidden.has(way) || reads.get("at", row) > time + slack) continue;
    const node = reads.get("node", row);
    const [x0, x1, x2] = [view.x(reads.get("at", row)), view.x(reads.get("decided", row)), view.x(reads.get("t", row))];
    const [y0, y1] = [lanes.session(reads.get("lane", row)), node === 255 ? lanes.bottomOfNodes + 4 : lanes.baseline(node)];
    let distance = Math.min(toSegment(x, y, x0, y0, x1, y0), toSegment(x, y, x1, y1, x2, y1 + 3));
    // A plain read that was thinned out has no arrow between the lanes to point at.
    if (way !== REPLICA || rank(reads.get("id", row)) < scene.share) {
      distance = Math.min(distance, toSegment(x, y, x1 - x0 > 3 ? x1 : x0, y0, x1, y1) + 1, toSegment(x, y, x2, y1, x2, y0) + 2);
    }
    offer(way === REPLICA ? distance : distance * 0.7 - 0.5 - way * 0.1, () => readItem(store, row));
  }
  for (let row = writes.find(time - slack); row < writes.tail && writes.get("t", row) < time + far; row++) {
    if (writes.get("at", row) > time + slack) continue;
    const [x0, x1] = [view.x(writes.get("at", row)), view.x(writes.get("t", row))];
    const home = writes.get("node", row);
    const baseline = lanes.baseline(home === 255 ? store.primaryAt(writes.get("t", row)) : home);
    offer(Math.min(Math.hypot(x - x1, y - baseline) - 3, toSegment(x, y, x0, lanes.session(writes.get("lane", row)), x1, baseline) + 2), () => writeItem(store, row));
  }
  const node = lanes.nodeAt(y);
  for (const incarnation of node < 0 ? [] : store.nodes[node].incarnations) {
    offer(Math.abs(view.x(incarnation.t) - x) - 1, () => incarnationItem(node, incarnation));
  }
  for (const event of store.marks) {
    if (event.kind === "fault" && store.numbers.get(event.node) === node) offer(Math.abs(view.x(event.t) - x), () => markItem(event));
  }
  if (best) return best();
  return node >= 0 && time <= view.now ? laneItem(node, time) : null;
}

function toSegment(x, y, x0, y0, x1, y1) {
  const [dx, dy] = [x1 - x0, y1 - y0];
  const length = dx * dx + dy * dy;
  const share = length ? Math.max(0, Math.min(1, ((x - x0) * dx + (y - y0) * dy) / length)) : 0;
  return Math.hypot(x - x0 - share * dx, y - y0 - share * dy);
}

/**
 * The event before (-1) or after (1) an item in time; without an item, the one nearest to the middle of the view.
 * @param {boolean} notable unusual events only: no plain reads, no writes
 */
export function neighbour(scene, item, way, notable) {
  const { store, view } = scene;
  const time = item ? item.to : view.right - view.span / 2;
  const later = (a) => a.to > time || (item && a.to === time && a.id > item.id);
  const fits = (a) => a && (item ? (way > 0 ? later(a) : a.to < time || (a.to === time && a.id < item.id)) : true);
  const found = [];
  const walk = (ring, make, ok) => {
    for (let row = way > 0 ? ring.find(time) : ring.last(time); row >= ring.head && row < ring.tail; row += way) {
      const candidate = make(store, row);
      if (ok(row) && fits(candidate)) return void found.push(candidate);
    }
  };
  walk(store.reads, readItem, (row) => !scene.hidden.has(store.reads.get("way", row)) && (!notable || store.reads.get("way", row) !== REPLICA));
  walk(store.writes, writeItem, (row) => !notable || store.writes.get("ok", row) !== 1);
  for (const items of [store.marks.map(markItem), ...store.nodes.map((node) => node.incarnations.map((one) => incarnationItem(node.number, one)))]) {
    const ahead = items.filter((one) => (way > 0 ? one.to >= time : one.to <= time) && fits(one));
    if (ahead.length) found.push(way > 0 ? ahead[0] : ahead[ahead.length - 1]);
  }
  found.sort((a, b) => way * (a.to - b.to || a.id - b.id));
  return found[0] || null;
}

/** The writes whose edges matter to an item: a write's own; for a read, the last of its session before it. */
export function writesOf(store, item) {
  if (!item) return [];
  if (item.kind === "write") return [item.row];
  if (item.kind !== "read") return [];
  const session = store.reads.get("session", item.row);
  const writes = store.writes;
  for (let row = writes.last(item.from); row >= writes.head; row--) if (writes.get("session", row) === session && writes.get("ok", row) === 1) return [row];
  return [];
}
