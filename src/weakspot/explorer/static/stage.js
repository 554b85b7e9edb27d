// The large picture: what is drawn on it, its zoom, its cursor, and the pointer and keys on it.

import { categories } from "./colors.js";
import { make } from "./elements.js";
import { onEdge } from "./mask.js";
import { cross, paint, pixelUnder, visiblePart } from "./pictures.js";

export const MASK = 2, CONTROL = 1; // categories whose colors these places have
const ERASED = 4;
const LOWERS = [118, 42, 131], RAISES = [27, 120, 55]; // no colors of masks
const STEPS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };

export class Stage {
  // `acts` has move(site, event), down(site, event), up(site), leave(), press(site): what the current tool does.
  constructor(acts) {
    this.acts = acts;
    this.canvas = make("canvas", {
      class: "picture", tabindex: 0, role: "application", "aria-roledescription": "picture",
      "aria-label": "Picture. Arrow keys move the cursor, with Shift by ten pixels; Space uses the tool.",
    });
    this.spots = make("div", { class: "cells" });
    this.tip = make("div", { class: "tip", hidden: true });
    this.ring = make("div", { class: "ring", hidden: true });
    this.root = make("div", { class: "stage" }, this.canvas, this.spots, this.ring, this.tip);
    this.size = [1, 1];
    this.pictures = {}; // name to pixels
    this.shown = "clean";
    this.zoom = 1;
    this.center = [0.5, 0.5];
    this.cursor = null;
    this.heat = null;
    this.mask = null;
    this.erased = false; // whether the mask says where the attack is undone
    this.control = null;
    this.plain = false; // whether nothing lies over the picture
    this.brush = 0; // pixels across, while a brush is the tool
    this.listen();
  }

  open(pixels, [width, height]) {
    this.size = [width, height];
    this.pictures = { clean: pixels };
    this.shown = "clean";
    this.center = [width / 2, height / 2];
    this.cursor = null;
    this.heat = this.control = null;
    this.zoom = 1;
    this.spots.replaceChildren();
    this.root.style.setProperty("--ratio", width / height);
    this.draw();
  }

  part() {
    return visiblePart(this.center, this.zoom, this.size);
  }

  zoomTo(zoom) {
    this.zoom = zoom;
    if (this.cursor) this.center = [...this.cursor];
    this.draw();
  }

