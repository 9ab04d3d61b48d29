// A page: entries (positions that can be chosen), units with rows, and what stands on their cards.

function makePage(page, buffer) {
  const entryOf = new Map(page.spots.map((spot, entry) => [spot, entry]));
  const units = page.units.map((unit) => makeUnit(unit, page.focus, buffer));
  const reads = page.reads && makeReads(page.reads, buffer);
  return { ...page, units, reads, entryOf, located: page.tokens.length > 0 };
}

// The same for the same entry as before: several panels ask for it at one frame.
function lastOf(make) {
  let key, found;
  return (entry) => {
    if (key !== entry) [found, key] = [make(entry), entry];
    return found;
  };
}

function makeUnit(unit, focus, buffer) {
  const column = new Map(unit.at.map((entry, place) => [entry, place]));
  const numbers = (found) => {
    const values = gridOf(found.values, buffer);
    const exact = found.exact && gridOf(found.exact, buffer);
    return (row, entry) => {
      if (exact && entry === focus) return exact.at(row, 0);
      return column.has(entry) ? values.at(row, column.get(entry)) : NaN;
    };
  };
  const at = numbers(unit);
  const beside = Object.entries(unit.beside).map(([name, found]) => [name, numbers(found)]);
  const labels = unit.rows.label;
  const numberOf = new Map(labels.map((label, row) => [label, row]));
  const rounded = Boolean(unit.values.scale);
  const made = { ...unit, labels, numberOf, rounded, has: (entry) => column.has(entry) };
  made.exactAt = (entry) => !rounded || entry === focus;

  if (unit.dense) {
    made.value = (label, entry) => (numberOf.has(label) ? at(numberOf.get(label), entry) : NaN);
    made.list = (entry) => labels.map((label, row) => line(row, label, at(row, entry), entry, row));
    made.order = (row) => row;
  } else {
    const index = gridOf(unit.index, buffer);
    const places = (entry) => {
      if (!column.has(entry)) return [];
      const own = column.get(entry);
      return Array.from({ length: index.n }, (_, place) => place).filter((place) => index.at(place, own) >= 0);
    };
    made.list = (entry) =>
      places(entry).map((place) => {
        const row = index.at(place, column.get(entry));
        return line(row, labels[row], at(place, entry), entry, place);
      });
    made.value = (label, entry) => {
      const row = numberOf.get(label);
      const place = places(entry).find((one) => index.at(one, column.get(entry)) === row);
      return place === undefined ? NaN : at(place, entry);
    };
    made.restAt = (entry) => unit.rest[column.get(entry)];
    made.remainderAt = (entry) => unit.rest_of[column.get(entry)];
  }

  function line(row, label, value, entry, place) {
    const others = beside.map(([name, numbersOf]) => [name, numbersOf(place, entry)]);
    const own = { row, label, value, beside: others, remainder: label === unit.remainder };
    for (const name of ["layer", "sub", "index", "kind", "source"]) own[name] = unit.rows[name]?.[row] ?? null;
    return own;
  }
  made.besides = beside.map(([name]) => name);
  made.list = lastOf(made.list);
  made.ranking = lastOf((entry) => made.list(entry).filter((one) => !one.remainder && Number.isFinite(one.value)).sort((a, b) => Math.abs(b.value) - Math.abs(a.value)));
  return made;
}

function makeReads(reads, buffer) {
  const column = new Map(reads.at.map((entry, place) => [entry, place]));
  const [head, token, values] = [reads.head, reads.token, reads.values].map((one) => gridOf(one, buffer));
  const weight = reads.weight && gridOf(reads.weight, buffer);
  const numberOf = new Map(reads.heads.map((label, number) => [label, number]));
  const of = (label, entry) => {
    const number = numberOf.get(label);
    if (number === undefined || !column.has(entry)) return null;
    const own = column.get(entry);
    const found = [];
    for (let place = 0; place < head.n; place++) {
      if (head.at(place, own) !== number) continue;
      found.push({ token: token.at(place, own), value: values.at(place, own), weight: weight ? weight.at(place, own) : NaN });
    }
    return found;
  };
  return { cut: reads.cut, at: reads.at, knows: (label) => numberOf.has(label), of };
}

// The unit whose rows make up the stream, in its order.
const streamUnit = (page) => page.units.find((one) => one.dense && !one.cumulative && !one.index_is) ?? page.units.find((one) => one.dense && !one.cumulative);
const gridUnits = (page) => page.units.filter((one) => one.dense && one.chart === "heatmap" && one.rows.index && one.rows.layer);
const ranking = (unit, entry) => unit.ranking(entry);
