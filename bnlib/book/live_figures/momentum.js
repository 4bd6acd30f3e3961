// Chapter 11: a momentum in two conventions, and how long the average remembers.
figures.momentum = {
  label: "The momentum and its memory",
  controls: [
    { name: "convention", label: "momentum as in", kind: "choice",
      options: () => ["PyTorch: weight of the new batch", "Keras, Flax, ONNX: weight of the old average"] },
    { name: "momentum", label: "momentum", kind: "range", min: 0, max: 1, step: 0.001, show: (v) => fixed(v) },
    { name: "batches", label: "batches k", kind: "range", min: 1, max: 500, step: 1, show: String },
  ],

  compute(_, { convention, momentum, batches }) {
    const share = convention === 0 ? momentum : 1 - momentum; // the weight of the newest batch
    const weights = (alpha) => Array.from({ length: 20 }, (_, j) => alpha * (1 - alpha) ** j);
    const span = Math.max(60, batches);
    const at = Array.from({ length: 101 }, (_, i) => (i * span) / 100);
    return { share, other: 1 - momentum, weights: weights(share), copied: weights(1 - share),
      at, start: at.map((k) => (1 - share) ** k), left: (1 - share) ** batches };
  },

  draw({ weights, copied, at, start, left }, { batches }) {
    const span = at[at.length - 1];
    const bars = plot({ title: "weight of a batch", x: [0, 20], y: [0, 1.05], yticks: [0, 0.5, 1],
      xticks: [[0.5, 0], [10.5, 10], [19.5, 19]], xlabel: "batches ago",
      label: `Weights of the last 20 batches, the newest ${fixed(weights[0])}, the one before ${fixed(weights[1])}` });
    bars.columns(weights, color("eval"), { ghost: copied });
    const curve = plot({ title: "weight of the start", x: [0, span], y: [0, 1.05], yticks: [0, 0.5, 1],
      xticks: ticks(0, span), xlabel: "batches", label: `Weight of the start, ${fixed(left)} after ${batches} batches` });
    curve.line(at, start, color("eval"));
    curve.vline(batches, color("muted"), true);
    return [bars.node, curve.node];
  },

  status({ share, other, left }, { convention, momentum, batches }) {
    const [torch, keras] = convention === 0 ? [momentum, other] : [other, momentum];
    const percent = (v) => `${fixed(100 * v, 1)}%`;
    return `PyTorch ${fixed(torch)}, Keras, Flax and ONNX ${fixed(keras)}: the newest batch weighs ${percent(share)}, ` +
      `and after ${batches} batches ${percent(left)} of the start is left. ` +
      `Copied without turning it around, the newest would weigh ${percent(1 - share)}.`;
  },
};
