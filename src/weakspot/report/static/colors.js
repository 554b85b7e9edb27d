// Colors of maps. Maps arrive as raw levels with their range and are colored here, so that opacity, overlay and zoom
// need no server.

export const tables = {}; // "signed" and "magnitude": 256 colors, three bytes each
export const categories = []; // [red, green, blue] of each category

export const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

// Takes the color tables of the program (weakspot.report.rendering.shared_colors).
export function setColors(shared) {
  for (const [kind, text] of Object.entries(shared.tables)) tables[kind] = bytes(text);
  categories.splice(0, categories.length, ...shared.categories.map((color) =>
    [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16))));
}

export async function inflate(text) {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The color of a place on the scale from 0 to 1.
export function tableColor(kind, place) {
  const at = Math.max(0, Math.min(255, Math.round(255 * place)));
  return tables[kind].subarray(3 * at, 3 * at + 3);
}

// Marks the sites of a category with a pattern, so that it can be recognized without color: solid, stripes, dots, then both.
export function marked(category, x, y) {
  if (category === 1) return true;
  if (category === 2) return (x + y) % 6 < 4;
  if (category === 3) return !(x % 4 < 2 && y % 4 < 2);
  return (x - y + 4096) % (category + 2) > 1;
}

// The value of one site of a map.
export const valueOf = (map, at) => map.range[0] + (map.levels[at] / 255) * (map.range[1] - map.range[0]);

// The color of one site of a map as [red, green, blue], or null where the photograph shows through.
export function colorOf(map, at, x, y) {
  const level = map.levels[at];
  if (map.kind === "category") {
    if (level === 0) return null;
    const color = categories[level % categories.length];
    return marked(level, x, y) ? color : color.map((part) => part * 0.45);
  }
  const [low, high] = map.limits;
  return tableColor(map.kind, (valueOf(map, at) - low) / (high - low));
}

// The color table as a CSS gradient from left (low) to right (high).
export function gradient(kind) {
  const stops = Array.from({ length: 9 }, (_, at) => `rgb(${[...tableColor(kind, at / 8)].join(",")})`);
  return `linear-gradient(90deg,${stops.join(",")})`;
}

// Fills the samples of a legend of categories.
export function drawSwatches(root) {
  for (const canvas of root.querySelectorAll(".swatch")) {
    const category = Number(canvas.dataset.category);
    const context = canvas.getContext("2d");
    for (let y = 0; y < canvas.height; y++) {
      for (let x = 0; x < canvas.width; x++) {
        const dim = marked(category, x, y) ? 1 : 0.45;
        context.fillStyle = `rgb(${categories[category % categories.length].map((part) => part * dim).join(",")})`;
        context.fillRect(x, y, 1, 1);
      }
    }
  }
}
