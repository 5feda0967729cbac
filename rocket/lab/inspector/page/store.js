// @ts-check
// Everything that the page keeps, in bounded memory: typed columns to draw from, and the text of each batch, from which
// a record is parsed again when it is shown.

import { parseLsn } from "./format.js";
import { STALE, wayOf } from "./palette.js";
import { Replay } from "./replay.js";
import { Ring } from "./ring.js";
import { Sessions } from "./sessions.js";

export const MOST_EVENTS = 60000;
export const LONGEST_MS = 10 * 60 * 1000;
const NODES = 16;
const MARKS = 1000;
const PLACE = { id: Float64Array, batch: Uint32Array, place: Uint16Array, node: Uint8Array, session: Uint32Array, lane: Uint8Array };

export class Store {
  constructor() {
    this.reads = new Ring(65536, { t: Float64Array, at: Float64Array, decided: Float64Array, way: Uint8Array, tried: Uint16Array, waited: Uint8Array, ...PLACE });
    const edges = {};
    for (let node = 0; node < NODES; node++) edges[`lo${node}`] = edges[`hi${node}`] = Float64Array;
    this.writes = new Ring(16384, { t: Float64Array, at: Float64Array, lsn: Float64Array, ok: Uint8Array, ...PLACE, ...edges });
    /** The primary's flush LSN, in steps. */
    this.flush = new Ring(32768, { t: Float64Array, lsn: Float64Array });
    this.sessions = new Sessions(8);
    this.nodes = [];
    this.listeners = [];
    this.clear();
  }

  /** Takes in the greeting of a connection. */
  open(hello) {
    this.hello = hello;
    if (hello.nodes.join() !== this.nodes.map((node) => node.name).join()) {
      this.nodes = hello.nodes.slice(0, NODES).map((name, number) => new Replay(name, number));
      this.clear();
      this.numbers = new Map(this.nodes.map((node) => [node.name, node.number]));
    }
  }

  clear() {
    for (const ring of [this.reads, this.writes, this.flush]) ring.clear();
    for (const node of this.nodes) node.clear();
    this.sessions.clear();
    this.batches = new Map();
    this.batch = 0;
    this.held = 0;
    /** Events that are shown as flags: faults, routing, simulator, scenario, skipped. */
    this.marks = [];
    this.stale = [];
    /** The primaries, oldest first: `{node, from}`. */
    this.primaries = [];
    this.tick = null;
    /** Nothing before this time is kept. */
    this.horizon = -Infinity;
    this.longest = 50;
    this.firstPending = this.nodes.map(() => this.writes.tail);
    this.version = 0;
  }

  /** Takes in one batch, as the text that came. Calls the listeners with each event that is not a replica's status. */
  take(text) {
    const events = JSON.parse(text);
    if (!events.length) return;
    if (this.horizon === -Infinity) this.horizon = events[0].t;
    const number = ++this.batch;
    this.batches.set(number, { text, count: events.length, t: events[events.length - 1].t });
    this.held += events.length;
    events.forEach((event, place) => {
      this.takeOne(event, number, place);
      if (event.kind !== "replica") for (const listener of this.listeners) listener(event);
    });
    this.version++;
    this.forget(events[events.length - 1].t);
  }

  takeOne(event, batch, place) {
    const node = this.nodes[this.numbers.get(event.name ?? event.node) ?? -1];
    if (event.kind === "read") this.takeRead(event, batch, place, node);
    else if (event.kind === "write") this.takeWrite(event, batch, place, node);
    else if (event.kind === "replica") node && this.takeProof(node, node.takeStatus(event));
    else if (event.kind === "primary") this.takePrimary(event, node);
    else if (event.kind === "gone") node && node.takeGone(event);
    else if (event.kind === "stale") this.takeStale(event);
    else if (event.kind === "tick") this.takeTick(event);
    else {
      if (event.kind === "fault") this.nodes[this.numbers.get(event.node) ?? -1]?.takeFault(event);
      this.marks.push(event);
      if (this.marks.length > MARKS) this.marks.shift();
    }
  }

  takeRead(event, batch, place, node) {
    let tried = 0;
    for (const one of event.tried || []) tried |= 1 << (this.numbers.get(one.node) ?? 15);
    const row = { t: event.done, at: event.at, decided: event.decided ?? event.done, way: wayOf(event), tried, waited: event.waited_ms ? 1 : 0, ...this.placed(event, batch, place, node) };
    this.longest = Math.max(this.longest, Math.min(30000, event.done - event.at));
    this.reads.push(row);
    const shown = parseLsn(event.replayed_lsn);
    if (node && !Number.isNaN(shown)) this.takeProof(node, { t: event.done, asked: event.decided ?? event.at, lsn: shown });
  }

