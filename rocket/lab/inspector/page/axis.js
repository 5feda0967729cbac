// @ts-check
// The time axis: ticks at round steps from a minute down to ten microseconds, with the wall clock where it turns over.

import { clock, offset } from "./format.js";

const STEPS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 15000, 30000, 60000];
const LEAST_PX = 92;

/**
 * The ticks on show: `{t, text, whole}`. Those at a whole second (finer: at a whole millisecond, or tick `whole`) have
 * the wall clock as their text, the others how far they are from it.
 */
export function ticksOf(view, zeroMs) {
  const step = STEPS.find((one) => (one / view.span) * view.width >= LEAST_PX) || STEPS[STEPS.length - 1];
  const unit = step >= 1000 ? step : step >= 1 ? 1000 : 1;
  const digits = unit >= 1000 ? 0 : 3;
  const ticks = [];
  // Ticks are at round times of the wall clock, not of the event log.
  const shift = zeroMs % Math.max(60000, unit);
  const first = Math.ceil((view.left + shift) / step);
  const last = Math.floor((view.right + shift) / step);
  for (let number = first; number <= last; number++) {
    const shifted = number * step;
    const rest = Math.abs(shifted / unit - Math.round(shifted / unit)) * unit;
    const whole = rest < step / 100;
    const from = Math.floor(shifted / unit + 1e-9) * unit;
    const text = whole ? clock(Math.round(zeroMs + shifted - shift), digits) : offset(shifted - from);
    ticks.push({ t: shifted - shift, text, whole });
  }
  return { ticks, step, anchor: clock(zeroMs + view.left, digits ? 3 : 0) };
}
