// @ts-check
// Numbers as people read them. Times are milliseconds, sizes bytes.

const THIN = "\u202f";

/** "0/3000148" as a number, safe below 2^53; NaN where there is none. */
export function parseLsn(text) {
  if (!text) return NaN;
  const slash = text.indexOf("/");
  return parseInt(text.slice(0, slash), 16) * 4294967296 + parseInt(text.slice(slash + 1), 16);
}

/** A duration with three digits that count: "410 µs", "1.24 ms", "2.5 s", "3 min". */
export function duration(ms) {
  if (ms === null || ms === undefined || Number.isNaN(ms)) return "–";
  const size = Math.abs(ms);
  if (size < 1) return `${trim(ms * 1000, size * 1000)}${THIN}µs`;
  if (size < 1000) return `${trim(ms, size)}${THIN}ms`;
  if (size < 60000) return `${trim(ms / 1000, size / 1000)}${THIN}s`;
  return `${trim(ms / 60000, size / 60000)}${THIN}min`;
}

function trim(value, size) {
  const text = value.toFixed(size < 10 ? 2 : size < 100 ? 1 : 0);
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

/** A duration with its sign: "+1.24 ms", "−3 s". */
export const offset = (ms) => (ms < 0 ? "−" : "+") + duration(Math.abs(ms));

/** A size in bytes: "232 B", "1.4 kB", "16 MB". */
export function bytes(count) {
  if (count === null || count === undefined || Number.isNaN(count)) return "–";
  if (count < 1000) return `${Math.round(count)}${THIN}B`;
  if (count < 1e6) return `${trim(count / 1e3, count / 1e3)}${THIN}kB`;
  if (count < 1e9) return `${trim(count / 1e6, count / 1e6)}${THIN}MB`;
  return `${trim(count / 1e9, count / 1e9)}${THIN}GB`;
}

const WHOLE = new Intl.NumberFormat("en");

/** A whole number with separators: "12,345". */
export const count = (number) => WHOLE.format(number);

/** The wall clock at `epochMs`, with `digits` digits after the second (0, 3 or 6). */
export function clock(epochMs, digits = 3) {
  const whole = Math.floor(epochMs);
  const date = new Date(whole);
  const two = (n) => String(n).padStart(2, "0");
  const time = `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
  if (!digits) return time;
  const fraction = String(((whole % 1000) + 1000) % 1000).padStart(3, "0");
  const micros = digits > 3 ? THIN + String(Math.floor((epochMs - whole) * 1000)).padStart(3, "0") : "";
  return `${time}.${fraction}${micros}`;
}

/** The name of a session, without the domain of a user's address: "s12", "user ada". */
export const shortName = (session) => session.replace(/^user (.*)@[^@]*$/, "$1");

/** A node, with its role where its name suggests another one. */
export function named(node, role) {
  if (node === "primary" && role === "replica") return "primary (now a replica)";
  return node !== "primary" && role === "primary" ? `${node} (the primary)` : node ?? "no node";
}

/** "1 read", "2 reads". */
export const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
