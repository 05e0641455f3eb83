// The page: what is chosen, the charts, the tables, and news of a live report.

const EVERY_MS = 3000;
const MOST_RUNS_AT_FIRST = 10;
const VERDICTS = { Leakage: "Leakage", Criticality: "Operator" };
const FIRST_SECTIONS = ["Loss", "Leakage", "Criticality"]; // before the heatmaps

class Page {
  constructor(data) {
    this.data = data;
    this.view = { axis: "step", log: false, smooth: 0, outliers: false, events: true, fold: false, zoom: null };
    this.chosen = new Set(data.runs.slice(0, MOST_RUNS_AT_FIRST).map((run) => run.name));
    this.known = new Set(data.runs.map((run) => run.name));
    this.cursor = null;
    this.onlyDiffering = {};
    this.charts = new Map();
    this.heatmaps = new Heatmaps(this);
    this.seen = new IntersectionObserver((entries) => this.scrolled(entries), { rootMargin: "300px" });
    this.bindControls();
    this.show();
    if (location.hash) {
      this.drawAll();
      const target = byId(location.hash.slice(1));
      if (target) target.scrollIntoView();
    }
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
    byId("fold").addEventListener("change", (event) => { view.fold = event.target.checked; this.runsShown = null; this.show(); });
    byId("filter").addEventListener("input", () => this.filter());
    byId("reset").addEventListener("click", () => this.zoom(null));
    followTheme(() => { this.heatmaps.draw(); this.redraw(); });
    window.addEventListener("beforeprint", () => this.look(true));
    byId("contents").addEventListener("click", () => this.drawAll());
    let waiting = 0;
    window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => { this.redraw(); this.heatmaps.draw(); }, 80); });
    window.addEventListener("scroll", () => this.point(null), { passive: true });
  }

  // Steps as places on the chosen axis; null where a run has no such count.
  axisOf(run, steps) {
    if (this.view.axis === "step") return steps;
    const counted = this.view.axis === "tokens" ? run.series.tokens : run.hours;
    if (!counted || !counted.x.length) return null;
    const { x, y } = counted;
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
    this.dashed = needsDashes(data);
    byId("fold").parentElement.hidden = !data.folds.length;
    this.showRuns();
    showRanking(this);
    const folded = new Set([...byId("cards").querySelectorAll("details:not([open])")].map((each) => each.dataset.run));
    byId("cards").classList.toggle("alone", data.runs.length === 1);
    byId("cards").replaceChildren(...data.runs.map((run) => healthCard(this, run)));
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
      if (!box.width) continue; // folded up
      if (!all && (box.top > innerHeight + 300 || box.bottom < -300)) continue;
      chart.onScreen = true;
      if (chart.stale) chart.draw();
    }
  }

  // Gives every chart its height, or a link to a section would miss it: those above grow when they come into sight.
  drawAll() {
    for (const chart of this.charts.values()) {
      if (!chart.stale || !chart.figure.getBoundingClientRect().width) continue;
      const seen = chart.onScreen;
      chart.onScreen = true;
      chart.draw();
      chart.onScreen = seen;
    }
  }

  showRuns() {
    const names = this.data.runs.map((run) => run.name).join("\n");
    if (names === this.runsShown) return; // a live page keeps the focus
    this.runsShown = names;
    byId("runs").replaceChildren(...this.data.runs.map((run) => {
      const box = element("input", { type: "checkbox", checked: this.chosen.has(run.name), "data-run": run.name });
      box.addEventListener("change", () => this.choose(run.name, box.checked));
      return element("label", { title: run.folder }, box,
        runKey(this, run), element("span", { class: "name" }, run.name));
    }));
  }

  // Shows a run in all charts, or hides it.
  choose(name, shown) {
    if (shown) this.chosen.add(name);
    else this.chosen.delete(name);
    for (const box of byId("runs").querySelectorAll("input")) box.checked = this.chosen.has(box.dataset.run);
    showRanking(this);
    this.refresh();
  }

  showCharts() {
    const wanted = new Map(this.data.charts.map((spec) => [`${spec.section}|${spec.group}|${spec.family}`, spec]));
    const same = wanted.size === this.charts.size && [...wanted.keys()].every((key) => this.charts.has(key));
    this.heatmaps.section.hidden = !this.data.runs.some((run) => run.snapshots);
    if (same && this.laidOut) {
      for (const [key, spec] of wanted) this.charts.get(key).spec = spec;
      return;
    }
    this.laidOut = true;
    this.seen.disconnect();
    this.charts = new Map([...wanted].map(([key, spec]) => [key, new Chart(spec, this.view, this)]));
    const open = new Set([...document.querySelectorAll("details.group[open]")].map((each) => each.dataset.key));
    const sections = new Map();
    for (const chart of this.charts.values()) {
      const { section, group } = chart.spec;
      if (!sections.has(section)) sections.set(section, new Map());
      if (!sections.get(section).has(group)) sections.get(section).set(group, []);
      sections.get(section).get(group).push(chart);
    }
    const made = [...sections].map(([name, groups], place) => element("section", { class: "section", id: `s${place}`, "data-name": name },
      element("h2", {}, name), VERDICTS[name] ? element("div", { class: "words", "data-verdict": VERDICTS[name] }) : null, ...[...groups].map(([group, charts]) => this.group(name, group, charts, open))));
    const before = [...sections.keys()].findIndex((name) => !FIRST_SECTIONS.includes(name));
    made.splice(before < 0 ? made.length : before, 0, this.heatmaps.section);
    byId("charts").replaceChildren(...made);
    for (const chart of this.charts.values()) this.seen.observe(chart.figure);
  }

  // Charts in sight at once, or, where there are very many, folded up under their tensor's name and drawn when unfolded.
  group(section, name, charts, open) {
    const grid = element("div", { class: "grid" }, ...charts.map((chart) => chart.figure));
    if (!name) return grid;
    const key = `${section}|${name}`;
    const made = element("details", { class: "group", "data-key": key, open: open.has(key) },
      element("summary", {}, name, element("small", {}, charts.length === 1 ? "1 chart" : `${charts.length} charts`)), grid);
    made.addEventListener("toggle", () => made.open && this.look());
    return made;
  }

  filter() {
    const words = byId("filter").value.toLowerCase().split(",").map((word) => word.trim()).filter(Boolean);
    const fits = (chart) => !words.length || words.some((word) =>
      word.split(/\s+/).every((part) => chart.spec.lines.some((line) => line.metric.toLowerCase().includes(part)) ||
        chart.spec.title.toLowerCase().includes(part)));
    for (const chart of this.charts.values()) {
      chart.figure.classList.toggle("gone", !fits(chart));
      chart.figure.style.display = fits(chart) ? "" : "none";
    }
    // What is found is unfolded; without words the groups are as the reader left them.
    for (const group of document.querySelectorAll("details.group")) {
      if (words.length && !group.dataset.before) group.dataset.before = group.open ? "open" : "closed";
      if (words.length) group.open = group.querySelector(".chart:not(.gone)") !== null;
      else if (group.dataset.before) { group.open = group.dataset.before === "open"; delete group.dataset.before; }
    }
    this.showContents();
  }

  showContents() {
    const left = (box) => [...box.querySelectorAll(".chart")].filter((figure) => !figure.classList.contains("gone") && !figure.hidden).length;
    for (const group of document.querySelectorAll("details.group")) group.hidden = left(group) === 0;
    const found = [...document.querySelectorAll("main .section")].map((section) => {
      const charts = section.querySelector(".chart") ? left(section) : null;
      if (charts !== null) section.hidden = charts === 0;
      return section.hidden ? null : element("li", {}, element("a", { href: `#${section.id}` },
        element("span", {}, section.dataset.name), element("span", { class: "count" }, charts || "")));
    });
    byId("contents").replaceChildren(...found.filter(Boolean));
  }

  // The curves have changed; charts out of sight wait until they are scrolled to.
  refresh() {
    for (const words of document.querySelectorAll(".words")) words.replaceChildren(...verdictWords(this, words.dataset.verdict));
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
    const at = this.view.axis === "hours" ? `${figure(x)} hours` : `${this.view.axis === "tokens" ? "tokens" : "step"} ${count(x)}`;
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
    const tags = {};
    const news = async (name) => {
      const answer = await fetch(name, { cache: "no-store", headers: tags[name] ? { "If-None-Match": tags[name] } : {} });
      if (answer.status !== 200) return null;
      tags[name] = answer.headers.get("ETag");
      return answer.json();
    };
    for (;;) {
      await new Promise((done) => setTimeout(done, EVERY_MS));
      if (document.hidden) continue;
      try {
        this.take(await news("data.json"));
        if (this.heatmaps.data && this.data.runs.some((run) => run.snapshots)) {
          const snapshots = await news("snapshots.json");
          if (snapshots) this.heatmaps.take(snapshots);
        }
        sign.textContent = "live";
        sign.classList.remove("lost");
      } catch {
        sign.textContent = "no answer";
        sign.classList.add("lost");
      }
    }
  }

  take(data) {
    if (!data) return;
    this.data = data;
    for (const run of data.runs) {
      if (this.known.has(run.name)) continue;
      this.known.add(run.name);
      this.chosen.add(run.name);
    }
    this.show();
  }
}

const page = new Page(JSON.parse(byId("data").textContent));
document.documentElement.dataset.ready = "true";
if (page.data.live) page.follow();
