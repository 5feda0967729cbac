// @ts-check
// What is known of one node's replay: what the board said at each moment, and what later looks proved.

import { parseLsn } from "./format.js";
import { Ring } from "./ring.js";

const SPANS = 200;

/** Faults that last, with the one that ends each, and what the span is called. */
const LASTING = { pause: "paused", freeze: "frozen", cut: "cut off", stop: "stopped", kill: "down" };
const ENDING = { resume: ["paused"], thaw: ["frozen"], mend: ["cut off"], start: ["stopped", "down"], restart: ["stopped", "down"] };

export class Replay {
  /** @param {string} name @param {number} number its place among the nodes */
  constructor(name, number) {
    this.name = name;
    this.number = number;
    const columns = { t: Float64Array, asked: Float64Array, lsn: Float64Array };
    /** What the observer put on the board, at the moment it did; lsn NaN: the status was taken away. */
    this.beliefs = new Ring(16384, columns);
    /** Every proof of what the node had replayed: the observer's looks, and what a read's answer named. */
    this.looks = new Ring(16384, columns);
    this.clear();
  }

  clear() {
    this.beliefs.clear();
    this.looks.clear();
    /** Shaded stretches: `{kind, from, to}`, `to` Infinity while it lasts. */
    this.spans = [];
    /** Moments at which the node was seen in another incarnation. */
    this.lives = [];
    /** Moments at which a life was ended on purpose: a look after one proves nothing of the time before it. */
    this.ends = [];
    /** When something was last done to the node. */
    this.disturbed = -Infinity;
    this.incarnation = null;
    this.status = null;
    this.role = null;
  }

  /** Takes in a `replica` event. */
  see(event) {
    const row = { t: event.answered ?? event.t, asked: event.asked ?? event.t, lsn: parseLsn(event.replay_lsn) };
    this.status = event;
    this.beliefs.push(row);
    if (event.incarnation && this.incarnation && event.incarnation !== this.incarnation) {
      this.lives.push({ t: row.asked, id: event.id, before: this.incarnation, now: event.incarnation });
      if (this.lives.length > SPANS) this.lives.shift();
    }
    this.incarnation = event.incarnation ?? this.incarnation;
    for (const span of this.spans) if (span.kind === "down" && span.to === Infinity && row.asked > span.from + 50) span.to = row.asked;
    return row;
  }

  /** Takes in a `gone` event: from here on the board says nothing. */
  lose(event) {
    this.status = null;
    this.beliefs.push({ t: event.t, asked: event.t, lsn: NaN });
  }

  /** Takes in a `fault` event on this node. */
  disturb(event) {
    if (!event.ok) return;
    this.disturbed = event.t;
    if (event.name === "kill" || event.name === "stop" || event.name === "restart") this.ends.push(event.t);
    for (const kind of ENDING[event.name] || []) this.end(kind, event.t);
    if (LASTING[event.name]) this.begin(LASTING[event.name], event.t);
  }

  /** What a tick says holds, whether or not its fault was seen. */
  settle(state, t) {
    if (t <= this.disturbed) return; // it was asked before the last fault
    const holds = { paused: state.paused, "cut off": state.cut, slowed: state.delay_ms > 0, frozen: state.state === "frozen" };
    holds.stopped = state.state === "stopped";
    for (const [kind, held] of Object.entries(holds)) {
      const open = this.spans.some((span) => span.kind === kind && span.to === Infinity);
      if (held && !open && !(kind === "stopped" && this.spans.some((span) => span.kind === "down" && span.to === Infinity))) this.begin(kind, t);
      else if (!held && open) this.end(kind, t);
    }
    if (state.state === "up") this.end("down", t);
  }

  begin(kind, t) {
    if (this.spans.some((span) => span.kind === kind && span.to === Infinity)) return;
    this.spans.push({ kind, from: t, to: Infinity });
    if (this.spans.length > SPANS) this.spans.shift();
  }

  end(kind, t) {
    for (const span of this.spans) if (span.kind === kind && span.to === Infinity) span.to = t;
  }

  /** When this node's life was next ended on purpose after a time; Infinity: not yet. */
  endAfter(time) {
    return this.ends.find((end) => end > time) ?? Infinity;
  }

  forget(time) {
    // The belief that still holds at the horizon is kept.
    this.beliefs.head = Math.max(this.beliefs.head, this.beliefs.last(time));
    this.looks.forget(time);
    this.spans = this.spans.filter((span) => span.to >= time);
    this.lives = this.lives.filter((life) => life.t >= time);
    this.ends = this.ends.filter((end) => end >= time);
  }
}
