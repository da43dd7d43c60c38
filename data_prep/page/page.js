"use strict";
// What the pages share: elements, numbers, the theme, tables to copy, line and bar charts. `sheet` is the page's data.
const byId = (id) => document.getElementById(id);
function make(name, text, parent, className) {
  const element = document.createElement(name);
  if (text !== null && text !== undefined) element.textContent = text;
  if (className) element.className = className;
  if (parent) parent.appendChild(element);
  return element;
}
function draw(name, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.appendChild(element);
  return element;
}
function show(value, digits = 3) {  // significant digits; large numbers in groups of thousands
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) || Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
}
function brief(value) {  // for an axis: 1k, 2.5M
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= unit) return Number((value / unit).toPrecision(3)) + letter;
  }
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(0) : String(Number(value.toPrecision(3)));
}

// The theme: the system's until the reader chooses.
const system = matchMedia("(prefers-color-scheme: dark)");
const themeListeners = [];
const dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  themed();
}
function themed() {
  const button = byId("theme");
  if (button) {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${dark() ? "light" : "dark"} theme`);
  }
  themeListeners.forEach((listener) => listener());
}
system.addEventListener("change", themed);
byId("theme")?.addEventListener("click", () => setTheme(dark() ? "light" : "dark"));

// Tables to take away.
const tsv = (rows) => rows.map((row) => row.map((cell) => String(cell ?? "").replace(/[\t\n\r]/g, " ")).join("\t")).join("\n") + "\n";
const quoted = (cell) => /[",\n\r]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
const csv = (rows) => rows.map((row) => row.map((cell) => quoted(String(cell ?? ""))).join(",")).join("\n") + "\n";
function say(text) {
  const box = byId("said") ?? Object.assign(make("div", "", document.body), { id: "said" });
  box.setAttribute("role", "status");
  box.textContent = text;
  box.classList.add("on");
  setTimeout(() => box.classList.remove("on"), 1600);
}
async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // an older browser, or no permission
    const area = make("textarea", text, document.body);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(`Copied ${what}`);
}
function save(text, name) {
  const link = make("a", null, document.body);
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  link.remove();
}

// A chart: {title, note, x: {label, log, ticks: [[value, text]]}, y: {log, percent, digits}, bars, lines: [{name, colour, dashed, quiet, points}]}
function ticksOf(low, high, log, count) {
  if (log) {
    const found = [], decades = Math.log10(high / low);
    const steps = decades < 2 ? [1, 2, 5] : [1], skip = Math.max(1, Math.ceil(decades / 7));
    for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k += skip) {
      for (const step of steps) if (step * 10 ** k >= low * 0.999 && step * 10 ** k <= high * 1.001) found.push(step * 10 ** k);
    }
    if (found.length > 1) return found;
  }
  const rough = (high - low) / count || 1, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * unit >= rough) * unit;
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-6; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}
function chart(parent, spec) {
  const box = make("figure", null, parent, "chart");
  box.style.margin = "0";
  make("h3", spec.title, box);
  make("p", spec.note, box, "about");
  const legend = make("div", null, box, "legend");
  const names = spec.lines.map((line) => {
    const entry = make("span", line.name, legend, spec.bars ? "bar" : line.dashed ? "dashed" : "");
    entry.style.setProperty("--colour", `var(--${line.colour})`);
    entry.hidden = Boolean(line.quiet);
    return entry;
  });
  const svg = draw("svg", { role: "img", tabindex: 0, "aria-label": `${spec.title}, ${spec.note}. Arrow keys read the values.` }, box);
  const xs = [...new Set(spec.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  const ys = spec.lines.flatMap((line) => line.points.map((point) => point[1]));
  const format = (value) => spec.y.percent ? `${show(100 * value)}%` : show(value, spec.y.digits);
  let at = null, move = () => {};

  function layout() {
    svg.replaceChildren();
    const width = Math.max(260, Math.round(box.clientWidth || 420)), height = Math.round(Math.min(260, width * 0.6));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    let [low, high] = [Math.min(...ys), Math.max(...ys)];
    if (spec.bars) low = 0;
    if (low === high) [low, high] = spec.y.log ? [low / 2, high * 2] : [low - 1, high + 1];
    const margin = spec.y.log || spec.bars ? 0 : (high - low) * 0.05, half = spec.bars ? 0.5 : 0;
    [low, high] = spec.y.log ? [low / 1.15, high * 1.15] : [low - margin, high + (spec.bars ? high * 0.06 : margin)];
    const yTicks = ticksOf(low, high, spec.y.log, 7), label = (value) => spec.y.percent ? `${brief(100 * value)}%` : brief(value);
    const left = 12 + 7.2 * Math.max(...yTicks.map((tick) => label(tick).length)), right = 12, top = 8, bottom = 42;
    const along = (low, high, log) => log ? (value) => Math.log(value / low) / Math.log(high / low) : (value) => (value - low) / (high - low || 1);
    const xLow = xs[0] - half, xHigh = xs[xs.length - 1] + half;
    const px = along(xLow, xHigh === xLow ? xLow + 1 : xHigh, spec.x.log), py = along(low, high, spec.y.log);
    const X = (value) => left + px(value) * (width - left - right), Y = (value) => height - bottom - py(value) * (height - top - bottom);
    for (const tick of yTicks) {
      draw("line", { x1: left, x2: width - right, y1: Y(tick), y2: Y(tick), class: tick === 0 ? "zero" : "rule" }, svg);
      draw("text", { x: left - 7, y: Y(tick) + 4, "text-anchor": "end" }, svg, label(tick));
    }
    let ticks = spec.x.ticks ?? ticksOf(xLow, xHigh, spec.x.log, Math.max(2, Math.floor(width / 90))).map((tick) => [tick, brief(tick)]);
    let edge = width + 8;  // of the label at the right; those that would touch it are left out
    ticks = ticks.filter(([tick]) => tick >= xLow && tick <= xHigh).reverse().flatMap(([tick, text]) => {
      const wide = 7.2 * text.length, end = Math.min(X(tick) + wide / 2, width);
      if (end > edge - 8) return [];
      edge = end - wide;
      return [[tick, text, end - wide / 2]];
    });
    for (const [tick, text, middle] of ticks) {
      draw("line", { x1: X(tick), x2: X(tick), y1: height - bottom, y2: height - bottom + 4, class: "zero" }, svg);
      draw("text", { x: middle, y: height - bottom + 17, "text-anchor": "middle" }, svg, text);
    }
    draw("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, svg, spec.x.label);
    spec.lines.forEach((line, i) => {
      const style = `stroke: var(--${line.colour})`;
      if (spec.bars) {
        const slot = X(xs[0] + 1) - X(xs[0]), bar = 0.76 * slot / spec.lines.length;
        for (const [x, y] of line.points) {
          const start = X(x) - 0.38 * slot + i * bar;
          draw("rect", { x: start, width: Math.max(1, bar - 1), y: Y(y), height: Math.max(0, Y(0) - Y(y)), rx: 2, style: `fill: var(--${line.colour})` }, svg);
        }
        return;
      }
      const d = line.points.map(([x, y], k) => `${k ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
      draw("path", { d, style, class: line.dashed ? "dashed" : "", "data-name": `${spec.title}: ${line.name}` }, svg);
      if (line.points.length < 40) {
        for (const [x, y] of line.points) draw("circle", { cx: X(x), cy: Y(y), r: 2.6, style: `fill: var(--${line.colour})` }, svg);
      }
    });
    const cross = draw("line", { y1: top, y2: height - bottom, class: "cross", visibility: "hidden" }, svg);
    move = (k) => {
      at = k;
      const x = k === null ? null : xs[k];
      cross.setAttribute("visibility", x === null ? "hidden" : "visible");
      if (x !== null) for (const end of ["x1", "x2"]) cross.setAttribute(end, X(x));
      spec.lines.forEach((line, i) => {
        const point = line.points.find((point) => point[0] === x);
        names[i].textContent = line.name + (point ? ` ${format(point[1])}` : "");
      });
      where.textContent = x === null ? "" : `at ${spec.x.ticks?.find((tick) => tick[0] === x)?.[1] ?? show(x)}`;
    };
    svg.onpointermove = (event) => {
      const view = svg.getBoundingClientRect(), place = (event.clientX - view.left) * width / view.width;
      move(xs.reduce((best, x, k) => Math.abs(X(x) - place) < Math.abs(X(xs[best]) - place) ? k : best, 0));
    };
    svg.onpointerleave = () => move(null);
    if (at !== null) move(at);
  }
  const where = make("b", "", legend);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    move(Math.min(Math.max((at ?? (step > 0 ? -1 : xs.length)) + step, 0), xs.length - 1));
  });
  svg.addEventListener("blur", () => move(null));
  layout();
  let seen = box.clientWidth;
  new ResizeObserver(() => { if (box.clientWidth !== seen) { seen = box.clientWidth; layout(); } }).observe(box);
}
// The charts of an element with data-charts=KEY, and under them all their numbers. #only=HEADING shows one section.
function charts() {
  const only = new URLSearchParams(location.hash.slice(1)).get("only");
  const other = (part) => part.querySelector("h2")?.textContent !== only;
  if (only) document.querySelectorAll("header, main > *").forEach((part) => { part.hidden = other(part); });
  document.querySelectorAll("[data-charts]").forEach((place) => {
    const specs = sheet.charts[place.dataset.charts], box = make("div", null, place, "charts");
    specs.forEach((spec) => chart(box, spec));
    const rows = [["chart", "line", "x", "value"]];
    for (const spec of specs) for (const line of spec.lines) for (const [x, y] of line.points) rows.push([spec.title, line.name, x, y]);
    const tools = make("div", null, place, "tools");
    tools.style.marginTop = "10px";
    make("button", "Copy numbers (TSV)", tools).addEventListener("click", () => copy(tsv(rows), `${rows.length - 1} numbers`));
    make("button", "Save as CSV", tools).addEventListener("click", () => save(csv(rows), `${place.dataset.charts}.csv`));
  });
}
