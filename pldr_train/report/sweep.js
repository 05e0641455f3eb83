// The page of a sweep. Everything is drawn from the data of the page; text from files only becomes text nodes.

const data = JSON.parse(byId("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const axisNames = Object.keys(data.axes);
const columnOf = Object.fromEntries(data.columns.map((column) => [column.metric, column]));
const objective = columnOf[data.metric] ? data.metric : (data.columns[0] || {}).metric;
let picked = null;

function shape(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "color") made.style.fill = value || "";
    else if (value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const words = (text, x, y, attributes) => {
  const made = shape("text", { x, y, ...attributes });
  made.textContent = text;
  return made;
};

const shortName = (axis) => axis.slice(axis.lastIndexOf(".") + 1);
const cellText = (cell) => Object.entries(cell.axes).map(([axis, value]) => `${shortName(axis)} ${value}`).join(", ") || cell.name;
const hue = (number, of) => `hsl(${Math.round((360 * number) / Math.max(1, of) + 225) % 360} ${isDark() ? "70% 65%" : "60% 45%"})`;
const cellColor = (number) => hue(number, data.cells.length);

// A value between 0 (low) and 1 (high) as a colour that reads the same in grey: pale to dark.
function heat(share) {
  const light = isDark() ? 18 + 52 * share : 96 - 58 * share;
  return `hsl(${Math.round(255 - 60 * share)} 62% ${light}%)`;
}
const onHeat = (share) => (isDark() ? (share > 0.55 ? "#10131a" : "#f2f4f8") : share > 0.55 ? "#ffffff" : "#171b24");

function tip(target, text) {
  target.append(shape("title", {}, document.createTextNode(text)));
  return target;
}

const picker = (label, choices, value, change) => element("label", {}, label, listBox(choices, value, change));
const columnChoices = () => data.columns.map((column) => [column.metric, column.label]);
const axisChoices = () => axisNames.map((axis) => [axis, axis]);

function block(title, about, ...controls) {
  const body = element("div", {});
  const made = element("section", { class: "block" }, element("header", {}, element("h2", {}, title), ...controls));
  if (about) made.append(element("p", { class: "quiet" }, about));
  made.append(body);
  byId("content").append(made);
  return body;
}

// ------------------------------------------------------------------------------------------------------------- cards

function drawState() {
  const states = Object.entries(data.counts).map(([state, number]) => `${number} ${state}`).join(", ");
  const card = (title, text) =>
    element("div", { class: "card" }, element("header", {}, element("h3", {}, title)), element("p", {}, text));
  const best = data.best ? `${data.best.trial}: ${figure(data.best.value, 6)}` : "none is done yet";
  byId("state").replaceChildren(
    card("Trials", `${states} (of ${data.planned})`),
    card(`Best by ${data.metric}`, best),
    card("Recipe", `${data.recipe}, seeds ${data.seeds.join(", ")}`)
  );
}

// ------------------------------------------------------------------------------------------------------------- tables

const order = { key: null, down: false };

function spreadCell(spread, certain) {
  if (!spread) return element("td", {}, "–");
  const half = spread.half == null ? null : element("span", { class: "half" }, ` ± ${figure(spread.half, 2)}`);
  return element("td", { class: certain ? "certain" : "" }, figure(spread.mean), half);
}

function drawTable(body) {
  const heads = [["cell", "Cell"], ...data.columns.map((column) => [column.metric, column.label])];
  const rows = data.cells.map((cell, number) => ({ cell, number }));
  if (order.key) {
    const value = ({ cell }) => (order.key === "cell" ? cell.name : (cell.figures[order.key] || {}).mean);
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x == null || y == null) return (x == null) - (y == null);
      return (x < y ? -1 : x > y ? 1 : 0) * (order.down ? -1 : 1);
    });
  }
  const head = element("tr", {}, ...heads.map(([key, label]) => {
    const sort = element("button", { type: "button" }, label + (order.key === key ? (order.down ? " ↓" : " ↑") : ""));
    sort.addEventListener("click", () => {
      order.down = order.key === key && !order.down;
      order.key = key;
      drawTable(body);
    });
    const mark = order.key === key ? (order.down ? "descending" : "ascending") : "none";
    return element("th", { scope: "col", "aria-sort": mark }, sort);
  }), element("th", { scope: "col" }, "Trials"));
  const lines = rows.map(({ cell, number }) => {
    const own = data.trials.filter((trial) => trial.cell === number);
    const done = own.filter((trial) => trial.state === "done").length;
    const line = element("tr", { class: [cell.baseline ? "baseline" : "", picked === number ? "picked" : ""].join(" ") },
      element("td", {}, cellText(cell)),
      ...data.columns.map((column) => spreadCell(cell.figures[column.metric])),
      element("td", {}, `${done} of ${own.length}`));
    line.addEventListener("click", () => { picked = picked === number ? null : number; draw(); });
    return line;
  });
  body.replaceChildren(element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines))));
}

