// The state of the server, in the corner of every view.

import { Refused } from "./api.js";
import { count, percent } from "./format.js";
import { el } from "./dom.js";

export function serverCard(place, monitor) {
  const dot = el("span", { class: "dot", "aria-hidden": "true" });
  const state = el("span", {}, "\u2026");
  const running = el("dd");
  const waiting = el("dd");
  const pool = meter("adapter memory");
  const cache = meter("KV cache");
  place.append(
    el("p", { class: "server-state" }, dot, state),
    el("dl", { class: "pairs" }, el("dt", {}, "running"), running, el("dt", {}, "waiting"), waiting),
    pool.element,
    cache.element,
  );
  monitor.watch(({ last, error }) => {
    const values = last?.values ?? {};
    const isUp = !error && values.up === 1;
    const isHidden = error instanceof Refused; // a gateway keeps /metrics for the scraper
    dot.dataset.state = isHidden ? "none" : error || values.up === 0 ? "bad" : last ? "good" : "none";
    state.textContent = isHidden ? "no metrics" : error ? "no answer" : isUp ? "serving" : last ? "engine ended" : "\u2026";
    running.textContent = count(values.num_requests_running);
    waiting.textContent = count(values.num_requests_waiting);
    pool.set(values.adapter_pool_usage_ratio);
    cache.set(values.kv_cache_usage_ratio);
  });
}

/** A named bar, 0 to 1. */
export function meter(name) {
  const bar = el("span", { class: "meter-fill" });
  const value = el("span", { class: "meter-value" });
  const element = el(
    "div",
    { class: "meter" },
    el("span", { class: "meter-name" }, name),
    value,
    el("span", { class: "meter-track", "aria-hidden": "true" }, bar),
  );
  const set = (ratio) => {
    bar.style.setProperty("--part", Number.isFinite(ratio) ? String(Math.min(1, ratio)) : "0");
    value.textContent = percent(ratio);
  };
  return { element, set };
}
