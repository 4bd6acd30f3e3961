"""How fast, how frugal and how exact `bnlib.scratch` is, beside PyTorch and others.

Run it with `make bench`, or `python benchmarks/scratch.py --help`. One process, one thread. All
contenders take turns, round after round; each is called twice in a row and timed the second time,
since the first call finds its code and arrays thrown out of the cache by the contender before it.
What is shown is the median over the rounds of the ratio of two CPU times in one round. A ratio
bears a busy machine better than a time does, and still: run it on a quiet one.

A contender writes to new arrays, as a framework's layer does, or to the same ones each time
("reused"): on big batches, clearing new memory costs as much as the arithmetic. All who reuse
arrays, the floors too, reuse the same ones. A goal names both sides, so that nobody has to guess.
"""

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # read when NumPy and PyTorch are imported
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import argparse
import importlib.util
import json
import platform
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from bnlib.scratch import fast, functional

SHAPES = [(256, 512), (32, 256, 8, 8), (128, 64, 14, 14), (64, 64, 56, 56)]
PASSES = ["forward", "forward + backward", "evaluation"]
EPS = 1e-5

NATIVE, NATIVE_REUSED = "torch.nn.BatchNorm", "torch's kernel, reused"
NUMBA, NUMBA_REUSED = "fast, Numba", "fast, Numba, reused"
NUMPY, NUMPY_REUSED = "fast, NumPy", "fast, NumPy, reused"
NUMPY_FAR = "fast, NumPy, reused, means far from 0"
READABLE, TEXTBOOK, FLOOR = "functional", "textbook layer in NumPy", "floor, reused"


class Batch(NamedTuple):
    """What one shape is measured on, and the arrays that results may be written to."""

    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    y: np.ndarray
    dx: np.ndarray

    @classmethod
    def make(cls, shape: tuple[int, ...], mean: float) -> "Batch":
        """Return float32 values whose channels have means up to `mean` standard deviations off."""
        rng = np.random.default_rng(0)
        C = shape[1]
        per_channel = (1, C, *(1,) * (len(shape) - 2))
        x = rng.standard_normal(shape, np.float32)
        x += rng.uniform(mean / 2, mean, C).astype(np.float32).reshape(per_channel)
        x *= rng.uniform(0.5, 2, C).astype(np.float32).reshape(per_channel)
        gamma, beta = rng.uniform(0.5, 2, C), rng.standard_normal(C)
        dy = rng.standard_normal(shape, np.float32)
        results = np.zeros_like(x), np.zeros_like(x)
        return cls(x, dy, gamma.astype(np.float32), beta.astype(np.float32), *results)


Calls = dict[str, Callable[[], object]]


def floor(batch: Batch) -> Calls:
    """Move what must be moved at least: x to y; then x and dy to dx."""

    def both() -> None:
        np.copyto(batch.y, batch.x)
        np.add(batch.x, batch.dy, out=batch.dx)

    copy = partial(np.copyto, batch.y, batch.x)
    return dict(zip(PASSES, [copy, both, copy], strict=True))


def ours(batch: Batch, module: ModuleType, reuse: bool = False, numba: bool = True) -> Calls:
    """Call one of our modules, with new arrays or with the same ones each time."""
    x, dy, gamma, beta, *_ = batch
    y, dx = ({"out": result} if reuse else {} for result in (batch.y, batch.dx))
    mean, var = functional.moments(x)

    def both() -> None:
        _, cache = module.batch_norm(x, gamma, beta, EPS, **y)
        module.batch_norm_backward(dy, cache, **dx)

    calls = [
        lambda: module.batch_norm(x, gamma, beta, EPS, **y),
        both,
        lambda: module.batch_norm_inference(x, mean, var, gamma, beta, EPS, **y),
    ]
    if not numba:
        calls = [in_numpy(call) for call in calls]
    return dict(zip(PASSES, calls, strict=True))


def in_numpy(call: Callable[[], object]) -> Callable[[], object]:
    """Return the call, made without the compiled core."""

    def without() -> None:
        with fast.use_compiled(False):
            call()

    return without


