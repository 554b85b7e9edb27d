// The bench: one picture, and everything a person can ask about it. It knows no transport: `ask` and `subscribe` come
// from the page (fetch and a socket) or from a notebook.

import { Attack } from "./attack.js";
import { Brush } from "./brush.js";
import { Certificate } from "./certificate.js";
import { setColors } from "./colors.js";
import { base64Of, button, make } from "./elements.js";
import { Depth, Explanations } from "./inside.js";
import { addressText, Links, restore } from "./links.js";
import { pngBlob, readMask } from "./mask.js";
import { readPixels } from "./pictures.js";
import { UndoPlace, WeakMap } from "./places.js";
import { Probe } from "./probe.js";
import { Stage } from "./stage.js";
import { Views } from "./views.js";

const KEYS = [
  ["P", "probe"], ["B", "brush"], ["E", "eraser"], ["R", "rectangle"], ["[", "smaller brush"], ["]", "larger brush"],
  ["Ctrl-Z", "undo"], ["Ctrl-Y", "redo"], ["I", "invert"], ["0", "clear"], ["Arrows", "move the cursor on the picture; with Shift by ten"],
  ["Space", "use the tool at the cursor"], ["?", "these keys"],
];

// Options: keys, the element or document whose keys are heard; hash, whether the state is kept in the address.
export function mount(element, ask, subscribe, { keys = element, hash = false } = {}) {
  const bench = new Bench(element, ask, subscribe, hash);
  const press = (event) => bench.press(event);
  keys.addEventListener("keydown", press);
  bench.ready = bench.begin();
  return {
    bench,
    ready: bench.ready,
    open: async (index, record = null) => {
      await bench.reload(index);
      if (record) await bench.prefill(record);
    },
    stop() {
      keys.removeEventListener("keydown", press);
      bench.attack.stop();
      bench.weak.stop();
      bench.certificate.forget();
      bench.explanations.forget();
      bench.probe.forget();
      bench.views.blink(false);
      element.replaceChildren();
    },
  };
}

class Bench {
  constructor(element, ask, subscribe, hash) {
    Object.assign(this, { element, hash, opening: Promise.resolve() });
    this.ask = async (name, body) => {
      const reply = await ask(name, body);
      if (reply.error) throw new Error(reply.error);
      return reply;
    };
    // Errors of a job reject `done`, and go to `failed` if it is given. Events are taken one after the other: a picture
    // of an early step that is decoded late would cover the result.
    this.subscribe = (name, body, take, failed) => {
      let error = null, given = Promise.resolve();
      const job = subscribe(name, body, (event) => {
        if (event.event === "error") error = new Error(event.error);
        else given = given.then(() => take(event)).catch((thrown) => { error = thrown; });
      });
      const done = job.done.then(() => given).then(() => { if (error) throw error; });
      if (failed) done.catch(failed);
      return { stop: () => job.stop(), done };
    };
    element.classList.add("weakspot");
    this.stage = new Stage({
      down: (site) => (this.tool === "probe" ? this.probe.at(site) : this.brush.down(site)),
      move: (site, { from, event }) => {
        if (this.tool === "probe") this.probe.at(site);
        else this.brush.move(site, event.type === "keydown" ? null : from);
      },
      up: () => { if (this.tool !== "probe") this.brush.up(); else this.stateChanged(); },
      leave: () => this.probe.leave(),
      press: (site) => (this.tool === "probe" ? this.probe.at(site) : this.brush.press(site)),
    });
    this.views = new Views(this);
    this.probe = new Probe(this);
    this.brush = new Brush(this, (done) => this.painted(done));
    this.attack = new Attack(this);
    this.weak = new WeakMap(this);
    this.undo = new UndoPlace(this);
    this.certificate = new Certificate(this);
    this.explanations = new Explanations(this);
    this.depth = new Depth(this);
    this.links = new Links(this);
    this.layOut();
  }

  get tool() { return this.brush.tool; }

