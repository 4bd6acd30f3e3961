"""Batch, instance, layer, group and RMS normalization of tensors, from plain sums and products.

Batch normalization is four steps, each a function of plain tensor operations:

    mean, var = moments(x)                                  two sums per channel
    y = normalize(x, mean, invstd, weight, bias)            one straight line per channel
    sums = reduce(dy, x, mean, invstd)                      two sums per channel
    dx = input_gradient(dy, x, mean, invstd, weight, *sums, count)

An autograd.Function ties them together. Where a device has a faster way to take a step, that way
takes its place: the Triton kernels of `bnlib.nn.kernels` on a GPU, the core of `bnlib.scratch.fast`
on a CPU. No path calls a normalization kernel of PyTorch's.

A tensor is (N, C) or (N, C, *spatial). Vectors are (C,). Elementwise arithmetic is done in the
input's own type, at least float32; means and variances are float64, because a float32 mean near
1e4 is already off by up to 5e-4.

Source: Ioffe and Szegedy (2015), "Batch Normalization", Algorithms 1 and 2; PyTorch,
torch.nn.functional.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib import import_module
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from bnlib.nn import cpu

P = ParamSpec("P")
Gradients = tuple[Tensor | None, ...]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel.

    x: floats, shape (N, C) or (N, C, *spatial). Returns two vectors (C,), float64 (float32 on a
    device that has no float64); an empty batch gives zeros.

    The variance is taken of what is left after a first mean is subtracted: squares of x itself
    would lose it as soon as the mean is some thousand times the spread. That first mean is a
    constant to autograd, since the result does not depend on it.
    Source: Ioffe and Szegedy (2015), Algorithm 1, lines 1 and 2.
    """
    x, axes, wide = _at_least_float32(x), _batch_axes(x), statistics_dtype(x)
    count = max(_count(x), 1)
    shift = x.detach().sum(axes) / count
    rest = x - _per_channel(shift, x)
    rest_mean = rest.sum(axes).to(wide) / count
    var = rest.square().sum(axes).to(wide) / count - rest_mean.square()
    return shift.to(wide) + rest_mean, var.clamp_min(0)  # a constant channel may round below 0


