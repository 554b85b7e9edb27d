// What a place does to an attack: the weak-spot map of the picture, and undoing the attack in a brushed place.

import { tableColor } from "./colors.js";
import { button, floats, latest, make, percent } from "./elements.js";
import { Mask, pngBlob, readMask } from "./mask.js";
import { readPixels } from "./pictures.js";
import { SpotCells } from "./spots.js";

const NOTHING = "Brush over the picture where the attack should be erased. The network is asked after every stroke.";
const UNITS = { linf: ", in gray levels of 255", l2: ", as a length with values in [0, 1]" }; // by norm

// Which cell of a grid needs how small a change. A click takes the cell as the painted place.
export class WeakMap {
  constructor(bench) {
    this.bench = bench;
    this.go = button("Map the weak spots", () => (this.job ? this.stop() : this.start(true)));
    this.quick = button("Estimate only", () => this.start(false), { title: "From gradients alone, in about a second" });
    this.hide = button("Hide the map", () => this.clear(), { disabled: true });
    this.bar = make("progress", { max: 1, value: 0, class: "idle", "aria-label": "Progress of the map" });
    this.says = make("p", { class: "sentence", role: "status" });
    this.unit = make("span");
    this.root = make("section", { class: "body" },
      make("p", { class: "note" }, "How little must change in each cell for the decision to change", this.unit, "; the smallest, the weakest, is brightest. Choose a cell to make it the mask."),
      make("div", { class: "line" }, this.go, this.quick, this.hide, this.bar), this.says);
  }

  async start(verify) {
    this.stop();
    await this.bench.attempt("", async () => {
      const { image } = this.bench;
      this.first = null;
      this.says.textContent = "Estimating…";
      this.bar.removeAttribute("value");
      this.bar.classList.remove("idle");
      this.go.textContent = "Stop";
      this.job = this.bench.subscribe("weak_spots", { image: this.bench.image.index, budget: this.bench.budget(), grid: 7, verify }, (event) => (this.bench.image === image ? this.take(event, verify) : null));
      const { job } = this;
      try {
        await job.done;
      } finally {
        if (this.job === job) this.end();
      }
    });
  }

  end() {
    this.job = null;
    this.bar.value = 0;
    this.bar.classList.add("idle");
    this.go.textContent = "Map the weak spots";
  }

  stop() {
    this.job?.stop();
  }

  take(event, verify) {
    if (event.event === "estimate") {
      const { shape, values } = floats(event.size);
      const sizes = Array.from({ length: shape[0] }, (_, row) => Array.from(values.subarray(row * shape[1], (row + 1) * shape[1]), (size) => (Number.isNaN(size) ? null : size)));
      this.cells = { tops: event.tops, lefts: event.lefts, sizes, norm: event.norm, verified: false };
      this.unit.textContent = UNITS[event.norm];
      this.draw();
      this.bench.stage.root.scrollIntoView({ block: "nearest" });
      this.says.textContent = verify ? "Estimates from gradients alone. Searching every cell…" : "";
    } else if (event.event === "progress") this.searched(event.fraction);
    else if (event.event === "cell") this.cells.sizes[event.row][event.column] = event.size;
    else if (event.event === "done") {
      if (event.sentence && verify && !event.stopped) this.cells.verified = true;
      if (this.cells) this.draw();
      this.says.textContent = event.sentence ?? "Stopped: the numbers are estimates from gradients alone.";
    }
  }

  // After some progress, how long the rest will take.
  searched(fraction) {
    this.bar.value = fraction;
    const now = performance.now();
    this.first ??= { fraction, now };
    const speed = (fraction - this.first.fraction) / (now - this.first.now);
    const left = speed > 0 ? (1 - fraction) / speed / 1000 : null;
    const rest = left === null ? "" : `, about ${left > 90 ? `${Math.round(left / 60)} min` : `${Math.ceil(left)} s`} left`;
    this.says.textContent = `Estimates from gradients alone. Searching every cell: ${percent(fraction)}${rest}.`;
  }

