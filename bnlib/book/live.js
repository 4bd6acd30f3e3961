// The frame of every live figure: controls, panels, one status line. No framework, no request.
// A figure is an entry of `figures`, in a file of live_figures/:
//   controls  list of {name, label, kind: "range" | "choice" | "button", ...}
//   compute   (data, params) => result: pure numbers, tested against NumPy
//   draw      (result, params) => list of panels made with `plot`
//   status    (result, params) => one sentence with the numbers
const figures = {};

const fixed = (value, digits = 3) => {
  const text = value.toFixed(digits);
  return Number(text) === 0 ? (0).toFixed(digits) : text.replace("-", "\u2212");
};

// ---- numbers -------------------------------------------------------------------------------

const sum = (values) => values.reduce((total, v) => total + v, 0);
const mean = (values) => sum(values) / values.length;

function moments(values) {
  const mu = mean(values);
  return { mean: mu, var: mean(values.map((v) => (v - mu) ** 2)) };
}

function skewness(values) {
  const { mean: mu, var: variance } = moments(values);
  return variance > 0 ? mean(values.map((v) => (v - mu) ** 3)) / variance ** 1.5 : 0;
}

// Counts in equal bins, as numpy.histogram: the last bin includes its right edge.
function histogram(values, lo, hi, bins) {
  const counts = new Array(bins).fill(0);
  const edge = (i) => (i < bins ? lo + i * ((hi - lo) / bins) : hi);
  for (const v of values) {
    if (v < lo || v > hi) continue;
    let at = Math.min(Math.floor(((v - lo) / (hi - lo)) * bins), bins - 1);
    if (v < edge(at)) at -= 1; // the quotient was rounded up, or down, across an edge
    else if (at < bins - 1 && v >= edge(at + 1)) at += 1;
    counts[at] += 1;
  }
  return counts;
}

// ---- pictures ------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// One panel with axes; returns {node, and methods that add marks, in data coordinates}.
function plot({ title, label, x: [x0, x1], y: [y0, y1], xlabel = "", xticks, yticks = [], width: W = 320 }) {
  const H = 210, left = yticks.length ? 40 : 12, right = 10, top = 26, bottom = 40;
  const X = (v) => left + ((v - x0) / (x1 - x0)) * (W - left - right);
  const Y = (v) => H - bottom - ((v - y0) / (y1 - y0)) * (H - top - bottom);
  const node = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label,
    style: `max-width: ${1.4 * W}px; flex-basis: ${0.72 * W}px` });
  const add = (tag, attributes, text) =>
    node.append(svg(tag, attributes, ...(text === undefined ? [] : [text])));
  const text = (x, y, string, attributes = {}) =>
    add("text", { x, y, "text-anchor": "middle", ...attributes }, string);
  text(W / 2, 15, title, { class: "title" });
  add("line", { x1: left, x2: W - right, y1: H - bottom, y2: H - bottom, class: "axis" });
  for (const tick of xticks) {
    const [v, name] = Array.isArray(tick) ? tick : [tick, tick];
    add("line", { x1: X(v), x2: X(v), y1: H - bottom, y2: H - bottom + 4, class: "axis" });
    text(X(v), H - bottom + 17, String(name).replace("-", "\u2212"));
  }
  for (const tick of yticks) {
    const [v, name] = Array.isArray(tick) ? tick : [tick, tick];
    add("line", { x1: left, x2: W - right, y1: Y(v), y2: Y(v), class: "grid" });
    text(left - 5, Y(v) + 4, String(name).replace("-", "\u2212"), { "text-anchor": "end" });
  }
  text((left + W - right) / 2, H - 6, xlabel, { class: "label" });
  const inside = (v) => v >= x0 && v <= x1;
  return {
    node,
    bars(counts, color) {
      const width = (x1 - x0) / counts.length;
      counts.forEach((count, i) => count && add("rect", {
        x: X(x0 + i * width) + 0.5, width: X(x0 + width) - X(x0) - 1,
        y: Y(count), height: Y(0) - Y(count), fill: color, "fill-opacity": 0.4,
      }));
    },
    rug(values, color) {
      for (const v of values.filter(inside)) {
        add("line", { x1: X(v), x2: X(v), y1: Y(y0), y2: Y(y0) - 9, stroke: color,
          "stroke-width": 1.6, "stroke-opacity": 0.75 });
      }
    },
    vline(v, color, dashed = false) {
      if (!inside(v)) return;
      add("line", { x1: X(v), x2: X(v), y1: top, y2: H - bottom, stroke: color,
        "stroke-width": 2, ...(dashed && { "stroke-dasharray": "5 4" }) });
    },
    span(a, b, color) {
      const [lo, hi] = [Math.max(a, x0), Math.min(b, x1)];
      if (hi > lo) add("rect", { x: X(lo), width: X(hi) - X(lo), y: top, height: H - bottom - top,
        fill: color, "fill-opacity": 0.1 });
    },
    // What leaves the panel runs along its edge.
    line(xs, ys, color, dashed = false) {
      const points = xs.map((v, i) =>
        `${X(v).toFixed(1)},${Y(Math.min(Math.max(ys[i], y0), y1)).toFixed(1)}`);
      add("polyline", { points: points.join(" "), fill: "none", stroke: color,
        "stroke-width": 2.5, ...(dashed && { "stroke-dasharray": "6 4" }) });
    },
    dots(xs, ys, color) {
      xs.forEach((v, i) =>
        add("circle", { cx: X(v), cy: Y(ys[i]), r: 2.6, fill: color, "fill-opacity": 0.65 }));
    },
    // One bar per value, from zero; `ghost` values are outlined behind them.
    columns(values, color, { ghost = [], marked = -1 } = {}) {
      const column = (v, from, to, attributes) => {
        const end = Y(Math.min(Math.max(v, y0), y1));
        add("rect", { x: X(from), width: X(to) - X(from), y: Math.min(end, Y(0)),
          height: Math.max(Math.abs(end - Y(0)), 0.8), ...attributes });
      };
      ghost.forEach((v, i) => column(v, i + 0.12, i + 0.88, { class: "ghost" }));
      values.forEach((v, i) => column(v, i + 0.2, i + 0.8,
        { fill: color, "fill-opacity": i === marked ? 1 : 0.55 }));
      add("line", { x1: left, x2: W - right, y1: Y(0), y2: Y(0), class: "axis" });
    },
  };
}

