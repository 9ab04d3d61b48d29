// What is chosen. It stands in the address, so that a link shows the same.

const state = { content: null, page: 0, entry: 0, unit: "", label: "", tab: "", strip: "value", grid: "" };
const drawers = [];  // { node, draw, seen, stale }
const resters = [];  // what can wait until the keys rest
const REST = 70;  // milliseconds
let waiting = false, resting = 0, turned = true;

const sight = new IntersectionObserver((found) => {
  for (const { target, isIntersecting } of found) {
    const one = drawers.find(({ node }) => node === target);
    one.seen = isIntersecting;
    if (one.seen && one.stale) refresh(one);
  }
}, { rootMargin: "150px" });

// A panel in sight is drawn at the next frame; one out of sight when nothing was chosen for a while.
function drawnBy(node, draw) {
  drawers.push({ node, draw, seen: true, stale: true });
  sight.observe(node);
}
function refresh(one) {
  one.stale = false;
  one.draw();
}

const page = () => state.content.pages[state.page];
const where = (entry = state.entry) => (page().located ? ` at position ${page().spots[entry]}` : "");
const unitNamed = (key) => page().units.find((one) => one.key === key);
const chosenUnit = () => unitNamed(state.unit);
const chosenValue = (entry = state.entry) => chosenUnit()?.value(state.label, entry) ?? NaN;

function choose(changes) {
  const other = "page" in changes && changes.page !== state.page;
  Object.assign(state, changes);
  if (other) settle({ entry: changes.entry, unit: changes.unit ?? state.unit, label: changes.label ?? state.label });
  turned ||= other;
  for (const one of drawers) one.stale = true;
  if (waiting) return;
  waiting = true;
  document.documentElement.dataset.ready = "false";
  requestAnimationFrame(draw);
}
const redraw = () => choose({});

function draw() {
  waiting = false;
  hideTip();
  for (const one of drawers) if (one.stale && (one.seen || turned)) refresh(one);
  turned = false;
  clearTimeout(resting);
  resting = setTimeout(rest, REST);
}

// Browsers bear two hundred new addresses in half a minute: one is written when the keys rest.
function rest() {
  resting = 0;
  if (waiting) return;
  for (const one of drawers) if (one.stale) refresh(one);
  writeAddress();
  for (const one of resters) one();
  document.documentElement.dataset.ready = "true";
}
function drawAll() {
  if (waiting || resting) { turned = true; draw(); clearTimeout(resting); rest(); }
}

// Keep what the page has of what was chosen; the rest falls back to the strongest row.
function settle({ entry, unit, label }) {
  const own = page();
  state.entry = entry >= 0 && entry < own.spots.length ? entry : own.focus;
  if (!own.units.some((one) => one.key === state.tab)) state.tab = "";
  const found = own.units.find((one) => one.key === unit);
  if (found?.numberOf.has(label)) Object.assign(state, { unit, label });
  else {
    const first = gridUnits(own)[0] ?? streamUnit(own) ?? own.units[0];
    const best = ranking(first, first.has(state.entry) ? state.entry : first.at.at(-1))[0];
    Object.assign(state, { unit: first.key, label: best?.label ?? first.labels[0] ?? "" });
  }
  if (!state.tab) state.tab = state.unit;
}

function writeAddress() {
  const own = page();
  const parts = new URLSearchParams({ pos: own.spots[state.entry], unit: state.unit, row: state.label, tab: state.tab });
  if (state.content.pages.length > 1) parts.set("page", state.page);
  if (state.strip !== "value") parts.set("strip", state.strip);
  const text = `#${parts}`;
  if (location.hash !== text) {
    try { history.replaceState(null, "", text); } catch { /* frames without an address of their own have none to write */ }
  }
}

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const number = Number(parts.get("page") ?? 0);
  state.page = Number.isInteger(number) && number >= 0 && number < state.content.pages.length ? number : 0;
  state.tab = parts.get("tab") ?? "";
  state.strip = parts.get("strip") === "reads" ? "reads" : "value";
  const entry = parts.has("pos") ? page().entryOf.get(Number(parts.get("pos"))) : undefined;
  settle({ entry, unit: parts.get("unit"), label: parts.get("row") });
}