  // The weakest cells are brightest, on a logarithmic scale as in the report.
  draw() {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("class", "spots");
    svg.setAttribute("aria-label", "Cells of the weak-spot map; choose one to make it the mask");
    svg.setAttribute("preserveAspectRatio", "none");
    this.bench.stage.spots.replaceChildren(svg);
    const { sizes, tops, lefts } = this.cells;
    const logs = sizes.flat().filter((size) => size > 0).map(Math.log10);
    const low = Math.min(...logs), high = Math.max(...logs, low + Math.log10(4));
    const cells = new SpotCells(svg, this.cells, ({ row, column, sentence }) => {
      const mask = new Mask(this.bench.image.width, this.bench.image.height);
      mask.rectangle([lefts[column], tops[row]], [lefts[column + 1] - 1, tops[row + 1] - 1], 1);
      this.bench.leaveUndo();
      this.bench.brush.set(mask.data);
      this.says.textContent = sentence;
    });
    sizes.forEach((line, row) => line.forEach((size, column) => {
      if (size !== null) cells.set(row, column, size, tableColor("magnitude", size > 0 ? (high - Math.log10(size)) / (high - low) : 1));
    }));
    this.hide.disabled = false;
    this.bench.stage.draw();
  }

  clear() {
    this.stop();
    this.cells = null;
    this.unit.textContent = "";
    this.bench.stage.spots.replaceChildren();
    this.hide.disabled = true;
    this.says.textContent = "";
  }
}

// Erases the perturbation where the brush paints, and shows the decision then.
export class UndoPlace {
  constructor(bench) {
    this.bench = bench;
    this.on = false;
    this.toggle = button("Erase the attack with the brush", () => (this.on ? this.leave() : this.enter()), { "aria-pressed": "false" });
    this.reuse = button("Erase the attack in the mask", () => this.enter(true));
    this.says = make("p", { class: "sentence", role: "status" });
    this.root = make("section", { class: "body" },
      make("p", { class: "note" }, "A causal test by hand: take the change of the attack back in one place, and see whether the decision comes back with it. Another place of its shape with about as many changed pixels is erased beside it."),
      make("div", { class: "line" }, this.toggle, this.reuse), this.says);
    this.send = latest(() => this.sendNow());
    this.refresh();
  }

  refresh() {
    const ready = Boolean(this.bench.stage?.pictures.attack);
    this.toggle.disabled = !ready;
    this.reuse.disabled = !ready || this.on;
    if (!ready) this.says.textContent = "Attack the picture first.";
    else if (!this.on) this.says.textContent = "";
  }

  enter(filled = false) {
    const { brush, stage, image } = this.bench;
    this.kept = brush.mask;
    const place = new Mask(image.width, image.height);
    if (filled) place.data = brush.mask.data.slice();
    brush.mask = place;
    this.on = true;
    stage.erased = true;
    this.toggle.setAttribute("aria-pressed", "true");
    this.toggle.textContent = "Put the attack back";
    this.refresh();
    brush.attach();
    if (brush.tool === "probe") brush.use("brush");
    this.bench.views.show("attack");
    stage.root.scrollIntoView({ block: "nearest" });
    this.says.textContent = NOTHING;
    if (filled) this.send();
  }

  leave() {
    if (!this.on) return;
    this.on = false;
    const { brush, stage } = this.bench;
    stage.erased = false;
    delete stage.pictures.erased;
    this.toggle.setAttribute("aria-pressed", "false");
    this.toggle.textContent = "Erase the attack with the brush";
    brush.mask = this.kept;
    brush.attach();
    this.refresh();
    if (stage.pictures.attack) this.bench.views.show("attack");
  }

  async sendNow() {
    const { bench } = this, { mask } = bench.brush, { image } = bench;
    if (!this.on) return;
    if (!mask.area) {
      this.says.textContent = NOTHING;
      bench.views.show("attack");
      return;
    }
    try {
      const reply = await bench.ask("undo_place", { image: image.index, pair: bench.pair, mask: await bench.brush.text(), seed: bench.seed() });
      const pixels = await readPixels(`data:image/png;base64,${reply.png}`, image.width, image.height);
      if (!this.on || bench.image !== image) return;
      bench.stage.pictures.erased = pixels;
      bench.brush.controlData = reply.control && await readMask(pngBlob(reply.control.mask), image.width, image.height);
      bench.views.show("erased");
      bench.brush.drawControl();
      bench.views.decide(reply);
      this.says.textContent = reply.sentence;
    } catch (error) {
      bench.fail(error);
    }
  }
}
