// The frame that every panel has: heading, one line of explanation, choices, files.

function panel(id, title, { picture, table, choices = null }) {
  const what = el("p", { class: "what" });
  const body = el("div", { class: "content" });
  const tools = el("div", { class: "tools" }, choices, exportButtons(id, picture, table));
  const node = el("section", { class: "panel", id, "aria-label": title }, el("header", {}, el("h2", {}, title), what, tools), body);
  return { node, what, body };
}

// Buttons of which one is pressed: options() gives [[value, text]], and none shows nothing.
function choiceOf(label, options, current, pick) {
  const node = el("span", { class: "choice", role: "group", "aria-label": label });
  return {
    node,
    draw() {
      const found = options();
      node.hidden = found.length < 2;
      node.replaceChildren(...found.map(([value, text]) =>
        el("button", { type: "button", "aria-pressed": String(current() === value), onclick: () => pick(value) }, text)));
    },
  };
}

// For readers who hear the page: the same numbers as a table, out of sight.
function hiddenTable(caption, { columns, rows }) {
  const cells = (row) => el("tr", {}, row.map((value) => el("td", {}, typeof value === "number" ? signed(value) : String(value ?? ""))));
  return el("table", { class: "sr" }, el("caption", {}, caption), el("thead", {}, el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, rows.map(cells)));
}
