// Numbers and times as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count) {
  let value = count;
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${value.toFixed(unit && value < 100 ? 1 : 0)} ${UNITS[unit]}`;
}

export const percent = (ratio) => (Number.isFinite(ratio) ? `${Math.round(ratio * 100)} %` : "\u2013");

export const count = (value) => (Number.isFinite(value) ? Math.round(value).toLocaleString("en") : "\u2013");

export const loss = (value) => (Number.isFinite(value) ? value.toFixed(3) : "\u2013");

export function seconds(value) {
  if (!Number.isFinite(value)) return "\u2013";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value.toFixed(1)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.round((value % 3600) / 60)} min`;
}

/** Unix seconds, as the reader's clock has it. */
export const clock = (unix) => new Date(unix * 1000).toLocaleTimeString("en-GB");

export function day(unix) {
  const date = new Date(unix * 1000);
  return `${date.toISOString().slice(0, 10)} ${date.toLocaleTimeString("en-GB").slice(0, 5)}`;
}

export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
