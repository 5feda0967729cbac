// @ts-check
// The assignment of lanes to sessions. An active session keeps its lane, so that lanes don't jump; past requests stay in
// the lane that their session had then.

/** The lane of sessions without a lane of their own. */
export const OTHERS = 255;

const IDLE_MS = 8000;
const NEWCOMER_IDLE_MS = 1500;

export class Sessions {
  /** @param {number} lanes their number; the last two are reassigned quickly, for short sessions */
  constructor(lanes) {
    this.lanes = lanes;
    this.clear();
  }

  clear() {
    this.holders = Array.from({ length: this.lanes }, () => null);
    /** For each lane, its sessions and when each got it: `{name, from}`. */
    this.assignments = Array.from({ length: this.lanes }, () => []);
    this.numbers = new Map();
    this.next = 1;
  }

  /** The number of a session, which stays the same while the session is kept. */
  number(name, t) {
    let known = this.numbers.get(name);
    if (!known) this.numbers.set(name, (known = { number: this.next++, t }));
    known.t = t;
    return known.number;
  }

  /** The lane of a session that was active between `from` and `to`. */
  lane(name, from, to) {
    let best = -1;
    for (let lane = 0; lane < this.lanes; lane++) {
      const holder = this.holders[lane];
      if (holder && holder.name === name) {
        holder.until = Math.max(holder.until, to);
        return lane;
      }
      const idle = lane < this.lanes - 2 ? IDLE_MS : NEWCOMER_IDLE_MS;
      const free = !holder || from - holder.until > idle;
      if (free && (best < 0 || (this.holders[best] && (!holder || holder.until < this.holders[best].until)))) best = lane;
    }
    if (best < 0) return OTHERS;
    this.holders[best] = { name, until: to };
    this.assignments[best].push({ name, from });
    return best;
  }

  forget(time) {
    for (const assignments of this.assignments) while (assignments.length > 1 && assignments[1].from < time) assignments.shift();
    if (this.numbers.size > 4000) {
      for (const [name, known] of this.numbers) if (known.t < time) this.numbers.delete(name);
    }
  }
}
