// @ts-check
// The canvas on which the diagram is painted, a little wider than the view. Painting costs many times as much as
// showing, so between two paintings, about ten a second, it is shifted along with the clock.

import { sizedContext } from "./dom.js";

/** Milliseconds until news is painted. */
const LONGEST_WAIT_MS = 100;
/** Pixels by which it is wider than the view. */
const SPARE_PX = 48;

export class Sheet {
  constructor() {
    this.canvas = document.createElement("canvas");
    this.appearance = "";
    this.version = -1;
    this.left = 0;
    this.paintedAt = 0;
  }

  /** The pixels by which the view has moved since the painting. */
  slid(view) {
    return ((view.left - this.left) / view.span) * view.width;
  }

  /** Whether it must be painted again; `appearance` stands for everything on it except time and events. */
  isStale(view, appearance, version) {
    const slid = this.slid(view);
    if (appearance !== this.appearance || slid < 0 || slid > SPARE_PX) return true;
    return (slid > 0 || version !== this.version) && performance.now() - this.paintedAt >= LONGEST_WAIT_MS;
  }

  /** Begins a painting: returns the context and the stretch of time to paint. */
  begin({ width, height }, view, appearance, version) {
    Object.assign(this, { appearance, version, left: view.left, paintedAt: performance.now() });
    const across = width + SPARE_PX;
    return { context: sizedContext(this.canvas, across, height).context, height, stretch: view.stretch(across) };
  }

  /** Shows the part that is in view. */
  show(context, view, width, height) {
    const ratio = this.canvas.height / height;
    const from = Math.round(this.slid(view) * ratio);
    const [across, down] = [Math.round(width * ratio), this.canvas.height];
    context.globalAlpha = 1;
    context.drawImage(this.canvas, from, 0, across, down, 0, 0, across / ratio, height);
  }
}
