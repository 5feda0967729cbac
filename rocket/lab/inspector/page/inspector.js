// @ts-check
// The race inspector: puts the parts together.

import { Card, describeItem } from "./card.js";
import { Controls } from "./controls.js";
import { Diagram } from "./diagram.js";
import { byId, make, say, setText } from "./dom.js";
import { count, duration } from "./format.js";
import { Gestures } from "./gestures.js";
import { itemAt, laneItem, markItem, neighbour, readItem } from "./items.js";
import { listenToKeys } from "./keys.js";
import { NodeCards } from "./nodes.js";
import { Overview } from "./overview.js";
import { Palette, WAYS } from "./palette.js";
import { Scenarios } from "./scenarios.js";
import { OTHERS } from "./sessions.js";
import { Store } from "./store.js";
import { Commands, listen } from "./stream.js";
import { askForToken, toast } from "./toasts.js";
import { Traffic } from "./traffic.js";
import { View } from "./view.js";

const store = new Store();
const view = new View();
const palette = new Palette();
const diagram = new Diagram(byId("canvas"), byId("labels"), store, view, palette);
const overview = new Overview(byId("overview"), store, view, palette);
const card = new Card(byId("card"), store, diagram, () => pin(null), (way) => step(way, false));
const commands = new Commands(askForToken);
const nodes = new NodeCards(byId("node-cards"), store, palette, send);
const traffic = new Traffic(store, palette, jump);
const controls = new Controls(send);
const scenarios = new Scenarios(send, scrollToDiagram);

/** Sends a command for a control and shows the result; returns false if it failed. */
async function send(command, control) {
  if (control.getAttribute("aria-disabled") === "true" || control.getAttribute("aria-busy") === "true") return false;
  control.setAttribute("aria-busy", "true");
  try {
    toast(await commands.send(command));
    return true;
  } catch (error) {
    toast(error.message, true);
    return false;
  } finally {
    control.removeAttribute("aria-busy");
  }
}

/** Pins the card of an item, or none. */
function pin(item, y = null) {
  diagram.pinned = item;
  if (item) item.y = y;
  diagram.hover = null;
  if (!item) return card.show(null);
  // A session without a lane of its own is named while something of it is pinned.
  const ring = item.kind === "read" ? store.reads : item.kind === "write" ? store.writes : null;
  if (ring && ring.get("lane", item.row) === OTHERS) item.session = store.record(ring, item.row)?.session;
  view.follow(false);
  card.show(item, true, view.x(item.from), view.x(item.to), y ?? 120);
}

/** Goes to the event before or after; with `notable`, to the next unusual one. */
function step(way, notable) {
  const item = neighbour(diagram.scene, diagram.pinned, way, notable);
  if (!item) return say(notable ? "No further notable event." : "No further event.");
  view.follow(false);
  view.reveal(item.from, item.to);
  pin(item);
  const { title, text } = describeItem(store, item);
  say(`${title}. ${text}`);
}

/** Goes to the lane above or below, at the time of the pinned item or the middle; from a read, first to its node's lane. */
function stepLane(way) {
  const { pinned } = diagram;
  const count = store.nodes.length;
  if (!count) return;
  const home = pinned?.kind === "read" ? store.reads.get("node", pinned.row) : NaN;
  const from = pinned?.kind === "lane" ? pinned.node + way : home < count ? home : way > 0 ? 0 : count - 1;
  const item = laneItem((from + count) % count, pinned ? pinned.to : Math.min(view.now, view.right - view.span / 2));
  pin(item, diagram.lanes.baseline(item.node));
  const { title, text } = describeItem(store, item);
  say(`${title}. ${text}`);
}

