// Everything about the chosen row.

function cardPanel() {
  const { node, what, body } = panel("card", "Chosen row", { picture, table });
  node.classList.add("card");
  let lines = [];  // [section, name, value, note], for files

  const fact = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, value, note ? [" ", el("small", {}, note)] : null));
  const goTo = (entry, text) => el("button", { type: "button", class: "link", onclick: () => choose({ entry }) }, text);

  function described(unit) {
    const row = unit.numberOf.get(state.label), field = (name) => unit.rows[name]?.[row];
    const layer = field("layer"), index = field("index");
    if (state.label === unit.remainder) return unit.remainder_is;
    if (layer === undefined || layer === null) return unit.title.toLowerCase();
    return index !== undefined && index !== null ? `${unit.index_is || field("kind")} ${index} of layer ${layer}` : `${String(field("kind")).replaceAll("_", " ")} of layer ${layer}`;
  }

  function numbers(unit) {
    const value = chosenValue(), e = state.entry, own = page();
    const order = ranking(unit, e), place = order.findIndex((one) => one.label === state.label) + 1;
    const digits = digitsFor(Math.abs(value));
    const found = [fact(unit.cumulative ? "sum up to here" : "value", el("span", { class: signClass(value) }, signed(value, digits)), unit.exactAt(e) ? null : "rounded")];
    lines.push(["", "value", value, ""]);
    if (!unit.cumulative && own.logit[e]) {
      found.push(fact(own.kind === "comparison" ? "of the change" : "of the logit", percent(value / own.logit[e])));
      if (place) found.push(fact("rank by size", String(place), `of ${unit.dense ? order.length : unit.n_rows}`));
    }
    const line = unit.list(e).find((one) => one.label === state.label);
    for (const [name, number] of line?.beside ?? []) {
      found.push(fact(name, besideText(name, number, digits)));
      lines.push(["", name, number, ""]);
    }
    for (const [name, number] of Object.entries(own.effects?.[state.label] ?? {})) {
      found.push(fact(`${name} effect`.replace("effect effect", "effect"), signed(number)));
      lines.push(["effect", name, number, ""]);
    }
    return el("dl", { class: "facts" }, found);
  }

  function reads() {
    const own = page();
    if (!own.reads?.knows(state.label)) return null;
    const found = own.reads.of(state.label, state.entry);
    if (!found) return [el("h3", {}, "Tokens it reads"), el("p", { class: "soft" }, "Measured at ", goTo(own.reads.at.at(-1), `position ${own.spots[own.reads.at.at(-1)]}`), " only.")];
    const shown = found.slice(0, 8), most = largestOf(found.map((one) => one.value)), digits = digitsFor(Math.max(most, Math.abs(chosenValue())));
    const rest = chosenValue() - shown.reduce((sum, one) => sum + one.value, 0);
    const items = shown.map(({ token, value, weight }) => {
      lines.push(["reads", own.tokens[token], value, `position ${token}, attention ${weight.toFixed(3)}`]);
      return [el("span", {}, tokenChip(own.tokens[token]), " ", el("small", {}, token)), meter(value, most),
        el("span", { class: "number" }, signed(value, digits), " ", el("small", { title: "attention weight" }, Number.isFinite(weight) ? percent(weight) : ""))];
    });
    if (own.tokens.length > shown.length) items.push([el("span", { class: "soft" }, "all others"), el("span"), el("span", { class: "number" }, signed(rest, digits))]);
    return [el("h3", {}, "Tokens it reads ", el("span", { class: "faint" }, "value, attention")), el("div", { class: "list" }, items)];
  }

  function promotes() {
    const own = page();
    const known = own.promotes.filter((one) => one.rows[state.label]);
    if (!known.length) return null;
    const at = known.find((one) => one.rows[state.label][state.entry]);
    const place = known[0].at[0];
    if (!at) return [el("h3", {}, "Tokens it promotes"), el("p", { class: "soft" }, "Listed at ", goTo(place, `position ${own.spots[place]}`), " only.")];
    const [up, down] = at.rows[state.label][state.entry];
    const column = (title, found, way) => el("div", {}, el("h3", {}, title), el("div", { class: "list" }, found.map(([name, value]) => {
      lines.push([way, at.names[name], value, ""]);
      return [tokenChip(at.names[name]), el("span", { class: `number ${signClass(value)}` }, signed(value, 2))];
    })));
    return el("div", { class: "two" }, column("Promotes", up, "promotes"), column("Demotes", down, "demotes"));
  }

  drawnBy(node, () => {
    const unit = chosenUnit();
    lines = [];
    what.textContent = "";
    body.replaceChildren(...[
      el("p", { class: "name" }, visible(state.label)), el("p", { class: "soft" }, described(unit)),
      Number.isFinite(chosenValue()) ? numbers(unit)
        : el("p", { class: "soft" }, unit.has(state.entry) ? "Not among the strongest rows at this position." : ["Measured at ", goTo(unit.at.at(-1), `position ${page().spots[unit.at.at(-1)]}`), " only."]),
      reads(), promotes()].flat().filter(Boolean));
  });

  function table() {
    return { columns: ["section", "name", "value", "note"], rows: lines };
  }
  function picture() {
    const title = `${state.label}, ${described(chosenUnit())}${where()}`;
    return listPicture(title, lines.map(([section, name, value, note]) => [section ? `${section} ${name}` : name, value, note]));
  }
  return node;
}
