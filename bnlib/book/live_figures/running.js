// Chapter 4: batches arrive one by one, and the running mean and variance chase theirs.
figures.running = {
  label: "The batches and the running statistics",
  controls: [
    { name: "source", label: "batches from", kind: "choice", options: (data) => data.sources.map((s) => s.name) },
    { name: "momentum", label: "momentum", kind: "range", min: 0, max: 1, step: 0.01 },
    { name: "fed", label: "batches fed", kind: "range", min: 1, max: 60, step: 1, show: String },
    { name: "trained", label: "of them in training mode", kind: "range", min: 0, max: 60, step: 1,
      show: (v) => `the first ${v}` },
    { name: "feed", label: "Feed a batch", kind: "button",
      click: (model, set) => { model.set("fed", Math.min(model.get("fed") + 1, 60)); model.save_changes(); } },
  ],

  compute({ sources, m, eps }, { source, momentum, fed, trained }) {
    const { mean: means, var: vars } = sources[source];
    const running = { mean: [0], var: [1] }; // as a new layer starts
    for (let k = 0; k < fed; k += 1) {
      const share = k < trained ? momentum : 0; // evaluation moves nothing
      running.mean.push((1 - share) * running.mean[k] + share * means[k]);
      running.var.push((1 - share) * running.var[k] + (share * vars[k] * m) / (m - 1));
    }
    const batch = { mean: means[fed - 1], var: vars[fed - 1] };
    const training = fed <= trained;
    const used = training ? batch : { mean: running.mean[fed], var: running.var[fed] };
    return { running, means: means.slice(0, fed), vars: vars.slice(0, fed), training: Number(training),
      limits: [[...means, 0], [...vars, 1]].map((v) => [Math.min(...v), Math.max(...v)]),
      y: { mean: (batch.mean - used.mean) / Math.sqrt(used.var + eps), var: batch.var / (used.var + eps) } };
  },

  draw({ running, means, vars, limits }, { fed, trained }) {
    const panel = (title, batch, average, [lo, hi]) => {
      const pad = 0.08 * (hi - lo);
      const range = [lo - pad, hi + pad];
      const p = plot({ title, x: [0, 61], y: range, xticks: [0, 20, 40, 60], yticks: ticks(...range), xlabel: "batch",
        label: `${title} of ${fed} batches and its running average, now ${fixed(average[fed])}` });
      if (trained < fed) p.span(trained + 0.5, fed + 0.5, color("muted"));
      p.dots(batch.map((_, i) => i + 1), batch, color("train"));
      p.line(average.map((_, i) => i), average, color("eval"));
      return p.node;
    };
    return [panel("mean", means, running.mean, limits[0]), panel("variance", vars, running.var, limits[1])];
  },

  status({ running, means, vars, training, y }, { fed }) {
    const say = (mean, variance) => `mean ${fixed(mean, 2)}, variance ${fixed(variance, 2)}`;
    return `Batch ${fed}: ${say(means[fed - 1], vars[fed - 1])}. Running: ${say(running.mean[fed], running.var[fed])}. ` +
      `In ${training ? "training" : "evaluation"} the layer normalizes this batch to ${say(y.mean, y.var)}.`;
  },
};
