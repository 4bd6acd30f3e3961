// Chapter 1: a batch of values at one node, before and after normalizing.
figures.normalize = {
  label: "The batch and epsilon",
  controls: [
    { name: "node", label: "node", kind: "choice", options: (data) => data.nodes.map((n) => n.name) },
    { name: "batch_size", label: "batch size m", kind: "range", min: 1, max: 9, step: 1,
      from: (k) => 2 ** k, to: Math.log2, show: String },
    { name: "eps", label: "epsilon", kind: "range", min: -8, max: 0, step: 0.5,
      from: (k) => 10 ** k, to: Math.log10, show: (v) => v.toExponential(0).replace("-", "\u2212") },
    { name: "draw", label: "Draw another batch", kind: "button",
      click: (model, set) => set(model.get("draw") + 1) },
  ],

  compute({ nodes }, { node, batch_size: m, eps, draw }) {
    const all = nodes[node].z;
    const z = Array.from({ length: m }, (_, i) => all[(draw * m + i) % all.length]);
    const before = moments(z);
    const zHat = z.map((v) => (v - before.mean) / Math.sqrt(before.var + eps));
    return {
      z, zHat, range: [Math.min(...all), Math.max(...all)],
      before: { ...before, skewness: skewness(z) },
      after: { ...moments(zHat), skewness: skewness(zHat) },
    };
  },

  draw({ z, zHat, range, before, after }) {
    const pad = 0.06 * (range[1] - range[0]);
    const panel = (title, label, values, { mean: mu, var: variance }, [lo, hi], xticks, hue) => {
      const counts = histogram(values, lo, hi, 24);
      const p = plot({ title, label, x: [lo, hi], y: [0, 1.08 * Math.max(...counts, 1)], xticks });
      const std = Math.sqrt(variance);
      p.span(mu - std, mu + std, hue);
      p.bars(counts, hue);
      p.rug(values, hue);
      p.vline(mu, hue, true);
      return p.node;
    };
    const limits = [range[0] - pad, range[1] + pad];
    return [
      panel("z", `Histogram of ${z.length} values of z, mean ${fixed(before.mean)}, ` +
        `standard deviation ${fixed(Math.sqrt(before.var))}`,
        z, before, limits, ticks(...limits), color("z")),
      panel("z\u0302 = (z \u2212 \u03bc) / \u221a(\u03c3\u00b2 + \u03b5)",
        `Histogram of the same values normalized, mean ${fixed(after.mean)}, ` +
        `standard deviation ${fixed(Math.sqrt(after.var))}`,
        zHat, after, [-4, 4], [-4, -2, 0, 2, 4], color("z_hat")),
    ];
  },

  status({ before, after }, { batch_size: m }) {
    const say = (s) => `mean ${fixed(s.mean)}, variance ${fixed(s.var)}, skewness ${fixed(s.skewness, 2)}`;
    return `${m} values of z: ${say(before)}. Normalized: ${say(after)}.`;
  },
};
