// Tables and texts below the charts.

function panelTable(head, rows, label) {
  return element("div", { class: "panel", tabindex: "0", role: "region", "aria-label": label },
    element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
}

const headCell = (text, number) => element("th", { scope: "col", class: number ? "number" : null }, text);

function section(id, name, small, ...children) {
  return element("section", { class: "section", id, "data-name": name },
    element("h2", {}, name, small ? element("small", {}, small) : null), ...children);
}

// The legend of all charts: of several runs a row each, the best first; a click on a name hides the run or shows it.
// Above folded runs stands their mean, which has the key.
function showRanking(page) {
  const { data } = page;
  const holder = byId("ranking");
  const focused = holder.contains(document.activeElement) ? document.activeElement.dataset.run : null;
  const last = (run, metric) => run.series[metric]?.last?.[1];
  const figures = [[(run) => run.step, count], [(run) => last(run, "tokens"), short], ...data.columns.map(({ metric }) => [(run) => last(run, metric), figure])];
  const order = (runs) => meanOf(runs.map((run) => last(run, data.order))) ?? Infinity;
  const rows = (runs, fold) => [fold ? foldRow(page, runs, fold, figures) : null, ...runs.map((run) => runRow(page, run, fold, figures))];
  const ranked = rankedGroups(page).sort((a, b) => (order(a.shown) === order(b.shown) ? 0 : order(a.shown) - order(b.shown)));
  const head = [headCell("Run"), headCell("Steps", true), headCell("Tokens", true), ...data.columns.map(({ label }) => headCell(label, true)), headCell("State")];
  holder.replaceChildren(...(data.runs.length > 1 ? [panelTable(head, ranked.flatMap(({ runs, fold }) => rows(runs, fold)).filter(Boolean), "Runs, the lowest validation cross-entropy first")] : []));
  if (focused) [...holder.querySelectorAll("button")].find((each) => each.dataset.run === focused)?.focus({ preventScroll: true });
}

// Folded runs together, all others alone: { runs, shown (those that count), fold }.
function rankedGroups(page) {
  const groups = new Map();
  for (const run of page.data.runs) {
    const fold = foldOf(page, run);
    const key = fold ? fold.runs[0] : run;
    if (!groups.has(key)) groups.set(key, { runs: [], shown: [], fold });
    groups.get(key).runs.push(run);
    if (!fold || page.chosen.has(run.name)) groups.get(key).shown.push(run);
  }
  return [...groups.values()];
}

function runRow(page, run, fold, figures) {
  const key = element("button", { type: "button", "aria-pressed": String(page.chosen.has(run.name)), "data-run": run.name, title: run.folder },
    fold ? null : runKey(page, run), run.name);
  key.addEventListener("click", () => page.choose(run.name, !page.chosen.has(run.name)));
  const cell = (value, text) => element("td", { class: value == null ? "number quiet" : "number" }, value == null ? "not measured" : text(value));
  return element("tr", {}, element("th", { scope: "row", class: fold ? "member" : null }, key), ...figures.map(([of, text]) => cell(of(run), text)), element("td", {}, run.state));
}

function foldRow(page, runs, fold, figures) {
  const shown = runs.filter((run) => page.chosen.has(run.name));
  const cell = (values, text) => (values.length ? element("td", { class: "number" }, text(meanOf(values)),
    element("small", {}, ` ${text(Math.min(...values))} to ${text(Math.max(...values))}`)) : element("td", { class: "number quiet" }, "not measured"));
  return element("tr", { class: "fold" }, element("th", { scope: "row" }, runKey(page, runs[0], "inline"), fold.name),
    ...figures.map(([of, text]) => cell(shown.map(of).filter((value) => value != null), text)), element("td", {}, ""));
}

function valuesTable({ data }) {
  const names = [...new Set(data.charts.flatMap((chart) => chart.lines.map((line) => line.metric)))];
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
  const places = new Map([...holder.querySelectorAll(".panel[aria-label]")].map((each) => [nameOf(each), [each.scrollLeft, each.scrollTop]]));
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
  for (const each of holder.querySelectorAll(".panel[aria-label]")) [each.scrollLeft, each.scrollTop] = places.get(nameOf(each)) || [0, 0];
  if (focused !== null) [...holder.querySelectorAll("[tabindex], summary, input")].find((each) => nameOf(each) === focused)?.focus({ preventScroll: true });
}

// Texts: for each prompt what the model wrote at each step, a column for each run.

function samplesSection(page) {
  const { data } = page;
  const prompts = new Map();
  data.runs.forEach((run, place) => {
    for (const sample of run.samples) {
      if (!prompts.has(sample.prompt)) prompts.set(sample.prompt, []);
      prompts.get(sample.prompt).push({ ...sample, place });
    }
  });
  if (!prompts.size) return null;
  return section("samples", "Samples", "what the model wrote after each prompt, from the first step to the last",
    ...[...prompts].map(([prompt, samples]) => promptPanel(page, prompt, samples)));
}

function promptPanel(page, prompt, samples) {
  const { runs } = page.data;
  const places = [...new Set(samples.map((sample) => sample.place))].sort((a, b) => a - b);
  const steps = [...new Set(samples.map((sample) => sample.step))].sort((a, b) => (a ?? -1) - (b ?? -1));
  const rows = steps.map((step) => element("tr", {}, element("th", { scope: "row", class: "number" }, count(step)),
    ...places.map((place) => element("td", {}, ...samples.filter((each) => each.place === place && each.step === step).map(sampleText)))));
  const head = [headCell("Step", true), ...places.map((place) => element("th", { scope: "col" },
    runs.length > 1 ? runKey(page, runs[place], "inline") : null, runs.length > 1 ? runs[place].name : "Text"))];
  return element("div", { class: "prompt" }, element("h3", {}, prompt ? `“${prompt}”` : "No prompt"),
    panelTable(head, rows, `Samples after ${prompt || "no prompt"}`));
}

function sampleText({ prompt, text }) {
  const begins = prompt && text.startsWith(prompt);
  return element("blockquote", {}, begins ? element("b", {}, prompt) : null, begins ? text.slice(prompt.length) : text || element("i", { class: "quiet" }, "nothing"));
}
