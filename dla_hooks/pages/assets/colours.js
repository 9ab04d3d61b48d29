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

// share is in [-1, 1]; the root makes small values visible.
function shade(share) {
  const ends = ENDS[darkMode.matches ? "dark" : "light"];
  if (!Number.isFinite(share)) return { fill: "none", ink: css(darkMode.matches ? [232, 234, 237] : [29, 32, 37]) };
  const colour = mixed(share < 0 ? ends.down : ends.up, Math.abs(share) ** 0.8);
  const bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2];
  return { fill: css(colour), ink: bright > 140 ? "#16181b" : "#f6f7f8" };
}
const paint = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
