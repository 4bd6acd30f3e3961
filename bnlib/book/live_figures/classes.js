// Chapter 20: one latent point, drawn with the gamma and beta of a class, or of two classes mixed.
figures.classes = {
  label: "Choose the gamma and beta",
  controls: [
    { name: "first", label: "gamma and beta of class", kind: "choice", options: () => [..."0123456789"] },
    { name: "second", label: "mixed with class", kind: "choice", options: () => [..."0123456789"] },
    { name: "share", label: "share of the second", kind: "range", min: 0, max: 1, step: 0.25 },
    { name: "point", label: "latent point", kind: "range", min: 1, max: 5, step: 1, show: String },
  ],

  // Frames 0 to 9 are the classes; then come three mixtures of each pair, (0, 1) first.
  compute({ sheets, percents }, { first, second, share, point }) {
    const [a, b, t] = first < second ? [first, second, share] : [second, first, 1 - share];
    const pair = (a * (19 - a)) / 2 + b - a - 1;
    const frame = a === b || t === 0 ? a : t === 1 ? b : 10 + 3 * pair + 4 * t - 1;
    const read = percents[point - 1][frame];
    const best = Math.max(...read);
    return { sheet: sheets[point - 1], frame, read, best, digit: read.indexOf(best) };
  },

  draw({ sheet, frame, read, best, digit }, { point }) {
    const picture = digits({ title: `latent point ${point}`, sheet, frame, width: 200,
      label: `A drawing that the classifier reads as ${digit}, with ${best} percent` });
    const p = plot({ title: "what the classifier reads", x: [0, 10], y: [0, 100],
      xticks: read.map((_, k) => [k + 0.5, k]), yticks: [0, 50, 100], xlabel: "class",
      label: `Percent for each class: ${read.join(", ")}` });
    p.columns(read, color("fake"), { marked: digit });
    return [picture, p.node];
  },

  status({ read, best, digit }, { first, second, share, point }) {
    const drawn = `Latent point ${point}, drawn with the gamma and beta of class ${first}`;
    if (first === second) return `${drawn}, is read as ${digit}, with ${best} percent.`;
    return `${drawn} (a share of ${fixed(1 - share, 2)}) and class ${second} (${fixed(share, 2)}), is read as ${digit}, ` +
      `with ${best} percent; as ${first} with ${read[first]}, as ${second} with ${read[second]}.`;
  },
};
