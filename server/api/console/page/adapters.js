// The caller's adapters: where they lie, which versions they have, and what can be done with them.

import { all, session } from "./api.js";
import { AdapterRow } from "./adapter-row.js";
import { button, el, refusal } from "./dom.js";
import { bytes, plural } from "./format.js";
import { memoryMap, tierOf } from "./memory-map.js";
import { uploadCard } from "./upload.js";

const SHOWN = 50;

export async function open({ monitor }) {
  const view = new AdaptersView(monitor);
  await view.load();
  return { element: view.element, show: () => view.show(), hide: () => view.hide() };
}

class AdaptersView {
  #rows = new Map();
  #adapters = [];
  #shown = SHOWN;
  #unwatch = null;

  constructor(monitor) {
    this.monitor = monitor;
    this.map = el("div", { class: "memory" });
    this.search = el("input", { type: "search", placeholder: "Filter by name", "aria-label": "Filter the adapters" });
    this.search.addEventListener("input", () => this.#draw());
    this.list = el("ul", { class: "rows" });
    this.problem = el("div");
    this.total = el("p");
    this.element = el(
      "div",
      { class: "page" },
      el("header", { class: "head" }, el("h1", {}, "Adapters"), this.total),
      el("section", { class: "card", "aria-label": "Adapter memory" }, this.map),
      this.problem,
      el("section", { class: "stack", "aria-label": "Adapters by name" }, el("div", { class: "row spread" }, el("h2", {}, "By name"), this.search), this.list),
      uploadCard(() => this.load()),
    );
  }

  async show() {
    this.#unwatch ??= this.monitor.watch(() => this.#drawTiers());
    await this.load();
  }

  async load() {
    try {
      this.#adapters = await all("v1/adapters");
      this.problem.replaceChildren();
    } catch (error) {
      this.problem.replaceChildren(refusal(error));
    }
    this.#draw();
    await this.monitor.read();
  }

  hide() {
    this.#unwatch?.();
    this.#unwatch = null;
  }

  #draw() {
    const wanted = this.search.value.trim().toLowerCase();
    const fitting = this.#adapters.filter((each) => each.id.toLowerCase().includes(wanted));
    this.search.hidden = this.#adapters.length <= 8;
    this.total.textContent = `${plural(this.#adapters.length, "adapter")} on one frozen base, ${bytes(this.#adapters.reduce((sum, each) => sum + each.bytes, 0))} in all.`;
    const rows = fitting.slice(0, this.#shown).map((each) => this.#row(each));
    this.list.replaceChildren(...rows.map((row) => row.element));
    if (!rows.length) this.list.append(el("li", { class: "empty" }, wanted ? "No adapter has such a name." : "No adapter yet: drop one below."));
    if (fitting.length > rows.length) this.list.append(el("li", {}, button(`Show more of ${fitting.length}`, () => this.#more())));
    this.#drawTiers();
  }

  #more() {
    this.#shown += SHOWN;
    this.#draw();
  }

  #row(adapter) {
    const key = `${adapter.tenant}/${adapter.name}`;
    const known = this.#rows.get(key);
    if (known) known.update(adapter);
    else this.#rows.set(key, new AdapterRow(adapter, { isAdmin: session.isAdmin, onChange: () => this.load() }));
    return this.#rows.get(key);
  }

  #drawTiers() {
    const { last } = this.monitor;
    this.map.replaceChildren(...memoryMap(this.#adapters, last));
    for (const row of this.#rows.values()) row.place((version) => tierOf(version, last), (version) => last?.pinned.has(`${version.tenant}/${version.name}@${version.version}`));
  }
}
