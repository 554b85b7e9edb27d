// The records of a run: filters with counts, histograms to brush, a page of pictures at a time, and what they say.

import { button, choice, counted, field, latest, make } from "./elements.js";
import { Histogram, OUTCOMES, short } from "./histogram.js";
import { changes, placeOf, queryBox, weakRegions, whole } from "./record_facts.js";

const PICTURES = { clean: "the image", adversarial: "attacked", change: "the change, enlarged", adversarial_after: "attacked, second run", change_after: "the change, second run" };
const TITLES = { label_name: "class", adversarial_class_name: "ends as", change: "first against second run" };
const FIRST = 3; // histograms that are shown at the start

// `state` is what an earlier gallery gave `onState`; `ready` becomes whether there is anything to see.
export function mountGallery(element, ask, { onOpen = () => {}, state = null, onState = () => {} } = {}) {
  const gallery = new GalleryView(element, ask, onOpen, onState);
  return { ready: gallery.start(state), openRecord: (id) => gallery.openRecord({ id }), stop: () => gallery.stop() };
}

class GalleryView {
  constructor(element, ask, onOpen, onState) {
    Object.assign(this, { element, onOpen, onState, view: "records", stopped: false, filters: {}, sort: null, descending: false, cursors: [null], next: null, picture: "clean" });
    this.ask = async (name, body) => {
      const reply = await ask(name, body);
      if (reply.error) throw new Error(reply.error);
      return reply;
    };
    this.histograms = new Map();
    this.lists = new Map();
    this.refresh = latest((what) => this.load(what));
    this.message = make("p", { class: "message", role: "alert", hidden: true });
    this.status = make("p", { class: "count", role: "status" });
    this.grid = make("ul", { class: "tiles" });
    element.classList.add("weakspot", "gallery-view");
  }

  stop() {
    this.stopped = true;
    this.element.replaceChildren();
  }

  async start(state) {
    this.element.replaceChildren(this.message, make("p", { role: "status" }, "Opening the records…"));
    try {
      this.run = await this.ask("run", {});
    } catch (error) {
      this.element.replaceChildren(this.message);
      this.fail(error);
      return false;
    }
    if (this.stopped) return false;
    const fits = state && state.run === this.run.name && (state.other ?? null) === this.run.other;
    if (fits) this.take(state);
    this.build();
    if (state && !fits) this.fail(new Error(`This link is about ${state.run}${state.other ? ` beside ${state.other}` : ""}, which is not what is shown here.`));
    this.refresh({ counts: true });
    return !state || fits;
  }

  // What a link says. The program checks it, as it checks every request.
  take({ filters, sort, descending, cursors, picture, view }) {
    if (filters && typeof filters === "object") this.filters = { ...filters };
    if (this.run.columns.some(({ name, kind }) => name === sort && kind === "number")) this.sort = sort;
    this.descending = descending === true;
    if (Array.isArray(cursors) && cursors.length) this.cursors = cursors;
    if (this.run.pictures.includes(picture)) this.picture = picture;
    if (["records", "weak", "changed", "sql"].includes(view)) this.view = view;
  }

  tellState() {
    const { filters, sort, descending, cursors, picture, view, run } = this;
    this.onState({ run: run.name, other: run.other, filters, sort, descending, cursors, picture, view, ...(this.record === undefined ? {} : { record: this.record }) });
  }

  fail(error) {
    this.message.textContent = error.message;
    this.message.hidden = false;
  }

  build() {
    const run = this.run;
    const views = { records: this.recordsView(), weak: make("section", {}), changed: make("section", {}), sql: queryBox(this.ask) };
    const titles = { records: "Records", weak: "Weak classes and regions", ...(run.other ? { changed: "What changed" } : {}), sql: "SQL" };
    this.views = views;
    this.tabs = Object.entries(titles).map(([name, text]) => button(text, () => this.open(name), { "data-name": name }));
    this.element.replaceChildren(make("div", { class: "notice" }, this.message),
      make("header", {}, make("h2", {}, run.other ? `${run.name} beside ${run.other}` : run.name),
        make("p", { class: "note" }, `${counted(run.records, "record")} of ${counted(run.images, "image")}${run.model ? `, ${run.model}` : ""}`),
        ...run.remarks.map((sentence) => make("p", { class: "note" }, sentence))),
      make("nav", { class: "line", "aria-label": "Views of the run" }, ...this.tabs), ...Object.values(views));
    this.open(this.view in titles ? this.view : "records");
  }

