// @ts-check
// The layout from top to bottom: axis, flags, one lane for each node, then the sessions.

import { OTHERS } from "./sessions.js";

const AXIS = 24;
const FLAGS = 20;
const GAP = 12;
/** Room for the ticks of reads below a node's baseline. */
const UNDER = 9;

/** The top of a lane: 16 MiB behind. */
const HIGHEST = Math.log2(1 + 16 * 1024 * 1024);

export class Lanes {
  constructor() {
    this.nodes = 0;
    this.shape(0, false);
  }

  /** Lays out the lanes for a number of nodes. */
  shape(nodes, small) {
    this.nodes = nodes;
    this.node = small ? 42 : 54;
    this.sessions = small ? 16 : 17;
    this.count = 8;
    this.axis = AXIS;
    this.flags = AXIS + FLAGS / 2 + 1;
    this.top = AXIS + FLAGS;
    this.bottomOfNodes = this.top + nodes * this.node;
    this.topOfSessions = this.bottomOfNodes + GAP;
    this.height = this.topOfSessions + (this.count + 1) * this.sessions + 6;
  }

  /** The line of a node's lane at which reads and replays meet it. */
  baseline(node) {
    return this.top + (node + 1) * this.node - UNDER;
  }

  laneTop(node) {
    return this.top + node * this.node;
  }

  /** The height above the baseline for a number of bytes behind: a logarithm. */
  lift(bytes) {
    return bytes > 0 ? (Math.min(HIGHEST, Math.log2(1 + bytes)) / HIGHEST) * (this.node - UNDER - 7) : 0;
  }

  session(lane) {
    const number = lane === OTHERS ? this.count : lane;
    return this.topOfSessions + (number + 0.5) * this.sessions;
  }

  /** The node whose lane contains this height; -1: none. */
  nodeAt(y) {
    const number = Math.floor((y - this.top) / this.node);
    return number >= 0 && number < this.nodes ? number : -1;
  }
}
