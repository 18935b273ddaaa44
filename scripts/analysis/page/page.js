"use strict";
// Draws a chart when it comes near the screen; hides a setting in all charts; shows one run, matrix and step; colours of light and dark.
(() => {
  const at = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(at(id).textContent);
  const kept = (key, value) => {
    // A live page reloads: what was chosen stays. A browser may refuse storage to a file; then nothing is kept.
    try {
      if (value === undefined) return sessionStorage.getItem(key);
      sessionStorage.setItem(key, value);
    } catch { /* no storage */ }
    return null;
  };
  const runs = read("runs");
  const stores = {};
  const store = (id) => (stores[id] ??= read(id));
  const drawn = new Map(); // chart → its Bokeh document
  const hidden = new Set(JSON.parse(kept("hidden") ?? "[]")); // labels of settings
  const chips = [...document.querySelectorAll(".chip")];

  const models = (doc) => [...(doc.all_models ?? doc._all_models.values())];

  // ---- light and dark ----

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const paint = (model, ink, quiet, rule, grid) => {
    if (model.type.endsWith("Axis"))
      model.setv({ axis_line_color: rule, major_tick_line_color: rule, major_label_text_color: quiet, axis_label_text_color: quiet });
    else if (model.type === "Grid") model.setv({ grid_line_color: grid });
    else if (model.type === "ColorBar") model.setv({ major_label_text_color: quiet, major_tick_line_color: rule });
  };
  const paintAll = (documents) => {
    const colours = ["--ink", "--quiet", "--rule", "--grid"].map(colour);
    for (const doc of documents) for (const model of models(doc)) paint(model, ...colours);
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = () => {
    document.documentElement.dataset.theme = kept("theme") ?? (system.matches ? "dark" : "light");
    paintAll(drawn.values());
  };
  system.addEventListener("change", setTheme);
  at("theme").addEventListener("click", () => {
    kept("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    setTheme();
  });

  // ---- hide a setting ----

  const hideIn = (doc) => {
    const off = new Set(chips.filter((c) => hidden.has(c.dataset.label)).map((c) => `setting-${c.dataset.setting}`));
    for (const model of models(doc))
      if (model.tags?.some((tag) => String(tag).startsWith("setting-"))) model.visible = !model.tags.some((tag) => off.has(tag));
  };
  const showChips = () => chips.forEach((c) => c.setAttribute("aria-pressed", String(!hidden.has(c.dataset.label))));
  chips.forEach((chip) => chip.addEventListener("click", () => {
    const label = chip.dataset.label;
    hidden.has(label) ? hidden.delete(label) : hidden.add(label);
    kept("hidden", JSON.stringify([...hidden]));
    showChips();
    drawn.forEach(hideIn);
  }));

  // ---- one run, one matrix, one step ----

  const named = (doc, name) => models(doc).find((model) => model.name === name);
  const edges = (steps) => {
    // Each column reaches half the way to its neighbours.
    const half = steps.length > 1 ? (steps[1] - steps[0]) / 2 : 0.5;
    const left = steps.map((s, i) => (i ? (s + steps[i - 1]) / 2 : Math.max(0, s - half)));
    return [left, [...left.slice(1), steps.at(-1) + (steps.length > 1 ? (steps.at(-1) - steps.at(-2)) / 2 : 0.5)]];
  };
  const empty = (doc) => { named(doc, "cells").data = { left: [], right: [], bottom: [], top: [], value: [], row: [] }; };
  const fill = (doc, steps, grid, names, low, high, ticks, labels) => {
    const cells = { left: [], right: [], bottom: [], top: [], value: [], row: [] };
    const [left, right] = edges(steps);
    grid.forEach((line, row) => line.forEach((value, i) => {
      cells.left.push(left[i]); cells.right.push(right[i]); cells.bottom.push(row + 0.5); cells.top.push(row - 0.5);
      cells.value.push(value ?? NaN); cells.row.push(names[row]);
    }));
    named(doc, "cells").data = cells;
    named(doc, "mapper").setv({ low, high });
    named(doc, "across").setv({ start: left[0], end: right.at(-1), reset_start: left[0], reset_end: right.at(-1) });
    named(doc, "down").setv({ start: grid.length - 0.5, end: -0.5, reset_start: grid.length - 0.5, reset_end: -0.5 });
    named(doc, "rows").setv({ ticks });
    models(doc).find((m) => m.type === "LinearAxis" && m.ticker === named(doc, "rows")).major_label_overrides = new Map(labels);
  };
  const limits = (grids) => {
    let low = Infinity, high = -Infinity;
    for (const grid of grids) for (const line of grid) for (const v of line) if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); }
    if (low > high) return [0, 1];
    return high - low > 1e-3 * Math.abs(high) ? [low, high] : [low - 0.05 * Math.abs(low || 1), high + 0.05 * Math.abs(high || 1)];
  };
  const some = (count) => { // at most seven ticks
    const every = Math.ceil(count / 7);
    return [...Array(count).keys()].filter((i) => i % every === 0);
  };
  const fillSigma = (id, doc) => {
    const sigma = store(at("sigma-run").value).sigma, what = at("sigma-what").value, kind = sigma[id.slice(5)];
    if (!kind) { empty(doc); return; }
    const [low, high] = limits(Object.values(sigma).map((k) => k[what]));
    const ticks = some(kind.layers.length);
    fill(doc, kind.steps, kind[what], kind.layers.map(String), low, high, ticks, ticks.map((i) => [i, String(kind.layers[i])]));
  };
  const fillHeads = (id, doc) => {
    const heads = store(at("heads-run").value).heads, key = id.slice(6);
    if (!heads.steps) { empty(doc); return; }
    const [low, high] = key === "logit_max" ? limits([heads[key]]) : [0, 1];
    const names = heads[key].map((_, i) => `${Math.floor(i / heads.heads)}, ${i % heads.heads}`);
    const ticks = some(heads.layers).map((layer) => layer * heads.heads + (heads.heads - 1) / 2);
    fill(doc, heads.steps, heads[key], names, low, high, ticks, ticks.map((t) => [t, String(Math.floor(t / heads.heads))]));
  };
  const firsts = () => runs.map((run, i) => ({ ...run, id: `run-${i}` })).filter((run) => run.first);
  const shapeSteps = (kind) => [...new Set(firsts().flatMap((run) => store(run.id).sigma[kind]?.shape_steps ?? []))].sort((a, b) => a - b);
  const fillShape = (doc) => {
    const [kind, layer] = at("shape-matrix").value.split("|");
    const steps = shapeSteps(kind), slider = at("shape-step");
    const step = steps[Math.min(Number(slider.value), steps.length - 1)];
    at("shape-said").textContent = step === undefined ? "" : step.toLocaleString("en");
    for (const run of firsts()) {
      const found = store(run.id).sigma[kind];
      const row = found ? found.layers.indexOf(Number(layer)) : -1;
      const before = found ? found.shape_steps.filter((s) => s <= step).length - 1 : -1; // the newest record up to this step
      const shape = row < 0 || before < 0 ? [] : found.shape[row][before];
      named(doc, `shape-${run.setting}`).data = { x: shape.map((_, i) => (shape.length > 1 ? i / (shape.length - 1) : 0.5)), y: shape.map((v) => (v > 0 ? v : NaN)) };
    }
  };
  const setSlider = () => {
    const steps = shapeSteps(at("shape-matrix").value.split("|")[0]), slider = at("shape-step");
    slider.max = String(Math.max(0, steps.length - 1));
    slider.value = slider.max;
  };
  const fillChart = (id) => {
    const doc = drawn.get(id);
    if (!doc) return;
    if (id.startsWith("heat-")) fillSigma(id, doc);
    else if (id.startsWith("heads-")) fillHeads(id, doc);
    else if (id === "shape") fillShape(doc);
  };
  const fillAll = () => [...drawn.keys()].forEach(fillChart);
  if (at("shape-matrix")) {
    const kinds = new Map();
    for (const run of firsts()) for (const [kind, found] of Object.entries(store(run.id).sigma)) for (const layer of found.layers) kinds.set(`${kind}|${layer}`, `${kind}, layer ${layer}`);
    for (const [value, text] of kinds) at("shape-matrix").add(new Option(text, value));
    at("shape-matrix").addEventListener("change", setSlider);
    at("shape-step").addEventListener("input", () => fillChart("shape"));
  }
  for (const id of ["sigma-run", "sigma-what", "heads-run", "shape-matrix"]) at(id)?.addEventListener("change", () => { kept(id, at(id).value); fillAll(); });

  // ---- draw, one chart after another ----

  let queue = Promise.resolve();
  const coarse = matchMedia("(pointer: coarse)").matches;
  const draw = (place) => {
    const id = place.dataset.chart;
    if (place.dataset.state) return;
    place.dataset.state = "asked";
    queue = queue.then(async () => {
      await Bokeh.embed.embed_item(read(`json-${id}`), place.id);
      const doc = Bokeh.documents.at(-1);
      drawn.set(id, doc);
      // With a finger, dragging over a chart scrolls the page. The tools beside the chart are still there.
      if (coarse) models(doc).filter((m) => m.type === "BoxZoomTool").forEach((tool) => { tool.active = false; });
      fillChart(id);
      hideIn(doc);
      paintAll([doc]);
      place.dataset.state = "drawn";
    }).catch((error) => {
      place.dataset.state = "failed";
      place.textContent = "This chart could not be drawn.";
      console.error(error);
    });
  };
  const places = [...document.querySelectorAll(".chart")];
  const watcher = new IntersectionObserver((seen) => seen.filter((s) => s.isIntersecting).forEach((s) => { watcher.unobserve(s.target); draw(s.target); }), { rootMargin: "400px" });
  const start = () => {
    for (const id of ["sigma-run", "sigma-what", "heads-run", "shape-matrix"]) if (kept(id) && [...(at(id)?.options ?? [])].some((o) => o.value === kept(id))) at(id).value = kept(id);
    if (at("shape-matrix")?.options.length) setSlider();
    showChips();
    setTheme();
    places.forEach((place) => watcher.observe(place));
  };
  addEventListener("beforeprint", () => places.forEach(draw));
  start();

  // ---- live ----

  const every = Number(document.body.dataset.reload);
  if (every > 0) setInterval(async () => {
    try {
      const answer = await fetch("stamp", { cache: "no-store" });
      if (!answer.ok) return;
      const stamp = await answer.text();
      if (stamp !== document.body.dataset.stamp) location.reload();
    } catch { /* the server has ended; the page stays as it is */ }
  }, every * 1000);
})();
