// Opened when asked for: the report's panels on the attack, and the layers and units of the network.

import { drawSwatches, gradient } from "./colors.js";
import { button, floats, latest, make, percent, signed } from "./elements.js";
import { drawMagnitudes } from "./layers.js";
import { LinkedPictures } from "./pictures.js";

const QUESTIONS = {
  weak_spots: "Where is the picture weak?", cam: "Where does the network look?", ssim: "Where is the change visible?",
  overlap: "Does the attack act where the network looks?", promotion: "Does the attack add or take away evidence?",
  propagation: "How does the change travel through the layers?", locality: "Would the pixel work elsewhere?",
  restoration: "Which patches carry the attack?", units: "Which units does it move?",
};
const WIDE = 600, HIGH = 110;

// A fold whose content is computed when it opens.
function fold(title, note, open) {
  const inside = make("div", { class: "inside" });
  const details = make("details", { class: "fold" }, make("summary", {}, make("strong", {}, title), note && make("span", {}, note)), inside);
  details.addEventListener("toggle", () => { if (details.open) open(inside, details); });
  return { details, inside };
}

export class Explanations {
  constructor(bench) {
    this.bench = bench;
    this.root = make("section", { class: "body" },
      make("p", { class: "note" }, "Each answer is computed when you open it. They are the panels of weakspot's report."));
    this.folds = [];
    this.jobs = new Set();
  }

  offer(analyses) {
    for (const { name } of analyses) {
      const one = fold(QUESTIONS[name] ?? name.replaceAll("_", " "), name.replaceAll("_", " "), (inside) => this.open(name, inside));
      this.folds.push(one);
      this.root.append(one.details);
    }
  }

  async open(name, inside) {
    if (inside.dataset.done) return;
    inside.dataset.done = "yes";
    const { image } = this.bench, { result } = this.bench.attack;
    const stale = () => this.bench.image !== image || this.bench.attack.result !== result;
    try {
      let panel = {};
      const job = this.bench.subscribe("explain", { image: image.index, pair: this.bench.pair, analysis: name }, (event) => { if (event.event === "done") panel = event; });
      this.jobs.add(job);
      const halt = button("Stop", () => { job.stop(); halt.textContent = "Stopping…"; });
      inside.replaceChildren(make("div", { class: "line" }, make("span", { class: "note", role: "status" }, "Computing…"), halt));
      await job.done.finally(() => this.jobs.delete(job));
      if (stale()) return;
      const { html, data, scores = [] } = panel;
      if (!html) {
        delete inside.dataset.done;
        inside.replaceChildren(make("p", { class: "note", role: "status" }, "Stopped."), button("Compute again", () => this.open(name, inside)));
        return;
      }
      const zoom = make("select", { "aria-label": "Zoom" }, ...[1, 2, 4, 8].map((times) => make("option", { value: times }, `${times}×`)));
      const readout = make("output", { class: "readout" }, "Point at a map to read its values; click to center the zoom.");
      const body = make("div", {});
      body.innerHTML = html; // written by the program, which escapes what comes from outside
      for (const bar of body.querySelectorAll("i.signed, i.magnitude")) bar.style.background = gradient(bar.className);
      const settings = { overlay: "", opacity: 0.65, gray: true, swapped: false, get zoom() { return Number(zoom.value); } };
      inside.replaceChildren(make("div", { class: "line" }, make("label", {}, "Zoom ", zoom), readout), body);
      if (scores.length) {
        body.append(make("table", { class: "scores" }, make("thead", {}, make("tr", {}, ...["score", "value", "meaning"].map((text) => make("th", { scope: "col" }, text)))),
          make("tbody", {}, ...scores.map((score) => make("tr", {}, make("th", { scope: "row" }, score.name), make("td", {}, score.value), make("td", { class: "meaning" }, score.meaning))))));
      }
      drawSwatches(body);
      const pictures = new LinkedPictures(body, data, settings, (text) => { readout.textContent = text; });
      zoom.addEventListener("change", () => pictures.draw());
      await pictures.open();
    } catch (error) {
      if (stale()) return;
      delete inside.dataset.done;
      inside.replaceChildren(make("p", { class: "note", role: "status" }, error.message));
    }
  }

  // After another attack or picture: what is open is computed again.
  forget() {
    for (const job of this.jobs) job.stop();
    for (const { details, inside } of this.folds) {
      details.open = false;
      delete inside.dataset.done;
      inside.replaceChildren();
    }
  }
}

export class Depth {
  constructor(bench) {
    this.bench = bench;
    this.slider = make("input", { type: "range", min: 0, max: 0, value: 0, step: 1, "aria-label": "Layer", on: { input: () => this.move() } });
    this.name = make("output", { class: "step", "aria-live": "polite" });
    this.curve = make("div", { class: "depth-curve axis" });
    this.own = this.mapView("The perturbation of the attack");
    this.random = this.mapView("A random edit of its size");
    this.units = make("div", { class: "units", role: "group", "aria-label": "Units that change most" });
    this.unitView = make("div", { class: "unit" });
    this.says = make("p", { class: "sentence" });
    this.content = make("div", { hidden: true },
      make("label", { class: "scrub" }, "Layer", this.slider), this.name, this.curve,
      make("p", { class: "note" }, make("i", { class: "mark attack", "aria-hidden": "true" }), "fraction of the sites that the perturbation changes by over a tenth of the layer's peak, ", make("i", { class: "mark control", "aria-hidden": "true" }), "the same for a random edit of its size."),
      this.says,
      make("div", { class: "pair-maps" }, this.own.root, this.random.root),
      make("h3", {}, "Units that change most"), this.units, this.unitView);
    this.status = make("p", { class: "note", role: "status" });
    this.root = make("section", { class: "body" }, this.status, this.content);
    this.showLayer = latest((name) => this.showLayerNow(name));
  }

