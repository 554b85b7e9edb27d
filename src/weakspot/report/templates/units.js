"use strict";
for (const article of document.querySelectorAll(".pair")) {
  const body = article.querySelector("tbody");
  for (const button of article.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const heading = button.closest("th"), key = button.dataset.key;
      const down = heading.getAttribute("aria-sort") !== "descending";
      for (const other of article.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => (key === "concept" ? row.dataset.concept || "\uffff" : row.dataset[key] === "inf" ? Infinity : Number(row.dataset[key]));
      const rows = [...body.children].sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
      body.append(...(down ? rows.reverse() : rows));
    });
  }
  article.querySelector(".concepts").addEventListener("change", (event) => {
    for (const row of body.children) row.hidden = event.target.value !== "" && row.dataset.concept !== event.target.value;
  });
}
document.body.dataset.ready = "yes";
