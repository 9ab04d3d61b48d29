// Panels as files: PNG and SVG of what is drawn, CSV and JSON of its numbers.

function save(name, blob) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// A picture on its own: classes become attributes, for it has no style sheet.
function alone(picture) {
  const copy = picture.cloneNode(true);
  const width = Number(picture.getAttribute("width")), height = Number(picture.getAttribute("height"));
  const inks = { axis: { fill: paint("soft") }, rule: { stroke: paint("line") }, zero: { stroke: paint("faint") }, ring: { fill: "none", stroke: paint("mark"), "stroke-width": 2 } };
  for (const node of copy.querySelectorAll("*")) {
    for (const [name, own] of Object.entries(inks)) if (node.classList.contains(name)) for (const [key, value] of Object.entries(own)) node.setAttribute(key, value);
    if (node.tagName === "text" && !node.getAttribute("fill")) node.setAttribute("fill", paint("ink"));
    for (const key of ["class", "data-mark", "tabindex"]) node.removeAttribute(key);
  }
  for (const key of ["class", "role", "aria-label", "tabindex", "style"]) copy.removeAttribute(key);
  copy.setAttribute("xmlns", SVG);
  copy.setAttribute("font-family", "system-ui, 'DejaVu Sans', sans-serif");
  copy.prepend(svg("rect", { x: 0, y: 0, width, height, fill: paint("sheet") }));
  return { text: new XMLSerializer().serializeToString(copy), width, height };
}

async function asPng({ text, width, height }) {
  const address = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  const image = new Image();
  image.src = address;
  await image.decode();
  URL.revokeObjectURL(address);
  const canvas = el("canvas", { width: 2 * width, height: 2 * height });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.drawImage(image, 0, 0, width, height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

const field = (value) => {
  if (value === null || value === undefined || (typeof value === "number" && !Number.isFinite(value))) return "";
  const text = String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
const asCsv = ({ columns, rows }) => [columns, ...rows].map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";

function asJson({ columns, rows }) {
  const own = page();
  const about = { model: own.model, prompt: own.tokens.join(""), question: own.question, position: own.spots[state.entry], row: state.label };
  const lines = rows.map((row) => Object.fromEntries(row.map((value, i) => [columns[i], typeof value === "number" && !Number.isFinite(value) ? null : value])));
  return JSON.stringify({ ...about, records: lines }, null, 1);
}

// id: of the panel; picture(): an svg element; table(): {columns, rows}.
function exportButtons(id, picture, table) {
  const name = (ending) => `${id}-${String(state.label).replace(/[^\w.-]+/g, "_") || "page"}.${ending}`;
  const ways = {
    png: async () => save(name("png"), await asPng(alone(picture()))),
    svg: async () => save(name("svg"), new Blob([alone(picture()).text], { type: "image/svg+xml" })),
    csv: async () => save(name("csv"), new Blob([asCsv(table())], { type: "text/csv" })),
    json: async () => save(name("json"), new Blob([asJson(table())], { type: "application/json" })),
  };
  return el("span", { class: "exports", role: "group", "aria-label": "Save this panel" },
    Object.entries(ways).map(([ending, way]) => el("button", { type: "button", "data-save": ending, title: `Save as ${ending.toUpperCase()}`, onclick: way }, ending.toUpperCase())));
}
