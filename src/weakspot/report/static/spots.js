// The cells of a weak-spot map as an SVG over the photograph: a number in each cell, and each cell can be chosen.

function element(name, attributes, parent) {
  const made = document.createElementNS(parent.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

// A size (a fraction of the range of values) in gray levels of 255, as short as a cell is small.
export function levelsText(size) {
  const levels = 255 * size;
  return levels >= 9.95 ? String(Math.round(levels)) : levels >= 0.095 ? levels.toFixed(1) : "<0.1";
}

// The size of a change in words, in the norm "linf" (gray levels) or "l2" (length, values in [0, 1]).
export const sizeText = (size, norm = "linf") => (norm === "linf" ? `${levelsText(size)}/255` : `length ${size.toPrecision(2)}`);

// `cells`: norm of the sizes; tops (rows + 1) and lefts (columns + 1) in pixels; sizes, rows of numbers or null where not found, which
// may come later (`set`); verified: whether forward passes confirmed them. `choose` gets {row, column, x, y, sentence}.
export class SpotCells {
  constructor(svg, cells, choose) {
    Object.assign(this, { svg, cells, choose, chosen: null });
    const { tops, lefts } = cells;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${lefts.at(-1)} ${tops.at(-1)}`);
    svg.setAttribute("role", "group");
    this.groups = tops.slice(0, -1).map((top, row) => lefts.slice(0, -1).map((left, column) => {
      const group = element("g", { role: "button", tabindex: row || column ? -1 : 0, class: "spot" }, svg);
      const width = lefts[column + 1] - left, height = tops[row + 1] - top;
      element("rect", { x: left, y: top, width, height }, group);
      const text = element("text", { x: left + width / 2, y: top + height / 2, "font-size": Math.min(height * 0.4, width / 2.8) }, group);
      group.addEventListener("click", () => this.pick(row, column));
      group.addEventListener("keydown", (event) => this.press(event, row, column));
      return { group, text };
    }));
    this.groups.forEach((line, row) => line.forEach((_, column) => this.set(row, column, cells.sizes?.[row]?.[column])));
  }

  // undefined: not known yet; null: not found.
  set(row, column, size, color = null) {
    const { group, text } = this.groups[row][column];
    (this.cells.sizes ??= this.groups.map((line) => line.map(() => undefined)))[row][column] = size;
    text.textContent = size === undefined ? "" : size === null ? "?" : this.cells.norm === "l2" ? size.toPrecision(2) : levelsText(size);
    group.setAttribute("aria-label", this.sentence(row, column));
    const box = group.querySelector("rect");
    if (color) box.style.fill = `rgb(${[...color].join(",")})`;
  }

  sentence(row, column) {
    const place = `Cell in row ${row + 1}, column ${column + 1}`;
    const size = this.cells.sizes[row][column];
    if (size === undefined) return `${place}: not searched yet.`;
    if (size === null) {
      return this.cells.verified ? `${place}: not found. This does not mean that no change here is enough.`
        : `${place}: no change here would be enough if the network were linear. This estimate is not verified.`;
    }
    if (size === 0) return `${place}: no change is needed, the image is misclassified as it is.`;
    const levels = sizeText(size, this.cells.norm);
    return this.cells.verified ? `${place}: a change of about ${levels} here is enough; a forward pass confirmed it.`
      : `${place}: a change of about ${levels} here would be enough if the network were linear. This estimate is not verified.`;
  }

  pick(row, column) {
    const { tops, lefts } = this.cells;
    if (this.chosen) this.chosen.removeAttribute("aria-current");
    this.chosen = this.groups[row][column].group;
    this.chosen.setAttribute("aria-current", "true");
    this.choose({
      row, column, x: (lefts[column] + lefts[column + 1]) / 2, y: (tops[row] + tops[row + 1]) / 2,
      sentence: this.sentence(row, column),
    });
  }

  // One stop for Tab; arrows walk through the cells.
  press(event, row, column) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) {
      const next = this.groups[row + step[0]]?.[column + step[1]];
      if (next) {
        this.groups[row][column].group.setAttribute("tabindex", -1);
        next.group.setAttribute("tabindex", 0);
        next.group.focus();
      }
    } else if (event.key === "Enter" || event.key === " ") this.pick(row, column);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