  seed() { return Number(this.attack.seedInput.value) || 0; }
  budget() { return this.attack.budget.value.trim() || "linf:4/255"; }
  layOut() {
    this.title = make("h1", {}, "weakspot");
    this.pictures = make("div", { class: "thumbs", role: "group", "aria-label": "Pictures" });
    this.file = make("input", { type: "file", accept: "image/png,image/jpeg,image/webp", class: "away", "aria-label": "Add a picture", tabindex: -1, on: { change: () => { this.upload(this.file.files[0]); this.file.value = ""; } } });
    this.next = make("p", { class: "next", role: "status" });
    this.message = make("p", { class: "message", role: "alert", hidden: true });
    this.spoken = make("p", { class: "away", role: "status" });
    this.help = make("dialog", { class: "keys-help", "aria-label": "Keys" }, make("h2", {}, "Keys"),
      make("dl", {}, ...KEYS.flatMap(([key, meaning]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, meaning)])),
      button("Close", () => this.help.close()));
    const more = (title, note, part, opened) => {
      const details = make("details", { class: "fold card" }, make("summary", {}, make("strong", {}, title), make("span", {}, note)), part.root);
      details.addEventListener("toggle", () => { if (details.open) opened?.(); });
      return details;
    };
    this.depthFold = more("Layers and units", "how the attack travels through the network", this.depth, () => this.depth.open());
    this.element.replaceChildren(
      make("header", { class: "top" }, this.title, this.pictures, make("div", { class: "line" }, button("Add a picture", () => this.file.click()), this.file, button("Keys", () => this.help.showModal(), { "aria-keyshortcuts": "?", title: "Keys (?)" }))),
      make("div", { class: "notice" }, this.message), this.next, this.spoken,
      make("main", { class: "bench" },
        make("div", { class: "left" }, this.brush.root,
          make("div", { class: "drop" }, this.stage.root),
          this.views.root,
          this.brush.under, this.probe.key),
        make("div", { class: "right" },
          make("section", { class: "card", "aria-label": "Decision" }, this.views.decision),
          this.attack.root,
          more("Weak-spot map", "how little is enough, and where", this.weak),
          more("Undo a place", "erase the attack by hand", this.undo, () => this.undo.refresh()),
          more("Certify the mask", "what no single pixel can do", this.certificate, () => this.certificate.open()),
          more("Explain the attack", "the report's panels, when you ask for them", this.explanations),
          this.depthFold,
          this.links.root)),
      this.help);
    this.listenToDrops();
    // Nothing can be done before there is a picture.
    this.element.classList.add("empty");
    this.next.textContent = "Loading…";
  }

  async begin() {
    try {
      this.hello = await this.ask("hello", {});
      this.images = this.hello.images;
      if (this.hello.model === null) {
        this.next.textContent = "";
        this.say(`The network of this run cannot be loaded, so that only its records can be seen. ${this.hello.reason}`);
        return;
      }
      setColors(this.hello.colors);
      this.title.replaceChildren("weakspot ", make("small", {}, this.hello.model));
      this.brush.offer(this.hello.masks);
      this.attack.offer(this.hello);
      this.explanations.offer(this.hello.analyses);
      this.listPictures();
      if (this.images.length) await this.open(this.images[0].index);
      else this.next.textContent = "Add a picture to begin: drop it here, or press “Add a picture”.";
      // With a gallery, the picture of a link is put on the bench from its record first.
      if (this.hash && !this.hello.gallery && location.hash.length > 1) await restore(this, location.hash.slice(1));
      this.restored = !this.hello.gallery;
      this.element.dataset.shown = Math.round(performance.now()); // since the page was asked for
      this.element.dataset.ready = "yes";
    } catch (error) {
      this.next.textContent = "";
      this.fail(error);
    }
  }

  listPictures() {
    this.pictures.replaceChildren(...this.images.map(({ index, name, thumbnail }) => {
      const one = make("button", { type: "button", class: "thumb", title: name, "aria-pressed": "false", on: { click: () => this.attempt("", () => this.open(index), { waits: false }) } },
        make("img", { src: `data:image/jpeg;base64,${thumbnail}`, alt: name }));
      one.dataset.index = index;
      return one;
    }));
  }

  // Another list of pictures, after one was added elsewhere (the gallery).
  async reload(index) {
    this.images = (await this.ask("hello", {})).images;
    this.listPictures();
    await this.open(index);
  }

  // Opens a picture; what is asked meanwhile waits for it (`attempt`).
  open(index) {
    this.opening = this.opening.catch(() => {}).then(() => this.openNow(index));
    return this.opening;
  }

  async openNow(index) {
    this.undo.leave();
    this.views.blink(false);
    this.weak.clear();
    this.certificate.forget();
    this.probe.forget();
    this.probe.leave();
    this.spoken.textContent = "";
    this.attack.stop();
    const image = await this.ask("image", { image: index });
    const pixels = await readPixels(`data:image/png;base64,${image.png}`, image.width, image.height);
    this.image = { ...image, index };
    this.pair = 0; // number of the pair that is shown: another page may attack the picture, too
    this.element.classList.remove("empty");
    this.stage.open(pixels, [image.width, image.height]);
    this.views.zoom.value = 1;
    this.attack.reset();
    this.brush.start(image.width, image.height);
    this.explanations.forget();
    this.depth.forget();
    for (const one of this.pictures.children) one.setAttribute("aria-pressed", String(Number(one.dataset.index) === index));
    this.views.show("clean");
    if (image.pair?.masks) this.brush.set(await readMask(pngBlob(image.pair.masks.attack), image.width, image.height));
    if (image.pair) await this.attack.finish(image.pair);
    this.undo.refresh();
    this.hint();
    this.stateChanged();
  }

  // Sets what was used for a record of an audit.
  async prefill({ region, remark, ...record }) {
    this.attack.prefill(record);
    const kind = { "~background": "foreground" }[region] ?? region?.split(":")[0];
    if (this.hello.masks.some((one) => one.kind === kind)) await this.brush.take(kind);
    else if (this.brush.mask.area) this.brush.clear(); // that of an earlier attack
    if (remark) this.say(remark);
  }

  async upload(file) {
    if (!file) return;
    await this.attempt("Reading the picture…", async () => {
      const most = this.hello.limits.upload_bytes;
      if (file.size > most) throw new Error(`A picture may have at most ${Math.floor(most / 2 ** 20)} MB.`);
      const { image } = await this.ask("upload", { name: file.name, file: await base64Of(file) });
      await this.reload(image);
    });
  }

  listenToDrops() {
    this.element.addEventListener("dragover", (event) => { event.preventDefault(); this.element.classList.add("dropping"); });
    this.element.addEventListener("dragleave", () => this.element.classList.remove("dropping"));
    this.element.addEventListener("drop", (event) => {
      event.preventDefault();
      this.element.classList.remove("dropping");
      this.upload(event.dataTransfer.files[0]);
    });
  }

  toolChanged(tool) {
    this.probe.root.hidden = tool !== "probe";
    this.brush.sizes.hidden = tool === "probe";
    this.brush.sizes.style.visibility = tool === "rectangle" ? "hidden" : "";
    if (tool !== "probe") {
      this.probe.leave();
      this.probe.forget();
    }
    this.stage.canvas.style.cursor = tool === "probe" ? "crosshair" : tool === "rectangle" ? "cell" : "none";
    this.hint();
    this.stateChanged();
  }

  // What to do next, in one sentence.
  hint() {
    if (!this.image) return;
    const { area } = this.brush.mask;
    if (this.undo.on) this.next.textContent = "Brush where the attack should be erased, and watch the decision.";
    else if (this.attack.running) this.next.textContent = "The attack is running; Stop keeps the best so far.";
    else if (this.attack.outdated) this.next.textContent = `${this.attack.outdated} To attack anew, press “${this.attack.go.textContent}”.`;
    else if (this.stage.pictures.attack) this.next.textContent = "Compare the two margins, then erase the attack in a place, open an explanation, or paint another mask.";
    else if (area) this.next.textContent = `The mask is orange: press “${this.attack.go.textContent}”.`;
    else if (this.tool === "probe") this.next.textContent = "Move over the picture to see what one changed pixel does, or paint a mask with the brush and attack inside it.";
    else this.next.textContent = "Paint the place that you want to attack, or take a mask from the list, such as the background.";
  }

  painted(done) {
    if (!this.image) return;
    if (this.undo.on) this.undo.send();
    else if (done) {
      this.attack.describe();
      this.attack.compare();
    }
    if (done) this.hint();
    if (done) this.stateChanged();
  }

  // An attack has ended.
  attacked() {
    this.explanations.forget();
    this.depth.forget();
    if (this.depthFold.open) this.depth.open();
    this.undo.refresh();
    this.views.show("attack");
    this.hint();
  }

  leaveUndo() {
    this.undo.leave();
    this.views.blink(false);
  }

  say(text) {
    this.message.hidden = !text;
    this.message.textContent = text;
  }

  fail(error) {
    this.say(error.message.replace(/^./, (letter) => letter.toUpperCase()));
  }

  // Runs a task, after the picture has opened if one is on its way; what goes wrong is said in one sentence.
  async attempt(doing, task, { waits = true } = {}) {
    this.say("");
    if (doing) this.next.textContent = doing;
    try {
      if (waits) await this.opening.catch(() => {});
      await task();
    } catch (error) {
      this.fail(error);
    }
    this.hint();
  }

  stateChanged() {
    if (!this.hash || !this.restored) return;
    clearTimeout(this.saving);
    this.saving = setTimeout(async () => {
      const url = new URL(location.href);
      url.hash = await addressText(this);
      history.replaceState(null, "", url);
    }, 300);
  }

  press(event) {
    if (!this.image || this.help.open || this.links.dialog.open) return;
    const target = event.composedPath()[0];
    const typing = /^(TEXTAREA|SELECT)$/.test(target.tagName) || (target.tagName === "INPUT" && !/^(checkbox|range|color|file)$/.test(target.type));
    if (typing || event.altKey) return;
    const key = event.key.toLowerCase();
    const act = event.ctrlKey || event.metaKey
      ? { z: () => (event.shiftKey ? this.brush.redo() : this.brush.undo()), y: () => this.brush.redo() }[key]
      : {
        p: () => this.brush.use("probe"), b: () => this.brush.use("brush"), e: () => this.brush.use("eraser"), r: () => this.brush.use("rectangle"),
        "[": () => this.brush.resizeBy(-1), "]": () => this.brush.resizeBy(1), i: () => this.brush.invert(), 0: () => this.brush.clear(),
        "?": () => this.help.showModal(),
      }[key];
    if (!act) return;
    event.preventDefault();
    act();
  }
}
