// The frame: key, views by address, the server's state in the corner.

import { get, session } from "./api.js";
import { el, refusal } from "./dom.js";
import { Monitor } from "./metrics.js";
import { serverCard } from "./server-card.js";
import { signIn } from "./sign-in.js";

const VIEWS = {
  ask: () => import("./ask.js"),
  adapters: () => import("./adapters.js"),
  jobs: () => import("./jobs.js"),
  operator: () => import("./operator.js"),
};

const shell = document.getElementById("shell");
const door = document.getElementById("signin");
const main = document.getElementById("view");
const monitor = new Monitor();
let opened = new Map();
let shown = null;
let asked = 0; // how often the address or the key has changed

async function start() {
  door.hidden = true;
  shell.hidden = false;
  for (const link of shell.querySelectorAll("[data-view=operator]")) link.hidden = !session.isAdmin;
  await Promise.all([monitor.start(), show()]);
}

function stop() {
  monitor.stop();
  asked += 1;
  shown?.hide?.();
  [opened, shown] = [new Map(), null];
  main.replaceChildren();
  shell.hidden = true;
  door.hidden = false;
  signIn(door, start);
}

/** The view that the address names; one that was open before is as it was. */
async function show() {
  const turn = ++asked;
  const [name, ...rest] = location.hash.slice(1).split("/").map(decodeURIComponent);
  const view = name in VIEWS ? name : "ask";
  for (const link of shell.querySelectorAll("[data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!opened.has(view)) {
    try {
      const made = await (await VIEWS[view]()).open({ monitor });
      if (turn !== asked) return; // the address has changed meanwhile
      opened.set(view, made);
    } catch (error) {
      if (turn !== asked) return;
      main.replaceChildren(el("div", { class: "page" }, refusal(error)));
      return;
    }
  }
  if (shown !== opened.get(view)) {
    shown?.hide?.();
    shown = opened.get(view);
    main.replaceChildren(shown.element);
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  document.title = `${view[0].toUpperCase()}${view.slice(1)} \u00b7 multilora console`;
  shown.show?.(...rest);
}

addEventListener("hashchange", () => session.known && show());
document.getElementById("sign-out").addEventListener("click", () => {
  session.close();
  stop();
});
serverCard(document.getElementById("server"), monitor);

if (session.known) {
  get("v1/models").then(start, () => stop());
} else {
  stop();
}
