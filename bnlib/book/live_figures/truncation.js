// Chapter 19: narrower latent points, with running statistics and with standing ones.
figures.truncation = {
  label: "Truncation and standing statistics",
  controls: [
    { name: "threshold", label: "threshold", kind: "range", min: 0.25, max: 2.5, step: 0.25 },
    { name: "statistics", label: "statistics", kind: "choice",
      options: () => ["running, from training", "standing, for this threshold"] },
  ],

  compute({ sheet, thresholds, distances }, { threshold, statistics }) { // frames: running, then standing
    const k = thresholds.indexOf(threshold);
    return { sheet, frame: statistics * thresholds.length + k, thresholds, distances,
      both: distances.map((curve) => curve[k]) };
  },

  draw({ sheet, frame, thresholds, distances }, { threshold, statistics }) {
    const name = ["running", "standing"][statistics];
    const pictures = digits({ title: "the same 24 latent points", sheet, frame,
      label: `24 generated pictures, threshold ${fixed(threshold, 2)}, ${name} statistics` });
    const powers = (values) => values.map(Math.log10);
    const p = plot({ title: "distance to real digits", x: [0, 2.6], y: [1.5, 3.5], xlabel: "threshold",
      xticks: ticks(0, 2.5), yticks: [[2, "100"], [3, "1000"]],
      label: "Fréchet distance by threshold: " + distances.map((curve, i) =>
        `${["running", "standing"][i]} statistics from ${fixed(curve[0], 0)} to ${fixed(curve.at(-1), 0)}`).join(", ") });
    distances.forEach((curve, i) => p.line(thresholds, powers(curve), color(["eval", "train"][i])));
    p.vline(threshold, color("ink"));
    return [pictures, p.node];
  },

  status({ both: [running, standing] }, { threshold }) {
    return `Threshold ${fixed(threshold, 2)}: the distance is ${fixed(running, 0)} with running statistics ` +
      `and ${fixed(standing, 0)} with standing ones.`;
  },
};
