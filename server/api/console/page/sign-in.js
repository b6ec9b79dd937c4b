// Asks for the key once and keeps it in this tab.

import { get, session } from "./api.js";
import { el, field, refusal } from "./dom.js";

/** Fills the door; `onOpen` is called when the server took the key. */
export function signIn(door, onOpen) {
  const problem = el("div");
  const key = el("input", {
    id: "key",
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    required: !session.isOpen,
    placeholder: session.isOpen ? "only for operators" : "ml-\u2026",
  });
  const tenant = el("input", { id: "tenant", autocomplete: "off", required: true, value: "default" });
  const submit = el("button", { type: "submit", class: "primary" }, "Open the console");

  async function open(event) {
    event.preventDefault();
    problem.replaceChildren();
    submit.disabled = true;
    session.open(key.value.trim(), session.isOpen ? tenant.value.trim() : "");
    try {
      await get("v1/models");
      key.value = "";
      await onOpen();
    } catch (error) {
      session.close();
      problem.replaceChildren(refusal(error));
      key.focus();
    } finally {
      submit.disabled = false;
    }
  }

  const form = el(
    "form",
    { class: "card door", on: { submit: open } },
    el("img", { src: "console/icon.svg", alt: "", width: 44, height: 44 }),
    el("h1", {}, "multilora console"),
    el("p", { class: "lead" }, "One frozen base, many adapters. Ask them side by side, watch them train, see where they lie."),
    session.isOpen && field("Tenant", tenant),
    field(session.isOpen ? "Admin key" : "API key", key),
    submit,
    problem,
    el("p", { class: "fine" }, "The key stays in this tab. It is sent to this server alone, in a header, and is gone when the tab is closed."),
  );
  door.replaceChildren(form);
  (session.isOpen ? tenant : key).focus();
}
