// Every tenant with its share of the last ten minutes and its quotas; and what an operator changes about them.

import { all, get, inPath, post } from "./api.js";
import { button, el, field, hueOf, refusal } from "./dom.js";
import { bytes, count, percent } from "./format.js";
import { keyShown, TenantCard } from "./tenant-card.js";

const SHOWN = 50;
const NAMES = ["Tenant", "Tokens in 10 min", "Weight", "Requests a minute", "Tokens a minute", "At once", "Adapters", "Bytes"];
const limit = (value) => (value === null ? "\u221e" : count(value));

export class Tenants {
  #rows = new Map();

  constructor(monitor) {
    this.monitor = monitor;
    this.problem = el("div");
    this.body = el("tbody");
    this.note = el("p", { class: "fine" });
    this.card = new TenantCard({ onChange: () => this.load(), onClose: (id) => this.#rows.get(id)?.edit.focus() });
    this.name = el("input", { maxlength: 128, required: true, autocomplete: "off", spellcheck: "false" });
    this.made = el("div");
    const [first, ...others] = NAMES.map((name) => el("th", { scope: "col" }, name));
    const head = el("tr", {}, first, el("td"), ...others);
    const table = el("table", {}, el("thead", {}, head), this.body);
    this.element = el(
      "div",
      { class: "stack" },
      el(
        "section",
        { class: "card stack", "aria-label": "Tenants" },
        el("h2", {}, "Tenants"),
        this.problem,
        el("div", { class: "table-frame", tabindex: 0, role: "region", "aria-label": "Table of tenants" }, table),
        this.note,
      ),
      this.card.element,
      el(
        "form",
        { class: "card stack", "aria-label": "New tenant", on: { submit: (event) => this.#create(event) } },
        el("div", { class: "row new-tenant" }, field("Name of a new tenant", this.name), el("button", { type: "submit" }, "Create")),
        this.made,
      ),
    );
  }

  async load() {
    try {
      const tenants = await all("admin/tenants", { most: SHOWN });
      const quotas = await Promise.all(tenants.map((tenant) => get(`admin/tenants/${inPath(tenant.id)}/quotas`)));
      this.#rows = new Map(tenants.map((tenant, index) => [tenant.id, this.#row({ ...tenant, quotas: quotas[index] })]));
      this.body.replaceChildren(...[...this.#rows.values()].map((row) => row.element));
      this.problem.replaceChildren();
      this.note.textContent = tenants.length === SHOWN ? `The first ${SHOWN} tenants.` : "";
    } catch (error) {
      this.problem.replaceChildren(refusal(error));
    }
    this.drawShares();
  }

  /** Keys that were shown are forgotten. */
  hide() {
    this.card.close();
    this.made.replaceChildren();
  }

  /** Tokens that each tenant was given while this tab looked. Rows stay as they are: one may have the focus. */
  drawShares() {
    const { readings, last } = this.monitor;
    const given = (name) => (last?.tokens[name] ?? 0) - (readings[0]?.tokens[name] ?? 0);
    const total = Object.keys(last?.tokens ?? {}).reduce((sum, name) => sum + given(name), 0);
    for (const [id, { fill, text }] of this.#rows) {
      const part = total ? given(id) / total : 0;
      fill.style.setProperty("--part", part);
      text.textContent = `${count(given(id))} \u00b7 ${percent(part)}`;
    }
  }

  #row(tenant) {
    const { id, disabled, quotas } = tenant;
    const cells = [quotas.weight, limit(quotas.requests_per_minute), limit(quotas.tokens_per_minute), limit(quotas.max_concurrent), limit(quotas.max_adapters)];
    const most = quotas.max_adapter_bytes === null ? "\u221e" : bytes(quotas.max_adapter_bytes);
    const fill = el("span", { class: "share-fill" });
    const text = el("span");
    const edit = button("Edit", () => this.card.open(tenant), { class: "small", "aria-label": `Edit ${id}` });
    const element = el(
      "tr",
      { style: { "--hue": hueOf(id) } },
      el("th", { scope: "row" }, el("span", { class: "swatch", "aria-hidden": "true" }), id, disabled && el("span", { class: "tag tag-warn" }, "disabled")),
      el("td", {}, edit), // beside the name: a phone shows the first columns
      el("td", {}, el("span", { class: "share" }, el("span", { class: "share-track plain-track", "aria-hidden": "true" }, fill), text)),
      ...[...cells, most].map((cell) => el("td", { class: "number" }, String(cell))),
    );
    return { element, edit, fill, text };
  }

  async #create(event) {
    event.preventDefault();
    try {
      const { id, api_key: key } = await post("admin/tenants", { name: this.name.value.trim() });
      this.made.replaceChildren(keyShown(id, key));
      this.name.value = "";
      await this.load();
    } catch (error) {
      this.made.replaceChildren(refusal(error));
    }
  }
}
