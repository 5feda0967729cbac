// @ts-check
// The stretch of time on show. Times are the journal's milliseconds.

export const SHORTEST_MS = 0.1;
export const LONGEST_SPAN_MS = 5 * 60 * 1000;

/** How much of the span lies to the right of "now" while the view follows it. */
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
    /** The span to which it goes back when it is live again, after `show` has closed in on something; null: as it is. */
    this.spanBefore = null;
  }

  /** Sets the page's clock by the server's: it is `t` there now. */
  setClock(t) {
    const skew = t - performance.now();
    // An event can't be from the future, and the way here takes time: the clock that is furthest ahead is the best.
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
    // Whoever asked for less motion gets it in steps.
    const step = CALM.matches ? this.span / 20 : 0;
    this.right = step ? Math.ceil(right / step) * step : right;
  }

  x(t) {
    return ((t - this.left) / this.span) * this.width;
  }

  time(x) {
    return this.left + (x / this.width) * this.span;
  }

  /** This stretch as it is now, of so many pixels at the same scale: one that time does not move. */
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

  /** Follows the clock again, at the scale of before it closed in on something. */
  goLive() {
    if (this.spanBefore !== null) this.span = this.spanBefore;
    this.spanBefore = null;
    this.following = true;
    this.advance();
    for (const listener of this.listeners) listener();
  }

  /** Scrolls by so many milliseconds; towards the past it stops following, up to now it goes on. */
  scroll(ms) {
    const latest = this.now + this.span * AHEAD;
    this.right = Math.min(latest, this.right + ms);
    this.follow(ms > 0 && this.right >= latest);
  }

  /** Zooms by a factor (below 1: closer) about a time. Closing in on one stops following, for it would run away. */
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

  /** Shows this stretch, with as much again around it, until it is live again. */
  show(from, to, least = 20) {
    this.spanBefore ??= this.span;
    this.span = Math.min(LONGEST_SPAN_MS, Math.max(SHORTEST_MS, least, (to - from) * 3));
    this.right = (from + to) / 2 + this.span / 2;
    this.follow(false);
    for (const listener of this.listeners) listener();
  }

  /** Scrolls just enough that this stretch is on show. */
  reveal(from, to) {
    const margin = this.span * 0.08;
    if (to - from > this.span) this.span = Math.min(LONGEST_SPAN_MS, (to - from) * 1.5);
    if (from < this.left + margin) this.right = from - margin + this.span;
    else if (to > this.right - margin) this.right = to + margin;
    for (const listener of this.listeners) listener();
  }
}
