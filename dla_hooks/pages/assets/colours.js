// A diverging scale that colour-blind readers can tell apart: orange down, blue up, paper between.

const ENDS = {
  light: { down: [[250, 250, 247], [249, 203, 172], [226, 118, 68], [150, 48, 14]], up: [[250, 250, 247], [178, 212, 238], [75, 146, 205], [17, 71, 131]] },
  dark: { down: [[35, 39, 44], [103, 54, 34], [190, 92, 50], [255, 164, 112]], up: [[35, 39, 44], [32, 66, 101], [56, 124, 189], [140, 200, 255]] },
};
const darkMode = matchMedia("(prefers-color-scheme: dark)");

function mixed(stops, share) {
  const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(place));
  return stops[low].map((from, i) => Math.round(from + (stops[low + 1][i] - from) * (place - low)));
}
const css = ([r, g, b]) => `rgb(${r},${g},${b})`;

// A thousand squares take their colour at every frame, so all colours are made once.
const STEPS = 256;
const shades = Object.fromEntries(Object.entries(ENDS).map(([mode, ends]) => [mode, Object.fromEntries(Object.entries(ends).map(([way, stops]) =>
  [way, Array.from({ length: STEPS + 1 }, (_, i) => {
    const colour = mixed(stops, (i / STEPS) ** 0.8);  // the root makes small values visible
    const bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2];
    return { fill: css(colour), ink: bright > 140 ? "#16181b" : "#f6f7f8" };
  })]))]));
const NO_SHADE = { light: { fill: "none", ink: css([29, 32, 37]) }, dark: { fill: "none", ink: css([232, 234, 237]) } };
let mode = "", paints = new Map();
function readMode() {
  mode = darkMode.matches ? "dark" : "light";
  paints = new Map();
}
readMode();
darkMode.addEventListener("change", readMode);

// share is in [-1, 1].
function shade(share) {
  if (!Number.isFinite(share)) return NO_SHADE[mode];
  return shades[mode][share < 0 ? "down" : "up"][Math.min(STEPS, Math.round(Math.abs(share) * STEPS))];
}

// A colour of the style sheet. Reading one makes the browser compute styles, so it is read once.
function paint(name) {
  if (!paints.has(name)) paints.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return paints.get(name);
}
