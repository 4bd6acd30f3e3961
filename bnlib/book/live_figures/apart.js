// Chapter 18: one channel of real and of generated images, in separate batches or mixed.
figures.apart = {
  label: "Real and generated images at one channel",
  controls: [
    { name: "distance", label: "distance", kind: "range", min: 0, max: 8, step: 0.25 },
    { name: "batches", label: "batches", kind: "choice", options: () => ["apart", "mixed"] },
    { name: "mode", label: "mode", kind: "choice", options: () => ["training", "evaluation"] },
    { name: "order", label: "calls in a step", kind: "choice",
      options: () => ["real, generated, generated", "generated, real, generated", "real, generated"] },
  ],

  // The running statistics are those that a momentum of 0.1 arrives at in the long run.
  compute({ real, fake }, { distance, batches, mode, order }) {
    const z = { real: real.map((v) => v + distance / 2), fake: fake.map((v) => v - distance / 2) };
    const seen = batches ? (() => { const both = moments([...z.real, ...z.fake]); return { real: both, fake: both }; })()
      : { real: moments(z.real), fake: moments(z.fake) };
    const calls = [[1, 0, 0], [0, 1, 0], [1, 0]][order];
    const weights = calls.map((_, k) => 0.9 ** (calls.length - 1 - k));
    const share = sum(weights.map((w, k) => w * calls[k])) / sum(weights);
    const m = batches ? real.length + fake.length : real.length;
    const mix = (key) => share * seen.real[key] + (1 - share) * seen.fake[key];
    const running = { mean: mix("mean"), var: (mix("var") * m) / (m - 1) };
    const hat = (kind) => {
      const used = mode ? running : seen[kind];
      return z[kind].map((v) => (v - used.mean) / Math.sqrt(used.var + 1e-5));
    };
    const zHat = { real: hat("real"), fake: hat("fake") };
    return { z, zHat, share, running, after: { real: moments(zHat.real), fake: moments(zHat.fake) } };
  },

  draw({ z, zHat, running, after }) {
    const panel = (title, label, { real, fake }) => {
      const kinds = [[real, "real"], [fake, "fake"]];
      const counts = kinds.map(([values]) => histogram(values, -6, 6, 24));
      const p = plot({ title, label, x: [-6, 6], y: [0, 1.08 * Math.max(...counts.flat(), 1)], xticks: [-6, -3, 0, 3, 6] });
      kinds.forEach(([values, thing], k) => {
        p.bars(counts[k], color(thing));
        p.rug(values, color(thing));
        p.vline(mean(values), color(thing), true);
      });
      return p.node;
    };
    const say = (a, b) => `real images with mean ${fixed(a, 2)}, generated ones with mean ${fixed(b, 2)}`;
    return [
      panel("z: real and generated", `Histogram of z: ${say(mean(z.real), mean(z.fake))}`, z),
      panel("z\u0302, which the next layer sees", `Histogram of z-hat: ${say(after.real.mean, after.fake.mean)}; ` +
        `running mean ${fixed(running.mean, 2)}, running variance ${fixed(running.var, 2)}`, zHat),
    ];
  },

  status({ share, running, after }, { distance }) {
    return `Distance ${fixed(distance, 2)}. Normalized, the real images have mean ${fixed(after.real.mean, 2)} and the ` +
      `generated ones ${fixed(after.fake.mean, 2)}. The running statistics, ${fixed(100 * share, 1)}% real, ` +
      `have mean ${fixed(running.mean, 2)} and variance ${fixed(running.var, 2)}.`;
  },
};
