// Chapter 3: move one example of a batch; every other output and gradient moves with it.
figures.backward = {
  label: "Move one example",
  controls: [
    { name: "example", label: "example to move", kind: "choice",
      options: (data) => data.z.map((_, i) => `example ${i + 1}`) },
    { name: "by", label: "move its z by", kind: "range", min: -4, max: 4, step: 0.1 },
  ],

  compute({ z, dy }, { example, by }) {
    const pass = (values) => {
      const { mean: mu, var: variance } = moments(values);
      const std = Math.sqrt(variance + 1e-5);
      const zHat = values.map((v) => (v - mu) / std);
      const along = mean(dy.map((d, i) => d * zHat[i]));
      return { zHat, dz: dy.map((d, i) => (d - mean(dy) - zHat[i] * along) / std) };
    };
    const before = pass(z);
    const after = pass(z.map((v, i) => (i === example ? v + by : v)));
    const others = after.zHat.map((v, i) => (i === example ? 0 : Math.abs(v - before.zHat[i])));
    return { before, after, others: Math.max(...others), sum: sum(after.dz),
      along: sum(after.dz.map((v, i) => v * after.zHat[i])) };
  },

  draw({ before, after }, { example }) {
    const panel = (title, what, now, then, limit, yticks, hue) => {
      const p = plot({ title, x: [0, now.length], y: [-limit, limit], yticks,
        xticks: now.map((_, i) => [i + 0.5, i + 1]),
        xlabel: "example", label: `${what} of ${now.length} examples: ${now.map((v) => fixed(v, 2)).join(", ")}` });
      p.columns(now, hue, { ghost: then, marked: example });
      return p.node;
    };
    return [
      panel("z\u0302", "z-hat", after.zHat, before.zHat, 3, [-2, 0, 2], color("z_hat")),
      panel("gradient for z", "Gradient", after.dz, before.dz, 3, [-2, 0, 2], color("gradient")),
    ];
  },

  status({ others, sum: total, along }, { example, by }) {
    return `Example ${example + 1} moved by ${fixed(by, 1)}; the z\u0302 of some other example by ${fixed(others)}. ` +
      `Sum of the gradients: ${fixed(total)}. Sum of gradient times z\u0302: ${fixed(along)}.`;
  },
};
