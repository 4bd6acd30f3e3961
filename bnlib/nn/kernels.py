"""The steps of batch norm as GPU kernels, in Triton.

Four functions: `moments` and `normalize` forward, `reduce` and `input_gradient` backward. Each
reads its input once, from top to bottom; a GPU waits for memory, not for arithmetic, so the number
of readings is what a step costs.

A kernel is written for one program, which handles one tile: up to ROWS values of each of up to
CHANNELS channels. The GPU runs thousands of programs at once. Programs cannot wait for each other,
so a statistic takes two stages: each program writes what it knows about its chunk of rows, and a
second launch puts the chunks together. Few channels still fill the GPU, since each is cut into
many chunks.

Tensors are read as a contiguous (N, C, S): N examples, C channels, S places. A batch of images in
channels_last order is (N * H * W, C, 1), one row per pixel, and so needs no copy.

Half-precision inputs are computed in float32, float64 in float64. Means and variances go in and
out as float64, a few numbers per channel: a float32 mean near 1e4 is already off by up to 5e-4.
Triton comes with PyTorch's CUDA
builds; where there is none, this module still imports and `available` returns False. With
TRITON_INTERPRET=1, set before Triton is imported, the kernels run on a CPU, in NumPy: slowly, but
one can print from them.

Source: Triton's documentation; Chan, Golub and LeVeque (1983), "Algorithms for Computing the
Sample Variance", for putting chunks together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnlib.nn import functional

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch's builds for CPUs come without it
    triton = None

TILE = 4096  # values of a program: enough to keep memory busy, few enough for the registers
PARTS = 64  # chunks that one program of the merge reads at a time

_ACCUMULATOR = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def available(x: Tensor) -> bool:
    """Return whether the kernels can take x.

    True for a float16, bfloat16, float32 or float64 tensor on a CUDA device of compute capability
    7.0 or more if Triton is installed; for one on any device if Triton was imported with
    TRITON_INTERPRET=1.
    """
    if triton is None or x.dtype not in _ACCUMULATOR:
        return False
    ours, theirs = (not isinstance(kernel, triton.JITFunction) for kernel in (_tile, tl.sum))
    if ours != theirs:  # the variable was changed after Triton had been imported
        return False
    return ours or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (7, 0))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel.

    x: floats, shape (N, C) or (N, C, *spatial). Returns two float64 tensors of shape (C,). An empty
    batch gives NaN. A NaN stays in its channel.

    The variance is that of x - first, where first is the channel's first value: subtracting it
    moves the mean, not the variance, and what is left is as small as the spread. So a mean of
    10,000 standard deviations costs no digits.

    Raises ValueError if `available(x)` is False or x has fewer than two dimensions.
    Source: Ioffe and Szegedy (2015), Algorithm 1, lines 1 and 2.
    """
    x, shape = _as_ncs(x)
    C = shape[1]
    mean, var = (x.new_full((C,), torch.nan, dtype=torch.float64) for _ in range(2))
    if x.numel():
        tiling = _tiling(x.dtype, *shape)
        chunks = torch.empty(2, tiling["P"], C, dtype=_ACCUMULATOR[x.dtype], device=x.device)
        _launch(_moments_of_chunks, x, chunks[0], chunks[1], **tiling)
        _launch_merge(x, chunks[0], chunks[1], mean, var, **tiling)
    return mean, var


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return (x - mean) * invstd * weight + bias, channel by channel.

    x: floats, shape (N, C) or (N, C, *spatial). mean, invstd: C numbers, invstd is
    1 / sqrt(var + eps). weight, bias: C numbers, or None for 1 and 0. All of any float type.
    Returns y, typed and shaped as x, in its memory format.

    Raises ValueError if `available(x)` is False, x has fewer than two dimensions or a vector has
    another length or device.
    Source: Ioffe and Szegedy (2015), Algorithm 1, lines 3 and 4.
    """
    x, shape = _as_ncs(x)
    vectors = _vectors(x, mean=mean, invstd=invstd, weight=weight, bias=bias)
    y = torch.empty_like(x)
    if x.numel():
        _launch(_normalize, x, *vectors, y, **_tiling(x.dtype, *shape))
    return y


def reduce(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's sum of dy and sum of dy * z_hat.

    dy: the gradient for y, shaped as x. x, mean, invstd: as in `normalize`. Returns two float64
    tensors of shape (C,): the gradients for bias and weight, and what `input_gradient` needs. An
    empty batch gives zeros.

    Raises ValueError if `available(x)` is False, x has fewer than two dimensions, dy is not of x's
    shape and device or a vector has another length or device.
    Source: Ioffe and Szegedy (2015), section 3, the last two derivatives.
    """
    x, shape = _as_ncs(x)
    dy = _gradient_like(dy, x)
    vectors = _vectors(x, mean=mean, invstd=invstd)
    tiling = _tiling(x.dtype, *shape)
    chunks = torch.empty(2, tiling["P"], shape[1], dtype=_ACCUMULATOR[x.dtype], device=x.device)
    if x.numel():
        _launch(_sums_of_chunks, dy, x, *vectors, chunks[0], chunks[1], **tiling)
    sums = chunks.sum(1, dtype=torch.float64)  # few numbers: PyTorch's kernel will do
    return sums[0], sums[1]


