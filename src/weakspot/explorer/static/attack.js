// The attack inside the painted place, and the same attack at its control: live curves, pictures, a pair of numbers.

import { button, choice, field, floats, make, percent, signed } from "./elements.js";
import { onEdge, pngBlob, readMask } from "./mask.js";
import { readPixels } from "./pictures.js";
import { categories, tableColor } from "./colors.js";
import { CONTROL, MASK } from "./stage.js";

const WIDE = 600, HIGH = 150;
const OUTLINED = 96; // pixels a side, at the least, of a picture that gets an outline
const COLORS = { attack: MASK, control: CONTROL };
const SIDES = [["attack", "Inside the mask"], ["control", "Control of equal area"]];

export class Attack {
  constructor(bench) {
    this.bench = bench;
    this.attacks = choice([], { on: { change: () => this.choose() } });
    this.about = make("p", { class: "note" });
    this.budgetList = make("datalist", { id: "weakspot-budgets" });
    this.budget = make("input", { type: "text", list: "weakspot-budgets", size: 10, spellcheck: "false", on: { change: () => bench.stateChanged() } });
    this.budgetField = field("Change each value by at most", this.budget, { title: "The budget: linf:4/255 lets every value change by at most 4 of 255 levels" });
    this.steps = make("input", { type: "number", min: 1, max: 1000, value: 20, on: { change: () => bench.stateChanged() } });
    this.stepsField = field("Steps", this.steps);
    this.classes = make("datalist", { id: "weakspot-classes" });
    this.target = make("input", { type: "text", list: "weakspot-classes", placeholder: "any other class", on: { input: () => this.suggest(), change: () => bench.stateChanged() } });
    this.targetField = field("Target class", this.target);
    this.seedInput = make("input", { type: "number", min: 0, value: 0, on: { change: () => { bench.brush.measure(); bench.stateChanged(); } } });
    this.known = new Map();
    this.go = button("Attack the whole image", () => (this.running ? this.stop() : this.start()), { class: "primary" });
    this.bar = make("progress", { max: 1, value: 0, class: "idle", "aria-label": "Progress of the attack" });
    this.chart = make("div", { class: "chart" });
    this.sides = Object.fromEntries(SIDES.map(([side, title]) => [side, this.sideView(side, title)]));
    this.sentence = make("p", { class: "sentence", role: "status" });
    this.old = make("p", { class: "note old", role: "status" });
    this.how = make("p", { class: "note" });
    this.settings = make("details", { class: "more" }, make("summary", {}, "Settings of the attack"),
      make("div", { class: "fields" }, field("Attack", this.attacks), this.budgetField, this.stepsField, this.targetField, field("Seed", this.seedInput)),
      this.about, this.budgetList, this.classes);
    this.root = make("section", { class: "card attack", "aria-label": "Attack" },
      make("div", { class: "line" }, this.go, this.bar),
      this.summaryLine = make("p", { class: "note" }),
      this.settings,
      this.sentence, this.old,
      make("div", { class: "sides" }, ...SIDES.map(([side]) => this.sides[side].root)),
      this.chart, this.how);
    this.reset();
  }

  sideView(side, title) {
    const view = { canvas: make("canvas", { class: "result", role: "img", "aria-label": `${title}: no attack yet` }) };
    view.number = make("output", { class: "margin" });
    view.says = make("p", { class: "says" });
    view.title = make("h3", {}, make("i", { class: `mark ${side}`, "aria-hidden": "true" }), title);
    view.root = make("figure", { class: `side ${side}` }, view.title,
      make("button", { type: "button", class: "bare", title: "Show on the large picture", "aria-label": `Show on the large picture: ${title}`, on: { click: () => this.bench.views.show(side) } }, view.canvas),
      make("figcaption", {}, view.number, view.says));
    return view;
  }

  offer(hello) {
    this.list = hello.attacks;
    this.attacks.append(...hello.attacks.map(({ name }) => make("option", { value: name }, name)));
    this.attacks.value = hello.defaults.attack;
    this.budget.value = hello.defaults.budget;
    this.steps.value = hello.defaults.steps;
    this.seedInput.value = hello.defaults.seed;
    this.budgetList.append(...hello.budgets.map(({ example, summary }) => make("option", { value: example }, summary)));
    this.choose();
  }