  takeWrite(event, batch, place, node) {
    const lsn = event.outcome === "ok" ? parseLsn(event.lsn) : NaN;
    const row = { t: event.done, at: event.at, lsn, ok: event.outcome === "ok" ? 1 : event.outcome === "unknown" ? 2 : 0, ...this.placed(event, batch, place, node) };
    for (const { number } of this.nodes) row[`lo${number}`] = row[`hi${number}`] = NaN;
    this.longest = Math.max(this.longest, Math.min(30000, event.done - event.at));
    if (!Number.isNaN(lsn)) {
      for (const replica of this.nodes) if (replica !== node) this.seenAlready(replica, row);
      this.raise(event.done, lsn);
    }
    this.writes.push(row);
  }

  placed(event, batch, place, node) {
    const lane = this.sessions.lane(event.session, event.at, event.done);
    return { id: event.id, batch, place, node: node ? node.number : 255, session: this.sessions.number(event.session, event.t), lane };
  }

  /** Notes a commit that a replica has replayed before its write was answered. */
  seenAlready(replica, row) {
    const proofs = replica.proofs;
    let found = proofs.tail;
    while (found > proofs.head && proofs.get("t", found - 1) >= row.at && proofs.get("lsn", found - 1) >= row.lsn) found--;
    if (found === proofs.tail) return;
    row[`hi${replica.number}`] = proofs.get("t", found);
    row[`lo${replica.number}`] = found > proofs.head ? Math.max(row.at, proofs.get("asked", found - 1)) : row.at;
  }

  /** Takes in a proof of what a node has replayed: every pending commit up to there is replayed. */
  takeProof(node, row) {
    const before = node.proofs.size ? node.proofs.get("asked", node.proofs.tail - 1) : -Infinity;
    node.proofs.push(row);
    const [writes, hi, lo] = [this.writes, `hi${node.number}`, `lo${node.number}`];
    let pending = Math.max(this.firstPending[node.number], writes.head);
    let stuck = false;
    for (let write = pending; write < writes.tail; write++) {
      const at = write & writes.mask;
      const open = Number.isNaN(writes.columns[hi][at]) && !Number.isNaN(writes.columns.lsn[at]) && writes.columns.node[at] !== node.number;
      if (open && writes.columns.lsn[at] <= row.lsn && row.t >= writes.columns.at[at]) {
        writes.columns[hi][at] = row.t;
        writes.columns[lo][at] = Math.max(before, writes.columns.at[at]);
      } else if (open) {
        stuck = true;
        // LSNs rise with time: later writes are not replayed either, except those that overlapped.
        if (writes.columns.lsn[at] > row.lsn + 65536) break;
      }
      if (!stuck) pending = write + 1;
    }
    this.firstPending[node.number] = pending;
  }

  takePrimary(event, node) {
    if (node && !event.lost && this.primaries[this.primaries.length - 1]?.node !== node.number) {
      this.primaries.push({ node: node.number, from: event.asked ?? event.t });
      if (this.primaries.length > 1) this.firstPending = this.nodes.map(() => this.writes.tail);
      this.flushed = 0;
    }
    if (node) node.status = event;
    if (!event.lost) this.raise(event.asked ?? event.t, parseLsn(event.flush_lsn));
  }

  raise(t, lsn) {
    if (lsn > (this.flushed || 0)) this.flush.push({ t, lsn: (this.flushed = lsn) });
  }

  takeStale(event) {
    const row = this.readOf(event.read);
    if (row >= 0) this.reads.columns.way[row & this.reads.mask] = STALE;
    this.stale.push(event);
    if (this.stale.length > MARKS) this.stale.shift();
  }

  takeTick(event) {
    this.tick = event;
    for (const [name, state] of Object.entries(event.states || {})) this.nodes[this.numbers.get(name) ?? -1]?.takeState(state, event.states_at ?? event.t);
  }

  /** The row of the read with this event id; -1 if it is no longer held. */
  readOf(id) {
    for (let row = this.reads.tail - 1; row >= this.reads.head; row--) if (this.reads.get("id", row) === id) return row;
    return -1;
  }

  /** The whole record behind a row of reads or writes. */
  record(ring, row) {
    const batch = this.batches.get(ring.get("batch", row));
    return batch ? JSON.parse(batch.text)[ring.get("place", row)] : null;
  }

  /** The node that was the primary at a time; -1: none known. */
  primaryAt(time) {
    let node = this.primaries.length ? this.primaries[0].node : 0;
    for (const primary of this.primaries) if (primary.from <= time) node = primary.node;
    return node;
  }

  forget(now) {
    const before = this.horizon;
    for (const [number, batch] of this.batches) {
      if (this.held <= MOST_EVENTS && batch.t >= now - LONGEST_MS) break;
      this.batches.delete(number);
      this.held -= batch.count;
      this.horizon = batch.t;
    }
    if (this.horizon === before) return;
    this.reads.forget(this.horizon);
    this.writes.forget(this.horizon);
    this.flush.head = Math.max(this.flush.head, this.flush.last(this.horizon));
    for (const node of this.nodes) node.forget(this.horizon);
    while (this.marks.length && this.marks[0].t < this.horizon) this.marks.shift();
    while (this.primaries.length > 1 && this.primaries[1].from < this.horizon) this.primaries.shift();
    this.sessions.forget(this.horizon);
  }
}
