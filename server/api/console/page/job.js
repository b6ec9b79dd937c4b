// One job in full: progress, loss, what the gate said, events.

import { download, get, inPath, post, session } from "./api.js";
import { Chart } from "./chart.js";
import { button, el, field, hueOf, refusal } from "./dom.js";
import { bytes, clock, count, loss, seconds } from "./format.js";
import { reportParts } from "./report.js";

const CAN_PAUSE = new Set(["queued", "running"]);
const CAN_CANCEL = new Set(["validating_files", "queued", "running", "paused"]);
const MOST_EVENTS = 1000;
const TONES = { succeeded: "tag tag-good", failed: "tag tag-bad", paused: "tag tag-warn", running: "tag tag-run" };

export const statusTag = (job) => el("span", { class: TONES[job.status] ?? "tag" }, job.status.replaceAll("_", " "));

export class JobDetail {
  #job = null;
  #reportOf = null;

  constructor(id, onChange) {
    this.id = id;
    this.onChange = onChange;
    this.path = `v1/fine_tuning/jobs/${inPath(id)}`;
    this.chart = new Chart();
    this.head = el("div", { class: "stack" });
    this.facts = el("dl", { class: "facts" });
    this.problem = el("div");
    this.actions = el("div", { class: "row" });
    this.report = el("div", { class: "stack" });
    this.events = el("ol", { class: "events" });
    this.element = el(
      "div",
      { class: "stack" },
      el("section", { class: "card stack", "aria-label": "Job" }, this.head, this.problem, this.facts, this.actions),
      el("section", { class: "card stack", "aria-label": "Loss" }, el("h2", {}, "Loss"), this.chart.element),
      this.report,
      el("section", { class: "card stack", "aria-label": "Events" }, el("h2", {}, "Events"), this.events),
    );
  }

  async load() {
    const [job, events] = await Promise.all([get(this.path), get(`${this.path}/events?limit=${MOST_EVENTS}`)]);
    this.#job = job;
    this.element.style.setProperty("--hue", hueOf(job.multilora.adapter));
    this.#drawHead(job);
    this.#drawChart(job, events.data);
    this.#drawEvents(events.data.filter((event) => event.type === "message"));
    await this.#loadReport(job);
  }

  #drawHead(job) {
    const ours = job.multilora;
    const progress = ours.progress ?? {};
    const part = progress.num_steps ? progress.step / progress.num_steps : job.status === "succeeded" ? 1 : 0;
    this.head.replaceChildren(
      el("div", { class: "row spread" }, el("h2", { class: "job-name" }, el("span", { class: "swatch", "aria-hidden": "true" }), ours.adapter), statusTag(job)),
      el("p", { class: "fine mono" }, job.fine_tuned_model ?? job.id),
      el("progress", { max: 1, value: part, "aria-label": "Training steps done" }),
    );
    const facts = [
      ["step", progress.num_steps ? `${count(progress.step)} of ${count(progress.num_steps)}` : "\u2013"],
      ["training loss", loss(progress.loss)],
      ["validation loss", loss(progress.valid_loss)],
      ["base's loss", loss(progress.base_loss)],
      ["tokens/s", count(progress.tokens_per_s)],
      ["left", job.status === "running" ? seconds(progress.eta_s) : "\u2013"],
      ["memory", progress.peak_bytes ? bytes(progress.peak_bytes) : "\u2013"],
      ["gate", ours.verdict ?? "\u2013"],
    ];
    this.facts.replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
    this.problem.replaceChildren(...(job.error ? [refusal(job.error)] : []));
    this.actions.replaceChildren(...this.#buttons(job).filter(Boolean));
  }

  #buttons(job) {
    return [
      CAN_PAUSE.has(job.status) && button("Pause", () => this.#ask(`${this.path}/pause`), { class: "small" }),
      job.status === "paused" && button("Resume", () => this.#ask(`${this.path}/resume`), { class: "small" }),
      CAN_CANCEL.has(job.status) && button("Cancel", () => this.#ask(`${this.path}/cancel`), { class: "small danger" }),
      job.fine_tuned_model && el("a", { class: "as-button small", href: `#ask/${encodeURIComponent(job.fine_tuned_model)}` }, "Ask it, beside the base"),
      session.isAdmin && job.error?.code === "gate_blocked" && this.#override(),
    ];
  }

  #override() {
    const reason = el("input", { required: true, maxlength: 1000 });
    const submit = (event) => {
      event.preventDefault();
      return this.#ask(`admin/jobs/${inPath(this.id)}/override`, { reason: reason.value });
    };
    return el("form", { class: "row", on: { submit } }, field("Reason to overrule the gate", reason), el("button", { type: "submit", class: "small danger" }, "Put into service"));
  }

  async #ask(path, body) {
    try {
      await post(path, body);
      await this.onChange();
    } catch (error) {
      this.problem.replaceChildren(refusal(error));
    }
  }

  #drawChart(job, events) {
    const points = (name) =>
      events
        .filter((event) => event.type === "metrics" && Number.isFinite(event.data[name]))
        .map((event) => [event.data.step, event.data[name]])
        .sort(([a], [b]) => a - b);
    const [train, valid] = [points("train_loss"), points("valid_loss")];
    const { progress = {} } = job.multilora;
    const last = Math.max(progress.num_steps ?? 0, ...train.map(([step]) => step), 1);
    const lines = [{ name: "training", kind: "hue", points: train, isArea: true }, { name: "validation", kind: "dots", points: valid }];
    if (Number.isFinite(progress.base_loss)) lines.push({ name: "the base alone", kind: "dashed", points: [[0, progress.base_loss], [last, progress.base_loss]] });
    const label = train.length
      ? `Training loss from ${loss(train[0][1])} at step ${train[0][0]} to ${loss(train.at(-1)[1])} at step ${train.at(-1)[0]}; validation loss ${loss(valid.at(-1)?.[1])}.`
      : "No step yet.";
    this.chart.draw({ lines, label, xRange: [0, last], xText: (step) => `step ${Math.round(step)}`, yText: (value) => value.toFixed(2) });
  }

  #drawEvents(events) {
    this.events.replaceChildren(
      ...events.map((event) => el("li", { class: `event event-${event.level}` }, el("time", { datetime: new Date(event.created_at * 1000).toISOString() }, clock(event.created_at)), el("span", {}, event.message))),
    );
  }

  async #loadReport(job) {
    const { verdict } = job.multilora;
    if (!verdict || this.#reportOf === `${job.id} ${job.status}`) return;
    this.#reportOf = `${job.id} ${job.status}`;
    try {
      this.report.replaceChildren(...reportParts(await get(`${this.path}/report`), verdict, () => this.#save()));
    } catch (error) {
      this.report.replaceChildren(refusal(error));
    }
  }

  async #save() {
    const link = el("a", { href: URL.createObjectURL(await download(`${this.path}/report?format=html`)), download: `${this.id}.html` });
    link.click();
    URL.revokeObjectURL(link.href);
  }
}
