// Matrices as the page holds them: 8-bit codes of asinh((x - centre) / scale), 255 for what is not finite; and their colours.

const STOPS = {
  sequential: [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]],
  light: [[18, 64, 130], [54, 124, 188], [140, 188, 222], [246, 246, 246], [244, 176, 142], [208, 82, 66], [128, 8, 36]],
  dark: [[150, 205, 255], [70, 140, 220], [38, 74, 122], [22, 26, 34], [128, 48, 48], [224, 96, 76], [255, 190, 160]],
};
const COLOR_STEPS = 256; // even, so that 0 has a colour of its own
const MISSING = [224, 64, 200];
const SIGNED = new Set(["A", "G_LM"]);
const STATISTICS = ["min", "max", "mean", "low", "high", "collapse", "missing"];

function palette(signed) {
  const stops = STOPS[!signed ? "sequential" : isDark() ? "dark" : "light"];
  return Array.from({ length: COLOR_STEPS + 1 }, (_, n) => {
    const place = (n / COLOR_STEPS) * (stops.length - 1), from = Math.min(stops.length - 2, Math.floor(place));
    return stops[from].map((part, rgb) => Math.round(part + (stops[from + 1][rgb] - part) * (place - from)));
  });
}

// One head's matrix of a picture: its values (NaN where not finite) and the statistics of what it was made from.
function matrixOf(picture, head) {
  if (!picture.bytes) picture.bytes = Uint8Array.from(atob(picture.codes), (letter) => letter.charCodeAt(0));
  const size = picture.rows * picture.columns;
  const [centre, scale, low, high, ...found] = picture.heads[head];
  const meaning = Float64Array.from({ length: 256 }, (_, code) => (code === 255 ? NaN : centre + scale * Math.sinh(low + ((high - low) * code) / 254)));
  const values = Float64Array.from(picture.bytes.subarray(head * size, (head + 1) * size), (code) => meaning[code]);
  return { rows: picture.rows, columns: picture.columns, of: picture.of, values, ...statisticsOf(picture, head), found };
}

const statisticsOf = (picture, head) => Object.fromEntries(STATISTICS.map((name, n) => [name, picture.heads[head][n + 4]]));

function meanRow({ rows, columns, values }) {
  return Float64Array.from({ length: columns }, (_, column) => {
    let sum = 0, number = 0;
    for (let row = 0; row < rows; row++) {
      const value = values[row * columns + column];
      if (value === value) { sum += value; number += 1; }
    }
    return sum / number;
  });
}

const lessMeanRow = (matrix) => {
  const mean = meanRow(matrix);
  return matrix.values.map((value, place) => value - mean[place % matrix.columns]);
};

// The ends of a colour scale over matrices, by their robust percentiles; around 0 where values have signs.
function scaleOver(statistics, signed) {
  const usable = statistics.filter((each) => each.low !== null);
  let low = Math.min(...usable.map((each) => each.low)), high = Math.max(...usable.map((each) => each.high));
  if (!usable.length) return [-1, 1];
  if (signed) high = Math.max(Math.abs(low), Math.abs(high)), low = -high;
  if (low < high) return [low, high];
  const margin = Math.abs(low) * 0.01 || 1;
  return [low - margin, high + margin];
}

// Paints values into image data, their first at (left, top).
function paint(image, matrix, values, [low, high], colors, left, top) {
  const { rows, columns } = matrix;
  for (let place = 0; place < values.length; place++) {
    const value = values[place];
    const share = (value - low) / (high - low);
    const color = value !== value ? MISSING : colors[Math.max(0, Math.min(COLOR_STEPS, Math.round(share * COLOR_STEPS)))];
    const at = 4 * ((top + Math.floor(place / columns)) * image.width + left + (place % columns));
    [image.data[at], image.data[at + 1], image.data[at + 2]] = color;
    image.data[at + 3] = 255;
  }
  return rows;
}

// How alike the rows of a matrix are: as curves, and over the snapshots.

function penOf(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(100, canvas.parentElement.clientWidth || 300);
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.font = "11px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
  const style = getComputedStyle(document.documentElement);
  return { context, width, height, ink: (name) => style.getPropertyValue(name).trim() };
}

function drawRows(canvas, matrix) {
  const { context, width, height, ink } = penOf(canvas, 130);
  const { rows, columns, values } = matrix;
  const [low, high] = scaleOver([matrix], false);
  const toX = (column) => 46 + (column / Math.max(1, columns - 1)) * (width - 54);
  const toY = (value) => 6 + (1 - Math.max(-0.05, Math.min(1.05, (value - low) / (high - low)))) * (height - 12);
  const line = (of) => {
    context.beginPath();
    for (let column = 0; column < columns; column++) {
      if (Number.isFinite(of(column))) context.lineTo(toX(column), toY(of(column)));
    }
    context.stroke();
  };
  context.fillStyle = ink("--quiet");
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const tick of ticks(low, high, 3)) context.fillText(short(tick), 40, toY(tick));
  context.strokeStyle = ink("--accent");
  context.globalAlpha = Math.max(0.12, Math.min(0.6, 8 / rows));
  context.lineWidth = 1;
  for (let row = 0; row < rows; row++) line((column) => values[row * columns + column]);
  context.globalAlpha = 1;
  context.lineWidth = 2;
  context.strokeStyle = ink("--strong");
  const mean = meanRow(matrix);
  line((column) => mean[column]);
  const share = matrix.collapse === null ? "" : `, ${figure(100 * matrix.collapse, 3)} % of the variance lies between them`;
  canvas.setAttribute("aria-label", `The ${rows} rows as curves${share}`);
}

// Of every head of the layer, the chosen one strong.
function drawTrend(canvas, { steps, now, chosen, pictureAt }) {
  const { context, width, height, ink } = penOf(canvas, 110);
  const from = steps[0].step, to = steps[steps.length - 1].step;
  const toX = (step) => 46 + ((step - from) / (to - from || 1)) * (width - 60);
  const toY = (share) => 8 + (1 - share) * (height - 28);
  context.fillStyle = ink("--quiet");
  context.textBaseline = "middle";
  context.textAlign = "right";
  context.strokeStyle = ink("--grid");
  for (const share of [0, 0.5, 1]) {
    context.fillText(String(share), 40, toY(share));
    context.beginPath();
    context.moveTo(46, toY(share));
    context.lineTo(width - 14, toY(share));
    context.stroke();
  }
  for (const [step, align] of [[from, "left"], [to, "right"]]) {
    context.textAlign = align;
    if (step === from || to > from) context.fillText(short(step), toX(step), height - 7);
  }
  const heads = pictureAt(now)?.heads.length || 0;
  const curve = (head, strong) => {
    context.strokeStyle = context.fillStyle = ink("--accent");
    context.globalAlpha = strong ? 1 : 0.25;
    context.lineWidth = strong ? 2 : 1;
    context.beginPath();
    for (const step of steps) {
      const picture = pictureAt(step);
      const share = picture && head < picture.heads.length ? statisticsOf(picture, head).collapse : null;
      if (share !== null) context.lineTo(toX(step.step), toY(share));
      if (share !== null && strong && step === now) context.fillRect(toX(step.step) - 4, toY(share) - 4, 8, 8);
    }
    context.stroke();
    context.globalAlpha = 1;
  };
  for (let head = 0; head < heads; head++) if (head !== chosen.head) curve(head, chosen.view === "all");
  curve(chosen.head, true);
  canvas.setAttribute("aria-label", `Row-map collapse of ${chosen.tensor}, layer ${chosen.layer}, over ${steps.length} snapshots`);
}
