// The explanation page: its controls, its keys and its contact sheet.

import { drawSwatches, setColors } from "./colors.js";
import { reveal } from "./folds.js";
import { LinkedPictures } from "./pictures.js";

setColors(JSON.parse(document.getElementById("shared").textContent));
const names = ["overlay", "blink", "zoom", "opacity", "gray", "readout"];
const controls = Object.fromEntries(names.map((name) => [name, document.getElementById(name)]));
const settings = {
  swapped: false, // while blinking
  get overlay() { return controls.overlay.value; },
  get zoom() { return Number(controls.zoom.value); },
  get opacity() { return controls.opacity.value / 100; },
  get gray() { return controls.gray.checked; },
};
const say = (text) => { controls.readout.textContent = text; };
const pairs = [...document.querySelectorAll("article.pair")].map((article) =>
  new LinkedPictures(article, JSON.parse(article.querySelector(".data").textContent), settings, say));
const drawAll = () => pairs.forEach((pair) => pair.draw());
let current = 0;
let blinking;

function blink() {
  const on = controls.blink.getAttribute("aria-pressed") !== "true";
  controls.blink.setAttribute("aria-pressed", String(on));
  clearInterval(blinking);
  settings.swapped = false;
  if (on) blinking = setInterval(() => { settings.swapped = !settings.swapped; drawAll(); }, 500);
  drawAll();
}

function go(step) {
  current = Math.max(0, Math.min(pairs.length - 1, current + step));
  pairs[current].root.scrollIntoView();
  pairs[current].root.focus({ preventScroll: true });
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

function sortSheet(key) {
  const sheet = document.getElementById("sheet");
  const value = (item) => (key ? -Number(item.getAttribute(`data-${key.replaceAll("_", "-")}`)) : Number(item.dataset.order));
  const sign = key.endsWith("_p") ? -1 : 1;
  const last = (number) => (Number.isNaN(number) ? Infinity : number);
  [...sheet.children].sort((a, b) => last(sign * value(a)) - last(sign * value(b))).forEach((item) => sheet.append(item));
}

document.addEventListener("keydown", press);
document.addEventListener("focusin", (event) => {
  const article = event.target.closest("article.pair");
  if (article) current = pairs.findIndex((pair) => pair.root === article);
});
for (const name of ["overlay", "zoom", "opacity", "gray"]) controls[name].addEventListener("input", drawAll);
controls.blink.addEventListener("click", blink);
document.getElementById("sort")?.addEventListener("change", (event) => sortSheet(event.target.value));
window.addEventListener("beforeprint", drawAll); // after all sections were opened (folds.js)
drawSwatches(document);
Promise.all(pairs.map((pair) => pair.open())).then(() => {
  reveal();
  document.body.dataset.ready = "yes";
});