  open(name) {
    this.view = name;
    this.tellState();
    for (const [key, view] of Object.entries(this.views)) view.hidden = key !== name;
    for (const tab of this.tabs) tab.setAttribute("aria-pressed", String(tab.dataset.name === name));
    if (name === "weak") this.facts(this.views.weak, "weak_regions", (reply) => weakRegions(reply, Object.keys(this.filters), (filters) => this.choose(filters), () => { this.choose({}); this.open("weak"); }));
    if (name === "changed") this.facts(this.views.changed, "compare", (reply) => changes(reply, [this.run.name, this.run.other], (filters) => this.choose(filters)));
  }

  async facts(place, name, draw) {
    try {
      place.replaceChildren(...draw(await whole(this.ask, name, { filters: this.filters }, place)));
    } catch (error) {
      place.replaceChildren(make("p", { class: "message", role: "alert" }, error.message));
    }
  }

  // Filters from a table of another view.
  choose(filters) {
    this.filters = { ...filters };
    for (const histogram of this.histograms.values()) histogram.mark(null);
    this.open("records");
    this.change();
    this.status.scrollIntoView?.({ block: "nearest" });
  }

  recordsView() {
    const run = this.run;
    const sorted = choice([["", "the list of images"], ...run.columns.filter(({ kind }) => kind === "number").map(({ name }) => [name, name])], { on: { change: () => { this.sort = sorted.value || null; this.change({ counts: false }); } } });
    const direction = choice([["", "smallest first"], ["down", "largest first"]], { on: { change: () => { this.descending = direction.value === "down"; this.change({ counts: false }); } } });
    const picture = choice(run.pictures.map((kind) => [kind, PICTURES[kind] ?? kind]), { on: { change: () => { this.picture = picture.value; this.tellState(); this.thumbnails(); } } });
    sorted.value = this.sort ?? "";
    direction.value = this.descending ? "down" : "";
    if (run.pictures.length) picture.value = this.picture;
    this.back = button("previous page", () => this.turn(-1));
    this.forward = button("next page", () => this.turn(1));
    this.reset = button("clear all filters", () => this.choose({}), { hidden: Object.keys(this.filters).length === 0 });
    this.scores = make("div", { class: "scores" });
    const more = choice([["", "add a score…"], ...run.scores.map((name) => [name, name])], { "aria-label": "add a histogram", on: { change: () => { this.addHistogram(more.value); more.value = ""; } } });
    for (const name of run.scores.slice(0, FIRST)) this.addHistogram(name, { load: false });
    for (const [name, { bins }] of Object.entries(this.filters)) {
      if (!Array.isArray(bins) || !run.scores.includes(name)) continue;
      this.addHistogram(name, { load: false });
      this.histograms.get(name).mark(bins);
    }
    const lists = run.values.map((column) => this.valueList(column));
    const legend = make("ul", { class: "legend" }, ...OUTCOMES.map(([text, kind]) => make("li", {}, make("i", { class: `swatch ${kind}` }), text)));
    const wide = matchMedia("(min-width: 45rem)").matches;
    const filters = make("details", { class: "filters", open: wide }, make("summary", {}, "Filters"), this.reset, ...lists, legend, this.scores, more);
    const tools = make("div", { class: "fields" }, field("sorted by", sorted), field("order", direction), run.pictures.length ? field("picture", picture) : null, this.back, this.forward);
    return make("section", { class: "records" }, filters, make("div", { class: "page" }, this.status, tools, this.grid));
  }

