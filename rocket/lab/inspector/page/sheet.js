// @ts-check
// What the diagram is painted on: a little wider than what is on show. To paint it costs many times what it costs to
// show it, so between two paintings, some ten a second, it is slid along with the clock.

import { sizedContext } from "./dom.js";

/** Milliseconds that what is new may wait to be seen. */
const LONGEST_WAIT_MS = 100;
/** Pixels by which it is wider. */
const SPARE_PX = 48;

export class Sheet {
  constructor() {
    this.canvas = document.createElement("canvas");
    this.look = "";
    this.version = -1;
    this.left = 0;
    this.paintedAt = 0;
  }

  /** How many pixels the view has moved on since it was painted. */
  slid(view) {
    return ((view.left - this.left) / view.span) * view.width;
  }

  /** Whether it has to be painted anew; `look` stands for all that changes what is on it beside time and events. */
  isStale(view, look, version) {
    const slid = this.slid(view);
    if (look !== this.look || slid < 0 || slid > SPARE_PX) return true;
    return (slid > 0 || version !== this.version) && performance.now() - this.paintedAt >= LONGEST_WAIT_MS;
  }

  /** Begins a painting: returns the context, and the stretch of time that is to be on it. */
  begin({ width, height }, view, look, version) {
    Object.assign(this, { look, version, left: view.left, paintedAt: performance.now() });
    const across = width + SPARE_PX;
    return { context: sizedContext(this.canvas, across, height).context, height, stretch: view.stretch(across) };
  }

  /** Shows the part that the view has come to. */
  show(context, view, width, height) {
    const ratio = this.canvas.height / height;
    const from = Math.round(this.slid(view) * ratio);
    const [across, down] = [Math.round(width * ratio), this.canvas.height];
    context.globalAlpha = 1;
    context.drawImage(this.canvas, from, 0, across, down, 0, 0, across / ratio, height);
  }
}
