// @ts-check
// The card of one event: its explanation first, then its fields.

import { make } from "./dom.js";
import { bytes, clock, duration, named, offset, parseLsn } from "./format.js";
import { flagOf } from "./paint-frame.js";
import { FAILED, WAYS } from "./palette.js";

/** The heading and the text of an item, also for a screen reader. */
export function describeItem(store, item) {
  const record = recordOf(store, item);
  if (item.kind === "read" && record) {
    const way = WAYS[store.reads.get("way", item.row)];
    const what = record.request === "list" ? "List of rides" : `Read of ride ${record.ride ?? "?"}`;
    const verdict = store.stale.find((one) => one.read === item.id);
    return { title: `${what}, ${named(record.node, record.role)}, ${way.words}`, text: verdict ? `${verdict.text} ${record.explanation}` : record.explanation, record };
  }
  if (item.kind === "write" && record) {
    const what = record.request === "join" ? "New user" : `Write of ride ${record.ride ?? "?"}`;
    const went = record.outcome === "ok" ? `committed on ${named(record.node, "primary")}` : record.outcome === "fail" ? "failed" : "outcome unknown";
    return { title: `${what}, ${went}`, text: record.explanation, record };
  }
  if (item.kind === "mark") {
    const { event } = item;
    const text = event.said ?? event.text ?? (event.kind === "skipped" ? "Reads and writes that were not sent to this page, because there were too many to show." : event.kind === "routing" ? `Reads are routed as ${event.routing} from here on, before as ${event.before}.` : "");
    return { title: flagOf(event) + (event.ok === false ? " (refused)" : ""), text, record: null };
  }
  if (item.kind === "incarnation") return { title: `${store.nodes[item.node].name} in another incarnation`, text: `Its startup process was replaced since the last status. ${item.incarnation.before} became ${item.incarnation.now}; earlier statuses of it no longer count.`, record: null };
  if (item.kind === "lane") return describeLane(store, item);
  return { title: "No longer kept", text: "", record: null };
}

const recordOf = (store, item) => (item.kind === "read" ? store.record(store.reads, item.row) : item.kind === "write" ? store.record(store.writes, item.row) : null);

/** What the board said of a replica at a moment, and what later statuses prove. */
function describeLane(store, item) {
  const node = store.nodes[item.node];
  const primary = store.primaryAt(item.to);
  const flush = store.flush.last(item.to);
  const at = flush >= store.flush.head ? store.flush.get("lsn", flush) : NaN;
  if (item.node === primary) return { title: named(node.name, "primary"), text: Number.isNaN(at) ? "Nothing was known of it then." : `Known to have flushed ${lsnText(at)} by then.`, record: null };
  const belief = node.beliefs.last(item.to);
  const believed = belief >= node.beliefs.head ? node.beliefs.get("lsn", belief) : NaN;
  const title = named(node.name, "replica");
  if (Number.isNaN(believed)) return { title, text: "The board had no status of it then: it served no read.", record: null };
  const proof = node.proofs.find(item.to, true);
  const proves = proof < node.proofs.tail && node.endAfter(item.to) > node.proofs.get("t", proof);
  const next = proves ? node.proofs.get("lsn", proof) : NaN;
  const age = item.to - node.beliefs.get("t", belief);
  const believedText = `The observer believed it ${at > believed ? `${bytes(at - believed)} behind` : "caught up"}, from a status ${duration(age)} old.`;
  let truth = "No later status proves more.";
  if (next < believed) truth = `In truth it was at or before ${lsnText(next)}: ${bytes(believed - next)} less than believed.`;
  else if (next >= at) truth = `The next status, ${duration(node.proofs.get("t", proof) - item.to)} later, had it all.`;
  else if (!Number.isNaN(next)) truth = `The next status, ${duration(node.proofs.get("t", proof) - item.to)} later, still lacked ${bytes(at - next)} of it.`;
  return { title, text: `${believedText} ${truth}`, record: null };
}

