// @ts-check
// The space-time diagram: a loop that shows the painted sheet, shifted along with the clock, and repaints it when
// something has changed.

import { make, setAttribute, setText, sizedContext } from "./dom.js";
import { shortName } from "./format.js";
import { writesOf } from "./items.js";
import { Lanes } from "./lanes.js";
import { paintCommits } from "./paint-commits.js";
import { paintAnchor, paintCrosshair, paintFlags, paintGrid, paintNow, paintRouting } from "./paint-frame.js";
import { paintBands, paintStatuses, paintNames, paintBaselines, paintSpans } from "./paint-nodes.js";
import { paintReads } from "./paint-reads.js";
import { WAYS, stamp } from "./palette.js";
import { Sheet } from "./sheet.js";

export class Diagram {
  constructor(canvas, labels, store, view, palette) {
    Object.assign(this, { canvas, labels, store, view, palette });
    this.lanes = new Lanes();
    this.hidden = new Set();
    /** The items under the pointer, and pinned. */
    this.hover = null;
    this.pinned = null;
    this.pointerX = null;
    this.frames = [];
    this.paint_ms = 0;
    this.seen = "";
    this.sheet = new Sheet();
    this.afterDraw = [];
    this.scene = { pen: null, view, store, lanes: this.lanes, palette, hidden: this.hidden, chosenWrites: new Set(), share: 1 };
    this.frame = this.frame.bind(this);
    requestAnimationFrame(this.frame);
  }

  /** Frames a second, as drawn over the last two seconds. */
  get fps() {
    const since = performance.now() - 2000;
    while (this.frames.length && this.frames[0] < since) this.frames.shift();
    return this.frames.length / 2;
  }

  /** Fits the lanes to the nodes and to the width of the page. */
  shape() {
    this.lanes.shape(this.store.nodes.length, this.canvas.clientWidth < 520);
    this.canvas.style.height = `${this.lanes.height}px`;
    this.labels.style.height = `${this.lanes.height}px`;
    this.labels.replaceChildren();
    this.seen = this.sheet.appearance = "";
    this.nodeLabels = this.store.nodes.map((node) => {
      const role = make("span", { class: "role" });
      const label = make("li", { class: "node-label" }, make("b", { text: node.name }), role);
      label.style.top = `${this.lanes.laneTop(node.number)}px`;
      label.style.height = `${this.lanes.node}px`;
      this.labels.append(label);
      return { label, role };
    });
    this.laneLabels = Array.from({ length: this.lanes.count + 1 }, (_, lane) => {
      const label = make("li", { class: "session-label", text: lane === this.lanes.count ? "others" : "" });
      label.style.top = `${this.lanes.session(lane === this.lanes.count ? 255 : lane) - this.lanes.sessions / 2}px`;
      label.style.height = `${this.lanes.sessions}px`;
      this.labels.append(label);
      return label;
    });
  }

  frame() {
    requestAnimationFrame(this.frame);
    const { view, store } = this;
    view.advance();
    const appearance = `${view.span} ${this.palette.version} ${this.hover?.kind}${this.hover?.id} ${this.pinned?.kind}${this.pinned?.id} ${this.pinned?.node} ${this.pinned?.to} ${this.canvas.clientWidth} ${window.devicePixelRatio} ${[...this.hidden]}`;
    const state = `${appearance} ${view.left} ${store.version} ${this.pointerX}`;
    if (document.hidden || state === this.seen || !store.nodes.length) return;
    const sized = sizedContext(this.canvas);
    if (!sized) return;
    this.seen = state;
    const began = performance.now();
    view.width = sized.width;
    if (this.sheet.isStale(view, appearance, store.version)) {
      this.paint(this.sheet.begin(sized, view, appearance, store.version));
      this.nameLanes();
    }
    this.draw(sized);
    this.paint_ms += (performance.now() - began - this.paint_ms) * 0.1;
    this.frames.push(began);
    for (const listener of this.afterDraw) listener();
  }

  /** Draws a frame: the sheet, and what moves independently of it. */
  draw({ context, width, height }) {
    const { scene, view } = this;
    scene.pen = context;
    this.sheet.show(context, view, width, height);
    paintAnchor(scene, this.zeroMs);
    paintNow(scene);
    if (this.pointerX !== null) paintCrosshair(scene, this.pointerX, this.pinned, this.zeroMs);
  }

