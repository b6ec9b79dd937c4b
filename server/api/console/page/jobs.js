// Training jobs: a list, and one of them in full while it runs.

import { all, get } from "./api.js";
import { el, hueOf, refusal } from "./dom.js";
import { day, percent } from "./format.js";
import { JobDetail, statusTag } from "./job.js";
import { newJob } from "./new-job.js";

const EVERY_MS = 2000;
const MOST_JOBS = 50;
const ENDED = new Set(["succeeded", "failed", "cancelled"]);

export async function open() {
  const view = new JobsView((await all("v1/models", { most: 100 })).find((model) => model.parent === null).id);
  return { element: view.element, show: (id) => view.show(id), hide: () => view.hide() };
}

class JobsView {
  #jobs = [];
  #timer = null;
  #detail = null;

  constructor(base) {
    this.list = el("ul", { class: "job-list" });
    this.side = el("div", { class: "job-side" });
    this.problem = el("div");
    this.element = el(
      "div",
      { class: "page" },
      el("header", { class: "head" }, el("h1", {}, "Jobs"), el("p", {}, "From a training file to a checked adapter in service.")),
      this.problem,
      el("div", { class: "jobs" }, el("div", { class: "stack" }, el("section", { class: "card", "aria-label": "Jobs" }, this.list), newJob(base, (job) => this.#chose(job.id))), this.side),
    );
  }

  /** Unless the reader has gone to another view meanwhile. */
  #chose(id) {
    if (/^#jobs\b/.test(location.hash)) location.hash = `#jobs/${id}`;
  }

  async show(id) {
    this.hide();
    if (id && id !== this.#detail?.id) {
      this.#detail = new JobDetail(id, () => this.#load());
      this.side.replaceChildren(this.#detail.element);
    }
    await this.#load();
    if (!id && !this.#detail && this.#jobs.length) this.#chose(this.#jobs[0].id);
    if (!this.#detail) this.side.replaceChildren(el("p", { class: "empty" }, "No job yet. Drop a training file to start one."));
  }

  hide() {
    clearTimeout(this.#timer);
  }

  async #load() {
    clearTimeout(this.#timer);
    try {
      this.#jobs = (await get(`v1/fine_tuning/jobs?limit=${MOST_JOBS}`)).data;
      await this.#detail?.load();
      this.problem.replaceChildren();
    } catch (error) {
      this.problem.replaceChildren(refusal(error));
    }
    this.#draw();
    if (this.element.isConnected && this.#jobs.some((job) => !ENDED.has(job.status))) this.#timer = setTimeout(() => this.#load(), EVERY_MS);
  }

  #draw() {
    this.list.replaceChildren(...this.#jobs.map((job) => this.#item(job)));
    if (!this.#jobs.length) this.list.append(el("li", { class: "fine" }, "No job yet."));
  }

  #item(job) {
    const { adapter, tenant, progress } = job.multilora;
    const part = progress?.num_steps ? progress.step / progress.num_steps : 0;
    const note = job.status === "running" && part ? percent(part) : day(job.created_at).slice(5);
    return el(
      "li",
      {},
      el(
        "a",
        { href: `#jobs/${encodeURIComponent(job.id)}`, class: "job-link", "aria-current": job.id === this.#detail?.id && "true", style: { "--hue": hueOf(adapter) } },
        el("span", { class: "swatch", "aria-hidden": "true" }),
        el("span", { class: "row-name" }, adapter, el("small", {}, `${tenant} \u00b7 ${note}`)),
        statusTag(job),
      ),
    );
  }
}
