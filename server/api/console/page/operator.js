// For an operator: the last ten minutes of memory and queue, and every tenant's share and quotas.

import { all, get, inPath } from "./api.js";
import { Chart } from "./chart.js";
import { el, hueOf, refusal } from "./dom.js";
import { bytes, count, percent } from "./format.js";

const MINUTES = 10;
const SHOWN = 50;
const ago = (value) => (value > -0.05 ? "now" : `${Math.round(-value)} min ago`);

export async function open({ monitor }) {
  const view = new OperatorView(monitor);
  return { element: view.element, show: () => view.show(), hide: () => view.hide() };
}

class OperatorView {
  #tenants = [];
  #unwatch = null;

  constructor(monitor) {
    this.monitor = monitor;
    this.memory = new Chart({ height: 210 });
    this.queue = new Chart({ height: 210 });
    this.figures = el("dl", { class: "facts facts-small" });
    this.problem = el("div");
    this.table = el("tbody");
    this.note = el("p", { class: "fine" });
    this.element = el(
      "div",
      { class: "page" },
      el("header", { class: "head" }, el("h1", {}, "Operator"), el("p", {}, "This server, every five seconds, as this tab has seen it.")),
      this.problem,
      el("section", { class: "card", "aria-label": "Now" }, this.figures),
      el(
        "div",
        { class: "two" },
        el("section", { class: "card stack", "aria-label": "Memory" }, el("h2", {}, "Memory in use"), this.memory.element),
        el("section", { class: "card stack", "aria-label": "Requests" }, el("h2", {}, "Requests"), this.queue.element),
      ),
      el("section", { class: "card stack", "aria-label": "Tenants" }, el("h2", {}, "Tenants"), this.#head(), this.note),
    );
  }

  #head() {
    const names = ["Tenant", "Tokens in 10 min", "Weight", "Requests a minute", "Tokens a minute", "At once", "Adapters", "Bytes"];
    const cells = names.map((name) => el("th", { scope: "col" }, name));
    return el("div", { class: "table-frame", tabindex: 0, role: "region", "aria-label": "Table of tenants" }, el("table", {}, el("thead", {}, el("tr", {}, ...cells)), this.table));
  }

  async show() {
    this.#unwatch ??= this.monitor.watch(() => this.#draw());
    try {
      const tenants = await all("admin/tenants", { most: SHOWN });
      const quotas = await Promise.all(tenants.map((tenant) => get(`admin/tenants/${inPath(tenant.id)}/quotas`)));
      this.#tenants = tenants.map((tenant, index) => ({ ...tenant, quotas: quotas[index] }));
      this.problem.replaceChildren();
      this.note.textContent = tenants.length === SHOWN ? `The first ${SHOWN} tenants.` : "";
    } catch (error) {
      this.problem.replaceChildren(refusal(error));
    }
    this.#draw();
  }

  hide() {
    this.#unwatch?.();
    this.#unwatch = null;
  }

  #draw() {
    const { readings, last } = this.monitor;
    const now = last?.time ?? Date.now();
    const points = (name, factor = 1) => readings.map(({ time, values }) => [(time - now) / 60000, (values[name] ?? 0) * factor]);
    const axis = { xRange: [-MINUTES, 0], xText: ago };
    this.memory.draw({
      ...axis,
      yMax: 100,
      yText: (value) => `${Math.round(value)} %`,
      label: `Adapter memory ${percent(last?.values.adapter_pool_usage_ratio)} in use, KV cache ${percent(last?.values.kv_cache_usage_ratio)}, over the last ten minutes.`,
      lines: [
        { name: "adapter memory", kind: "first", points: points("adapter_pool_usage_ratio", 100), isArea: true },
        { name: "KV cache", kind: "second", points: points("kv_cache_usage_ratio", 100) },
      ],
    });
    this.queue.draw({
      ...axis,
      yText: (value) => (Number.isInteger(value) ? String(value) : ""),
      yMax: Math.max(4, ...readings.flatMap(({ values }) => [values.num_requests_running ?? 0, values.num_requests_waiting ?? 0])),
      label: `${count(last?.values.num_requests_running)} requests running, ${count(last?.values.num_requests_waiting)} waiting, over the last ten minutes.`,
      lines: [
        { name: "running", kind: "first", points: points("num_requests_running"), isArea: true },
        { name: "waiting", kind: "second", points: points("num_requests_waiting") },
      ],
    });
    this.#drawFigures(last?.values ?? {});
    this.table.replaceChildren(...this.#tenants.map((tenant) => this.#row(tenant)));
  }

  #drawFigures(values) {
    const figures = [
      ["running", count(values.num_requests_running)],
      ["waiting", count(values.num_requests_waiting)],
      ["tenants waiting", count(values.tenants_waiting)],
      ["on the device", count(values.adapters_resident)],
      ["in host memory", bytes(values.adapter_host_bytes ?? 0)],
      ["working set", percent(values.adapter_working_set_ratio)],
      ["fairness", Number.isFinite(values.fairness_jain) ? values.fairness_jain.toFixed(2) : "\u2013"],
      ["disk free", bytes(values.data_dir_free_bytes ?? 0)],
    ];
    this.figures.replaceChildren(...figures.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  /** Tokens that each tenant was given while this tab looked. */
  #share(tenant) {
    const { readings, last } = this.monitor;
    const given = (name) => (last?.tokens[name] ?? 0) - (readings[0]?.tokens[name] ?? 0);
    const total = Object.keys(last?.tokens ?? {}).reduce((sum, name) => sum + given(name), 0);
    return { tokens: given(tenant), part: total ? given(tenant) / total : 0 };
  }

  #row({ id, disabled, quotas }) {
    const { tokens, part } = this.#share(id);
    const limit = (value) => (value === null ? "\u221e" : count(value));
    const cells = [quotas.weight, limit(quotas.requests_per_minute), limit(quotas.tokens_per_minute), limit(quotas.max_concurrent), limit(quotas.max_adapters)];
    const most = quotas.max_adapter_bytes === null ? "\u221e" : bytes(quotas.max_adapter_bytes);
    return el(
      "tr",
      { style: { "--hue": hueOf(id) } },
      el("th", { scope: "row" }, el("span", { class: "swatch", "aria-hidden": "true" }), id, disabled && el("span", { class: "tag tag-warn" }, "disabled")),
      el("td", {}, el("span", { class: "share" }, el("span", { class: "share-track plain-track", "aria-hidden": "true" }, el("span", { class: "share-fill", style: { "--part": part } })), el("span", {}, `${count(tokens)} \u00b7 ${percent(part)}`))),
      ...[...cells, most].map((cell) => el("td", { class: "number" }, String(cell))),
    );
  }
}
