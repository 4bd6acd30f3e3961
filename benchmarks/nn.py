"""How fast `bnlib.nn` is on a CPU, beside torch.nn, in eager mode and compiled.

Run it with `python benchmarks/nn.py --help`. One process, one thread. All contenders take turns,
round after round; each is called twice in a row and timed the second time. What is shown is the
median over the rounds of the ratio of two CPU times in one round. A ratio bears a busy machine
better than a time does, and still: run it on a quiet one.

All write to new arrays, as layers do. On big batches the operating system clears that memory for
both sides alike, which hides a part of the difference.
"""

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # read when NumPy and PyTorch are imported

import argparse
import importlib.util
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from scratch import PASSES, SHAPES, Calls, measure
from torch import nn

from bnlib import nn as bnn

NATIVE, OURS = "torch.nn", "bnlib.nn"
NATIVE_COMPILED, OURS_COMPILED = "torch.nn, compiled", "bnlib.nn, compiled"
GOALS = [  # who, over whom, numbers of dimensions, limit; forward + backward
    (OURS, NATIVE, (4,), 0.45),
    (OURS, NATIVE, (2,), 1.0),
    (OURS_COMPILED, NATIVE_COMPILED, (2, 4), 1.0),
]


def calls_of(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, compiled: bool) -> Calls:
    """Return the passes through a layer."""
    leaf = x.clone().requires_grad_()
    evaluating = type(layer)(x.shape[1]).eval()
    parameters = [*layer.parameters()]
    train = torch.compile(layer, fullgraph=True) if compiled else layer
    evaluate = torch.compile(evaluating, fullgraph=True) if compiled else evaluating

    def both() -> None:
        torch.autograd.grad(train(leaf), [leaf, *parameters], dy)

    def evaluation() -> None:
        with torch.no_grad():
            evaluate(x)

    return dict(zip(PASSES, [lambda: train(leaf), both, evaluation], strict=True))


def contenders(shape: tuple[int, ...], compiled: bool) -> dict[str, Calls]:
    """Return the calls of all contenders, by name."""
    torch.manual_seed(0)
    x, dy = torch.randn(shape) * 2 + 1, torch.randn(shape)
    kind = "BatchNorm1d" if len(shape) == 2 else "BatchNorm2d"
    native, ours = (getattr(module, kind)(shape[1]) for module in (nn, bnn))
    torch.testing.assert_close(ours(x), native(x), rtol=1e-4, atol=1e-4)
    calls = {NATIVE: calls_of(native, x, dy, False), OURS: calls_of(ours, x, dy, False)}
    if compiled:
        torch.compiler.reset()
        calls[NATIVE_COMPILED] = calls_of(native, x, dy, True)
        calls[OURS_COMPILED] = calls_of(ours, x, dy, True)
    return calls


def speed(shape: tuple[int, ...], seconds: float, compiled: bool) -> dict[str, object]:
    """Measure all contenders on a shape for about so many seconds."""
    calls = contenders(shape, compiled)
    measure(calls, 2)  # Numba and inductor compile
    start = time.perf_counter()
    measure(calls, 1)
    rounds = int(np.clip(seconds / (time.perf_counter() - start), 9, 500))
    times = measure(calls, rounds)

    def ratio(who: str, base: str, p: str) -> float:
        return float(np.median(times[who][p] / times[base][p]))

    rows = [
        {
            "contender": name,
            "pass": p,
            "microseconds": round(float(np.median(times[name][p])) * 1e6, 1),
            "over native": ratio(name, NATIVE, p),
        }
        for p in PASSES
        for name in times
    ]
    goals = [
        {"contender": who, "over": base, "goal": limit, "ratio": ratio(who, base, PASSES[1])}
        for who, base, dims, limit in GOALS
        if len(shape) in dims and who in times
    ]
    return {"shape": shape, "rounds": rounds, "rows": rows, "goals": goals}


def show(results: list[dict[str, object]]) -> None:
    """Print the tables."""
    for of_shape in results:
        print(f"\n{of_shape['shape']}, {of_shape['rounds']} rounds: microseconds, over native")
        rows = of_shape["rows"]
        print(f"  {'':22}" + "".join(f"{p:>24}" for p in PASSES))
        for name in dict.fromkeys(row["contender"] for row in rows):
            mine = [row for row in rows if row["contender"] == name]
            cells = [f"{row['microseconds']:16.0f}{row['over native']:8.2f}" for row in mine]
            print(f"  {name:22}" + "".join(cells))
        for goal in of_shape["goals"]:
            what = f"{goal['contender']} / {goal['over']}, {PASSES[1]}"
            met = "met" if goal["ratio"] <= goal["goal"] else "MISSED"
            print(f"  {what:60}{goal['ratio']:6.2f}{goal['goal']:6.2f}  {met}")


def main() -> None:
    """Measure, print, and write the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("_build/benchmarks/nn.json"))
    parser.add_argument("--seconds", type=float, default=20, help="about, for each shape")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled layers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [speed(shape, options.seconds, not options.eager) for shape in SHAPES]
    show(results)
    about = {
        "machine": platform.machine(),
        "load": os.getloadavg(),
        "versions": {"numpy": np.__version__, "torch": torch.__version__},
        "numba": importlib.util.find_spec("numba") is not None,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**about, "speed": results}, indent=1) + "\n", "utf-8")
    print(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()
