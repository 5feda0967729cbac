// @ts-check
// One card for each node: its role, its position, its share of the reads, and its buttons.

import { make, setAttribute, setText, sizedContext } from "./dom.js";
import { bytes, count, duration, parseLsn } from "./format.js";

/** Toggle buttons: command, the one that undoes it, label, effect, the state that shows it pressed. */
const TOGGLES = [
  ["pause", "resume", "Pause", "Replay stands still until it is resumed", (state) => state.paused],
  ["delay", "delay", "Slow", "Every commit is replayed 300 ms late", (state) => state.delay_ms > 0],
  ["cut", "mend", "Cut", "The link to the primary is cut: it still answers reads, and receives nothing", (state) => state.cut],
  ["freeze", "thaw", "Freeze", "All its processes are stopped (SIGSTOP)", (state) => state.state === "frozen"],
  ["stop", "start", "Stop", "Shut down until it is started", (state) => state.state === "stopped"],
];
const ACTIONS = [
  ["restart", "Restart", "A quick restart"],
  ["kill", "Kill", "Crash it (SIGKILL); it is started again"],
  ["kill-backend", "Kill 1 backend", "Kill one of its backends: all its sessions end, and it recovers"],
  ["promote", "Promote", "Fence the primary and make this replica the primary"],
];
const OF_REPLICAS = new Set(["pause", "delay", "cut", "promote"]);
const LABELS = { receive: "received", replay: "replayed", connections: "in use" };
const LONGEST_LAG_MS = 60000;
const SLOW_MS = 300;
const SAMPLES = 240;

export class NodeCards {
  constructor(box, store, palette, send) {
    Object.assign(this, { box, store, palette, send });
  }

  /** Creates the cards for the nodes and controls of a hello. */
  build(hello) {
    this.cards = this.store.nodes.map((node) => this.card(node, hello.controls));
    this.box.replaceChildren(...this.cards.map((card) => card.element));
    this.before = null;
  }

  card(node, controls) {
    const parts = { node, lags: [], delays: [], buttons: {} };
    parts.role = make("span", { class: "badge" });
    parts.state = make("span", { class: "state" });
    parts.incarnation = make("p", { class: "incarnation" });
    parts.values = {};
    const list = make("dl");
    for (const name of ["timeline", "receive", "replay", "behind", "late", "reads", "connections"]) {
      parts.values[name] = make("dd", { text: "–", "data-value": name });
      const label = make("dt", { text: LABELS[name] ?? name, class: { behind: "of-bytes", late: "of-ms" }[name] });
      if (name === "receive") parts.receiveLabel = label;
      list.append(label, parts.values[name]);
    }
    parts.plot = make("canvas", { class: "plot", role: "img" });
    parts.element = make("article", { class: "node", "data-node": node.name, "aria-label": node.name },
      make("header", {}, make("h3", { text: node.name }), parts.role, parts.state), parts.incarnation, parts.plot, list);
    if (controls) parts.element.append(this.buttons(parts));
    return parts;
  }

  buttons(parts) {
    const box = make("div", { class: "commands" });
    const name = parts.node.name;
    for (const [command, undo, text, title, holds] of TOGGLES) {
      const press = () => {
        const held = button.getAttribute("aria-pressed") === "true";
        if (command === "delay") return this.send({ command, node: name, delay_ms: held ? 0 : SLOW_MS }, button);
        return this.send({ command: held ? undo : command, node: name }, button);
      };
      const button = make("button", { type: "button", "data-command": command, "aria-pressed": "false", title, onclick: press, text });
      parts.buttons[command] = { button, holds };
      box.append(button);
    }
    for (const [command, text, title] of ACTIONS) {
      const button = make("button", { type: "button", class: "acting", "data-command": command, title, text, onclick: () => this.send({ command, node: name }, button) });
      parts.buttons[command] = { button, holds: null };
      box.append(button);
    }
    return box;
  }

