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
