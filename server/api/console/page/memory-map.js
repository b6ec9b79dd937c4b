// Three tracks: device, host, disk. Each adapter is a block of its own colour, as wide as its bytes; all three have one scale.

import { el, hueOf } from "./dom.js";
import { bytes, percent, plural } from "./format.js";

const TRACKS = [
  ["device", "Device", "answers at once"],
  ["host", "Host", "one copy away"],
  ["disk", "Disk", "loaded when asked for"],
];
const MOST_BLOCKS = 240;

/** Where a version lies: device, host, disk, or why it is not served. "unknown" without a reading. */
export function tierOf(version, reading) {
  if (version.quarantined) return "quarantined";
  if (!version.loaded) return "unloaded";
  if (!reading) return "unknown";
  return reading.tiers.get(`${version.tenant}/${version.name}@${version.version}`) ?? "disk";
}

export function memoryMap(adapters, reading) {
  if (!reading) return [el("p", { class: "fine" }, "Where they are is unknown: this page cannot read /metrics.")];
  const placed = adapters.map((each) => ({ ...each, tier: tierOf(each, reading) }));
  const tracks = TRACKS.map(([tier, name, what]) => ({ tier, name, what, adapters: placed.filter((each) => each.tier === tier) }));
  const fullest = Math.max(1, ...tracks.map(({ adapters: some }) => sizeOf(some))); // as wide as a track
  return tracks.map((each) => track(each, fullest, reading));
}

const sizeOf = (adapters) => adapters.reduce((sum, each) => sum + each.bytes, 0);

function track({ tier, name, what, adapters }, fullest, reading) {
  const usage = reading?.values.adapter_pool_usage_ratio;
  const note = tier === "device" && Number.isFinite(usage) ? ` \u00b7 ${percent(usage)} of the pool in use` : "";
  const blocks = adapters.slice(0, MOST_BLOCKS).map((each) =>
    el("span", {
      class: "block",
      title: `${each.id} \u00b7 ${bytes(each.bytes)}`,
      style: { "--hue": hueOf(each.id.split("@")[0]), "--part": each.bytes / fullest },
    }),
  );
  const label = `${name}: ${adapters.map((each) => each.id).slice(0, 20).join(", ") || "no adapter of yours"}`;
  return el(
    "div",
    { class: "track" },
    el("div", { class: "track-head" }, el("h2", {}, name), el("span", { class: "fine" }, what)),
    el("div", { class: `track-bar track-${tier}`, role: "img", "aria-label": label }, ...blocks),
    el("p", { class: "fine track-note" }, `${plural(adapters.length, "adapter")}, ${bytes(sizeOf(adapters))}${note}`),
  );
}
