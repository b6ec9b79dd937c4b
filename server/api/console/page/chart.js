// Lines over a number axis, drawn as SVG. Sizes are pixels of the screen, so that text stays readable on a phone.

import { el, svg } from "./dom.js";

const EDGE = { left: 46, right: 14, top: 12, bottom: 28 };
const NUM_TICKS = 4;

/** A chart that follows its own width. `draw({ lines, label, xText, yText, yMax })` shows lines of `{ name, kind, points }`. */
export class Chart {
  #last = null;

  constructor({ height = 240 } = {}) {
    this.height = height;
    this.legend = el("ul", { class: "legend" });
    this.frame = el("div", { class: "chart-frame" });
    this.element = el("figure", { class: "chart" }, this.frame, this.legend);
    new ResizeObserver(() => this.#last && this.#render()).observe(this.frame);
  }

  draw(what) {
    this.#last = what;
    this.#render();
  }

  #render() {
    const { lines, label, xText = String, yText = String, xRange, yMax } = this.#last;
    const width = Math.max(220, this.frame.clientWidth || 640);
    const points = lines.flatMap((line) => line.points);
    const [x0, x1] = xRange ?? rangeOf(points.map(([x]) => x));
    const top = niceTop(yMax ?? Math.max(0, ...points.map(([, y]) => y)));
    const x = (value) => EDGE.left + ((value - x0) / (x1 - x0 || 1)) * (width - EDGE.left - EDGE.right);
    const y = (value) => this.height - EDGE.bottom - (value / top) * (this.height - EDGE.top - EDGE.bottom);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${this.height}`, width, height: this.height, role: "img", "aria-label": label });
    for (let tick = 0; tick <= NUM_TICKS; tick += 1) {
      const value = (top * tick) / NUM_TICKS;
      picture.append(
        svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }),
        svg("text", { class: "axis", x: EDGE.left - 8, y: y(value) + 4, "text-anchor": "end" }, yText(value)),
      );
    }
    for (const value of [x0, (x0 + x1) / 2, x1]) {
      const anchor = value === x0 ? "start" : value === x1 ? "end" : "middle";
      picture.append(svg("text", { class: "axis", x: x(value), y: this.height - 8, "text-anchor": anchor }, xText(value)));
    }
    for (const line of lines) picture.append(...drawn(line, x, y));
    this.frame.replaceChildren(picture);
    this.legend.replaceChildren(...lines.map((line) => el("li", {}, el("span", { class: `key key-${line.kind}`, "aria-hidden": "true" }), line.name)));
  }
}

function drawn({ kind, points, isArea }, x, y) {
  const path = points.map(([a, b], index) => `${index ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
  const parts = [];
  if (isArea && points.length > 1) {
    const [first, last] = [points[0], points.at(-1)];
    parts.push(svg("path", { class: `area area-${kind}`, d: `${path}L${x(last[0]).toFixed(1)} ${y(0)}L${x(first[0]).toFixed(1)} ${y(0)}Z` }));
  }
  parts.push(svg("path", { class: `line line-${kind}`, d: path }));
  if (kind === "dots" || points.length === 1) parts.push(...points.map(([a, b]) => svg("circle", { class: `point point-${kind}`, cx: x(a), cy: y(b), r: 3.5 })));
  return parts;
}

function rangeOf(values) {
  if (!values.length) return [0, 1];
  return [Math.min(...values), Math.max(...values)];
}

/** The next of 1, 2, 4, 5, 10 times a power of ten: ticks are short numbers. */
function niceTop(value) {
  if (!(value > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 2, 4, 5, 10].find((step) => step * unit >= value * 0.999);
}
