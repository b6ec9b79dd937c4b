// Starts a job from a training file: the file is kept, checked line by line, and shown before anything is trained.

import { get, inPath, post, session, upload } from "./api.js";
import { el, field, refusal } from "./dom.js";
import { dropZone } from "./drop.js";
import { count, percent } from "./format.js";

const ENDS = ".jsonl,.json,.csv,.tsv,.parquet,.gz";

/** A name that the server takes, from a file's. */
const nameFrom = (filename) =>
  filename
    .split(".")[0]
    .replaceAll(/[^A-Za-z0-9._-]+/g, "-")
    .replace(/^[^A-Za-z0-9]+/, "")
    .slice(0, 64);

export function newJob(base, onStart) {
  const status = el("p", { class: "fine", role: "status" });
  const report = el("div", { class: "stack" });
  const name = el("input", { required: true, maxlength: 64, autocomplete: "off", spellcheck: "false" });
  const tenant = el("input", { maxlength: 128, autocomplete: "off", spellcheck: "false" });
  const epochs = el("input", { type: "number", min: 1, max: 1000, value: 3, inputmode: "numeric" });
  const rank = el("input", { type: "number", min: 1, max: 256, value: 16, inputmode: "numeric" });
  const rate = el("input", { type: "number", min: 0.01, max: 100000, step: "any", value: 1, inputmode: "decimal" });
  const start = el("button", { type: "submit", class: "primary", disabled: true }, "Start the job");
  const who = () => ({ tenant: tenant.value.trim() || undefined });
  let file = null;

  async function take([dropped]) {
    if (!dropped) return;
    start.disabled = true;
    report.replaceChildren();
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", dropped, dropped.name);
    const onProgress = (part) => {
      status.textContent = part < 1 ? `${percent(part)} sent` : "Sent; the server reads it.";
    };
    try {
      file = await upload("v1/files", form, { onProgress, ...who() });
      showCheck(await get(`v1/files/${inPath(file.id)}/check`, who()));
      name.value ||= nameFrom(dropped.name);
    } catch (error) {
      status.textContent = "";
      report.replaceChildren(refusal(error));
    }
  }

  function showCheck(check) {
    status.textContent = `${file.filename}: ${check.container}, ${count(check.num_examples)} examples.`;
    start.disabled = !check.usable;
    if (!check.problems.length) return;
    report.replaceChildren(
      el("p", { class: "fine" }, `Refused lines: ${count(check.num_refused)}`),
      el("ul", { class: "plain" }, ...check.problems.slice(0, 8).map((problem) => el("li", {}, el("code", {}, problem.code), ` line ${problem.line}: ${problem.message}`))),
    );
  }

  async function submit(event) {
    event.preventDefault();
    const hyperparameters = { n_epochs: Number(epochs.value), learning_rate_multiplier: Number(rate.value) };
    const wanted = {
      model: base,
      training_file: file.id,
      suffix: name.value.trim(),
      method: { type: "supervised", supervised: { hyperparameters } },
      multilora: { rank: Number(rank.value) },
    };
    start.disabled = true;
    report.replaceChildren();
    try {
      onStart(await post("v1/fine_tuning/jobs", wanted, who()));
      status.textContent = "";
      name.value = "";
    } catch (error) {
      report.replaceChildren(refusal(error));
      start.disabled = false;
    }
  }

  return el(
    "section",
    { class: "card stack", "aria-label": "New job" },
    el("h2", {}, "New job"),
    session.isAdmin && field("Tenant", tenant),
    dropZone({ text: "Drop a training file", hint: "JSONL, JSON, CSV, Parquet", pick: "Choose a file", accept: ENDS, onFiles: take }),
    status,
    report,
    el(
      "form",
      { class: "stack", on: { submit } },
      field("Name of the adapter", name),
      el("div", { class: "three" }, field("Epochs", epochs), field("Rank", rank), field("Rate", rate, "times 2e-4")),
      el("div", { class: "row" }, start),
    ),
  );
}
