// Chapter 17: the same latent points over the course of training, and the score of each moment.
figures.gan = {
  label: "The course of training",
  controls: [ // frame k shows the generator after 2k² steps
    { name: "step", label: "step", kind: "range", min: 0, max: 20, step: 1,
      from: (k) => 2 * k * k, to: (step) => Math.sqrt(step / 2), show: String },
  ],

  compute({ sheet, steps, distances, losses, real }, { step }) {
    const frame = steps.indexOf(step);
    return { sheet, frame, steps, distances, real, distance: distances[frame], losses: losses[frame] };
  },

  draw({ sheet, frame, steps, distances, real, distance }, { step }) {
    const pictures = digits({ title: "the same 24 latent points", sheet, frame,
      label: `24 generated pictures after ${step} steps` });
    const powers = (values) => values.map(Math.log10);
    const p = plot({ title: "distance to real digits", x: [0, steps.at(-1)], y: [0, 3.6], xlabel: "step",
      xticks: ticks(0, steps.at(-1)), yticks: [[0, "1"], [1, "10"], [2, "100"], [3, "1000"]],
      label: `Fréchet distance over ${steps.at(-1)} steps, from ${fixed(distances[0], 0)} to ` +
        `${fixed(distances.at(-1), 0)}; real digits have ${fixed(real, 1)}` });
    p.line([0, steps.at(-1)], powers([real, real]), color("real"), true);
    p.line(steps, powers(distances), color("fake"));
    p.vline(step, color("ink"));
    return [pictures, p.node];
  },

  status({ distance, losses: [critic, generator], real }, { step }) {
    return `After ${step} steps the distance is ${fixed(distance, 0)}; real digits that the score has not ` +
      `seen have ${fixed(real, 1)}. The critic's loss is ${fixed(critic, 2)}, the generator's ${fixed(generator, 2)}.`;
  },
};
