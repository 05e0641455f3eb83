// The heatmaps' section: one panel, or two side by side. A panel has what is chosen, the picture, its numbers, and the rows
// as curves.

const LONGEST_SIDE = 460;

class Heatmaps {
  constructor(page) {
    this.page = page;
    this.data = null;
    this.sameColors = true;
    this.small = element("small", {}, "A, A_LM, A_P and G_LM of one fixed validation row, at validations");
    this.panels = [new HeatmapPanel(this, "heat")];
    this.body = element("div", { class: "pair" }, this.panels[0].body);
    this.beside = this.switch("heat-beside", "Two side by side", false, (on) => this.showSecond(on));
    this.same = this.switch("heat-same", "The same colours in both", true, (on) => { this.sameColors = on; this.draw(); });
    this.same.hidden = true;
    this.section = element("section", { class: "section", id: "heatmaps", "data-name": "Heatmaps" }, element("h2", {}, "Heatmaps", this.small),
      element("div", { class: "tools" }, this.beside, this.same), this.body);
    this.seen = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && this.open(), { rootMargin: "400px" });
    this.seen.observe(this.section);
  }

  switch(id, words, checked, change) {
    const box = element("input", { type: "checkbox", id, checked });
    box.addEventListener("change", () => change(box.checked));
    return element("label", { class: "check" }, box, element("span", {}, words));
  }

  // The second panel begins with another run than the first, or, of a single run, with its first snapshot.
  showSecond(shown) {
    const [first, second] = this.panels;
    if (second) second.stop();
    this.panels = [first];
    if (shown) {
      const runs = Object.keys(this.data || {});
      const run = runs[runs.indexOf(first.chosen.run) + 1] ?? runs.find((name) => name !== first.chosen.run) ?? first.chosen.run;
      const other = run === first.chosen.run ? 0 : nearest((this.data?.[run]?.steps || []).map(({ step }) => step), first.now?.step ?? 0);
      this.panels.push(new HeatmapPanel(this, "heat2", { ...first.chosen, run, step: other }));
    }
    this.same.hidden = !shown;
    this.body.classList.toggle("two", shown);
    this.body.replaceChildren(...this.panels.map((panel) => panel.body));
    if (shown && this.data) this.panels[1].choices();
    this.draw();
  }

  // The data is large: it is read once the section comes into sight.
  open() {
    if (this.data) return;
    this.seen.disconnect();
    this.take(JSON.parse(byId("snapshots").textContent));
  }

  take(data) {
    const before = this.data;
    this.data = data;
    for (const panel of this.panels) panel.take(before);
    this.draw();
  }

  draw() {
    if (this.data) for (const panel of this.panels) panel.draw();
  }

  // A choice of one panel changes the colours of both where these are the same.
  changed(panel) {
    for (const each of this.sameColors ? this.panels : [panel]) each.draw();
  }

  // The ends of a panel's colours. Tensors with signs share no colours with those without.
  ends(panel) {
    const together = this.sameColors ? this.panels.filter((each) => each.signed === panel.signed && each.chosen.values === panel.chosen.values) : [panel];
    const found = together.flatMap((each) => each.statistics());
    const [low, high] = scaleOver(found, panel.signed);
    return panel.chosen.values === "rows" ? [(low - high) / 2, (high - low) / 2] : [low, high];
  }
}

class HeatmapPanel {
  constructor(owner, prefix, chosen = {}) {
    this.owner = owner;
    this.prefix = prefix;
    this.chosen = { run: null, tensor: "A", layer: 0, head: 0, step: 0, view: "one", values: "values", scale: "step", ...chosen };
    this.cell = null;
    this.timer = 0;
    this.body = element("div", { class: "card heatmaps" });
    this.build();
  }

  // News: a panel that showed the last snapshot shows the new last one, any other the step that it showed.
  take(before) {
    const { chosen } = this;
    const old = before?.[chosen.run]?.steps || [];
    const atEnd = !before || chosen.step === old.length - 1;
    const step = old[chosen.step]?.step;
    const runs = Object.keys(this.data);
    if (!runs.includes(chosen.run)) chosen.run = runs[0] ?? null;
    const same = this.steps.findIndex((each) => each.step >= step);
    chosen.step = atEnd || same < 0 ? this.steps.length - 1 : same;
    this.choices();
  }

  get data() { return this.owner.data; }