  get chosen() { return this.list.find(({ name }) => name === this.attacks.value); }

  choose() {
    const { summary, takes_budget: budget, takes_target: target, options } = this.chosen;
    this.about.textContent = `${this.attacks.value}: ${summary}`;
    this.budgetField.hidden = !budget;
    this.targetField.hidden = !target;
    this.stepsField.hidden = !options.some(({ name }) => name === "steps");
    this.describe();
    this.bench.stateChanged();
  }

  // Sets what was used for a record of an audit.
  prefill({ attack, budget, options, seed }) {
    if (this.list.some(({ name }) => name === attack)) this.attacks.value = attack;
    this.budget.value = budget ?? "";
    this.steps.value = options?.steps ?? this.chosen.options.find(({ name }) => name === "steps")?.default ?? this.steps.value;
    this.target.value = "";
    if (Number.isSafeInteger(seed) && seed >= 0) this.seedInput.value = seed;
    this.choose();
    if (!this.result) this.how.textContent = "The settings are those of the record as far as the bench has them; with others, an attack can end at another margin.";
  }

  // One line on what the button will do.
  describe() {
    const { takes_region: region } = this.chosen;
    const place = region && this.bench.brush?.mask?.area;
    if (!this.running) this.go.textContent = place ? "Attack inside the mask" : "Attack the whole image";
    const budget = this.budgetField.hidden ? (this.chosen.minimizes ? ": looks for the smallest change" : "") : ` within ${this.budget.value}`;
    const target = this.target.value && !this.targetField.hidden ? `, toward ${this.target.value}` : "";
    this.summaryLine.textContent = `${this.attacks.value}${budget}${target}. ${place
      ? "The same attack runs at another place of equal area, for comparison." : region
        ? "Paint a mask first to attack only there and to compare it with another place." : "This attack always acts on the whole image."}`;
  }

  async suggest() {
    const text = this.target.value;
    const { classes } = await this.bench.ask("classes", { text }).catch(() => ({ classes: [] }));
    if (text !== this.target.value) return;
    for (const { index, name } of classes) this.known.set(name, index);
    this.classes.replaceChildren(...classes.map(({ name }) => make("option", { value: name })));
  }

  async targetIndex() {
    const text = this.target.value.trim();
    if (!text || this.targetField.hidden) return null;
    if (!this.known.has(text)) {
      const { classes } = await this.bench.ask("classes", { text });
      for (const { index, name } of classes) this.known.set(name, index);
      const exact = classes.find(({ index, name }) => name.toLowerCase() === text.toLowerCase() || String(index) === text);
      if (exact) this.known.set(text, exact.index);
      else throw new Error(`No class is called “${text}”. Choose one of the suggestions, or leave the target empty.`);
    }
    return this.known.get(text);
  }

  // The request, for the program and for the commands.
  async body() {
    const { brush, image } = this.bench;
    const body = { image: image.index, mask: this.chosen.takes_region && brush.mask.area ? await brush.text() : null, attack: this.attacks.value, options: {}, seed: Number(this.seedInput.value) || 0 };
    if (!this.budgetField.hidden && this.budget.value.trim()) body.budget = this.budget.value.trim();
    if (!this.stepsField.hidden) body.options.steps = Number(this.steps.value) || 20;
    const target = await this.targetIndex();
    if (target !== null) body.target = target;
    return body;
  }

  async start() {
    if (this.root.dataset.running === "yes") return; // pressed again before the request was made
    this.root.dataset.running = "yes";
    await this.bench.attempt("", async () => {
      const { image } = this.bench;
      this.bench.leaveUndo();
      const body = await this.body();
      this.reset();
      this.running = true;
      this.go.textContent = "Stop";
      this.go.classList.add("stop");
      this.bar.removeAttribute("value");
      this.bar.classList.remove("idle");
      this.sentence.textContent = "Attacking…";
      this.aim = body.target === undefined ? null : this.target.value.trim();
      this.sides.attack.title.lastChild.textContent = body.mask ? SIDES[0][1] : "Whole image";
      this.sides.control.root.hidden = !body.mask;
      try {
        // Another picture may be opened while the attack ends.
        this.job = this.bench.subscribe("attack", body, (event) => (this.bench.image === image ? this.take(event) : null));
        await this.job.done;
      } catch (error) {
        this.sentence.textContent = "";
        throw error;
      } finally {
        this.running = false;
        this.go.classList.remove("stop");
        this.bar.value = 0;
        this.bar.classList.add("idle");
        this.describe();
      }
    });
    this.root.dataset.running = "no";
  }