  addHistogram(name, { load = true } = {}) {
    if (!name || this.histograms.has(name)) return;
    const histogram = new Histogram(name, this.run.bins, (range) => {
      this.setFilter(name, range && { bins: range });
      this.change();
    });
    this.histograms.set(name, histogram);
    this.scores.append(histogram.element);
    if (load) this.count(name);
  }

  valueList(column) {
    const list = make("ul", { class: "choices" });
    const kind = this.run.columns.find(({ name }) => name === column)?.kind;
    const title = TITLES[column] ?? column;
    const search = kind === "text" ? make("input", { type: "text", placeholder: "search", "aria-label": `search ${title}`, hidden: true, on: { input: () => this.count(column) } }) : null;
    this.lists.set(column, { list, search, title });
    const open = ["attack", "region", "fooled", "change"].includes(column);
    return make("details", { class: "values", open }, make("summary", {}, title), search, list);
  }

  setFilter(column, wanted) {
    if (wanted) this.filters[column] = wanted;
    else delete this.filters[column];
  }

  // Filters, order or page have changed; new filters and orders begin at the first page.
  change({ counts = true, first = true } = {}) {
    if (first) this.cursors = [null];
    this.reset.hidden = Object.keys(this.filters).length === 0;
    this.tellState();
    // A newer request without counts must not swallow the counts of an older one.
    this.stale = this.stale || counts;
    this.element.setAttribute("aria-busy", "true");
    this.refresh({});
  }

  turn(step) {
    if (step > 0) this.cursors.push(this.next);
    else this.cursors.pop();
    this.change({ counts: false, first: false });
  }

  async load({ counts = false }) {
    if (this.stopped) return;
    counts = counts || this.stale;
    this.stale = false;
    this.element.setAttribute("aria-busy", "true");
    try {
      const sort = this.sort === null ? null : { column: this.sort, descending: this.descending };
      const reply = await this.ask("records", { filters: this.filters, sort, after: this.cursors.at(-1) });
      this.message.hidden = true;
      this.records = reply.records;
      this.next = reply.next;
      this.show(reply);
      await Promise.all([this.thumbnails(), counts ? this.counts() : null]);
    } catch (error) {
      this.fail(error);
    } finally {
      this.element.setAttribute("aria-busy", "false");
    }
  }

  counts() {
    return Promise.all([...this.histograms.keys(), ...this.lists.keys()].map((column) => this.count(column)));
  }

  async count(column) {
    const part = this.lists.get(column);
    const reply = await this.ask("histogram", { column, filters: this.filters, ...(part?.search?.value ? { search: part.search.value } : {}) });
    if (part) this.showValues(column, part, reply);
    else this.histograms.get(column).show(reply);
  }

  showValues(column, { list, search, title }, reply) {
    if (search && reply.more > 0) search.hidden = false;
    const chosen = Array.isArray(this.filters[column]) ? this.filters[column] : [];
    // What is chosen stays visible, also where nothing of it is left.
    const missing = chosen.filter((value) => !reply.values.some((row) => row.value === value)).map((value) => ({ value, n: 0, fooled: 0, known: 0 }));
    const focused = this.element.getRootNode().activeElement?.dataset?.key;
    list.replaceChildren(...[...missing, ...reply.values].map(({ value, n, fooled, known }) => {
      const name = value === null ? "unknown" : value === true ? "yes" : value === false ? "no" : column === "region" ? placeOf(value) : value;
      const key = JSON.stringify([column, value]);
      const toggle = button("", () => {
        const left = chosen.includes(value) ? chosen.filter((one) => one !== value) : [...chosen, value];
        this.setFilter(column, left.length ? left : null);
        this.change();
      }, { "aria-pressed": String(chosen.includes(value)), "data-key": key });
      toggle.append(make("span", {}, name), make("span", { class: "number" }, n.toLocaleString("en-US")));
      if (column !== "fooled" && known) toggle.title = `${title} ${name}: ${fooled.toLocaleString("en-US")} of ${known.toLocaleString("en-US")} fooled`;
      return make("li", {}, toggle);
    }), ...(reply.more > 0 ? [make("li", { class: "note" }, `${counted(reply.more, "more value")}`)] : []));
    if (focused) [...list.querySelectorAll("button")].find((one) => one.dataset.key === focused)?.focus();
  }

