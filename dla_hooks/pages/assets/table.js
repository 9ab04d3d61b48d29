// Every row of a unit: searched, sorted, and what is not listed in one line.

const MOST_LINES = 60;  // at each frame; more, where they are asked for, when the keys rest

function tablePanel() {
  const { node, what, body } = panel("table", "All rows", { picture, table });
  const tabs = el("div", { class: "tabs", role: "tablist" });
  const search = el("input", { type: "search", placeholder: "Search rows or tokens", "aria-label": "Search rows", id: "search", oninput: () => { query = search.value.toLowerCase(); draw(); } });
  const sign = choiceOf("Sign", () => [["all", "all"], ["up", "+"], ["down", MINUS]], () => wanted, (value) => { wanted = value; draw(); });
  const count = el("span", { class: "soft", role: "status" });
  const scroll = el("div", { class: "scroll", tabindex: -1 });
  body.append(tabs, el("div", { class: "filters" }, search, sign.node, count), scroll);
  let query = "", wanted = "all", sorted = { by: "size", way: -1 }, most = MOST_LINES, before = "", tabbed = null, drawn = null, complete = false, chosen = [];

  const unit = () => unitNamed(state.tab) ?? page().units[0];
  const tokenOf = (one) => (one.source === null ? "" : page().tokens[one.source] ?? "");

  function columns(own) {
    const found = [{ key: "label", name: "row", of: (one) => one.label + (tokenOf(one) ? ` ${quoted(tokenOf(one))}` : "") }];
    if (own.rows.layer) found.push({ key: "layer", name: "layer", number: true, of: (one) => one.layer });
    if (own.index_is && own.rows.index) found.push({ key: "index", name: own.index_is, number: true, of: (one) => one.index });
    found.push({ key: "value", name: own.cumulative ? "sum up to here" : "value", number: true, of: (one) => one.value });
    found.push({ key: "size", name: "size", bar: true, of: (one) => Math.abs(one.value) });
    own.besides.forEach((name, i) => found.push({ key: `beside ${i}`, name, number: true, beside: true, of: (one) => one.beside[i][1] }));
    return found;
  }

  function lines(own) {
    const of = columns(own).find((one) => one.key === sorted.by)?.of ?? ((one) => Math.abs(one.value));
    const known = (one) => !one.remainder && (!query || columns(own)[0].of(one).toLowerCase().includes(query)) && (wanted === "all" || (wanted === "up" ? one.value > 0 : one.value < 0));
    const compare = (a, b) => {
      const [x, y] = [of(a), of(b)];
      if (typeof x === "string") return sorted.way * x.localeCompare(y, "en", { numeric: true });
      return sorted.way * ((x ?? -1) - (y ?? -1));
    };
    const found = own.list(state.entry).filter(known);
    return own.cumulative && sorted.by === "size" ? found : found.sort(compare);
  }

  // What the unit has besides its listed rows.
  function last(own) {
    if (own.cumulative) return [];
    if (own.dense) return own.list(state.entry).filter((one) => one.remainder).map((one) => [one.label, one.value, own.remainder_is]);
    if (!own.has(state.entry)) return [];
    return [["rest", own.restAt(state.entry), `${own.n_rows - own.list(state.entry).length} rows that are not listed`], ["remainder", own.remainderAt(state.entry), own.remainder_is]];
  }

  function draw(whole = false) {
    const own = unit();
    if (before !== `${state.page} ${own.key}`) { before = `${state.page} ${own.key}`; most = MOST_LINES; }
    if (tabbed !== page()) {
      tabbed = page();
      tabs.replaceChildren(...page().units.map((one) => el("button", { type: "button", role: "tab", "data-tab": one.key, onclick: () => choose({ tab: one.key }) }, one.title.split(",")[0])));
    }
    for (const tab of tabs.children) tab.setAttribute("aria-selected", String(tab.dataset.tab === own.key));
    sign.draw();
    const now = [own, state.entry, query, wanted, sorted, most];
    if ((complete || !whole) && drawn?.every((one, i) => one === now[i])) return mark(own);
    [drawn, complete] = [now, whole || most <= MOST_LINES];
    what.textContent = own.sentence;
    if (!own.has(state.entry)) {
      const at = own.at.at(-1);
      count.textContent = "";
      scroll.replaceChildren(el("p", { class: "soft" }, "Measured at ", el("button", { type: "button", class: "link", onclick: () => choose({ entry: at }) }, `position ${page().spots[at]}`), " only."));
      return;
    }
    const found = lines(own), shown = found.slice(0, complete ? most : MOST_LINES), ends = last(own);
    const biggest = largestOf(found.map((one) => one.value)), digits = digitsFor(biggest);
    const all = columns(own);
    const sort = (key) => () => { sorted = { by: key, way: sorted.by === key ? -sorted.way : key === "label" ? 1 : -1 }; draw(); };
    const heading = (one) => el("th", { scope: "col", class: one.number ? "number" : null, "aria-sort": sorted.by === one.key ? (sorted.way > 0 ? "ascending" : "descending") : null },
      el("button", { type: "button", onclick: sort(one.key), "data-sort": one.key }, one.name, sorted.by === one.key ? (sorted.way > 0 ? " ↑" : " ↓") : ""));
    const cell = (column, one) => {
      if (column.bar) return el("td", { class: "wide" }, meter(one.value, biggest));
      const value = column.of(one);
      if (!column.number) return el("td", { class: "name", title: visible(value) }, visible(value));
      if (column.key === "value") return el("td", { class: `number ${signClass(value)}` }, signed(value, digits));
      return el("td", { class: "number" }, value === null ? "" : column.beside ? besideText(column.name, value, digits) : String(value));
    };
    const line = (one) => el("tr", { "data-row": one.label, tabindex: -1, "aria-selected": "false" }, all.map((column) => cell(column, one)));
    const foot = ([label, value, holds]) => el("tr", {}, all.map((column, i) =>
      i === 0 ? el("td", { class: "name" }, label) : column.key === "value" ? el("td", { class: "number" }, signed(value, digits)) : column.bar ? el("td", { class: "wide" }, holds) : el("td")));
    scroll.replaceChildren(
      el("table", {}, el("caption", { class: "sr" }, `${own.title}${where()}`), el("thead", {}, el("tr", {}, all.map(heading))),
        el("tbody", {}, shown.map(line)), el("tfoot", {}, ends.map(foot))),
      ...(found.length > most ? [el("button", { type: "button", class: "link", onclick: () => { most = Infinity; draw(true); } }, `Show all ${found.length} rows`)] : []));
    count.textContent = `${found.length} rows${own.exactAt(state.entry) ? "" : ", values rounded to fit the file"}`;
    chosen = [];
    mark(own);
  }

  // The chosen row, where it is listed.
  function mark(own) {
    const select = (row, is) => { row.setAttribute("aria-selected", String(is)); row.tabIndex = is ? 0 : -1; };
    for (const row of chosen) select(row, false);
    const one = state.unit === own.key && scroll.querySelector(`[data-row="${CSS.escape(state.label)}"]`);
    chosen = one ? [one] : [];
    for (const row of chosen) select(row, true);
  }
  drawnBy(node, () => draw());
  resters.push(() => {
    if (complete) return;
    const at = scroll.scrollTop;
    draw(true);
    scroll.scrollTop = at;
  });

  scroll.addEventListener("click", (event) => {
    const row = event.target.closest("[data-row]");
    if (row) choose({ unit: unit().key, label: row.dataset.row });
  });
  scroll.addEventListener("keydown", (event) => {
    const row = event.target.closest("[data-row]");
    const next = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (!row || !next) return;
    event.preventDefault();
    event.stopPropagation();
    if (row[next]) {
      const label = row[next].dataset.row;
      choose({ unit: unit().key, label });
      requestAnimationFrame(() => scroll.querySelector(`[data-row="${CSS.escape(label)}"]`)?.focus());
    }
  });

  function table() {
    const own = unit(), all = columns(own).filter((one) => !one.bar);
    const ends = last(own).map(([label, value]) => all.map((column, i) => (i === 0 ? label : column.key === "value" ? value : null)));
    return { columns: all.map((one) => one.name), rows: [...lines(own).map((one) => all.map((column) => column.of(one))), ...ends] };
  }
  function picture() {
    const own = unit(), name = columns(own)[0].of;
    const rows = lines(own).slice(0, 40).map((one) => [name(one), one.value, ""]);
    return listPicture(`${own.title}${where()}`, [...rows, ...last(own)]);
  }
  return node;
}