def pooled(
    mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of two sets of values together.

    mean, var: of one set; share: how much of all values it holds, 0 to 1. other_mean, other_var: of
    the rest. All tensors broadcast. Source: Chan, Golub and LeVeque (1983).
    """
    step = mean - other_mean
    pooled_var = share * var + (1 - share) * other_var + share * (1 - share) * step.square()
    return other_mean + share * step, pooled_var


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return (x - mean) * invstd * weight + bias, channel by channel.

    x: floats, shape (N, C) or (N, C, *spatial). mean, invstd: (C,), invstd = 1 / sqrt(var + eps).
    weight, bias: gamma and beta, (C,), or None for 1 and 0. Returns y, shaped and typed as x,
    contiguous, or with the channels last if x has them last.
    Source: Ioffe and Szegedy (2015), Algorithm 1, lines 3 and 4.
    """
    y = _centered(x, mean) * _scale(x, invstd, weight)
    if bias is not None:
        y = y + _per_channel(bias, x).to(y.dtype)
    return _laid_out_as(y.to(x.dtype), x)


def reduce(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of dy and of dy * z_hat: the gradients for bias and weight.

    dy: the gradient for y, shaped as x; the others: as in `normalize`. Returns two vectors (C,).
    Source: Ioffe and Szegedy (2015), section 3.
    """
    dy, axes = _at_least_float32(dy), _batch_axes(x)
    sum_dy_centered = (dy * _centered(x, mean)).sum(axes)
    return dy.sum(axes).to(invstd.dtype), sum_dy_centered.to(invstd.dtype) * invstd


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
    """Return dx: dy without its average and without the part along z_hat, times weight * invstd.

    dy, x, mean, invstd, weight: as in `reduce` and `normalize`. sum_dy, sum_dy_z_hat: from
    `reduce`, over all `count` values of a channel. Returns dx, shaped, typed and laid out as x.
    Source: Ioffe and Szegedy (2015), section 3, simplified as in chapter 3.
    """
    along = _per_channel(sum_dy_z_hat * invstd / count, x)
    average = _per_channel(sum_dy / count, x)
    rest = _at_least_float32(dy) - average.to(_float_type(x))
    rest = rest - _centered(x, mean) * along.to(rest.dtype)
    dx = rest * _scale(x, invstd, weight)
    return _laid_out_as(dx.to(x.dtype), x)


def overridable(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let arguments that are no plain tensors take over, by `__torch_function__`, as in PyTorch.

    Source: PyTorch, "Extending PyTorch", torch.overrides.
    """

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        arguments = (*args, *kwargs.values())
        if has_torch_function(arguments):
            result: Tensor = handle_torch_function(checked, arguments, *args, **kwargs)
            return result
        return function(*args, **kwargs)

    return checked


@overridable
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each channel, then scale and shift it.

    input: floats, shape (N, C) or (N, C, *spatial). running_mean, running_var, weight, bias: (C,)
    or None; all of the input's type, or all float32 if the input is float16 or bfloat16.
    training: True normalizes with the batch's own mean and biased variance, and moves the running
    statistics, if given, toward its mean and unbiased variance: running += momentum * (batch -
    running). False normalizes with the running statistics. momentum: 0 to 1. eps: added to the
    variance, above 0 in training, else at least 0. Returns y, shaped and typed as the input.

    An empty batch moves nothing, and nothing moves before an error.

    Raises ValueError if eps is too small, or in training if there is one value per channel, or one
    running statistic without the other; RuntimeError for a statistic that evaluation lacks or that
    requires a gradient, and for vectors of another length or type; NotImplementedError if the
    input does not hold floats; TypeError for what is no tensor.
    Source: PyTorch, torch.nn.functional.batch_norm.
    """
    given = {"running_mean": running_mean, "running_var": running_var}
    _check_batch(input, given, training, momentum, eps)
    if not input.numel():
        return _nothing(input, weight, bias)
    _check_vectors(input, {**given, "weight": weight, "bias": bias})
    if training:
        running = running_mean, running_var, momentum
        return _with_batch_statistics(input, weight, bias, *running, eps)
    assert running_mean is not None
    assert running_var is not None
    return _with_given_statistics(input, weight, bias, running_mean, running_var, eps)


@overridable
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each channel of each example by itself: a batch norm of N * C channels.

    input: floats, shape (N, C, *spatial). use_input_stats: as training in `batch_norm`; the running
    statistics move toward the average over the examples. The others: as in `batch_norm`.

    Raises what `batch_norm` raises, and ValueError if use_input_stats is True and an example has
    one value per channel.
    Source: Ulyanov, Vedaldi and Lempitsky (2016), "Instance Normalization"; PyTorch,
    torch.nn.functional.instance_norm.
    """
    _check_tensors(input=input, weight=weight, bias=bias)
    if use_input_stats and math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"Expected more than 1 spatial element when training, got input size {input.shape}; "
            "a single value is its own mean, so it would always become 0"
        )
    given = {"running_mean": running_mean, "running_var": running_var}
    _check_batch(input, given, use_input_stats, momentum)
    if input.numel():
        _check_vectors(input, {"weight": weight, "bias": bias})
        _check_places(input, given)
    if not use_input_stats:
        assert running_mean is not None
        assert running_var is not None
        return _with_given_statistics(input, weight, bias, running_mean, running_var, eps)
    N, C, *spatial = input.shape
    weight, bias = (None if v is None else v.reshape(-1).repeat(N) for v in (weight, bias))
    rows = input.reshape(1, N * C, *spatial)
    y = _with_batch_statistics(rows, weight, bias, running_mean, running_var, momentum, eps)
    return y.reshape(input.shape)


@overridable
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize groups of channels of each example by themselves; scale and shift each channel.

    input: floats, shape (N, C, *spatial), C divisible by num_groups. weight, bias: (C,) or None;
    of the input's type, or float32 if the input is float16 or bfloat16. eps: added to the
    variance. Returns y, shaped and typed as the input.

    Raises ValueError for one value per group, RuntimeError for shapes and types that do not fit,
    NotImplementedError if the input does not hold floats.
    Source: Wu and He (2018), "Group Normalization"; PyTorch, torch.nn.functional.group_norm.
    """
    _check_tensors(input=input, weight=weight, bias=bias)
    _check_groups(input, num_groups, {"weight": weight, "bias": bias})
    input, weight, bias = _as_autocast_wants(input, weight, bias)
    x = _at_least_float32(input)
    groups, per_group = len(input) * num_groups, math.prod(input.shape[1:]) // num_groups
    z_hat = _normalize_rows(x, groups, per_group, eps)
    if weight is not None:
        z_hat = z_hat * _per_channel(weight, x)
    y = z_hat if bias is None else z_hat + _per_channel(bias, x)
    return _laid_out_as(y.to(input.dtype), input)


@overridable
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each example by itself, over the last axes; scale and shift each place.

    input: floats, shape (*, *normalized_shape). weight, bias: of shape normalized_shape, or None;
    of the input's type, or float32 if the input is float16 or bfloat16. eps: added to the
    variance. Returns y, shaped and typed as the input.

    Raises RuntimeError for shapes and types that do not fit, TypeError if normalized_shape is no
    sequence, NotImplementedError if the input does not hold floats.
    Source: Ba, Kiros and Hinton (2016), "Layer Normalization"; PyTorch,
    torch.nn.functional.layer_norm.
    """
    _check_tensors(input=input, weight=weight, bias=bias)
    shape = _check_last_axes(input, normalized_shape, {"weight": weight, "bias": bias})
    _check_types(input, {"weight": weight, "bias": bias})
    _check_floats(input, "layer_norm")
    input, weight, bias = _as_autocast_wants(input, weight, bias)
    x, values = _at_least_float32(input), math.prod(shape)
    y = _normalize_rows(x, math.prod(input.shape[: -len(shape)]), values, eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(input.dtype)


@overridable
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Divide each example by its root mean square over the last axes; scale each place.

    input: floats, shape (*, *normalized_shape). weight: of shape normalized_shape, or None. eps:
    added to the mean square; None for the smallest step of the type that is computed with. Returns
    y, shaped and typed as the input. The gradients are autograd's: there is no mean to go through.

    Raises RuntimeError for shapes that do not fit (ValueError for too few axes), TypeError if
    normalized_shape is no sequence, NotImplementedError if the input does not hold floats.
    Source: Zhang and Sennrich (2019), "Root Mean Square Layer Normalization"; PyTorch,
    torch.nn.functional.rms_norm.
    """
    _check_tensors(input=input, weight=weight)
    if isinstance(normalized_shape, Sequence) and len(normalized_shape) > input.dim():
        raise ValueError(
            f"Input tensor must have at least {len(normalized_shape)} dimensions, "
            f"but got {input.dim()}"
        )
    shape = _check_last_axes(input, normalized_shape, {"weight": weight})
    _check_floats(input, "rms_norm")
    x = _at_least_float32(input)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    mean_square = x.square().mean(tuple(range(-len(shape), 0)), keepdim=True)
    y = x * (mean_square + eps).rsqrt()
    return (y if weight is None else y * weight).to(input.dtype)


def _with_batch_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> Tensor:
    """Normalize with the batch's statistics, and move the running ones toward them."""
    running = running_mean, running_var, momentum
    if not _is_left_to_autograd():
        y: Tensor = _BatchStatistics.apply(x, weight, bias, *running, eps)  # type: ignore[no-untyped-call]
        return y
    y, mean, var = _in_one_expression(x, weight, bias, eps)
    inside = _is_transformed() and not torch.compiler.is_compiling()
    move = _Move.apply if inside else _move
    with torch.no_grad():
        move(*running, mean, var, _count(x))
    return y


def _in_one_expression(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the forward steps in a form that others derive and fuse well; return y, mean, var.

    As in `moments` and `normalize`, but the mean stays in its two parts, in x's own type. Autograd
    reaches the mean through a zero on the bias: so it takes one sum of dy, which the gradient for
    the bias needs anyway.
    """
    values, axes, count = _at_least_float32(x), _batch_axes(x), max(_count(x), 1)
    shift = values.detach().sum(axes) / count
    centered = values - _per_channel(shift, x)
    rest_mean = centered.sum(axes) / count
    var = (centered.square().sum(axes) / count - rest_mean.square()).clamp_min(0)
    scale, fixed = (var + eps).rsqrt(), rest_mean.detach()
    scale = scale if weight is None else scale * weight.reshape(-1)
    offset = (fixed - rest_mean) * scale
    offset = offset if bias is None else offset + bias.reshape(-1)
    centered = values - _per_channel(shift, x) - _per_channel(fixed, x)
    y = centered * _per_channel(scale, x) + _per_channel(offset, x)
    mean = shift.to(statistics_dtype(x)) + fixed
    return _laid_out_as(y.to(x.dtype), x), mean, var.detach()


def _with_given_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    if _is_left_to_autograd():
        return normalize(x, mean, _inverse_std(var, eps), weight, bias)
    y: Tensor = _GivenStatistics.apply(x, weight, bias, mean, var, eps)  # type: ignore[no-untyped-call]
    return y


def _nothing(x: Tensor, *vectors: Tensor | None) -> Tensor:
    """Return an empty x as y; the gradients for the vectors are sums of nothing, so zeros."""
    y = x.clone()
    for vector in vectors:
        y = y if vector is None else y + vector.sum().to(x.dtype)
    return y


def _normalize_rows(x: Tensor, rows: int, values: int, eps: float) -> Tensor:
    """Normalize each row of x, seen as (rows, values): a batch norm with rows for channels."""
    z_hat = _with_batch_statistics(
        x.reshape(1, rows, values), None, None, None, None, momentum=0.0, eps=eps
    )
    return z_hat.reshape(x.shape)


class _BatchStatistics(torch.autograd.Function):
    """Normalization with the batch's own statistics, through which gradients flow as well."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        eps: float,
    ) -> Tensor:
        """Take the forward steps, and move the running statistics."""
        count = _count(x)
        if count > 1 and cpu.available(x, weight, bias, eps=eps):
            y, mean, var = cpu.batch_norm(
                x, weight, bias, eps, cpu.empty_like(x, _memory_format(x))
            )
        else:
            core = _core(x)
            mean, var = core.moments(x)
            y = core.normalize(x, mean, _inverse_std(var, eps), weight, bias)
        _move(running_mean, running_var, momentum, mean, var, count)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.bias, ctx.count, ctx.eps = _kind(bias), count, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        """Take the backward steps."""
        x, weight, mean, var = ctx.saved_tensors
        again = _is_derived_again()
        if not again and ctx.count > 1 and cpu.available(dy, x, eps=ctx.eps):
            given = mean, var, weight, ctx.eps
            dx, *sums = cpu.batch_norm_backward(dy, x, *given, cpu.empty_like(x, _memory_format(x)))
        else:
            core = PLAIN if again else _core(x, dy)
            mean, var = moments(x) if again else (mean, var)
            invstd = _inverse_std(var, ctx.eps)
            sums = core.reduce(dy, x, mean, invstd)
            dx = core.input_gradient(dy, x, mean, invstd, weight, *sums, ctx.count)
        return dx, *_vector_gradients(sums, weight, ctx.bias), None, None, None, None


class _GivenStatistics(torch.autograd.Function):
    """Normalization with given statistics, which do not move with x: one path for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
    ) -> Tensor:
        """Normalize; the statistics stay where they are."""
        if cpu.available(x, weight, bias, mean, var, eps=eps):
            y = cpu.inference(x, mean, var, weight, bias, eps, cpu.empty_like(x, _memory_format(x)))
        else:
            y = _core(x).normalize(x, mean, _inverse_std(var, eps), weight, bias)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.bias, ctx.eps = _kind(bias), eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        """Send dy straight back: dx = dy * invstd * weight."""
        x, weight, mean, var = ctx.saved_tensors
        again = _is_derived_again()
        if not again and cpu.available(dy, x, mean, eps=ctx.eps):
            given = mean, var, weight, ctx.eps
            dx, *sums = cpu.inference_backward(dy, x, *given, cpu.empty_like(x, _memory_format(x)))
        else:
            invstd = _inverse_std(var, ctx.eps)
            sums = (PLAIN if again else _core(x, dy)).reduce(dy, x, mean, invstd)
            dx = _at_least_float32(dy) * _scale(x, invstd, weight)
            dx = _laid_out_as(dx.to(x.dtype), x)
        return dx, *_vector_gradients(sums, weight, ctx.bias), None, None, None


def _vector_gradients(
    sums: Sequence[Tensor], weight: Tensor | None, bias: tuple[Any, ...] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients for weight and bias: the two sums, typed and shaped as they are."""
    dbias, dweight = sums
    pairs = (_kind(weight), dweight), (bias, dbias)
    first, second = (None if kind is None else sum.to(kind[0]).view(kind[1]) for kind, sum in pairs)
    return first, second


def _kind(vector: Tensor | None) -> tuple[torch.dtype, torch.Size] | None:
    return None if vector is None else (vector.dtype, vector.shape)


def _move(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
) -> None:
    """Move the running statistics toward the batch's, whose variance goes in unbiased.

    mean, var: (C,); or (N * C,), one for each channel of each example, whose averages are taken.
    """
    if running_mean is not None and running_var is not None and mean.numel() and count:
        unbiased = var * count / (count - 1)
        if mean.numel() != running_mean.numel():
            C = running_mean.numel()
            mean, unbiased = mean.reshape(-1, C).mean(0), unbiased.reshape(-1, C).mean(0)
        running_mean.mul_(1 - momentum).add_(momentum * mean)
        running_var.mul_(1 - momentum).add_(momentum * unbiased)


class _Move(torch.autograd.Function):
    """`_move` inside torch.func, where only a Function may write to what lies outside."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        running_mean: Tensor | None, running_var: Tensor | None, *batch: Any
    ) -> Tensor | None:
        """Refuse to write a batch of statistics to one; else move."""
        running = [v for v in (running_mean, running_var) if v is not None]
        is_batched = torch._C._functorch.is_batchedtensor
        if is_batched(batch[1]) and not all(map(is_batched, running)):
            raise RuntimeError(
                "Batch norm got a batched tensor as input while the running_mean or running_var, "
                "which will be updated in place, were not batched; give each its own, or "
                "normalize without running statistics: track_running_stats=False"
            )
        _move(running_mean, running_var, *batch)
        return torch.zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: nothing flows back."""


def _is_derived_again() -> bool:
    """Return whether a backward pass is itself differentiated or transformed.

    Then the statistics, which were saved as numbers, are needed as functions of x.
    """
    return torch.is_grad_enabled() or _is_left_to_autograd()


def _is_left_to_autograd() -> bool:
    """Return whether the plain operations are wanted themselves.

    Whoever writes them down (torch.compile, export, jit.trace) or transforms them (torch.func,
    forward-mode differentiation) derives them on their own.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return True
    return forward_ad._current_level >= 0 or _is_transformed()


def _is_transformed() -> bool:
    """Return whether this runs inside torch.func: vmap, grad, jvp and their like."""
    return torch._C._are_functorch_transforms_active()


PLAIN = sys.modules[__name__]


def _core(x: Tensor, *others: Tensor) -> Any:
    """Return who takes the four steps for x: this module, or its replacement on x's device."""
    kernels = _kernels() if x.is_cuda and all(map(torch._C._has_storage, (x, *others))) else None
    return kernels if kernels is not None and kernels.available(x) else PLAIN


@cache
def _kernels() -> Any:
    """Import the GPU kernels, once; return None where Triton is not installed."""
    try:
        return import_module("bnlib.nn.kernels")
    except ImportError:
        return None


def _inverse_std(var: Tensor, eps: float) -> Tensor:
    return (_at_least_float32(var) + eps).rsqrt()


def _centered(x: Tensor, mean: Tensor) -> Tensor:
    """Return x - mean; a mean of a finer type goes off in two parts, lest it be rounded."""
    x = _at_least_float32(x)
    high = mean.to(x.dtype)
    centered = x - _per_channel(high, x)
    if mean.dtype.itemsize > x.dtype.itemsize:
        centered = centered - _per_channel((mean - high).to(x.dtype), x)
    return centered


def _scale(x: Tensor, invstd: Tensor, weight: Tensor | None) -> Tensor:
    """Return invstd * weight, to be multiplied with x's shape and type."""
    scale = invstd if weight is None else invstd * weight.reshape(-1)
    return _per_channel(scale, x).to(_float_type(x))


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """Shape a (C,) vector so that it broadcasts along the channel axis of x."""
    return vector.reshape(1, -1, *(1,) * (x.dim() - 2))


def _batch_axes(x: Tensor) -> tuple[int, ...]:
    """Return every axis but the channel's."""
    return (0, *range(2, x.dim()))


def _count(x: Tensor) -> int:
    """Return how many values of a channel there are."""
    return math.prod((x.shape[0], *x.shape[2:]))


def _float_type(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in HALVES else x.dtype


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(_float_type(x))


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the type of means and variances: float64, or float32 where a device has no other."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _memory_format(x: Tensor) -> torch.memory_format:
    """Return how PyTorch lays out what is computed from x: channels last, or contiguous."""
    if x.dim() in (4, 5) and x.stride(1) == 1:
        strides = [x.stride(0), *x.stride()[2:]]
        if strides == sorted(strides, reverse=True):
            return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def _laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """Lay y out in memory as PyTorch does with what is computed from x."""
    if _is_transformed():
        return y  # vmap knows one layout only
    return y.contiguous(memory_format=_memory_format(x))


def _as_autocast_wants(x: Tensor, *vectors: Tensor | None) -> tuple[Any, ...]:
    """Return the arguments as float32 where CUDA's autocast computes such a norm in float32.

    Source: PyTorch, "CUDA ops that can autocast to float32"; on a CPU there is no such rule.
    """
    if not (x.is_cuda and x.dtype in HALVES and torch.is_autocast_enabled("cuda")):
        return x, *vectors
    return x.float(), *(None if v is None else v.float() for v in vectors)


def _check_tensors(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor) and (value is not None or name == "input"):
            raise TypeError(
                f"argument '{name}' must be Tensor, not {type(value).__name__}; torch.as_tensor "
                "makes one of an array or a list"
            )


def _check_batch(
    x: Tensor,
    statistics: dict[str, Tensor | None],
    training: bool,
    momentum: float | Tensor | None,
    eps: float = 1e-5,
) -> None:
    _check_tensors(input=x, **statistics)
    if training and _count(x) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}; a "
            "single value is its own mean, so it would always become 0: use a larger batch"
        )
    if training and eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if momentum is None:
        raise TypeError(
            "argument 'momentum' must be float, not NoneType; the average over all batches is "
            "momentum 1/n for the n-th batch"
        )
    missing = [name for name, vector in statistics.items() if vector is None]
    if training and len(missing) == 1:
        raise ValueError(
            f"running_mean and running_var must either both be None or neither be None, and "
            f"{missing[0]} is"
        )
    if missing and not training:
        raise RuntimeError(
            f"{missing[0]} must be defined in evaluation mode: expected running_mean and "
            "running_var to be defined; to do without, normalize with the batch's: training=True"
        )
    for name, vector in statistics.items():
        if vector is not None and vector.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"batch_norm is not differentiable with respect to argument '{name}'. This input "
                f"cannot have requires_grad True; pass {name}.detach()"
            )
    if x.dim() < 2:
        raise RuntimeError(
            f"expected 2 or more dimensions, (N, C) or (N, C, *spatial), got shape {tuple(x.shape)}"
        )


