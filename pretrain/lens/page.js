// The grid of layers × positions: a window of the positions, moved by keys, the strip or the wheel.
const R = sheet.layers.length, N = sheet.tokens.length;
const rgbOf = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const state = { view: sheet.views[0].key, row: R - 1, column: 0, chosen: false, pinned: false, first: 0, cell: 92, sized: false, values: false, query: "" };
let count = N, hits = [];
const view = () => sheet.views.find((one) => one.key === state.view);
const guess = (r, n) => sheet.texts[sheet.guesses[r][n][0]];
const between = (value, low, high) => Math.min(Math.max(value, low), high);

function share(view, value) {  // 0 to 1 along the colours
  const clipped = between(value, view.low, view.high);
  return view.log ? Math.log(clipped / view.low) / Math.log(view.high / view.low) : (clipped - view.low) / (view.high - view.low);
}
function ramp(view) { return sheet.colours[view.colours][dark() ? "dark" : "light"].map(rgbOf); }
function colour(stops, x) {
  const place = x * (stops.length - 1), i = Math.min(Math.floor(place), stops.length - 2);
  return stops[i].map((low, c) => Math.round(low + (stops[i + 1][c] - low) * (place - i)));
}
const css = (rgb) => `rgb(${rgb.join(",")})`;
function luminance(rgb) {  // WCAG 2
  const [r, g, b] = rgb.map((c) => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const ink = (rgb) => luminance(rgb) > 0.179 ? "#000" : "#fff";  // at least 4.58 : 1 on every colour
const cellColour = (stops, view, r, n) => {
  const value = view.values[r][n];
  return value === null ? (dark() ? [60, 66, 74] : [221, 221, 221]) : colour(stops, share(view, value));
};

function summary() {
  for (const [name, text] of sheet.facts) {
    const box = make("div", null, byId("facts"), name === "prompt" ? "wide" : "");
    make("dt", name, box);
    make("dd", text, box);
  }
}
function label(r, n) {
  const one = view();
  return `${sheet.layers[r]}, position ${sheet.positions[n]}, after ${sheet.tokens[n]}: guess ${guess(r, n)}, ${one.title} ${show(one.values[r][n])}`;
}
function render() {
  const one = view(), stops = ramp(one), grid = byId("grid"), frame = byId("frame");
  const longest = Math.max(...sheet.layers.map((name) => name.length), 5);
  const side = Math.min(Math.round(7.4 * longest + 14), 170), room = Math.max(frame.clientWidth - side - 4, 60);
  count = between(Math.floor(room / (state.sized || room > 420 ? state.cell : 62)), 1, N);
  if (!state.sized && room / N >= 62) count = N;  // all of a short text
  state.first = between(state.first, 0, N - count);
  const widest = Math.min(room / count, 150), height = between(Math.floor((innerHeight - 470) / R), 16, 32);
  grid.style.setProperty("--label", `${side}px`);
  grid.style.setProperty("--height", `${height}px`);
  grid.style.width = `${side + widest * count}px`;
  grid.classList.toggle("thin", widest < 34);
  grid.setAttribute("aria-label", `${one.title}: layers × positions`);
  grid.setAttribute("aria-rowcount", R + 2);
  grid.setAttribute("aria-colcount", N + 1);
  grid.replaceChildren();
  const shown = Array.from({ length: count }, (_, i) => state.first + i);
  const head = make("tr", null, make("thead", null, grid));
  make("th", "next", head, "layer");
  for (const n of shown) {
    const cell = make("th", (sheet.right[n] ? "✓ " : "") + sheet.nexts[n], head, `token${sheet.right[n] ? " right" : ""}`);
    cell.scope = "col";
    cell.title = `next token: ${sheet.nexts[n] || "none"}`;
  }
  const body = make("tbody", null, grid);
  for (let r = R - 1; r >= 0; r--) {
    const line = make("tr", null, body);
    const name = make("th", sheet.layers[r], line, "layer");
    name.scope = "row";
    name.title = sheet.layers[r];
    for (const n of shown) {
      const rgb = cellColour(stops, one, r, n);
      const cell = make("td", state.values ? show(one.values[r][n]) : guess(r, n), line, sheet.agrees[r][n] ? "agrees" : "");
      cell.id = `cell-${r}-${n}`;
      cell.dataset.row = r;
      cell.dataset.column = n;
      cell.setAttribute("role", "gridcell");
      cell.setAttribute("aria-colindex", n + 2);
      cell.setAttribute("aria-label", label(r, n));
      cell.style.background = css(rgb);
      cell.style.color = ink(rgb);
    }
  }
  const foot = make("tfoot", null, grid), below = make("tr", null, foot), places = make("tr", null, foot);
  make("th", "token", below, "layer");
  make("th", "position", places, "layer");
  for (const n of shown) {
    const cell = make("th", sheet.tokens[n], below, `token${hits.includes(n) ? " found" : ""}`);
    cell.scope = "col";
    cell.title = `token: ${sheet.tokens[n]}`;
    cell.dataset.token = n;
    make("th", widest >= 22 || n % 5 === 0 ? String(sheet.positions[n]) : "", places, "place");
  }
  legend(one, stops);
  strip(one, stops);
  mark();
}
function legend(one, stops) {
  document.title = `${one.title} · Logit lens`;
  byId("title").textContent = `${one.title}${one.unit === "nats" ? ", nats" : ""}`;
  byId("about").textContent = one.about;
  byId("cap").textContent = one.scale;
  const colours = Array.from({ length: 24 }, (_, i) => css(colour(stops, i / 23)));
  byId("ramp").style.background = `linear-gradient(to right, ${colours.join(",")})`;
  const ticks = byId("ticks"), place = (value) => share(one, value);
  const inner = ticksOf(one.low, one.high, one.log, 4).filter((value) => place(value) > 0.1 && place(value) < 0.84);
  ticks.replaceChildren();
  for (const value of [one.low, ...inner, one.high]) {
    make("span", (value === one.high ? "≥ " : "") + show(value), ticks).style.left = `${100 * place(value)}%`;
  }
  document.querySelectorAll("#views button").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.view === state.view)));
  byId("as-guess").setAttribute("aria-pressed", String(!state.values));
  byId("as-value").setAttribute("aria-pressed", String(state.values));
}
let painted = "";
function strip(one, stops) {
  const box = byId("strip"), canvas = byId("overview");
  box.hidden = count >= N;
  byId("range").textContent = N === 1 ? "1 position" : `positions ${sheet.positions[state.first]} to ${sheet.positions[state.first + count - 1]}, ${count.toLocaleString("en")} of ${N.toLocaleString("en")}`;
  if (box.hidden) return;
  const wanted = `${one.key} ${dark()}`;
  if (painted !== wanted) {
    painted = wanted;
    canvas.width = N;
    canvas.height = R;
    const context = canvas.getContext("2d"), image = context.createImageData(N, R);
    for (let r = 0; r < R; r++) {
      for (let n = 0; n < N; n++) image.data.set([...cellColour(stops, one, r, n), 255], 4 * ((R - 1 - r) * N + n));
    }
    context.putImageData(image, 0, 0);
  }
  const frame = byId("window");
  frame.style.left = `${100 * state.first / N}%`;
  frame.style.width = `${100 * count / N}%`;
  const marks = byId("found-marks");
  marks.replaceChildren();
  for (const n of hits) make("i", null, marks).style.left = `${100 * (n + 0.5) / N}%`;
  box.setAttribute("aria-valuemax", N - count);
  box.setAttribute("aria-valuenow", state.first);
  box.setAttribute("aria-valuetext", byId("range").textContent);
}
function mark() {
  const grid = byId("grid"), cell = byId(`cell-${state.row}-${state.column}`);
  grid.querySelectorAll(".on").forEach((one) => { one.classList.remove("on", "pinned"); one.removeAttribute("aria-selected"); });
  if (state.chosen && cell) {
    cell.classList.add("on");
    cell.classList.toggle("pinned", state.pinned);
    cell.setAttribute("aria-selected", "true");
    grid.setAttribute("aria-activedescendant", cell.id);
    grid.querySelector(`[data-token="${state.column}"]`)?.classList.add("on");
  }
  pointer(state.chosen ? view().values[state.row][state.column] : null);
  inspect();
}
function pointer(value) {
  const one = view(), on = value !== null && value !== undefined;
  byId("mark").style.display = on ? "block" : "none";
  if (on) byId("mark").style.left = `${100 * share(one, value)}%`;
}
function heading(r, n, box) {
  make("h3", `${sheet.layers[r]} · position ${sheet.positions[n]}${state.pinned && r === state.row && n === state.column ? " · pinned" : ""}`, box);
  const context = make("div", null, box, "context");
  for (let m = Math.max(0, n - 6); m <= Math.min(N - 1, n + 3); m++) {
    make(m === n ? "b" : "span", sheet.tokens[m], context);
    context.append(" ");
  }
}
function guesses(r, n, box, most) {
  const table = make("table", null, box, "guesses"), top = sheet.probabilities[r][n][0] || 1;
  sheet.guesses[r][n].slice(0, most).forEach((text, i) => {
    const line = make("tr", null, table), p = sheet.probabilities[r][n][i];
    make("td", sheet.texts[text], line);
    make("i", null, make("td", null, line, "bar")).style.width = `${100 * (p ?? 0) / top}%`;
    make("td", p === null ? "–" : `${show(100 * p)}%`, line, "number");
    if (most > 5) make("td", show(sheet.logits[r][n][i]), line, "number soft");
  });
}
function numbers(r, n, box) {
  const list = make("dl", null, box, "numbers");
  const add = (name, text) => { make("dt", name, list); make("dd", text, list); };
  add("Next token", sheet.nexts[n] || "none");
  add("Loss on the next token, nats", show(sheet.losses[r][n]));
  for (const one of sheet.views) add(one.title + (one.unit === "nats" ? ", nats" : ""), show(one.values[r][n]));
}
function inspect() {
  const box = byId("inspector"), r = state.row, n = state.column;
  box.replaceChildren();
  if (!state.chosen) {
    make("p", "Point at a cell for its guesses, or click on it. Arrow keys move, Enter pins the cell, ? lists all keys.", box, "soft");
    box.style.minHeight = "0";
    return;
  }
  box.style.minHeight = "";
  const left = make("div", null, box), middle = make("div", null, box), right = make("div", null, box);
  heading(r, n, left);
  make("div", "Guesses, their probabilities and logits", left, "soft");
  guesses(r, n, left, 10);
  make("h3", "All measures of this cell", middle);
  numbers(r, n, middle);
  const one = view(), points = one.values.map((row, i) => [i, row[n]]).filter((point) => point[1] !== null);
  if (points.length) {
    chart(right, {
      title: "Through the layers", note: `${one.title} at this position`, bars: false,
      x: { label: "layer", log: false, ticks: sheet.layers.map((name, i) => [i, name.replace("block ", "")]) }, y: { log: one.log },
      lines: [{ name: one.unit, colour: "accent", points }],
    });
  }
}
function tip(cell) {
  const box = byId("tip"), r = Number(cell.dataset.row), n = Number(cell.dataset.column), one = view();
  box.replaceChildren();
  heading(r, n, box);
  guesses(r, n, box, 5);
  const list = make("dl", null, box, "numbers");
  for (const [name, text] of [[one.title, show(one.values[r][n])], ["Loss on the next token", show(sheet.losses[r][n])]]) {
    make("dt", name, list);
    make("dd", text, list);
  }
  box.style.display = "block";
  const place = cell.getBoundingClientRect(), below = place.bottom + 10 + box.offsetHeight < innerHeight;
  box.style.left = `${between(place.left + place.width / 2 - box.offsetWidth / 2, 8, Math.max(8, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${below ? place.bottom + 10 : Math.max(8, place.top - box.offsetHeight - 10)}px`;
  pointer(one.values[r][n]);
}
function hide() {
  byId("tip").style.display = "none";
  pointer(state.chosen ? view().values[state.row][state.column] : null);
}

