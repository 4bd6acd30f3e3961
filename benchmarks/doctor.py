"""How long `bnlib.doctor` takes, in forward passes of the same network on the same batch.

Run it with `python benchmarks/doctor.py --help`. One process, one thread. All diagnoses take turns
with the forward pass, round after round. What is shown is the median over the rounds of the ratio
of two CPU times in one round: it bears a busy machine better than a time does, and still: run it
on a quiet one. The forward pass is in evaluation mode, without gradients: the cheapest there is.

The network is ResNet-50, the batch smaller than in training, since a CPU computes it: of larger
batches and images, a diagnosis takes fewer passes, because its copies of the model cost the same.
"""

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # read when NumPy and PyTorch are imported

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pytorchcv.model_provider import get_model
from torch import nn

from bnlib.doctor import RULES, diagnose
from bnlib.statistics import recalibrate

FORWARD = "forward"
STATIC, BATCH, LOSS = "the static rules", "with a batch", "with a batch and a loss"
GOALS = {STATIC: 0.1, BATCH: 6.0, LOSS: 6.0}


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return a loss that reaches every parameter."""
    return model(batch).square().mean()


def network(size: int) -> nn.Module:
    """Return a ResNet-50 for images of any size, with statistics."""
    torch.manual_seed(0)
    model = get_model("resnet50")
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs takes one size alone
    recalibrate(model, [torch.randn(8, 3, size, size)], progress=False)
    return model


def calls_of(model: nn.Module, batch: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return the forward pass and the diagnoses, by name."""
    evaluating = network(batch.shape[-1]).eval()

    def forward() -> None:
        with torch.no_grad():
            evaluating(batch)

    return {
        FORWARD: forward,
        STATIC: lambda: diagnose(model),
        BATCH: lambda: diagnose(model, batch),
        LOSS: lambda: diagnose(model, batch, loss=loss),
    }


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Return CPU seconds of every call in every round, after one round that does not count."""
    times = {name: np.empty(rounds + 1) for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time_ns()
            call()
            times[name][i] = (time.process_time_ns() - start) / 1e9
    return {name: of_call[1:] for name, of_call in times.items()}


def main() -> None:
    """Measure, print, and write the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("_build/benchmarks/doctor.json"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=96, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = network(options.size)
    batch = torch.randn(options.batch, 3, options.size, options.size)
    skipped = diagnose(model, batch, loss=loss).skipped
    assert not {"few-values", "updates-per-step", "recalibration-helps"} & skipped.keys(), skipped
    times = measure(calls_of(model, batch), options.rounds)
    base = times[FORWARD]
    rows = [
        {
            "diagnosis": name,
            "forward passes": float(np.median(times[name] / base)),
            "goal": goal,
            "rules": len(RULES) - len(skipped) if name == LOSS else None,
        }
        for name, goal in GOALS.items()
    ]
    print(f"ResNet-50, batch {tuple(batch.shape)}, {options.rounds} rounds")
    print(f"  one forward pass: {np.median(base):.3f} s")
    for row in rows:
        met = "met" if row["forward passes"] <= row["goal"] else "MISSED"
        print(f"  {row['diagnosis']:28}{row['forward passes']:8.3f}{row['goal']:8.1f}  {met}")
    results = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "versions": {"numpy": np.__version__, "torch": torch.__version__},
        "batch": tuple(batch.shape),
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()
