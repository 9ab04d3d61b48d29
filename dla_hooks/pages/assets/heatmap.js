// Layer by head (or by expert): one square for each. It is built once, and then only coloured.

function heatmapPanel() {
  const choice = choiceOf("Which grid", () => gridUnits(page()).map((one) => [one.key, one.title]), () => unit()?.key, (grid) => choose({ grid }));
  const { node, what, body } = panel("heads", "Layer by head", { picture: () => built.picture, table, choices: choice.node });
  const canvas = el("div", { class: "canvas", tabindex: 0, role: "group", "aria-label": "Grid of layers and heads; arrow keys choose one" });
  body.append(canvas);
  let built = { key: "", cells: [], picture: null };

  const unit = () => gridUnits(page()).find((one) => one.key === state.grid) ?? gridUnits(page())[0];

  function build(own, width) {
    const rows = own.list(state.entry).filter((one) => one.layer !== null && one.index !== null);
    const several = new Set(rows.map((one) => one.kind)).size > 1;
    const laneOf = (one) => `${one.layer}${one.sub ? `.${one.sub}` : ""}${several ? ` ${one.kind}` : ""}`;
    const lanes = [...new Set(rows.map(laneOf))];
    const columns = Math.max(...rows.map((one) => one.index)) + 1;
    const left = several ? 92 : 40, top = 20;
    const wide = Math.min(columns < 9 ? 74 : 46, (width - left - 8) / columns), tall = Math.max(7, Math.min(wide, 34, 620 / lanes.length));
    const gap = wide > 12 ? 1.5 : 0.5;
    const numbers = wide >= 36 && tall >= 18;
    const cells = rows.map((one) => {
      const lane = lanes.indexOf(laneOf(one));
      const x = left + one.index * wide, y = top + lane * tall;
      const box = svg("rect", { x: x + gap / 2, y: y + gap / 2, width: wide - gap, height: tall - gap, rx: wide > 12 ? 2.5 : 0, class: "cell", "data-mark": one.row });
      const text = numbers ? svg("text", { x: x + wide / 2, y: y + tall / 2 + 4, "font-size": 11, "text-anchor": "middle", "pointer-events": "none" }) : null;
      return { ...one, lane, x, y, box, text };
    });
    const every = (step) => Math.max(1, Math.ceil(18 / step));
    const height = top + lanes.length * tall + 52;
    const ring = svg("rect", { class: "ring", width: wide, height: tall, rx: 3 });
    const scale = svg("g", {});
    const axes = [
      ...lanes.map((name, i) => (i % every(tall) ? null : svg("text", { x: left - 7, y: top + i * tall + tall / 2 + 4, "font-size": 11, "text-anchor": "end", class: "axis" }, name))),
      ...Array.from({ length: columns }, (_, i) => (i % every(wide) ? null : svg("text", { x: left + i * wide + wide / 2, y: 13, "font-size": 11, "text-anchor": "middle", class: "axis" }, i))),
      svg("text", { x: 2, y: 13, "font-size": 11, class: "axis" }, "layer"),
    ];
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" }, axes, cells.map((one) => [one.box, one.text]), ring, scale);
    const numberOf = new Map(cells.map((one) => [one.row, one]));
    return { cells, numberOf, picture, ring, scale, tall, wide, columns, left, bottom: top + lanes.length * tall, width };
  }

  drawers.push(() => {
    const own = unit();
    node.hidden = !own;
    if (node.hidden) return;
    const width = Math.max(300, canvas.clientWidth);
    const key = [state.page, own.key, width, darkMode.matches].join();
    if (built.key !== key) {
      built = { key, ...build(own, width) };
      canvas.replaceChildren(built.picture);
    }
    const values = built.cells.map((one) => own.value(one.label, state.entry));
    const most = largestOf(values), digits = Math.max(1, digitsFor(most) - 1);
    const fits = 6.6 * signed(-most, digits).length < built.wide - 3;
    built.cells.forEach((one, i) => {
      const { fill, ink } = shade(most > 0 ? values[i] / most : NaN);
      one.box.setAttribute("fill", fill);
      if (one.text) {
        one.text.textContent = fits && Number.isFinite(values[i]) ? signed(values[i], digits) : "";
        one.text.setAttribute("fill", ink);
        one.text.style.fill = ink;
      }
    });
    const chosen = state.unit === own.key && built.cells.find((one) => one.label === state.label);
    built.ring.setAttribute("visibility", chosen ? "visible" : "hidden");
    if (chosen) { built.ring.setAttribute("x", chosen.x); built.ring.setAttribute("y", chosen.y); }
    const span = Math.min(220, Math.max(150, built.wide * built.columns));
    built.scale.replaceChildren(legend(most, span, built.left, built.bottom + 14, digits));
    built.picture.setAttribute("aria-label", `${own.title} by layer; the strongest is ${ranking(own, state.entry)[0]?.label ?? "none"}`);
    what.textContent = own.has(state.entry) ? `${own.title}${where()}; click to choose one` : "Not measured at this position";
    node.querySelector("h2").textContent = `Layer by ${own.index_is}`;
    choice.draw();
  });

  const pick = (one) => choose({ unit: unit().key, label: one.label, tab: unit().key });
  canvas.addEventListener("click", (event) => {
    const one = built.numberOf.get(Number(event.target.closest("[data-mark]")?.dataset.mark));
    if (one) pick(one);
  });
  canvas.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    if (!down && !right) return;
    event.preventDefault();
    event.stopPropagation();
    const at = built.cells.find((one) => state.unit === unit().key && one.label === state.label);
    if (!at) return pick(built.cells[0]);
    const next = built.cells.find((one) => one.lane === at.lane + down && one.index === at.index + right);
    if (next) pick(next);
  });
  hover(canvas, (row) => {
    const one = built.numberOf.get(Number(row));
    const order = ranking(unit(), state.entry).findIndex((other) => other.label === one.label) + 1;
    return [one.label, [["value", signed(unit().value(one.label, state.entry))], ["rank by size", order || "–"]]];
  });

  function table() {
    const rows = unit().list(state.entry).filter((one) => one.index !== null);
    return { columns: ["label", "layer", unit().index_is, "value"], rows: rows.map((one) => [one.label, one.layer, one.index, one.value]) };
  }
  return node;
}
