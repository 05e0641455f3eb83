// Colours, smoothing and intervals of curves.

const COLORS = ["#4269d0", "#ff725c", "#3ca951", "#d99a00", "#a463f2", "#17a2b8", "#e0559d", "#9c6b4e", "#7a8ca8", "#7fb800"];
const LAYERS = [[68, 70, 170], [40, 130, 180], [35, 165, 130], [150, 180, 50], [235, 150, 40], [220, 70, 60]];
const DASHES = [[], [6, 4], [2, 3], [9, 3, 2, 3]];

// What a run has in all charts: its colour, and its dash where the page needs dashes to tell runs apart.
function markOf(page, run) {
  const place = page.data.runs.indexOf(run);
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