  stop() {
    if (!this.running) return;
    this.job?.stop();
    this.go.textContent = "Stopping…";
  }

  async take(event) {
    if (event.event === "step") {
      this.curves[event.side].push(...event.margins);
      this.bar.value = event.fraction;
      this.sides[event.side].number.textContent = this.aim === null ? `margin ${signed(event.best)}` : `still missing ${signed(Math.max(0, event.best))}`;
      this.sides[event.side].says.textContent = `step ${event.step}`;
      this.drawCurves();
      if (!event.png) return;
      const { image } = this.bench, pixels = await this.decode(event.png);
      if (this.bench.image === image) this.drawPixels(event.side, pixels);
    } else if (event.event === "done" && event.attack) await this.finish(event);
    else if (event.event === "done") this.sentence.textContent = "Stopped before anything was tried.";
  }

  // The pair of results; also those that the program remembers of a picture. Words and pictures change together.
  async finish({ pair, attack, control, sentence, how, masks }) {
    const { image } = this.bench, results = Object.entries({ attack, control }).filter(([, result]) => result);
    const decoded = await Promise.all(results.map(([, { png }]) => this.decode(png)));
    const places = await Promise.all(Object.values(masks ?? {}).map((one) => readMask(pngBlob(one), image.width, image.height)));
    if (this.bench.image !== image) return;
    this.bench.pair = pair;
    this.sentence.textContent = sentence;
    this.how.textContent = `The attack: ${how}.`;
    this.result = { attack, control, place: places[0] };
    const wrong = this.bench.image.predicted.index !== this.bench.image.label.index; // without any attack
    this.sides.control.root.hidden = !control;
    this.sides.attack.title.lastChild.textContent = control ? SIDES[0][1] : "Whole image";
    results.forEach(([side, result], at) => {
      const view = this.sides[side];
      const { name, probability } = result.predicted;
      view.number.textContent = `margin ${signed(result.margin)}`;
      view.says.textContent = `${wrong ? "Misclassified as it was: " : result.success ? "Fooled: " : "Not fooled: "}${name} ${percent(probability)}`;
      view.root.classList.toggle("fooled", result.success && !wrong);
      view.canvas.setAttribute("aria-label", `${view.title.textContent}: ${view.says.textContent}, ${view.number.textContent}`);
      this.drawPixels(side, decoded[at], places[at]);
      this.bench.stage.pictures[side] = decoded[at];
      this.bench.stage.pictures[`${side} difference`] = differencePixels(floats(result.difference).values);
    });
    this.drawCurves();
    this.compare();
    this.bench.attacked();
  }

  // Says so when the mask is no longer that of the result.
  compare() {
    const { undo, brush } = this.bench, { area, data } = undo.on ? undo.kept : brush.mask;
    const { place } = this.result ?? {};
    const partial = this.chosen.takes_region && area > 0 && area < data.length;
    const other = place ? place.some((value, site) => value !== data[site]) : partial;
    this.outdated = !this.result || !other ? "" : place ? "The result is that of an earlier mask." : "The result is that of the whole image, not of the mask.";
    this.old.textContent = this.outdated;
  }

  decode(png) {
    const { width, height } = this.bench.image;
    return readPixels(`data:image/png;base64,${png}`, width, height);
  }

  // With the outline of the attacked place, unless the picture is so small that it would be hidden.
  drawPixels(side, pixels, place = null) {
    const { width, height } = this.bench.image, { canvas } = this.sides[side];
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.putImageData(new ImageData(new Uint8ClampedArray(pixels), width, height), 0, 0);
    if (!place || Math.min(width, height) < OUTLINED) return;
    context.fillStyle = `rgb(${categories[COLORS[side]].join(",")})`;
    place.forEach((value, site) => {
      const x = site % width, y = (site - x) / width;
      if (value && onEdge(place, x, y, width, height)) context.fillRect(x, y, 1, 1);
    });
  }

