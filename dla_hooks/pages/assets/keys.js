// The keyboard, wherever the focus is; panels with keys of their own keep them to themselves.

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches?.("input, select, textarea");
    if (typing && event.key === "Escape") return event.target.blur();
    if (typing) return;
    const own = page(), last = own.spots.length - 1;
    const actions = {
      ArrowLeft: () => choose({ entry: Math.max(0, state.entry - 1) }),
      ArrowRight: () => choose({ entry: Math.min(last, state.entry + 1) }),
      Home: () => choose({ entry: 0 }),
      End: () => choose({ entry: last }),
      ArrowDown: () => nextRow(1),
      ArrowUp: () => nextRow(-1),
      n: () => turnPage(1),
      p: () => turnPage(-1),
      "/": () => document.getElementById("search").focus(),
      Escape: () => { const best = ranking(chosenUnit(), state.entry)[0]; if (best) choose({ label: best.label }); },
    };
    if (!(event.key in actions)) return;
    if ((event.key === "Home" || event.key === "End") && !event.target.closest?.("#tokens")) return;
    if ((event.key === "ArrowDown" || event.key === "ArrowUp") && event.target.closest?.(".side")) return;
    event.preventDefault();
    actions[event.key]();
  });
}

function nextRow(by) {
  const order = ranking(chosenUnit(), state.entry);
  const at = order.findIndex((one) => one.label === state.label);
  const next = order[Math.min(order.length - 1, Math.max(0, at + by))];
  if (next) choose({ label: next.label });
}

function turnPage(by) {
  const number = Math.min(state.content.pages.length - 1, Math.max(0, state.page + by));
  if (number !== state.page) choose({ page: number });
}
