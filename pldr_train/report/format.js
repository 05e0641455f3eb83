"use strict";
// Words, numbers and elements. Text from files only ever becomes a text node.

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "color") made.style.background = value;
    else if (name === "stroke") made.style.borderTopColor = value || "var(--quiet)";
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null && child !== ""));
  return made;
}

const byId = (id) => document.getElementById(id);

// A list to choose from: entries of [value, words].
function listBox(entries, value, change, id = null) {
  const made = element("select", { id }, ...entries.map(([key, words]) => element("option", { value: key, selected: key === value }, words)));
  made.addEventListener("change", () => change(made.value));
  return made;
}

const isDark = () => document.documentElement.dataset.theme === "dark";

// Gives the page the reader's colours, now and whenever these change, then calls `paint`.
function followTheme(paint) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let theme = "auto";
  try { theme = localStorage.getItem("pldr-theme") || "auto"; } catch { /* files may have no storage */ }
  const apply = () => {
    document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
    paint();
  };
  for (const radio of document.getElementsByName("theme")) {
    radio.checked = radio.value === theme;
    radio.addEventListener("change", () => {
      theme = radio.value;
      try { localStorage.setItem("pldr-theme", theme); } catch { /* as above */ }
      apply();
    });
  }
  dark.addEventListener("change", apply);
  apply();
}

// Of the values that are there; null where none is.
function meanOf(values) {
  const found = values.filter((value) => value != null);
  return found.length ? found.reduce((sum, value) => sum + value, 0) / found.length : null;
}

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const count = (number) => (number == null ? "–" : grouped.format(number));

function figure(value, digits = 4) {
  if (value == null || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e7) return value.toExponential(Math.max(1, digits - 2)).replace("e+", "e");
  if (Number.isInteger(value) || size >= 10 ** digits) return grouped.format(value);
  return String(Number(value.toPrecision(digits)));
}

function short(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit * 0.9995) return `${Number((value / unit).toPrecision(4))}${letter}`;
  }
  return size < 1e-3 ? value.toExponential(1).replace(".0e", "e") : String(Number(value.toPrecision(4)));
}

function bytes(number) {
  if (number == null) return "–";
  for (const [unit, name] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"]]) {
    if (number >= unit) return `${(number / unit).toFixed(1)} ${name}`;
  }
  return `${(number / 1e3).toFixed(1)} kB`;
}

const clock = (seconds) =>
  seconds == null ? "–" : new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });

function tickStep(span, most) {
  const raw = span / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const factor = [1, 2, 2.5, 5, 10].find((each) => each * power >= raw * 0.9999);
  return factor * power;
}

function ticks(low, high, most) {
  const step = tickStep(high - low || 1, most);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9 && found.length < 50; n++) found.push(n * step);
  return found;
}

function logTicks(low, high, most) {
  const decades = Math.log10(high / low);
  if (decades < 1.2) return ticks(low, high, most).filter((tick) => tick > 0);
  const factors = decades < 3 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil(decades / most));
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += every) {
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.9999 && tick <= high * 1.0001) found.push(tick);
    }
  }
  return found;
}

// The place of the first entry that is not below x.
function placeOf(sorted, x) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

function nearest(sorted, x) {
  const place = placeOf(sorted, x);
  if (place === 0) return 0;
  if (place === sorted.length) return place - 1;
  return x - sorted[place - 1] <= sorted[place] - x ? place - 1 : place;
}
