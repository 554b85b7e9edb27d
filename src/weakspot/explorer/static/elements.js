// Small helpers: elements, numbers as text, arrays from the server, requests of which only the latest counts.

import { bytes } from "./colors.js";

export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const button = (text, act, attributes = {}) => make("button", { type: "button", on: { click: act }, ...attributes }, text);

export const field = (text, control, attributes = {}) => make("label", { class: "field", ...attributes }, make("span", {}, text), control);

export const choice = (options, attributes = {}) =>
  make("select", attributes, ...options.map(([value, text]) => make("option", { value }, text)));

// {shape, base64} as a Float32Array; the server sends little-endian.
export function floats({ shape, base64 }) {
  const raw = bytes(base64);
  const view = new DataView(raw.buffer);
  return { shape, values: Float32Array.from({ length: raw.length / 4 }, (_, at) => view.getFloat32(4 * at, true)) };
}

export function percent(fraction) {
  const part = 100 * fraction;
  if (part > 0 && part < 0.1) return "<0.1%";
  if (part > 99.9 && part < 100) return ">99.9%";
  return `${part < 10 && part > 0 ? part.toFixed(1) : part.toFixed(0)}%`;
}

// A number with a real minus sign; small ones keep two digits that count. `always` puts a plus before positive ones.
export function signed(value, { digits = 2, always = false } = {}) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not defined";
  if (Math.abs(value) < 0.095 && digits === 2) digits = 3;
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return (value < 0 ? "−" : always ? "+" : "") + text;
}

export const counted = (count, noun) => `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;

// Calls `act` with the newest argument only, one call at a time.
export function latest(act) {
  let busy = false, waiting = null;
  return async (argument) => {
    waiting = { argument };
    if (busy) return;
    busy = true;
    try {
      while (waiting) {
        const next = waiting;
        waiting = null;
        await act(next.argument);
      }
    } finally {
      busy = false;
    }
  };
}

export function download(name, blob) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// A file's bytes as base64 text.
export async function base64Of(blob) {
  const text = await new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("the file cannot be read"));
    reader.readAsDataURL(blob);
  });
  return text.slice(text.indexOf(",") + 1);
}
