// What an operator does to one tenant: quotas, a new key, off and on. A key is shown once, and forgotten with the card.

import { call, inPath, post } from "./api.js";
import { button, el, field, refusal } from "./dom.js";

const WHOLE = { min: 0, step: 1, placeholder: "no limit", inputmode: "numeric" };
const QUOTAS = [
  ["weight", "Weight", { min: 0.01, max: 100, step: "any", required: true, inputmode: "decimal" }],
  ["requests_per_minute", "Requests a minute", WHOLE],
  ["tokens_per_minute", "Tokens a minute", WHOLE],
  ["max_concurrent", "Sequences at once", WHOLE],
  ["max_adapters", "Adapter versions", WHOLE],
  ["max_adapter_bytes", "Bytes of adapters", WHOLE],
];
const OVERLAPS = [[0, "now"], [3600, "in an hour"], [86400, "in a day"]];

/** The key of `name`, to be copied now. */
export const keyShown = (name, key) =>
  el("div", { class: "done stack", role: "status" }, el("p", {}, `The key of ${name}. It is shown this once.`), el("code", { class: "key-text" }, key));

export class TenantCard {
  #tenant = null;

  /** onChange: after every change. onClose: gives the focus back. */
  constructor({ onChange, onClose }) {
    this.onChange = onChange;
    this.onClose = onClose;
    this.title = el("h2");
    this.inputs = Object.fromEntries(QUOTAS.map(([name, , limits]) => [name, el("input", { type: "number", ...limits })]));
    this.overlap = el("select", { "aria-label": "When its other keys end" }, ...OVERLAPS.map(([value, text]) => el("option", { value }, `other keys end ${text}`)));
    this.power = button("", () => this.#switch());
    this.answer = el("div");
    this.element = el(
      "section",
      { class: "card stack", "aria-label": "Tenant", hidden: true },
      el("div", { class: "row spread" }, this.title, button("Close", () => this.close(), { class: "small" })),
      el(
        "form",
        { class: "stack", on: { submit: (event) => this.#save(event) } },
        el("div", { class: "quota-grid" }, ...QUOTAS.map(([name, text]) => field(text, this.inputs[name]))),
        el("div", { class: "row" }, el("button", { type: "submit", class: "primary" }, "Save quotas"), this.power),
      ),
      el("div", { class: "row rotate" }, button("Rotate key", () => this.#rotate()), this.overlap),
      this.answer,
    );
  }

  open(tenant) {
    this.answer.replaceChildren();
    this.#take(tenant);
    this.element.hidden = false;
    this.inputs.weight.focus();
  }

  close() {
    if (this.element.hidden) return;
    this.answer.replaceChildren();
    this.element.hidden = true;
    this.onClose(this.#tenant.id);
  }

  #take(tenant) {
    this.#tenant = tenant;
    this.title.textContent = tenant.id;
    this.power.textContent = tenant.disabled ? "Enable" : "Disable";
    for (const [name, input] of Object.entries(this.inputs)) input.value = tenant.quotas[name] ?? "";
  }

  /** Shows what `act` returns, or the refusal. */
  async #try(act) {
    try {
      const shown = await act(`admin/tenants/${inPath(this.#tenant.id)}`);
      this.answer.replaceChildren(shown);
      await this.onChange();
    } catch (error) {
      this.answer.replaceChildren(refusal(error));
    }
  }

  #save(event) {
    event.preventDefault();
    const given = ([name, input]) => [name, input.value === "" ? null : Number(input.value)];
    return this.#try(async (path) => {
      const quotas = await call("PUT", `${path}/quotas`, { json: Object.fromEntries(Object.entries(this.inputs).map(given)) });
      this.#take({ ...this.#tenant, quotas });
      return el("p", { class: "done", role: "status" }, "Saved. It applies from the next request on.");
    });
  }

  #switch() {
    return this.#try(async (path) => {
      const { disabled } = await post(`${path}/${this.#tenant.disabled ? "enable" : "disable"}`);
      this.#take({ ...this.#tenant, disabled });
      return el("p", { class: "done", role: "status" }, disabled ? "Its keys are refused until it is enabled again." : "Its keys are taken again.");
    });
  }

  #rotate() {
    return this.#try(async (path) => keyShown(this.#tenant.id, (await post(`${path}/rotate-key?overlap_s=${this.overlap.value}`)).api_key));
  }
}
