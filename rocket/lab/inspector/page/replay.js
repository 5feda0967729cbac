// @ts-check
// One node's replay: what the board said at each moment, and what later statuses proved.

import { parseLsn } from "./format.js";
import { Ring } from "./ring.js";

const SPANS = 200;

/** Lasting faults with the names of their intervals, and the commands that undo them. */
const LASTING = { pause: "paused", freeze: "frozen", cut: "cut off", stop: "stopped", kill: "down" };
const UNDOES = { resume: ["paused"], thaw: ["frozen"], mend: ["cut off"], start: ["stopped", "down"], restart: ["stopped", "down"] };

export class Replay {
  /** @param {string} name @param {number} number its index among the nodes */
  constructor(name, number) {
    this.name = name;
    this.number = number;
    const columns = { t: Float64Array, asked: Float64Array, lsn: Float64Array };
    /** What the observer published on the board, and when; lsn NaN: it withdrew the status. */
    this.beliefs = new Ring(16384, columns);
    /** Every proof of what the node had replayed: statuses, and the replay LSN in the answer of a read. */
    this.proofs = new Ring(16384, columns);
    this.clear();
  }

  clear() {
    this.beliefs.clear();
    this.proofs.clear();
    /** Intervals of faults: `{kind, from, to}`, `to` Infinity while it lasts. */
    this.spans = [];
    /** When the node was first seen in another incarnation. */
    this.incarnations = [];
    /** When an incarnation was ended on purpose: a later status proves nothing of the time before. */
    this.ends = [];
    /** When a fault was last injected into the node. */
    this.disturbed = -Infinity;
    this.incarnation = null;
    this.status = null;
    this.role = null;
  }

  /** Takes in a `replica` event. */
  takeStatus(event) {
    const row = { t: event.answered ?? event.t, asked: event.asked ?? event.t, lsn: parseLsn(event.replay_lsn) };
    this.status = event;
    this.beliefs.push(row);
    if (event.incarnation && this.incarnation && event.incarnation !== this.incarnation) {
      this.incarnations.push({ t: row.asked, id: event.id, before: this.incarnation, now: event.incarnation });
      if (this.incarnations.length > SPANS) this.incarnations.shift();
    }
    this.incarnation = event.incarnation ?? this.incarnation;
    for (const span of this.spans) if (span.kind === "down" && span.to === Infinity && row.asked > span.from + 50) span.to = row.asked;
    return row;
  }

  /** Takes in a `gone` event: the board has no status of the node from then on. */
  takeGone(event) {
    this.status = null;
    this.beliefs.push({ t: event.t, asked: event.t, lsn: NaN });
  }

  /** Takes in a `fault` event on this node. */
  takeFault(event) {
    if (!event.ok) return;
    this.disturbed = event.t;
    if (event.name === "kill" || event.name === "stop" || event.name === "restart") this.ends.push(event.t);
    for (const kind of UNDOES[event.name] || []) this.end(kind, event.t);
    if (LASTING[event.name]) this.begin(LASTING[event.name], event.t);
  }

  /** Takes in the state of a tick, which holds even if the fault itself was not seen. */
  takeState(state, t) {
    if (t <= this.disturbed) return; // asked for before the last fault
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

  /** When this node's incarnation was next ended on purpose after a time; Infinity: not yet. */
  endAfter(time) {
    return this.ends.find((end) => end > time) ?? Infinity;
  }

  forget(time) {
    // The belief that still holds at the horizon is kept.
    this.beliefs.head = Math.max(this.beliefs.head, this.beliefs.last(time));
    this.proofs.forget(time);
    this.spans = this.spans.filter((span) => span.to >= time);
    this.incarnations = this.incarnations.filter((one) => one.t >= time);
    this.ends = this.ends.filter((end) => end >= time);
  }
}