  get steps() { return this.data?.[this.chosen.run]?.steps || []; }

  get now() { return this.steps[this.chosen.step]; }

  picture(step = this.now, layer = this.chosen.layer) { return step?.tensors[this.chosen.tensor]?.[layer]; }

  get signed() { return SIGNED.has(this.chosen.tensor); }

  // ------------------------------------------------------------------------------------------------------- controls

  build() {
    const { chosen } = this;
    const select = (label, name) => {
      const change = (value) => { chosen[name] = name === "run" ? value : Number(value); this.changed(name); };
      const box = listBox([], null, change, `${this.prefix}-${name}`);
      this[`${name}Box`] = box;
      return element("label", { class: "pick" }, element("span", {}, label), box);
    };
    const radios = (label, name, options) => {
      const inputs = options.map(([value, words]) => {
        const input = element("input", { type: "radio", name: `${this.prefix}-${name}`, value, checked: value === chosen[name] });
        input.addEventListener("change", () => { chosen[name] = value; this.changed(name); });
        return element("label", {}, input, element("span", {}, words));
      });
      const made = element("fieldset", { class: "switch" }, element("legend", {}, label), element("div", {}, ...inputs));
      this[`${name}Radios`] = made;
      return made;
    };
    this.slider = element("input", { type: "range", id: `${this.prefix}-step`, min: 0, max: 0, step: 1, value: 0 });
    this.slider.addEventListener("input", () => { this.stop(); chosen.step = Number(this.slider.value); this.changed("step"); });
    this.stepText = element("output", { for: `${this.prefix}-step` });
    this.player = element("button", { type: "button", "aria-pressed": "false" }, "▶ Play");
    this.player.addEventListener("click", () => (this.timer ? this.stop() : this.play()));
    this.canvas = element("canvas", { class: "matrix", tabindex: "0", role: "img" });
    this.rows = element("canvas", { class: "rows", role: "img" });
    this.trend = element("canvas", { class: "rows", role: "img" });
    this.bar = element("canvas", { class: "bar", "aria-hidden": "true" });
    this.ends = element("div", { class: "ends" });
    this.reading = element("p", { class: "reading", "aria-live": "polite" });
    this.numbers = element("dl", { class: "facts" });
    this.rowsBox = element("div", {}, element("h3", {}, "Its rows as curves"), this.rows,
      element("p", { class: "quiet" }, "Each row of the matrix is a line, the mean row the thick one. Equal rows lie on one another: the map has collapsed."));
    this.trendBox = element("div", {}, element("h3", {}, "Row-map collapse over the snapshots"), this.trend,
      element("p", { class: "quiet" }, "Share of the variance that lies between the rows: 0 when all rows are equal."));
    this.notice = element("p", { class: "hint" });
    this.body.append(
      element("div", { class: "picks" }, select("Run", "run"), radios("Tensor", "tensor", ["A", "A_LM", "A_P", "G_LM"].map((name) => [name, name])),
        select("Layer", "layer"), select("Head", "head"), radios("Show", "view", [["one", "One matrix"], ["all", "All heads, all layers"]]),
        radios("Values", "values", [["values", "As they are"], ["rows", "Less the mean row"]]),
        radios("Colour scale", "scale", [["step", "This step"], ["all", "All steps"]])),
      element("div", { class: "slide" }, this.player, element("label", { for: `${this.prefix}-step` }, "Step"), this.slider, this.stepText),
      this.notice,
      element("div", { class: "pictures" }, element("div", { class: "left" }, this.canvas, this.bar, this.ends, this.reading),
        element("div", { class: "right" }, this.numbers, this.rowsBox, this.trendBox)));
    this.canvas.addEventListener("pointermove", (event) => { this.cell = this.cellAt(event); this.read(); });
    this.canvas.addEventListener("pointerleave", () => { this.cell = null; this.read(); });
    this.canvas.addEventListener("click", (event) => this.clicked(this.cellAt(event)));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  // What there is to choose from; a choice that is no longer there becomes the first one.
  choices() {
    const { chosen } = this;
    const fill = (box, entries) => {
      const wanted = entries.map(([value, words]) => `${value} ${words}`).join("\n");
      if (box.dataset.entries !== wanted) box.replaceChildren(...entries.map(([value, words]) => element("option", { value }, words)));
      box.dataset.entries = wanted;
    };
    chosen.step = Math.max(0, Math.min(chosen.step, this.steps.length - 1));
    const tensors = Object.keys(this.now?.tensors || {});
    if (tensors.length && !tensors.includes(chosen.tensor)) chosen.tensor = tensors[0];
    for (const input of this.tensorRadios.querySelectorAll("input")) {
      input.checked = input.value === chosen.tensor;
      input.disabled = !tensors.includes(input.value);
    }
    for (const input of this.viewRadios.querySelectorAll("input")) input.checked = input.value === chosen.view;
    const layers = Object.keys(this.now?.tensors[chosen.tensor] || {}).map(Number);
    if (!layers.includes(chosen.layer)) chosen.layer = layers[0] ?? 0;
    const heads = this.picture()?.heads.length || 0;
    if (chosen.head >= heads) chosen.head = 0;
    fill(this.runBox, Object.keys(this.data).map((name) => [name, name]));
    fill(this.layerBox, layers.map((layer) => [layer, `layer ${layer}`]));
    fill(this.headBox, Array.from({ length: heads }, (_, head) => [head, `head ${head}`]));
    [this.runBox.value, this.layerBox.value, this.headBox.value] = [chosen.run, chosen.layer, chosen.head];
    this.runBox.parentElement.hidden = Object.keys(this.data).length < 2;
    this.slider.max = Math.max(0, this.steps.length - 1);
    this.slider.value = chosen.step;
    this.slider.disabled = this.player.disabled = this.steps.length < 2;
    this.stepText.textContent = this.now ? `${count(this.now.step)} (${chosen.step + 1} of ${this.steps.length})` : "";
    this.slider.setAttribute("aria-valuetext", this.now ? `step ${count(this.now.step)}` : "no snapshot");
    this.explain();
  }

  explain() {
    const held = this.data[this.chosen.run];
    const picture = this.picture();
    const parts = [];
    if (held && held.steps.length < held.of) parts.push(`${held.steps.length} of the ${held.of} snapshots are on this page, evenly spread, to keep it small.`);
    if (picture && picture.rows < picture.of[0]) parts.push(`Shown as ${picture.rows} x ${picture.columns} means of the ${picture.of.join(" x ")} values.`);
    this.notice.textContent = parts.join(" ");
  }

  changed(name) {
    if (name === "run") { this.stop(); this.chosen.step = this.steps.length - 1; }
    this.cell = null;
    this.choices();
    this.owner.changed(this);
  }

  play() {
    if (this.chosen.step >= this.steps.length - 1) this.chosen.step = -1;
    const next = () => {
      this.chosen.step += 1;
      if (this.chosen.step >= this.steps.length - 1) this.stop();
      this.changed("step");
    };
    this.timer = setInterval(next, 450);
    this.player.textContent = "❚❚ Pause";
    this.player.setAttribute("aria-pressed", "true");
    next();
  }

  stop() {
    clearInterval(this.timer);
    this.timer = 0;
    this.player.textContent = "▶ Play";
    this.player.setAttribute("aria-pressed", "false");
  }

  // -------------------------------------------------------------------------------------------------------- drawing

  // All matrices in sight: their places in the grid, one alone being a grid of its own.
  tiles() {
    const { chosen, now } = this;
    const layers = now?.tensors[chosen.tensor] || {};
    if (chosen.view === "one") return this.picture() ? [{ layer: chosen.layer, head: chosen.head, row: 0, column: 0, picture: this.picture() }] : [];
    return Object.keys(layers).map(Number).flatMap((layer, row) =>
      layers[layer].heads.map((_, head) => ({ layer, head, row, column: head, picture: layers[layer] })));
  }

  // Of all matrices in sight, at this step or at all steps of the run.
  statistics() {
    const steps = this.chosen.scale === "all" ? this.steps : [this.now];
    const tiles = this.tiles();
    return steps.flatMap((step) => tiles.map(({ layer, head }) => [this.picture(step, layer), head]))
      .filter(([picture, head]) => picture && head < picture.heads.length).map(([picture, head]) => statisticsOf(picture, head));
  }

  draw() {
    const tiles = this.tiles();
    this.body.classList.toggle("grid-view", this.chosen.view === "all");
    this.rowsBox.hidden = this.chosen.view === "all";
    if (!tiles.length) {
      this.canvas.width = this.canvas.height = 0;
      this.reading.textContent = "There is nothing to show of this tensor at this step.";
      return;
    }
    const ends = this.owner.ends(this);
    const colors = palette(this.signed || this.chosen.values === "rows");
    this.drawTiles(tiles, ends, colors);
    this.drawBar(ends, colors);
    this.showNumbers(tiles);
    if (this.chosen.view === "one") drawRows(this.rows, tiles[0].matrix);
    drawTrend(this.trend, { steps: this.steps, now: this.now, chosen: this.chosen, pictureAt: (step) => this.picture(step) });
    this.read();
  }

  drawTiles(tiles, ends, colors) {
    const one = this.chosen.view === "one";
    const [height, width] = ["rows", "columns"].map((side) => Math.max(...tiles.map((tile) => tile.picture[side])));
    const gap = one ? 0 : Math.ceil(width / 16);
    const rows = height + gap, columns = width + gap;
    const down = Math.max(...tiles.map((tile) => tile.row)) + 1, across = Math.max(...tiles.map((tile) => tile.column)) + 1;
    const small = document.createElement("canvas");
    [small.width, small.height] = [columns * across - gap, rows * down - gap];
    const pen = small.getContext("2d");
    const image = pen.createImageData(small.width, small.height);
    for (const tile of tiles) {
      tile.matrix = matrixOf(tile.picture, tile.head);
      const values = this.chosen.values === "rows" ? lessMeanRow(tile.matrix) : tile.matrix.values;
      paint(image, tile.matrix, values, ends, colors, tile.column * columns, tile.row * rows);
    }
    pen.putImageData(image, 0, 0);
    const room = Math.max(120, Math.floor(this.canvas.parentElement.clientWidth) || LONGEST_SIDE);
    const edge = one ? { left: 0, top: 0 } : { left: 52, top: 18 };
    const wide = (one ? Math.min(room, LONGEST_SIDE) : Math.min(room, 200 * across)) - edge.left;
    const zoom = wide / small.width;
    const ratio = window.devicePixelRatio || 1;
    const [full, tall] = [wide + edge.left, Math.round(small.height * zoom) + edge.top];
    [this.canvas.style.width, this.canvas.style.height] = [`${full}px`, `${tall}px`];
    [this.canvas.width, this.canvas.height] = [Math.round(full * ratio), Math.round(tall * ratio)];
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.imageSmoothingEnabled = zoom * ratio < 1;
    context.drawImage(small, edge.left, edge.top, wide, tall - edge.top);
    this.shown = { tiles, rows, columns, edge, zoom };
    if (!one) this.drawLabels(context, tiles);
    const { chosen } = this;
    const what = chosen.view === "one" ? `layer ${chosen.layer}, head ${chosen.head}` : "all layers and heads";
    this.canvas.setAttribute("aria-label", `${chosen.tensor} of ${chosen.run}, ${what}, step ${count(this.now.step)}. ` +
      `${chosen.view === "one" ? "Arrow keys read values." : "Arrow keys choose, Enter shows one."}`);
  }

  drawLabels(context, tiles) {
    const { rows, columns, edge, zoom } = this.shown;
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--quiet");
    context.font = "11px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
    context.textBaseline = "middle";
    const word = columns * zoom > 60 ? "head " : "";
    for (const tile of tiles.filter((each) => each.row === 0)) context.fillText(`${word}${tile.head}`, edge.left + tile.column * columns * zoom, 8);
    for (const tile of tiles.filter((each) => each.column === 0)) {
      context.fillText(`layer ${tile.layer}`, 0, edge.top + (tile.row * rows + tile.picture.rows / 2) * zoom);
    }
  }

  drawBar([low, high], colors) {
    [this.bar.width, this.bar.height] = [colors.length, 1];
    const context = this.bar.getContext("2d");
    const image = context.createImageData(colors.length, 1);
    colors.forEach((color, n) => image.data.set([...color, 255], 4 * n));
    context.putImageData(image, 0, 0);
    this.bar.style.width = this.ends.style.width = this.canvas.style.width;
    const tiles = this.shown.tiles;
    const beyond = tiles.some((tile) => tile.matrix.min < low || tile.matrix.max > high) && this.chosen.values === "values";
    this.ends.replaceChildren(...[low, (low + high) / 2, high].map((value) => element("span", {}, figure(value, 3))));
    this.ends.title = beyond ? "1st and 99th percentile; rarer values have the colour of the end" : "";
  }

  showNumbers(tiles) {
    const found = tiles.map((tile) => tile.matrix).filter((matrix) => matrix.low !== null);
    const collapse = found.filter((matrix) => matrix.collapse !== null);
    const share = meanOf(collapse.map((matrix) => matrix.collapse));
    const missing = tiles.reduce((sum, tile) => sum + tile.matrix.missing, 0);
    const facts = [
      ["Lowest", figure(found.length ? Math.min(...found.map((matrix) => matrix.min)) : null)],
      ["Mean", figure(meanOf(found.map((matrix) => matrix.mean)))],
      ["Highest", figure(found.length ? Math.max(...found.map((matrix) => matrix.max)) : null)],
      ["Percentiles 1, 99", found.length ? `${figure(Math.min(...found.map((matrix) => matrix.low)), 3)}, ${figure(Math.max(...found.map((matrix) => matrix.high)), 3)}` : "–"],
      ["Not finite", count(missing)],
      ["Row-map collapse", figure(share, 3)],
    ];
    const words = share === null ? "" : share <= 0.01 ? "The rows are alike: the map has collapsed." : share < 0.1 ? "The rows are nearly alike." : "The rows differ.";
    this.numbers.replaceChildren(...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
      share === null ? "" : element("div", { class: "collapse" }, element("progress", { class: "progress", max: 1, value: share, "aria-label": "row-map collapse" }), element("span", {}, words)));
  }

  // -------------------------------------------------------------------------------------------------------- read-out

  cellAt(event) {
    if (!this.shown) return null;
    const box = this.canvas.getBoundingClientRect();
    const { rows, columns, edge, zoom, tiles } = this.shown;
    const x = Math.floor((event.clientX - box.left - edge.left) / zoom), y = Math.floor((event.clientY - box.top - edge.top) / zoom);
    const tile = tiles.find((each) => each.row === Math.floor(y / rows) && each.column === Math.floor(x / columns));
    const [row, column] = [y % rows, x % columns];
    return tile && row >= 0 && column >= 0 && row < tile.matrix.rows && column < tile.matrix.columns ? { tile, row, column } : null;
  }

  read() {
    const { cell } = this;
    if (!cell) {
      this.reading.textContent = this.chosen.view === "one" ? "Point at a value, or use the arrow keys, to read it." : "Point at a value to read it; click a matrix to see it alone.";
      return;
    }
    const { tile: { layer, head, matrix }, row, column } = cell;
    const value = matrix.values[row * matrix.columns + column];
    const less = this.chosen.values === "rows" && Number.isFinite(value) ? `, ${figure(value - meanRow(matrix)[column])} from the mean row` : "";
    const place = (at, axis) => (matrix.of[axis] === [matrix.rows, matrix.columns][axis] ? at : `about ${Math.floor((at * matrix.of[axis]) / [matrix.rows, matrix.columns][axis])}`);
    this.reading.textContent = `layer ${layer}, head ${head}, row ${place(row, 0)}, column ${place(column, 1)}: ` +
      `${Number.isFinite(value) ? `${figure(value)} (of 8 bits)` : "not finite"}${less}`;
  }

  clicked(cell) {
    if (!cell || this.chosen.view === "one") return;
    Object.assign(this.chosen, { layer: cell.tile.layer, head: cell.tile.head, view: "one" });
    this.changed("view");
  }

  key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.ctrlKey || event.metaKey || event.altKey || !this.shown) return;
    const { tiles } = this.shown;
    if (event.key === "Enter" && this.cell) this.clicked(this.cell);
    else if (!moves[event.key]) return;
    else if (!this.cell) this.cell = { tile: tiles[0], row: 0, column: 0 };
    else if (this.chosen.view === "one") {
      const { matrix } = this.cell.tile;
      const bounded = (value, most) => Math.max(0, Math.min(most - 1, value));
      this.cell.row = bounded(this.cell.row + moves[event.key][0] * (event.shiftKey ? 10 : 1), matrix.rows);
      this.cell.column = bounded(this.cell.column + moves[event.key][1] * (event.shiftKey ? 10 : 1), matrix.columns);
    } else {
      const { tile } = this.cell;
      const next = tiles.find((each) => each.row === tile.row + moves[event.key][0] && each.column === tile.column + moves[event.key][1]);
      if (next) this.cell = { tile: next, row: 0, column: 0 };
    }
    event.preventDefault();
    this.read();
  }
}