  /** Shows a tick, once a second. */
  tick(tick) {
    const primary = this.store.primaryAt(Infinity);
    const flush = this.store.flush;
    const flushed = flush.size ? flush.get("lsn", flush.tail - 1) : NaN;
    const total = Object.values(tick.reads).reduce((sum, reads) => sum + reads, 0);
    for (const card of this.cards) {
      const { node, values } = card;
      const status = node.status;
      const state = tick.states?.[node.name];
      const isPrimary = node.number === primary;
      const share = total ? Math.round((100 * (tick.reads[node.name] ?? 0)) / total) : 0;
      const uses = tick.connections?.[node.name];
      setText(card.role, isPrimary ? "primary" : "replica");
      card.element.classList.toggle("is-primary", isPrimary);
      this.state(card, state, status, isPrimary);
      // Without the cluster's own states, the timeline is the first part of the epoch's name.
      setText(values.timeline, String(state?.timeline ?? (parseInt(status?.epoch, 10) || "–")));
      setText(card.incarnation, (isPrimary ? status?.epoch && `epoch ${status.epoch}` : status?.incarnation) || "no status");
      card.incarnation.title = card.incarnation.textContent;
      setText(values.replay, isPrimary ? "–" : status?.replay_lsn ?? "–");
      setText(card.receiveLabel, isPrimary ? "flushed" : "received");
      setText(values.receive, (isPrimary ? status?.flush_lsn : status?.receive_lsn) ?? "–");
      const behind = isPrimary || !status ? NaN : status.lag_bytes ?? Math.max(0, flushed - parseLsn(status.replay_lsn));
      setText(values.behind, Number.isNaN(behind) ? "–" : behind > 0 ? bytes(behind) : "nothing");
      setText(values.late, isPrimary || !(status?.lag_ms > 0) ? "–" : duration(status.lag_ms));
      setText(values.reads, `${count(tick.reads[node.name] ?? 0)}, ${share}%`);
      setText(values.connections, uses ? `${uses.in_use} of ${uses.in_use + uses.idle}` : "–");
      card.lags.push(behind);
      card.delays.push(isPrimary || !status ? NaN : status.lag_ms ?? NaN);
      for (const samples of [card.lags, card.delays]) if (samples.length > SAMPLES) samples.shift();
      this.plot(card, isPrimary);
    }
  }

  state(card, state, status, isPrimary) {
    const words = [];
    if (state && state.state !== "up") words.push(state.state);
    if (state?.paused && state.state !== "paused") words.push("paused");
    if (state?.cut) words.push("cut off");
    if (state?.delay_ms > 0) words.push(`slow ${state.delay_ms} ms`);
    if (!words.length && !status) words.push("no status");
    setText(card.state, words.length ? words.join(", ") : "up");
    card.element.classList.toggle("is-disturbed", words.length > 0);
    const down = ["stopped", "down", "failed"].includes(state?.state);
    for (const [command, { button, holds }] of Object.entries(card.buttons)) {
      if (holds && state) setAttribute(button, "aria-pressed", Boolean(holds(state)));
      const useless = (isPrimary && OF_REPLICAS.has(command)) || (down && command !== "stop" && command !== "restart");
      if (button.disabled !== useless) button.disabled = useless;
    }
  }

  /** The last minutes on logarithmic scales: bytes behind as an area, the lag in time as a line. */
  plot(card, isPrimary) {
    const sized = sizedContext(card.plot);
    if (!sized) return;
    const { context: pen, width, height } = sized;
    const y = (behind) => height - 1.5 - (Math.min(24, Math.log2(1 + behind)) / 24) * (height - 4);
    const step = width / (SAMPLES - 1);
    pen.clearRect(0, 0, width, height);
    pen.fillStyle = this.palette.line;
    pen.fillRect(0, height - 1, width, 1);
    if (isPrimary) return setAttribute(card.plot, "aria-label", `${card.node.name} is the primary`);
    const first = SAMPLES - card.lags.length;
    pen.fillStyle = pen.strokeStyle = this.palette.behind;
    card.lags.forEach((behind, number) => {
      if (Number.isNaN(behind)) return;
      pen.globalAlpha = 0.25;
      pen.fillRect((first + number) * step, y(behind), step + 0.3, height - 1 - y(behind));
      pen.globalAlpha = 1;
      pen.fillRect((first + number) * step, y(behind) - 0.6, step + 0.3, 1.5);
    });
    const late = (ms) => height - 1.5 - (Math.log1p(Math.min(LONGEST_LAG_MS, ms)) / Math.log1p(LONGEST_LAG_MS)) * (height - 4);
    pen.strokeStyle = this.palette.accent;
    pen.lineWidth = 1.25;
    pen.beginPath();
    card.delays.forEach((ms, number) => {
      if (Number.isNaN(ms)) return;
      const [x, before] = [(first + number) * step, card.delays[number - 1]];
      if (number && !Number.isNaN(before)) pen.lineTo(x, late(ms));
      else pen.moveTo(x, late(ms));
      pen.lineTo(x + step, late(ms));
    });
    pen.stroke();
    const last = card.lags.length - 1;
    setAttribute(card.plot, "aria-label", `Bytes behind and milliseconds late over four minutes, now ${bytes(card.lags[last])} and ${duration(card.delays[last])}`);
  }
}
