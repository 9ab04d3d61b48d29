// Elements. Text always comes as text nodes, so that nothing in a prompt is read as html.

function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}
const SVG = "http://www.w3.org/2000/svg";
function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}
function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false));
  return node;
}
const tokenChip = (token) => el("span", { class: "token" }, visible(token) || "∅");
const signClass = (value) => (value > 0 ? "up" : value < 0 ? "down" : "");

const tip = el("div", { class: "tip", hidden: true, role: "tooltip" });
function showTip(event, name, lines) {
  tip.replaceChildren(el("b", {}, name), el("dl", {}, lines.map(([key, value]) => [el("dt", {}, key), el("dd", {}, value)])));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY + 18 + height > innerHeight ? Math.max(4, event.clientY - height - 12) : event.clientY + 18}px`;
}
const hideTip = () => { tip.hidden = true; };

// Hover over marks: one pair of listeners for thousands of them.
const markOf = (event) => event.target.closest("[data-mark]")?.dataset.mark;
function hover(node, lines, at = markOf) {
  node.addEventListener("pointermove", (event) => {
    const mark = at(event);
    const found = mark !== undefined && lines(mark);
    if (found) showTip(event, ...found); else hideTip();
  });
  node.addEventListener("pointerleave", hideTip);
}
