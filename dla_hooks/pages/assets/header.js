// What was asked, what the model said, and how well the parts add up.

function questionParts(own = page(), entry = state.entry) {
  const name = (names, places) => (names.length && places[entry] !== null ? names[places[entry]] : null);
  return [name(own.answers, own.answer), own.difference ? name(own.incorrects, own.incorrect) : null];
}

function headerPanel() {
  const node = el("header", { class: "head" });
  const fact = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, value, note ? [" ", el("small", {}, note)] : null));

  // Made once: what has the focus must stay where it is.
  const options = state.content.pages.map((one, number) => el("option", { value: number }, shortened(`${number + 1}  ${visible(one.tokens.join("")) || one.question}`, 70)));
  const select = el("select", { id: "pages", onchange: (event) => choose({ page: Number(event.target.value) }) }, options);
  const turn = (by) => () => turnPage(by);
  const pages = el("span", { class: "pages", hidden: options.length < 2 }, el("label", { for: "pages" }, "Prompt"), select,
    el("button", { type: "button", "aria-label": "Previous prompt", onclick: turn(-1) }, "‹"),
    el("button", { type: "button", "aria-label": "Next prompt", onclick: turn(1) }, "›"));
  const about = el("span", { class: "items" }), question = el("div", { class: "head" });
  node.append(el("div", { class: "about" }, about, pages), question);

  function title(own) {
    const [answer, incorrect] = questionParts();
    if (own.kind === "summary" || answer === null) return [own.question[0].toUpperCase() + own.question.slice(1)];
    const first = incorrect === null ? ["Who wrote the logit of ", tokenChip(answer), "?"] : ["Why ", tokenChip(answer), " rather than ", tokenChip(incorrect), "?"];
    return own.kind === "comparison" ? [...first, " First run minus second"] : first;
  }

  function facts(own) {
    const e = state.entry;
    const logit = own.logit[e];
    const what = own.difference ? "logit difference" : "logit";
    const before = own.softcap ? `before the cap of ${own.softcap}` : null;
    const found = [fact(own.kind === "comparison" ? `change of the ${what}` : own.kind === "summary" ? `mean ${what}` : what, signed(logit, 3), own.logit_error ? `± ${own.logit_error.toFixed(3)}` : before)];
    if (own.sides) found.push(...own.sides.map((side, i) => fact(i ? "second run" : "first run", signed(side.logit[e], 3),
      [side.rank?.[e] ? `rank ${side.rank[e]}` : null, Number.isFinite(side.probability?.[e]) ? percent(side.probability[e]) : null].filter(Boolean).join(", "))));
    if (own.rank?.[e]) found.push(fact("answer’s rank", String(own.rank[e])));
    if (Number.isFinite(own.probability?.[e])) found.push(fact("answer’s probability", percent(own.probability[e])));
    if (own.top?.[e]?.length) found.push(fact("most likely", own.top[e].slice(0, 3).map(([name, share]) => [tokenChip(name), " ", el("small", {}, percent(share)), " "])));
    found.push(fact("bias", signed(own.bias[e], 3)));
    if (own.n !== undefined) found.push(fact("prompts", String(own.n), own.n_failed ? `${own.n_failed} failed` : null));
    if (own.gap !== null) found.push(fact("sum of all parts", own.logit_gap === null ? "not checked" : "checked ✓", `off by ${brief(own.gap)}${own.logit_gap === null ? "; not held against the model’s logits" : `; from the model’s own logits ${brief(own.logit_gap)}`}`));
    return el("dl", { class: "facts" }, found);
  }

  drawnBy(node, () => {
    const own = page();
    about.replaceChildren(...[own.model, own.about.dtype, own.located ? `${own.tokens.length} tokens` : null].filter(Boolean).map((text) => el("span", {}, text)));
    select.value = state.page;
    question.replaceChildren(el("h1", {}, title(own)), facts(own), ...own.notes.map((note) => el("p", { class: "notes" }, note)));
    document.title = state.content.title;
  });
  return node;
}

function footPanel() {
  const node = el("footer", { class: "foot" });
  const copy = (text) => el("button", { type: "button", class: "link", onclick: async (event) => {
    try {
      await navigator.clipboard.writeText(text);
      event.target.textContent = "copied";
    } catch {  // frames may not write there
      getSelection().selectAllChildren(event.target.previousElementSibling);
      event.target.textContent = "selected: copy it with the keyboard";
    }
  } }, "copy");
  const key = (...names) => names.map((name) => [el("kbd", {}, name), " "]);
  let drawn = null;
  drawnBy(node, () => {
    const own = page();
    if (drawn === own) return;
    drawn = own;
    const again = own.reproduce ?? {};
    const versions = Object.entries({ "dla_hooks": state.content.version, ...own.about }).filter(([name]) => name !== "dtype").map(([name, value]) => `${name} ${value}`).join(" · ");
    const block = (text) => text && [el("pre", {}, text), copy(text)];
    node.replaceChildren(
      el("section", {}, el("h2", {}, "How to read it"),
        el("p", {}, "Every number is a part of one logit, or of the difference of two: + speaks for the answer, − against. All components and the bias add up to the logit. The final norm’s scale is frozen, and so are attention patterns. These are direct paths only: what a part does through later parts stands with those."),
        el("p", {}, versions)),
      el("section", {}, el("h2", {}, "Keys"),
        el("p", {}, key("←", "→"), "position  ", key("↑", "↓"), "next row by size  ", key("/"), "search  ", key("n", "p"), "prompt  ", key("Esc"), "strongest row. In the grid, arrows move by cell.")),
      ...(again.call || again.command ? [el("section", {}, el("h2", {}, "Make it again"), block(again.command), block(again.call))] : []));
  });
  return node;
}
