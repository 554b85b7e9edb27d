// The tools: probe, brush, eraser, rectangle; sizes, undo, and masks from elsewhere.

import { base64Of, button, choice, counted, download, latest, make, percent } from "./elements.js";
import { Mask, pngBlob, readMask } from "./mask.js";

const TOOLS = [
  ["probe", "Probe", "P", "change pixels under the cursor and read what the network says"],
  ["brush", "Brush", "B", "paint the mask: the place to attack"],
  ["eraser", "Eraser", "E", "take away from the mask"],
  ["rectangle", "Rectangle", "R", "add a rectangle to the mask"],
];
const SIZES = [1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 96];
const NAMES = {
  cam: "most important part", background: "background", foreground: "object", superpixels: "most important pieces",
  superpixel: "piece under the cursor", border: "frame", weakest: "smallest square that is enough",
};
const TAKEN = ["cam", "superpixels"]; // kinds that take a fraction of the image

export class Brush {
  // `bench` is the whole page; `changed(done)` is called while the mask is drawn and, with true, when a stroke has ended.
  constructor(bench, changed) {
    Object.assign(this, { bench, changed, tool: "probe", corner: null });
    this.size = 16;
    this.buttons = new Map(TOOLS.map(([name, text, key, meaning]) => [name, button(text, () => this.use(name), {
      "aria-pressed": String(name === this.tool), "aria-keyshortcuts": key, title: `${text} (${key}): ${meaning}`, class: "tool",
    })]));
    this.slider = make("input", { type: "range", min: 0, max: SIZES.length - 1, step: 1, "aria-label": "Brush size",
      on: { input: () => { this.chosen = true; this.resize(SIZES[Number(this.slider.value)]); } } });
    this.sizeText = make("output", { class: "number" });
    this.sizes = make("div", { class: "line", hidden: true }, make("label", { class: "size" }, "Size of the brush", this.slider, this.sizeText));
    this.undoButton = button("Undo", () => this.undo(), { "aria-keyshortcuts": "Control+Z", title: "Undo (Ctrl-Z)" });
    this.redoButton = button("Redo", () => this.redo(), { "aria-keyshortcuts": "Control+Y", title: "Redo (Ctrl-Y)" });
    this.kinds = choice([["", "Mask from…"]], { "aria-label": "Mask from", on: { change: () => this.take() } });
    this.fraction = make("input", { type: "number", min: 1, max: 99, value: 30, "aria-label": "Percent of the image, for the most important part and pieces", on: { input: () => this.nameKinds() } });
    this.file = make("input", { type: "file", accept: "image/png", class: "away", "aria-label": "Open a mask file", tabindex: -1,
      on: { change: () => this.open() } });
    this.area = make("p", { class: "area", role: "status" });
    this.showControl = make("input", { type: "checkbox", on: { change: () => { bench.views.showMask(); this.drawControl(); } } });
    this.measure = latest(() => this.measureNow());
    this.root = make("div", { class: "tools", role: "group", "aria-label": "Tools" },
      make("div", { class: "line" }, ...this.buttons.values(), this.undoButton, this.redoButton,
        button("Invert", () => this.invert(), { "aria-keyshortcuts": "I", title: "Invert (I): the mask becomes all the rest" }),
        button("Clear", () => this.clear(), { "aria-keyshortcuts": "0", title: "Clear (0): no mask" })),
      make("div", { class: "line" }, this.kinds,
        make("label", { class: "size", title: "Percent of the image, for the most important part and pieces" }, this.fraction, "%"),
        button("Save mask", () => this.save(), { title: "Save the mask as a PNG file" }),
        button("Open mask", () => this.file.click(), { title: "Open a PNG file as the mask" }), this.file),
      make("div", { class: "settings" }, bench.probe.root, this.sizes));
    this.under = make("div", { class: "under" }, this.area,
      make("label", { class: "check" }, this.showControl, "show the control: another place of equal area"));
    this.resize(this.size);
  }

  offer(kinds) {
    this.kinds.append(...kinds.map(({ kind, summary }) =>
      make("option", { value: kind, title: summary })));
    this.nameKinds();
  }

  nameKinds() {
    for (const option of [...this.kinds.options].slice(1)) {
      const name = NAMES[option.value] ?? option.value;
      option.textContent = TAKEN.includes(option.value) ? `${name} (${Math.round(100 * this.share)}%)` : name;
    }
  }

  // The fraction of the image that is asked for.
  get share() { return Math.max(0.01, Math.min(0.99, Number(this.fraction.value) / 100 || 0.3)); }

  // A new picture: an empty mask.
  start(width, height) {
    this.mask = new Mask(width, height);
    if (!this.chosen) this.resize(SIZES.findLast((size) => size <= Math.max(1, Math.min(width, height) / 14)));
    this.attach();
  }

  attach() {
    this.bench.stage.mask = this.mask;
    this.refresh(true);
  }

  use(tool) {
    this.tool = tool;
    this.corner = null;
    for (const [name, each] of this.buttons) each.setAttribute("aria-pressed", String(name === tool));
    this.bench.stage.brush = tool === "brush" || tool === "eraser" ? this.size : 0;
    this.bench.stage.placeRing();
    this.bench.toolChanged(tool);
  }

