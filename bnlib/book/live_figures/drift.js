// Chapter 12: a batch mean that drifts, the running mean behind it, and the three parts of its error.
figures.drift = {
  label: "The drift and the momentum",
  controls: [
    { name: "momentum", label: "momentum", kind: "range", min: -2.5, max: 0, step: 0.05,
      from: (v) => Number((10 ** v).toPrecision(3)), to: Math.log10, show: (v) => fixed(v) },
    { name: "batches", label: "batches k", kind: "range", min: 1, max: 200, step: 1, show: String },
    { name: "drift", label: "drift per batch", kind: "range", min: 0, max: 0.05, step: 0.0025,
      show: (v) => `${fixed(v, 4)} \u03c3` },
  ],

  // In units of sigma. noise: how far each batch mean is from the true mean, which grows evenly.
  compute({ noise, first, m }, { momentum, batches, drift }) {
    const truth = Array.from({ length: batches }, (_, t) => first + drift * t);
    const means = truth.map((mu, t) => mu + noise[t]);
    const running = [0]; // as a new layer starts
    for (const mean of means) running.push((1 - momentum) * running[running.length - 1] + momentum * mean);
    const now = truth[batches - 1];
    const parts = (share) => {
      const q = 1 - share;
      const left = q ** batches; // the weight of the start, and after it the sum of j times the weights
      const age = (q - batches * left + (batches - 1) * left * q) / share;
      return { left, start: -left * now, lag: -drift * age,
        noise: Math.sqrt((share / (2 - share)) * (1 - left * left) / m) };
    };
    const at = Array.from({ length: 51 }, (_, i) => 10 ** (-2.5 + i / 20));
    const each = at.map(parts);
    const stale = each.map((p) => Math.abs(p.start + p.lag));
    const all = each.map((p, i) => Math.hypot(stale[i], p.noise));
    return { truth, means, running, off: running[batches] - now, ...parts(momentum), at, stale,
      noises: each.map((p) => p.noise), all, best: at[all.indexOf(Math.min(...all))] };
  },

  draw({ truth, means, running, off, at, stale, noises, all }, { momentum, batches }) {
    const steps = truth.map((_, t) => t + 1);
    const top = 1.08 * Math.max(1.2, ...means);
    const left = plot({ title: "batch means, running mean", x: [0, batches + 1], y: [0, top], yticks: ticks(0, top),
      xticks: ticks(0, batches + 1).filter(Number.isInteger), xlabel: "batch",
      label: `Means of ${batches} batches, and a running mean that ends ${fixed(off, 2)} from the true mean` });
    left.line(steps, truth, color("muted"), true);
    left.dots(steps, means, color("train"));
    left.line([0, ...steps], running, color("eval"));
    const powers = at.map(Math.log10);
    const right = plot({ title: "error (dashed: out of date)", x: [-2.5, 0], y: [0, 1], yticks: [0, 0.5, 1],
      xticks: [[-2, "0.01"], [-1, "0.1"], [0, "1"]], xlabel: "momentum",
      label: `Expected error for each momentum, smallest at ${fixed(at[all.indexOf(Math.min(...all))], 2)}` });
    right.line(powers, stale, color("muted"), true);
    right.line(powers, noises, color("train"));
    right.line(powers, all, color("eval"));
    right.vline(Math.log10(momentum), color("ink"));
    return [left.node, right.node];
  },

  status({ left, start, lag, noise, off, best }, { momentum, batches }) {
    return `After ${batches} batches at momentum ${fixed(momentum)}, ${fixed(100 * left, 1)}% of the start is left. ` +
      `Error: start ${fixed(start, 2)}, lag ${fixed(lag, 2)}, noise \u00b1${fixed(noise, 2)}; ` +
      `here ${fixed(off, 2)}. The smallest error is at momentum ${fixed(best)}.`;
  },
};
