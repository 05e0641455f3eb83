// The page: what is chosen, the charts, the tables, and news of a live report.

const byId = (id) => document.getElementById(id);
const EVERY_MS = 3000;
const MOST_RUNS_AT_FIRST = 10;

class Page {
  constructor(data) {
    this.data = data;
    this.view = { axis: "step", log: false, smooth: 0, outliers: false, events: true, zoom: null };
    this.chosen = new Set(data.runs.slice(0, MOST_RUNS_AT_FIRST).map((run) => run.name));
    this.known = new Set(data.runs.map((run) => run.name));
    this.cursor = null;
    this.onlyDiffering = {};
    this.charts = new Map();
    this.seen = new IntersectionObserver((entries) => this.scrolled(entries), { rootMargin: "300px" });
    this.bindControls();
    this.show();
  }

  // ------------------------------------------------------------------------------------------------------ controls

  bindControls() {
    const view = this.view;
    for (const radio of document.getElementsByName("axis")) {
      radio.addEventListener("change", () => { view.axis = radio.value; view.zoom = null; this.cursor = null; this.refresh(); });
    }
    byId("smooth").addEventListener("input", (event) => {
      view.smooth = Number(event.target.value);
      byId("smooth-value").textContent = event.target.value;
      this.refresh();
    });
    for (const name of ["log", "outliers", "events"]) {
      byId(name).addEventListener("change", (event) => { view[name] = event.target.checked; this.redraw(); });
    }
    byId("filter").addEventListener("input", () => this.filter());
    byId("reset").addEventListener("click", () => this.zoom(null));
    const dark = matchMedia("(prefers-color-scheme: dark)");
    let theme = "auto";
    try { theme = localStorage.getItem("pldr-theme") || "auto"; } catch { /* files may have no storage */ }
    const paint = () => {
      document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
      this.redraw();
    };
    for (const radio of document.getElementsByName("theme")) {
      radio.checked = radio.value === theme;
      radio.addEventListener("change", () => {
        theme = radio.value;
        try { localStorage.setItem("pldr-theme", theme); } catch { /* as above */ }
        paint();
      });
    }
    dark.addEventListener("change", paint);
    paint();
    window.addEventListener("beforeprint", () => this.look(true));
    let waiting = 0;
    window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => this.redraw(), 80); });
    window.addEventListener("scroll", () => this.point(null), { passive: true });
  }

  // Steps as places on the chosen axis; null where a run has no count of tokens.
  axisOf(run, steps) {
    if (this.view.axis === "step") return steps;
    const tokens = run.series.tokens;
    if (!tokens || !tokens.x.length) return null;
    const { x, y } = tokens;
    return steps.map((step) => {
      const place = placeOf(x, step);
      if (x[place] === step) return y[place];
      const [x0, y0] = place === 0 ? [0, 0] : [x[place - 1], y[place - 1]];
      if (place === x.length) return x0 ? (y0 * step) / x0 : y0;
      return y0 + ((y[place] - y0) * (step - x0)) / (x[place] - x0 || 1);
    });
  }

  // -------------------------------------------------------------------------------------------------------- drawing

  show() {
    const { data } = this;
    byId("title").textContent = data.runs.length === 1 ? data.runs[0].name : `${data.runs.length} runs`;
    byId("made").textContent = `${data.live ? "Read" : "Written"} ${clock(data.made_s)} · pldr_train ${data.version}`;
    byId("problems").replaceChildren(...data.problems.map((text) => element("p", { class: "note bad" }, `Not shown: ${text}`)));
    this.showRuns();
    const folded = new Set([...byId("cards").querySelectorAll("details:not([open])")].map((each) => each.dataset.run));
    byId("cards").replaceChildren(...data.runs.map((run, place) => this.card(run, place)));
    for (const each of byId("cards").querySelectorAll("details")) if (folded.has(each.dataset.run)) each.open = false;
    this.showCharts();
    showTables(this);
    this.filter();
    this.refresh();
    this.look();
  }

  // Draws what is in sight at once: the observer tells of it a moment later.
  look(all = false) {
    const boxes = [...this.charts.values()].map((chart) => [chart, chart.figure.getBoundingClientRect()]);
    for (const [chart, box] of boxes) {
      if (!all && (box.top > innerHeight + 300 || box.bottom < -300)) continue;
      chart.onScreen = true;
      if (chart.stale) chart.draw();
    }
  }

  showRuns() {
    const names = this.data.runs.map((run) => run.name).join("\n");
    if (names === this.runsShown) return; // a live page keeps the focus
    this.runsShown = names;
    byId("runs").replaceChildren(...this.data.runs.map((run, place) => {
      const box = element("input", { type: "checkbox", checked: this.chosen.has(run.name) });
      box.addEventListener("change", () => {
        if (box.checked) this.chosen.add(run.name);
        else this.chosen.delete(run.name);
        this.refresh();
      });
      return element("label", { title: run.folder }, box,
        element("i", { class: "swatch", color: COLORS[place % COLORS.length] }), element("span", { class: "name" }, run.name));
    }));
  }

  card(run, place) {
    const last = (name) => run.series[name]?.last?.[1];
    const step = run.step ?? 0;
    const share = run.max_steps ? `of ${count(run.max_steps)}` : "";
    const perStep = run.step && last("tokens") ? `${short(last("tokens") / run.series.tokens.last[0])} a step` : "";
    const best = (name) => (run.series[name]?.low ? `lowest ${figure(run.series[name].low[1])}` : "");
    const facts = [
      ["Step", count(run.step), share],
      ["Training loss", figure(last("train/loss")), best("train/loss")],
      ["Validation loss", figure(last("val/loss")), best("val/loss")],
      ["Tokens", last("tokens") == null ? "–" : short(last("tokens")), perStep],
      ["Throughput", last("system/tokens_per_s") == null ? "–" : short(last("system/tokens_per_s")), "tokens/s"],
      ["Last written", ...clock(run.written_s).split(", ").reverse()],
    ];
    const more = run.notes.length === 1 ? "1 remark" : `${run.notes.length} remarks`;
    return element("article", { class: "card" },
      element("header", {}, element("i", { class: "swatch", color: COLORS[place % COLORS.length] }),
        element("h3", { title: run.folder }, run.name), element("span", { class: `pill ${run.state}` }, run.state)),
      element("progress", { class: "progress", max: run.max_steps || 1, value: run.max_steps ? step : 0, "aria-label": `${run.name}: steps done` }),
      element("dl", { class: "facts" }, ...facts.map(([name, value, unit]) =>
        element("div", {}, element("dt", {}, name), element("dd", {}, value, unit ? element("small", {}, unit) : null)))),
      run.notes.length ? element("details", { open: run.notes.length < 4, "data-run": run.name }, element("summary", {}, more),
        ...run.notes.map((text) => element("p", { class: "note" }, text))) : null);
  }

  showCharts() {
    const wanted = new Map(this.data.charts.map((spec) => [`${spec.section} ${spec.family}`, spec]));
    const same = wanted.size === this.charts.size && [...wanted.keys()].every((key) => this.charts.has(key));
    if (same) {
      for (const [key, spec] of wanted) this.charts.get(key).spec = spec;
      return;
    }
    this.seen.disconnect();
    this.charts = new Map([...wanted].map(([key, spec]) => [key, new Chart(spec, this.view, this)]));
    const sections = new Map();
    for (const chart of this.charts.values()) {
      const name = chart.spec.section;
      if (!sections.has(name)) sections.set(name, []);
      sections.get(name).push(chart);
    }
    byId("charts").replaceChildren(...[...sections].map(([name, charts], place) =>
      element("section", { class: "section", id: `s${place}`, "data-name": name }, element("h2", {}, name),
        element("div", { class: "grid" }, ...charts.map((chart) => chart.figure)))));
    for (const chart of this.charts.values()) this.seen.observe(chart.figure);
  }

  filter() {
    const words = byId("filter").value.toLowerCase().split(",").map((word) => word.trim()).filter(Boolean);
    const fits = (chart) => !words.length || words.some((word) =>
      word.split(/\s+/).every((part) => chart.spec.lines.some((line) => line.metric.toLowerCase().includes(part)) ||
        chart.spec.title.toLowerCase().includes(part)));
    for (const chart of this.charts.values()) chart.figure.classList.toggle("gone", !fits(chart));
    for (const chart of this.charts.values()) chart.figure.style.display = fits(chart) ? "" : "none";
    this.showContents();
  }

  showContents() {
    const found = [...document.querySelectorAll("main .section")].map((section) => {
      const figures = [...section.querySelectorAll(".chart")];
      const left = figures.filter((figure) => !figure.classList.contains("gone") && !figure.hidden).length;
      section.hidden = figures.length > 0 && left === 0;
      return section.hidden ? null : element("li", {}, element("a", { href: `#${section.id}` },
        element("span", {}, section.dataset.name), element("span", { class: "count" }, left || "")));
    });
    byId("contents").replaceChildren(...found.filter(Boolean));
  }

  // The curves have changed; charts out of sight wait until they are scrolled to.
  refresh() {
    for (const chart of this.charts.values()) chart.update();
    this.showContents();
    this.redraw();
  }

  redraw() {
    byId("reset").disabled = this.view.zoom === null;
    if (this.queued) return;
    this.queued = true;
    const go = () => {
      this.queued = false;
      for (const chart of this.charts.values()) {
        chart.stale = true;
        chart.draw();
      }
    };
    if (document.hidden) setTimeout(go, 50);
    else requestAnimationFrame(go);
  }

  scrolled(entries) {
    const charts = new Map([...this.charts.values()].map((chart) => [chart.figure, chart]));
    for (const entry of entries) {
      const chart = charts.get(entry.target);
      if (!chart) continue;
      chart.onScreen = entry.isIntersecting;
      if (chart.onScreen && chart.stale) chart.draw();
    }
  }

  zoom(range) {
    this.view.zoom = range;
    this.redraw();
  }

  // -------------------------------------------------------------------------------------------------------- read-out

  point(x, chart = null, event = null) {
    if (x === null && this.cursor === null) return;
    this.cursor = x;
    for (const each of this.charts.values()) each.drawOver();
    const tip = byId("tip");
    tip.hidden = x === null || chart === null;
    if (tip.hidden) return;
    const rows = chart.readings(x);
    const at = `${this.view.axis === "tokens" ? "tokens" : "step"} ${count(x)}`;
    if (!event) byId("said").textContent = `${at}: ${rows.slice(0, 8).map(({ curve, n }) => `${curve.name} ${figure(curve.sy[n], 5)}`).join(", ")}`;
    const shown = rows.length > 16 ? [...rows].sort((a, b) => b.curve.sy[b.n] - a.curve.sy[a.n]).slice(0, 16) : rows;
    tip.replaceChildren(element("div", { class: "at" }, at),
      element("table", {}, ...shown.map(({ curve, n }) => element("tr", {},
        element("td", {}, element("i", { class: "swatch", color: curve.color })), element("td", {}, curve.name),
        element("td", { class: "value" }, figure(curve.sy[n], 5)),
        element("td", { class: "quiet" }, curve.sx[n] === x ? "" : `at ${short(curve.sx[n])}`)))),
      rows.length > shown.length ? element("div", { class: "at" }, `and ${rows.length - shown.length} lower ones`) : "");
    const box = chart.plot.getBoundingClientRect();
    const left = event ? event.clientX : box.left + chart.scale.toX(x);
    const top = event ? event.clientY : box.top + 30;
    const beside = left + 18 + tip.offsetWidth > innerWidth ? left - 18 - tip.offsetWidth : left + 18;
    tip.style.left = `${Math.max(4, beside)}px`;
    tip.style.top = `${Math.max(4, Math.min(top + 14, innerHeight - tip.offsetHeight - 6))}px`;
  }

  // ------------------------------------------------------------------------------------------------------------ live

  async follow() {
    const sign = byId("live");
    sign.hidden = false;
    sign.textContent = "live";
    let tag = null;
    for (;;) {
      await new Promise((done) => setTimeout(done, EVERY_MS));
      if (document.hidden) continue;
      try {
        const answer = await fetch("data.json", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
        if (answer.status === 200) {
          tag = answer.headers.get("ETag");
          this.data = await answer.json();
          for (const run of this.data.runs) if (!this.known.has(run.name)) { this.known.add(run.name); this.chosen.add(run.name); }
          this.show();
        }
        sign.textContent = "live";
        sign.classList.remove("lost");
      } catch {
        sign.textContent = "no answer";
        sign.classList.add("lost");
      }
    }
  }
}

