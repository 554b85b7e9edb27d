// Maps along the layers of a network, chosen with a slider.

import { inflate, tableColor } from "./colors.js";

// Draws levels (0 to 255, of `highest`) as magnitudes whose brightest color is `top`.
export function drawMagnitudes(canvas, { levels, width, height, highest, top }) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const drawn = context.createImageData(width, height);
  levels.forEach((level, at) => {
    drawn.data.set([...tableColor("magnitude", (level * highest) / (255 * top)), 255], 4 * at);
  });
  context.putImageData(drawn, 0, 0);
}

export class LayerBrowser {
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
    drawMagnitudes(this.canvas, frame);
    const across = this.frames.length > 1 ? (this.width * number) / (this.frames.length - 1) : this.width / 2;
    this.cursor.setAttribute("x1", across);
    this.cursor.setAttribute("x2", across);
    this.step.textContent = `${number + 1} of ${this.frames.length}: ${frame.step}, ${frame.height} × ${frame.width}`;
    this.top.textContent = frame.top.toPrecision(3);
    for (const [place, values] of this.curves) place.textContent = values[number] === null ? "not defined" : String(values[number]);
  }
}
