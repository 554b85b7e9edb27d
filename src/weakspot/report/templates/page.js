// Maps arrive as raw levels with their range and are colored here, so that opacity, overlay and zoom need no server.

const shared = JSON.parse(document.getElementById("shared").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const tables = Object.fromEntries(Object.entries(shared.tables).map(([kind, text]) => [kind, bytes(text)]));
const categories = shared.categories.map((color) => [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16)));
const names = ["overlay", "blink", "zoom", "opacity", "gray", "readout"];
const controls = Object.fromEntries(names.map((name) => [name, document.getElementById(name)]));
let swapped = false; // while blinking: whether the clean image is in the place of the adversarial one
let blinking;

async function inflate(text) {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function readPixels(source, width, height) {
  const picture = new Image();
  picture.src = source;
  await picture.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  return context.getImageData(0, 0, width, height).data;
}

// Marks the sites of a category with a pattern, so that it can be recognized without color: solid, stripes, dots, then both.
function marked(category, x, y) {
  if (category === 1) return true;
  if (category === 2) return (x + y) % 6 < 4;
  if (category === 3) return !(x % 4 < 2 && y % 4 < 2);
  return (x - y + 4096) % (category + 2) > 1;
}

// The color of one site of a map as [red, green, blue], or null where the photograph shows through.
function colorOf(map, at, x, y) {
  const level = map.levels[at];
  if (map.kind === "category") {
    if (level === 0) return null;
    const color = categories[level % categories.length];
    return marked(level, x, y) ? color : color.map((part) => part * 0.45);
  }
  const [low, high] = map.limits;
  const value = map.range[0] + (level / 255) * (map.range[1] - map.range[0]);
  const place = Math.max(0, Math.min(255, Math.round((255 * (value - low)) / (high - low))));
  return tables[map.kind].subarray(3 * place, 3 * place + 3);
}

class Pair {
  constructor(article) {
    this.article = article;
    this.data = JSON.parse(article.querySelector(".data").textContent);
    this.views = [...article.querySelectorAll("canvas.view, canvas.map")];
    this.center = [this.data.width / 2, this.data.height / 2];
  }

  async open() {
    const { width, height, maps } = this.data;
    const [clean, adversarial] = await Promise.all(
      ["clean", "adversarial"].map((name) => readPixels(this.data[name], width, height)));
    this.images = { clean, adversarial };
    await Promise.all(Object.values(maps).map(async (map) => { map.levels = await inflate(map.values); }));
    this.browsers = [...this.article.querySelectorAll(".layer-browser")].map((section) =>
      new LayerBrowser(section, this.data.series[section.dataset.series]));
    await Promise.all(this.browsers.map((browser) => browser.open()));
    // Tall images are not wider than what fits on a screen.
    for (const picture of this.article.querySelectorAll("canvas.view, canvas.map, svg.square")) picture.style.maxWidth = `${(24 * width) / height}rem`;
    this.listen();
    this.draw();
    this.article.dataset.ready = "yes";
  }

  listen() {
    for (const canvas of this.views) {
      canvas.addEventListener("pointermove", (event) => this.point(canvas, event));
      canvas.addEventListener("pointerleave", () => { this.cursor = null; this.draw(); });
      canvas.addEventListener("click", (event) => { this.center = this.site(canvas, event); this.draw(); });
    }
    // Canvases in a closed section are drawn when it opens.
    for (const section of this.article.querySelectorAll("details")) section.addEventListener("toggle", () => this.draw());
  }

// The visible part of the image in pixels: left, top, width, height.
  window() {
    const zoom = Number(controls.zoom.value);
    const width = Math.max(1, Math.round(this.data.width / zoom));
    const height = Math.max(1, Math.round(this.data.height / zoom));
    const left = Math.max(0, Math.min(this.data.width - width, Math.round(this.center[0] - width / 2)));
    const top = Math.max(0, Math.min(this.data.height - height, Math.round(this.center[1] - height / 2)));
    return [left, top, width, height];
  }

  site(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const [left, top, width, height] = this.window();
    const x = left + Math.floor(((event.clientX - box.left) / box.width) * width);
    const y = top + Math.floor(((event.clientY - box.top) / box.height) * height);
    return [Math.max(left, Math.min(left + width - 1, x)), Math.max(top, Math.min(top + height - 1, y))];
  }

  point(canvas, event) {
    this.cursor = this.site(canvas, event);
    const [x, y] = this.cursor;
    const at = y * this.data.width + x;
    const color = (name) => [...this.images[name].subarray(4 * at, 4 * at + 3)].join(" ");
    const name = canvas.dataset.map || (this.data.maps[controls.overlay.value] ? controls.overlay.value : "difference");
    const map = this.data.maps[name];
    const level = map.range[0] + (map.levels[at] / 255) * (map.range[1] - map.range[0]);
    const value = map.kind === "category" ? map.categories[map.levels[at]]
      : map.logarithmic ? `${(255 * 10 ** level).toPrecision(3)}/255` : level.toPrecision(3);
    controls.readout.textContent =
      `row ${y}, column ${x} · clean ${color("clean")} · adversarial ${color("adversarial")} · ${name.replaceAll("_", " ")} ${value}`;
    this.draw();
  }

  draw() {
    // The outline of the square follows the zoom.
    const outline = this.article.querySelector("svg.square");
    if (outline) outline.setAttribute("viewBox", this.window().join(" "));
    for (const canvas of this.views) if (canvas.offsetParent) this.drawOne(canvas);
    this.article.querySelector(".shown").textContent = swapped ? "Clean (blinking)" : "Adversarial";
  }

  drawOne(canvas) {
    const [left, top, width, height] = this.window();
    let image = canvas.dataset.image || "clean";
    if (image === "adversarial" && swapped) image = "clean";
    const map = this.data.maps[canvas.dataset.map || controls.overlay.value];
    const opacity = canvas.dataset.opaque === undefined ? controls.opacity.value / 100 : 1;
    const source = this.images[/adversarial$/.test(canvas.dataset.map || "") ? "adversarial" : image];
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const drawn = context.createImageData(width, height);
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width; column++) {
        const x = left + column, y = top + row, at = y * this.data.width + x, to = 4 * (row * width + column);
        let red = source[4 * at], green = source[4 * at + 1], blue = source[4 * at + 2];
        const color = map && colorOf(map, at, x, y);
        if (map && controls.gray.checked) red = green = blue = 0.299 * red + 0.587 * green + 0.114 * blue;
        if (color) {
          red += opacity * (color[0] - red);
          green += opacity * (color[1] - green);
          blue += opacity * (color[2] - blue);
        }
        drawn.data.set([red, green, blue, 255], to);
      }
    }
    context.putImageData(drawn, 0, 0);
    if (this.cursor) this.cross(context, this.cursor[0] - left, this.cursor[1] - top, width, height);
  }

  cross(context, x, y, width, height) {
    const arm = Math.max(1, Math.round(width / 28));
    context.fillStyle = "#fff";
    context.globalCompositeOperation = "difference";
    context.fillRect(x - arm, y, 2 * arm + 1, 1);
    context.fillRect(x, y - arm, 1, 2 * arm + 1);
    context.globalCompositeOperation = "source-over";
  }
}