const lsnText = (lsn) => `${Math.floor(lsn / 4294967296).toString(16).toUpperCase()}/${(lsn % 4294967296).toString(16).toUpperCase()}`;

export class Card {
  constructor(element, store, diagram, onclose, onstep) {
    Object.assign(this, { element, store, diagram });
    this.close = make("button", { type: "button", class: "close", "aria-label": "Close this card", text: "×", onclick: onclose });
    this.earlier = make("button", { type: "button", text: "← earlier", title: "The event before (left arrow in the diagram)", onclick: () => onstep(-1) });
    this.later = make("button", { type: "button", text: "later →", title: "The event after (right arrow in the diagram)", onclick: () => onstep(1) });
    this.shown = "";
    /** Pixels to the right of an item that stay free, for the word STALE. */
    this.gap = 22;
  }

  /** Shows an item (null: nothing) beside its place in the diagram. */
  show(item, pinned, from, to, y) {
    const key = item ? `${item.kind} ${item.id} ${item.node} ${item.to} ${pinned} ${item.row !== undefined && item.kind === "read" ? this.store.reads.get("way", item.row) : ""}` : "";
    if (!item) {
      this.element.hidden = true;
      this.shown = key;
      return;
    }
    if (key !== this.shown) this.fill(item, pinned);
    this.shown = key;
    this.element.hidden = false;
    this.place(from, to, y);
  }

  /** Fills the card again without moving it. */
  refresh(item) {
    if (!this.element.hidden) this.fill(item, false);
  }

  place(from, to, y) {
    const { element } = this;
    const box = element.parentElement.getBoundingClientRect();
    const [width, height] = [element.offsetWidth, element.offsetHeight];
    const [before, after] = [from - width - 22, Math.max(0, to) + this.gap];
    const left = after + width <= box.width ? after : before >= 0 ? before : box.width - width - 4;
    element.style.left = `${left}px`;
    element.style.top = `${Math.max(30, Math.min(y - 40, box.height - height - 6))}px`;
  }

  fill(item, pinned) {
    const { title, text, record } = describeItem(this.store, item);
    const way = item.kind === "read" ? WAYS[this.store.reads.get("way", item.row)] : null;
    this.gap = way?.name === "stale" ? 66 : 22;
    this.element.className = `card ${way ? `way-${way.name}` : `of-${item.kind}`}${pinned ? " pinned" : ""}`;
    const head = make("header", {}, make("h3", { text: title }));
    if (pinned) head.append(this.close);
    this.element.replaceChildren(head);
    if (text) this.element.append(make("p", { class: "words", text }));
    if (record) this.element.append(...(item.kind === "read" ? this.read(record, item) : this.write(record, item)));
    else this.element.append(fields([["at", this.wall(item.to)]]));
    if (pinned && item.kind !== "lane") this.element.append(make("footer", {}, this.earlier, this.later));
  }

  wall(t) {
    return clock(this.diagram.zeroMs + t, 6);
  }

  read(record, item) {
    const failed = this.store.reads.get("way", item.row) === FAILED;
    const rows = [
      sessionOf(record),
      ["arrived", this.wall(record.at)],
      ["decided", record.decided === null ? null : offset(record.decided - record.at)],
      ["done", offset(record.done - record.at)],
      ["waited", record.waited_ms ? duration(record.waited_ms) : null],
      ["reason", record.reason],
      ["routing", record.routing],
      ["status", failed || record.status !== 200 ? record.status : null],
      ["error", record.error],
      ["asked for", asked(record)],
      ["floor", floors(record)],
      ["replayed", replayed(record)],
      ["found", record.found === null || record.found === undefined ? null : record.found ? "yes" : "no"],
      ["on the page", record.rides === null || record.rides === undefined ? null : `${record.rides} rides`],
    ];
    const parts = [fields(rows)];
    if (record.candidates && record.candidates.length) parts.push(candidates(record));
    for (const one of record.tried || []) parts.push(make("p", { class: "tried" }, make("b", { text: `${one.node} failed: ` }), one.error));
    parts.push(tokens(record));
    return parts;
  }

