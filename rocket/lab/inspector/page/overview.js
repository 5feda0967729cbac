// @ts-check
// A thin strip of everything kept: reads a second, stale reads, faults, and the stretch that the diagram shows.

import { sizedContext } from "./dom.js";
import { LONGEST_MS } from "./store.js";
import { PRIMARY, REPLICA, STALE } from "./palette.js";

const BIN_MS = 2000;
const BINS = LONGEST_MS / BIN_MS + 2;

export class Overview {
  constructor(canvas, store, view, palette) {
    Object.assign(this, { canvas, store, view, palette });
    this.clear();
    const go = (event) => {
      if (!(event.buttons & 1)) return;
      const box = canvas.getBoundingClientRect();
      const t = this.from + ((event.clientX - box.left) / box.width) * (view.now - this.from);
      view.follow(false);
      view.right = Math.min(view.now + view.span * 0.03, t + view.span / 2);
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      go(event);
    });
    canvas.addEventListener("pointermove", go);
  }

  clear() {
    this.plain = new Uint16Array(BINS);
    this.notable = new Uint16Array(BINS);
    this.numbers = new Float64Array(BINS).fill(-1);
  }

  /** Counts a read. */
  count(event) {
    const number = Math.floor(event.t / BIN_MS);
    const at = ((number % BINS) + BINS) % BINS;
    if (this.numbers[at] !== number) {
      this.numbers[at] = number;
      this.plain[at] = this.notable[at] = 0;
    }
    if (event.outcome === "ok" && event.role !== "primary") this.plain[at]++;
    else this.notable[at]++;
  }

  get from() {
    return Math.max(this.view.now - LONGEST_MS, Math.min(this.view.now - 60000, 0));
  }

  draw() {
    const sized = sizedContext(this.canvas);
    if (!sized) return;
    const { context: pen, width, height } = sized;
    const { view, palette, store, from } = this;
    const x = (t) => ((t - from) / (view.now - from)) * width;
    pen.clearRect(0, 0, width, height);
    let most = 10;
    for (let bin = 0; bin < BINS; bin++) if (this.numbers[bin] * BIN_MS >= from) most = Math.max(most, this.plain[bin] + this.notable[bin]);
    const each = x(from + BIN_MS);
    for (let bin = 0; bin < BINS; bin++) {
      if (this.numbers[bin] < 0 || (this.numbers[bin] + 1) * BIN_MS < from) continue;
      const left = x(this.numbers[bin] * BIN_MS);
      const [plain, notable] = [(this.plain[bin] / most) * (height - 6), (this.notable[bin] / most) * (height - 6)];
      pen.globalAlpha = 0.55;
      pen.fillStyle = palette.ways[REPLICA];
      pen.fillRect(left, height - plain, Math.max(1, each - 0.6), plain);
      pen.fillStyle = palette.ways[PRIMARY];
      pen.fillRect(left, height - plain - notable, Math.max(1, each - 0.6), notable);
    }
    pen.globalAlpha = 1;
    for (const mark of store.marks) {
      if (mark.kind === "skipped") continue;
      pen.fillStyle = mark.kind === "fault" ? palette.fault : palette.accent;
      pen.fillRect(x(mark.t) - 0.5, 0, 1.5, 5);
    }
    pen.fillStyle = palette.ways[STALE];
    for (const stale of store.stale) pen.fillRect(x(stale.done) - 1.5, 0, 3, height);
    const [left, right] = [x(view.left), Math.min(width, x(view.right))];
    pen.fillStyle = palette.ink;
    pen.globalAlpha = 0.08;
    pen.fillRect(left, 0, Math.max(3, right - left), height);
    pen.globalAlpha = 0.9;
    pen.strokeStyle = palette.ink;
    pen.lineWidth = 1.25;
    pen.strokeRect(Math.min(left, width - 3.5) + 0.6, 0.6, Math.max(2.5, right - left - 1.2), height - 1.2);
    pen.globalAlpha = 1;
  }
}
