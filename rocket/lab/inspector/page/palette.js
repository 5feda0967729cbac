// @ts-check
// What distinguishes reads: colour (after Okabe and Ito), shape and width. The colours themselves are in the CSS.

export const REPLICA = 0;
export const WAITED = 1;
export const RETRIED = 2;
export const PRIMARY = 3;
export const FAILED = 4;
export const STALE = 5;

/** By number: the name of the CSS colour, the texts of card and legend, line width and shape. */
export const WAYS = [
  { name: "replica", words: "by a replica", short: "replica", width: 1, shape: "dot" },
  { name: "waited", words: "after a wait", short: "after a wait", width: 1.5, shape: "ring" },
  { name: "retried", words: "retried on another replica", short: "retried", width: 1.5, shape: "triangle" },
  { name: "primary", words: "by the primary", short: "to the primary", width: 1.5, shape: "square" },
  { name: "failed", words: "failed", short: "failed", width: 1.75, shape: "cross" },
  { name: "stale", words: "STALE", short: "stale", width: 3.5, shape: "diamond" },
];

/** Which way a `read` event went. */
export function wayOf(event) {
  if (event.outcome !== "ok") return FAILED;
  if (event.role === "primary") return PRIMARY;
  if (event.reason === "caught-up-after-wait") return WAITED;
  if (event.reason === "retried" || (event.tried && event.tried.length)) return RETRIED;
  return REPLICA;
}

const NAMES = ["ink", "muted", "faint", "line", "ground", "surface", "raised", "commit", "behind", "ahead", "fault", "accent"];

/** The scheme's colours, read from the CSS once for each scheme. */
export class Palette {
  constructor() {
    this.read();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.read());
  }

  read() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    for (const name of NAMES) this[name] = colour(name);
    this.ways = WAYS.map((way) => colour(way.name));
    this.nodes = Array.from({ length: 8 }, (_, number) => colour(`node${number}`));
    this.hatches = {};
    this.version = (this.version || 0) + 1;
  }

  /** A pattern of diagonal lines in the colour of this name. */
  hatch(context, name, gap = 7) {
    const key = name + gap;
    if (!this.hatches[key]) {
      const tile = document.createElement("canvas");
      tile.width = tile.height = gap;
      const pen = /** @type {CanvasRenderingContext2D} */ (tile.getContext("2d"));
      pen.strokeStyle = this[name];
      pen.lineWidth = 1.2;
      pen.beginPath();
      for (const shift of [-gap, 0, gap]) {
        pen.moveTo(shift, gap);
        pen.lineTo(shift + gap, 0);
      }
      pen.stroke();
      this.hatches[key] = context.createPattern(tile, "repeat");
    }
    return this.hatches[key];
  }
}

/** Puts the shape of a way, or of a commit, at a point. @param {CanvasRenderingContext2D} pen */
export function stamp(pen, shape, x, y, size, colour, ground) {
  pen.beginPath();
  pen.lineWidth = 1.5;
  pen.strokeStyle = pen.fillStyle = colour;
  if (shape === "dot" || shape === "ring") {
    pen.arc(x, y, size, 0, 7);
    if (shape === "ring") pen.fillStyle = ground;
    pen.fill();
    if (shape === "ring") pen.stroke();
  } else if (shape === "square") {
    pen.fillRect(x - size, y - size, 2 * size, 2 * size);
  } else if (shape === "cross") {
    pen.lineWidth = 2;
    pen.moveTo(x - size, y - size);
    pen.lineTo(x + size, y + size);
    pen.moveTo(x + size, y - size);
    pen.lineTo(x - size, y + size);
    pen.stroke();
  } else if (shape === "triangle") {
    pen.moveTo(x, y - size * 1.2);
    pen.lineTo(x + size * 1.2, y + size);
    pen.lineTo(x - size * 1.2, y + size);
    pen.fill();
  } else {
    const half = size * 1.5;
    pen.moveTo(x, y - half);
    pen.lineTo(x + half, y);
    pen.lineTo(x, y + half);
    pen.lineTo(x - half, y);
    pen.closePath();
    pen.fill();
    pen.strokeStyle = ground;
    pen.stroke();
    pen.fillStyle = ground;
    pen.font = `700 ${Math.round(size * 2)}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillText("!", x, y + 0.5);
  }
}
