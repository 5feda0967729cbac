// @ts-check
// Guided scenarios: what each shows, a button that runs it, how it goes, and the stale reads that it brought.

import { byId, make, setText } from "./dom.js";
import { staleItem } from "./traffic.js";

export class Scenarios {
  constructor(store, send, jump) {
    Object.assign(this, { store, send, jump });
    this.cards = new Map();
    this.running = null;
  }

  build(hello) {
    this.cards.clear();
    this.running = null;
    const items = (hello.scenarios ?? []).map((scenario) => {
      const run = make("button", { type: "button", "data-scenario": scenario.name, text: "Run", "aria-label": `Run: ${scenario.title}`, disabled: !hello.controls,
        onclick: () => this.send({ command: "scenario", name: scenario.name }, run) });
      const steps = make("ol", { class: "steps" });
      const stale = make("ul", { class: "stale-list" });
      const details = make("details", {}, make("summary", {}, make("h3", { text: scenario.title })), make("p", { text: scenario.text }), steps, stale);
      const element = make("li", { class: "scenario" }, details, run);
      this.cards.set(scenario.name, { element, details, run, steps, stale });
      return element;
    });
    byId("scenario-list").replaceChildren(...items);
    byId("scenarios").hidden = !items.length;
  }

  /** Shows how a scenario goes. */
  take(event) {
    const card = this.cards.get(event.name);
    if (!card) return;
    if (event.phase === "began") {
      card.steps.replaceChildren();
      card.stale.replaceChildren();
      card.details.open = true;
      this.running = card;
    }
    card.element.dataset.phase = event.phase;
    const over = event.phase === "ended" || event.phase === "failed";
    setText(card.run, over ? "Again" : "Running");
    for (const other of this.cards.values()) other.run.setAttribute("aria-disabled", String(!over));
    card.steps.append(make("li", { class: event.phase, text: event.text }));
    while (card.steps.childElementCount > 12) card.steps.firstElementChild.remove();
    if (over && this.running === card) this.running = null;
  }

  /** A stale read that appeared while a scenario was running belongs to it. */
  found(event) {
    if (!this.running) return;
    this.running.stale.append(staleItem(event, this.jump, this.store));
    while (this.running.stale.childElementCount > 20) this.running.stale.firstElementChild.remove();
  }
}
