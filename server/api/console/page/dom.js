// Makes elements. Every text becomes a text node: nothing here, or anywhere in the console, parses a string as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "style") for (const [property, set] of Object.entries(value)) node.style.setProperty(property, set);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An element with attributes, listeners under `on`, custom properties under `style`, and children. */
export const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);

export const svg = (name, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, name), attributes, children);

/** A label around a control, with its text before it. */
export const field = (text, control, hint) =>
  el("label", { class: "field" }, el("span", { class: "field-name" }, text), control, hint && el("small", {}, hint));

export const button = (text, onClick, attributes = {}) =>
  el("button", { type: "button", ...attributes, on: { click: onClick } }, text);

/** What the server refused, with its code; screen readers say it at once. */
export function refusal(error) {
  const code = error.code ?? (error instanceof TypeError ? "unreachable" : "error");
  const message = error instanceof TypeError ? `The server did not answer (${error.message}).` : error.message;
  return el(
    "div",
    { class: "refusal", role: "alert" },
    el("p", { class: "refusal-head" }, el("code", {}, code), error.status ? ` ${error.status}` : "", error.param ? ` \u00b7 ${error.param}` : ""),
    el("p", { class: "refusal-text" }, message),
  );
}

/** A number for a colour, the same for one text every time. */
export function hueOf(text) {
  let hash = 2166136261;
  for (const char of text) hash = Math.imul(hash ^ char.codePointAt(0), 16777619) >>> 0;
  return (Math.imul(hash ^ (hash >>> 13), 2654435769) >>> 0) % 360;
}
