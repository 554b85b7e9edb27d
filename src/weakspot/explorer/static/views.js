// Which of the pictures is shown large, and the network's decision on it.

import { button, make, percent, signed } from "./elements.js";

const PICTURES = { clean: "Clean picture", attack: "Attacked picture", control: "Attacked at the control", erased: "Attack erased in the green place" };
const VIEWS = { clean: "Clean", attack: "Attacked", control: "Control", "attack difference": "Difference", erased: "Erased" };

export class Views {
  constructor(bench) {
    this.bench = bench;
    this.buttons = new Map(Object.entries(VIEWS).map(([view, text]) => [view, button(text, () => this.show(view), { "aria-pressed": String(view === "clean"), disabled: view !== "clean" })]));
    this.blinkButton = button("Blink", () => this.blink(), { "aria-pressed": "false", disabled: true, title: "Clean and attacked in turn" });
    this.zoom = make("select", { "aria-label": "Zoom", title: "Zoom; drag with Alt or the middle button to move", on: { change: () => bench.stage.zoomTo(Number(this.zoom.value)) } },
      ...[1, 2, 4, 8].map((times) => make("option", { value: times }, `${times}×`)));
    this.root = make("div", { class: "line views", role: "group", "aria-label": "Shown picture" }, ...this.buttons.values(), this.blinkButton, this.zoom);
    this.decision = make("div", { class: "decision", "aria-live": "polite" });
  }

  show(name) {
    const { stage, attack, image, undo } = this.bench;
    if (!stage.pictures[name]) return;
    stage.shown = name;
    for (const [view, each] of this.buttons) {
      each.disabled = !stage.pictures[view];
      each.setAttribute("aria-pressed", String(view === name));
    }
    this.blinkButton.disabled = !stage.pictures.attack;
    const { result } = attack;
    const shown = name.startsWith("attack") ? result?.attack : name === "control" ? result?.control : null;
    if (shown) this.decide(shown);
    else if (name === "clean") this.decide(image);
    // Under the mask, the result could not be seen.
    stage.plain = name !== "clean" && !undo.on;
    stage.draw();
  }

  // The class, and the most probable ones, of the picture as it is or with a change.
  decide({ top, predicted, label, margin }) {
    const { image: { label: own }, stage } = this.bench;
    const right = predicted.index === (label ?? own).index;
    const title = make("h2", {}, predicted.name, make("small", {}, percent(predicted.probability)));
    const bars = top.map(({ index, name, probability }) => make("li", index === own.index ? { class: "own" } : {},
      make("span", {}, name), make("meter", { min: 0, max: 1, value: probability, "aria-label": `${name}: ${percent(probability)}` }), make("span", { class: "number" }, percent(probability))));
    this.decision.replaceChildren(make("p", { class: "note" }, PICTURES[stage.shown.split(" ")[0]]), title, make("ol", { class: "bars" }, ...bars),
      make("p", { class: "note" }, `${right ? "" : `The label is ${own.name}. `}Margin of ${own.name}: ${signed(margin)} (its logit less the largest other one; below 0, the network says something else).`));
  }

  // The mask is painted on the clean picture, or on the attacked one where the attack is erased.
  showMask() {
    const { stage, undo } = this.bench;
    if (undo.on || stage.shown === "clean") stage.plain = false;
    else this.show("clean");
  }

  blink(on = this.blinkButton.getAttribute("aria-pressed") !== "true") {
    this.blinkButton.setAttribute("aria-pressed", String(on));
    clearInterval(this.blinking);
    if (on) this.blinking = setInterval(() => this.show(this.bench.stage.shown === "attack" ? "clean" : "attack"), 600);
  }
}