// Maps along the layers, chosen with a slider.
class LayerBrowser {
  constructor(section, frames) {
    this.frames = frames;
    this.canvas = section.querySelector(".layer");
    this.slider = section.querySelector("input");
    this.cursor = section.querySelector(".cursor");
    this.step = section.querySelector(".step");
    this.top = section.querySelector(".top");
    this.curves = [...section.querySelectorAll(".value")].map((place) => [place, JSON.parse(place.dataset.values)]);
    this.width = section.querySelector("svg").viewBox.baseVal.width;
    this.slider.addEventListener("input", () => this.draw());
  }

  async open() {
    await Promise.all(this.frames.map(async (frame) => { frame.levels = await inflate(frame.values); }));
    this.draw();
  }

  draw() {
    const number = Number(this.slider.value), frame = this.frames[number];
    const { width, height } = frame;
    this.canvas.width = width;
    this.canvas.height = height;
    const context = this.canvas.getContext("2d");
    const drawn = context.createImageData(width, height);
    frame.levels.forEach((level, at) => {
      const place = Math.max(0, Math.min(255, Math.round((level * frame.highest) / frame.top)));
      drawn.data.set([...tables.magnitude.subarray(3 * place, 3 * place + 3), 255], 4 * at);
    });
    context.putImageData(drawn, 0, 0);
    const across = this.frames.length > 1 ? (this.width * number) / (this.frames.length - 1) : this.width / 2;
    this.cursor.setAttribute("x1", across);
    this.cursor.setAttribute("x2", across);
    this.step.textContent = `${number + 1} of ${this.frames.length}: ${frame.step}, ${height} × ${width}`;
    this.top.textContent = frame.top.toPrecision(3);
    for (const [place, values] of this.curves) place.textContent = values[number] === null ? "not defined" : String(values[number]);
  }
}