def _check_vectors(x: Tensor, vectors: dict[str, Tensor | None]) -> None:
    _check_tensors(**vectors)
    _check_places(x, vectors)
    _check_floats(x, "batch_norm")
    _check_types(x, vectors)


def _check_places(x: Tensor, vectors: dict[str, Tensor | None]) -> None:
    C = x.shape[1]
    for name, vector in vectors.items():
        if vector is not None and vector.numel() != C:
            raise RuntimeError(
                f"{name} should contain {C} elements not {vector.numel()}: one for each channel "
                f"of an input of shape {tuple(x.shape)}"
            )
        if vector is not None and vector.device != x.device:
            raise RuntimeError(
                f"Tensor on device {vector.device} is not on the expected device {x.device}: "
                f"{name} must lie where the input does; move the module: .to(input.device)"
            )
        if vector is not None and vector.dim() != 1 and name.startswith("running"):
            raise RuntimeError(f"{name} should have 1 dimension, got shape {tuple(vector.shape)}")


def _check_floats(x: Tensor, name: str) -> None:
    if x.dtype not in FLOATS or x.layout != torch.strided:
        kind = str(x.dtype).removeprefix("torch.")
        raise NotImplementedError(
            f"\"{name}\" not implemented for '{kind}' of layout {x.layout}; it takes dense tensors "
            "of floats, for example input.to_dense().float()"
        )