def input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_z_hat: Tensor,
    count: int | Tensor,
) -> Tensor:
    """Return dx = weight * invstd * (dy - mean(dy) - z_hat * mean(dy * z_hat)).

    dy, x, mean, invstd, weight: as in `reduce` and `normalize`. sum_dy, sum_dy_z_hat: from
    `reduce`. count: how many values of a channel they were taken over; with statistics shared
    between devices, those of all devices, which a tensor says without a wait for the GPU. Returns
    dx, typed and shaped as x, in its memory format.

    Raises ValueError if `available(x)` is False, x has fewer than two dimensions, dy is not of x's
    shape and device or a vector has another length or device.
    Source: Ioffe and Szegedy (2015), section 3, simplified as in chapter 3.
    """
    x, shape = _as_ncs(x)
    dy = _gradient_like(dy, x)
    if isinstance(count, Tensor):
        sum_dy, sum_dy_z_hat, count = sum_dy / count, sum_dy_z_hat / count, 1
    vectors = _vectors(
        x, mean=mean, invstd=invstd, weight=weight, sum_dy=sum_dy, sum_dy_z_hat=sum_dy_z_hat
    )
    dx = torch.empty_like(x)
    if x.numel():
        _launch(_input_gradient, dy, x, *vectors, count, dx, **_tiling(x.dtype, *shape))
    return dx


def _kernel(function: Any) -> Any:
    """Hand a function to Triton, if there is one: it is compiled for the GPU when first launched.

    Arguments in capitals that are annotated as constexpr are constants to the compiler; a tensor
    arrives as a pointer to its first value.
    """
    return function if triton is None else triton.jit(function)


