// What the records say as a whole: weak regions of classes, what changed between two runs, and typed queries.

import { button, counted, make, percent } from "./elements.js";
import { short } from "./histogram.js";

const POLL = 700; // milliseconds

export function table(columns, rows) {
  const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell, at) => make(at ? "td" : "th", at ? {} : { scope: "row" }, cell))));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "table" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

// A long computation: asks again until it is done, and shows how far it is.
export async function whole(ask, name, body, place) {
  for (;;) {
    const reply = await ask(name, body);
    if (!("working" in reply)) return reply;
    place.replaceChildren(make("p", { role: "status" }, "Comparing the records… ", make("progress", { max: 1, value: reply.working || null, "aria-label": "done" })));
    await new Promise((next) => setTimeout(next, POLL));
  }
}

const interval = (value, low, high) => (value === null ? "–" : `${percent(value)} [${percent(low)}, ${percent(high)}]`);
const probability = (q) => (q === null ? "–" : q < 0.001 ? "< .001" : q > 0.995 ? "1" : q.toFixed(q < 0.1 ? 3 : 2).replace(/^0/, ""));
export const placeOf = (region) => (region === "none" ? "whole image" : region);

// `filters` are the names of those that are set; `onAll` clears them.
export function weakRegions(reply, filters, onShow, onAll) {
  const used = filters.filter((name) => !reply.ignored.includes(name)).map((name) => (name === "label_name" ? "class" : name));
  const rows = reply.rows.map((row) => [
    row.name, row.attack, placeOf(row.region), row.images.toLocaleString("en-US"), interval(row.fooled, row.low, row.high),
    interval(row.rest, row.rest_low, row.rest_high), probability(row.q),
    [row.weak_class ? "more often than other classes" : "", row.weak_region ? "a weak region" : ""].filter(Boolean).join("; ") || "–",
    button("show", () => onShow({ label_name: [row.name], attack: [row.attack], region: [row.region], correct: [true] }), { "aria-label": `show the records of ${row.name} under ${row.attack} in ${row.region}` }),
  ]);
  return [
    ...reply.sentences.map((sentence) => make("p", { class: "finding" }, sentence)),
    reply.more_sentences ? make("p", { class: "note" }, `and ${reply.more_sentences} more`) : null,
    make("p", { class: "note" }, "Fractions of the images that are correctly classified without an attack, with exact 95% intervals. q is the p value for a class against all others, corrected for the number of classes compared; – where there are too few images. Numbers and sentences are those of the whole run: filters only choose rows."),
    used.length ? make("p", { class: "line" }, `Only rows that fit the filters of ${used.join(", ")}, set under “Records”.`, button("show all rows", onAll)) : null,
    reply.ignored.length ? make("p", { class: "note" }, `Not used here: the filters of ${reply.ignored.join(", ")}.`) : null,
    table(["class", "attack", "region", "images", "fooled", "other classes", "q", "verdict", ""], rows),
    reply.more ? make("p", { class: "note" }, `${counted(reply.more, "more row")}; choose a class to see others.`) : null,
  ].filter(Boolean);
}

export function changes(reply, names, onShow) {
  const cells = new Map();
  for (const { attack, region, value, n } of reply.changes) {
    const key = JSON.stringify([attack, region]);
    cells.set(key, { ...cells.get(key), [value ?? "unknown"]: n });
  }
  const kinds = ["newly fooled", "no longer fooled", "fooled in both", "withstood in both", "unknown"];
  const rows = [...cells].map(([key, counts]) => {
    const [attack, region] = JSON.parse(key);
    const shown = kinds.map((kind) => {
      const n = counts[kind] ?? 0;
      const filter = { attack: [attack], region: [region], change: [kind === "unknown" ? null : kind] };
      return n ? button(n.toLocaleString("en-US"), () => onShow(filter), { "aria-label": `show the ${n} records of ${attack} in ${region} that are ${kind}` }) : "0";
    });
    return [attack, placeOf(region), ...shown];
  });
  const moved = reply.moved.map((row) => [row.score, row.attack ?? "", row.region ? placeOf(row.region) : "", row.images, short(row.before), short(row.after), row.low === null ? short(row.difference) : `${short(row.difference)} [${short(row.low)}, ${short(row.high)}]`, probability(row.q)]);
  return [
    make("p", { class: "finding" }, reply.verdict),
    make("p", { class: "note" }, `First: ${names[0]}. Second: ${names[1]}. Images are matched by their content; ${counted(reply.images, "image")} are in both. "Fooled" includes images that are misclassified without an attack.`),
    make("h3", {}, "Images, first against second run"),
    table(["attack", "region", ...kinds], rows),
    make("h3", {}, moved.length ? `Scores that moved beyond chance, of ${reply.compared} compared` : `No score moved beyond chance, of ${reply.compared} compared`),
    moved.length ? table(["score", "attack", "region", "images", "first", "second", "difference", "q"], moved) : null,
    ...[...reply.only, ...reply.remarks].map((sentence) => make("p", { class: "note" }, sentence)),
  ].filter(Boolean);
}

// A box for SQL; Ctrl-Enter runs it.
export function queryBox(ask) {
  const text = make("textarea", { rows: 4, spellcheck: "false", "aria-label": "SQL query" });
  text.value = "select label_name, region, count(*) as n, avg(fooled::int) as fooled\nfrom outcomes where correct\ngroup by all order by fooled desc";
  const place = make("div", { "aria-live": "polite" });
  const run = button("Run", async () => {
    run.disabled = true;
    try {
      const reply = await ask("sql", { query: text.value });
      const rows = reply.rows.map((row) => row.map((value) => (value === null ? "null" : typeof value === "number" && !Number.isInteger(value) ? short(value) : String(value))));
      place.replaceChildren(make("p", { class: "note" }, reply.more ? `The first ${rows.length} rows.` : counted(rows.length, "row")), table(reply.columns, rows));
    } catch (error) {
      place.replaceChildren(make("pre", { role: "alert" }, error.message));
    } finally {
      run.disabled = false;
    }
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run.click();
    }
  });
  return make("section", {}, make("p", { class: "note" }, "One SELECT (DuckDB) on the tables outcomes, records, skipped and images; it can read nothing else, and change nothing."), text, make("div", { class: "line" }, run, make("span", { class: "note" }, "Ctrl-Enter")), place);
}