function drawSwatches() {
  for (const canvas of document.querySelectorAll(".swatch")) {
    const category = Number(canvas.dataset.category);
    const context = canvas.getContext("2d");
    for (let y = 0; y < canvas.height; y++) {
      for (let x = 0; x < canvas.width; x++) {
        const dim = marked(category, x, y) ? 1 : 0.45;
        context.fillStyle = `rgb(${categories[category % categories.length].map((part) => part * dim).join(",")})`;
        context.fillRect(x, y, 1, 1);
      }
    }
  }
}

function sortSheet(key) {
  const sheet = document.getElementById("sheet");
  const value = (item) => (key ? -Number(item.getAttribute(`data-${key.replaceAll("_", "-")}`)) : Number(item.dataset.order));
  const sign = key.endsWith("_p") ? -1 : 1;
  const last = (number) => (Number.isNaN(number) ? Infinity : number);
  [...sheet.children].sort((a, b) => last(sign * value(a)) - last(sign * value(b))).forEach((item) => sheet.append(item));
}

const pairs = [...document.querySelectorAll("article.pair")].map((article) => new Pair(article));
const drawAll = () => pairs.forEach((pair) => pair.draw());
let current = 0;

function blink() {
  const on = controls.blink.getAttribute("aria-pressed") !== "true";
  controls.blink.setAttribute("aria-pressed", String(on));
  clearInterval(blinking);
  swapped = false;
  if (on) blinking = setInterval(() => { swapped = !swapped; drawAll(); }, 500);
  drawAll();
}

function go(step) {
  current = Math.max(0, Math.min(pairs.length - 1, current + step));
  pairs[current].article.scrollIntoView();
  pairs[current].article.focus({ preventScroll: true });
}

function press(event) {
  const busy = /^(INPUT|SELECT|BUTTON|TEXTAREA|SUMMARY)$/.test(event.target.tagName);
  if (busy || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowRight") go(1);
  else if (event.key === "ArrowLeft") go(-1);
  else if (event.key === " ") blink();
  else if (/^\d$/.test(event.key) && Number(event.key) < controls.overlay.length) {
    controls.overlay.selectedIndex = Number(event.key);
    drawAll();
  } else return;
  event.preventDefault();
}

document.addEventListener("keydown", press);
document.addEventListener("focusin", (event) => {
  const article = event.target.closest("article.pair");
  if (article) current = pairs.findIndex((pair) => pair.article === article);
});
for (const name of ["overlay", "zoom", "opacity", "gray"]) controls[name].addEventListener("input", drawAll);
controls.blink.addEventListener("click", blink);
document.getElementById("sort")?.addEventListener("change", (event) => sortSheet(event.target.value));
window.addEventListener("beforeprint", drawAll); // after all sections were opened (folds.js)
drawSwatches();
Promise.all(pairs.map((pair) => pair.open())).then(() => {
  reveal();
  document.body.dataset.ready = "yes";
});
