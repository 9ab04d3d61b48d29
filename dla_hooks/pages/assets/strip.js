// The prompt. A position is chosen here; colours are the chosen row's.

function stripPanel() {
  const choice = choiceOf("What the colours show",
    () => (readable() ? [["value", "value at each token"], ["reads", "read from each token"]] : []),
    () => state.strip, (strip) => choose({ strip }));
  const { node, what, body } = panel("tokens", "Prompt", { picture, table, choices: choice.node });
  const strip = el("div", { class: "strip", role: "listbox", "aria-label": "Tokens of the prompt", tabindex: 0, "aria-orientation": "horizontal" });
  const other = el("p", { class: "other" });
  body.append(strip, other);
  let built = null, marks = [], chosen = -1;
  let tops = null, height = 0, scrolled = 0;  // where each mark begins, read once for a layout
  let coloured = "", done = null, found = null, most = 0;

  const readable = () => Boolean(page().reads?.knows(state.label));
  const reading = () => state.strip === "reads" && readable();

  // For every token: [value, weight].
  function values() {
    const own = page();
    const found = new Map();
    if (reading()) for (const one of own.reads.of(state.label, state.entry) ?? []) found.set(one.token, [one.value, one.weight]);
    else own.spots.forEach((spot, entry) => found.set(spot, [chosenValue(entry), NaN]));
    return found;
  }

  function build(own) {
    [built, tops, coloured, chosen] = [own, null, "", -1];
    marks = own.tokens.map((token, spot) => {
      const entry = own.entryOf.get(spot);
      return el("span", { class: `at${entry === undefined ? " off" : ""}${token.length > 40 ? " wide" : ""}`, id: `token-${spot}`, role: "option", "data-mark": spot, "aria-disabled": entry === undefined }, visible(token) || "∅");
    });
    other.hidden = !own.other_tokens;
    other.replaceChildren(...[el("span", { class: "soft" }, "Second run: "), (own.other_tokens ?? []).map((token, spot) =>
      el("span", { class: token === own.tokens[spot] ? "same" : "changed" }, visible(token)))].flat());
    strip.classList.toggle("long", own.tokens.length > 150);
    strip.replaceChildren(...marks.flatMap((mark, spot) => (own.tokens[spot].includes("\n") ? [mark, el("span", { class: "break", "aria-hidden": "true" })] : [mark])));
  }

  function measure() {
    const above = marks[0]?.offsetTop ?? 0;
    tops = marks.map((mark) => mark.offsetTop - above);
    [height, scrolled] = [strip.clientHeight, strip.scrollTop];
  }

  // Of thousands of tokens those in sight are coloured, others when they are scrolled to.
  function colour(every = false) {
    const key = [state.unit, state.label, reading() ? state.entry : "", mode].join();
    if (coloured !== key) {
      coloured = key;
      found = values();
      most = largestOf([...found.values()].map(([value]) => value));
      done = new Uint8Array(marks.length);
    }
    const low = every ? -Infinity : scrolled - 60, high = every ? Infinity : scrolled + height + 60;
    for (let spot = firstOf(tops, low); spot < marks.length && tops[spot] <= high; spot++) {
      if (done[spot]) continue;
      done[spot] = 1;
      const [value] = found.get(spot) ?? [NaN];
      const { fill, ink } = shade(most > 0 ? value / most : NaN);
      marks[spot].style.background = fill === "none" ? "" : fill;
      marks[spot].style.color = fill === "none" ? "" : ink;
    }
  }

  function show(spot) {
    const top = tops[spot];
    if (top < scrolled || top + 24 > scrolled + height) strip.scrollTop = scrolled = Math.max(0, top - height / 2);
  }

  drawnBy(node, () => {
    const own = page();
    node.hidden = !own.located;
    if (node.hidden) return;
    if (built !== own) build(own);
    choice.draw();
    if (!tops) measure();
    const spot = own.spots[state.entry];
    if (chosen !== spot) {
      marks[chosen]?.classList.remove("chosen");
      marks[chosen]?.setAttribute("aria-selected", "false");
      chosen = spot;
    }
    marks[spot].classList.add("chosen");
    marks[spot].setAttribute("aria-selected", "true");
    strip.setAttribute("aria-activedescendant", `token-${spot}`);
    show(spot);
    colour();
    what.replaceChildren(reading()
      ? `What ${state.label} took from each token, for the answer read at position ${spot}`
      : own.spots.length > 1 ? `Read at position ${spot} of ${own.tokens.length - 1}. Colours: ${state.label} at each position; click to choose one` : `Read at position ${spot}`);
  });

  strip.addEventListener("scroll", () => {
    scrolled = strip.scrollTop;
    if (tops) colour();
  }, { passive: true });
  new ResizeObserver(() => {
    if (!tops) return;
    measure();
    colour();
  }).observe(strip);
  addEventListener("beforeprint", () => { if (tops) colour(true); });
  strip.addEventListener("click", (event) => {
    const entry = page().entryOf.get(Number(event.target.closest("[data-mark]")?.dataset.mark));
    if (entry !== undefined) choose({ entry });
  });
  hover(strip, (spot) => {
    const own = page();
    const [value, weight] = values().get(Number(spot)) ?? [NaN, NaN];
    const entry = own.entryOf.get(Number(spot));
    const lines = [["position", spot], [state.label, signed(value)]];
    if (Number.isFinite(weight)) lines.push(["attention", weight.toFixed(3)]);
    if (!reading() && entry !== undefined) lines.push([own.difference ? "logit difference" : "logit", signed(own.logit[entry], 3)]);
    return [quoted(own.tokens[Number(spot)]), lines];
  });

  function table() {
    const found = values();
    const rows = page().tokens.map((token, spot) => [spot, token, ...(found.get(spot) ?? [NaN, NaN])]);
    return reading() ? { columns: ["position", "token", "read", "attention"], rows } : { columns: ["position", "token", "value"], rows: rows.map((row) => row.slice(0, 3)) };
  }

  function picture() {
    const own = page(), found = values(), most = largestOf([...found.values()].map(([value]) => value));
    const wide = 1000, step = 7.6, tall = 24;
    let x = 14, y = 44;
    const drawn = own.tokens.map((token, spot) => {
      const text = shortened(visible(token) || "∅", 40);
      const width = text.length * step + 8;
      if (x + width > wide - 14) { x = 14; y += tall + 4; }
      const { fill, ink } = shade(most > 0 ? (found.get(spot)?.[0] ?? NaN) / most : NaN);
      const place = x;
      x += width + 2;
      if (token.includes("\n")) { x = 14; y += tall + 4; }
      const top = token.includes("\n") ? y - tall - 4 : y;
      return svg("g", {}, svg("rect", { x: place, y: top, width, height: tall, rx: 4, fill, stroke: own.spots[state.entry] === spot ? paint("mark") : "none", "stroke-width": 2 }),
        svg("text", { x: place + 4, y: top + 16, "font-family": "monospace", "font-size": 12.6, fill: ink, "xml:space": "preserve", textLength: text.length * step, lengthAdjust: "spacingAndGlyphs" }, text));
    });
    const height = y + tall + 16;
    return svg("svg", { width: wide, height, viewBox: `0 0 ${wide} ${height}` }, svg("text", { x: 14, y: 26, "font-size": 13, "font-weight": 600 }, what.textContent), drawn);
  }
  return node;
}

// The first of sorted numbers that is not under the least.
function firstOf(sorted, least) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < least) low = middle + 1;
    else high = middle;
  }
  return low;
}
