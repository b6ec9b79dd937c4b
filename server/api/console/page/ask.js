// Asks the base and any of the caller's adapters the same, at once, and shows the answers side by side as they come.

import { all } from "./api.js";
import { AnswerCard } from "./answer.js";
import { button, el, field, hueOf, refusal } from "./dom.js";
import { count, plural, seconds } from "./format.js";

const MOST_SHOWN = 60;
const FIRST_CHOSEN = 3;

export async function open() {
  const view = new AskView(await all("v1/models"));
  return { element: view.element, show: (model) => view.refresh(model) };
}

class AskView {
  #cards = [];
  #chosen = new Set();

  constructor(models) {
    this.prompt = el("textarea", { id: "prompt", rows: 2, required: true, placeholder: "Ask something\u2026" });
    this.system = el("textarea", { rows: 2, placeholder: "none" });
    this.tokens = el("input", { type: "number", min: 1, max: 32768, value: 160, inputmode: "numeric" });
    this.temperature = el("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0, inputmode: "decimal" });
    this.form = el("select", {}, el("option", { value: "chat" }, "chat"), el("option", { value: "text" }, "plain text"));
    this.search = el("input", { type: "search", placeholder: "Filter by name", "aria-label": "Filter the models" });
    this.chips = el("div", { class: "chips" });
    this.send = el("button", { type: "submit", class: "primary" }, "Ask", el("kbd", { "aria-hidden": "true" }, "Ctrl \u21b5"));
    this.stop = button("Stop all", () => this.#cards.forEach((card) => card.stop()), { disabled: true });
    this.answers = el("div", { class: "answers" });
    this.problem = el("div");
    this.sum = el("p", { class: "fine sum", role: "status" });
    this.element = this.#page();
    this.#take(models);
    for (const model of this.models.slice(0, FIRST_CHOSEN + 1)) this.#chosen.add(model.id);
    this.#drawChips();
    this.#empty();
  }

  /** Adapters may have come or gone; `model` is chosen besides. */
  async refresh(model) {
    try {
      this.#take(await all("v1/models"));
    } catch (error) {
      this.problem.replaceChildren(refusal(error));
      return;
    }
    if (model) {
      if (!this.models.some((each) => each.id === model)) this.models.push({ id: model, parent: this.base });
      this.#chosen = new Set([this.base, model]);
    }
    this.#drawChips();
  }

  #take(models) {
    this.models = models;
    this.base = models.find((model) => model.parent === null)?.id;
    const known = new Set(models.map((model) => model.id));
    this.#chosen = new Set([...this.#chosen].filter((id) => known.has(id)));
  }

  #page() {
    const onKey = (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#ask(event);
    };
    const settings = el(
      "details",
      { class: "settings" },
      el("summary", {}, "Settings"),
      el(
        "div",
        { class: "settings-grid" },
        field("System message", this.system),
        field("Most tokens", this.tokens),
        field("Temperature", this.temperature, "0 is greedy"),
        field("Form", this.form, "plain text needs no chat template"),
      ),
    );
    const composer = el(
      "form",
      { class: "card composer", on: { submit: (event) => this.#ask(event), keydown: onKey } },
      el("label", { class: "field-name", for: "prompt" }, "Prompt"),
      this.prompt,
      el("fieldset", { class: "models" }, el("legend", {}, "Answered by"), this.search, this.chips),
      el("div", { class: "composer-foot" }, settings, el("div", { class: "row" }, this.stop, this.send)),
    );
    this.search.addEventListener("input", () => this.#drawChips());
    return el(
      "div",
      { class: "page" },
      el("header", { class: "head" }, el("h1", {}, "Ask"), el("p", {}, "The same prompt to the base and to adapters, in one batch.")),
      composer,
      this.problem,
      this.sum,
      this.answers,
    );
  }

  #drawChips() {
    const wanted = this.search.value.trim().toLowerCase();
    const fitting = this.models.filter((model) => model.id.toLowerCase().includes(wanted));
    const first = fitting.filter((model) => this.#chosen.has(model.id));
    const rest = fitting.filter((model) => !this.#chosen.has(model.id)).slice(0, MOST_SHOWN - first.length);
    const shown = new Set([...first, ...rest]);
    this.search.hidden = this.models.length <= 12;
    this.chips.replaceChildren(...fitting.filter((model) => shown.has(model)).map((model) => this.#chip(model)));
    if (fitting.length > shown.size) this.chips.append(el("p", { class: "fine" }, `${fitting.length - shown.size} more: filter by name`));
  }

  #chip(model) {
    const toggle = (event) => {
      if (event.target.checked) this.#chosen.add(model.id);
      else this.#chosen.delete(model.id);
    };
    const box = el("input", { type: "checkbox", value: model.id, checked: this.#chosen.has(model.id), on: { change: toggle } });
    const kind = model.parent === null ? "chip chip-base" : "chip";
    return el("label", { class: kind, style: { "--hue": hueOf(model.id.split("@")[0]) } }, box, el("span", { class: "swatch", "aria-hidden": "true" }), el("span", { class: "chip-name" }, model.id));
  }

  #empty() {
    this.answers.append(el("p", { class: "empty" }, "Answers appear here, one column for each model."));
  }

  #request() {
    const text = this.prompt.value;
    const fields = {
      max_tokens: Number(this.tokens.value),
      temperature: Number(this.temperature.value),
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    if (this.form.value === "text") return { path: "v1/completions", body: { ...fields, prompt: text } };
    const system = this.system.value.trim() ? [{ role: "system", content: this.system.value }] : [];
    return { path: "v1/chat/completions", body: { ...fields, messages: [...system, { role: "user", content: text }] } };
  }

  async #ask(event) {
    event.preventDefault();
    if (!this.prompt.value.trim()) return this.prompt.focus();
    const chosen = this.models.filter((model) => this.#chosen.has(model.id));
    this.#cards.forEach((card) => card.stop());
    this.#cards = chosen.map((model) => new AnswerCard(model, model.parent === null));
    this.answers.replaceChildren(...this.#cards.map((card) => card.element));
    if (!chosen.length) return this.#empty();
    const { path, body } = this.#request();
    const cards = this.#cards;
    const startedAt = performance.now();
    this.stop.disabled = false;
    this.sum.textContent = `${plural(cards.length, "model")} at work.`;
    await Promise.all(cards.map((card) => card.run(path, body)));
    if (cards === this.#cards) this.#sumUp((performance.now() - startedAt) / 1000);
    return undefined;
  }

  #sumUp(tookS) {
    const numTokens = this.#cards.reduce((sum, card) => sum + card.numTokens, 0);
    this.stop.disabled = true;
    this.sum.textContent = `${plural(this.#cards.length, "answer")}, ${plural(numTokens, "token")} in ${seconds(tookS)}: ${count(numTokens / tookS)} tokens/s together.`;
  }
}