  listen() {
    const { canvas, acts } = this;
    const site = (event) => pixelUnder(canvas, event, this.part());
    let held = null, panned = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button === 1 || event.altKey) { // the middle button, or Alt, moves the visible part
        panned = { at: [event.clientX, event.clientY], center: this.center };
        event.preventDefault();
        return;
      }
      if (event.button !== 0) return;
      if (event.isTrusted) canvas.setPointerCapture(event.pointerId);
      held = site(event);
      this.point(held, event);
      acts.down(held, event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (panned) {
        const scale = this.part()[2] / canvas.clientWidth;
        this.center = panned.center.map((at, axis) => at - scale * ((axis ? event.clientY : event.clientX) - panned.at[axis]));
        this.draw();
        return;
      }
      const now = site(event);
      this.point(now, event);
      acts.move(now, { from: held, event });
      if (held) held = now;
    });
    const release = () => {
      panned = null;
      if (!held) return;
      held = null;
      acts.up();
    };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("pointerleave", () => {
      if (held) return;
      this.ring.hidden = true;
      acts.leave();
    });
    canvas.addEventListener("keydown", (event) => this.press(event));
    canvas.addEventListener("blur", () => acts.leave());
    new ResizeObserver(() => this.placeRing()).observe(canvas);
  }

  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = STEPS[event.key];
    if (step) {
      const far = event.shiftKey ? 10 : 1;
      const from = this.cursor ?? this.size.map((side) => Math.floor(side / 2));
      const site = this.cursor ? from.map((at, axis) => Math.max(0, Math.min(this.size[axis] - 1, at + far * step[axis]))) : from;
      this.keepVisible(site);
      this.point(site);
      this.acts.move(site, { from: null, event });
    } else if (event.key === " " || event.key === "Enter") {
      if (!this.cursor) this.point(this.size.map((side) => Math.floor(side / 2)));
      this.acts.press(this.cursor);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  keepVisible([x, y]) {
    const [left, top, width, height] = this.part();
    if (x < left || y < top || x >= left + width || y >= top + height) this.center = [x, y];
  }

  point(site) {
    this.cursor = site;
    this.placeRing();
    this.draw();
  }

  // The outline of the brush around the cursor, and the tip beside it.
  placeRing() {
    const [left, top, width, height] = this.part();
    const scale = this.canvas.clientWidth / width;
    if (!this.cursor || !this.brush) this.ring.hidden = true;
    else {
      this.ring.hidden = false;
      const middle = this.brush % 2 ? 0.5 : 0;
      const side = this.brush * scale;
      this.ring.style.width = this.ring.style.height = `${side}px`;
      this.ring.style.left = `${this.canvas.offsetLeft + (this.cursor[0] - left + middle) * scale - side / 2}px`;
      this.ring.style.top = `${this.canvas.offsetTop + (this.cursor[1] - top + middle) * scale - side / 2}px`;
    }
    if (this.tip.hidden || !this.cursor) return;
    const x = this.canvas.offsetLeft + (this.cursor[0] - left + 0.5) * scale;
    const y = this.canvas.offsetTop + (this.cursor[1] - top + 0.5) * (this.canvas.clientHeight / height);
    const { offsetWidth, offsetHeight } = this.tip;
    const right = x + 18 + offsetWidth <= this.root.clientWidth;
    const below = y + 18 + offsetHeight <= this.root.clientHeight;
    this.tip.style.left = `${Math.max(0, right ? x + 18 : x - 18 - offsetWidth)}px`;
    this.tip.style.top = `${Math.max(0, below ? y + 18 : y - 18 - offsetHeight)}px`;
  }

  showTip(...content) {
    this.tip.replaceChildren(...content);
    this.tip.hidden = false;
    this.placeRing();
  }

  hideTip() {
    this.tip.hidden = true;
  }

  draw() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => { this.waiting = null; this.drawNow(); });
  }

  drawNow() {
    const source = this.pictures[this.shown] ?? this.pictures.clean;
    if (!source) return;
    const part = this.part();
    const context = paint(this.canvas, part, source, this.size[0], { colored: this.plain ? null : this.coloring() });
    if (this.cursor) cross(context, this.cursor[0] - part[0], this.cursor[1] - part[1], part[2]);
    this.spots.firstElementChild?.setAttribute("viewBox", part.join(" "));
  }

  // What lies over the photograph: the mask and its control as tinted places with an outline, else the heat map.
  coloring() {
    const [width, height] = this.size, mask = this.mask?.data, { control, heat } = this;
    if (!mask && !control && !heat) return null;
    const edge = (data, x, y) => onEdge(data, x, y, width, height);
    const tint = categories[this.erased ? ERASED : MASK], other = categories[CONTROL];
    const [outline, inside, otherOutline, stripe] = [[...tint, 1], [...tint, 0.4], [...other, 1], [...other, 0.6]];
    return (site, x, y) => {
      if (mask && mask[site]) return edge(mask, x, y) ? outline : inside;
      if (control && control[site]) return edge(control, x, y) ? otherOutline : (x + y) % 6 < 2 ? stripe : null;
      return heat ? this.heatColor(x, y) : null;
    };
  }

  // Purple where the color of the probe lowers the margin, green where it raises it; clear where it changes nothing.
  heatColor(x, y) {
    const { rows, columns, values, top } = this.heat, [width, height] = this.size;
    const value = values[Math.floor((y * rows) / height) * columns + Math.floor((x * columns) / width)];
    if (Number.isNaN(value) || !top) return null;
    return [...(value < 0 ? LOWERS : RAISES), 0.8 * Math.min(1, Math.abs(value) / top) ** 0.7];
  }
}
