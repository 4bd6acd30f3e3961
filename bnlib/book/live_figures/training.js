// Chapter 5: training curves with and without batch norm, computed on the page for each choice.
figures.training = {
  label: "Learning rate and initial weights",
  controls: [
    { name: "rate", label: "learning rate", kind: "range", min: -2, max: 1, step: 0.5,
      from: (k) => 10 ** k, to: Math.log10, show: (v) => String(Number(v.toPrecision(1))) },
    { name: "start", label: "initial weights", kind: "choice",
      options: (data) => data.starts.map((start) => start.name) },
  ],

  // A curve has one mean loss per block of steps; a start holds one curve per rate.
  compute({ starts, rates, block, cap }, { rate, start }) {
    const distance = rates.map((r) => Math.abs(Math.log10(r / rate)));
    const at = distance.indexOf(Math.min(...distance));
    const { with: norm, without } = starts[start];
    const end = (curve) => mean(curve.slice(-5));
    return { with: norm[at], without: without[at], rates, block, cap,
      ends: { with: norm.map(end), without: without.map(end) },
      last: { with: end(norm[at]), without: end(without[at]) } };
  },

  draw({ with: norm, without, rates, block, cap, ends, last }, { rate }) {
    const y = [0, cap], yticks = Array.from({ length: cap + 1 }, (_, i) => i);
    const both = (p, xs, top, bottom) => {
      p.line(xs, bottom, color("muted"), true);
      p.line(xs, top, color("y"));
      return p.node;
    };
    const say = ({ with: a, without: b }) => `${fixed(a, 2)} with batch norm, ${fixed(b, 2)} without`;
    const steps = norm.map((_, i) => (i + 0.5) * block);
    const left = plot({ title: "loss (dashed: without)", x: [0, norm.length * block], y, yticks,
      xticks: ticks(0, norm.length * block), xlabel: "step",
      label: `Training loss over ${norm.length * block} steps, at the end ${say(last)}` });
    const powers = rates.map(Math.log10);
    const each = rates.map((r, i) => `${Number(r.toPrecision(1))}: ` +
      say({ with: ends.with[i], without: ends.without[i] }));
    const right = plot({ title: "loss at the end, by rate", x: [powers[0], powers.at(-1)], y, yticks,
      xticks: [[-2, "0.01"], [-1, "0.1"], [0, "1"], [1, "10"]], xlabel: "learning rate",
      label: `Loss at the end for each learning rate. ${each.join("; ")}` });
    right.vline(Math.log10(rate), color("ink"));
    return [both(left, steps, norm, without), both(right, powers, ends.with, ends.without)];
  },

  status({ block, cap, last }, { rate }) {
    const say = (loss) => fixed(loss, 2) + (loss >= cap ? " or more" : "");
    return `Learning rate ${Number(rate.toPrecision(1))}: over the last ${5 * block} steps the loss is ` +
      `${say(last.with)} with batch norm and ${say(last.without)} without.`;
  },
};
