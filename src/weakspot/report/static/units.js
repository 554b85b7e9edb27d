import { reveal } from "./folds.js";

for (const table of document.querySelectorAll("table.units")) {
  const body = table.tBodies[0];
  for (const button of table.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const heading = button.closest("th"), key = button.dataset.key;
      const down = heading.getAttribute("aria-sort") !== "descending";
      for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => (key === "concept" ? row.dataset.concept : row.dataset[key] === "inf" ? Infinity : Number(row.dataset[key]));
      const rows = [...body.rows].sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
      body.append(...(down ? rows.reverse() : rows));
    });
  }
  table.closest("details").querySelector(".concepts").addEventListener("change", (event) => {
    for (const row of body.rows) row.hidden = event.target.value !== "" && row.dataset.concept !== event.target.value;
  });
}
reveal();
document.body.dataset.ready = "yes";
