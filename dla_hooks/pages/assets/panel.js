// The frame that every panel has: heading, one line of explanation, choices, files.

function panel(id, title, { picture, table, choices = null }) {
  const what = el("p", { class: "what" });
  const body = el("div", { class: "content" });
  const tools = el("div", { class: "tools" }, choices, exportButtons(id, picture, table), fullButton(() => node, title));
  const node = el("section", { class: "panel", id, "aria-label": title }, el("header", {}, el("h2", {}, title), what, tools), body);
  return { node, what, body };
}

// A panel on the whole screen, where the browser lets it: frames may not.
const isFull = (node) => document.fullscreenElement === node;
const zoomOf = (node) => (isFull(node) ? 1.5 : 1);  // what is drawn there is seen from further away
function fullButton(node, title) {
  if (!document.fullscreenEnabled) return null;
  const button = el("button", { type: "button", class: "full", "data-full": "", onclick: () => (isFull(node()) ? document.exitFullscreen() : node().requestFullscreen()) });
  const draw = () => {
    const text = isFull(node()) ? "Leave full screen" : "Full screen";
    button.title = text;
    button.setAttribute("aria-label", `${text}: ${title}`);
    button.replaceChildren(svg("svg", { width: 12, height: 12, viewBox: "0 0 12 12", "aria-hidden": "true" },
      svg("path", { d: isFull(node()) ? "M4.5 1v3.5H1M7.5 1v3.5H11M4.5 11V7.5H1M7.5 11V7.5H11" : "M1 4.5V1h3.5M11 4.5V1H7.5M1 7.5V11h3.5M11 7.5V11H7.5", fill: "none", stroke: "currentColor", "stroke-width": 1.4 })));
  };
  document.addEventListener("fullscreenchange", draw);
  queueMicrotask(draw);
  return button;
}

// How wide a node is. Reading that makes the browser lay out the page, so it is read when it changes.
function widthOf(node) {
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    const now = Math.floor(contentRect.width);
    if (!now || now === width) return;
    width = now;
    redraw();
  }).observe(node);
  return () => (width ||= node.clientWidth);
}

// Buttons of which one is pressed: options() gives [[value, text]], and none shows nothing.
function choiceOf(label, options, current, pick) {
  const node = el("span", { class: "choice", role: "group", "aria-label": label });
  let built = "", buttons = [];
  return {
    node,
    draw() {
      const found = options(), key = JSON.stringify(found);
      if (built !== key) {
        built = key;
        node.hidden = found.length < 2;
        buttons = found.map(([value, text]) => [value, el("button", { type: "button", onclick: () => pick(value) }, text)]);
        node.replaceChildren(...buttons.map(([, button]) => button));
      }
      for (const [value, button] of buttons) button.setAttribute("aria-pressed", String(current() === value));
    },
  };
}

// For readers who hear the page: the same numbers as a table, out of sight.
function hiddenTable(caption, { columns, rows }) {
  const cells = (row) => el("tr", {}, row.map((value) => el("td", {}, typeof value === "number" ? signed(value) : String(value ?? ""))));
  return el("table", { class: "sr" }, el("caption", {}, caption), el("thead", {}, el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, rows.map(cells)));
}
