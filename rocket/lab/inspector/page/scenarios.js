// @ts-check
// Guided scenarios: what each shows, a button that runs it, and its progress, which is shown above the diagram too.

import { byId, make, setAttribute, setText } from "./dom.js";

const OVER = new Set(["ended", "failed", "stopped"]);

export class Scenarios {
  /** @param {() => void} showDiagram scrolls to the diagram */
  constructor(send, showDiagram) {
    Object.assign(this, { send, showDiagram });
    this.cards = new Map();
    byId("playing-close").addEventListener("click", () => (byId("playing").hidden = true));
  }

  build(hello) {
    this.cards.clear();
    byId("playing").hidden = true;
    const items = (hello.scenarios ?? []).map((scenario) => {
      const run = make("button", { type: "button", "data-scenario": scenario.name, text: "Run", "aria-label": `Run: ${scenario.title}`, disabled: !hello.controls,
        onclick: () => this.run(scenario.name, run) });
      const steps = make("ol", { class: "steps" });
      // Of the details with one name, only one is open at a time.
      const details = make("details", { name: "scenario" }, make("summary", {}, make("h3", { text: scenario.title })), make("p", { text: scenario.text }), steps);
      const element = make("li", { class: "scenario" }, details, run);
      this.cards.set(scenario.name, { title: scenario.title, element, details, run, steps });
      return element;
    });
    byId("scenario-list").replaceChildren(...items);
    byId("scenarios").hidden = !items.length;
    byId("scenarios-note").hidden = hello.controls;
    setText(byId("scenarios-note"), hello.controls ? "" : hello.no_controls ?? "Controls are off.");
  }

  async run(name, button) {
    if (await this.send({ command: "scenario", name }, button)) this.showDiagram();
  }

  /** Shows the progress of a scenario. */
  take(event) {
    const card = this.cards.get(event.name);
    if (!card) return;
    const [began, over] = [event.phase === "began", OVER.has(event.phase)];
    if (began) {
      card.steps.replaceChildren();
      for (const other of this.cards.values()) other.details.open = other === card;
    } else {
      card.steps.append(make("li", { class: event.phase, text: event.text }));
      while (card.steps.childElementCount > 12) card.steps.firstElementChild.remove();
    }
    card.element.dataset.phase = event.phase;
    setText(card.run, over ? "Again" : "Running");
    for (const other of this.cards.values()) other.run.setAttribute("aria-disabled", String(!over));
    const playing = byId("playing");
    playing.hidden = false;
    playing.className = `playing ${event.phase}`;
    setText(byId("playing-title"), card.title);
    setText(byId("playing-words"), began ? "It begins." : event.text);
    byId("playing-close").hidden = !over;
    setAttribute(playing, "aria-busy", !over);
  }
}
