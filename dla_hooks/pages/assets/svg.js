// Pictures that panels share, and tables as pictures for what is html on the page.

// A scale of colours; set() changes what its ends mean.
function legend(width, x, y) {
  const n = 40;
  const marks = Array.from({ length: n }, (_, i) =>
    svg("rect", { x: x + (i * width) / n, y, width: width / n + 0.5, height: 8, fill: shade((2 * (i + 0.5)) / n - 1).fill }));
  const label = (at, anchor) => svg("text", { x: at, y: y + 21, "font-size": 11, "text-anchor": anchor, class: "axis" }, "0");
  const low = label(x, "start"), high = label(x + width, "end");
  const set = (most, digits) => { [low.textContent, high.textContent] = [signed(-most, digits), signed(most, digits)]; };
  return { node: svg("g", {}, marks, low, label(x + width / 2, "middle"), high), set };
}

// A bar from the middle, as one element: a table has hundreds.
function meter(value, most) {
  const share = most > 0 && Number.isFinite(value) ? Math.min(1, Math.abs(value) / most) : 0;
  const node = el("span", { class: `meter ${value < 0 ? "left" : "right"}`, "aria-hidden": "true" });
  node.style.setProperty("--share", `${(50 * share).toFixed(2)}%`);
  return node;
}

// Rows of text with a bar each, as one picture: [[name, value | null, note]].
function listPicture(title, rows) {
  const most = largestOf(rows.map(([, value]) => value ?? NaN));
  const digits = digitsFor(most);
  const step = 20, top = 40, width = 620, middle = 400, half = 110;
  const lines = rows.map(([name, value, note], i) => {
    const y = top + i * step;
    const text = (x, content, anchor, more = {}) => svg("text", { x, y: y + 13, "font-size": 12, "text-anchor": anchor, fill: paint("ink"), ...more }, content);
    const length = most > 0 && Number.isFinite(value) ? (half * Math.abs(value)) / most : 0;
    return [
      text(14, shortened(visible(name), 30), "start", { "font-family": "monospace", "xml:space": "preserve" }),
      value === null ? null : text(282, signed(value, digits), "end"),
      value === null ? null : svg("rect", { x: value < 0 ? middle - length : middle, y: y + 4, width: length, height: 12, fill: paint(value < 0 ? "down" : "up") }),
      note ? text(width - 14, shortened(note, 22), "end", { fill: paint("soft") }) : null,
    ];
  });
  const height = top + rows.length * step + 14;
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` },
    svg("text", { x: 14, y: 24, "font-size": 13, "font-weight": 600, fill: paint("ink") }, shortened(title, 80)), lines);
}
