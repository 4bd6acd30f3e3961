// Chapter 13: put companions into the batch of one image, and watch what the network makes of it.
figures.companions = {
  label: "The image and its companions",
  controls: [
    { name: "beside", label: "In the batch beside", kind: "images", images: (data) => data.images },
    { name: "mode", label: "mode", kind: "choice", options: () => ["training", "evaluation"] },
    { name: "feed", label: "Seven others", kind: "button",
      click: (model) => {
        const { draws } = model.get("data");
        model.set("beside", draws[(draws.indexOf(model.get("beside")) + 1) % draws.length]);
        model.save_changes();
      } },
  ],

  // One hidden layer of nodes: z is (images, nodes), the image in question first; `beside` has a
  // bit for each of the others.
  compute({ z, gamma, beta, mean, var: variance, weight, bias, eps }, { beside, mode }) {
    const batch = z.filter((_, i) => i === 0 || (beside >> (i - 1)) & 1);
    const own = gamma.map((_, c) => moments(batch.map((row) => row[c])));
    const kept = gamma.map((_, c) => ({ mean: mean[c], var: variance[c] }));
    const pass = (used) => {
      const zHat = z[0].map((v, c) => (v - used[c].mean) / Math.sqrt(used[c].var + eps));
      const a = zHat.map((v, c) => Math.max(gamma[c] * v + beta[c], 0));
      const scores = bias.map((b, k) => b + sum(a.map((v, c) => v * weight[k][c])));
      const order = scores.map((_, k) => k).sort((k, l) => scores[l] - scores[k]);
      return { zHat, scores, first: order[0], second: order[1] };
    };
    const evaluation = pass(kept);
    return { now: mode === 0 ? pass(own) : evaluation, evaluation, others: batch.length - 1 };
  },

  draw({ now, evaluation }) {
    const panel = (title, what, of, marked, limit, yticks, xticks, hue) => {
      const p = plot({ title, x: [0, of(now).length], y: limit, yticks, xticks, xlabel: what,
        label: `${title}: ${of(now).map((v, k) => `${what} ${k} ${fixed(v, 2)}`).join(", ")}` });
      p.columns(of(now), hue, { ghost: of(evaluation), marked });
      return p.node;
    };
    const nodes = now.zHat.map((_, c) => [c + 0.5, c % 5 ? "" : c]);
    const classes = now.scores.map((_, k) => [k + 0.5, k]);
    return [
      panel("z\u0302 of the image", "node", (r) => r.zHat, -1, [-4, 4], [-4, -2, 0, 2, 4], nodes, color("z_hat")),
      panel("its scores", "class", (r) => r.scores, now.first, [-12, 12], [-10, -5, 0, 5, 10], classes, color("train")),
    ];
  },

  status({ now, evaluation, others }, { mode }) {
    const say = ({ scores, first, second }) =>
      `${first} with a score of ${fixed(scores[first], 2)}, before ${second} with ${fixed(scores[second], 2)}`;
    if (mode === 1) return `Evaluation mode, beside ${others}: it answers ${say(now)}.`;
    if (others === 0) {
      return "Alone in training mode: PyTorch refuses. By the formula every z\u0302 is zero, and any image would be answered " +
        `${say(now)}.`;
    }
    return `Beside ${others}: it answers ${say(now)}. In evaluation mode: ${say(evaluation)}.`;
  },
};
