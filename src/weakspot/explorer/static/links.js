// The state of the bench as text after # in the address: nothing of it is sent to a server.

import { base64Of, button, make } from "./elements.js";
import { pngBlob, readMask } from "./mask.js";

const LONGEST = 8000; // characters of a mask in a link

export async function stateText(bench) {
  const { image, brush, probe, attack, stage } = bench;
  const parts = new URLSearchParams({ image: image.index, name: image.name, attack: attack.attacks.value, seed: attack.seedInput.value });
  if (!attack.budgetField.hidden) parts.set("budget", attack.budget.value);
  if (!attack.stepsField.hidden) parts.set("steps", attack.steps.value);
  if (attack.target.value && !attack.targetField.hidden) parts.set("target", attack.target.value);
  parts.set("tool", brush.tool);
  parts.set("probe", `${probe.size} ${probe.color.value}`);
  if (stage.cursor) parts.set("at", stage.cursor.join(" "));
  const mask = bench.undo.on ? bench.undo.kept : brush.mask;
  if (mask.area) {
    const text = (await base64Of(await mask.png())).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
    parts.set("mask", text.length <= LONGEST ? text : "saved-apart");
  }
  return parts.toString();
}

// All that the address holds: the state of the bench, if there is a picture on it, and that of the gallery.
export async function addressText(bench) {
  const parts = bench.image ? [await stateText(bench)] : [];
  if (bench.records) parts.push(new URLSearchParams({ records: JSON.stringify(bench.records) }).toString());
  return parts.join("&");
}

// The gallery's part of an address; null if there is none that can be read.
export function recordsOf(text) {
  try {
    const records = JSON.parse(new URLSearchParams(text).get("records"));
    return records && typeof records === "object" ? records : null;
  } catch {
    return null;
  }
}

// Puts a state on the bench; parts that do not fit are left out, and named.
export async function restore(bench, text) {
  const parts = new URLSearchParams(text);
  const missing = [];
  const wanted = Number(parts.get("image"));
  const images = bench.images;
  // The number alone would show another picture after a restart with other files.
  const index = images.findIndex((one) => one.index === wanted && one.name === parts.get("name"));
  const found = index >= 0 ? images[index] : images.find((one) => one.name === parts.get("name"));
  if (!found) {
    if (parts.has("name")) bench.say(`This link is about “${parts.get("name")}”, which is not among the pictures here.`);
    return;
  }
  await bench.open(found.index);
  const { attack, brush, probe } = bench;
  if (parts.has("attack")) {
    if (attack.list.some(({ name }) => name === parts.get("attack"))) attack.attacks.value = parts.get("attack");
    else missing.push("the attack");
    attack.choose();
  }
  for (const [key, input] of [["budget", attack.budget], ["steps", attack.steps], ["target", attack.target], ["seed", attack.seedInput]]) {
    if (parts.has(key)) input.value = parts.get(key);
  }
  const [size, color] = (parts.get("probe") ?? "").split(" ");
  if (/^#[0-9a-f]{6}$/i.test(color ?? "")) probe.color.value = color;
  if ([...probe.sizes.options].some((one) => one.value === size)) probe.sizes.value = size;
  if (brush.mask.area) brush.clear(); // that of an earlier attack
  if (parts.get("mask") === "saved-apart") missing.push("the mask, which was too large for a link (save it as a file)");
  else if (parts.has("mask")) {
    try {
      brush.set(await readMask(pngBlob(parts.get("mask").replaceAll("-", "+").replaceAll("_", "/")), brush.mask.width, brush.mask.height));
    } catch {
      missing.push("the mask");
    }
  }
  if (parts.has("tool") && ["probe", "brush", "eraser", "rectangle"].includes(parts.get("tool"))) brush.use(parts.get("tool"));
  const at = (parts.get("at") ?? "").split(" ").map(Number);
  if (at.length === 2 && at.every((one, axis) => Number.isInteger(one) && one >= 0 && one < bench.stage.size[axis])) {
    bench.stage.point(at);
    if (brush.tool === "probe") probe.at(at);
  }
  attack.describe();
  if (missing.length) bench.say(`The link does not hold ${missing.join(" and ")}.`);
}

export class Links {
  constructor(bench) {
    this.bench = bench;
    this.root = make("div", { class: "line links" },
      // A notebook has no address that restores the bench.
      bench.hash ? button("Copy link", () => this.link()) : null, button("Copy as command", () => this.code("command")), button("Copy as Python", () => this.code("python")));
    this.dialog = make("dialog", { class: "shown-text", "aria-label": "Copied text" });
    this.root.append(this.dialog);
  }

  async link() {
    await this.bench.attempt("", async () => {
      const url = new URL(location.href);
      url.hash = await addressText(this.bench);
      url.search = "";
      const held = url.hash.includes("mask=saved-apart") ? "the picture and the settings, but not the mask, which is too large for a link (save it as a file)" : "the picture, the mask and the settings";
      await this.show(`This link restores ${held}. It opens in a browser in which the link that weakspot explore printed has been opened.`, url.href);
    });
  }

  async code(kind) {
    await this.bench.attempt("", async () => {
      const body = await this.bench.attack.body();
      const reply = await this.bench.ask("command", body);
      if (!reply[kind]) throw new Error(reply.remark ?? "There is no command for this.");
      const where = `Run this in ${kind === "command" ? "a terminal" : "Python"}, in the folder in which weakspot explore runs.`;
      await this.show([where, reply.remark].filter(Boolean).join(" "), reply[kind]);
    });
  }

  // Shows the text and puts it on the clipboard, if the browser allows it.
  async show(remark, text) {
    const status = make("p", { class: "note", role: "status" }, "Select the text to copy it.");
    this.dialog.replaceChildren(make("p", {}, remark), make("pre", { tabindex: 0 }, text), status,
      make("div", { class: "line" }, button("Close", () => this.dialog.close())));
    this.dialog.showModal();
    try {
      await navigator.clipboard.writeText(text);
      status.textContent = "Copied.";
    } catch { /* not allowed here: the text is shown */ }
  }
}
