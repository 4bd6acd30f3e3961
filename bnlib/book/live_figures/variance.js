// Chapter 6: one variance computed in five ways, in float32, and the digits that come out right.
figures.variance = {
  label: "The mean and the spread of the values",
  ways: ["two passes", "squares", "Welford", "shifted", "double"],
  controls: [
    { name: "mean", label: "mean", kind: "range", min: 0, max: 7, step: 0.25,
      show: (k) => (10 ** k).toPrecision(2).replace("e+", "e") },
    { name: "std", label: "standard deviation", kind: "range", min: -3, max: 2, step: 0.25,
      show: (k) => (10 ** k).toPrecision(2).replace("e-", "e\u2212") },
  ],

  compute({ z }, { mean: place, std: spread }) {
    const f = Math.fround; // to float32, after every single operation
    const x = z.map((v) => f(10 ** place + 10 ** spread * v));
    const m = x.length;
    const { var: exact } = moments(x);
    const average = (values) => f(values.reduce((total, v) => f(total + v), 0) / m);
    const square = (v) => f(v * v);
    const squares = (values) => f(average(values.map(square)) - square(average(values)));
    const mu = average(x);
    let running = 0, total = 0;
    x.forEach((v, i) => {
      const off = f(v - running);
      running = f(running + f(off / (i + 1)));
      total = f(total + f(off * f(v - running)));
    });
    const found = [
      average(x.map((v) => square(f(v - mu)))),
      squares(x),
      f(total / m),
      squares(x.map((v) => f(v - x[0]))),
      mean(x.map((v) => v * v)) - mean(x) ** 2,
    ];
    const digits = found.map((v) => { // eight at most: more than float32 can hold
      const error = exact > 0 ? Math.abs(v - exact) / exact : 1;
      return Math.max(0, -Math.log10(Math.max(error, 1e-8)));
    });
    return { exact, found, digits };
  },

  draw({ digits }) {
    const p = plot({ title: "right digits of the variance", x: [0, 5], y: [0, 8.4], width: 560,
      xticks: this.ways.map((name, i) => [i + 0.5, name]), yticks: [0, 2, 4, 6, 8],
      label: `Right digits: ${this.ways.map((name, i) => `${name} ${fixed(digits[i], 1)}`).join(", ")}` });
    p.columns(digits, color("y"));
    return [p.node];
  },

  status({ exact, found, digits }) {
    if (exact === 0) return "In float32 all values are the same number: no spread is left to find.";
    const each = this.ways.map((name, i) => `${name} ${fixed(digits[i], 1)}`).join(", ");
    return `Right digits: ${each}.` + (found[1] < 0 ? " Squares found a negative variance: its root is no number." : "");
  },
};
