// @ts-check
// The routing switch, the simulator's rate, and Heal all.

import { byId, make, setText } from "./dom.js";

/** Rides a second; null: one client, as the simulator does by itself. */
const RATES = [null, 0, 1, 2, 5, 10, 20, 50, 100, 200, 500];

const ROUTINGS = {
  "never-stale": "to a replica that has replayed the session's floor, else a short wait, else the primary",
  article: "as published: the floor lies before the commit record, and a status may be of an earlier incarnation",
  random: "to any replica, whatever it has replayed",
  primary: "always to the primary",
};

export class Controls {
  constructor(send) {
    this.send = send;
    this.routing = null;
    this.rate = null;
    byId("heal").addEventListener("click", (event) => this.send({ command: "heal" }, event.currentTarget));
    byId("back-to-never-stale").addEventListener("click", (event) => this.send({ command: "routing", routing: "never-stale" }, event.currentTarget));
    const speed = byId("speed");
    speed.max = String(RATES.length - 1);
    speed.addEventListener("input", () => this.nameRate(RATES[speed.value]));
    speed.addEventListener("change", () => this.pace(RATES[speed.value], speed));
  }

  build(hello) {
    const radios = (hello.routings ?? [hello.routing]).map((routing) => {
      const input = make("input", { type: "radio", name: "routing", value: routing, disabled: !hello.controls, onchange: () => this.choose(routing, input) });
      return make("label", { class: "choice" }, input, make("span", {}, make("b", { text: routing }), make("small", { text: ROUTINGS[routing] ?? "" })));
    });
    byId("routing-choices").replaceChildren(...radios);
    byId("controls-note").hidden = hello.controls;
    setText(byId("controls-note"), hello.controls ? "" : hello.no_controls ?? "Controls are off.");
    byId("heal").hidden = !hello.controls;
    byId("speed-field").hidden = !(hello.controls && hello.simulator);
    byId("back-to-never-stale").hidden = !hello.controls;
    this.showRouting(hello.routing);
    this.showRate(hello.simulator_rate);
  }

  async choose(routing, input) {
    if (!(await this.send({ command: "routing", routing }, input))) this.showRouting(this.routing);
  }

  async pace(rate, speed) {
    if (!(await this.send({ command: "simulator", rate }, speed))) this.showRate(this.rate);
  }

  /** Shows the current routing, with a warning unless it is never-stale. */
  showRouting(routing) {
    this.routing = routing;
    for (const input of byId("routing-choices").querySelectorAll("input")) input.checked = input.value === routing;
    setText(byId("routing-now"), routing);
    const safe = routing === "never-stale" || routing === "primary";
    byId("unsafe").hidden = routing === "never-stale";
    byId("unsafe").classList.toggle("mild", safe);
    setText(byId("unsafe-words"), safe
      ? "Every read goes to the primary: never stale, but the replicas do nothing."
      : `Routing is “${routing}”, not never-stale: stale reads are to be expected.`);
  }

  /** Shows the current rate, at the nearest step of the slider. */
  showRate(rate) {
    this.rate = rate;
    const speed = byId("speed");
    if (document.activeElement === speed && speed.matches(":active")) return;
    const off = (one) => (one === rate ? 0 : one === null || rate === null ? Infinity : Math.abs(one - rate));
    const nearest = RATES.reduce((best, one, number) => (off(one) < off(RATES[best]) ? number : best), 0);
    speed.value = String(nearest);
    this.nameRate(rate);
  }

  nameRate(rate) {
    const text = rate === null || rate === undefined ? "one client" : rate === 0 ? "paused" : `${rate} rides/s`;
    setText(byId("speed-now"), text);
    byId("speed").setAttribute("aria-valuetext", text);
  }
}
