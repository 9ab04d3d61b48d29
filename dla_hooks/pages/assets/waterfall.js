// The components in the order of the stream, each from where the last one ended, up to the logit.

function waterfallPanel() {
  const { node, what, body } = panel("waterfall", "From the embedding to the logit", { picture: () => drawn(900, 210).picture, table });
  const canvas = el("div", { class: "canvas", tabindex: 0, role: "group", "aria-label": "Waterfall of components; arrow keys choose one" });
  const spoken = el("div", { class: "sr" });
  body.append(canvas, spoken);
  const width = widthOf(canvas);
  let bars = [], shown = null;  // the bars on the page, and where they stand

  const unit = () => streamUnit(page());
  const pale = (one) => /mlp|moe|expert|ffn/.test(one.kind ?? "");

  // One for each row, then the bias: where it begins and ends.
  function steps() {
    const own = unit();
    let rows = own.list(state.entry);
    let more = null;
    if (own.index_is && rows.length > 40) {  // no components: the strongest of what there is
      const kept = new Set([...rows].filter((one) => !one.remainder).sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 30));
      const others = rows.filter((one) => !kept.has(one) && !one.remainder);
      more = { label: `${others.length} more`, value: others.reduce((sum, one) => sum + one.value, 0), row: -1 };
      rows = [...rows.filter((one) => kept.has(one)), more, ...rows.filter((one) => one.remainder)];
    }
    let at = 0;
    const found = rows.map((one) => {
      const from = at;
      at += one.value;
      return { ...one, from, to: at, pick: one !== more };
    });
    const bias = page().bias[state.entry];
    return [...found, { label: "bias", value: bias, from: at, to: at + bias, layer: null, kind: "bias", pick: false }];
  }

  function drawn(width, plot) {
    const found = steps(), own = page();
    const left = 52, right = 14, top = 18, step = (width - left - right) / (found.length + 1);
    const narrow = step < 16, turned = narrow ? -90 : -32;  // then names stand upright, as many as there is room for
    const height = top + plot + (narrow ? 80 : 46);
    const errorOf = (one) => one.beside?.find(([name]) => name === "standard error")?.[1] ?? 0;
    const ends = [...found.flatMap((one) => [one.from, one.to, one.to - errorOf(one), one.to + errorOf(one)]), own.logit[state.entry]].filter(Number.isFinite);
    const low = Math.min(0, ...ends), high = Math.max(0, ...ends), span = high - low || 1;
    const y = (value) => top + plot * (1 - (value - low) / span);
    const x = (i) => left + i * step;
    const digits = Math.max(0, digitsFor(Math.max(high, -low)) - 2);

    const ticks = niceTicks(low, high, 5).map((value) => [
      svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: value === 0 ? "zero" : "rule" }),
      svg("text", { x: left - 7, y: y(value) + 4, "font-size": 11, "text-anchor": "end", class: "axis" }, value === 0 ? "0" : signed(value, digits))]);

    const groups = [];
    found.forEach((one, i) => {
      const last = groups.at(-1);
      if (one.layer !== null && last?.layer === one.layer) last.to = i + 1;
      else groups.push({ layer: one.layer, from: i, to: i + 1, label: one.label });
    });
    const room = narrow ? Math.ceil(13 / step) : 1;
    const every = Math.max(1, Math.ceil(20 / (step * (groups.find((one) => one.layer !== null)?.to - groups.find((one) => one.layer !== null)?.from || 1))));
    const first = groups.find(({ layer, from }) => layer === null && from > 0 && groups.some((one) => one.layer !== null && one.from < from));
    const clear = ({ layer, from, to }) => (layer === null ? from === 0 || (found.length - from) % room === 0 : layer % every === 0 && !(narrow && first && first.from - to < room));
    const names = groups.filter(clear).map(({ layer, from, to, label }) =>
      layer === null
        ? svg("text", { transform: `translate(${x((from + to) / 2) + 4},${top + plot + (narrow ? 8 : 12)}) rotate(${turned})`, "font-size": 11, "text-anchor": "end", class: "axis" }, shortened(label, 12))
        : svg("text", { x: x((from + to) / 2), y: top + plot + 17, "font-size": 11, "text-anchor": "middle", class: "axis" }, layer));
    const bands = groups.filter(({ layer }) => layer !== null && layer % 2 === 1).map(({ from, to }) =>
      svg("rect", { x: x(from), y: top, width: x(to) - x(from), height: plot, fill: paint("wash") }));

    const finite = (value) => y(Number.isFinite(value) ? value : 0);
    const bar = (i, from, to, fill, more) => svg("rect", { class: "bar", "data-mark": i, x: x(i) + step * 0.12, y: Math.min(from, to), width: step * 0.76, height: Math.max(1, Math.abs(to - from)), fill, rx: Math.min(1.5, step / 6), ...more });
    const marks = found.map((one, i) => bar(i, finite(one.from), finite(one.to), one.kind === "bias" ? paint("faint") : paint(one.value < 0 ? "down" : "up"), { "fill-opacity": pale(one) ? 0.6 : 1 }));
    const links = svg("path", { d: found.map((one, i) => `M${x(i) + step * 0.12},${finite(one.to)}H${x(i + 1) + step * 0.88}`).join(""), fill: "none", stroke: paint("faint"), "stroke-width": 0.75 });
    const rings = found.map((one, i) => {
      if (!one.pick || state.unit !== unit().key || state.label !== one.label) return null;
      const [from, to] = [finite(one.from), finite(one.to)];
      return svg("rect", { class: "ring", x: x(i) + step * 0.12 - 2, y: Math.min(from, to) - 2, width: step * 0.76 + 4, height: Math.max(1, Math.abs(to - from)) + 4, rx: 3 });
    });
    const whiskers = found.filter((one) => errorOf(one) > 0).map((one) => {
      const middle = x(found.indexOf(one) + 0.5), half = Math.min(3, step / 4), low = y(one.to - errorOf(one)), high = y(one.to + errorOf(one));
      return `M${middle},${low}V${high}M${middle - half},${low}h${2 * half}M${middle - half},${high}h${2 * half}`;
    }).join("");
    const logit = own.logit[state.entry], n = found.length;
    const total = svg("g", {}, bar(n, y(0), y(logit), paint("ink")),
      svg("text", { transform: `translate(${x(n + 0.5) + 4},${top + plot + (narrow ? 8 : 12)}) rotate(${turned})`, "font-size": 11, "text-anchor": "end", class: "axis" }, "logit"));
    const axis = svg("text", { x: (left + width - right) / 2, y: height - 4, "font-size": 11, "text-anchor": "middle", class: "axis" }, groups.every((one) => one.layer === null) ? "" : found.some(pale) ? "layer (pale: MLP)" : "layer");
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption() }, bands, ticks, links, marks, total,
      whiskers ? svg("path", { d: whiskers, fill: "none", stroke: paint("ink"), "stroke-width": 1 }) : null, rings, names, axis);
    return { picture, width, left, step, n: found.length };
  }

  function caption() {
    const moved = steps().map((one) => one.value).filter(Number.isFinite);
    const up = moved.filter((value) => value > 0).reduce((sum, value) => sum + value, 0);
    const down = moved.filter((value) => value < 0).reduce((sum, value) => sum - value, 0);
    const lost = up + down > 0 ? (2 * Math.min(up, down)) / (up + down) : 0;
    const about = unit().rounded && state.entry !== page().focus ? "about " : "";
    return `${about}${signed(up, 2)} pushed up, ${signed(-down, 2)} pushed down, together ${signed(up - down, 2)}: ${percent(lost)} of it cancels`;
  }

  function table() {
    const rows = steps().map((one) => [one.label, one.value, one.to]);
    return { columns: ["component", "value", "running sum"], rows: [...rows, ["logit", page().logit[state.entry], page().logit[state.entry]]] };
  }

  drawnBy(node, () => {
    node.hidden = !unit() || !unit().has(state.entry);
    if (node.hidden) return;
    what.textContent = caption();
    bars = steps();
    const zoom = zoomOf(node);
    shown = drawn(Math.max(320, width() / zoom), isFull(node) ? Math.max(210, (innerHeight - 100) / zoom - 66) : 210);
    if (zoom > 1) shown.picture.style.width = `${zoom * shown.width}px`;
    canvas.replaceChildren(shown.picture);
  });
  resters.push(() => {
    if (!node.hidden) spoken.replaceChildren(hiddenTable("Components in the order of the stream", table()));
  });
  // A column of the picture, whatever the height: bars may be one pixel thin.
  function barAt(event) {
    const box = canvas.firstElementChild.getBoundingClientRect();
    const i = Math.floor((((event.clientX - box.left) * shown.width) / box.width - shown.left) / shown.step);
    return i >= 0 && i <= shown.n ? i : undefined;
  }
  canvas.addEventListener("click", (event) => {
    const one = bars[barAt(event)];
    if (one?.pick) choose({ unit: unit().key, label: one.label, tab: unit().key });
  });
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    const picks = bars.filter((one) => one.pick);
    const at = state.unit === unit().key ? picks.findIndex((one) => one.label === state.label) : -1;
    const next = picks[Math.min(picks.length - 1, Math.max(0, at + by))];
    choose({ unit: unit().key, label: next.label, tab: unit().key });
  });
  hover(canvas, (i) => {
    const one = bars[i];
    if (!one) return ["logit", [["value", signed(page().logit[state.entry], 4)]]];
    return [one.label, [["value", signed(one.value, 4)], ["sum up to here", signed(one.to, 4)], ...(one.beside ?? []).map(([name, value]) => [name, besideText(name, value, 4)])]];
  }, barAt);
  return node;
}

function niceTicks(low, high, n) {
  const rough = (high - low || 1) / n;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}
