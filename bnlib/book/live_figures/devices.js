// Chapter 10: what synchronising one layer costs on many devices, by the formulas of the chapter.
const power = { kind: "range", step: 1, from: (k) => 2 ** k, to: Math.log2 };

figures.devices = {
  label: "The devices, the layer and the network",
  controls: [
    { name: "devices", label: "devices", ...power, min: 1, max: 10, show: String },
    { name: "channels", label: "channels", ...power, min: 4, max: 11, show: String },
    { name: "batch", label: "batch per device", ...power, min: 0, max: 9, show: String },
    { name: "bandwidth", label: "bandwidth", ...power, min: 0, max: 9, show: (v) => `${v} GB/s` },
    { name: "latency", label: "latency", ...power, min: -1, max: 7, show: (v) => `${v} \u03bcs` },
  ],

  // Times in microseconds; a share is talk / (talk + layer), in percent.
  compute({ places, speed, memory }, { devices, channels: C, batch, bandwidth, latency }) {
    const values = batch * places * C;
    const convolution = (1e6 * 3 * 2 * 9 * C * values) / speed;
    const norm = (1e6 * 8 * 4 * values) / memory;
    const talk = (p) => {
      const bytes = (p - 1) * 8 * (1 + 2 * C) + ((2 * (p - 1)) / p) * 16 * C;
      return { send: bytes / (1e3 * bandwidth), ring: 3 * (p - 1) * latency, doubling: 3 * Math.log2(p) * latency };
    };
    const share = (p, way) => {
      const took = talk(p);
      const all = took.send + took[way];
      return (100 * all) / (all + convolution + norm);
    };
    const counts = Array.from({ length: 10 }, (_, k) => 2 ** (k + 1));
    const curve = (way) => counts.map((p) => share(p, way));
    return { convolution, norm, ...talk(devices), share: { ring: share(devices, "ring"), doubling: share(devices, "doubling") },
      curves: { ring: curve("ring"), doubling: curve("doubling") } };
  },

  draw({ convolution, norm, send, ring, doubling, share, curves }, { devices }) {
    const left = plot({ title: "% of a step spent talking", x: [0.7, 10.3], y: [0, 100], xlabel: "devices",
      xticks: [[1, 2], [4, 16], [7, 128], [10, 1024]], yticks: [0, 25, 50, 75, 100],
      label: `Share of a step on ${devices} devices: ${fixed(share.ring, 0)}% in a ring, ${fixed(share.doubling, 0)}% by doubling` });
    left.vline(Math.log2(devices), color("muted"), true);
    const at = curves.ring.map((_, k) => k + 1);
    for (const [way, hue] of [["ring", "gradient"], ["doubling", "activation"]]) {
      left.line(at, curves[way], color(hue));
      left.dots([Math.log2(devices)], [share[way]], color(hue));
    }
    const times = [convolution, norm, send, ring, doubling];
    const names = ["conv.", "norm", "bytes", "ring", "doubling"];
    const top = 1.08 * Math.max(...times);
    const right = plot({ title: "microseconds a step", x: [0, 5], y: [0, top], yticks: ticks(0, top),
      xticks: names.map((name, k) => [k + 0.5, name]), xlabel: "layer: conv., norm; talk: bytes, waits",
      label: `Microseconds: ${names.map((name, k) => `${name} ${fixed(times[k], 1)}`).join(", ")}` });
    right.columns(times.map((v, k) => (k < 3 ? v : 0)), color("muted"));
    right.columns(times.map((v, k) => (k === 3 ? v : 0)), color("gradient"));
    right.columns(times.map((v, k) => (k === 4 ? v : 0)), color("activation"));
    return [left.node, right.node];
  },

  status({ convolution, norm, send, ring, doubling, share }, { devices }) {
    const say = (way, wait) => `${fixed(send + wait, 1)} \u03bcs ${way}`;
    return `On ${devices} devices the layer takes ${fixed(convolution + norm, 1)} \u03bcs. Talking adds ${say("in a ring", ring)}, ` +
      `${fixed(share.ring, 0)}% of the step, or ${say("by doubling", doubling)}, ${fixed(share.doubling, 0)}%.`;
  },
};
