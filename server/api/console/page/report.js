// What the gate measured, and how base and adapter answer held-out prompts.

import { button, el } from "./dom.js";
import { loss } from "./format.js";

const VERDICTS = { pass: ["tag tag-good", "passed"], warn: ["tag tag-warn", "passed with warnings"], block: ["tag tag-bad", "blocked"] };

/** The parts of a report: verdict and figures, then answers. Those that were not measured are left out. */
export function reportParts(report, verdict, onSave) {
  const { gate = {}, samples = [] } = report;
  return [gateCard(gate, verdict, onSave), samples.length ? samplesCard(samples) : null].filter(Boolean);
}

function gateCard(gate, verdict, onSave) {
  const [tone, text] = VERDICTS[verdict] ?? ["tag", verdict];
  const figures = figuresOf(gate);
  return el(
    "section",
    { class: "card stack", "aria-label": "Gate" },
    el("div", { class: "row spread" }, el("h2", {}, "Gate"), el("span", { class: tone }, text)),
    figures.length > 0 && el("dl", { class: "facts" }, ...figures.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    ...list("Reasons", gate.reasons),
    ...list("Notes", gate.notes),
    el("div", { class: "row" }, button("Save the whole report", onSave, { class: "small" })),
  );
}

function list(name, texts) {
  return texts?.length ? [el("h3", {}, name), el("ul", { class: "plain" }, ...texts.map((text) => el("li", {}, text)))] : [];
}

function figuresOf({ held_out: heldOut, preference, general, round_trip: trip, endings }) {
  const figures = [];
  if (heldOut) figures.push(["held-out, base", loss(heldOut.base_loss)], ["held-out, adapter", loss(heldOut.adapter_loss)]);
  if (preference) figures.push(["pairs preferred", `${Math.round(preference.accuracy * 100)} %`]);
  if (general) figures.push(["general, base", loss(general.base_loss)], ["general, adapter", loss(general.adapter_loss)]);
  if (trip) figures.push([`served against PEFT (${trip.unit})`, Number.isFinite(trip.difference) ? trip.difference.toPrecision(2) : "\u2013"]);
  if (endings) figures.push(["answers end", `${Math.round(endings.probability * 100)} %`]);
  return figures;
}

function samplesCard(samples) {
  return el(
    "section",
    { class: "card stack", "aria-label": "Held-out prompts" },
    el("h2", {}, "Held-out prompts"),
    ...samples.map((sample) =>
      el(
        "article",
        { class: "sample", "aria-label": "Held-out prompt" },
        el("p", { class: "sample-prompt" }, sample.prompt),
        el("div", { class: "sample-answers" }, said("base", sample.base), said("adapter", sample.adapter), said("expected", sample.expected)),
      ),
    ),
  );
}

const said = (name, text) => el("div", { class: `said said-${name}` }, el("h3", {}, name), el("p", {}, text));