  show({ records, count }) {
    const before = 50 * (this.cursors.length - 1);
    const place = records.length ? `: ${(before + 1).toLocaleString("en-US")} to ${(before + records.length).toLocaleString("en-US")}` : "";
    this.status.textContent = this.counted = count === 0 ? "No record has all of these properties." : `${counted(count, "record")}${count < this.run.records ? ` of ${this.run.records.toLocaleString("en-US")}` : ""}${place}`;
    this.back.disabled = this.cursors.length < 2;
    this.forward.disabled = this.next === null;
    this.tiles = new Map();
    this.grid.replaceChildren(...records.map((record) => this.tile(record)));
  }

  tile(record) {
    const image = make("img", { alt: "", hidden: true });
    const note = make("span", { class: "note blank" }, this.run.pictures.length ? "…" : "no pictures stored");
    const name = make("strong", {}, record.image);
    const label = record.label_name ?? (record.label === null ? "no label" : `class ${record.label}`);
    const place = `${record.attack}, ${placeOf(record.region)}`;
    const outcome = record.error ? "failed" : record.fooled === null ? "outcome unknown" : !record.correct ? `misclassified as ${record.predicted_name ?? "another class"} without an attack` : record.fooled ? `fooled: ${record.adversarial_class_name ?? "another class"}` : "withstood";
    const kind = record.fooled === null ? "unknown" : !record.correct ? "misclassified" : record.fooled ? "fooled" : "withstood";
    const sorted = this.sort && this.sort !== "margin_adversarial" ? `; ${this.sort} ${short(record.value)}` : "";
    const opener = button("", () => this.openRecord(record), { class: "bare", "aria-label": `${record.image}, ${place}: open on the bench` });
    opener.append(make("span", { class: "frame" }, image, note));
    const details = make("details", { class: "more", on: { toggle: () => details.open && this.details(record, details) } }, make("summary", { "aria-label": `all values of ${record.image}, ${place}` }, "all values"));
    this.tiles.set(String(record.id), { image, note });
    return make("li", { class: "tile" }, opener, make("div", {}, name, make("span", { class: "about" }, `${label}; ${place}`), make("span", { class: "about" }, make("i", { class: `swatch ${kind}` }), `${outcome}; margin ${short(record.margin_adversarial)}${sorted}`), record.change ? make("span", { class: "about" }, record.change) : null, details));
  }

  async thumbnails() {
    const { tiles, picture } = this;
    if (!this.run.pictures.length || !this.records.length) return;
    try {
      const { pictures } = await this.ask("thumbnails", { ids: this.records.map(({ id }) => id), picture });
      if (picture !== this.picture) return; // another kind was chosen meanwhile
      for (const [id, { url, missing }] of Object.entries(pictures)) {
        const tile = tiles.get(id);
        if (!tile || tiles !== this.tiles) continue;
        tile.image.hidden = !url;
        tile.note.hidden = Boolean(url);
        if (url) tile.image.src = url;
        else tile.note.textContent = missing;
      }
    } catch (error) {
      this.fail(error);
    }
  }

  async details({ id }, place) {
    if (place.querySelector("dl")) return;
    try {
      const { record } = await this.ask("record", { id });
      place.append(make("dl", {}, ...record.filter(({ value }) => value !== null).map(({ name, value }) => make("div", {}, make("dt", {}, name), make("dd", {}, short(value))))));
    } catch (error) {
      this.fail(error);
    }
  }

  async openRecord({ id }) {
    this.status.textContent = "Opening the image on the bench…";
    try {
      const opened = await this.ask("open", { id });
      this.record = id;
      this.tellState();
      await this.onOpen(opened);
      this.message.hidden = true;
    } catch (error) {
      this.fail(error);
    } finally {
      this.status.textContent = this.counted ?? ""; // other records may have been shown meanwhile
    }
  }
}