  mapView(title) {
    const canvas = make("canvas", { class: "layer", role: "img", "aria-label": title });
    return { canvas, root: make("figure", {}, canvas, make("figcaption", {}, title)) };
  }

  async open() {
    if (this.layers) return;
    this.content.hidden = true;
    if (!this.bench.stage.pictures.attack) {
      this.status.textContent = "Attack the picture first.";
      return;
    }
    this.status.textContent = "Comparing the layers…";
    const { result } = this.bench.attack;
    try {
      const { layers, sentence } = await this.bench.ask("layers", { image: this.bench.image.index, pair: this.bench.pair });
      if (this.bench.attack.result !== result) return;
      this.layers = layers;
      this.says.textContent = sentence;
      this.slider.max = layers.length - 1;
      // The last layer of which not everything has changed shows a place.
      const telling = layers.findLastIndex(({ spread }) => spread < 0.9);
      this.slider.value = telling < 0 ? layers.length - 1 : telling;
      this.status.textContent = "";
      this.content.hidden = false;
      this.move();
    } catch (error) {
      this.status.textContent = error.message;
    }
  }

  move() {
    const number = Number(this.slider.value), layer = this.layers[number];
    this.name.textContent = `${number + 1} of ${this.layers.length}: ${layer.name}, ${layer.height} × ${layer.width}. Changed sites: ${layer.spread === null ? "not defined" : percent(layer.spread)}, random edit ${layer.spread_random === null ? "not defined" : percent(layer.spread_random)}.`;
    const across = (at) => (this.layers.length > 1 ? (WIDE * at) / (this.layers.length - 1) : WIDE / 2);
    const line = (key) => this.layers.map((one, at) => `${across(at).toFixed(1)},${(HIGH * (1 - (one[key] ?? 0))).toFixed(1)}`).join(" ");
    this.curve.innerHTML = `<svg viewBox="0 -4 ${WIDE} ${HIGH + 8}" preserveAspectRatio="none" role="img" aria-label="Fraction of changed sites in each layer"><line class="cursor" x1="${across(number)}" x2="${across(number)}" y1="-4" y2="${HIGH + 4}"/><polyline class="line-control" points="${line("spread_random")}"/><polyline class="line-attack" points="${line("spread")}"/></svg><span class="highest" aria-hidden="true">100%</span><span class="lowest" aria-hidden="true">0%</span>`;
    this.showLayer(layer.name);
  }

  async showLayerNow(name) {
    try {
      const reply = await this.bench.ask("layer", { image: this.bench.image.index, pair: this.bench.pair, layer: name });
      const [own, random] = [floats(reply.change), floats(reply.random)];
      const top = Math.max(...own.values, ...random.values) || 1; // one scale for both
      this.draw(this.own.canvas, own, top);
      this.draw(this.random.canvas, random, top);
      this.unitView.replaceChildren();
      this.units.replaceChildren(...reply.units.map(({ unit, change, concept }) =>
        button(concept ? `${unit} ${concept}` : String(unit), () => this.showUnit(name, unit), { title: `Unit ${unit}: mean change ${signed(change, { digits: 3 })}` })));
    } catch (error) {
      this.bench.fail(error);
    }
  }

  draw(canvas, { shape, values }, top) {
    drawMagnitudes(canvas, { levels: Array.from(values, (value) => 255 * Math.max(0, value)), height: shape[0], width: shape[1], highest: 1, top });
  }

  async showUnit(layer, unit) {
    this.unitView.replaceChildren(make("p", { class: "note", role: "status" }, "Computing…"));
    try {
      const reply = await this.bench.ask("unit", { image: this.bench.image.index, pair: this.bench.pair, layer, unit, seed: this.bench.seed() });
      const [clean, adversarial] = [floats(reply.clean), floats(reply.adversarial)];
      const top = Math.max(...clean.values, ...adversarial.values) || 1;
      const views = [this.mapView(`Unit ${unit} on the clean picture`), this.mapView(`Unit ${unit} on the attacked picture`)];
      this.draw(views[0].canvas, clean, top);
      this.draw(views[1].canvas, adversarial, top);
      this.unitView.replaceChildren(make("h3", {}, `Unit ${unit}${reply.concept ? ` responds to ${reply.concept}` : ""}`),
        make("p", { class: "sentence" }, reply.sentence), make("div", { class: "pair-maps" }, ...views.map(({ root }) => root)));
    } catch (error) {
      this.unitView.replaceChildren(make("p", { class: "note", role: "status" }, error.message));
    }
  }

  forget() {
    this.layers = null;
    this.content.hidden = true;
    this.unitView.replaceChildren();
    this.units.replaceChildren();
    this.status.textContent = "";
  }
}