function choose(r, n, pinned = false) {
  state.row = between(r, 0, R - 1);
  state.column = between(n, 0, N - 1);
  [state.chosen, state.pinned] = [true, pinned];
  if (state.column < state.first) state.first = state.column;
  if (state.column >= state.first + count) state.first = state.column - count + 1;
  address();
  hide();
  render();
}
function pan(first) {
  state.first = between(Math.round(first), 0, N - count);
  hide();
  render();
}
function setView(key) {
  state.view = key;
  address();
  render();
}
function address() {  // #view=kl_final&row=2&column=5
  const parts = { view: state.view, ...(state.pinned ? { row: state.row, column: state.column } : {}) };
  history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
}
function open() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (sheet.views.some((one) => one.key === given.get("view"))) state.view = given.get("view");
  if (given.has("theme")) setTheme(given.get("theme") === "dark" ? "dark" : "light");
  const [r, n] = [Number(given.get("row")), Number(given.get("column"))];
  if (given.has("row") && given.has("column") && r < R && n < N) {
    [state.row, state.column, state.chosen, state.pinned] = [r, n, true, true];
    render();
    state.first = n - Math.floor(count / 2);
  }
  render();
}
function find(query) {
  state.query = query.trim().toLowerCase();
  const bare = (text) => text.replaceAll("·", " ").trim().toLowerCase();
  hits = state.query ? sheet.tokens.flatMap((text, n) => bare(text).includes(state.query) || text.toLowerCase().includes(state.query) ? [n] : []) : [];
  byId("found").textContent = state.query ? `${hits.length} found` : "";
  if (hits.length) step(1, true);
  render();
}
function step(by, stay = false) {
  if (!hits.length) return;
  const ahead = hits.filter((n) => stay ? n >= state.column : n > state.column), behind = hits.filter((n) => n < state.column);
  choose(state.row, by > 0 ? ahead[0] ?? hits[0] : behind[behind.length - 1] ?? hits[hits.length - 1]);
  byId("found").textContent = `${hits.indexOf(state.column) + 1} of ${hits.length}`;
}
function matrix() {
  const one = view();
  return [
    ["position", ...sheet.positions], ["token", ...sheet.tokens], ["next token", ...sheet.nexts],
    ...sheet.layers.map((name, r) => [name, ...(state.values || one.unit === "nats" || one.unit === "rank" ? one.values[r] : sheet.tokens.map((_, n) => guess(r, n)))]).reverse(),
  ];
}
function everything() {
  const rows = [["position", "token", "next token", "layer", "guess", "loss", ...sheet.views.map((one) => one.key)]];
  for (let n = 0; n < N; n++) {
    for (let r = 0; r < R; r++) {
      rows.push([sheet.positions[n], sheet.tokens[n], sheet.nexts[n], sheet.layers[r], guess(r, n), sheet.losses[r][n], ...sheet.views.map((one) => one.values[r][n])]);
    }
  }
  return rows;
}
function resize(factor) {
  state.cell = between(Math.round((state.sized ? state.cell : byId("grid").querySelector("td").offsetWidth) * factor), 14, 180);
  state.sized = true;
  render();
}
const copyView = () => copy(tsv(matrix()), "the view");
const swap = (values) => { state.values = values; render(); };
const turn = (by) => setView(sheet.views[(sheet.views.findIndex((one) => one.key === state.view) + by + sheet.views.length) % sheet.views.length].key);

