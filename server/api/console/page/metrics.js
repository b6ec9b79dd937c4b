// Reads /metrics every few seconds and keeps ten minutes of it in this tab. The server keeps no history.

import { metricsText } from "./api.js";

const EVERY_MS = 5000;
const KEPT_MS = 10 * 60 * 1000;
const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const TIERS = { gpu: "device", cpu: "host" };

/** Every sample of a text: name, labels, value. */
export function samplesOf(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (found) samples.push({ name: found[1], labels: labelsOf(found[2] ?? ""), value: Number(found[3]) });
  }
  return samples;
}

function labelsOf(text) {
  const labels = {};
  for (const [, name, value] of text.matchAll(LABEL)) labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
  return labels;
}

/** What the console shows of one reading. tokens: generated so far, by tenant. tiers and pinned: by "tenant/name@version". */
export function readingOf(text, time) {
  const values = {};
  const tokens = {};
  const tiers = new Map();
  const pinned = new Set();
  for (const { name, labels, value } of samplesOf(text)) {
    if (name === "vllm:lora_adapter_loaded") {
      if (!tiers.has(labels.adapter_name)) tiers.set(labels.adapter_name, TIERS[labels.level]);
      if (labels.pinned === "true") pinned.add(labels.adapter_name);
    } else if (name === "multilora_output_tokens_total") {
      tokens[labels.tenant] = (tokens[labels.tenant] ?? 0) + value;
    } else if (name.startsWith("multilora_") && !Object.keys(labels).length) {
      values[name.slice(10)] = value;
    }
  }
  return { time, values, tokens, tiers, pinned };
}

export class Monitor {
  #listeners = new Set();
  #timer = null;

  constructor() {
    this.readings = [];
    this.error = null;
  }

  get last() {
    return this.readings.at(-1) ?? null;
  }

  /** Calls the listener now, and after every reading; returns what ends it. */
  watch(listener) {
    this.#listeners.add(listener);
    listener(this);
    return () => this.#listeners.delete(listener);
  }

  start() {
    this.stop();
    this.#timer = setInterval(() => this.read(), EVERY_MS);
    return this.read();
  }

  stop() {
    clearInterval(this.#timer);
  }

  async read() {
    try {
      const now = Date.now();
      this.readings.push(readingOf(await metricsText(), now));
      this.readings = this.readings.filter((each) => now - each.time <= KEPT_MS);
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    for (const listener of this.#listeners) listener(this);
  }
}
