// What can be proven of the mask: for each of its pixels, changed alone, whether some color of it changes the decision.

import { button, choice, field, make } from "./elements.js";

export class Certificate {
  constructor(bench) {
    this.bench = bench;
    this.colors = choice([["full", "any color"], ["8/255", "within 8/255 of its own"]]);
    this.seconds = make("input", { type: "number", min: 1, max: 3600, value: 60 });
    this.go = button("Certify the mask", () => (this.job ? this.stop() : this.start()));
    this.bar = make("progress", { max: 1, value: 0, class: "idle", "aria-label": "Progress of the certificate" });
    this.says = make("p", { class: "sentence", role: "status" });
    this.picture = make("img", { class: "certificate", alt: "", hidden: true });
    this.tools = make("div", { hidden: true },
      make("div", { class: "fields" }, field("Colors of a pixel", this.colors), field("Seconds at most", this.seconds)),
      make("div", { class: "line" }, this.go, this.bar));
    this.root = make("section", { class: "body" },
      make("p", { class: "note" }, "Each pixel of the mask is changed alone, on the clean picture: proven if no color of it changes the class, refuted if one was found that does, unknown if neither."),
      this.tools, this.says, this.picture);
  }

  // Whether the network's layers are supported is asked once, when the fold opens.
  async open() {
    if (this.asked || !this.bench.image) return;
    this.asked = true;
    this.says.textContent = "Looking at the layers of the network…";
    try {
      const { reason } = await this.bench.ask("provable", { image: this.bench.image.index });
      this.tools.hidden = Boolean(reason);
      this.says.textContent = reason ?? "";
    } catch (error) {
      this.asked = false;
      this.says.textContent = error.message;
    }
  }

  async start() {
    await this.bench.attempt("", async () => {
      const { brush, image } = this.bench;
      if (!brush.mask.area) throw new Error("Paint a mask first: its pixels are certified.");
      const body = { image: image.index, mask: await brush.text(), colors: this.colors.value, seconds: Number(this.seconds.value) || 60 };
      this.forget();
      this.go.textContent = "Stop";
      this.bar.removeAttribute("value");
      this.bar.classList.remove("idle");
      this.says.textContent = "Certifying…";
      const job = this.bench.subscribe("certify", body, (event) => { if (this.job === job) this.take(event); });
      this.job = job;
      try {
        await job.done;
      } catch (error) {
        if (this.job === job) this.says.textContent = "";
        throw error;
      } finally {
        if (this.job === job) this.end();
      }
    });
  }

  take(event) {
    if (event.event === "progress") this.bar.value = event.fraction;
    if (event.event !== "done") return;
    this.says.textContent = event.sentence ?? "Stopped: nothing is said about any pixel.";
    this.picture.hidden = !event.png;
    if (event.png) this.picture.src = `data:image/png;base64,${event.png}`;
    this.picture.alt = event.sentence ?? "";
  }

  stop() {
    this.job?.stop();
    this.go.textContent = "Stopping…";
  }

  end() {
    this.job = null;
    this.bar.value = 0;
    this.bar.classList.add("idle");
    this.go.textContent = "Certify the mask";
  }

  // Another picture, or another certificate: the one that is shown is about something else.
  forget() {
    this.job?.stop();
    this.end();
    this.picture.hidden = true;
    if (!this.tools.hidden) this.says.textContent = "";
  }
}
