// The card of a run: one look tells how far it is and whether it is healthy.

const HEALTH_WORDS = { good: "healthy", look: "have a look", bad: "in trouble" };

function healthCard(page, run) {
  const { health } = run;
  const series = (fact) => run.series[health.metrics[fact]];
  const last = (fact) => series(fact)?.last?.[1];
  const lowest = (fact) => (series(fact)?.low ? `lowest ${figure(series(fact).low[1])}` : "");
  const change = (fact) => {
    const found = health.changes[fact];
    if (!found) return null;
    const text = `${found.difference > 0 ? "+" : found.difference < 0 ? "−" : "±"}${figure(Math.abs(found.difference), 3)} since ${count(found.since)}`;
    return element("small", { class: found.is_good === null ? "change" : found.is_good ? "change good" : "change bad" }, text);
  };
  const isLoss = (fact) => health.metrics[fact].endsWith("/loss");
  const step = run.step ?? 0;
  const ends = [last("gap_low"), last("gap_high")];
  const mfu = last("mfu") == null ? "" : ` · MFU ${(100 * last("mfu")).toFixed(1)} %`;
  const facts = [
    ["Step", count(run.step), run.max_steps ? `of ${count(run.max_steps)}` : ""],
    [isLoss("training") ? "Training loss" : "Training cross-entropy", figure(last("training")), lowest("training")],
    [isLoss("validation") ? "Validation loss" : "Val. cross-entropy", figure(last("validation")), lowest("validation"), change("validation")],
    ["Leakage gap", figure(last("gap"), 3), ends[0] == null || ends[1] == null ? "" : `${figure(ends[0], 2)} to ${figure(ends[1], 2)}`, change("gap")],
    ["Throughput", last("tokens_per_s") == null ? "–" : short(last("tokens_per_s")), last("tokens_per_s") == null ? "" : `tokens/s${mfu}`],
    ["Steps not finite", count(last("nonfinite_steps")), ""],
  ];
  const tokens = last("tokens") == null ? "" : `${short(last("tokens"))} tokens, ${short(last("tokens") / (series("tokens").last[0] || 1))} a step`;
  const written = run.written_s == null ? "" : `written ${clock(run.written_s)}`;
  return element("article", { class: `card health ${health.state}`, "data-run": run.name },
    element("header", {}, runKey(page, run),
      element("h3", { title: run.folder }, run.name),
      HEALTH_WORDS[health.state] ? element("span", { class: `pill ${health.state}`, title: "the worst of what is said below" }, HEALTH_WORDS[health.state]) : null,
      element("span", { class: `pill ${run.state}` }, run.state)),
    run.stopped ? element("p", { class: "stopped" }, element("b", {}, "Stopped: "), run.stopped) : null,
    element("progress", { class: "progress", max: run.max_steps || 1, value: run.max_steps ? step : 0, "aria-label": `${run.name}: steps done` }),
    element("dl", { class: "facts" }, ...facts.map(([name, value, unit, changed]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value, unit ? element("small", {}, unit) : null, changed)))),
    element("ul", { class: "verdicts" }, ...health.verdicts.map((verdict) => element("li", { class: verdict.state },
      element("b", {}, verdict.name), element("span", {}, verdict.words, verdict.detail ? element("small", {}, verdict.detail) : null)))),
    element("p", { class: "foot quiet" }, [tokens, written].filter(Boolean).join(" · ")),
    run.notes.length ? remarks(run) : null);
}

// What a verdict says of each run, above the charts that show why.
function verdictWords(page, name) {
  return page.data.runs.flatMap((run) => {
    const verdict = run.health.verdicts.find((each) => each.name === name);
    if (!page.chosen.has(run.name) || !verdict || verdict.words === "not measured") return [];
    return element("p", { class: verdict.state }, runKey(page, run, "inline"),
      page.data.runs.length > 1 ? `${run.name}: ` : "", element("b", {}, verdict.words), verdict.detail ? `; ${verdict.detail}` : "");
  });
}

function remarks(run) {
  const more = run.notes.length === 1 ? "1 remark" : `${run.notes.length} remarks`;
  return element("details", { open: run.notes.length < 4, "data-run": run.name }, element("summary", {}, more),
    ...run.notes.map((text) => element("p", { class: "note" }, text)));
}
