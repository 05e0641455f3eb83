// Texts: for each prompt what the model wrote at each step, a column for each run.

function samplesSection({ data }) {
  const prompts = new Map();
  data.runs.forEach((run, place) => {
    for (const sample of run.samples) {
      if (!prompts.has(sample.prompt)) prompts.set(sample.prompt, []);
      prompts.get(sample.prompt).push({ ...sample, place });
    }
  });
  if (!prompts.size) return null;
  return section("samples", "Samples", "what the model wrote after each prompt, from the first step to the last",
    ...[...prompts].map(([prompt, samples]) => promptPanel(data.runs, prompt, samples)));
}

function promptPanel(runs, prompt, samples) {
  const places = [...new Set(samples.map((sample) => sample.place))].sort((a, b) => a - b);
  const steps = [...new Set(samples.map((sample) => sample.step))].sort((a, b) => (a ?? -1) - (b ?? -1));
  const rows = steps.map((step) => element("tr", {}, element("th", { scope: "row", class: "number" }, count(step)),
    ...places.map((place) => element("td", {}, ...samples.filter((each) => each.place === place && each.step === step).map(sampleText)))));
  const head = [headCell("Step", true), ...places.map((place) => element("th", { scope: "col" },
    runs.length > 1 ? element("i", { class: "swatch inline", color: COLORS[place % COLORS.length] }) : null, runs.length > 1 ? runs[place].name : "Text"))];
  return element("div", { class: "prompt" }, element("h3", {}, prompt ? `“${prompt}”` : "No prompt"),
    panelTable(head, rows, `Samples after ${prompt || "no prompt"}`));
}

function sampleText({ prompt, text }) {
  const begins = prompt && text.startsWith(prompt);
  return element("blockquote", {}, begins ? element("b", {}, prompt) : null, begins ? text.slice(prompt.length) : text || element("i", { class: "quiet" }, "nothing"));
}