// -------------------------------------------------------------------------------------------------------------- tables

function panelTable(head, rows, label) {
  return element("div", { class: "panel", tabindex: "0", role: "region", "aria-label": label },
    element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
}

const headCell = (text, number) => element("th", { scope: "col", class: number ? "number" : null }, text);

function section(id, name, small, ...children) {
  return element("section", { class: "section", id, "data-name": name },
    element("h2", {}, name, small ? element("small", {}, small) : null), ...children);
}

function valuesTable({ data }) {
  const names = data.charts.flatMap((chart) => chart.lines.map((line) => line.metric));
  const rows = names.map((name) => element("tr", {}, element("th", { scope: "row" }, name), ...data.runs.flatMap((run) => {
    const series = run.series[name];
    const cell = (pair) => element("td", { class: "number" }, pair ? figure(pair[1], 5) : "–", pair ? element("small", {}, ` @${count(pair[0])}`) : null);
    return series ? [cell(series.last), cell(series.low), cell(series.high)] : [cell(), cell(), cell()];
  })));
  const head = [headCell("Metric"), ...data.runs.flatMap((run) => {
    const name = data.runs.length > 1 ? `${run.name}: ` : "";
    return [headCell(`${name}last`, true), headCell("lowest", true), headCell("highest", true)];
  })];
  return names.length ? section("values", "Values", "last, lowest and highest, and the step of each", panelTable(head, rows, "Values of all metrics")) : null;
}

function eventsTable({ data }) {
  const rows = data.runs.flatMap((run) => run.events.map((event) => element("tr", {}, element("td", {}, run.name),
    element("td", {}, event.kind === "nonfinite" ? "not finite" : event.kind), element("td", { class: "number" }, count(event.step)), element("td", {}, event.text))));
  const head = [headCell("Run"), headCell("What"), headCell("Step", true), headCell("Details")];
  return rows.length ? section("events-list", "Events", `${rows.length}: steps that were not finite, documents that could not be read`, panelTable(head, rows, "Events"))
    : section("events-list", "Events", "", element("p", { class: "quiet" }, "No step that was not finite, and no document that could not be read."));
}

function comparison(page, key, name, id) {
  const { data } = page;
  const entries = data[key];
  if (!entries.length) return null;
  const differing = entries.filter((entry) => entry.differs);
  const holder = element("div");
  const only = element("input", { type: "checkbox", id: `only-${key}`, checked: differing.length > 0 && page.onlyDiffering[key] !== false });
  const fill = () => {
    const shown = only.checked ? differing : entries;
    const rows = shown.map((entry) => element("tr", { class: entry.differs ? "differs" : "" }, element("th", { scope: "row" }, entry.key),
      ...entry.values.map((value) => element("td", { class: "code" }, value))));
    holder.replaceChildren(panelTable([headCell("Key"), ...data.runs.map((run) => headCell(run.name))], rows, name));
  };
  only.addEventListener("change", () => { page.onlyDiffering[key] = only.checked; fill(); });
  fill();
  const small = data.runs.length > 1 ? (differing.length ? `${differing.length} of ${entries.length} keys differ between the runs` : "the same in all runs") : "";
  const tools = differing.length ? element("div", { class: "tools" }, element("label", { class: "check" }, only, element("span", {}, "Only what differs"))) : null;
  const texts = key !== "recipe" ? [] : data.runs.filter((run) => run.recipe_text).map((run) =>
    element("details", { class: "panel" }, element("summary", {}, `recipe.yaml of ${run.name}`), element("pre", { tabindex: "0" }, run.recipe_text)));
  const folded = key === "recipe" && texts.length ? element("div", { class: "tools" }) : null;
  return section(id, name, small, tools, holder, folded, ...texts);
}

function samplesSection({ data }) {
  const samples = data.runs.flatMap((run, place) => run.samples.map((sample) => {
    const starts = sample.prompt && sample.text.startsWith(sample.prompt);
    const text = starts ? [element("b", {}, sample.prompt), sample.text.slice(sample.prompt.length)]
      : [sample.prompt ? element("b", {}, `${sample.prompt} `) : null, sample.text];
    return element("figure", { class: "card sample", tabindex: "0" },
      element("figcaption", {}, element("i", { class: "swatch", color: COLORS[place % COLORS.length] }), `${run.name} · step ${count(sample.step)}`),
      element("blockquote", {}, ...text));
  }));
  return samples.length ? section("samples", "Samples", "the prompt in colour, then what the model wrote", element("div", { class: "samples" }, ...samples)) : null;
}

function checkpointsTable({ data }) {
  const rows = data.runs.flatMap((run) => run.checkpoints.map((each) => element("tr", {}, element("td", {}, run.name),
    element("th", { scope: "row" }, each.name), element("td", { class: "number" }, count(each.step)), element("td", { class: "number" }, bytes(each.bytes)),
    element("td", {}, clock(each.written_s)), element("td", { class: each.problem ? "wrong" : "" }, each.problem || (each.is_last ? "last" : "")))));
  const head = [headCell("Run"), headCell("Folder"), headCell("Step", true), headCell("Size", true), headCell("Written"), headCell("")];
  return rows.length ? section("checkpoints", "Checkpoints", "sizes are compared with the manifest, contents are not read", panelTable(head, rows, "Checkpoints")) : null;
}

// What the reader has unfolded, scrolled and focused stays so when a live page shows news.
function showTables(page) {
  const holder = byId("tables");
  const nameOf = (each) => each.getAttribute("aria-label") || each.id || each.textContent.slice(0, 200);
  const open = new Set([...holder.querySelectorAll("details[open] summary")].map(nameOf));
  const places = new Map([...holder.querySelectorAll(".panel[aria-label], .sample")].map((each) => [nameOf(each), [each.scrollLeft, each.scrollTop]]));
  const focused = holder.contains(document.activeElement) ? nameOf(document.activeElement) : null;
  holder.replaceChildren(...[
    valuesTable(page),
    eventsTable(page),
    comparison(page, "recipe", page.data.runs.length > 1 ? "Recipes" : "Recipe", "recipes"),
    comparison(page, "environment", "Environment", "environment"),
    samplesSection(page),
    checkpointsTable(page),
  ].filter(Boolean));
  for (const each of holder.querySelectorAll("summary")) each.parentElement.open = open.has(nameOf(each));
  for (const each of holder.querySelectorAll(".panel[aria-label], .sample")) [each.scrollLeft, each.scrollTop] = places.get(nameOf(each)) || [0, 0];
  if (focused !== null) [...holder.querySelectorAll("[tabindex], summary, input")].find((each) => nameOf(each) === focused)?.focus({ preventScroll: true });
}

const page = new Page(JSON.parse(byId("data").textContent));
document.documentElement.dataset.ready = "true";
if (page.data.live) page.follow();
