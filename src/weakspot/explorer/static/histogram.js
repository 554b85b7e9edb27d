// A histogram of one score, stacked by outcome, with a brush: drag over the bars, or move the two sliders below them.

import { make } from "./elements.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 60;
// The order from the bottom; names as the server sends them.
export const OUTCOMES = [["fooled", "fooled"], ["withstood", "withstood"], ["misclassified without an attack", "misclassified"], ["unknown", "unknown"]];

export function short(value) {
  if (value === null || value === undefined) return "missing";
  if (typeof value !== "number") return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1000 ? Math.round(size).toLocaleString("en-US") : size < 1e-3 ? size.toExponential(1) : String(Number(size.toPrecision(3)));
  return (value < 0 ? "−" : "") + text;
}

function drawn(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export class Histogram {
  // `onBrush([first, last] or null)` is called while the brush moves.
  constructor(column, bins, onBrush) {
    this.column = column;
    this.bins = bins;
    this.onBrush = onBrush;
    this.range = null;
    this.reply = null;
    this.whole = null;
    this.svg = drawn("svg", { viewBox: `0 0 ${bins} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    this.sliders = ["from", "to"].map((end) => make("input", { type: "range", min: 0, max: bins - 1, step: 1, value: end === "from" ? 0 : bins - 1, "aria-label": `${column}: ${end}`, on: { input: () => this.slid(end) } }));
    this.text = make("output", { class: "note" });
    this.clear = make("button", { type: "button", hidden: true, "aria-label": `clear the filter of ${column}`, on: { click: () => this.brush(null) } }, "clear");
    this.element = make("fieldset", { class: "histogram" }, make("legend", {}, column), this.svg, make("div", { class: "ends" }, ...this.sliders), make("div", { class: "line" }, this.text, this.clear));
    this.listen();
  }

  listen() {
    let start = null;
    const bin = (event) => {
      const box = this.svg.getBoundingClientRect();
      return Math.max(0, Math.min(this.bins - 1, Math.floor((this.bins * (event.clientX - box.left)) / (box.width || 1))));
    };
    this.svg.addEventListener("pointerdown", (event) => {
      start = bin(event);
      this.svg.setPointerCapture(event.pointerId);
      this.brush([start, start]);
      event.preventDefault();
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (start === null) return;
      const end = bin(event);
      this.brush([Math.min(start, end), Math.max(start, end)]);
    });
    for (const name of ["pointerup", "pointercancel"]) this.svg.addEventListener(name, () => { start = null; });
  }

  slid(moved) {
    let [first, last] = this.sliders.map((slider) => Number(slider.value));
    // A slider that meets the other one pushes it.
    if (first > last) [first, last] = moved === "from" ? [first, first] : [last, last];
    this.brush(first === 0 && last === this.bins - 1 ? null : [first, last]);
  }

  brush(range) {
    if (JSON.stringify(range) === JSON.stringify(this.range)) return;
    this.mark(range);
    this.onBrush(range);
  }

  // Shows a filter that was set elsewhere.
  mark(range) {
    this.range = range;
    const [first, last] = range ?? [0, this.bins - 1];
    this.sliders[0].value = first;
    this.sliders[1].value = last;
    this.clear.hidden = range === null;
    this.draw();
  }

  edge(at) {
    return this.reply.low + (at * (this.reply.high - this.reply.low)) / this.bins;
  }

  show(reply) {
    this.reply = reply;
    // The first reply, without filters, stays as the outline behind.
    this.whole ??= this.totals();
    this.draw();
  }

  totals() {
    return Array.from({ length: this.bins }, (_, at) => OUTCOMES.reduce((sum, [name]) => sum + (this.reply.counts[name]?.[at] ?? 0), 0));
  }

  draw() {
    if (this.reply === null) return;
    const totals = this.totals();
    const top = Math.max(1, ...totals), behind = Math.max(1, ...this.whole);
    const parts = [];
    for (let at = 0; at < this.bins; at++) {
      const outline = (HEIGHT * this.whole[at]) / behind;
      parts.push(drawn("rect", { class: "whole", x: at, width: 1, y: HEIGHT - outline, height: outline }));
    }
    for (let at = 0; at < this.bins; at++) {
      let y = HEIGHT;
      const inside = this.range === null || (at >= this.range[0] && at <= this.range[1]);
      for (const [name, kind] of OUTCOMES) {
        const height = (HEIGHT * (this.reply.counts[name]?.[at] ?? 0)) / top;
        y -= height;
        if (height > 0) parts.push(drawn("rect", { class: `bar ${kind}${inside ? "" : " out"}`, x: at + 0.05, width: 0.9, y, height }));
      }
    }
    this.svg.replaceChildren(...parts);
    const [first, last] = this.range ?? [0, this.bins - 1];
    // The outermost bins hold everything beyond the axis.
    const from = this.range && first > 0 ? short(this.edge(first)) : null, to = this.range && last < this.bins - 1 ? short(this.edge(last + 1)) : null;
    const chosen = this.range ? `${from === null ? "up" : `from ${from}`} ${to === null ? (from === null ? "to the end" : "on") : `to ${to}`}` : `${short(this.reply.low)} to ${short(this.reply.high)}`;
    this.text.textContent = chosen + (this.reply.missing && !this.range ? `; ${this.reply.missing.toLocaleString("en-US")} without a value` : "");
    this.sliders[0].setAttribute("aria-valuetext", short(this.edge(first)));
    this.sliders[1].setAttribute("aria-valuetext", short(this.edge(last + 1)));
  }
}
