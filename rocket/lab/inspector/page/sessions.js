// @ts-check
// Which sessions have a lane. A lane stays with its session as long as that is active, so that lanes don't jump about;
// what a session did is drawn in the lane that it had then.

/** The lane of the sessions that have none of their own. */
export const OTHERS = 255;

const IDLE_MS = 8000;
const NEWCOMER_IDLE_MS = 1500;

export class Sessions {
  /** @param {number} lanes how many; the last two change hands quickly, for sessions that come and go */
  constructor(lanes) {
    this.lanes = lanes;
    this.clear();
  }

  clear() {
    this.holders = Array.from({ length: this.lanes }, () => null);
    /** For each lane, who had it from when on: `{name, from}`. */
    this.tenures = Array.from({ length: this.lanes }, () => []);
    this.numbers = new Map();
    this.next = 1;
  }

  /** The number of a session; the same as long as it is remembered. */
  number(name, t) {
    let known = this.numbers.get(name);
    if (!known) this.numbers.set(name, (known = { number: this.next++, t }));
    known.t = t;
    return known.number;
  }

  /** The lane of a session that did something between `from` and `to`. */
  lane(name, from, to) {
    let best = -1;
    for (let lane = 0; lane < this.lanes; lane++) {
      const holder = this.holders[lane];
      if (holder && holder.name === name) {
        holder.until = Math.max(holder.until, to);
        return lane;
      }
      const patience = lane < this.lanes - 2 ? IDLE_MS : NEWCOMER_IDLE_MS;
      const free = !holder || from - holder.until > patience;
      if (free && (best < 0 || (this.holders[best] && (!holder || holder.until < this.holders[best].until)))) best = lane;
    }
    if (best < 0) return OTHERS;
    this.holders[best] = { name, until: to };
    this.tenures[best].push({ name, from });
    return best;
  }

  forget(time) {
    for (const tenures of this.tenures) while (tenures.length > 1 && tenures[1].from < time) tenures.shift();
    if (this.numbers.size > 4000) {
      for (const [name, known] of this.numbers) if (known.t < time) this.numbers.delete(name);
    }
  }
}