class TextbookLayer:
    """The layer as courses write it: mean and variance with keepdims, x_hat kept, float32."""

    def __init__(self, gamma: np.ndarray, beta: np.ndarray, ndim: int) -> None:
        self.axes = (0, *range(2, ndim))
        shape = (1, -1, *(1,) * (ndim - 2))
        self.gamma, self.beta = gamma.reshape(shape), beta.reshape(shape)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Return y with the batch's statistics."""
        mean = x.mean(axis=self.axes, keepdims=True)
        var = ((x - mean) ** 2).mean(axis=self.axes, keepdims=True)
        self.std = np.sqrt(var + np.float32(EPS))
        self.x_hat = (x - mean) / self.std
        return self.gamma * self.x_hat + self.beta

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """Return dx, in the closed form."""
        m = dy.size // self.gamma.size
        self.dgamma = (dy * self.x_hat).sum(axis=self.axes, keepdims=True)
        self.dbeta = dy.sum(axis=self.axes, keepdims=True)
        dx_hat = dy * self.gamma
        total = dx_hat.sum(axis=self.axes, keepdims=True)
        along = (dx_hat * self.x_hat).sum(axis=self.axes, keepdims=True)
        return (m * dx_hat - total - self.x_hat * along) / (m * self.std)

    def evaluate(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        """Return y with given statistics."""
        return self.gamma * (x - mean) / np.sqrt(var + np.float32(EPS)) + self.beta


def textbook(batch: Batch) -> Calls:
    """Call the textbook layer, which makes a new array at each operation."""
    layer = TextbookLayer(batch.gamma, batch.beta, batch.x.ndim)
    mean, var = (
        v.astype(np.float32).reshape(layer.gamma.shape) for v in functional.moments(batch.x)
    )

    def both() -> None:
        layer.forward(batch.x)
        layer.backward(batch.dy)

    calls = [
        lambda: layer.forward(batch.x),
        both,
        lambda: layer.evaluate(batch.x, mean, var),
    ]
    return dict(zip(PASSES, calls, strict=True))


def native(batch: Batch) -> Calls:
    """Call PyTorch's layer in eager mode: new arrays, autograd, running statistics."""
    make = torch.nn.BatchNorm1d if batch.x.ndim == 2 else torch.nn.BatchNorm2d
    layer, evaluating = make(batch.x.shape[1]), make(batch.x.shape[1]).eval()
    x, dy = torch.from_numpy(batch.x), torch.from_numpy(batch.dy)
    x_with_gradient = x.clone().requires_grad_()

    def both() -> None:
        layer.weight.grad = layer.bias.grad = x_with_gradient.grad = None
        layer(x_with_gradient).backward(dy)

    def evaluation() -> None:
        with torch.no_grad():
            evaluating(x)

    return dict(zip(PASSES, [lambda: layer(x_with_gradient), both, evaluation], strict=True))


def native_kernel(batch: Batch) -> Calls:
    """Call PyTorch's kernels alone, into the same arrays each time."""
    x, dy, gamma, beta, y, dx = (torch.from_numpy(a) for a in batch)
    dgamma, dbeta, mean, inv_std = (torch.empty_like(gamma) for _ in range(4))
    running = torch.zeros_like(gamma), torch.ones_like(gamma)
    kept = {"out": y, "save_mean": mean, "save_invstd": inv_std}
    nothing = {"out": y, "save_mean": torch.empty(0), "save_invstd": torch.empty(0)}
    gradients = {"out0": dx, "out1": dgamma, "out2": dbeta}
    up, down = torch.ops.aten.native_batch_norm, torch.ops.aten.native_batch_norm_backward

    def forward() -> None:
        up.out(x, gamma, beta, *running, True, 0.1, EPS, **kept)

    def both() -> None:
        forward()
        down.out(dy, x, gamma, *running, mean, inv_std, True, EPS, [True] * 3, **gradients)

    def evaluation() -> None:
        up.out(x, gamma, beta, *running, False, 0.1, EPS, **nothing)

    return dict(zip(PASSES, [forward, both, evaluation], strict=True))


def keras_layer(batch: Batch) -> Calls:
    """Call Keras on PyTorch."""
    import keras

    layer = keras.layers.BatchNormalization(axis=1, epsilon=EPS)
    x, dy = torch.from_numpy(batch.x), torch.from_numpy(batch.dy)
    x_with_gradient = x.clone().requires_grad_()
    layer(x, training=True)

    def both() -> None:
        x_with_gradient.grad = None
        layer(x_with_gradient, training=True).backward(dy)

    def evaluation() -> None:
        with torch.no_grad():
            layer(x, training=False)

    calls = [lambda: layer(x_with_gradient, training=True), both, evaluation]
    return dict(zip(PASSES, calls, strict=True))


def flax_layer(batch: Batch) -> Calls:
    """Call Flax, compiled by jax.jit."""
    import flax.linen
    import jax

    def layer(training: bool) -> flax.linen.BatchNorm:
        return flax.linen.BatchNorm(use_running_average=not training, axis=1, epsilon=EPS)

    x, dy = jax.numpy.asarray(batch.x), jax.numpy.asarray(batch.dy)
    state = layer(False).init(jax.random.key(0), x)
    rest = {"batch_stats": state["batch_stats"]}

    def train(params: object, x: jax.Array) -> jax.Array:
        return layer(True).apply({"params": params, **rest}, x, mutable=["batch_stats"])[0]

    def gradients(params: object, x: jax.Array, dy: jax.Array) -> tuple[object, object]:
        y, pull = jax.vjp(train, params, x)
        return y, pull(dy)

    forward, both = jax.jit(train), jax.jit(gradients)
    evaluation = jax.jit(lambda x: layer(False).apply(state, x))
    calls = [
        lambda: forward(state["params"], x).block_until_ready(),
        lambda: jax.block_until_ready(both(state["params"], x, dy)),
        lambda: evaluation(x).block_until_ready(),
    ]
    return dict(zip(PASSES, calls, strict=True))


def contenders(shape: tuple[int, ...]) -> Iterator[tuple[str, Calls]]:
    """Yield name and calls of all who are installed."""
    batch = Batch.make(shape, 0.5)
    far = Batch.make(shape, 6)._replace(y=batch.y, dx=batch.dx)
    yield FLOOR, floor(batch)
    yield NATIVE, native(batch)
    yield NATIVE_REUSED, native_kernel(batch)
    if installed("numba"):
        yield NUMBA_REUSED, ours(batch, fast, reuse=True)
        yield NUMBA, ours(batch, fast)
    yield NUMPY_REUSED, ours(batch, fast, reuse=True, numba=False)
    yield NUMPY_FAR, ours(far, fast, reuse=True, numba=False)
    yield NUMPY, ours(batch, fast, numba=False)
    yield READABLE, ours(batch, functional)
    yield TEXTBOOK, textbook(batch)
    if installed("keras"):
        yield "Keras on PyTorch", keras_layer(batch)
    if installed("flax"):
        yield "Flax, jit", flax_layer(batch)


def installed(module: str) -> bool:
    """Return whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def measure(calls: dict[str, Calls], rounds: int) -> dict[str, dict[str, np.ndarray]]:
    """Return CPU seconds of every contender in every round, by name and pass."""
    times = {name: {p: np.empty(rounds) for p in PASSES} for name in calls}
    for i in range(rounds):
        for p in PASSES:
            for name, of_passes in calls.items():
                of_passes[p]()
                start = time.process_time_ns()
                of_passes[p]()
                times[name][p][i] = (time.process_time_ns() - start) / 1e9
    return times


def ratio(times: dict[str, dict[str, np.ndarray]], who: str, base: str, p: str) -> float:
    """Return the median over the rounds of one contender's time over another's."""
    return float(np.median(times[who][p] / times[base][p]))


class Goal(NamedTuple):
    """A ratio of two contenders that is to stay at or under a limit."""

    who: str
    base: str
    of_pass: str
    limit: float
    applies: Callable[[tuple[int, ...]], bool]


def images(shape: tuple[int, ...]) -> bool:
    """Return whether a shape has positions."""
    return len(shape) > 2


def vectors(shape: tuple[int, ...]) -> bool:
    """Return whether a shape has none."""
    return len(shape) == 2


def large(shape: tuple[int, ...]) -> bool:
    """Return whether a shape of float32 takes 6 MB or more."""
    return images(shape) and 4 * np.prod(shape) >= 6e6


def largest(shape: tuple[int, ...]) -> bool:
    """Return whether a shape of float32 takes 50 MB or more."""
    return images(shape) and 4 * np.prod(shape) >= 50e6


FORWARD, BOTH, EVALUATION = PASSES
GOALS = [
    Goal(NUMBA_REUSED, NATIVE, FORWARD, 0.20, images),
    Goal(NUMBA_REUSED, NATIVE, BOTH, 0.30, images),
    Goal(NUMBA_REUSED, NATIVE_REUSED, FORWARD, 0.25, images),
    Goal(NUMBA_REUSED, NATIVE_REUSED, BOTH, 0.25, images),
    Goal(NUMBA_REUSED, FLOOR, FORWARD, 1.5, large),
    Goal(NUMBA_REUSED, NATIVE, FORWARD, 0.55, vectors),
    Goal(NUMBA_REUSED, NATIVE, BOTH, 0.45, vectors),
    Goal(NUMBA_REUSED, FLOOR, EVALUATION, 1.2, lambda shape: True),
    Goal(NUMPY_REUSED, NATIVE, FORWARD, 0.5, images),
    Goal(NUMPY_REUSED, NATIVE, BOTH, 0.85, images),
    Goal(NUMPY_REUSED, NATIVE, BOTH, 0.4, largest),
    Goal(NUMPY_REUSED, TEXTBOOK, FORWARD, 0.4, images),
    Goal(NUMPY_REUSED, TEXTBOOK, BOTH, 0.4, images),
    Goal(NUMPY_REUSED, NATIVE, FORWARD, 1.7, vectors),
    Goal(NUMPY_REUSED, NATIVE, BOTH, 1.4, vectors),
]


def speed(shape: tuple[int, ...], seconds: float) -> dict[str, object]:
    """Measure all contenders on a shape for about so many seconds."""
    calls = dict(contenders(shape))
    measure(calls, 1)  # Numba and XLA compile
    start = time.perf_counter()
    measure(calls, 1)
    rounds = int(np.clip(seconds / (time.perf_counter() - start), 9, 500))
    times = measure(calls, rounds)
    rows = [
        {
            "contender": name,
            "pass": p,
            "microseconds": round(float(np.median(times[name][p])) * 1e6, 1),
            "over native": ratio(times, name, NATIVE, p),
            "over floor": ratio(times, name, FLOOR, p),
        }
        for p in PASSES
        for name in times
    ]
    goals = [
        {
            "contender": g.who,
            "over": g.base,
            "pass": g.of_pass,
            "goal": g.limit,
            "ratio": ratio(times, g.who, g.base, g.of_pass),
        }
        for g in GOALS
        if g.applies(shape) and g.who in times
    ]
    return {"shape": shape, "rounds": rounds, "rows": rows, "goals": goals}


def exactness() -> list[dict[str, object]]:
    """Return the largest error of y against float64, in four distances from 0."""
    layers = {NUMPY: False, NUMBA: True} if installed("numba") else {NUMPY: False}
    rows = []
    for mean, std in [(0, 1), (1e3, 1), (1e4, 1e-2), (1e6, 1)]:
        rng = np.random.default_rng(0)
        for shape in [(100_000, 4), (64, 4, 40, 40)]:
            x = rng.normal(mean, std, shape).astype(np.float32)
            gamma, beta = np.ones(4), np.zeros(4)
            exact = functional.batch_norm(x.astype(np.float64), gamma, beta, EPS)[0]
            found = {}
            for name, numba in layers.items():
                with fast.use_compiled(numba):
                    found[name] = fast.batch_norm(x, gamma, beta, EPS)[0]
            found[READABLE] = functional.batch_norm(x, gamma, beta, EPS)[0]
            layer = TextbookLayer(gamma.astype(np.float32), beta.astype(np.float32), x.ndim)
            found[TEXTBOOK] = layer.forward(x)
            tensor = torch.from_numpy(x)
            found[NATIVE] = torch.nn.functional.batch_norm(tensor, None, None, training=True)
            for name, y in found.items():
                error = float(np.abs(np.asarray(y) - exact).max())
                goal = 2e-6 if name in layers else None
                rows.append(
                    {"contender": name, "mean": mean, "std": std, "shape": shape}
                    | {"error": error, "goal": goal}
                )
    return rows


def memory(shape: tuple[int, ...]) -> list[dict[str, object]]:
    """Return the peak of forward + backward in multiples of x; NumPy tells tracemalloc."""
    limits = {NUMPY: 2.1, NUMPY_REUSED: 0.1, NUMBA: 2.1, NUMBA_REUSED: 0.1}
    rows = []
    for name, calls in contenders(shape):
        if name in (*limits, READABLE, TEXTBOOK):
            calls[BOTH]()
            tracemalloc.start()
            if name == TEXTBOOK:
                calls = textbook(Batch.make(shape, 0.5))  # keeps nothing from the call before
                tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            calls[BOTH]()
            peak = (tracemalloc.get_traced_memory()[1] - before) / (4 * np.prod(shape))
            tracemalloc.stop()
            rows.append({"contender": name, "peak": float(peak), "goal": limits.get(name)})
    return rows


def verdict(value: float, goal: float | None) -> str:
    """Return a goal and whether a value meets it."""
    return "" if goal is None else f"{goal:8.2g}  {'met' if value <= goal else 'MISSED'}"


def show(results: dict[str, object]) -> None:
    """Print the tables."""
    for of_shape in results["speed"]:
        print(f"\n{of_shape['shape']}, {of_shape['rounds']} rounds")
        print(f"  {'':38}" + "".join(f"{p:>24}" for p in PASSES))
        print(f"  {'':38}" + f"{'over native, over floor':>24}" * 3)
        rows = of_shape["rows"]
        for name in dict.fromkeys(row["contender"] for row in rows):
            mine = [row for row in rows if row["contender"] == name]
            cells = [f"{row['over native']:16.2f}{row['over floor']:8.1f}" for row in mine]
            print(f"  {name:38}" + "".join(cells))
        for goal in of_shape["goals"]:
            what = f"{goal['contender']} / {goal['over']}, {goal['pass']}"
            print(f"  {what:76}{goal['ratio']:8.2f} {verdict(goal['ratio'], goal['goal'])}")
    print("\nLargest error of y against float64")
    for row in results["exactness"]:
        where = f"mean {row['mean']:g}, std {row['std']:g}, {row['shape']}"
        print(f"  {row['contender']:38}{where:38}{row['error']:8.1e} ", end="")
        print(verdict(row["error"], row["goal"]))
    print(f"\nPeak memory of forward + backward, in multiples of x, {SHAPES[-1]}")
    for row in results["memory"]:
        print(f"  {row['contender']:76}{row['peak']:8.2f} {verdict(row['peak'], row['goal'])}")
    for module in ("numba", "keras", "flax"):
        if not installed(module):
            print(f"\nleft out: {module} is not installed")


def main() -> None:
    """Measure, print, and write the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("_build/benchmarks/scratch.json"))
    parser.add_argument("--seconds", type=float, default=20, help="about, for each shape")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "versions": {"numpy": np.__version__, "torch": torch.__version__},
        "speed": [speed(shape, options.seconds) for shape in SHAPES],
        "exactness": exactness(),
        "memory": memory(SHAPES[-1]),
    }
    show(results)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()
