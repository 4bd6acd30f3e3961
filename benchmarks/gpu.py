"""Time bnlib's GPU kernels beside PyTorch's own and cuDNN's: python benchmarks/gpu.py.

For each shape, type and memory format: one training forward and one backward of batch norm. Each
candidate's results are compared with float64 before it is timed. A time is the median of 50, taken
in turn with the others' so that a change of clock rate meets all of them, with the caches flushed
before each, between two CUDA events. Beside it stands the memory that the arithmetic cannot do
without (x read twice and y written; dy and x read twice and dx written), per second: what a GPU's
data sheet calls bandwidth is its limit.

Without a GPU nothing is measured and nothing is printed but that.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from bnlib.nn import kernels

EPS = 1e-5
REPEATS = 50
WARM_UP = 10
SHAPES = [
    (256, 64, 56, 56),  # early in a ResNet-50, late in one
    (256, 2048, 7, 7),
    (16, 3, 512, 512),  # few channels
    (4096, 1024),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# What y and dx are allowed to be wrong by, as a part of the largest of them.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    """A batch, the gradient of its output, and a scale and a shift."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor


class Candidate(NamedTuple):
    """A name, and the two things that are timed; `backward` follows one `forward`."""

    name: str
    forward: Callable[[], Tensor]
    backward: Callable[[], Tensor]


def ours(case: Case) -> Candidate:
    """Return the kernels of bnlib."""
    x, dy, weight, bias = case
    count = x.numel() // x.shape[1]

    def forward() -> Tensor:
        mean, var = kernels.moments(x)
        return kernels.normalize(x, mean, (var + EPS).rsqrt(), weight, bias)

    mean, var = kernels.moments(x)
    invstd = (var + EPS).rsqrt()

    def backward() -> Tensor:
        sums = kernels.reduce(dy, x, mean, invstd)
        return kernels.input_gradient(dy, x, mean, invstd, weight, *sums, count)

    return Candidate("bnlib", forward, backward)


def theirs(case: Case, name: str, cudnn: bool) -> Candidate:
    """Return PyTorch's batch norm, with cuDNN or with its own kernels."""
    x, weight, bias = (t.detach().requires_grad_() for t in (case.x, case.weight, case.bias))

    def forward() -> Tensor:
        with torch.backends.cudnn.flags(enabled=cudnn):
            return batch_norm(x, None, None, weight, bias, training=True, eps=EPS)

    y = forward()

    def backward() -> Tensor:
        return torch.autograd.grad(y, (x, weight, bias), case.dy, retain_graph=True)[0]

    return Candidate(name, forward, backward)


def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Case:
    """Return a case on the GPU, from a fixed seed."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, dy = (
        torch.randn(shape, generator=generator, device="cuda").to(dtype, memory_format=layout)
        for _ in range(2)
    )
    weight, bias = torch.rand(2, shape[1], generator=generator, device="cuda") + 0.5
    return Case(x, dy, weight, bias)


def check(candidate: Candidate, case: Case) -> None:
    """Raise AssertionError if y or dx is not what float64 gives: a wrong result has no speed."""
    x, weight, bias = (t.double() for t in (case.x, case.weight, case.bias))
    y = batch_norm(x.requires_grad_(), None, None, weight, bias, training=True, eps=EPS)
    (dx,) = torch.autograd.grad(y, x, case.dy.double())
    for actual, exact in ((candidate.forward(), y.detach()), (candidate.backward(), dx)):
        error = (actual.detach().double() - exact).abs().max() / exact.abs().max()
        assert error <= TOLERANCE[case.x.dtype], f"{candidate.name} is off by {error:.1e}"


def milliseconds(functions: list[Callable[[], Tensor]]) -> list[float]:
    """Return the median time of each function on the GPU, in ms."""
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")  # above any L2 cache
    for _ in range(WARM_UP):
        for function in functions:
            function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS):
        for function, taken in zip(functions, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end))
    return [statistics.median(taken) for taken in times]


def main() -> None:
    """Print one line per case, direction and candidate."""
    if not torch.cuda.is_available():
        print("no GPU: unmeasured")
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for shape in SHAPES:
        formats = [torch.contiguous_format]
        if len(shape) == 4:
            formats.append(torch.channels_last)
        for dtype, layout in ((d, f) for d in DTYPES for f in formats):
            case = draw(shape, dtype, layout)
            if not kernels.available(case.x):
                print(f"{shape} {dtype}: no Triton for this GPU, unmeasured")
                continue
            candidates = [ours(case), theirs(case, "cuDNN", True), theirs(case, "native", False)]
            for candidate in candidates:
                check(candidate, case)
            megabytes = case.x.numel() * case.x.element_size() / 1e6
            for direction, passes in (("forward", 3), ("backward", 5)):
                functions = [getattr(c, direction) for c in candidates]
                for c, time in zip(candidates, milliseconds(functions), strict=True):
                    print(
                        f"{shape!s:20} {str(dtype)[6:]:8} {str(layout)[6:]:17} {direction:8} "
                        f"{c.name:6} {time:8.3f} ms {passes * megabytes / time:6.0f} GB/s"
                    )


if __name__ == "__main__":
    main()
