"""Batch norm whose batch is spread over several processes, by torch.distributed.

Data-parallel training gives each process a share of the batch, and an ordinary batch norm sees no
more than its share. `SyncBatchNorm` normalizes with the statistics of the whole batch: a step gives
what one process with all the data would have got.

Forward, the processes exchange one vector: how many values a channel has, their mean, and the sum
of squares around that mean. From everybody's, each process computes the same statistics of the
whole; no squares of far-off values are subtracted from each other on the way. Backward, they add up
two sums per channel. Both are small whatever the batch is, but nobody can go on before all have
sent theirs.

So all processes of the group must make the same calls in the same order. One that stays away keeps
the others waiting until the group's timeout, after which they raise an error: 30 minutes with gloo
and 10 with nccl, unless the caller sets it, in torch.distributed.init_process_group(timeout=) or
new_group(timeout=). One that dies is noticed at once by gloo, after the timeout by nccl; `torchrun`
then ends the others.

Source: PyTorch, torch.nn.SyncBatchNorm; Chan, Golub and LeVeque (1983), "Algorithms for Computing
the Sample Variance".
"""

import math
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import batchnorm

from bnlib.nn import functional, modules

M = TypeVar("M", bound=nn.Module)


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    group: Any = None,
) -> Tensor:
    """Normalize a share of a batch with the statistics of the whole, then scale and shift it.

    input: this process's share, floats, shape (N, C) or (N, C, *spatial); N may differ from process
    to process and be 0, all else is the same everywhere. group: the processes that hold the batch;
    None for all. The others: as in `functional.batch_norm` with training=True; the running
    statistics move toward the whole batch's, by the same amount in each process, to the last bit.
    Returns y, shaped and typed as the input.

    The gradient for the input is that of the sum of all processes' losses. Those for weight and
    bias are this process's part of it: DistributedDataParallel puts the parts together, as for any
    parameter. All processes must go backward, also one whose share is empty. A second derivative
    is an error.

    Nothing moves before an error. Raises ValueError if eps is not above 0, the input has fewer than
    two dimensions, or the whole batch has one value per channel, in each process then; RuntimeError
    for vectors of another length or type, and if a process of the group has gone or does not answer
    before the group's timeout; NotImplementedError if the input does not hold floats.
    Source: PyTorch, torch.nn.SyncBatchNorm.
    """
    if input.dim() < 2:
        raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    running = {"running_mean": running_mean, "running_var": running_var}
    functional._check_vectors(input, {**running, "weight": weight, "bias": bias})
    y: Tensor
    y, mean, var, count = _SyncBatchNorm.apply(input, weight, bias, eps, group)  # type: ignore[no-untyped-call]
    unbiased = var * count / (count - 1).clamp(min=1)
    with torch.no_grad():
        for old, batch in ((running_mean, mean), (running_var, unbiased)):
            if old is not None:
                moved = old + momentum * (batch - old)
                old.copy_(torch.where(count > 0, moved, old))  # no values move nothing
    return y


class _SyncBatchNorm(torch.autograd.Function):
    """Normalization with the statistics of all processes, through which gradients flow as well."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y, and the whole batch's mean, biased variance and count."""
        mean, var, count = _moments_of_all(x, group)
        invstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, count)
        y = functional._core(x).normalize(x, mean, invstd, weight, bias)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, and this process's part of dweight and dbias."""
        x, weight, mean, invstd, count = ctx.saved_tensors
        core = functional._core(x, dy)  # the GPU kernels, or plain tensor operations
        dbias, dweight = core.reduce(dy, x, mean, invstd)
        dx = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack((dbias, dweight))  # a copy: the parameters' gradients stay local
            dist.all_reduce(sums, group=ctx.group)
            dx = core.input_gradient(dy, x, mean, invstd, weight, *sums, count)
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None


