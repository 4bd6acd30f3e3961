// Chapter 15: the same values in batches of one class, or mixed: pooled, averaged and running.
figures.orders = {
  label: "The order of the classes",
  mixes: [1, 2, 5, 10],
  controls: [
    { name: "together", label: "classes in a batch", kind: "range", min: 0, max: 3, step: 1,
      show: (k) => String(figures.orders.mixes[k]) },
    { name: "distance", label: "distance of the classes", kind: "range", min: 0, max: 3, step: 0.1,
      show: (v) => fixed(v, 1) },
    { name: "momentum", label: "momentum", kind: "range", min: 0.01, max: 1, step: 0.01 },
  ],

  compute({ classes }, { together, distance, momentum }) {
    const k = this.mixes[together], size = 10;
    const centres = classes.map(mean);
    const centre = mean(centres);
    const apart = (c, by) => centre + by * (centres[c] - centre);
    const values = classes.map((z, c) => z.map((v) => v - centres[c] + apart(c, distance)));
    const stream = []; // k classes at a time take turns
    for (let first = 0; first < classes.length; first += k) {
      values[first].forEach((_, i) => {
        for (let c = first; c < first + k; c += 1) stream.push(values[c][i]);
      });
    }
    const unbiased = (z) => ({ mean: mean(z), var: (moments(z).var * z.length) / (z.length - 1) });
    const batches = Array.from({ length: stream.length / size }, (_, b) => unbiased(stream.slice(b * size, (b + 1) * size)));
    const pooled = unbiased(stream);
    const running = { mean: [pooled.mean], var: [pooled.var] }; // as after a good training
    batches.forEach((batch, b) => {
      for (const key of ["mean", "var"]) running[key].push((1 - momentum) * running[key][b] + momentum * batch[key]);
    });
    // The axes stay as they are while the classes move.
    const ends = classes.map((_, c) => apart(c, 3));
    const within = mean(classes.map((z) => unbiased(z).var));
    const wide = within + moments(centres).var * 9;
    return { means: batches.map((b) => b.mean), running, pooled,
      averaged: mean(batches.map((b) => b.var)), size, mixed: k,
      limits: [Math.min(...ends), Math.max(...ends)], top: wide };
  },

  draw({ means, running, pooled, averaged, limits: [lo, hi], top }) {
    const pad = 0.12 * (hi - lo);
    const n = means.length;
    const last = running.mean[n];
    const left = plot({ title: "mean", x: [0, n + 1], y: [lo - pad, hi + pad], xticks: [0, 10, 20, 30, 40],
      yticks: ticks(lo - pad, hi + pad), xlabel: "batch",
      label: `Means of ${n} batches; the running mean ends at ${fixed(last, 2)}, the mean of all values is ${fixed(pooled.mean, 2)}` });
    left.line([0, n + 1], [pooled.mean, pooled.mean], color("muted"), true);
    left.dots(means.map((_, b) => b + 1), means, color("train"));
    left.line(running.mean.map((_, b) => b), running.mean, color("eval"));
    const right = plot({ title: "variance", x: [0, 3], y: [0, 1.05 * top], yticks: ticks(0, 1.05 * top),
      xticks: [[0.5, "pooled"], [1.5, "averaged"], [2.5, "running"]],
      label: `Variance: pooled ${fixed(pooled.var, 2)}, averaged ${fixed(averaged, 2)}, running ${fixed(running.var[n], 2)}` });
    right.columns([pooled.var, averaged, running.var[n]], color("eval"), { marked: 0 });
    return [left.node, right.node];
  },

  status({ running, pooled, averaged, size, mixed }) {
    const n = running.mean.length - 1;
    return `Batches of ${size} with ${mixed} of the classes. All values: mean ${fixed(pooled.mean, 2)}, variance ${fixed(pooled.var, 2)}. ` +
      `Averaged over the batches: variance ${fixed(averaged, 2)}. ` +
      `Running after ${n} batches: mean ${fixed(running.mean[n], 2)}, variance ${fixed(running.var[n], 2)}.`;
  },
};