  reset() {
    this.curves = { attack: [], control: [] };
    this.aim = null;
    this.result = null;
    this.outdated = "";
    this.sentence.textContent = this.old.textContent = this.how.textContent = "";
    for (const [side, title] of SIDES) {
      const view = this.sides[side];
      view.number.textContent = "margin –";
      view.says.textContent = "not attacked yet";
      view.root.classList.remove("fooled");
      view.root.hidden = false;
      view.title.lastChild.textContent = title;
      if (this.bench.image) this.drawPixels(side, this.bench.stage.pictures.clean);
      view.canvas.setAttribute("aria-label", `${title}: no attack yet`);
    }
    this.drawCurves();
  }

  // Margins step by step; below the line the network says something else.
  drawCurves() {
    const all = [...this.curves.attack, ...this.curves.control].filter((value) => value !== null);
    // The margin of the picture is that of the label; toward a target, the curve begins with the first attempt.
    const start = this.aim === null ? this.bench.image?.margin ?? 0 : all[0] ?? 0;
    const high = Math.max(start, 0, ...all), low = Math.min(0, ...all, -0.25 * (high || 1));
    const longest = Math.max(this.curves.attack.length, this.curves.control.length, 1);
    const y = (value) => ((high - value) / (high - low || 1)) * HIGH;
    const line = (values, side) => {
      const points = [start, ...values].map((value, at) => `${((at / longest) * WIDE).toFixed(1)},${y(value ?? 0).toFixed(1)}`);
      return `<polyline class="line-${side}" points="${points.join(" ")}"/>`;
    };
    this.chart.style.visibility = this.result && !all.length ? "hidden" : ""; // a result that was remembered comes without its steps
    const any = all.length > 0, name = this.bench.image?.label.name ?? "the label";
    const last = (side) => signed(this.curves[side].at(-1));
    this.chart.innerHTML = `<svg viewBox="0 -6 ${WIDE} ${HIGH + 12}" preserveAspectRatio="none" role="img"><line class="zero" x1="0" x2="${WIDE}" y1="${y(0)}" y2="${y(0)}"/>${any ? line(this.curves.control, "control") + line(this.curves.attack, "attack") : ""}</svg>`;
    this.chart.querySelector("svg").setAttribute("aria-label", any ? `Margins over the steps: inside the mask ${last("attack")}${this.curves.control.length ? `, control ${last("control")}` : ""}` : "No margins yet");
    const zero = make("span", { class: "zero-label", "aria-hidden": "true" }, any ? "0: decision" : "0");
    zero.classList.toggle("below", y(0) < 24);
    zero.style.top = `${(100 * (y(0) + 6)) / (HIGH + 12)}%`;
    const ends = [y(0) < 24 ? "" : signed(high), signed(low)].map((text, at) => make("span", { class: at ? "lowest" : "highest", "aria-hidden": "true" }, any ? text : ""));
    this.chart.append(make("div", { class: "axis" }, this.chart.firstChild, zero, ...ends));
    const evaluations = any ? `${longest} evaluation${longest === 1 ? "" : "s"}` : "the evaluations";
    this.chart.append(make("p", { class: "note" }, this.aim === null
      ? `Margin of ${name} over ${evaluations} of the attack: its logit less the largest other one. Below the line, the network says something else.`
      : `The largest other logit less that of ${this.aim}, over ${evaluations} of the attack. Below the line, the network says ${this.aim}.`));
  }
}

// Blue is darker, orange is brighter, amplified to the full range.
function differencePixels(values) {
  let top = 0;
  for (const value of values) top = Math.max(top, Math.abs(value));
  const pixels = new Uint8ClampedArray(4 * values.length);
  values.forEach((value, at) => pixels.set([...tableColor("signed", 0.5 + value / (2 * (top || 1))), 255], 4 * at));
  return pixels;
}
