// Folded sections: links lead into them, and on paper all of them are open.

export function reveal() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  if (target) target.scrollIntoView();
}

let closed = [];
window.addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const section of closed) section.open = true;
});
window.addEventListener("afterprint", () => { for (const section of closed) section.open = false; });
window.addEventListener("hashchange", reveal);