/** Scrolls the page so that the diagram is visible. */
function scrollToDiagram() {
  byId("diagram").scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

/** Shows a stale read: the diagram zooms to it, and its card is pinned. */
function jump(stale) {
  const row = store.readOf(stale.read);
  if (row < 0) return toast("That read is no longer kept.", true);
  const item = readItem(store, row);
  view.show(item.from, item.to, 24);
  pin(item);
  scrollToDiagram();
  const { title, text } = describeItem(store, item);
  say(`${title}. ${text}`);
}

new Gestures(byId("stage"), diagram, {
  hover(item, x, y) {
    diagram.hover = diagram.pinned ? (item && item.kind !== "lane" ? item : null) : item;
    if (!diagram.pinned) card.show(item, false, x, x, y);
  },
  pick: (item, y) => pin(item && item.kind !== "lane" ? item : null, y),
});

listenToKeys(byId("stage"), view, {
  step,
  stepLane,
  zoom,
  unpin: () => pin(null),
  live: () => goLive(),
  stale: () => (store.stale.length ? jump(store.stale[store.stale.length - 1]) : say("No stale read was found.")),
});

/** Zooms around the pinned item, if it is visible. */
function zoom(factor) {
  const at = diagram.pinned?.to;
  view.zoom(factor, at >= view.left && at <= view.right ? at : null);
}

function goLive() {
  pin(null);
  view.goLive();
}

byId("pause").addEventListener("click", () => (view.following ? view.follow(false) : goLive()));
byId("live").addEventListener("click", goLive);
byId("zoom-in").addEventListener("click", () => zoom(0.6));
byId("zoom-out").addEventListener("click", () => zoom(1 / 0.6));

view.listeners.push(() => {
  byId("pause").setAttribute("aria-pressed", String(!view.following));
  setText(byId("pause-words"), view.following ? "Pause" : "Paused");
  byId("live").hidden = view.following;
  setText(byId("span"), `${duration(view.span)} across`);
});
for (const listener of view.listeners) listener();

WAYS.forEach((way, number) => {
  const key = make("canvas", { class: "key", "aria-hidden": "true" });
  const button = make("button", { type: "button", class: `legend-way way-${way.name}`, "aria-pressed": "true", title: `Show reads that went: ${way.words}`, "data-way": way.name }, key, way.short);
  button.addEventListener("click", () => {
    const hide = !diagram.hidden.has(number);
    if (hide) diagram.hidden.add(number);
    else diagram.hidden.delete(number);
    button.setAttribute("aria-pressed", String(!hide));
  });
  byId("legend").append(button);
});

function drawLegend() {
  import("./palette.js").then(({ stamp }) => {
    WAYS.forEach((way, number) => {
      const canvas = byId("legend").children[number].querySelector("canvas");
      const ratio = window.devicePixelRatio || 1;
      [canvas.width, canvas.height] = [22 * ratio, 14 * ratio];
      const pen = canvas.getContext("2d");
      pen.scale(ratio, ratio);
      pen.fillStyle = palette.ways[number];
      pen.fillRect(0, 7 - way.width / 2, 14, way.width);
      stamp(pen, way.shape, 15, 7, way.shape === "diamond" ? 4.6 : 3.6, palette.ways[number], palette.surface);
    });
  });
}
drawLegend();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawLegend);

store.listeners.push((event) => {
  if (event.kind === "read") overview.count(event);
  else if (event.kind === "tick") {
    nodes.tick(event);
    traffic.tick(event);
  } else if (event.kind === "stale") {
    traffic.found(event);
    say(`Stale read on ${event.node}. ${event.text}`);
  } else if (event.kind === "scenario") scenarios.take(event);
  else if (event.kind === "routing") {
    store.hello.routing = event.routing;
    controls.showRouting(event.routing);
  } else if (event.kind === "simulator") controls.showRate(event.rate);
});

listen({
  hello(hello, first) {
    // Another zero is another server's event log, even if the stream resumed.
    const same = !first && hello.resumed && hello.zero === store.hello.zero;
    if (!first && !same) {
      store.clear();
      overview.clear();
      traffic.clear();
      goLive();
    }
    store.open(hello);
    store.zeroMs = diagram.zero = Date.parse(hello.zero);
    view.resetClock(hello.now);
    commands.tokenRequired = hello.token_required;
    if (!same) {
      diagram.shape();
      nodes.build(hello);
      scenarios.build(hello);
    }
    controls.build(hello);
  },
  batch(text) {
    store.take(text);
  },
  lost: () => connection(false),
  back: () => connection(true),
});

function connection(up) {
  byId("lost").hidden = up;
  byId("connection").classList.toggle("down", !up);
  setText(byId("connection-words"), up ? "live" : "reconnecting");
}

// Lanes are smaller on a narrow page.
let small = null;
new ResizeObserver(() => {
  const now = byId("canvas").clientWidth < 520;
  if (now !== small && store.nodes.length) diagram.shape();
  small = now;
}).observe(byId("canvas"));

let overviewDrawn = 0;
diagram.afterDraw.push(() => {
  const pinned = diagram.pinned;
  if (pinned && `${view.left} ${view.span}` !== pinned.placed) {
    pinned.placed = `${view.left} ${view.span}`;
    card.place(view.x(pinned.from), view.x(pinned.to), pinned.y ?? 120);
  }
  // Where the pointer rests on no event, its card shows the time that has moved there.
  if (performance.now() - overviewDrawn >= 180 && diagram.hover?.kind === "lane" && !diagram.pinned && view.following) {
    diagram.hover = { ...diagram.hover, from: view.time(diagram.pointerX), to: view.time(diagram.pointerX) };
    card.refresh(diagram.hover);
  }
  if (performance.now() - overviewDrawn < 180) return;
  overviewDrawn = performance.now();
  overview.draw();
});
setInterval(() => {
  if (!document.hidden) setText(byId("frames"), `${Math.round(diagram.fps)} frames/s, ${diagram.paint_ms.toFixed(1)} ms each · ${count(store.held)} events kept`);
}, 1000);

/** For tests. */
Object.assign(window, {
  rocketInspector: {
    get fps() { return diagram.fps; },
    get paint_ms() { return diagram.paint_ms; },
    get events() { return store.held; },
    get pinned() { return diagram.pinned && describeItem(store, diagram.pinned); },
    store, view, diagram, itemAt, jump, markItem,
  },
});
