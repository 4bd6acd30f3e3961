// Chapter 2: the normalized batch, scaled and shifted, on its way into an activation function.
figures.scale_and_shift = {
  label: "Gamma, beta and the activation function",
  // An activation counts as flat where its slope is below a tenth of the largest slope.
  activations: [
    { name: "sigmoid", g: (v) => 1 / (1 + Math.exp(-v)), flat: [[-10, -3.6369], [3.6369, 10]],
      range: [0, 1], ticks: [0, 0.5, 1] },
    { name: "tanh", g: Math.tanh, flat: [[-10, -1.8184], [1.8184, 10]],
      range: [-1, 1], ticks: [-1, 0, 1] },
    { name: "ReLU", g: (v) => Math.max(v, 0), flat: [[-10, 0]],
      range: [0, 8], ticks: [0, 4, 8] },
  ],
  controls: [
    { name: "gamma", label: "gamma", kind: "range", min: -4, max: 8, step: 0.1 },
    { name: "beta", label: "beta", kind: "range", min: -6, max: 6, step: 0.1 },
    { name: "activation", label: "activation function", kind: "choice",
      options: () => figures.scale_and_shift.activations.map((a) => a.name) },
    { name: "undo", label: "Undo: \u03b3 = \u03c3, \u03b2 = \u03bc", kind: "button",
      click(model) {
        const { mean: mu, var: variance } = moments(model.get("data").z);
        model.set("gamma", Math.sqrt(variance + 1e-5));
        model.set("beta", mu);
        model.save_changes();
      } },
  ],

  compute({ z }, { gamma, beta, activation }) {
    const { mean: mu, var: variance } = moments(z);
    const zHat = z.map((v) => (v - mu) / Math.sqrt(variance + 1e-5));
    const y = zHat.map((v) => gamma * v + beta);
    const { g, flat } = this.activations[activation];
    const outside = (v) => v < flat[0][1] || (flat.length > 1 && v > flat[1][0]);
    return { zHat, y, a: y.map(g), flat: y.filter(outside).length / y.length, moments: moments(y) };
  },

  draw({ zHat, y, a }, { activation }) {
    const { name, flat, range, ticks: at } = this.activations[activation];
    const panel = (title, label, values, [lo, hi], xticks, hue, under = () => {}) => {
      const counts = histogram(values, lo, hi, 32);
      const p = plot({ title, label, x: [lo, hi], y: [0, 1.08 * Math.max(...counts, 1)], xticks,
        width: 215 });
      under(p);
      p.bars(counts, hue);
      p.rug(values, hue);
      return p.node;
    };
    const wide = [-10, 10], marks = [-10, -5, 0, 5, 10];
    const shade = (p) => flat.forEach(([from, to]) => p.span(from, to, color("muted")));
    const describe = (what, values) => {
      const m = moments(values);
      return `Histogram of ${what}, mean ${fixed(m.mean, 2)}, standard deviation ${fixed(Math.sqrt(m.var), 2)}`;
    };
    return [
      panel("z\u0302", describe("z-hat", zHat), zHat, wide, marks, color("z_hat")),
      panel("y = \u03b3 z\u0302 + \u03b2", describe("y", y), y, wide, marks, color("y"), shade),
      panel(`${name}(y)`, describe(`${name} of y`, a), a, range, at, color("activation")),
    ];
  },

  status({ moments: m, flat }, { activation }) {
    const { name } = this.activations[activation];
    return `y: mean ${fixed(m.mean)}, standard deviation ${fixed(Math.sqrt(m.var))}. ` +
      `${Math.round(100 * flat)}% of the values lie where the ${name} is flat (shaded).`;
  },
};