  resize(size) {
    this.size = size;
    this.slider.value = SIZES.indexOf(size);
    this.sizeText.textContent = `${size} px`;
    if (this.tool === "brush" || this.tool === "eraser") this.bench.stage.brush = size;
    this.bench.stage?.placeRing();
  }

  resizeBy(step) {
    this.chosen = true;
    this.resize(SIZES[Math.max(0, Math.min(SIZES.length - 1, SIZES.indexOf(this.size) + step))]);
  }

  down(site) {
    this.bench.views.showMask();
    if (this.tool === "rectangle") {
      this.corner = site;
      this.mask.begin();
      this.before = this.mask.data.slice();
      this.mask.rectangle(site, site, 1);
    } else {
      this.mask.begin();
      this.mask.stroke(site, site, this.size, this.tool === "brush" ? 1 : 0);
    }
    this.refresh(false);
  }

  move(site, from) {
    if (this.tool === "rectangle") {
      if (!this.corner) return;
      this.mask.data = this.before.slice();
      this.mask.rectangle(this.corner, site, 1);
    } else {
      if (!from) return;
      this.mask.stroke(from, site, this.size, this.tool === "brush" ? 1 : 0);
    }
    this.refresh(false);
  }

  up() {
    this.corner = null;
    this.refresh(true);
  }

  // By keyboard: a dab of the brush; two corners of a rectangle.
  press(site) {
    if (this.tool === "rectangle" && this.corner) {
      this.move(site);
      this.up();
    } else {
      this.down(site);
      if (this.tool !== "rectangle") this.up();
    }
  }

  undo() {
    if (this.mask.undo()) this.refresh(true);
  }

  redo() {
    if (this.mask.redo()) this.refresh(true);
  }

  invert() {
    this.bench.views.showMask();
    this.mask.invert();
    this.refresh(true);
  }

  clear() {
    if (this.mask.area) this.mask.clear();
    this.refresh(true);
  }

  set(data) {
    this.bench.views.showMask();
    this.mask.set(data);
    this.refresh(true);
  }

  refresh(done) {
    this.undoButton.disabled = !this.mask.past.length;
    this.redoButton.disabled = !this.mask.future.length;
    this.bench.stage.control = null;
    this.bench.stage.draw();
    if (done) this.measure();
    this.changed(done);
  }

  async take(kind = this.kinds.value) {
    this.kinds.value = "";
    if (!kind) return;
    await this.bench.attempt(`Finding the ${NAMES[kind] ?? kind}…`, async () => {
      const { image, stage } = this.bench;
      const site = stage.cursor ?? [Math.floor(this.mask.width / 2), Math.floor(this.mask.height / 2)];
      const body = { image: image.index, kind, x: site[0], y: site[1] };
      if (TAKEN.includes(kind)) body.fraction = this.share;
      if (kind === "weakest") body.budget = this.bench.budget();
      const reply = await this.bench.ask("mask", body);
      if (this.bench.image !== image) return; // another picture was opened meanwhile
      this.set(await readMask(pngBlob(reply.mask), this.mask.width, this.mask.height));
      this.bench.say(reply.remark ?? "");
    });
  }

  // The area, and the control of equal area.
  async measureNow() {
    const { mask } = this, { area } = mask, all = mask.data.length;
    if (!area) {
      this.controlData = null;
      this.area.textContent = this.bench.undo.on ? "Nothing is erased yet." : "No mask: an attack may change the whole image.";
      this.drawControl();
      if (this.sentMask && !this.bench.undo.on) { // Python and notebooks read the mask from the program
        this.sentMask = false;
        await this.bench.ask("area", { image: this.bench.image.index, mask: null }).catch((error) => this.bench.fail(error));
      }
      return;
    }
    const text = `${this.bench.undo.on ? "The green place" : "The mask"} covers ${percent(area / all)} of the image: ${counted(area, "pixel")}.`;
    this.area.textContent = text;
    if (this.bench.undo.on) return; // undoing has a control of its own
    this.sentMask = true;
    try {
      const reply = await this.bench.ask("area", { image: this.bench.image.index, mask: await this.text(), seed: this.bench.seed() });
      if (mask !== this.mask) return;
      this.controlData = reply.control && await readMask(pngBlob(reply.control), mask.width, mask.height);
      if (reply.remark) this.area.textContent = `${text} ${reply.remark}`;
      this.drawControl();
    } catch (error) {
      this.bench.fail(error);
    }
  }

  drawControl() {
    this.bench.stage.control = this.showControl.checked ? this.controlData : null;
    this.bench.stage.draw();
  }

  // For requests: base64 of the PNG file.
  async text() {
    return base64Of(await this.mask.png());
  }

  async save() {
    download("mask.png", await this.mask.png());
  }

  async open() {
    const [file] = this.file.files;
    this.file.value = "";
    if (!file) return;
    await this.bench.attempt("", async () => {
      const { mask } = this, data = await readMask(file, mask.width, mask.height);
      if (mask === this.mask) this.set(data); // another picture may have been opened meanwhile
    });
  }
}
