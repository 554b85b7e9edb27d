// Pictures and maps of one image that share a zoom, an overlay and a cursor.

import { colorOf, inflate, valueOf } from "./colors.js";
import { LayerBrowser } from "./layers.js";
import { SpotCells } from "./spots.js";

// The bytes of a picture, four for each pixel.
export async function readPixels(source, width, height) {
  const picture = new Image();
  picture.src = source;
  await picture.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  return context.getImageData(0, 0, width, height).data;
}

// The visible part [left, top, width, height] of a picture around a center, zoomed.
export function visiblePart(center, zoom, [wide, high]) {
  const width = Math.max(1, Math.round(wide / zoom));
  const height = Math.max(1, Math.round(high / zoom));
  const left = Math.max(0, Math.min(wide - width, Math.round(center[0] - width / 2)));
  const top = Math.max(0, Math.min(high - height, Math.round(center[1] - height / 2)));
  return [left, top, width, height];
}

// The pixel [x, y] under a pointer.
export function pixelUnder(canvas, event, [left, top, width, height]) {
  const box = canvas.getBoundingClientRect();
  const x = left + Math.floor(((event.clientX - box.left) / box.width) * width);
  const y = top + Math.floor(((event.clientY - box.top) / box.height) * height);
  return [Math.max(left, Math.min(left + width - 1, x)), Math.max(top, Math.min(top + height - 1, y))];
}

// Draws a part of a picture, pixel for pixel, with a map over it. `wide` is the width of the whole picture;
// `colored(at, x, y)` gives the map's color, with an opacity of its own if it has four parts, or null; the photograph
// turns gray under a map if `gray` is true.
export function paint(canvas, [left, top, width, height], source, wide, { colored = null, opacity = 1, gray = false } = {}) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const drawn = context.createImageData(width, height);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const x = left + column, y = top + row, at = y * wide + x, to = 4 * (row * width + column);
      let red = source[4 * at], green = source[4 * at + 1], blue = source[4 * at + 2];
      const color = colored && colored(at, x, y);
      if (colored && gray) red = green = blue = 0.299 * red + 0.587 * green + 0.114 * blue;
      if (color) {
        const part = color.length > 3 ? color[3] : opacity;
        red += part * (color[0] - red);
        green += part * (color[1] - green);
        blue += part * (color[2] - blue);
      }
      drawn.data[to] = Math.round(red);
      drawn.data[to + 1] = Math.round(green);
      drawn.data[to + 2] = Math.round(blue);
      drawn.data[to + 3] = 255;
    }
  }
  context.putImageData(drawn, 0, 0);
  return context;
}

// A cross that is seen on every color.
export function cross(context, x, y, width) {
  const arm = Math.max(1, Math.round(width / 28));
  context.fillStyle = "#fff";
  context.globalCompositeOperation = "difference";
  context.fillRect(x - arm, y, 2 * arm + 1, 1);
  context.fillRect(x, y - arm, 1, 2 * arm + 1);
  context.globalCompositeOperation = "source-over";
}

// All canvases in `root` with a data-image ("clean", "adversarial") or a data-map. `settings` has overlay, zoom, opacity,
// gray and swapped (while blinking: whether the clean image is in the place of the adversarial one); `say` takes the
// values under the pointer as text.
export class LinkedPictures {
  constructor(root, data, settings, say) {
    Object.assign(this, { root, data, settings, say });
    this.views = [...root.querySelectorAll("canvas.view, canvas.map")];
    this.center = [data.width / 2, data.height / 2];
  }

  async open() {
    const { width, height, maps } = this.data;
    const [clean, adversarial] = await Promise.all(
      ["clean", "adversarial"].map((name) => readPixels(this.data[name], width, height)));
    this.images = { clean, adversarial };
    await Promise.all(Object.values(maps).map(async (map) => { map.levels = await inflate(map.values); }));
    this.browsers = [...this.root.querySelectorAll(".layer-browser")].map((section) =>
      new LayerBrowser(section, this.data.series[section.dataset.series]));
    await Promise.all(this.browsers.map((browser) => browser.open()));
    this.spots = [...this.root.querySelectorAll("svg.spots")].map((svg) =>
      new SpotCells(svg, maps[svg.dataset.map].cells, ({ sentence, x, y }) => {
        this.center = [x, y];
        this.say(sentence);
        this.draw();
      }));
    // Tall images are not wider than what fits on a screen.
    for (const picture of this.root.querySelectorAll("canvas.view, canvas.map, svg.square, svg.spots")) picture.style.maxWidth = `${(24 * width) / height}rem`;
    this.listen();
    this.draw();
    this.root.dataset.ready = "yes";
  }

  listen() {
    for (const canvas of this.views) {
      const around = canvas.closest(".outlined") || canvas; // cells lie over their canvas
      around.addEventListener("pointermove", (event) => this.point(canvas, event));
      around.addEventListener("pointerleave", () => { this.cursor = null; this.draw(); });
      canvas.addEventListener("click", (event) => { this.center = this.site(canvas, event); this.draw(); });
    }
    // Canvases in a closed section are drawn when it opens.
    for (const section of this.root.querySelectorAll("details")) section.addEventListener("toggle", () => this.draw());
  }

  part() {
    return visiblePart(this.center, this.settings.zoom, [this.data.width, this.data.height]);
  }

  site(canvas, event) {
    return pixelUnder(canvas, event, this.part());
  }

  point(canvas, event) {
    this.cursor = this.site(canvas, event);
    const [x, y] = this.cursor;
    const at = y * this.data.width + x;
    const color = (name) => [...this.images[name].subarray(4 * at, 4 * at + 3)].join(" ");
    const { overlay } = this.settings;
    const name = canvas.dataset.map || (this.data.maps[overlay] ? overlay : "difference");
    const map = this.data.maps[name];
    const value = map.kind === "category" ? map.categories[map.levels[at]]
      : map.logarithmic ? `${(255 * 10 ** valueOf(map, at)).toPrecision(3)}/255` : valueOf(map, at).toPrecision(3);
    this.say(`row ${y}, column ${x} · clean ${color("clean")} · adversarial ${color("adversarial")} · ${name.replaceAll("_", " ")} ${value}`);
    this.draw();
  }

  draw() {
    // The outline of the square and the cells follow the zoom.
    for (const outline of this.root.querySelectorAll("svg.square, svg.spots")) outline.setAttribute("viewBox", this.part().join(" "));
    for (const canvas of this.views) if (canvas.offsetParent) this.drawOne(canvas);
    const caption = this.root.querySelector(".shown");
    if (caption) caption.textContent = this.settings.swapped ? "Clean (blinking)" : "Adversarial";
  }

  drawOne(canvas) {
    const part = this.part(), { overlay, opacity, gray, swapped } = this.settings;
    let image = canvas.dataset.image || "clean";
    if (image === "adversarial" && swapped) image = "clean";
    const map = this.data.maps[canvas.dataset.map || overlay];
    const source = this.images[/adversarial$/.test(canvas.dataset.map || "") ? "adversarial" : image];
    const context = paint(canvas, part, source, this.data.width, {
      colored: map && ((at, x, y) => colorOf(map, at, x, y)),
      opacity: canvas.dataset.opaque === undefined ? opacity : 1,
      gray,
    });
    if (this.cursor) cross(context, this.cursor[0] - part[0], this.cursor[1] - part[1], part[2]);
  }
}
