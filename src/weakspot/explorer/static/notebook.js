// The bench in a cell of a notebook. Questions and jobs travel as messages of the widget, so no port is opened.

import { mount } from "./bench.js";

// Every view of a widget hears all of its messages; each answers to its own.
export function transport(model) {
  const view = Math.random().toString(36).slice(2);
  const waiting = new Map();
  let last = 0;
  const hear = (message) => {
    const { id, ...rest } = message ?? {};
    const take = waiting.get(id);
    if (take) take(rest, id);
  };
  model.on("msg:custom", hear);
  const send = (message) => model.send({ view, ...message });
  return {
    ask: (name, body) => new Promise((resolve) => {
      const id = `${view}-${++last}`;
      waiting.set(id, ({ reply }) => {
        waiting.delete(id);
        resolve(reply);
      });
      send({ kind: "ask", id, name, body });
    }),
    subscribe(name, body, take) {
      const id = `${view}-${++last}`;
      const done = new Promise((end) => waiting.set(id, ({ event }) => {
        take(event);
        if (event.event !== "done" && event.event !== "error") return;
        waiting.delete(id);
        end();
      }));
      send({ kind: "subscribe", id, name, body });
      return { stop: () => send({ kind: "stop", id }), done };
    },
    close() {
      model.off("msg:custom", hear);
      send({ kind: "close" });
    },
  };
}

// A shadow root keeps the styles of the bench and of the notebook apart.
function render({ model, el }) {
  const host = document.createElement("div");
  const root = host.attachShadow({ mode: "open" });
  const style = document.createElement("style");
  style.textContent = model.get("style");
  const place = document.createElement("div");
  root.append(style, place);
  el.append(host);
  const { ask, subscribe, close } = transport(model);
  const bench = mount(place, ask, subscribe);
  return () => {
    bench.stop();
    close();
    host.remove();
  };
}

export default { render };