def _moments_of_all(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean and the biased variance of everybody's values, and their count.

    x: this process's share, (N, C) or (N, C, *spatial). Returns float64: two (C,) vectors and a
    number, which are 0 if nobody has a value.
    """
    C = x.shape[1]
    own_count = math.prod((x.shape[0], *x.shape[2:]))
    own = torch.zeros(1 + 2 * C, dtype=torch.float64, device=x.device)
    if own_count:
        mean, var = functional._core(x).moments(x)
        own[0], own[1 : 1 + C], own[1 + C :] = own_count, mean, var * own_count
    everybody = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, own, group=group)

    table = torch.stack(everybody)  # one row per process
    counts, means, m2s = table[:, :1], table[:, 1 : 1 + C], table[:, 1 + C :]
    count = counts.sum()
    # If the whole batch has one value, then nobody has two: others need not wait for their GPU.
    if own_count <= 1 and count.item() == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape} and "
            "no other value in the process group; a single value is its own mean, so it would "
            "always become 0: use a larger batch"
        )
    divisor = count.clamp(min=1)  # nobody has a value: 0, not 0 / 0
    mean = (counts * means).sum(0) / divisor
    m2 = (m2s + counts * (means - mean).square()).sum(0)  # Chan's formula, for many at once
    return mean, m2 / divisor, count


class SyncBatchNorm(modules._BatchNorm):
    """Normalize each channel of a batch that is spread over processes, as one process would.

    Arguments, attributes and states: those of torch.nn.SyncBatchNorm. process_group: the processes
    that hold the batch, None for all. input: this process's share, floats, shape (N, C) or
    (N, C, *spatial), on any device that the group's backend takes: also on a CPU, with gloo. The
    class is no subclass of torch.nn.SyncBatchNorm, which DistributedDataParallel refuses on a CPU.

    In training mode all processes of the group must call it equally often, and go backward equally
    often; for one that does not, set the group's timeout (see the module). The running statistics
    move toward the whole batch's, with its n / (n - 1), and are equal in all processes. In
    evaluation, without a process group, in a group of one, or in a process outside of its group,
    nothing is sent: it is an ordinary batch norm.

    Raises what `sync_batch_norm` raises. As in torch.nn, a batch of the right number of dimensions
    is counted before it is refused.
    Source: PyTorch, torch.nn.SyncBatchNorm.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        without = {} if bias else {"bias": False}  # PyTorch had no such argument before 2.12
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **without
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"expected at least 2D input (got {input.dim()}D input): (N, C) or "
                f"(N, C, *spatial), got shape {tuple(input.shape)}"
            )

    @modules.one_node
    def forward(self, input: Tensor) -> Tensor:
        """Return y; in training mode, count the batch and move the running statistics."""
        if not (self.training and _is_spread(self.process_group)):
            y: Tensor = super().forward(input)
            return y
        self._check_input_dim(input)
        mean = var = None
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            mean, var = self.running_mean, self.running_var
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the n-th batch weighs as much as each before it
                momentum = 1 / self.num_batches_tracked.double()
        group = self.process_group
        return sync_batch_norm(input, mean, var, self.weight, self.bias, momentum, self.eps, group)

    @classmethod
    def convert_sync_batchnorm(cls, module: M, process_group: Any = None) -> M:
        """Call the function `convert_sync_batchnorm`, as torch.nn.SyncBatchNorm has it."""
        return convert_sync_batchnorm(module, process_group)


def convert_sync_batchnorm(module: M, process_group: Any = None) -> M:
    """Make every batch norm in a module a `SyncBatchNorm`, in place; return the module.

    module: any module, also a batch norm itself. process_group: the processes that hold a batch,
    None for all. Each batch norm stays the object that it is and changes its class alone:
    parameters, buffers, mode and hooks stay where they are, an optimizer made before goes on
    working, and a module used twice is still one. Batch norms are torch.nn's, ours and their
    subclasses, as for torch.nn.SyncBatchNorm. Convert before wrapping in DistributedDataParallel.

    Raises TypeError if module is no module, ValueError for a lazy batch norm that has not seen its
    first batch; nothing is converted then.
    Source: PyTorch, torch.nn.SyncBatchNorm.convert_sync_batchnorm.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    found = [m for m in module.modules() if isinstance(m, batchnorm._BatchNorm)]
    for norm in found:
        if isinstance(norm, batchnorm._LazyNormBase):
            raise ValueError(
                f"expected batch norms with a number of channels, got {type(norm).__name__}; call "
                "the model once before it is converted"
            )
    for norm in found:
        norm.__class__ = SyncBatchNorm
        norm.process_group = process_group
    return module


def _is_spread(group: Any) -> bool:
    """Return whether other processes hold parts of the batch."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
