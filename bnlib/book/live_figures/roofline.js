// Chapter 9: the bytes that batch norm moves, the least time by formula, and the roofs of cards.
figures.roofline = {
  label: "The shape, the number format and the card",
  controls: [
    { name: "batch", label: "batch size N", kind: "range", min: 0, max: 10, step: 1,
      show: (k) => String(2 ** k) },
    { name: "channels", label: "channels C", kind: "range", min: 3, max: 11, step: 1,
      show: (k) => String(2 ** k) },
    { name: "height", label: "height = width", kind: "range", min: 1, max: 224, step: 1,
      show: String },
    { name: "format", label: "number format", kind: "choice",
      options: ({ formats }) => formats.map(({ name }) => name) },
    { name: "card", label: "card", kind: "choice",
      options: ({ cards }) => cards.map(({ name }) => name) },
  ],

  compute({ cards, formats, trips, operations }, { batch, channels, height, format, card }) {
    const bytes = formats[format].bytes * 2 ** batch * 2 ** channels * height ** 2;
    const moved = trips.map((count) => count * bytes); // forward, backward
    const time = (total, { bandwidth }) => total / (1000 * bandwidth); // microseconds; GB/s
    const { bandwidth, peak } = cards[card];
    const intensity = operations[0] / (trips[0] * formats[format].bytes);
    return {
      megabytes: moved.map((total) => total / 1e6),
      times: moved.map((total) => time(total, cards[card])),
      steps: cards.map((each) => time(sum(moved), each)),
      intensity,
      rate: (bandwidth * intensity) / 1000, // 10^12 operations a second
      share: (bandwidth * intensity) / (1000 * peak),
      roofs: { // each starts at 0.1 operations per byte, and is flat from its ridge on
        start: cards.map((each) => each.bandwidth / 10000),
        ridge: cards.map((each) => (1000 * each.peak) / each.bandwidth),
        peak: cards.map((each) => each.peak),
      },
    };
  },

  draw({ steps, intensity, rate, roofs }, { card }) {
    const log = Math.log10;
    const named = (value, name) => Object.assign(new Number(value), { toString: () => name });
    const roof = plot({ title: "10\u00b9\u00b2 operations a second", x: [-1, 2.5], y: [-2, 2.2],
      xticks: [[-1, "0.1"], [0, "1"], [1, "10"], [2, "100"]],
      yticks: [-2, -1, 0, 1, 2].map((v) => named(v, String(10 ** v))), xlabel: "operations per byte",
      label: `A roofline for each of ${steps.length} cards; a dot at ${fixed(intensity, 2)} operations per byte` });
    const line = (i) => {
      const [start, ridge, peak] = [roofs.start[i], roofs.ridge[i], roofs.peak[i]].map(log);
      roof.line([-1, ridge, 2.5], [start, peak, peak], color(i === card ? "ink" : "muted"));
    };
    steps.forEach((_, i) => i !== card && line(i));
    line(card);
    roof.vline(log(intensity), color("y"), true);
    roof.dots([log(intensity)], [log(rate)], color("y"));
    const top = Math.max(...steps);
    const unit = [[1e6, "seconds"], [1e3, "milliseconds"], [1, "microseconds"]].find(([u]) => top >= u) ?? [1e-3, "nanoseconds"];
    const shown = steps.map((t) => t / unit[0]);
    const time = plot({ title: `a step, ${unit[1]} at least`, x: [0, steps.length],
      y: [0, 1.1 * Math.max(...shown)], xticks: this.cards.map((name, i) => [i + 0.5, name]),
      yticks: ticks(0, 1.1 * Math.max(...shown)),
      label: `Least time of a step in ${unit[1]}: ${shown.map((t) => fixed(t, 2)).join(", ")}` });
    time.columns(shown, color("y"), { marked: card });
    return [roof.node, time.node];
  },
  cards: ["T4", "A100", "H100"],

  status({ megabytes, times, intensity, share }) {
    const say = (v) => fixed(v, v >= 100 ? 0 : v >= 1 ? 2 : 6);
    return `Forward moves ${say(megabytes[0])} MB and backward ${say(megabytes[1])} MB: ` +
      `at least ${say(times[0])} and ${say(times[1])} microseconds on this card. ` +
      `With ${fixed(intensity, 2)} operations per byte, its arithmetic is ${fixed(100 * share, 2)} percent busy at most.`;
  },
};
