// Chapter 14: a node's values, moved and scaled, through the layer in training and through a frozen one.
figures.frozen = {
  label: "What arrives at the layer",
  controls: [
    { name: "scale", label: "multiply z by", kind: "range", min: -2, max: 2, step: 0.1,
      from: (v) => Number((2 ** v).toPrecision(3)), to: Math.log2, show: (v) => fixed(v, 2) },
    { name: "shift", label: "then add", kind: "range", min: -4, max: 4, step: 0.1, show: (v) => fixed(v, 1) },
    { name: "eps", label: "epsilon", kind: "range", min: -5, max: 0, step: 0.5,
      from: (v) => Number((10 ** v).toPrecision(3)), to: Math.log10, show: (v) => String(v) },
  ],

  compute({ z, mean: stored, var: storedVar, gamma, beta }, { scale, shift, eps }) {
    const moved = z.map((v) => scale * v + shift);
    const through = ({ mean: mu, var: variance }) => {
      const slope = gamma / Math.sqrt(variance + eps);
      const y = moved.map((v) => slope * (v - mu) + beta);
      const found = moments(y);
      return { y, mean: found.mean, std: Math.sqrt(found.var),
        passed: y.filter((v) => v > 0).length / y.length };
    };
    return { training: through(moments(moved)), frozen: through({ mean: stored, var: storedVar }) };
  },

  draw({ training, frozen }) {
    const clipped = (values) => values.map((v) => Math.max(-5.999, Math.min(5.999, v)));
    const both = [training, frozen].map(({ y }) => histogram(clipped(y), -6, 6, 24));
    const top = Math.max(...both.flat()) * 1.08;
    return [["in training mode", training, "train"], ["frozen", frozen, "eval"]].map(([title, { mean: mu, std }, thing], i) => {
      const p = plot({ title, x: [-6, 6], y: [0, top], xticks: [-6, -3, 0, 3, 6], xlabel: "y",
        label: `Values y ${title}: mean ${fixed(mu, 2)}, standard deviation ${fixed(std, 2)}` });
      p.span(mu - std, mu + std, color(thing));
      p.bars(both[i], color(thing));
      p.vline(0, color("muted"), true);
      return p.node;
    });
  },

  status({ training, frozen }) {
    const say = ({ mean: mu, std, passed }) =>
      `mean ${fixed(mu, 2)}, standard deviation ${fixed(std, 2)}, ${fixed(100 * passed, 0)}% pass the ReLU`;
    return `In training mode: ${say(training)}. Frozen: ${say(frozen)}.`;
  },
};
