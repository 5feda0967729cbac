// @ts-check
// The pointer on the diagram: hover, click, drag, wheel, and two fingers.

import { itemAt } from "./items.js";

const CLICK_PX = 5;

export class Gestures {
  /** @param {any} stage the element @param {any} diagram @param {any} hooks `hover(item, x, y)` and `pick(item, y)` */
  constructor(stage, diagram, hooks) {
    Object.assign(this, { stage, diagram, hooks });
    this.pointers = new Map();
    this.moved = 0;
    const canvas = diagram.canvas;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
  }

  point(event) {
    const box = this.diagram.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  down(event) {
    if (event.button) return;
    this.pointers.set(event.pointerId, this.point(event));
    if (this.pointers.size === 1) this.moved = 0;
    this.diagram.canvas.setPointerCapture(event.pointerId);
  }

  move(event) {
    const { view } = this.diagram;
    const [before, now] = [this.pointers.get(event.pointerId), this.point(event)];
    if (before) {
      const others = [...this.pointers.entries()].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
      this.moved += Math.hypot(now.x - before.x, now.y - before.y);
      if (others.length) {
        const [apart, closer] = [Math.abs(before.x - others[0].x), Math.abs(now.x - others[0].x)];
        if (apart > 8 && closer > 8) view.zoom(apart / closer, view.time((now.x + others[0].x) / 2));
      }
      if (this.moved > CLICK_PX) {
        view.scroll(((before.x - now.x) / view.width) * view.span / (others.length ? 2 : 1));
        this.stage.classList.add("dragging");
        this.hooks.hover(null, 0, 0);
      }
      this.pointers.set(event.pointerId, now);
      return;
    }
    if (event.pointerType === "touch") return;
    this.diagram.pointerX = now.x;
    this.hooks.hover(itemAt(this.diagram.scene, now.x, now.y), now.x, now.y);
  }

  up(event) {
    if (!this.pointers.delete(event.pointerId)) return;
    if (!this.pointers.size) this.stage.classList.remove("dragging");
    if (this.moved > CLICK_PX || this.pointers.size) return;
    const { x, y } = this.point(event);
    this.hooks.pick(itemAt(this.diagram.scene, x, y, event.pointerType === "touch" ? 22 : 9), y);
  }

  leave() {
    this.diagram.pointerX = null;
    this.hooks.hover(null, 0, 0);
  }

  wheel(event) {
    const { view } = this.diagram;
    const unit = event.deltaMode === 1 ? 20 : 1;
    const sideways = event.shiftKey ? event.deltaX || event.deltaY : event.deltaX;
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      view.scroll((sideways * unit * view.span) / view.width);
    } else {
      view.zoom(Math.exp(Math.max(-80, Math.min(80, event.deltaY * unit)) * 0.004), view.time(this.point(event).x));
    }
    event.preventDefault();
  }
}
