// One adapter name: what it means now, and its versions with what can be done to each.

import { call, get, inPath, post } from "./api.js";
import { button, el, hueOf, refusal } from "./dom.js";
import { bytes, day, plural } from "./format.js";

const TONES = { device: "good", quarantined: "bad", unloaded: "warn" };

export class AdapterRow {
  #versions = null;
  #tier = () => "unknown";
  #isPinned = () => false;

  constructor(adapter, { isAdmin, onChange }) {
    this.isAdmin = isAdmin;
    this.onChange = onChange;
    this.summary = el("summary", { class: "row-head" });
    this.problem = el("div");
    this.body = el("div", { class: "versions" });
    this.adapter = adapter;
    this.details = el("details", { "aria-label": this.name }, this.summary, this.problem, this.body);
    this.details.addEventListener("toggle", () => this.details.open && this.#load());
    this.element = el("li", { class: "card item", style: { "--hue": hueOf(this.name) } }, this.details);
  }

  get name() {
    return this.adapter.id.split("@")[0];
  }

  update(adapter) {
    this.adapter = adapter;
    if (this.details.open) this.#load();
  }

  /** Functions that say where a version lies, and whether it is pinned. */
  place(tier, isPinned) {
    [this.#tier, this.#isPinned] = [tier, isPinned];
    this.#draw();
  }

  async #load() {
    await this.#try(async () => this.#take(await get(`v1/adapters/${inPath(this.name)}`)));
  }

  #take(answer) {
    this.adapter = answer.versions.find((each) => each.active) ?? answer;
    this.#versions = answer.versions;
    this.#draw();
  }

  async #try(act) {
    try {
      await act();
      this.problem.replaceChildren();
    } catch (error) {
      this.problem.replaceChildren(refusal(error));
    }
  }

  #do(ref, verb, body) {
    return this.#try(async () => {
      const answer = await post(`v1/adapters/${inPath(ref)}/${verb}`, body);
      if (answer.versions) this.#take(answer);
      await this.onChange();
    });
  }

  #delete(ref) {
    if (!confirm(`Delete ${ref}? Its files are gone then.`)) return undefined;
    return this.#try(async () => {
      await call("DELETE", `v1/adapters/${inPath(ref)}`);
      await this.onChange();
    });
  }

  #draw() {
    const { adapter } = this;
    this.summary.replaceChildren(
      el("span", { class: "swatch", "aria-hidden": "true" }),
      el("span", { class: "row-name" }, this.name, el("small", {}, adapter.active ? `version ${adapter.version}` : "no active version")),
      tierTag(this.#tier(adapter), this.#isPinned(adapter)),
      el("span", { class: "row-figure" }, bytes(adapter.bytes)),
      el("span", { class: "row-figure" }, `rank ${adapter.rank}`),
      shareBar(adapter),
    );
    if (this.#versions) this.body.replaceChildren(this.#nameActions(), ...this.#versions.map((each) => this.#version(each)));
  }

  #nameActions() {
    const canaries = this.#versions.filter((each) => !each.active && each.percent > 0);
    return el(
      "div",
      { class: "row" },
      el("a", { class: "as-button small", href: `#ask/${encodeURIComponent(this.name)}` }, "Ask"),
      canaries.length === 1 && button("Promote the canary", () => this.#do(this.name, "promote"), { class: "small" }),
      button("Roll back", () => this.#do(this.name, "rollback"), { class: "small" }),
      button("Unload", () => this.#do(this.name, "unload"), { class: "small" }),
      button("Delete", () => this.#delete(this.name), { class: "small danger", "aria-label": `Delete ${this.name}` }),
    );
  }

  #version(version) {
    const ref = version.id;
    const tier = this.#tier(version);
    const pinned = this.#isPinned(version);
    return el(
      "article",
      { class: "version", "aria-label": `Version ${version.version} of ${this.name}` },
      el(
        "div",
        { class: "version-facts" },
        el("h3", {}, `v${version.version}`),
        version.active && el("span", { class: "tag" }, "active"),
        !version.active && version.percent > 0 && el("span", { class: "tag tag-warn" }, `canary ${version.percent} %`),
        tierTag(tier, pinned),
        el("span", { class: "fine", title: version.target_modules.join(", ") }, `${bytes(version.bytes)}${version.adapter_dtype ? ` in ${version.adapter_dtype}` : ""} \u00b7 rank ${version.rank} \u00b7 ${plural(version.target_modules.length, "module")} \u00b7 ${day(version.created)}`),
      ),
      version.quarantined && el("p", { class: "fine" }, `Not served: ${version.quarantined}`),
      el(
        "div",
        { class: "row" },
        (!version.active || !version.loaded) && button("Activate", () => this.#do(ref, "activate"), { class: "small" }),
        version.loaded && !version.active && this.#canary(version),
        version.loaded && tier !== "device" && button("Warm", () => this.#do(ref, "warm"), { class: "small" }),
        this.isAdmin && tier === "device" && button(pinned ? "Unpin" : "Pin", () => this.#do(ref, pinned ? "unpin" : "pin"), { class: "small" }),
        version.loaded && button("Unload", () => this.#do(ref, "unload"), { class: "small", "aria-label": `Unload ${ref}` }),
      ),
    );
  }

  #canary(version) {
    const share = el("input", { type: "number", min: 0, max: 99, value: version.percent || 10, "aria-label": `Canary share of ${version.id} in percent` });
    const set = (event) => {
      event.preventDefault();
      return this.#do(version.id, "canary", { percent: Number(share.value) });
    };
    return el("form", { class: "canary", on: { submit: set } }, share, el("span", { "aria-hidden": "true" }, "%"), el("button", { type: "submit", class: "small" }, "Set canary"));
  }
}

export function tierTag(tier, pinned) {
  const tone = TONES[tier] ? `tag tag-${TONES[tier]}` : "tag";
  return el("span", { class: tone }, pinned ? `${tier}, pinned` : tier);
}

/** How much of the name's users this version answers. */
function shareBar({ percent, active }) {
  const text = active && percent < 100 ? `${percent} %, canary ${100 - percent} %` : active ? "100 %" : "0 %";
  return el(
    "span",
    { class: "share" },
    el("span", { class: "share-track", "aria-hidden": "true" }, el("span", { class: "share-fill", style: { "--part": percent / 100 } })),
    el("span", { class: "row-figure" }, text),
  );
}
