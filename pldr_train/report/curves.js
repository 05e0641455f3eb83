// Colours, smoothing and intervals of curves.

const COLORS = ["#4269d0", "#ff725c", "#3ca951", "#d99a00", "#a463f2", "#17a2b8", "#e0559d", "#9c6b4e", "#7a8ca8", "#7fb800"];
const LAYERS = [[68, 70, 170], [40, 130, 180], [35, 165, 130], [150, 180, 50], [235, 150, 40], [220, 70, 60]];
const DASHES = [[], [6, 4], [2, 3], [9, 3, 2, 3]];

// What a run has in all charts: its colour, and its dash where the page needs dashes to tell runs apart.
function markOf(page, run) {
  const fold = page.view.fold && page.data.folds.find((each) => each.runs.includes(run.name));
  const place = page.data.runs.findIndex((each) => each.name === (fold ? fold.runs[0] : run.name));
  return { color: COLORS[place % COLORS.length], dash: page.dashed ? place % DASHES.length : 0 };
}

// The key of a run, beside its name.
function runKey(page, run, inline = "") {
  const { color, dash } = markOf(page, run);
  return page.dashed ? element("i", { class: `dash d${dash} ${inline}`, stroke: color }) : element("i", { class: `swatch ${inline}`, color });
}

// Whether dashes tell runs apart: where colours repeat, and in charts that need their colours for their lines.
const needsDashes = ({ runs, charts }) => runs.length > COLORS.length || (runs.length > 1 && charts.some(colorsAreLines));

const mainLines = (spec) => spec.lines.filter((line) => !line.role);
const colorsAreLines = (spec) => spec.layers || mainLines(spec).length > DASHES.length;

function layerColor(index, total) {
  if (index < 0) return "#8a94a6";
  const place = (total > 1 ? index / (total - 1) : 0) * (LAYERS.length - 1);
  const low = LAYERS[Math.floor(place)], high = LAYERS[Math.min(LAYERS.length - 1, Math.floor(place) + 1)];
  const mixed = low.map((each, part) => Math.round(each + (high[part] - each) * (place % 1)));
  return `rgb(${mixed.join(" ")})`;
}

// The runs whose mean a run is shown in: of those that differ in their seed alone two at least must be chosen.
function foldOf(page, run) {
  const fold = page.view.fold && page.data.folds.find((each) => each.runs.includes(run.name));
  if (!fold) return null;
  const names = fold.runs.filter((name) => page.chosen.has(name));
  return names.length > 1 ? { name: `${fold.name}: mean of ${names.length} seeds`, names, runs: fold.runs } : null;
}

function interpolated(xs, ys, x) {
  const place = placeOf(xs, x);
  if (xs[place] === x || place === 0) return ys[place];
  const share = (x - xs[place - 1]) / (xs[place] - xs[place - 1]);
  return ys[place - 1] + share * (ys[place] - ys[place - 1]);
}

// The same line of several runs as its mean and the ends from the least to the greatest, where all of them have values;
// between two of its values a run has what lies on the straight line, and of buckets their means.
function foldedCurves(curves, name) {
  const [first] = curves;
  const low = Math.max(...curves.map(({ mx }) => mx[0])), high = Math.min(...curves.map(({ mx }) => mx[mx.length - 1]));
  const x = [...new Set(curves.flatMap(({ mx }) => mx))].filter((each) => each >= low && each <= high).sort((a, b) => a - b);
  if (!x.length) return curves; // no step that all have
  const columns = x.map((each) => curves.map(({ mx, my }) => interpolated(mx, my, each)));
  const made = (role, y, label) => ({ ...first, run: { name }, line: { ...first.line, role }, of: first.line.metric, x, y, mx: x, my: y,
    series: { last: [x[x.length - 1], y[y.length - 1]] }, name: label, bad: [] });
  const mean = columns.map(meanOf);
  const label = first.name.replace(first.run.name, name);
  return [{ ...made(null, mean, label), bad: curves.flatMap(({ bad }) => bad).sort((a, b) => a - b) },
    made("low", columns.map((values) => Math.min(...values)), `${label}, lowest`),
    made("high", columns.map((values) => Math.max(...values)), `${label}, highest`)];
}

// Curves with those of folded runs in place of the runs' own; an interval of one run is left out.
function withFolds(curves, page) {
  const groups = new Map();
  for (const curve of curves) {
    const fold = foldOf(page, curve.run);
    if (fold && curve.line.role) continue;
    const key = fold ? `${fold.runs[0]} ${curve.line.metric}` : curve;
    if (!groups.has(key)) groups.set(key, { fold, curves: [] });
    groups.get(key).curves.push(curve);
  }
  return [...groups.values()].flatMap(({ fold, curves: own }) => {
    const drawn = own.filter((curve) => curve.mx.length);
    return fold && drawn.length > 1 ? foldedCurves(drawn, fold.name) : own;
  });
}

// Exponential moving average by distance, without the bias towards its beginning: `weight` is what is left after `unit`,
// so that curves with few points (validation) lag no more than those with many.
function smoothed(xs, ys, weight, unit) {
  const found = new Array(ys.length);
  let sum = 0, norm = 0;
  for (let n = 0; n < ys.length; n++) {
    const left = n ? weight ** Math.max(0.05, (xs[n] - xs[n - 1]) / unit) : 0;
    sum = sum * left + (1 - left) * ys[n];
    norm = norm * left + (1 - left);
    found[n] = sum / norm;
  }
  return found;
}

// The area between the two ends of an interval, and a bar at each point where there are few of them.
function drawBand(context, low, high, color, toX, toY) {
  const clamped = (value) => Math.max(-1e4, Math.min(1e4, Number.isFinite(value) ? value : 1e4));
  const tops = high.sx.map((x, n) => [toX(x), clamped(toY(high.sy[n]))]);
  const bottoms = low.sx.map((x, n) => [toX(x), clamped(toY(low.sy[n]))]);
  if (!tops.length || !bottoms.length) return;
  context.fillStyle = context.strokeStyle = color;
  context.globalAlpha = 0.18;
  context.beginPath();
  [...tops, ...bottoms.reverse()].forEach(([x, y], n) => (n ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.closePath();
  context.fill();
  bottoms.reverse();
  context.globalAlpha = 0.5;
  context.lineWidth = 1.2;
  if (tops.length <= 40 && tops.length === bottoms.length) {
    tops.forEach(([x, y], n) => {
      context.beginPath();
      context.moveTo(x, y);
      context.lineTo(x, bottoms[n][1]);
      context.stroke();
    });
  }
  context.globalAlpha = 1;
}
