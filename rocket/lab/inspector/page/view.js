// @ts-check
// The stretch of time in view. Times are the event log's milliseconds.

export const SHORTEST_MS = 0.1;
export const LONGEST_SPAN_MS = 5 * 60 * 1000;

/** The share of the span to the right of "now" while the view follows it. */
const AHEAD = 0.03;

const CALM = matchMedia("(prefers-reduced-motion: reduce)");

export class View {
  constructor() {
    this.span = 10000;
    this.right = 0;
    this.following = true;
    this.width = 1;
    this.listeners = [];
    this.skew = null;
    /** The span to restore when the view is live again after `show` has zoomed in; null: the present one. */
    this.spanBefore = null;
  }

  /** Sets the page's clock by the server's, which shows `t` now. */
  setClock(t) {
    const skew = t - performance.now();
    // An event is never from the future, and takes time to arrive: the clock that is furthest ahead is the best.
    if (this.skew === null || skew > this.skew) this.skew = skew;
  }

  resetClock(t) {
    this.skew = t - performance.now();
  }

  get now() {
    return this.skew === null ? 0 : performance.now() + this.skew;
  }

  get left() {
    return this.right - this.span;
  }

  /** Moves on with the clock, if it follows. */
  advance() {
    if (!this.following) return;
    const right = this.now + this.span * AHEAD;
    // With reduced motion, it moves in steps.
    const step = CALM.matches ? this.span / 20 : 0;
    this.right = step ? Math.ceil(right / step) * step : right;
  }

  x(t) {
    return ((t - this.left) / this.span) * this.width;
  }

  time(x) {
    return this.left + (x / this.width) * this.span;
  }

  /** A fixed copy of this stretch, with a width in pixels at the same scale. */
  stretch(width) {
    const { left, now } = this;
    const span = this.span * (width / this.width);
    return { left, right: left + span, span, width, now, x: (t) => ((t - left) / span) * width };
  }

  follow(following) {
    if (this.following === following) return;
    this.following = following;
    for (const listener of this.listeners) listener();
  }

  /** Follows the clock again, at the scale before `show` zoomed in. */
  goLive() {
    if (this.spanBefore !== null) this.span = this.spanBefore;
    this.spanBefore = null;
    this.following = true;
    this.advance();
    for (const listener of this.listeners) listener();
  }

  /** Scrolls by milliseconds; towards the past it stops following, at now it follows again. */
  scroll(ms) {
    const latest = this.now + this.span * AHEAD;
    this.right = Math.min(latest, this.right + ms);
    this.follow(ms > 0 && this.right >= latest);
  }

  /** Zooms by a factor (below 1: closer) around a time. Zooming in stops following, since the time would move out of view. */
  zoom(factor, about = null) {
    const span = Math.min(LONGEST_SPAN_MS, Math.max(SHORTEST_MS, this.span * factor));
    if (about !== null && !(this.following && factor > 1)) {
      this.right = about + (this.right - about) * (span / this.span);
      this.follow(false);
    } else if (!this.following) {
      const middle = this.right - this.span / 2;
      this.right = middle + span / 2;
    }
    this.span = span;
    this.advance();
    for (const listener of this.listeners) listener();
  }

  /** Shows a stretch, with as much on either side, until it is live again. */
  show(from, to, least = 20) {
    this.spanBefore ??= this.span;
    this.span = Math.min(LONGEST_SPAN_MS, Math.max(SHORTEST_MS, least, (to - from) * 3));
    this.right = (from + to) / 2 + this.span / 2;
    this.follow(false);
    for (const listener of this.listeners) listener();
  }

  /** Scrolls just enough to show a stretch. */
  reveal(from, to) {
    const margin = this.span * 0.08;
    if (to - from > this.span) this.span = Math.min(LONGEST_SPAN_MS, (to - from) * 1.5);
    if (from < this.left + margin) this.right = from - margin + this.span;
    else if (to > this.right - margin) this.right = to + margin;
    for (const listener of this.listeners) listener();
  }
}
