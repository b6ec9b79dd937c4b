// Uploads an adapter: a folder that is dropped or chosen. What the server refuses is shown in its words.

import { session, upload } from "./api.js";
import { button, el, field, refusal } from "./dom.js";
import { dropZone } from "./drop.js";
import { bytes, percent } from "./format.js";

const CONFIG = "adapter_config.json";
const WEIGHTS = "adapter_model.safetensors";

export function uploadCard(onDone) {
  const name = el("input", { autocomplete: "off", spellcheck: "false", required: true, maxlength: 128 });
  const tenant = el("input", { autocomplete: "off", spellcheck: "false", maxlength: 128 });
  const activate = el("input", { type: "checkbox", checked: true });
  const chosen = el("p", { class: "fine", role: "status" });
  const bar = el("progress", { max: 1, value: 0, hidden: true, "aria-label": "Upload" });
  const result = el("div", { role: "status" });
  const send = el("button", { type: "submit", class: "primary", disabled: true }, "Upload");
  const cancel = button("Cancel", () => control?.abort(), { hidden: true });
  let files = null;
  let control = null;

  function take(dropped) {
    files = { config: dropped.find((file) => file.name === CONFIG), weights: dropped.find((file) => file.name.endsWith(".safetensors")) };
    result.replaceChildren();
    const missing = [[files.config, CONFIG], [files.weights, WEIGHTS]].filter(([file]) => !file).map(([, wanted]) => wanted);
    send.disabled = missing.length > 0;
    chosen.textContent = missing.length
      ? `Not in what you gave: ${missing.join(" and ")}.`
      : `${files.weights.name}, ${bytes(files.weights.size)}, with its ${CONFIG}.`;
    const folder = (files.weights?.webkitRelativePath || files.weights?.folder || "").split("/").at(-2);
    if (folder && !name.value) name.value = folder;
    if (!missing.length) name.focus();
  }

  async function submit(event) {
    event.preventDefault();
    const form = new FormData();
    form.append("name", name.value.trim());
    form.append("config", files.config, CONFIG);
    form.append("weights", files.weights, files.weights.name);
    control = new AbortController();
    [send.disabled, bar.hidden, cancel.hidden] = [true, false, false];
    result.replaceChildren();
    const onProgress = (part) => {
      bar.value = part;
      chosen.textContent = part < 1 ? `${percent(part)} sent` : "Sent; the server checks it.";
    };
    try {
      const made = await upload(`v1/adapters?activate=${activate.checked}`, form, { onProgress, signal: control.signal, tenant: tenant.value.trim() || undefined });
      result.replaceChildren(el("p", { class: "done" }, `${made.id} is ${made.active ? "in service" : "stored"}: rank ${made.rank}, ${bytes(made.bytes)}.`));
      chosen.textContent = "";
      name.value = "";
      files = null;
      await onDone();
    } catch (error) {
      if (error.name !== "AbortError") result.replaceChildren(refusal(error));
      chosen.textContent = error.name === "AbortError" ? "Cancelled." : "Nothing was stored.";
      send.disabled = false;
    }
    [bar.hidden, cancel.hidden] = [true, true];
  }

  return el(
    "section",
    { class: "card stack", "aria-label": "Upload an adapter" },
    el("h2", {}, "Upload an adapter"),
    dropZone({ text: "Drop a PEFT folder here", hint: `${CONFIG} and ${WEIGHTS}`, pick: "Choose a folder", folder: true, onFiles: take }),
    el(
      "form",
      { class: "stack", on: { submit } },
      chosen,
      el(
        "div",
        { class: "upload-fields" },
        field("Name", name),
        session.isAdmin && field("Tenant", tenant),
        el("label", { class: "check" }, activate, "Let the name mean this version at once"),
      ),
      bar,
      el("div", { class: "row" }, send, cancel),
    ),
    result,
  );
}
