// Chapter 16: one batch norm of a model in training, and what the doctor's static rules say of it.
figures.doctor = {
  label: "One batch norm of a model in training",
  controls: [
    { name: "layer", label: "the layer is", kind: "choice",
      options: () => ["in training mode", "in evaluation mode"] },
    { name: "frozen", label: "its parameters", kind: "choice", options: () => ["learn", "are frozen"] },
    { name: "momentum", label: "momentum", kind: "range", min: -3, max: 0, step: 0.05,
      from: (k) => 10 ** k, to: Math.log10, show: (v) => fixed(v, 3) },
    { name: "updates", label: "updates k", kind: "range", min: 1, max: 300, step: 1, show: String },
    { name: "values", label: "values per channel", kind: "range", min: 0, max: 9, step: 1,
      from: (k) => 2 ** k, to: Math.log2, show: String },
  ],

  compute({ limits }, { layer, frozen, momentum, updates, values }) {
    const training = layer === 0;
    const left = (1 - momentum) ** updates;
    const at = Array.from({ length: 101 }, (_, i) => (i / 100) * Math.max(60, updates));
    return {
      left, at, start: at.map((k) => (1 - momentum) ** k), limits,
      over: [left / limits.left, momentum / limits.momentum, training ? limits.values / values : 0],
      found: {
        "mode-mismatch": Number(!training && !frozen),
        "frozen-but-training": Number(training && frozen),
        "initial-value-left": Number(left > limits.left),
        "momentum-convention": Number(momentum > limits.momentum),
        "few-values": Number(training && values < limits.values),
      },
    };
  },

  draw({ left, at, start, over, found, limits }, { updates }) {
    const end = at[100];
    const weight = plot({ title: "weight of the start",
      label: `After ${updates} updates the start weighs ${fixed(left)}; the limit is ${fixed(limits.left)}`,
      x: [0, end], y: [0, 1.05], xticks: ticks(0, end), yticks: [0, 0.5, 1], xlabel: "updates k" });
    weight.line([0, end], [limits.left, limits.left], color("muted"), true);
    weight.line(at, start, color("eval"));
    weight.dots([updates], [left], color("eval"));
    const names = ["start left", "momentum", "few values"];
    const count = sum(Object.values(found));
    const bars = plot({ title: `times the limit; ${count} found`,
      label: names.map((name, i) => `${name} ${fixed(over[i], 2)} times its limit`).join(", "),
      x: [0, 3], y: [0, 3], xticks: names.map((name, i) => [i + 0.5, name]), yticks: [0, 1, 2, 3] });
    bars.columns(over, color("eval"));
    bars.line([0, 3], [1, 1], color("muted"), true);
    return [weight.node, bars.node];
  },

  status({ left, found, limits }, { momentum, values }) {
    const slugs = Object.keys(found).filter((slug) => found[slug]);
    return `The start weighs ${fixed(100 * left, 1)}% (limit ${fixed(100 * limits.left, 0)}%), ` +
      `momentum is ${fixed(momentum)} (limit ${fixed(limits.momentum, 1)}), ` +
      `${values} values per channel (limit ${limits.values}). Found: ${slugs.join(", ") || "nothing"}.`;
  },
};
