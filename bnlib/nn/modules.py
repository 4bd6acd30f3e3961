"""Batch normalization and its relatives as modules: torch.nn's in all but the arithmetic.

Each class is a subclass of the one in torch.nn that it stands in for. Signatures, attributes,
states and initialisation are inherited, and whoever asks `isinstance(module, nn.BatchNorm2d)`, as
initialisers and `torch.optim.swa_utils.update_bn` do, finds what it looks for. Their own is
`forward`, with the arithmetic of `bnlib.nn.functional`.

Source: PyTorch, torch.nn.modules: batchnorm, instancenorm, normalization.
"""

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import batchnorm, instancenorm

from bnlib.nn import functional as F

M = TypeVar("M", bound=nn.Module)


def _check_dim(input: Tensor, shapes: dict[int, str], others: str) -> None:
    if input.dim() not in shapes:
        dims = " or ".join(f"{dim}D" for dim in shapes)
        raise ValueError(
            f"expected {dims} input (got {input.dim()}D input): {' or '.join(shapes.values())}, "
            f"got shape {tuple(input.shape)}; {others} takes other shapes"
        )


def one_node(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep a module whole in a graph of torch.fx, as torch.nn's own modules are."""

    @wraps(forward)
    def checked(self: Any, input: Tensor, *others: Any, **named: Any) -> Any:
        if isinstance(input, Tensor) or not isinstance(input, Proxy):
            return forward(self, input, *others, **named)
        tracer: Any = input.tracer
        path = tracer.path_of_module(self)
        return tracer.create_proxy("call_module", path, (input, *others), named)

    return checked


class _DropIn(nn.Module):
    """What stands in for a class of torch.nn that has the same name."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Let torch.jit.script, which cannot compile ours, compile torch.nn's with this state."""
        return _change_classes(copy.copy(self), {type(self): _theirs(type(self))})


class _BatchNorm(_DropIn, batchnorm._BatchNorm):
    """What the batch norms share: a counter, two modes and running statistics."""

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        """Return y; in training mode, count the batch and move the running statistics.

        As in torch.nn, a batch of the right number of dimensions is counted before it is refused.
        """
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return self._normalize(input, self.weight, self.bias)

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Do what `forward` does, with this weight and bias for the module's own."""
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the n-th batch weighs as much as each before it
                momentum = 1 / self.num_batches_tracked.to(F.statistics_dtype(input))
        mean, var = self.running_mean, self.running_var
        use_batch = self.training or (mean is None and var is None)
        if self.training and not self.track_running_stats:
            mean = var = None
        return F.batch_norm(input, mean, var, weight, bias, use_batch, momentum, self.eps)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Normalize each channel of a batch of vectors or sequences, as torch.nn.BatchNorm1d does.

    Arguments, attributes and states: those of torch.nn.BatchNorm1d. input: floats, shape (N, C) or
    (N, C, L). Training normalizes with the batch's own mean and biased variance, and moves the
    running statistics toward its mean and unbiased variance; evaluation normalizes with the running
    statistics. y is shaped and typed as the input.

    Raises ValueError for another number of dimensions; the others: see `functional.batch_norm`.
    Source: Ioffe and Szegedy (2015), Algorithms 1 and 2; PyTorch, torch.nn.BatchNorm1d.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        _check_dim(input, {2: "(N, C)", 3: "(N, C, L)"}, "BatchNorm2d or BatchNorm3d")


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Normalize each channel of a batch of images, as torch.nn.BatchNorm2d does.

    input: floats, shape (N, C, H, W). The others: as in `BatchNorm1d`.
    Source: Ioffe and Szegedy (2015), section 3.2; PyTorch, torch.nn.BatchNorm2d.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        _check_dim(input, {4: "(N, C, H, W)"}, "BatchNorm1d or BatchNorm3d")


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Normalize each channel of a batch of volumes, as torch.nn.BatchNorm3d does.

    input: floats, shape (N, C, D, H, W). The others: as in `BatchNorm1d`.
    Source: Ioffe and Szegedy (2015), section 3.2; PyTorch, torch.nn.BatchNorm3d.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        _check_dim(input, {5: "(N, C, D, H, W)"}, "BatchNorm1d or BatchNorm2d")


class LazyBatchNorm1d(_BatchNorm, nn.LazyBatchNorm1d):
    """A `BatchNorm1d` that takes num_features from its first input, and then becomes one.

    Source: PyTorch, torch.nn.LazyBatchNorm1d.
    """

    cls_to_become = BatchNorm1d
    _check_input_dim = BatchNorm1d._check_input_dim


class LazyBatchNorm2d(_BatchNorm, nn.LazyBatchNorm2d):
    """A `BatchNorm2d` that takes num_features from its first input, and then becomes one.

    Source: PyTorch, torch.nn.LazyBatchNorm2d.
    """

    cls_to_become = BatchNorm2d
    _check_input_dim = BatchNorm2d._check_input_dim


class LazyBatchNorm3d(_BatchNorm, nn.LazyBatchNorm3d):
    """A `BatchNorm3d` that takes num_features from its first input, and then becomes one.

    Source: PyTorch, torch.nn.LazyBatchNorm3d.
    """

    cls_to_become = BatchNorm3d
    _check_input_dim = BatchNorm3d._check_input_dim


class _InstanceNorm(_DropIn, instancenorm._InstanceNorm):
    """What the instance norms share; torch.nn's forward checks the shape."""

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        """Return y; in training mode, move the running statistics if there are any."""
        y: Tensor = super().forward(input)
        return y

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        use_input_stats = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        running = self.running_mean, self.running_var
        affine = self.weight, self.bias
        return F.instance_norm(input, *running, *affine, use_input_stats, momentum, self.eps)


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """Normalize each channel of each sequence by itself, as torch.nn.InstanceNorm1d does.

    Arguments, attributes, states and errors: those of torch.nn.InstanceNorm1d; by default there is
    neither a weight nor a running statistic. input: floats, shape (N, C, L) or (C, L).
    Source: Ulyanov, Vedaldi and Lempitsky (2016); PyTorch, torch.nn.InstanceNorm1d.
    """


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """Normalize each channel of each image by itself, as torch.nn.InstanceNorm2d does.

    input: floats, shape (N, C, H, W) or (C, H, W). The others: as in `InstanceNorm1d`.
    Source: Ulyanov, Vedaldi and Lempitsky (2016); PyTorch, torch.nn.InstanceNorm2d.
    """


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """Normalize each channel of each volume by itself, as torch.nn.InstanceNorm3d does.

    input: floats, shape (N, C, D, H, W) or (C, D, H, W). The others: as in `InstanceNorm1d`.
    Source: Ulyanov, Vedaldi and Lempitsky (2016); PyTorch, torch.nn.InstanceNorm3d.
    """


class LazyInstanceNorm1d(_InstanceNorm, nn.LazyInstanceNorm1d):
    """An `InstanceNorm1d` that takes num_features from its first input, and then becomes one.

    Source: PyTorch, torch.nn.LazyInstanceNorm1d.
    """

    cls_to_become = InstanceNorm1d


class LazyInstanceNorm2d(_InstanceNorm, nn.LazyInstanceNorm2d):
    """An `InstanceNorm2d` that takes num_features from its first input, and then becomes one.

    Source: PyTorch, torch.nn.LazyInstanceNorm2d.
    """

    cls_to_become = InstanceNorm2d


class LazyInstanceNorm3d(_InstanceNorm, nn.LazyInstanceNorm3d):
    """An `InstanceNorm3d` that takes num_features from its first input, and then becomes one.

    Source: PyTorch, torch.nn.LazyInstanceNorm3d.
    """

    cls_to_become = InstanceNorm3d


class LayerNorm(_DropIn, nn.LayerNorm):
    """Normalize each example by itself over its last axes, as torch.nn.LayerNorm does.

    Arguments, attributes, states and errors: those of torch.nn.LayerNorm. input: floats, shape
    (*, *normalized_shape).
    Source: Ba, Kiros and Hinton (2016); PyTorch, torch.nn.LayerNorm.
    """

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        """Return y; there are no modes."""
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(_DropIn, nn.GroupNorm):
    """Normalize groups of channels of each example by themselves, as torch.nn.GroupNorm does.

    Arguments, attributes, states and errors: those of torch.nn.GroupNorm. input: floats, shape
    (N, num_channels, *spatial).
    Source: Wu and He (2018); PyTorch, torch.nn.GroupNorm.
    """

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        """Return y; there are no modes."""
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class RMSNorm(_DropIn, nn.RMSNorm):
    """Divide each example by its root mean square over its last axes, as torch.nn.RMSNorm does.

    Arguments, attributes, states and errors: those of torch.nn.RMSNorm. x: floats, shape
    (*, *normalized_shape).
    Source: Zhang and Sennrich (2019); PyTorch, torch.nn.RMSNorm.
    """

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        """Return y; there are no modes."""
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
LAZY_BATCH_NORMS = (LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d)


def convert(model: M) -> M:
    """Give the batch norms of torch.nn in a model our arithmetic, in place; return the model.

    model: any module, also a batch norm itself. Each batch norm stays the object that it is and
    changes its class alone: parameters, buffers, mode, flags and hooks stay where they are, an
    optimizer made before goes on working, and a module used twice is still one. `revert` undoes it.

    Only the classes of torch.nn themselves change: SyncBatchNorm, frozen and quantized layers and
    everybody's subclasses are left alone, as is what torch.jit has compiled or torch.fx has written
    out. A forward that was put on the object itself stays too.

    Raises TypeError if model is no module.
    """
    return _change_classes(model, {_theirs(ours): ours for ours in BATCH_NORMS + LAZY_BATCH_NORMS})


def revert(model: M) -> M:
    """Give our batch norms in a model torch.nn's arithmetic, in place; return the model.

    The inverse of `convert`, for tools that ask for the very class `torch.nn.BatchNorm2d`, such as
    quantization. Raises TypeError if model is no module.
    """
    return _change_classes(model, {ours: _theirs(ours) for ours in BATCH_NORMS + LAZY_BATCH_NORMS})


def _theirs(ours: type[nn.Module]) -> type[nn.Module]:
    """Return the class of torch.nn that one of ours stands in for: it has the same name."""
    theirs: type[nn.Module] = getattr(nn, ours.__name__)
    return theirs


def _change_classes(model: M, classes: dict[type[nn.Module], type[nn.Module]]) -> M:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model