const KEYS = {
  ArrowLeft: () => choose(state.row, state.column - (state.chosen ? 1 : 0)),
  ArrowRight: () => choose(state.row, state.column + (state.chosen ? 1 : 0)),
  ArrowUp: () => choose(state.row + (state.chosen ? 1 : 0), state.column),
  ArrowDown: () => choose(state.row - (state.chosen ? 1 : 0), state.column),
  Home: () => choose(state.row, 0),
  End: () => choose(state.row, N - 1),
  PageUp: () => { pan(state.first - count); choose(state.row, state.first); },
  PageDown: () => { pan(state.first + count); choose(state.row, state.first); },
  Enter: () => choose(state.row, state.column, !(state.chosen && state.pinned)),
  Escape: () => { [state.chosen, state.pinned] = [false, false]; address(); render(); },
  "/": () => { byId("search").focus(); byId("search").select(); },
  n: () => step(1),
  p: () => step(-1),
  "[": () => turn(-1),
  "]": () => turn(1),
  v: () => swap(!state.values),
  c: copyView,
  t: () => setTheme(dark() ? "light" : "dark"),
  "+": () => resize(1.25),
  "=": () => resize(1.25),
  "-": () => resize(0.8),
  "?": () => byId("help").showModal(),
};
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (event.target === byId("search")) {
    if (event.key === "Enter") step(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") byId("grid").focus();
    return;
  }
  if (event.target === byId("strip") && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
    event.preventDefault();
    return pan(state.first + (event.key === "ArrowRight" ? 1 : -1) * Math.ceil(count / 4));
  }
  if (event.target.closest?.("button, .chart") && ["Enter", "ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
function listen() {
  const grid = byId("grid"), bar = byId("strip");
  grid.addEventListener("pointerover", (event) => event.target.dataset.row ? tip(event.target) : hide());
  grid.addEventListener("pointerleave", hide);
  grid.addEventListener("click", (event) => {
    const { row, column } = event.target.dataset;
    if (!row) return;
    const same = state.pinned && state.row === Number(row) && state.column === Number(column);
    choose(Number(row), Number(column), !same);
    grid.focus({ preventScroll: true });
  });
  byId("frame").addEventListener("wheel", (event) => {
    const by = event.deltaX || (event.shiftKey ? event.deltaY : 0);
    if (!by || count >= N) return;
    event.preventDefault();
    pan(state.first + Math.sign(by) * Math.max(1, Math.round(Math.abs(by) / 60)));
  }, { passive: false });
  let offset = null;  // from the window's left edge to where it was taken, in positions
  const at = (event) => (event.clientX - bar.getBoundingClientRect().left) / bar.clientWidth * N;
  bar.addEventListener("pointerdown", (event) => {
    const place = at(event), inside = place >= state.first && place <= state.first + count;
    offset = inside ? place - state.first : count / 2;
    bar.setPointerCapture(event.pointerId);
    pan(place - offset);
  });
  bar.addEventListener("pointermove", (event) => { if (offset !== null) pan(at(event) - offset); });
  for (const name of ["pointerup", "pointercancel"]) bar.addEventListener(name, () => { offset = null; });
  byId("search").addEventListener("input", (event) => find(event.target.value));
  byId("keys").addEventListener("click", KEYS["?"]);
  byId("as-guess").addEventListener("click", () => swap(false));
  byId("as-value").addEventListener("click", () => swap(true));
  byId("narrow").addEventListener("click", () => resize(0.8));
  byId("wider").addEventListener("click", () => resize(1.25));
  byId("copy").addEventListener("click", copyView);
  byId("save").addEventListener("click", () => save(csv(everything()), "lens.csv"));
  sheet.views.forEach((one) => {
    const button = make("button", one.title, byId("views"));
    button.dataset.view = one.key;
    button.addEventListener("click", () => setView(one.key));
  });
  let width = byId("frame").clientWidth;
  new ResizeObserver(() => {
    if (byId("frame").clientWidth === width) return;
    width = byId("frame").clientWidth;
    hide();
    render();
    if (state.chosen && (state.column < state.first || state.column >= state.first + count)) pan(state.column - Math.floor(count / 2));
  }).observe(byId("frame"));
  addEventListener("scroll", hide, { passive: true });
  addEventListener("hashchange", open);
  themeListeners.push(render);
}
summary();
listen();
open();
themed();
