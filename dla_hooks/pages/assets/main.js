// The page as a whole.

async function begin() {
  const app = document.getElementById("app");
  if (typeof DecompressionStream === "undefined") {
    app.append(el("p", {}, "This browser is too old for this page: it needs one of 2023 or later."));
    return;
  }
  state.content = await readContent();
  const spoken = el("p", { class: "sr", role: "status", "aria-live": "polite" });
  app.append(headerPanel(), stripPanel(),
    el("div", { class: "body" },
      el("div", { class: "column" }, waterfallPanel(), heatmapPanel()),
      el("div", { class: "side" }, cardPanel())),
    tablePanel(), footPanel(), spoken);
  document.body.append(tip);
  resters.push(() => {
    const own = page(), spot = own.spots[state.entry];
    spoken.textContent = `${state.label}, ${signed(chosenValue())}${own.located ? `, at position ${spot}, ${quoted(own.tokens[spot])}` : ""}`;
  });
  readAddress();
  draw();
  addEventListener("hashchange", () => { readAddress(); turned = true; redraw(); });
  document.addEventListener("fullscreenchange", () => (document.fullscreenElement ?? document.body).append(tip));  // nothing else is in sight
  for (const [target, name] of [[darkMode, "change"], [document, "fullscreenchange"]]) target.addEventListener(name, redraw);
  addEventListener("scroll", hideTip, { passive: true });
  listenToKeys();
}

begin().catch((error) => {
  document.getElementById("app").append(el("p", { class: "notes" }, `This page cannot be shown: ${error}`));
  throw error;
});