@_kernel
def _tile(M, C, S, ROWS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr):
    """Return which chunk of rows and which channels are this program's, and where they lie.

    A row is one example at one place: M = N * S of them in each channel.
    """
    program = tl.program_id(0).to(INDEX)
    tiles = (C + CHANNELS - 1) // CHANNELS
    chunk = program // tiles
    c = program % tiles * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    row = chunk * ROWS + tl.arange(0, ROWS)[:, None]
    offsets = (row // S * C + c) * S + row % S
    inside = (row < M) & (c < C)  # the last chunk and the last channels may stick out
    return chunk, c, offsets, inside


@_kernel
def _rows_of(chunk, M, ROWS: tl.constexpr):
    """Return how many rows a chunk has: the last may be shorter."""
    return tl.minimum(M - chunk * ROWS, ROWS)


@_kernel
def _z_hat(x, mean_ptr, invstd_ptr, c, C, DTYPE: tl.constexpr):
    """Return (x - mean) * invstd; a finer mean goes off in two parts, lest it be rounded."""
    mean = tl.load(mean_ptr + c, mask=c < C, other=0)
    invstd = tl.load(invstd_ptr + c, mask=c < C, other=0).to(DTYPE)
    high = mean.to(DTYPE)
    low = (mean - high).to(DTYPE)
    return ((x - high) - low) * invstd


@_kernel
def _moments_of_chunks(
    x_ptr,
    means_ptr,
    m2s_ptr,
    M,
    C,
    S,
    P,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write the mean of x - first over a chunk, and the sum of squares around that mean."""
    chunk, c, offsets, inside = _tile(M, C, S, ROWS, CHANNELS, INDEX)
    first = tl.load(x_ptr + c * S, mask=c < C, other=0).to(DTYPE)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(DTYPE)

    shifted = tl.where(inside, x - first, 0)
    count = _rows_of(chunk, M, ROWS).to(DTYPE)
    mean = tl.sum(shifted, axis=0)[None, :] / count
    centered = tl.where(inside, shifted - mean, 0)
    m2 = tl.sum(centered * centered, axis=0)[None, :]

    tl.store(means_ptr + chunk * C + c, mean, mask=c < C)
    tl.store(m2s_ptr + chunk * C + c, m2, mask=c < C)


@_kernel
def _merge_chunks(
    x_ptr,
    means_ptr,
    m2s_ptr,
    mean_ptr,
    var_ptr,
    M,
    C,
    S,
    P,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Put the P chunks of a channel together: its mean, and its variance around that mean.

    Around the common mean a chunk's sum of squares is m2 + count * (its mean - the mean)^2.
    """
    c = tl.program_id(0).to(INDEX) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    part = tl.arange(0, PARTS)[:, None]

    total = tl.zeros((PARTS, CHANNELS), DTYPE)
    for start in range(0, P, PARTS):
        chunk = (start + part).to(INDEX)
        inside = (chunk < P) & (c < C)
        count = _rows_of(chunk, M, ROWS).to(DTYPE)
        mean = tl.load(means_ptr + chunk * C + c, mask=inside, other=0)
        total += tl.where(inside, count * mean, 0)
    shifted_mean = tl.sum(total, axis=0)[None, :] / M

    total = tl.zeros((PARTS, CHANNELS), DTYPE)
    for start in range(0, P, PARTS):
        chunk = (start + part).to(INDEX)
        inside = (chunk < P) & (c < C)
        count = _rows_of(chunk, M, ROWS).to(DTYPE)
        mean = tl.load(means_ptr + chunk * C + c, mask=inside, other=0)
        m2 = tl.load(m2s_ptr + chunk * C + c, mask=inside, other=0)
        between = mean - shifted_mean
        total += tl.where(inside, m2 + count * between * between, 0)
    var = tl.sum(total, axis=0)[None, :] / M

    first = tl.load(x_ptr + c * S, mask=c < C, other=0).to(tl.float64)
    tl.store(mean_ptr + c, first + shifted_mean, mask=c < C)
    tl.store(var_ptr + c, var, mask=c < C)


@_kernel
def _normalize(
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    M,
    C,
    S,
    P,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write y for one tile."""
    _, c, offsets, inside = _tile(M, C, S, ROWS, CHANNELS, INDEX)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(DTYPE)

    y = _z_hat(x, mean_ptr, invstd_ptr, c, C, DTYPE)
    if weight_ptr is not None:  # settled when the kernel is compiled
        y *= tl.load(weight_ptr + c, mask=c < C, other=0).to(DTYPE)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < C, other=0).to(DTYPE)
    tl.store(y_ptr + offsets, y, mask=inside)


@_kernel
def _sums_of_chunks(
    dy_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    sum_dy_ptr,
    sum_dy_z_hat_ptr,
    M,
    C,
    S,
    P,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write the sums of dy and of dy * z_hat over a chunk."""
    chunk, c, offsets, inside = _tile(M, C, S, ROWS, CHANNELS, INDEX)
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0).to(DTYPE)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(DTYPE)

    z_hat = _z_hat(x, mean_ptr, invstd_ptr, c, C, DTYPE)
    sum_dy = tl.sum(dy, axis=0)[None, :]  # outside the tile dy is 0
    sum_dy_z_hat = tl.sum(dy * z_hat, axis=0)[None, :]
    tl.store(sum_dy_ptr + chunk * C + c, sum_dy, mask=c < C)
    tl.store(sum_dy_z_hat_ptr + chunk * C + c, sum_dy_z_hat, mask=c < C)


@_kernel
def _input_gradient(
    dy_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    sum_dy_ptr,
    sum_dy_z_hat_ptr,
    count,
    dx_ptr,
    M,
    C,
    S,
    P,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write dx for one tile."""
    _, c, offsets, inside = _tile(M, C, S, ROWS, CHANNELS, INDEX)
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0).to(DTYPE)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(DTYPE)
    mean_dy = tl.load(sum_dy_ptr + c, mask=c < C, other=0).to(DTYPE) / count
    mean_dy_z_hat = tl.load(sum_dy_z_hat_ptr + c, mask=c < C, other=0).to(DTYPE) / count

    z_hat = _z_hat(x, mean_ptr, invstd_ptr, c, C, DTYPE)
    scale = tl.load(invstd_ptr + c, mask=c < C, other=0).to(DTYPE)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=c < C, other=0).to(DTYPE)
    dx = scale * (dy - mean_dy - z_hat * mean_dy_z_hat)
    tl.store(dx_ptr + offsets, dx, mask=inside)


def _as_ncs(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Return x and its (N, C, S); a copy if there are gaps in its memory, or another order."""
    if x.ndim < 2:
        raise ValueError(
            f"expected 2 or more dimensions, (N, C) or (N, C, *spatial), got {tuple(x.shape)}"
        )
    if not available(x):
        raise ValueError(
            f"expected a tensor that the GPU kernels can take, got {x.dtype} on {x.device}; ask "
            "bnlib.nn.kernels.available first, and use bnlib.nn.functional otherwise"
        )
    if not x.is_contiguous():
        x = x.contiguous(memory_format=functional._memory_format(x))
    N, C, S = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    return x, (N, C, S) if x.is_contiguous() else (N * S, C, 1)


def _gradient_like(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy in the memory order of x, so that one offset serves both."""
    if dy.shape != x.shape or dy.device != x.device:
        raise ValueError(
            f"expected dy as x, of shape {tuple(x.shape)} on {x.device}, "
            f"got {tuple(dy.shape)} on {dy.device}"
        )
    return dy if dy.stride() == x.stride() else torch.empty_like(x, dtype=dy.dtype).copy_(dy)


def _vectors(x: Tensor, **vectors: Tensor | None) -> list[Tensor | None]:
    """Return the vectors, each contiguous; the kernels take them in any float type."""
    for name, vector in vectors.items():
        if vector is not None and (vector.numel() != x.shape[1] or vector.device != x.device):
            raise ValueError(
                f"expected {name} of shape ({x.shape[1]},) on {x.device}, one number per channel "
                f"of x, got {tuple(vector.shape)} on {vector.device}"
            )
    return [v if v is None else v.contiguous() for v in vectors.values()]


def _tiling(dtype: torch.dtype, N: int, C: int, S: int) -> dict[str, Any]:
    """Return how an (N, C, S) tensor is cut and computed with: the kernels' last arguments.

    Neighbours in memory are neighbours in a tile: along the channels if S is 1, else along a row
    of places. Offsets take 64 bits only where 32 might overflow, since they are slower.
    """
    M = N * S
    channels = min(_power_of_2(C), 64) if S == 1 else 1
    rows = min(_power_of_2(M), TILE // channels)
    index = tl.int32 if (M + rows) * (C + channels) < 2**31 else tl.int64
    sizes = {"M": M, "C": C, "S": S, "P": -(-M // rows), "ROWS": rows, "CHANNELS": channels}
    return {**sizes, "INDEX": index, "DTYPE": getattr(tl, str(_ACCUMULATOR[dtype])[6:])}


def _power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n: Triton's tiles have such sizes."""
    return 1 << (n - 1).bit_length()


def _launch(kernel: Any, x: Tensor, *arguments: Any, **tiling: Any) -> None:
    """Run one program per tile, on x's device."""
    programs = tiling["P"] * -(-tiling["C"] // tiling["CHANNELS"])
    with torch.cuda.device_of(x):
        kernel[(programs,)](x, *arguments, **tiling)


def _launch_merge(x: Tensor, *arguments: Any, **tiling: Any) -> None:
    """Run one program per group of channels, over all of their chunks."""
    with torch.cuda.device_of(x):
        _merge_chunks[(-(-tiling["C"] // tiling["CHANNELS"]),)](
            x, *arguments, PARTS=PARTS, **tiling
        )