function drawPaired(body) {
  const cells = data.cells.filter((cell) => cell.against);
  const certain = (paired) => paired && paired.half != null && Math.abs(paired.mean) > paired.half;
  const lines = cells.map((cell) => element("tr", {},
    element("td", {}, cellText(cell)),
    ...data.columns.map((column) => {
      const paired = cell.paired[column.metric];
      const made = spreadCell(paired, certain(paired));
      if (paired && paired.effect != null) made.title = `effect size ${figure(paired.effect, 3)}, ${paired.n} pairs`;
      return made;
    })));
  const head = element("tr", {}, element("th", { scope: "col" }, "Cell"),
    ...data.columns.map((column) => element("th", { scope: "col" }, column.label)));
  body.replaceChildren(element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines))));
}

function drawTrials(body) {
  const lines = data.trials.map((trial) => element("tr", {},
    element("td", {}, trial.name), element("td", { class: "text" }, trial.state),
    element("td", {}, `${count(trial.steps)} of ${count(trial.max_steps)}`),
    element("td", {}, figure(trial.figures[objective], 6)), element("td", { class: "text" }, trial.folder),
    element("td", { class: trial.error ? "text error" : "text" }, trial.error || "")));
  const heads = ["Trial", "State", "Steps", (columnOf[objective] || {}).label || "", "Folder", "Error"];
  body.replaceChildren(element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, ...heads.map((each) => element("th", { scope: "col" }, each)))),
    element("tbody", {}, ...lines))));
}

// ------------------------------------------------------------------------------------------------------------- heatmap

const map = { x: axisNames[1] || axisNames[0], y: axisNames[0], metric: objective };

function drawMap(body) {
  const xs = data.axes[map.x], ys = map.x === map.y ? [""] : data.axes[map.y];
  const value = (x, y) => meanOf(data.cells.filter((cell) => cell.axes[map.x] === x && (map.x === map.y || cell.axes[map.y] === y))
    .map((cell) => (cell.figures[map.metric] || {}).mean));
  const all = ys.flatMap((y) => xs.map((x) => value(x, y))).filter((each) => each != null);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const left = 120, top = 10, width = 900, cellWidth = Math.min(150, (width - left) / Math.max(1, xs.length)), cellHeight = 44;
  const picture = shape("svg", { viewBox: `0 0 ${width} ${top + ys.length * cellHeight + 46}`, role: "img",
    "aria-label": `${(columnOf[map.metric] || {}).label} over ${map.x} and ${map.y}` });
  ys.forEach((y, row) => {
    picture.append(words(String(y), left - 8, top + row * cellHeight + cellHeight / 2 + 4, { "text-anchor": "end" }));
    xs.forEach((x, column) => {
      const found = value(x, y);
      const share = found == null || high === low ? 0.5 : (found - low) / (high - low);
      const place = { x: left + column * cellWidth, y: top + row * cellHeight };
      const box = shape("rect", { ...place, width: cellWidth - 3, height: cellHeight - 3, rx: 5,
        fill: found == null ? "none" : heat(share), stroke: found == null ? "currentColor" : null, "stroke-opacity": 0.2 });
      picture.append(box, words(figure(found), place.x + (cellWidth - 3) / 2, place.y + cellHeight / 2 + 3,
        { "text-anchor": "middle", color: found == null ? null : onHeat(share), class: "value" }));
    });
  });
  xs.forEach((x, column) => picture.append(words(String(x), left + column * cellWidth + cellWidth / 2,
    top + ys.length * cellHeight + 16, { "text-anchor": "middle" })));
  picture.append(words(map.x, left, top + ys.length * cellHeight + 36, { class: "strong" }),
    words(map.x === map.y ? "" : map.y, 0, top + ys.length * cellHeight + 36, { class: "strong" }));
  body.replaceChildren(picture);
}

