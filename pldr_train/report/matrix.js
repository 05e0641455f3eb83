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
  const stops = STOPS[!signed ? "sequential" : document.documentElement.dataset.theme === "dark" ? "dark" : "light"];
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
