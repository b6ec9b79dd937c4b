// One model's answer: its text as it comes, and how fast it came.

import { stream } from "./api.js";
import { button, el, hueOf, refusal } from "./dom.js";
import { count, seconds } from "./format.js";

const VERSION = "x-multilora-adapter-version";

export class AnswerCard {
  #control = new AbortController();
  #firstAt = null;
  #usage = null;

  constructor(model, isBase) {
    this.model = model.id;
    this.text = document.createTextNode("");
    this.thought = document.createTextNode("");
    this.thoughts = el("details", { class: "thoughts", hidden: true }, el("summary", {}, "Reasoning"), el("p", {}, this.thought));
    this.body = el("div", { class: "answer-text", "aria-live": "off" }, this.text);
    this.version = el("span", { class: "answer-version" });
    this.stopButton = button("Stop", () => this.stop(), { class: "small" });
    this.figures = { speed: el("dd"), first: el("dd"), cached: el("dd"), tokens: el("dd") };
    this.end = el("p", { class: "answer-end", role: "status" });
    this.element = el(
      "article",
      { class: isBase ? "card answer answer-base" : "card answer", "aria-label": `Answer of ${model.id}`, "data-state": "waiting", style: { "--hue": hueOf(model.id.split("@")[0]) } },
      el("header", { class: "answer-head" }, el("h2", {}, model.id), this.version, this.stopButton),
      this.thoughts,
      this.body,
      this.end,
      el("dl", { class: "figures" }, this.#figure("tokens/s", "speed"), this.#figure("first token", "first"), this.#figure("cached", "cached"), this.#figure("tokens", "tokens")),
    );
  }

  #figure(name, key) {
    this.figures[key].textContent = "\u2013";
    return el("div", {}, el("dt", {}, name), this.figures[key]);
  }

  stop() {
    this.#control.abort();
  }

  get numTokens() {
    return this.#usage?.completion_tokens ?? 0;
  }

  /** Streams the answer to its end. A refusal is shown in the answer's place. */
  async run(path, body) {
    const startedAt = performance.now();
    try {
      const { head, chunks } = await stream(path, { ...body, model: this.model }, this.#control.signal);
      const version = head.get(VERSION);
      if (version) this.version.textContent = `version ${version.split("@").at(-1)}`;
      for await (const chunk of chunks) this.#take(chunk, startedAt);
      this.#finish("done");
    } catch (error) {
      if (error.name === "AbortError") this.#finish("stopped");
      else this.#fail(error);
    }
  }

  #take(chunk, startedAt) {
    const [choice] = chunk.choices ?? [];
    const delta = choice?.delta?.content ?? choice?.text ?? "";
    const thought = choice?.delta?.reasoning_content ?? "";
    if ((delta || thought) && this.#firstAt === null) {
      this.#firstAt = performance.now();
      this.element.dataset.state = "running";
      this.figures.first.textContent = seconds((this.#firstAt - startedAt) / 1000);
    }
    this.text.appendData(delta);
    if (thought) {
      this.thoughts.hidden = false;
      this.thought.appendData(thought);
    }
    if (choice?.finish_reason) this.reason = choice.finish_reason;
    if (chunk.usage) this.#measure(chunk.usage);
  }

  #measure(usage) {
    this.#usage = usage;
    const tookS = (performance.now() - this.#firstAt) / 1000;
    const drawn = usage.completion_tokens - 1;
    if (this.#firstAt !== null && drawn > 0 && tookS > 0) this.figures.speed.textContent = count(drawn / tookS);
    this.figures.cached.textContent = `${count(usage.prompt_tokens_details?.cached_tokens ?? 0)} of ${count(usage.prompt_tokens)}`;
    this.figures.tokens.textContent = count(usage.completion_tokens);
  }

  #finish(state) {
    this.element.dataset.state = state;
    this.stopButton.hidden = true;
    if (state === "stopped") this.end.textContent = "Stopped.";
    else if (this.reason === "length") this.end.textContent = "Ended at the most tokens asked for.";
    else if (!this.text.data) this.end.textContent = "An empty answer.";
  }

  #fail(error) {
    this.#finish("failed");
    this.end.replaceChildren();
    this.body.after(refusal(error));
    if (!this.text.data) this.body.hidden = true;
  }
}