def _check_types(x: Tensor, vectors: dict[str, Tensor | None]) -> None:
    types = {vector.dtype for vector in vectors.values() if vector is not None}
    if types <= {x.dtype} or (x.dtype in HALVES and types == {torch.float32}):
        return
    got = ", ".join(f"{name} {v.dtype}" for name, v in vectors.items() if v is not None)
    halves = " or all torch.float32" if x.dtype in HALVES else ""
    raise RuntimeError(
        f"mixed dtype: for an input of {x.dtype} expected parameters and statistics to have "
        f"scalar type {x.dtype}{halves}, got {got}; convert the input or the module: .to(dtype)"
    )


def _check_groups(x: Tensor, num_groups: int, vectors: dict[str, Tensor | None]) -> None:
    if x.dim() < 2:
        raise RuntimeError(
            f"Expected at least 2 dimensions for input tensor but received {x.dim()}"
        )
    N, C, *spatial = x.shape
    if N * C // num_groups * math.prod(spatial) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {[*x.shape]} "
            f"in {num_groups} groups"
        )
    if num_groups < 0:
        raise RuntimeError(f"Expected num groups to be greater than 0, got {num_groups}")
    if C % num_groups:
        raise RuntimeError(
            "Expected number of channels in input to be divisible by num_groups, but got input of "
            f"shape {[*x.shape]} and num_groups={num_groups}"
        )
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (C,):
            raise RuntimeError(
                f"Expected {name} to be a vector of size equal to the number of channels in input, "
                f"but got {name} of shape {[*vector.shape]} and input of shape {[*x.shape]}"
            )
    _check_types(x, vectors)
    _check_floats(x, "group_norm")


def _check_last_axes(
    x: Tensor, normalized_shape: Sequence[int], arrays: dict[str, Tensor | None]
) -> tuple[int, ...]:
    if not isinstance(normalized_shape, Sequence):
        raise TypeError(
            "argument 'normalized_shape' must be tuple of ints, not "
            f"{type(normalized_shape).__name__}"
        )
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least "
            "one element, but got normalized_shape = []"
        )
    for name, array in arrays.items():
        if array is not None and array.shape != shape:
            raise RuntimeError(
                f"Expected {name} to be of same shape as normalized_shape, but got {name} of "
                f"shape {[*array.shape]} and normalized_shape = {[*shape]}"
            )
    if x.shape[-len(shape) :] != shape:
        wanted = ", ".join(map(str, ("*", *shape)))
        raise RuntimeError(
            f"Given normalized_shape={[*shape]}, expected input with shape [{wanted}], but got "
            f"input of size {[*x.shape]}"
        )
    return shape