// -------------------------------------------------------------------------------------------------- effects, importance

const effect = { metric: objective };

function drawEffects(body) {
  body.className = "effects";
  body.replaceChildren(...axisNames.map((axis) => {
    const levels = data.axes[axis].map((value) => ({
      value,
      figures: data.trials.filter((trial) => trial.state === "done" && data.cells[trial.cell].axes[axis] === value)
        .map((trial) => trial.figures[effect.metric]).filter((each) => each != null),
    })).filter((level) => level.figures.length);
    const all = levels.flatMap((level) => level.figures);
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const width = 300, height = 190, bottom = 34, left = 46, span = high - low || 1;
    const at = (value) => 8 + (height - bottom - 16) * (1 - (value - low) / span);
    const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${axis}: effect` });
    for (const tick of ticks(low, high, 4)) {
      picture.append(shape("line", { class: "grid", x1: left, x2: width, y1: at(tick), y2: at(tick) }),
        words(short(tick), left - 5, at(tick) + 4, { "text-anchor": "end" }));
    }
    const step = (width - left) / Math.max(1, levels.length);
    const means = levels.map((level, number) => [left + step * (number + 0.5),
      at(meanOf(level.figures))]);
    picture.append(shape("polyline", { class: "line", points: means.map((each) => each.join(",")).join(" "), stroke: "var(--accent)" }));
    levels.forEach((level, number) => {
      for (const each of level.figures) picture.append(shape("circle", { cx: means[number][0], cy: at(each), r: 3, fill: "var(--quiet)", opacity: 0.5 }));
      picture.append(shape("circle", { cx: means[number][0], cy: means[number][1], r: 5, fill: "var(--accent)" }),
        words(String(level.value), means[number][0], height - bottom + 16, { "text-anchor": "middle" }));
    });
    picture.append(words(axis, left, height - 4, { class: "strong" }));
    return picture;
  }));
}

function drawImportance(body) {
  const entries = Object.entries(data.importances || {}).sort((a, b) => b[1] - a[1]);
  const most = Math.max(...entries.map(([, value]) => value), 1e-12);
  body.className = "bars";
  body.replaceChildren(...entries.flatMap(([axis, value]) => {
    const bar = element("div", { class: "bar" });
    bar.style.width = `${(100 * value) / most}%`;
    return [element("span", {}, axis), element("div", {}, bar), element("span", {}, figure(value, 2))];
  }));
}

// ---------------------------------------------------------------------------------------------------------- scatter

const scatter = { x: (data.columns.find((column) => column.metric.startsWith("val/dag/")) || data.columns[0] || {}).metric, y: objective };

function front(points, x, y) {
  const sign = (metric) => ((columnOf[metric] || {}).best === "max" ? -1 : 1);
  const ordered = [...points].sort((a, b) => sign(x) * (a.x - b.x) || sign(y) * (a.y - b.y));
  let best = Infinity;
  return ordered.filter((point) => sign(y) * point.y < best && ((best = sign(y) * point.y), true));
}

function drawScatter(body) {
  const points = data.cells.map((cell, number) => ({ number, cell, x: (cell.figures[scatter.x] || {}).mean, y: (cell.figures[scatter.y] || {}).mean }))
    .filter((point) => point.x != null && point.y != null);
  const width = 900, height = 340, left = 64, bottom = 44;
  const [lowX, highX] = [Math.min(...points.map((p) => p.x)), Math.max(...points.map((p) => p.x))];
  const [lowY, highY] = [Math.min(...points.map((p) => p.y)), Math.max(...points.map((p) => p.y))];
  const atX = (value) => left + 14 + (width - left - 28) * ((value - lowX) / (highX - lowX || 1));
  const atY = (value) => 30 + (height - bottom - 42) * (1 - (value - lowY) / (highY - lowY || 1));
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "cells by two figures" });
  for (const tick of ticks(lowX, highX, 7)) picture.append(shape("line", { class: "grid", x1: atX(tick), x2: atX(tick), y1: 24, y2: height - bottom }),
    words(short(tick), atX(tick), height - bottom + 16, { "text-anchor": "middle" }));
  for (const tick of ticks(lowY, highY, 6)) picture.append(shape("line", { class: "grid", x1: left, x2: width, y1: atY(tick), y2: atY(tick) }),
    words(short(tick), left - 6, atY(tick) + 4, { "text-anchor": "end" }));
  const best = front(points, scatter.x, scatter.y);
  picture.append(shape("polyline", { class: "line front", points: best.map((p) => `${atX(p.x)},${atY(p.y)}`).join(" "), stroke: "var(--axis)", "stroke-dasharray": "4 4" }));
  for (const point of points) {
    const spot = shape("circle", { cx: atX(point.x), cy: atY(point.y), r: picked === point.number ? 9 : 6, fill: cellColor(point.number), class: picked != null && picked !== point.number ? "faint" : null });
    picture.append(tip(spot, `${cellText(point.cell)}: ${figure(point.x)}, ${figure(point.y)}`));
  }
  picture.append(words(`${columnOf[scatter.x].label} →`, left, height - 6, { class: "strong" }), words(`↑ ${columnOf[scatter.y].label}`, 0, 10, { class: "strong" }));
  body.replaceChildren(points.length ? picture : element("p", { class: "quiet" }, "No cell has both figures yet."));
}

// ------------------------------------------------------------------------------------------------ parallel coordinates

function drawParallel(body) {
  const lanes = [...axisNames.map((axis) => ({ label: axis, values: data.axes[axis], of: (cell) => cell.axes[axis] })),
    ...data.columns.slice(0, 6).map((column) => ({ label: column.label, of: (cell) => (cell.figures[column.metric] || {}).mean }))];
  const width = 1000, height = 300, top = 30, bottom = 20, step = lanes.length > 1 ? (width - 120) / (lanes.length - 1) : 0;
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "every cell as a line over axes and figures" });
  lanes.forEach((lane, number) => {
    const x = 60 + number * step;
    if (lane.values) {
      lane.at = (value) => height - bottom - (height - top - bottom) * (lane.values.length > 1 ? lane.values.indexOf(value) / (lane.values.length - 1) : 0.5);
      lane.values.forEach((value) => picture.append(words(String(value), x + 5, lane.at(value) + 4, {})));
    } else {
      const all = data.cells.map(lane.of).filter((value) => value != null);
      const [low, high] = [Math.min(...all), Math.max(...all)];
      lane.at = (value) => height - bottom - (height - top - bottom) * ((value - low) / (high - low || 1));
      for (const value of all.length ? [low, high] : []) picture.append(words(short(value), x + 5, lane.at(value) + 4, {}));
    }
    picture.append(shape("line", { class: "axis", x1: x, x2: x, y1: top, y2: height - bottom }),
      words(shortName(lane.label), x, top - 12 - 12 * (number % 2), { "text-anchor": "middle", class: "strong" }));
  });
  data.cells.forEach((cell, number) => {
    const points = lanes.map((lane, place) => [60 + place * step, lane.of(cell)]).filter(([, value]) => value != null);
    const line = shape("polyline", { class: `line ${picked != null && picked !== number ? "faint" : ""}`, stroke: cellColor(number),
      points: points.map(([x, value]) => `${x},${lanes[Math.round((x - 60) / (step || 1))].at(value)}`).join(" ") });
    picture.append(tip(line, cellText(cell)));
  });
  body.replaceChildren(picture);
}

// ------------------------------------------------------------------------------------------------------------- curves

const curve = { metric: data.curves.includes(data.metric) ? data.metric : data.curves[0] };

function drawCurves(body) {
  const lines = data.trials.map((trial) => ({ trial, points: trial.curves[curve.metric] || [] })).filter((line) => line.points.length);
  const width = 1000, height = 360, left = 60, bottom = 34;
  const xs = lines.flatMap((line) => line.points.map((point) => point[0])), ys = lines.flatMap((line) => line.points.map((point) => point[1]));
  const range = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  const [lowX, highX] = range(xs), [lowY, highY] = range(ys);
  const atX = (value) => left + (width - left - 10) * ((value - lowX) / (highX - lowX || 1));
  const atY = (value) => 10 + (height - bottom - 16) * (1 - (value - lowY) / (highY - lowY || 1));
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${curve.metric} of every trial` });
  if (lines.length) {
    for (const tick of ticks(lowX, highX, 8)) picture.append(words(short(tick), atX(tick), height - bottom + 16, { "text-anchor": "middle" }));
    for (const tick of ticks(lowY, highY, 6)) picture.append(shape("line", { class: "grid", x1: left, x2: width, y1: atY(tick), y2: atY(tick) }),
      words(short(tick), left - 6, atY(tick) + 4, { "text-anchor": "end" }));
  }
  for (const { trial, points } of lines) {
    const line = shape("polyline", { class: `line ${picked != null && picked !== trial.cell ? "faint" : ""}`, stroke: cellColor(trial.cell),
      "stroke-dasharray": trial.unfinished ? "5 4" : null, points: points.map(([x, y]) => `${atX(x)},${atY(y)}`).join(" ") });
    picture.append(tip(line, `${trial.name}, ${trial.state}`));
  }
  picture.append(words("steps", left, height - 4, { class: "strong" }));
  const legend = element("div", { class: "legend" }, ...data.cells.map((cell, number) => {
    const entry = element("button", { type: "button", "aria-pressed": String(picked === number) },
      element("span", { class: "swatch", color: cellColor(number) }), cellText(cell));
    entry.addEventListener("click", () => { picked = picked === number ? null : number; draw(); });
    return entry;
  }));
  body.replaceChildren(lines.length ? picture : element("p", { class: "quiet" }, "No trial has this metric yet."), legend);
}

// --------------------------------------------------------------------------------------------------------------- page

byId("title").textContent = data.name;
byId("made").textContent = `pldr_train ${data.version}, ${clock(data.made_s)}`;
const drawings = [];

function part(show, title, about, render, ...controls) {
  if (!show) return;
  const body = block(title, about, ...controls.map((control) => control(() => render(body))));
  drawings.push(() => render(body));
}
const choose = (label, choices, state, key) => (again) => picker(label, choices, state[key], (value) => { state[key] = value; again(); });
const has = data.columns.length > 0;

part(has, "Cells", "Means over seeds of the trials that are done, ± half of the 95 % interval. A click on a row marks the cell everywhere.", drawTable);
part(data.cells.some((cell) => cell.against), "Difference from the baseline",
  "Over the seeds that both have; bold where the 95 % interval leaves out 0. Effect sizes stand in the tooltips.", drawPaired);
part(has && axisNames.length > 0, "Heatmap", "Means over the axes that are not shown.", drawMap,
  choose("across", axisChoices(), map, "x"), choose("down", axisChoices(), map, "y"), choose("colour", columnChoices(), map, "metric"));
part(has, "Effect of each axis", "Every trial that is done, and the mean of each value.", drawEffects, choose("of", columnChoices(), effect, "metric"));
part(data.importances != null, "Importance of the axes", `For ${data.metric}, by Optuna's PED-ANOVA.`, drawImportance);
part(has, "Two figures against each other", "A point for each cell; the dashed line joins those that no other cell beats in both.", drawScatter,
  choose("across", columnChoices(), scatter, "x"), choose("up", columnChoices(), scatter, "y"));
part(has && axisNames.length > 0, "Parallel coordinates", "A line for each cell, over the axes and its figures.", drawParallel);
part(data.curves.length > 0, "Curves", "Every trial; dashed where it was pruned or still runs.", drawCurves,
  choose("of", data.curves.map((metric) => [metric, metric]), curve, "metric"));
part(true, "Trials", "", drawTrials);

function draw() {
  drawState();
  for (const each of drawings) each();
}
followTheme(draw);

if (data.live) setInterval(async () => {
  try {
    const answer = await fetch("/tag", { cache: "no-store" });
    if (answer.ok && (await answer.text()) !== data.tag) location.reload();
  } catch (error) { /* the server has ended; the page stays as it is */ }
}, 5000);
