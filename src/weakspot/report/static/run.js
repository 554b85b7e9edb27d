let drawings;
const rest = JSON.parse(document.getElementById("rest").textContent);

// The charting libraries are stored compressed and become a script of this page, once.
async function load() {
  if (!document.getElementById("libraries").textContent) return;
  drawings = JSON.parse(await unpacked("drawings"));
  const script = document.createElement("script");
  script.type = "module";
  script.textContent = await unpacked("libraries");
  const ready = new Promise((done) => { script.addEventListener("load", done); script.addEventListener("error", done); });
  document.head.append(script);
  await Promise.race([ready, appeared()]);
}

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
}

async function appeared() {
  while (!window.vegaEmbed) await new Promise((next) => setTimeout(next, 5));
}

// With `ast`, Vega interprets expressions, so that the page needs no permission to evaluate code.
async function draw(place) {
  if (place.dataset.drawn) return;
  place.dataset.drawn = "begun";
  const wide = place.clientWidth; // of which names beside the y axis take up to 150 pixels
  const legend = { ...drawings.config.legend, columns: Math.max(1, Math.floor((wide - 150) / 150)), labelLimit: Math.min(220, Math.max(90, wide - 200)) };
  const config = { ...drawings.config, legend };
  // The page's policy admits its own style sheet only: the libraries insert none, and run.css has their rules.
  const tooltip = { disableDefaultStyle: true };
  const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, config, defaultStyle: false, tooltip };
  await vegaEmbed(place, drawings.specs[Number(place.dataset.chart)], options);
  place.dataset.drawn = "yes";
}

async function choose(select) {
  for (const figure of select.closest("article").querySelectorAll(".drawn")) {
    figure.hidden = figure.dataset.group !== select.value;
    if (!figure.hidden) await draw(figure.querySelector(".chart"));
  }
}

class Rows {
  constructor(table) {
    this.body = table.tBodies[0];
    this.shown = Number(table.dataset.shown);
    this.rows = [...this.body.rows];
    this.waiting = rest[table.id.slice("table-".length)] || [];
    this.wanted = "";
    this.count = document.querySelector(`[data-count="${table.id.slice("table-".length)}"]`);
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      this.sort(column, down);
    }));
  }

  all() {
    for (const cells of this.waiting.splice(0)) {
      const row = document.createElement("tr");
      cells.forEach(([text, order, small], column) => {
        const cell = document.createElement(column ? "td" : "th");
        if (!column) cell.scope = "row";
        cell.textContent = text;
        if (small) cell.append(" ", Object.assign(document.createElement("small"), { textContent: small }));
        cell.dataset.order = order === null ? "nan" : order;
        row.append(cell);
      });
      this.rows.push(row);
    }
    return this.rows;
  }

  sort(column, down) {
    const key = (row) => {
      const { order } = row.cells[column].dataset;
      const number = Number(order);
      return order !== "" && !Number.isNaN(number) ? number : order;
    };
    const missing = (value) => value === "" || value === "nan";
    this.all().sort((one, other) => {
      const a = key(one), b = key(other);
      if (missing(a) || missing(b)) return missing(a) - missing(b); // last in both directions
      const way = typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
      return down ? -way : way;
    });
    this.show();
  }

  filter(text) {
    this.wanted = text.trim().toLowerCase();
    this.all();
    this.show();
  }

  show() {
    const fitting = this.rows.filter((row) => row.textContent.toLowerCase().includes(this.wanted));
    this.body.replaceChildren(...fitting.slice(0, this.shown));
    if (this.count) this.count.textContent = `${Math.min(fitting.length, this.shown)} of ${fitting.length} rows are shown.`;
  }
}

const tables = new Map([...document.querySelectorAll("table")].map((table) => [table.id, new Rows(table)]));
for (const input of document.querySelectorAll(".filter")) {
  input.addEventListener("input", () => tables.get(`table-${input.dataset.table}`).filter(input.value));
}
for (const select of document.querySelectorAll(".which")) select.addEventListener("change", () => choose(select));

// On paper, everything is unfolded.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => { for (const details of folded) details.open = false; });
load().then(async () => {
  for (const place of document.querySelectorAll(".drawn:not([hidden]) .chart")) await draw(place);
  document.body.dataset.ready = "yes";
});
