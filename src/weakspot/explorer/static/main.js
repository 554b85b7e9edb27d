// The page: fetch and one socket as the bench's transport, and tabs if there is a gallery. Every URL is relative, so
// that the page works behind a proxy that puts it below a path.

import { mount } from "./bench.js";
import { button } from "./elements.js";

const here = new URL("./", location.href);

async function ask(name, body) {
  let reply;
  try {
    reply = await fetch(new URL(`api/${name}`, here), { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  } catch {
    throw new Error("weakspot does not answer. Start weakspot explore again and open its new link.");
  }
  try {
    return await reply.json();
  } catch {
    throw new Error(reply.status === 403 ? "This page may no longer ask. Open the link that weakspot explore printed." : `weakspot answered with the status ${reply.status}.`);
  }
}

// One socket for all jobs; it opens with the first one.
const jobs = new Map();
let socket = null, last = 0;

function open() {
  if (socket && socket.readyState <= WebSocket.OPEN) return socket;
  const url = new URL("api/ws", here);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(url);
  const opened = socket;
  socket.addEventListener("message", ({ data }) => {
    const { id, ...event } = JSON.parse(data);
    const job = jobs.get(id);
    if (!job) return;
    job.take(event);
    if (event.event === "done" || event.event === "error") {
      jobs.delete(id);
      job.end();
    }
  });
  socket.addEventListener("close", () => {
    for (const [id, job] of jobs) {
      if (job.socket !== opened) continue;
      jobs.delete(id);
      job.take({ event: "error", error: "The connection to weakspot was lost. Start weakspot explore again and open its new link." });
      job.end();
    }
  });
  return socket;
}

function subscribe(name, body, take) {
  const id = ++last, through = open();
  const send = (message) => {
    const text = JSON.stringify({ id, ...message });
    if (through.readyState === WebSocket.OPEN) through.send(text);
    else if (through.readyState === WebSocket.CONNECTING) through.addEventListener("open", () => through.send(text), { once: true });
  };
  const done = new Promise((end) => jobs.set(id, { take, end, socket: through }));
  send({ name, body });
  return { stop: () => send({ stop: true }), done };
}

// The token has become a cookie; it does not belong in copied links.
if (new URLSearchParams(location.search).has("token")) history.replaceState(null, "", here.href + location.hash);

const place = document.getElementById("bench");
const bench = mount(place, ask, subscribe, { keys: document, hash: true });

// Tabs, if the program was started with a run. The address holds the state of both.
await bench.ready;
if (bench.bench.hello?.gallery) {
  const [{ mountGallery }, { recordsOf, restore }] = await Promise.all([import("./gallery.js"), import("./links.js")]);
  const linked = location.hash.slice(1), wanted = recordsOf(linked);
  const other = document.getElementById("gallery");
  const tabs = document.getElementById("tabs");
  const remember = (records) => {
    bench.bench.records = { ...bench.bench.records, ...records };
    bench.bench.stateChanged();
  };
  const show = (tab) => {
    place.hidden = tab !== "bench";
    other.hidden = tab !== "gallery";
    for (const each of tabs.children) each.setAttribute("aria-pressed", String(each.dataset.name === tab));
    remember({ tab });
  };
  for (const [name, text] of [["gallery", "Gallery"], ["bench", "Bench"]]) {
    const tab = button(text, () => show(name));
    tab.dataset.name = name;
    tabs.append(tab);
  }
  tabs.hidden = false;
  const gallery = mountGallery(other, ask, {
    state: wanted,
    onState: remember,
    async onOpen(record) {
      show("bench");
      await bench.open(record.image, record);
    },
  });
  show("gallery");
  if ((await gallery.ready) && wanted?.record !== undefined && bench.bench.hello.model !== null) {
    await gallery.openRecord(wanted.record);
    if (bench.bench.image) await restore(bench.bench, linked);
    show(wanted.tab === "bench" && bench.bench.image ? "bench" : "gallery");
  }
  bench.bench.restored = true;
  bench.bench.stateChanged();
  document.body.dataset.ready = "yes";
}
