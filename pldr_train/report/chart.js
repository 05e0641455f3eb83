// One chart: curves on a canvas, a second canvas for the cross-hair and the zoom's selection.

const EDGE = { left: 58, right: 12, top: 8, bottom: 24 };

class Chart {
  constructor(spec, view, page) {
    this.spec = spec;
    this.view = view;
    this.page = page;
    this.found = null;
    this.unplaced = 0;
    this.stale = true;
    this.onScreen = false;
    this.build();
  }

  build() {
    const { spec } = this;
    this.plot = element("div", { class: "plot", tabindex: "0", role: "group", "aria-roledescription": "chart" });
    this.base = element("canvas", { "aria-hidden": "true" });
    this.over = element("canvas", { class: "over", "aria-hidden": "true" });
    this.plot.append(this.base, this.over);
    this.legend = element("div", { class: "legend" });
    this.hint = element("div", { class: "hint" });
    const wide = element("button", { type: "button", "aria-pressed": "false", title: "Whole width", "aria-label": `${spec.title}: whole width` }, "⤢");
    wide.addEventListener("click", () => {
      wide.setAttribute("aria-pressed", String(this.figure.classList.toggle("wide")));
      this.draw();
    });
    const alone = spec.lines.length === 1 && spec.lines[0].metric !== spec.title && !spec.meaning ? spec.lines[0].metric : "";
    this.figure = element("figure", { class: "chart" },
      element("figcaption", { title: spec.meaning }, element("h3", {}, spec.title),
        element("span", { class: "unit" }, [spec.unit, alone].filter(Boolean).join(" · ")), wide),
      this.plot, this.legend, this.hint);
    this.plot.addEventListener("pointermove", (event) => this.moved(event));
    this.plot.addEventListener("pointerleave", () => this.drag || this.page.point(null));
    this.plot.addEventListener("pointerdown", (event) => this.pressed(event));
    this.plot.addEventListener("pointerup", (event) => this.released(event));
    this.plot.addEventListener("pointercancel", () => { this.drag = null; this.page.point(null); });
    this.plot.addEventListener("dblclick", () => this.page.zoom(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("blur", () => this.page.point(null));
  }

  get log() {
    return this.view.log || this.spec.log;
  }

  // Something has changed; what it means for the curves is found out when they are asked for.
  update() {
    const { page, spec } = this;
    this.figure.hidden = !page.data.runs.some((run) => page.chosen.has(run.name) &&
      spec.lines.some((line) => run.series[line.metric] && (run.series[line.metric].x.length || run.series[line.metric].nonfinite)));
    this.found = null;
    this.stale = true;
  }

  // The curves of the chosen runs: x by the chosen axis.
  get curves() {
    if (this.found) return this.found;
    const { spec, page, view } = this;
    const indices = [...new Set(spec.lines.map((line) => line.index))].filter((index) => index !== null).sort((a, b) => a - b);
    const several = page.data.runs.length > 1;
    const main = mainLines(spec);
    // With several runs, colours are runs and dashes are lines; where there are too many lines it is the other way round.
    const byLine = spec.layers || (several && colorsAreLines(spec));
    this.found = [];
    this.unplaced = 0;
    for (const run of page.data.runs) {
      if (!page.chosen.has(run.name)) continue;
      const mark = markOf(page, run);
      for (const line of spec.lines) {
        const series = run.series[line.metric];
        if (!series || !(series.x.length || series.nonfinite)) continue;
        const x = page.axisOf(run, series.x);
        if (x === null) { this.unplaced += 1; continue; }
        const number = Math.max(0, main.indexOf(line));
        const color = spec.layers ? layerColor(line.index === null ? -1 : indices.indexOf(line.index), indices.length)
          : byLine || !several ? COLORS[number % COLORS.length] : mark.color;
        const dash = byLine ? mark.dash + (line.metric.startsWith("val/") ? 1 : 0) : several && main.length === 1 ? mark.dash : several || spec.overlap ? number : 0;
        const name = !several ? line.label : spec.lines.length === 1 ? run.name : `${run.name} · ${line.label}`;
        const mx = series.mx ? page.axisOf(run, series.mx) : x;
        const bad = series.nonfinite ? page.axisOf(run, series.nonfinite) : [];
        this.found.push({ run, line, series, x, y: series.y, name, color, dash: Math.min(dash, DASHES.length - 1), mx, my: series.my || series.y, bad });
      }
    }
    this.found = withFolds(this.found, page);
    const ends = this.found.filter((curve) => curve.x.length).map((curve) => curve.x[curve.x.length - 1] - curve.x[0]);
    const unit = Math.max(...ends, 0) / 500 || 1;
    for (const curve of this.found) {
      curve.sx = view.smooth > 0 ? curve.mx : curve.x;
      curve.sy = view.smooth > 0 ? smoothed(curve.mx, curve.my, view.smooth, unit) : curve.y;
    }
    this.legend.replaceChildren(...this.keys(byLine).map(([name, color, dash]) => element("span", {},
      dash === "band" ? element("i", { class: "dash band", color }) : element("i", { class: `dash d${dash}`, stroke: color }), name)));
    this.plot.setAttribute("aria-label", this.described());
    return this.found;
  }

  // What colours and dashes stand for, but for runs: the table of runs is their legend.
  keys(byLine) {
    const main = this.found.filter((curve) => !curve.line.role);
    const several = this.page.data.runs.length > 1;
    const bands = [["95 % interval", (curve) => curve.line.role && !curve.of], ["lowest to highest seed", (curve) => curve.line.role && curve.of]]
      .filter(([, isEnd]) => this.found.some(isEnd)).map(([name]) => [name, several ? "var(--quiet)" : this.found[0].color, "band"]);
    const lines = new Map(main.map(({ line, color, dash }) => [line.label, !several ? [line.label, color, dash] : [line.label, byLine ? color : "", byLine ? 0 : dash]]));
    return [...(lines.size > 1 ? lines.values() : []), ...bands];
  }

  described() {
    const last = this.curves.slice(0, 6).map((curve) => `${curve.name} ${curve.series.last ? figure(curve.series.last[1]) : "none"}`);
    const more = this.curves.length > 6 ? ` and ${this.curves.length - 6} more` : "";
    return `${this.spec.title}: last values ${last.join(", ")}${more}. Left and right arrows read values, plus and minus zoom, 0 shows all.`;
  }

  ranges() {
    let low = Infinity, high = -Infinity;
    for (const curve of this.curves) {
      for (const x of [curve.x, curve.bad]) {
        if (x.length) { low = Math.min(low, x[0]); high = Math.max(high, x[x.length - 1]); }
      }
    }
    if (this.view.zoom) [low, high] = this.view.zoom;
    if (!(low <= high)) return null;
    if (low === high) { low -= 0.5; high += 0.5; }
    const { log } = this;
    const seen = [];
    let hiddenValues = 0;
    for (const curve of this.curves) {
      const from = placeOf(curve.sx, low);
      for (const values of this.view.smooth > 0 && !this.view.outliers ? [curve.sy, null] : [curve.sy]) {
        const xs = values ? curve.sx : curve.x, ys = values || curve.y;
        for (let n = values ? from : placeOf(xs, low); n < xs.length && xs[n] <= high; n++) {
          if (log && ys[n] <= 0) hiddenValues += values ? 1 : 0;
          else seen.push(ys[n]);
        }
      }
    }
    let bottom = Infinity, top = -Infinity;
    if (this.view.outliers && seen.length > 20) {
      seen.sort((a, b) => a - b);
      bottom = seen[Math.floor(seen.length * 0.01)];
      top = seen[Math.ceil(seen.length * 0.99) - 1];
    } else {
      for (const y of seen) { if (y < bottom) bottom = y; if (y > top) top = y; }
    }
    if (!(bottom <= top)) [bottom, top] = log ? [0.1, 1] : [0, 1];
    if (log) {
      const margin = Math.max(0.02, (Math.log10(top) - Math.log10(bottom)) * 0.05);
      [bottom, top] = [10 ** Math.max(-307, Math.log10(bottom) - margin), 10 ** Math.min(308, Math.log10(top) + margin)];
    } else {
      const margin = (top - bottom) * 0.05 || Math.abs(top) * 0.05 || 0.5;
      const floor = bottom >= 0 ? 0 : -Infinity;
      [bottom, top] = [Math.max(floor, bottom - margin), top + margin];
    }
    return { low, high, bottom, top, hiddenValues };
  }

  sized(canvas) {
    const ratio = window.devicePixelRatio || 1;
    const width = this.plot.clientWidth, height = this.plot.clientHeight;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    return { context, width, height };
  }

  draw() {
    if (!this.onScreen || this.figure.hidden) return;
    this.stale = false;
    const { context, width, height } = this.sized(this.base);
    if (!width) { this.stale = true; return; }
    const range = this.ranges();
    const hints = [];
    if (this.unplaced) hints.push(`Some curves have no count of ${this.view.axis} and are shown by steps only.`);
    if (range && range.hiddenValues) hints.push("Values of 0 and below have no place on a logarithmic axis.");
    this.hint.textContent = hints.join(" ");
    const style = getComputedStyle(document.documentElement);
    const ink = (name) => style.getPropertyValue(name).trim();
    if (!range) {
      context.fillStyle = ink("--quiet");
      context.fillText("no values", width / 2 - 20, height / 2);
      this.scale = null;
      return;
    }
    const inner = { width: width - EDGE.left - EDGE.right, height: height - EDGE.top - EDGE.bottom };
    const log = this.log ? Math.log10 : (y) => y;
    const bottom = log(range.bottom), top = log(range.top);
    this.scale = {
      ...range, inner,
      toX: (x) => EDGE.left + ((x - range.low) / (range.high - range.low)) * inner.width,
      toY: (y) => EDGE.top + (1 - (log(y) - bottom) / (top - bottom)) * inner.height,
      fromX: (pixel) => range.low + ((pixel - EDGE.left) / inner.width) * (range.high - range.low),
    };
    this.drawAxes(context, ink, height);
    context.save();
    context.beginPath();
    context.rect(EDGE.left, EDGE.top - 2, inner.width, inner.height + 4);
    context.clip();
    if (this.view.events) this.drawEvents(context, ink("--bad"));
    const faint = this.view.smooth > 0;
    this.drawBands(context);
    const inOrder = this.curves.filter((curve) => !curve.line.role).sort((a, b) => a.dash - b.dash); // dashes (validation) over the dense curves
    if (faint) for (const curve of inOrder) this.drawCurve(context, curve, curve.x, curve.y, 0.22);
    for (const curve of inOrder) this.drawCurve(context, curve, curve.sx, curve.sy, 1);
    context.restore();
    this.drawBad(context);
    this.drawOver();
  }

  drawAxes(context, ink, height) {
    const { scale } = this;
    context.font = "11px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
    context.lineWidth = 1;
    const most = Math.max(2, Math.floor(scale.inner.height / 42));
    const marks = this.log ? logTicks(scale.bottom, scale.top, most) : ticks(scale.bottom, scale.top, most);
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const tick of marks) {
      const y = Math.round(scale.toY(tick)) + 0.5;
      context.strokeStyle = ink("--grid");
      context.beginPath();
      context.moveTo(EDGE.left, y);
      context.lineTo(EDGE.left + scale.inner.width, y);
      context.stroke();
      context.fillStyle = ink("--quiet");
      context.fillText(short(tick), EDGE.left - 7, y);
    }
    context.textBaseline = "top";
    for (const tick of ticks(scale.low, scale.high, Math.max(2, Math.floor(scale.inner.width / 84)))) {
      const x = scale.toX(tick);
      context.textAlign = x > EDGE.left + scale.inner.width - 22 ? "right" : x < EDGE.left + 10 ? "left" : "center";
      context.fillText(short(tick), x, height - EDGE.bottom + 8);
    }
    context.strokeStyle = ink("--axis");
    context.beginPath();
    context.moveTo(EDGE.left, EDGE.top + scale.inner.height + 0.5);
    context.lineTo(EDGE.left + scale.inner.width, EDGE.top + scale.inner.height + 0.5);
    context.stroke();
  }

  drawCurve(context, curve, xs, ys, alpha) {
    const { scale, log } = this;
    const from = Math.max(0, placeOf(xs, scale.low) - 1);
    const to = Math.min(xs.length, placeOf(xs, scale.high) + 2);
    context.globalAlpha = alpha;
    context.strokeStyle = context.fillStyle = curve.color;
    const dense = alpha < 1 || to - from > scale.inner.width;
    context.lineWidth = dense ? 1 : this.spec.layers && curve.line.index === null ? 2.6 : this.curves.length > 12 ? 1.2 : 1.6;
    context.lineJoin = "round";
    context.setLineDash(alpha < 1 ? [] : DASHES[curve.dash]);
    context.beginPath();
    let pen = false;
    for (let n = from; n < to; n++) {
      if (log && ys[n] <= 0) { pen = false; continue; }
      const x = scale.toX(xs[n]), y = Math.max(-1e4, Math.min(1e4, scale.toY(ys[n])));
      if (pen) context.lineTo(x, y);
      else context.moveTo(x, y);
      pen = true;
    }
    context.stroke();
    context.setLineDash([]);
    if (alpha === 1 && to - from <= 40) {
      for (let n = from; n < to; n++) {
        if (log && ys[n] <= 0) continue;
        context.beginPath();
        context.arc(scale.toX(xs[n]), scale.toY(ys[n]), 2.2, 0, 7);
        context.fill();
      }
    }
    context.globalAlpha = 1;
  }

  drawBands(context) {
    for (const low of this.curves.filter((curve) => curve.line.role === "low")) {
      const high = this.curves.find((curve) => curve.line.role === "high" && curve.run.name === low.run.name && curve.of === low.of);
      if (high) drawBand(context, low, high, low.color, this.scale.toX, this.scale.toY);
    }
  }

  drawEvents(context, color) {
    context.strokeStyle = color;
    context.globalAlpha = 0.75;
    context.setLineDash([2, 3]);
    for (const run of this.page.data.runs) {
      if (!this.page.chosen.has(run.name)) continue;
      const steps = run.events.filter((event) => event.step !== null).map((event) => event.step);
      for (const x of this.page.axisOf(run, steps) || []) {
        const place = Math.round(this.scale.toX(x)) + 0.5;
        context.beginPath();
        context.moveTo(place, EDGE.top);
        context.lineTo(place, EDGE.top + this.scale.inner.height);
        context.stroke();
      }
    }
    context.setLineDash([]);
    context.globalAlpha = 1;
  }

  // A triangle on the axis where a value was not finite.
  drawBad(context) {
    const y = EDGE.top + this.scale.inner.height;
    for (const curve of this.curves) {
      context.fillStyle = curve.color;
      for (const each of curve.bad) {
        const x = this.scale.toX(each);
        if (x < EDGE.left || x > EDGE.left + this.scale.inner.width) continue;
        context.beginPath();
        context.moveTo(x, y - 7);
        context.lineTo(x + 4, y);
        context.lineTo(x - 4, y);
        context.fill();
      }
    }
  }

  drawOver() {
    if (!this.scale || !this.onScreen) return;
    const { context, height } = this.sized(this.over);
    const style = getComputedStyle(document.documentElement);
    const { inner } = this.scale;
    if (this.drag && this.drag.moved) {
      context.fillStyle = style.getPropertyValue("--accent");
      context.globalAlpha = 0.16;
      context.fillRect(Math.min(this.drag.from, this.drag.to), EDGE.top, Math.abs(this.drag.to - this.drag.from), inner.height);
      context.globalAlpha = 1;
    }
    const x = this.page.cursor;
    if (x === null || x < this.scale.low || x > this.scale.high) return;
    context.strokeStyle = style.getPropertyValue("--axis");
    context.beginPath();
    context.moveTo(this.scale.toX(x), EDGE.top);
    context.lineTo(this.scale.toX(x), height - EDGE.bottom);
    context.stroke();
    for (const { curve, n } of this.readings(x).filter((each) => !each.curve.line.role)) {
      const y = this.scale.toY(curve.sy[n]);
      if (!Number.isFinite(y) || y < EDGE.top - 2 || y > height - EDGE.bottom + 2) continue;
      context.fillStyle = curve.color;
      context.beginPath();
      context.arc(this.scale.toX(curve.sx[n]), y, 3.5, 0, 7);
      context.fill();
    }
  }

  readings(x) {
    return this.curves.filter((curve) => curve.sx.length).map((curve) => ({ curve, n: nearest(curve.sx, x) }));
  }

  // Steps where any curve has a value, so that hovering and the arrow keys stop at real values.
  snapped(x) {
    let best = null;
    for (const { curve, n } of this.readings(x)) {
      if (best === null || Math.abs(curve.sx[n] - x) < Math.abs(best - x)) best = curve.sx[n];
    }
    return best;
  }

  place(event) {
    const box = this.plot.getBoundingClientRect();
    return Math.max(EDGE.left, Math.min(box.width - EDGE.right, event.clientX - box.left));
  }

  moved(event) {
    if (!this.scale) return;
    const pixel = this.place(event);
    if (this.drag) {
      this.drag.to = pixel;
      this.drag.moved = this.drag.moved || Math.abs(pixel - this.drag.from) > 4;
    }
    this.page.point(this.snapped(this.scale.fromX(pixel)), this, event);
  }

  pressed(event) {
    if (event.button !== 0 || !this.scale || event.pointerType === "touch") return;
    this.drag = { from: this.place(event), to: this.place(event), moved: false };
    try { this.plot.setPointerCapture(event.pointerId); } catch { /* a made-up pointer cannot be captured */ }
  }

  released() {
    const drag = this.drag;
    this.drag = null;
    if (!drag || !drag.moved) return;
    const ends = [this.scale.fromX(drag.from), this.scale.fromX(drag.to)].sort((a, b) => a - b);
    if (ends[1] > ends[0]) this.page.zoom(ends);
  }

  key(event) {
    if (!this.scale || event.ctrlKey || event.metaKey || event.altKey) return;
    const { low, high } = this.scale;
    const middle = this.page.cursor ?? (low + high) / 2, half = (high - low) / 2;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") this.step(event.key === "ArrowRight" ? 1 : -1, event.shiftKey ? 10 : 1);
    else if (event.key === "Home" || event.key === "End") this.page.point(this.snapped(event.key === "Home" ? low : high), this, null);
    else if (event.key === "+" || event.key === "=") this.page.zoom([middle - half / 2, middle + half / 2]);
    else if (event.key === "-") this.page.zoom([middle - half * 2, middle + half * 2]);
    else if (event.key === "0" || event.key === "Escape") this.page.zoom(null);
    else return;
    event.preventDefault();
  }

  step(direction, times) {
    let x = this.page.cursor ?? (direction > 0 ? this.scale.low - 1 : this.scale.high + 1);
    for (let n = 0; n < times; n++) {
      let next = null;
      for (const { sx } of this.curves) {
        const place = direction > 0 ? placeOf(sx, x + 1e-9) : placeOf(sx, x) - 1;
        if (place >= 0 && place < sx.length && (next === null || (direction > 0 ? sx[place] < next : sx[place] > next))) next = sx[place];
      }
      if (next === null || next < this.scale.low || next > this.scale.high) break;
      x = next;
    }
    this.page.point(x, this, null);
  }
}
