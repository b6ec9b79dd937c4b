// For an operator: the last ten minutes of memory and queue, and below them the tenants.

import { Chart } from "./chart.js";
import { el } from "./dom.js";
import { bytes, count, percent } from "./format.js";
import { Tenants } from "./tenants.js";

const MINUTES = 10;
const ago = (value) => (value > -0.05 ? "now" : `${Math.round(-value)} min ago`);

export async function open({ monitor }) {
  const view = new OperatorView(monitor);
  return { element: view.element, show: () => view.show(), hide: () => view.hide() };
}

class OperatorView {
  #unwatch = null;

  constructor(monitor) {
    this.monitor = monitor;
    this.memory = new Chart({ height: 210 });
    this.queue = new Chart({ height: 210 });
    this.figures = el("dl", { class: "facts facts-small" });
    this.tenants = new Tenants(monitor);
    this.element = el(
      "div",
      { class: "page" },
      el("header", { class: "head" }, el("h1", {}, "Operator"), el("p", {}, "This server, every five seconds, as this tab has seen it.")),
      el("section", { class: "card", "aria-label": "Now" }, this.figures),
      el(
        "div",
        { class: "two" },
        el("section", { class: "card stack", "aria-label": "Memory" }, el("h2", {}, "Memory in use"), this.memory.element),
        el("section", { class: "card stack", "aria-label": "Requests" }, el("h2", {}, "Requests"), this.queue.element),
      ),
      this.tenants.element,
    );
  }

  async show() {
    this.#unwatch ??= this.monitor.watch(() => this.#draw());
    await this.tenants.load();
  }

  hide() {
    this.#unwatch?.();
    this.#unwatch = null;
    this.tenants.hide();
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
    this.tenants.drawShares();
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
}
