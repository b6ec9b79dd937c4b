// A place to drop files or a folder on, with a button that does the same for the keyboard.

import { el } from "./dom.js";

/** onFiles gets a list of File; those of a dropped folder have `folder`, their path in it. */
export function dropZone({ text, hint, pick, folder = false, accept, onFiles }) {
  const input = el("input", { type: "file", class: "file", webkitdirectory: folder, accept, "aria-label": pick });
  const zone = el("div", { class: "drop" }, el("p", { class: "drop-text" }, text), el("p", { class: "fine" }, hint), el("span", { class: "as-button small", "aria-hidden": "true" }, pick), input);
  input.addEventListener("change", () => {
    onFiles([...input.files]);
    input.value = "";
  });
  for (const name of ["dragenter", "dragover"]) zone.addEventListener(name, (event) => mark(event, true));
  for (const name of ["dragleave", "drop"]) zone.addEventListener(name, (event) => mark(event, false));
  zone.addEventListener("drop", async (event) => onFiles(await dropped(event.dataTransfer)));

  function mark(event, isOver) {
    event.preventDefault();
    zone.classList.toggle("drop-over", isOver);
  }

  return zone;
}

async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  return (await Promise.all(entries.map(filesOf))).flat();
}

async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    file.folder = entry.fullPath;
    return [file];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // at most 100 at a time
    if (!some.length) return (await Promise.all(found.map(filesOf))).flat();
    found.push(...some);
  }
}
