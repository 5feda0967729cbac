// @ts-check
// Traffic and the checker: the big number, rates, latencies, and reads a second by node.

import { byId, make, setText, sizedContext } from "./dom.js";
import { clock, count, duration, named, shortName } from "./format.js";

const SECONDS = 90;
/** Stale reads in the list: few enough to step over with the keyboard. The diagram leads to the others. */
const LISTED = 8;

export class Traffic {
  /** @param {(stale: any) => void} jump shows a stale read in the diagram */
  constructor(store, palette, jump) {
    Object.assign(this, { store, palette, jump });
    this.clear();
  }

  clear() {
    this.before = null;
    this.history = [];
    byId("stale-reads").replaceChildren();
    this.keys = "";
  }

  tick(tick) {
    const before = this.before;
    this.before = tick;
    this.stale(tick);
    setText(byId("p50"), duration(tick.p50_ms));
    setText(byId("p99"), duration(tick.p99_ms));
    for (const name of ["fallbacks", "waited", "retried", "failed", "writes"]) setText(byId(name), short(tick[name] ?? 0));
    const total = sum(tick.reads);
    for (const name of ["fallbacks", "waited", "retried"]) setText(byId(`${name}-share`), total ? share(tick[name] / total) : "");
    if (!before || tick.t <= before.t) return;
    const seconds = (tick.t - before.t) / 1000;
    const rates = this.store.nodes.map(({ name }) => Math.max(0, (tick.reads[name] ?? 0) - (before.reads[name] ?? 0)) / seconds);
    const rate = rates.reduce((a, b) => a + b, 0);
    setText(byId("reads-per-second"), rate < 10 ? rate.toFixed(1) : count(Math.round(rate)));
    this.history.push(rates);
    if (this.history.length > SECONDS) this.history.shift();
    this.key();
    this.draw();
  }

  stale(tick) {
    const guaranteed = tick.stale_by_routing["never-stale"] ?? 0;
    setText(byId("stale-count"), count(guaranteed));
    byId("verdict").classList.toggle("bad", guaranteed > 0);
    setText(byId("checked"), `of ${count(tick.checked)} reads checked`);
    const others = Object.entries(tick.stale_by_routing).filter(([routing]) => routing !== "never-stale");
    setText(byId("unguaranteed"), others.map(([routing, number]) => `${count(number)} under ${routing}`).join(", "));
  }

  /** Lists a stale read, the newest first. */
  found(event) {
    const list = byId("stale-reads");
    list.prepend(staleItem(event, this.jump, this.store));
    while (list.childElementCount > LISTED) list.lastElementChild.remove();
  }

  key() {
    const names = this.store.nodes.map((node) => node.name).join();
    if (names === this.keys) return;
    this.keys = names;
    const items = this.store.nodes.map((node) => {
      const swatch = make("i", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = `var(--node${node.number % 8})`;
      return make("li", {}, swatch, node.name);
    });
    byId("rate-key").replaceChildren(...items);
  }

  draw() {
    const sized = sizedContext(byId("rates"));
    if (!sized) return;
    const { context: pen, width, height } = sized;
    const totals = this.history.map((rates) => rates.reduce((a, b) => a + b, 0));
    const top = niceAbove(Math.max(1, ...totals));
    const step = (width - 30) / SECONDS;
    pen.clearRect(0, 0, width, height);
    pen.font = "10px ui-monospace, Menlo, Consolas, monospace";
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const part of [0, 0.5, 1]) {
      const y = height - 1 - part * (height - 10);
      pen.fillStyle = this.palette.line;
      pen.fillRect(30, Math.round(y), width - 30, 1);
      pen.fillStyle = this.palette.muted;
      pen.fillText(String(top * part), 25, Math.max(6, Math.min(height - 6, y)));
    }
    this.history.forEach((rates, number) => {
      const x = width - (this.history.length - number) * step;
      let y = height - 1;
      rates.forEach((rate, node) => {
        const size = (rate / top) * (height - 10);
        pen.fillStyle = this.palette.nodes[node % 8];
        pen.fillRect(x, y - size, Math.max(1, step - 0.7), size);
        y -= size;
      });
    });
    byId("rates").setAttribute("aria-label", `Reads a second by node, now ${Math.round(totals[totals.length - 1] ?? 0)}`);
  }
}

/** An entry of a list of stale reads. */
function staleItem(event, jump, store) {
  const wall = clock((store.zeroMs ?? 0) + event.done, 3);
  const button = make("button", { type: "button", class: "stale-read", "data-read": event.read, onclick: () => jump(event) },
    make("span", { class: "where", text: `◆ ${named(event.node, event.role)}, ${shortName(event.session)}` }), make("time", { text: wall }), make("span", { class: "what", text: event.text }));
  return make("li", {}, button);
}

/** A total in few characters: "12,345", "123k". */
const short = (total) => (total < 100000 ? count(total) : `${count(Math.floor(total / 1000))}k`);
const sum = (reads) => Object.values(reads).reduce((a, b) => a + b, 0);
const share = (part) => `${(100 * part).toFixed(part < 0.1 ? 1 : 0)}%`;

function niceAbove(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((one) => one * power).find((one) => one >= value) ?? value;
}