  /** Paints everything on the sheet. */
  paint({ context, height, stretch }) {
    const { scene, view, store, palette } = this;
    scene.pen = context;
    scene.view = stretch;
    scene.chosenWrites.clear();
    for (const item of [this.hover, this.pinned]) for (const row of writesOf(store, item)) scene.chosenWrites.add(row);
    context.globalAlpha = 1;
    context.fillStyle = palette.surface;
    context.fillRect(0, 0, stretch.width, height);
    paintRouting(scene);
    paintGrid(scene, this.zeroMs);
    paintBaselines(scene);
    paintSpans(scene);
    paintBands(scene);
    paintStatuses(scene);
    this.paintAssignments(scene);
    paintCommits(scene);
    paintReads(scene);
    paintNames(scene);
    paintFlags(scene);
    for (const item of [this.pinned, this.hover]) if (item) this.paintChosen(scene, item);
    scene.view = view;
  }

  /** The wall clock, in milliseconds, at the event log's zero. */
  get zeroMs() {
    return this.zero ?? 0;
  }

  /** Names the sessions on their lanes, where each begins. */
  paintAssignments({ pen, view, store, lanes, palette }) {
    pen.font = "10px ui-monospace, Menlo, Consolas, monospace";
    pen.textBaseline = "middle";
    pen.textAlign = "left";
    pen.fillStyle = palette.muted;
    const each = pen.measureText("0").width;
    store.sessions.assignments.forEach((assignments, lane) => {
      let free = -Infinity;
      const y = lanes.session(lane);
      for (const assignment of assignments) {
        const x = view.x(assignment.from);
        const name = shortName(assignment.name);
        if (x > view.width || x + name.length * each < 0) continue;
        pen.fillRect(x - 3, y - 6, 1, 12);
        if (x < free) continue;
        pen.fillText(name, x + 1, y - 5);
        free = x + name.length * each + 8;
      }
    });
  }

  /** Updates the labels at the left: roles, and the session of each lane at the right edge of the view. */
  nameLanes() {
    const { view, store } = this;
    const primary = store.primaryAt(view.right);
    this.nodeLabels.forEach(({ label, role }, number) => {
      const state = store.nodes[number].spans.filter((span) => span.from <= view.right && span.to >= Math.min(view.right, view.now)).map((span) => span.kind);
      setText(role, state.length ? (number === primary ? ["primary", ...state] : state).join(", ") : number === primary ? "primary" : "replica");
      label.classList.toggle("is-primary", number === primary);
      label.classList.toggle("is-disturbed", state.length > 0);
    });
    store.sessions.assignments.forEach((assignments, lane) => {
      let name = "";
      for (const assignment of assignments) if (assignment.from <= view.right) name = assignment.name;
      setText(this.laneLabels[lane], shortName(name));
      setAttribute(this.laneLabels[lane], "title", name);
    });
    setText(this.laneLabels[this.lanes.count], shortName(this.pinned?.session ?? "others"));
  }

  paintChosen({ pen, view, store, lanes, palette }, item) {
    if (item.kind === "lane" && item !== this.pinned) return;
    pen.globalAlpha = 1;
    if (item.kind === "lane") return ring(pen, palette, view.x(item.to), lanes.baseline(item.node), 6);
    if (item.kind !== "read") {
      const row = item.row;
      const y = item.kind === "write" ? lanes.baseline(store.writes.get("node", row) === 255 ? 0 : store.writes.get("node", row)) : item.kind === "incarnation" ? lanes.laneTop(item.node) + 9 : lanes.flags;
      ring(pen, palette, view.x(item.to), y, 9);
      return;
    }
    const reads = store.reads;
    const [x0, x1, x2] = [view.x(item.from), view.x(reads.get("decided", item.row)), view.x(item.to)];
    const home = reads.get("node", item.row);
    const way = WAYS[reads.get("way", item.row)];
    const [y0, y1] = [lanes.session(reads.get("lane", item.row)), home === 255 ? lanes.bottomOfNodes + 4 : lanes.baseline(home)];
    for (const [colour, width] of [[palette.surface, way.width + 6], [palette.ways[reads.get("way", item.row)], way.width + 1.5]]) {
      pen.strokeStyle = /** @type {string} */ (colour);
      pen.lineWidth = /** @type {number} */ (width);
      pen.lineJoin = "round";
      pen.beginPath();
      pen.moveTo(x0, y0);
      if (x1 - x0 > 3) pen.lineTo(x1, y0);
      pen.lineTo(x1, y1);
      pen.lineTo(x2, y1);
      pen.lineTo(x2, y0);
      pen.stroke();
    }
    stamp(pen, way.shape, x1, y1, way.shape === "diamond" ? 8 : 5, palette.ways[reads.get("way", item.row)], palette.surface);
    ring(pen, palette, x1, y1, 12);
    ring(pen, palette, x0, y0, 6);
  }
}

function ring(pen, palette, x, y, radius) {
  pen.strokeStyle = palette.ink;
  pen.lineWidth = 1.75;
  pen.beginPath();
  pen.arc(x, y, radius, 0, 7);
  pen.stroke();
}