// One frame of digits, as `live.sheet` packs them: ink on paper, which a dark theme turns around.
function digits({ title, label, sheet: { href, frames, width, height }, frame, width: W = 320 }) {
  const top = 26, H = (W * height) / width;
  const image = svg("image", { href, width, height: frames * height });
  const view = svg("svg", { y: top, width: W, height: H, viewBox: `0 ${frame * height} ${width} ${height}` }, image);
  const text = svg("text", { x: W / 2, y: 15, "text-anchor": "middle", class: "title" }, title);
  return svg("svg", { viewBox: `0 0 ${W} ${top + H}`, role: "img", "aria-label": label, class: "sheet",
    style: `max-width: ${1.4 * W}px; flex-basis: ${0.72 * W}px` }, text, view);
}

// Round numbers that divide a range, as an axis wants them.
function ticks(lo, hi) {
  const rough = (hi - lo) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((k) => k * power >= rough) * power;
  const first = Math.ceil(lo / step);
  return Array.from({ length: Math.floor(hi / step) - first + 1 },
    (_, i) => Number(((first + i) * step).toPrecision(6)));
}

const color = (thing) => `var(--live-${thing})`;

// ---- the frame -----------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function control(spec, model, changed) {
  const value = () => model.get(spec.name);
  const set = (v) => { model.set(spec.name, v); model.save_changes(); };
  if (spec.kind === "button") {
    const button = element("button", { type: "button", textContent: spec.label });
    button.addEventListener("click", () => spec.click(model, set));
    return { node: button, refresh() {} };
  }
  if (spec.kind === "choice") {
    const select = element("select");
    select.append(...spec.options(model.get("data")).map((name, i) => new Option(name, i)));
    select.addEventListener("change", () => set(Number(select.value)));
    return { node: element("label", {}, element("span", { textContent: spec.label }), select),
      refresh() { select.value = value(); } };
  }
  const number = element("b"); // the number beside the slider; the status line speaks for it
  number.setAttribute("aria-hidden", "true");
  const input = element("input", { type: "range", min: spec.min, max: spec.max, step: spec.step });
  const shown = spec.show ?? ((v) => fixed(v, 2));
  input.addEventListener("input", () => set((spec.from ?? Number)(Number(input.value))));
  return {
    node: element("label", {}, element("span", {}, `${spec.label} = `, number), input),
    refresh() {
      input.value = (spec.to ?? Number)(value());
      number.textContent = shown(value());
      input.setAttribute("aria-valuetext", shown(value()));
    },
  };
}

function render({ model, el }) {
  const figure = figures[model.get("figure")];
  const panels = element("div", { className: "panels" });
  const status = element("p", { className: "status" });
  status.setAttribute("role", "status");
  const controls = figure.controls.map((spec) => control(spec, model));
  const box = element("div", { className: "controls" }, ...controls.map((c) => c.node));
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", figure.label);
  el.classList.add("live");
  // JupyterLab, or a theme that turns pages, would take the arrow keys for itself.
  el.addEventListener("keydown", (event) => event.key.length > 1 && event.stopPropagation());
  el.replaceChildren(panels, status, box);
  const names = figure.controls.map((spec) => spec.name);
  const update = () => {
    const params = Object.fromEntries(names.map((name) => [name, model.get(name)]));
    const result = figure.compute(model.get("data"), params);
    controls.forEach((c) => c.refresh());
    panels.replaceChildren(...figure.draw(result, params));
    status.textContent = figure.status(result, params);
  };
  names.forEach((name) => model.on(`change:${name}`, update));
  update();
}

// A page without a kernel: the state comes from the element, and stays in the page.
function pageModel(state) {
  const listeners = {};
  return {
    get: (name) => state[name],
    set(name, value) {
      state[name] = value;
      (listeners[`change:${name}`] ?? []).forEach((listener) => listener());
    },
    save_changes() {},
    on: (event, listener) => (listeners[event] ??= []).push(listener),
  };
}

// Put the figure in the place of the still picture that stands in the same output.
function mount(root) {
  root.dataset.mounted = "";
  const output = root.closest(".cell_output, .jp-OutputArea, #output-area") ?? root; // or Colab's
  const picture = output.querySelector("img");
  const still = picture?.closest("a") ?? picture; // the book links a picture to its file
  const el = element("div");
  render({ model: pageModel(JSON.parse(root.dataset.state)), el });
  root.querySelector(".still")?.remove();
  if (still) {
    still.before(el);
    still.style.display = "none";
  } else root.append(el);
}
