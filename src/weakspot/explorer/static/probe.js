// The probe: what the network says if the pixels under the cursor had another color, and a map of that.

import { button, choice, field, floats, latest, make, percent, signed } from "./elements.js";

const SIZES = [1, 3, 5, 9, 16, 32];

export class Probe {
  constructor(bench) {
    this.bench = bench;
    this.sizes = choice(SIZES.map((size) => [size, size === 1 ? "1 pixel" : `${size} × ${size}`]),
      { on: { change: () => this.change() } });
    this.color = make("input", { type: "color", "aria-label": "Color of the probe", value: "#000000", on: { change: () => this.change() } });
    this.heatOn = make("input", { type: "checkbox", checked: true, on: { change: () => this.change() } });
    this.key = make("p", { class: "note heat-key", hidden: true });
    this.place = button("Color the mask", () => this.probePlace(), { title: "What the network says if all of the mask had this color" });
    this.root = make("div", { class: "line probe", role: "group", "aria-label": "Probe" },
      field("Change", this.sizes), field("to", this.color),
      make("label", { class: "check" }, this.heatOn, "heat map"), this.place);
    this.send = latest((body) => this.sendNow(body));
    this.number = 0;
    this.page = crypto.getRandomValues(new Uint32Array(2)).join("-"); // randomUUID needs a secure context
  }

  get size() { return Number(this.sizes.value); }

  get rgb() { return [1, 3, 5].map((at) => parseInt(this.color.value.slice(at, at + 2), 16)); }

  at([x, y]) {
    this.wanted = true;
    this.send({ image: this.bench.image.index, x, y, size: this.size, color: this.rgb });
    this.startHeat();
  }

  leave() {
    this.wanted = false;
    this.bench.stage.hideTip();
  }

  async probePlace() {
    if (!this.bench.brush.mask.area) {
      this.bench.say("Paint a mask first.");
      return;
    }
    this.wanted = true;
    await this.send({ image: this.bench.image.index, mask: await this.bench.brush.text(), color: this.rgb });
  }

  async sendNow(body) {
    try {
      const reply = await this.bench.ask("probe", { ...body, page: this.page, n: ++this.number });
      if (!reply.overtaken && this.wanted && body.image === this.bench.image.index) this.show(body, reply);
    } catch (error) {
      this.bench.fail(error);
    }
  }

  // Beside the cursor: the classes with the largest logits, and what became of the margin.
  show(body, reply) {
    const { label } = this.bench.image;
    const where = body.mask ? "The mask" : `Row ${body.y}, column ${body.x}${body.size > 1 ? `, ${body.size} × ${body.size} pixels` : ""}`;
    // Other views show an attack, which the probe knows nothing of.
    const place = this.bench.stage.shown === "clean" ? where : `Clean picture: ${where.toLowerCase()}`;
    const rows = reply.top.slice(0, 4).map((guess) => make("tr", guess.index === label.index ? { class: "own" } : {},
      make("th", { scope: "row" }, guess.name), make("td", {}, signed(guess.logit)), make("td", {}, percent(guess.probability))));
    const decision = reply.changed ? `The network now says ${reply.predicted.name}.` : "The decision stays.";
    this.bench.stage.showTip(
      make("strong", {}, place),
      make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "class"), make("th", { scope: "col" }, "logit"), make("th", { scope: "col" }, ""))),
        make("tbody", {}, ...rows)),
      make("p", { class: reply.changed ? "changed" : "" }, `${decision} Margin ${signed(reply.margin)} (${signed(reply.change, { always: true })}).`));
    this.bench.spoken.textContent = `${place}: ${decision} Margin ${signed(reply.margin)}.`;
  }

  change() {
    this.forget();
    if (this.bench.tool === "probe") this.startHeat();
    if (this.bench.stage.cursor && !this.bench.stage.tip.hidden) this.at(this.bench.stage.cursor);
    this.bench.stateChanged();
  }

  // Fills the heat map row by row, once for each picture, size and color.
  startHeat() {
    if (!this.heatOn.checked || this.job || this.bench.stage.shown !== "clean") return;
    const { image, stage } = this.bench, mine = {};
    this.job = mine;
    if (this.size > Math.min(image.height, image.width)) return;
    this.key.hidden = false;
    this.key.textContent = `Heat map: purple where this color lowers the margin of ${image.label.name}, green where it raises it. It fills in row by row.`;
    mine.stop = this.bench.subscribe("heat", { image: image.index, size: this.size, color: this.rgb }, (event) => {
      if (this.job !== mine || event.event !== "rows") return;
      const { rows, columns, row, clean } = event;
      stage.heat ??= { rows, columns, values: new Float32Array(rows * columns).fill(NaN), top: 0 };
      floats(event.margins).values.forEach((margin, at) => {
        stage.heat.values[row * columns + at] = margin - clean;
        stage.heat.top = Math.max(stage.heat.top, Math.abs(margin - clean));
      });
      this.key.textContent = `Heat map: purple where this color lowers the margin of ${image.label.name} (by up to ${signed(stage.heat.top)}), green where it raises it. ${row + 1 < rows ? `Row ${row + 1} of ${rows}.` : `${rows} × ${columns} places.`}`;
      stage.draw();
    }, (error) => this.bench.fail(error)).stop;
  }

  forget() {
    this.job?.stop?.();
    this.job = null;
    this.key.hidden = true;
    this.bench.stage.heat = null;
    this.bench.stage.draw();
  }
}