  write(record, item) {
    const { writes, nodes } = this.store;
    const rows = [
      sessionOf(record),
      ["arrived", this.wall(record.at)],
      ["done", offset(record.done - record.at)],
      ["flush LSN", record.lsn],
      ["distance", record.distance],
      ["status", record.outcome === "ok" ? null : record.status],
      ["error", record.error],
    ];
    const body = make("tbody");
    if (record.outcome === "ok" && record.lsn) {
      for (const node of nodes) {
        if (node.name === record.node || node.number === this.store.primaryAt(record.done)) continue;
        const [lo, hi] = [writes.get(`lo${node.number}`, item.row), writes.get(`hi${node.number}`, item.row)];
        const when = Number.isNaN(hi) ? "not seen there yet" : `${offset(lo - record.done)} … ${offset(hi - record.done)}`;
        body.append(make("tr", {}, make("th", { scope: "row", text: node.name }), make("td", { text: when })));
      }
    }
    const table = make("table", {}, make("caption", { text: "Replayed between two statuses, after it was acknowledged" }), body);
    return [fields(rows), body.childElementCount ? table : null, tokens(record)].filter(Boolean);
  }
}

/** The session and its user; a user who sends no token has no session. */
function sessionOf(record) {
  return record.session === `user ${record.subject}` ? ["user", record.subject] : ["session", `${record.session} (${record.subject})`];
}

/** What a read asked to be shown. */
function asked(record) {
  const { freshness } = record;
  if (!freshness) return null;
  const words = { session: "what its session has written and seen", global: "all that was committed when it began", any: "any node" };
  return `${freshness}: ${words[freshness] ?? "nothing older"}`;
}

const ORIGINS = { token: "from its token", user: "from the user's row on the primary", primary: "the primary's flush LSN, asked after it began" };

function floors(record) {
  if (record.floor) return `${record.floor}, ${ORIGINS[record.floor_from]}`;
  return record.write_floor ? `${record.write_floor} (ignored under ${record.routing})` : null;
}

/** The replay LSN that the replica reported with its answer, against the floor. */
function replayed(record) {
  if (!record.replayed_lsn) return null;
  const floor = parseLsn(record.floor ?? record.write_floor);
  if (Number.isNaN(floor)) return record.replayed_lsn;
  const over = parseLsn(record.replayed_lsn) - floor;
  return `${record.replayed_lsn} (${over >= 0 ? `${bytes(over)} past the floor` : `${bytes(-over)} below the floor`})`;
}

function fields(rows) {
  const list = make("dl");
  for (const [name, value] of rows) {
    if (value === null || value === undefined || value === "") continue;
    list.append(make("dt", { text: name }), make("dd", { text: String(value) }));
  }
  return list;
}

function candidates(record) {
  const body = make("tbody");
  for (const one of record.candidates) {
    const fit = !one.obstacle;
    const behind = one.behind === null || one.behind === undefined ? "–" : one.behind > 0 ? `${bytes(one.behind)} below` : "at or past";
    body.append(
      make("tr", { class: one.name === record.node ? "chosen" : null },
        make("th", { scope: "row", text: one.name }), make("td", { text: one.vouched_lsn ?? "–" }), make("td", { text: behind }),
        make("td", { class: fit ? "fit" : "unfit", text: fit ? "✓ fit" : `✗ ${one.obstacle}` })),
    );
  }
  const names = ["replica", "believed at", "against the floor", "verdict"].map((text) => make("th", { scope: "col", text }));
  return make("table", {}, make("caption", { text: "The board at the decision" }), make("thead", {}, make("tr", {}, ...names)), body);
}

function tokens(record) {
  if (!record.sent && !record.got) return make("span");
  const details = make("details", {}, make("summary", { text: "session token" }));
  details.append(fields([["sent", record.sent ?? "none"], ["got", record.got ?? "none"]]));
  return details;
}
