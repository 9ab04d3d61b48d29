// Layer by head (or by expert): one square for each, on a canvas, for a thousand change at once.

function heatmapPanel() {
  const choice = choiceOf("Which grid", () => gridUnits(page()).map((one) => [one.key, one.title]), () => unit()?.key, (grid) => choose({ grid }));
  const { node, what, body } = panel("heads", "Layer by head", { picture, table, choices: choice.node });
  const canvas = el("div", { class: "canvas grid", tabindex: 0, role: "group", "aria-label": "Grid of layers and heads; arrow keys choose one" });
  const squares = el("canvas", { "aria-hidden": "true" });
  body.append(canvas);
  const width = widthOf(canvas);
  let built = null;

  const unit = () => gridUnits(page()).find((one) => one.key === state.grid) ?? gridUnits(page())[0];

  // Where everything stands. Only colours, numbers and the ring change with what is chosen.
  function build(own) {
    const rows = own.list(own.at.at(-1)).filter((one) => one.layer !== null && one.index !== null);
    const several = new Set(rows.map((one) => one.kind)).size > 1;
    const laneOf = (one) => `${one.layer}${one.sub ? `.${one.sub}` : ""}${several ? ` ${one.kind}` : ""}`;
    const lanes = [...new Set(rows.map(laneOf))], laneAt = new Map(lanes.map((name, lane) => [name, lane]));
    const columns = rows.reduce((most, one) => Math.max(most, one.index), 0) + 1;
    const zoom = zoomOf(node), full = Math.max(300, width() / zoom), left = several ? 92 : 40, top = 20;
    const most = isFull(node) ? [240, 120, ((innerHeight - 130) / zoom - 72) / lanes.length] : [columns < 9 ? 74 : 46, 34, 620 / lanes.length];
    const wide = Math.min(most[0], (full - left - 8) / columns), tall = Math.max(7, Math.min(wide, most[1], most[2]));
    const cells = rows.map((one) => {
      const lane = laneAt.get(laneOf(one));
      return { label: one.label, row: one.row, layer: one.layer, index: one.index, lane, x: left + one.index * wide, y: top + lane * tall };
    });
    const placeOf = new Map(cells.map((one) => [one.lane * columns + one.index, one]));
    const cellOf = new Map(cells.map((one) => [one.label, one]));
    const size = { width: full, height: top + lanes.length * tall + 52 };
    const shape = { ...size, wide, tall, gap: wide > 12 ? 1.5 : 0.5, round: wide > 12 && cells.length <= 400 ? 2.5 : 0, numbers: wide >= 36 && tall >= 18 };
    const every = (step) => Math.max(1, Math.ceil(18 / step));
    const axes = [
      ...lanes.map((name, i) => (i % every(tall) ? null : svg("text", { x: left - 7, y: top + i * tall + tall / 2 + 4, "font-size": 11, "text-anchor": "end", class: "axis" }, name))),
      ...Array.from({ length: columns }, (_, i) => (i % every(wide) ? null : svg("text", { x: left + i * wide + wide / 2, y: 13, "font-size": 11, "text-anchor": "middle", class: "axis" }, i))),
      svg("text", { x: 2, y: 13, "font-size": 11, class: "axis" }, "layer"),
    ];
    const ring = svg("rect", { class: "ring", width: wide, height: tall, rx: 3 });
    const scale = legend(Math.min(220, Math.max(150, wide * columns)), left, top + lanes.length * tall + 14);
    const over = svg("svg", { ...size, viewBox: `0 0 ${size.width} ${size.height}`, role: "img" }, axes, scale.node, ring);
    if (zoom > 1) over.style.width = `${zoom * full}px`;
    return { ...shape, zoom, left, top, lanes, columns, cells, cellOf, placeOf, ring, scale, over };
  }

  // The colour of each square, and its number where there is room for one.
  function shown(own) {
    const values = built.cells.map((one) => own.value(one.label, state.entry));
    const most = largestOf(values), digits = Math.max(1, digitsFor(most) - 1);
    const fits = built.numbers && 6.6 * signed(-most, digits).length < built.wide - 3;
    const squares = values.map((value, i) => {
      const { fill, ink } = shade(most > 0 ? value / most : NaN);
      return { ...built.cells[i], fill, ink, text: fits && Number.isFinite(value) ? signed(value, digits) : "" };
    });
    return { squares, most, digits };
  }

  function fillSquares(found) {
    const ratio = (devicePixelRatio || 1) * built.zoom, { width, height, wide, tall, gap, round } = built;
    const pen = squares.getContext("2d");
    if (squares.width !== Math.round(width * ratio) || squares.height !== Math.round(height * ratio)) {
      [squares.width, squares.height] = [Math.round(width * ratio), Math.round(height * ratio)];
      squares.style.width = `${built.zoom * width}px`;
    }
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = `11px ${paint("sans")}`;
    pen.textAlign = "center";
    for (const { x, y, fill, ink, text } of found) {
      if (fill === "none") continue;
      pen.fillStyle = fill;
      if (round) {
        pen.beginPath();
        pen.roundRect(x + gap / 2, y + gap / 2, wide - gap, tall - gap, round);
        pen.fill();
      } else pen.fillRect(x + gap / 2, y + gap / 2, wide - gap, tall - gap);
      if (!text) continue;
      pen.fillStyle = ink;
      pen.fillText(text, x + wide / 2, y + tall / 2 + 4);
    }
  }

  drawnBy(node, () => {
    const own = unit();
    node.hidden = !own;
    if (node.hidden) return;
    const key = [state.page, own.key, width(), isFull(node) ? innerHeight : "", mode].join();
    if (built?.key !== key) {
      built = { ...build(own), key };
      canvas.replaceChildren(squares, built.over);
    }
    const { squares: found, most, digits } = shown(own);
    fillSquares(found);
    const chosen = state.unit === own.key ? built.cellOf.get(state.label) : undefined;
    built.ring.setAttribute("visibility", chosen ? "visible" : "hidden");
    if (chosen) built.ring.setAttribute("transform", `translate(${chosen.x},${chosen.y})`);
    built.scale.set(most, digits);
    built.over.setAttribute("aria-label", `${own.title} by layer; the strongest is ${ranking(own, state.entry)[0]?.label ?? "none"}`);
    what.textContent = own.has(state.entry) ? `${own.title}${where()}; click to choose one` : "Not measured at this position";
    node.querySelector("h2").textContent = `Layer by ${own.index_is}`;
    choice.draw();
  });

  function cellAt(event) {
    const box = built.over.getBoundingClientRect(), grow = built.width / box.width;
    const column = Math.floor(((event.clientX - box.left) * grow - built.left) / built.wide);
    const lane = Math.floor(((event.clientY - box.top) * grow - built.top) / built.tall);
    if (column < 0 || column >= built.columns) return undefined;
    return built.placeOf.get(lane * built.columns + column);
  }
  const pick = (one) => choose({ unit: unit().key, label: one.label, tab: unit().key });
  canvas.addEventListener("click", (event) => {
    const one = cellAt(event);
    if (one) pick(one);
  });
  canvas.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    if (!down && !right) return;
    event.preventDefault();
    event.stopPropagation();
    const at = state.unit === unit().key ? built.cellOf.get(state.label) : undefined;
    if (!at) return pick(built.cells[0]);
    const column = at.index + right;
    const next = column < 0 || column >= built.columns ? undefined : built.placeOf.get((at.lane + down) * built.columns + column);
    if (next) pick(next);
  });
  hover(canvas, (one) => {
    const line = unit().list(state.entry).find((other) => other.label === one.label);
    const order = ranking(unit(), state.entry).findIndex((other) => other.label === one.label) + 1;
    return [one.label, [["value", signed(unit().value(one.label, state.entry))], ...(line?.beside ?? []).map(([name, value]) => [name, besideText(name, value)]), ["rank by size", order || "–"]]];
  }, cellAt);

  // The same as one svg, for files.
  function picture() {
    const { wide, tall, gap, round } = built, copy = built.over.cloneNode(true);
    copy.prepend(...shown(unit()).squares.flatMap(({ x, y, fill, ink, text }) => [
      svg("rect", { x: x + gap / 2, y: y + gap / 2, width: wide - gap, height: tall - gap, rx: round, fill }),
      text ? svg("text", { x: x + wide / 2, y: y + tall / 2 + 4, "font-size": 11, "text-anchor": "middle", fill: ink }, text) : null].filter(Boolean)));
    return copy;
  }
  function table() {
    const rows = unit().list(state.entry).filter((one) => one.index !== null);
    return { columns: ["label", "layer", unit().index_is, "value"], rows: rows.map((one) => [one.label, one.layer, one.index, one.value]) };
  }
  return node;
}
