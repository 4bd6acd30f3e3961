// Chapter 8: one layer of the seven beside PyTorch's, on batches of one node.
figures.seven = {
  label: "The layer and its batches",
  controls: [
    { name: "layer", label: "layer", kind: "choice", options: (data) => data.layers.map((l) => l.name) },
    { name: "size", label: "batch size m", kind: "range", min: 1, max: 7, step: 1,
      from: (k) => 2 ** k, to: (m) => Math.log2(m), show: String },
    { name: "fed", label: "batches fed", kind: "range", min: 0, max: 60, step: 1, show: String },
    { name: "feed", label: "Feed a batch", kind: "button",
      click: (model, set) => { model.set("fed", Math.min(model.get("fed") + 1, 60)); model.save_changes(); } },
  ],
  pytorch: { inUse: 0, inMemory: 1, share: 0.1, start: 1 },

  compute({ z, layers, eps }, { layer, size: m, fed }) {
    const batch = (k) => Array.from({ length: m }, (_, i) => z[(k * m + i) % z.length]);
    const batches = Array.from({ length: fed }, (_, k) => moments(batch(k)));
    const everything = moments(z);
    const rule = ({ inUse, inMemory, share, start }) => {
      const mean = [0], variance = [start];
      batches.forEach((b, k) => {
        mean.push((1 - share) * mean[k] + share * b.mean);
        variance.push((1 - share) * variance[k] + share * b.var * (inMemory ? m / (m - 1) : 1));
      });
      // The next batch in training, and all values in evaluation.
      const next = moments(batch(fed)).var;
      const used = inUse ? (next * m) / (m - 1) : next;
      const std = Math.sqrt(variance[fed] + eps);
      return { variance, training: Math.sqrt(next / (used + eps)), evaluation: Math.sqrt(everything.var) / std,
        place: (everything.mean - mean[fed]) / std };
    };
    return { ours: rule(layers[layer]), theirs: rule(this.pytorch), vars: batches.map((b) => b.var) };
  },

  draw({ ours, theirs, vars }) {
    const top = 1.05 * Math.max(...vars, ...ours.variance, ...theirs.variance);
    const left = plot({ title: "running variance", x: [0, 60], y: [0, top],
      xticks: [0, 20, 40, 60], yticks: ticks(0, top), xlabel: "batch",
      label: `${vars.length} batches. Running variance of this layer ${fixed(ours.variance.at(-1), 2)}, PyTorch ${fixed(theirs.variance.at(-1), 2)}` });
    left.dots(vars.map((_, k) => k + 1), vars, color("train"));
    for (const [rule, hue] of [[theirs, "muted"], [ours, "eval"]]) {
      left.line(rule.variance.map((_, k) => k), rule.variance, color(hue));
    }
    const high = 2; // a start at zero is off the scale, and the sentence says it
    const right = plot({ title: "width of the output", x: [0, 2], y: [0, high],
      xticks: [[0.5, "training"], [1.5, "evaluation"]], yticks: [0, 0.5, 1, 1.5, 2],
      label: `Standard deviation of the output: training ${fixed(ours.training, 2)}, evaluation ${fixed(ours.evaluation, 2)}` });
    right.columns([ours.training, ours.evaluation], color("eval"), { ghost: [theirs.training, theirs.evaluation] });
    return [left.node, right.node];
  },

  status({ ours, theirs }) {
    const say = (r) => `${fixed(r.training, 2)} wide in training; in evaluation ${fixed(r.evaluation, 2)} wide around ${fixed(r.place, 2)}`;
    return `This layer: ${say(ours)}. PyTorch: ${say(theirs)}.`;
  },
};
