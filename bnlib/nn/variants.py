"""Relatives of batch norm: each is `functional.batch_norm` with one of its arguments changed.

Some take the statistics elsewhere: from a part of the batch (ghost), from the running averages
(renorm, frozen), from a batch that stays the same (virtual). Others take weight and bias, gamma and
beta, elsewhere: from a table with a row for each class (conditional), from another image (AdaIN).
Layer, instance, group and RMS norm, which torch.nn has, are in `bnlib.nn.modules`.

Tensors are (N, C) or (N, C, *spatial). What is refused changes nothing; unlike torch.nn's batch
norms, these do not even count it.
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter, init
from torch.nn.modules import batchnorm

from bnlib.nn import functional as F
from bnlib.nn import modules
from bnlib.nn.modules import one_node

M = TypeVar("M", bound=nn.Module)


class _Variant(modules._BatchNorm):
    """What the relatives that are batch norms themselves share: they check before they begin."""

    def _uses_batch(self) -> bool:
        return self.training or self.running_mean is None

    def _check(self, input: Tensor) -> None:
        """Raise what a batch norm would raise after it has counted the batch."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        running = {"running_mean": self.running_mean, "running_var": self.running_var}
        F._check_batch(input, running, self._uses_batch(), 0.0, self.eps)
        if input.numel():
            F._check_vectors(input, {**running, **self._affine()})

    def _affine(self) -> dict[str, Tensor | None]:
        return {"weight": self.weight, "bias": self.bias}

    def extra_repr(self) -> str:
        """Return what stands between the brackets of the module's repr."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return text

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}; use torch.jit.trace or "
            "torch.export"
        )


class _GhostBatchNorm(_Variant):
    """A batch norm of parts of the batch: each is normalized, and counted, on its own."""

    def __init__(self, num_features: int, virtual_batch_size: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        if virtual_batch_size < 1:
            raise ValueError(
                f"expected a virtual_batch_size of 1 or more, got {virtual_batch_size}"
            )
        self.virtual_batch_size = virtual_batch_size

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        """Return y; in training mode, the running statistics move once for each ghost."""
        self._check(input)
        if not self._uses_batch():
            return self._normalize(input, self.weight, self.bias)
        ghosts = torch.split(input, self.virtual_batch_size)
        if F._count(ghosts[-1]) == 1:
            raise ValueError(
                f"Expected more than 1 value per channel in each ghost, got input size "
                f"{input.shape} and virtual_batch_size {self.virtual_batch_size}, which leaves the "
                "last ghost one value, its own mean; use another size, or a loader with drop_last"
            )
        return torch.cat([self._normalize(ghost, self.weight, self.bias) for ghost in ghosts])

    def extra_repr(self) -> str:
        """Return what stands between the brackets of the module's repr."""
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """Normalize each part of a batch with its own statistics, as if it were a small batch.

    num_features: C. virtual_batch_size: how many examples a ghost has; the last one has what is
    left. options, by keyword: those of torch.nn.BatchNorm1d; states too are its own. input: floats,
    shape (N, C) or (N, C, L). Training does what an ordinary batch norm would do with one ghost
    after the other: num_batches_tracked counts ghosts, and a batch of k moves the running
    statistics by 1 - (1 - momentum)**k. Evaluation is an ordinary batch norm's.

    Raises ValueError for a virtual_batch_size below 1 and, in training, if a ghost would have one
    value per channel; the others: see `functional.batch_norm`.
    Source: Hoffer, Hubara and Soudry (2017), "Train longer, generalize better", Algorithm 1.
    """

    _check_input_dim = modules.BatchNorm1d._check_input_dim


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """Normalize each part of a batch of images with its own statistics.

    input: floats, shape (N, C, H, W). The others: as in `GhostBatchNorm1d`.
    Source: Hoffer, Hubara and Soudry (2017), Algorithm 1.
    """

    _check_input_dim = modules.BatchNorm2d._check_input_dim


class _BatchRenorm(_Variant):
    """A batch norm that trains with the numbers that it will use: z_hat * r + d for z_hat."""

    def __init__(
        self, num_features: int, r_max: float = 3.0, d_max: float = 5.0, **options: Any
    ) -> None:
        super().__init__(num_features, **options)
        if not (r_max >= 1 and d_max >= 0):
            raise ValueError(f"expected r_max >= 1 and d_max >= 0, got {r_max} and {d_max}")
        if not self.track_running_stats:
            raise ValueError(
                "batch renorm corrects toward running statistics: it has to track them"
            )
        self.r_max, self.d_max = r_max, d_max

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        """Return y; in training mode, count the batch and move the running statistics."""
        self._check(input)
        if not self.training:
            return self._normalize(input, self.weight, self.bias)
        weight, bias = self._corrections(input)  # r and d, which gamma scales and beta shifts
        if self.weight is not None:
            weight, bias = self.weight * weight, self.weight * bias
        return self._normalize(input, weight, bias if self.bias is None else bias + self.bias)

    @torch.no_grad()
    def _corrections(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return r and d, (C,), from this batch and the running statistics before it."""
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, var = F.moments(input)
        running_std = (self.running_var.to(var) + self.eps).sqrt()
        r = (var + self.eps).sqrt() / running_std
        d = (mean - self.running_mean) / running_std
        r, d = r.clamp(1 / self.r_max, self.r_max), d.clamp(-self.d_max, self.d_max)
        return r.to(self.running_mean), d.to(self.running_mean)

    def extra_repr(self) -> str:
        """Return what stands between the brackets of the module's repr."""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


class BatchRenorm1d(_BatchRenorm, nn.BatchNorm1d):
    """Normalize with the batch's statistics, corrected toward the running ones.

    y = (z_hat * r + d) * weight + bias, where z_hat is batch norm's, r = std / running_std and
    d = (mean - running_mean) / running_std: in full, y is what evaluation would give. r is clipped
    to [1 / r_max, r_max] and d to [-d_max, d_max], and both are constants to the gradient. With
    r_max = 1 and d_max = 0 it is batch norm; a training begins there, and raises the two attributes
    later (Ioffe: to 3 and 5).

    num_features: C. options, by keyword: those of torch.nn.BatchNorm1d; states too are its own.
    input: floats, shape (N, C) or (N, C, L). The running statistics move as in batch norm; so it is
    the variance that is averaged, where Ioffe averages the standard deviation. Evaluation is an
    ordinary batch norm's. Keras has it as BatchNormalization(renorm=True), except in the first
    releases of version 3.

    Raises ValueError for r_max below 1, d_max below 0, or track_running_stats=False; the others:
    see `functional.batch_norm`.
    Source: Ioffe (2017), "Batch Renormalization", Algorithm 1.
    """

    _check_input_dim = modules.BatchNorm1d._check_input_dim


class BatchRenorm2d(_BatchRenorm, nn.BatchNorm2d):
    """Normalize images with the batch's statistics, corrected toward the running ones.

    input: floats, shape (N, C, H, W). The others: as in `BatchRenorm1d`.
    Source: Ioffe (2017), Algorithm 1.
    """

    _check_input_dim = modules.BatchNorm2d._check_input_dim


class _ConditionalBatchNorm(_Variant):
    """A batch norm whose weight and bias are tables: a row for each class."""

    weight_std = 0.0  # until __init__ knows better
    bias_std = 0.0

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        weight_std: float = 0.0,
        bias_std: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, True, track_running_stats, device, dtype)
        if num_classes < 1:
            raise ValueError(f"expected 1 class or more, got num_classes {num_classes}")
        self.num_classes, self.weight_std, self.bias_std = num_classes, weight_std, bias_std
        self.weight = Parameter(self.weight.new_empty(num_classes, num_features))
        self.bias = Parameter(self.bias.new_empty(num_classes, num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: weights from N(1, weight_std**2), biases from N(0, bias_std**2)."""
        self.reset_running_stats()  # type: ignore[no-untyped-call]
        init.normal_(self.weight, 1, self.weight_std)
        init.normal_(self.bias, 0, self.bias_std)

    @one_node
    def forward(self, input: Tensor, label: Tensor) -> Tensor:
        """Return y; in training mode, count the batch and move the running statistics."""
        self._check(input)
        self._check_label(input, label)
        shape = (*input.shape[:2], *(1,) * (input.dim() - 2))
        weight = nn.functional.embedding(label, self.weight).reshape(shape)
        bias = nn.functional.embedding(label, self.bias).reshape(shape)
        z_hat = F._at_least_float32(self._normalize(input, None, None))
        return (z_hat * weight + bias).to(input.dtype)

    def _affine(self) -> dict[str, Tensor | None]:
        return {"weight": self.weight[0], "bias": self.bias[0]}

    def _check_label(self, input: Tensor, label: Tensor) -> None:
        if not isinstance(label, Tensor) or label.dtype not in (torch.int32, torch.int64):
            kind = label.dtype if isinstance(label, Tensor) else type(label).__name__
            raise TypeError(
                f"expected label as a tensor of int64 or int32, got {kind}; use .long()"
            )
        if label.shape != input.shape[:1]:
            raise ValueError(
                f"expected label of shape ({len(input)},), a class for each example of an input "
                f"of shape {tuple(input.shape)}, got {tuple(label.shape)}"
            )
        if F._is_left_to_autograd() or not label.numel():
            return  # whoever writes the operations down has no numbers to look at
        low, high = (int(end) for end in label.aminmax())
        if low < 0 or high >= self.num_classes:
            wrong = low if low < 0 else high
            raise IndexError(
                f"expected classes from 0 to {self.num_classes - 1}, got {wrong} in label"
            )

    def extra_repr(self) -> str:
        """Return what stands between the brackets of the module's repr."""
        return f"{super().extra_repr()}, num_classes={self.num_classes}"


class ConditionalBatchNorm1d(_ConditionalBatchNorm, nn.BatchNorm1d):
    """Normalize all classes alike, then scale and shift each with its own gamma and beta.

    num_features: C. num_classes: rows of weight and bias, which are (num_classes, C). weight_std,
    bias_std: they start as N(1, weight_std**2) and N(0, bias_std**2); by default every class starts
    with 1 and 0, where a generator has no class to begin with. The others: as in
    torch.nn.BatchNorm1d. Called with input: floats, shape (N, C) or (N, C, L), and label: a class
    for each example, int64 or int32, shape (N,).

    With one class, or where all rows are equal, it is an ordinary batch norm. The statistics are
    those of the whole batch, whatever its classes. On a GPU the look at label waits for it.

    Raises TypeError for a label of another type, ValueError for one of another shape, IndexError
    for a class out of range; the others: see `functional.batch_norm`.
    Source: de Vries et al. (2017), "Modulating early visual processing by language"; the table,
    behind instance norm: Dumoulin, Shlens and Kudlur (2017), "A Learned Representation for Artistic
    Style".
    """

    _check_input_dim = modules.BatchNorm1d._check_input_dim


class ConditionalBatchNorm2d(_ConditionalBatchNorm, nn.BatchNorm2d):
    """Normalize images of all classes alike, then scale and shift each class with its own.

    input: floats, shape (N, C, H, W). The others: as in `ConditionalBatchNorm1d`.
    Source: de Vries et al. (2017); Dumoulin, Shlens and Kudlur (2017).
    """

    _check_input_dim = modules.BatchNorm2d._check_input_dim


class _VirtualBatchNorm(_Variant):
    """A batch norm of one example and a reference batch, for each example."""

    def __init__(self, num_features: int, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(num_features, eps, track_running_stats=False, **options)

    @one_node
    def forward(self, input: Tensor, reference: Tensor | None = None) -> Tensor:
        """Return y; without a reference the input is the reference itself."""
        self._check(input) if reference is None else self._check_reference(input, reference)
        if reference is None or not input.numel():
            return self._normalize(input, self.weight, self.bias)
        N, C, *spatial = input.shape
        rows = input.reshape(1, N * C, *spatial)  # a channel for each channel of each example
        mean, var = (v.reshape(N, C) for v in F.moments(rows))
        mean, var = F.pooled(mean, var, *F.moments(reference), 1 / (len(reference) + 1))
        invstd = F._inverse_std(var, self.eps)
        weight, bias = (None if v is None else v.repeat(N) for v in (self.weight, self.bias))
        y = F.normalize(rows, mean.reshape(-1), invstd.reshape(-1), weight, bias)
        return y.reshape(input.shape)

    def _check_reference(self, input: Tensor, reference: Tensor) -> None:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        F._check_tensors(input=reference)
        if not len(reference) or reference.shape[1:] != input.shape[1:]:
            wanted = ", ".join(map(str, ("R", *input.shape[1:])))
            raise ValueError(
                f"expected a reference of shape ({wanted}), R of 1 or more, beside an input of "
                f"shape {tuple(input.shape)}, got {tuple(reference.shape)}"
            )
        _check_kind("a reference", reference, "the input", input)
        F._check_batch(input, {}, training=False, momentum=0.0, eps=self.eps)
        F._check_vectors(input, self._affine())


class VirtualBatchNorm1d(_VirtualBatchNorm, nn.BatchNorm1d):
    """Normalize each example with the statistics of a reference batch and of itself.

    Row n of y is the last row of the batch norm of `torch.cat([reference, input[n : n + 1]])`: no
    other example of the input has a say. Called with the reference alone, it is that batch norm,
    which the layer above needs: y, y_reference = layer(x, reference), layer(reference).

    num_features: C. options, by keyword: affine, bias, device, dtype, as in torch.nn.BatchNorm1d.
    input: floats, shape (N, C) or (N, C, L). reference: R examples of the same shape, type and
    device; gradients flow through its statistics too. There are no modes and no running statistics.

    Raises ValueError for a reference of another shape, RuntimeError for one of another type or
    device; the others: see `functional.batch_norm`.
    Source: Salimans et al. (2016), "Improved Techniques for Training GANs", section 3.5.
    """

    _check_input_dim = modules.BatchNorm1d._check_input_dim


class VirtualBatchNorm2d(_VirtualBatchNorm, nn.BatchNorm2d):
    """Normalize each image with the statistics of a reference batch and of itself.

    input: floats, shape (N, C, H, W). The others: as in `VirtualBatchNorm1d`.
    Source: Salimans et al. (2016), section 3.5.
    """

    _check_input_dim = modules.BatchNorm2d._check_input_dim


class FrozenBatchNorm(nn.Module):
    """A batch norm whose four vectors are all constants: one straight line per channel.

    num_features: C. eps: 1e-5, as that of torch.nn's batch norms; layers frozen with another eps
    need theirs. input: floats, shape (N, C) or (N, C, *spatial). weight, bias, running_mean and
    running_var are buffers: no optimizer sees them and no mode moves them. The state of a batch
    norm loads into it, and it is in training and in evaluation what that is in evaluation. It is
    no subclass of torch.nn's, so that tools which reset or recalibrate batch norms pass it by.

    Raises RuntimeError for vectors of another length or type, NotImplementedError if the input does
    not hold floats.
    Source: torchvision.ops.FrozenBatchNorm2d; detectron2.layers.FrozenBatchNorm2d.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        kind = {"device": device, "dtype": dtype}
        self.register_buffer("weight", torch.ones(num_features, **kind))
        self.register_buffer("bias", torch.zeros(num_features, **kind))
        self.register_buffer("running_mean", torch.zeros(num_features, **kind))
        self.register_buffer("running_var", torch.ones(num_features, **kind))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *others)

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        """Return y; there are no modes."""
        return F.batch_norm(input, **dict(self.named_buffers()), training=False, eps=self.eps)

    def extra_repr(self) -> str:
        """Return what stands between the brackets of the module's repr."""
        return f"{self.num_features}, eps={self.eps}"


class FrozenBatchNorm2d(FrozenBatchNorm):
    """A `FrozenBatchNorm` of images: input of shape (N, C, H, W), else ValueError.

    Source: torchvision.ops.FrozenBatchNorm2d.
    """

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        """Return y; there are no modes."""
        modules._check_dim(input, {4: "(N, C, H, W)"}, "FrozenBatchNorm")
        y: Tensor = super().forward(input)
        return y


def convert_frozen_batchnorm(module: M) -> M | FrozenBatchNorm:
    """Put a frozen batch norm in the place of each batch norm of a module; return the module.

    module: any module; a batch norm itself is returned frozen. A BatchNorm2d becomes a
    `FrozenBatchNorm2d`, others a `FrozenBatchNorm`, with copies of their vectors, which no longer
    are parameters: make the optimizer after this. A batch norm used twice is still one. Hooks on
    batch norms are left behind.

    Raises TypeError if module is no module, ValueError for a batch norm without running statistics,
    a conditional one, or a lazy one before its first batch; nothing is converted then.
    Source: detectron2, FrozenBatchNorm2d.convert_frozen_batchnorm.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    named = [(n, m) for n, m in module.named_modules() if isinstance(m, batchnorm._BatchNorm)]
    frozen = {norm: _freeze(norm, name) for name, norm in named}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in frozen:
                parent._modules[name] = frozen[child]
    return frozen[module] if isinstance(module, batchnorm._BatchNorm) else module


def _freeze(norm: batchnorm._BatchNorm, name: str) -> FrozenBatchNorm:
    mean = norm.running_mean
    table = isinstance(norm, _ConditionalBatchNorm)
    if mean is None or table or isinstance(norm, batchnorm._LazyNormBase):
        lack = "one gamma and beta" if table else "running statistics"
        raise ValueError(f"expected batch norms with {lack}, got {name or 'module'}: {norm}")
    kind = FrozenBatchNorm2d if isinstance(norm, nn.BatchNorm2d) else FrozenBatchNorm
    frozen = kind(len(mean), norm.eps, device=mean.device, dtype=mean.dtype)
    given = {k: v for k, v in norm.state_dict().items() if k in frozen.state_dict()}
    frozen.load_state_dict(given, strict=False)  # affine=False has neither weight nor bias
    return frozen.train(norm.training)


class AdaIN(nn.Module):
    """Give each channel of an image the mean and standard deviation of another image's channel.

    eps: added to both variances. content: floats, shape (N, C, *spatial). style: floats, the same
    N, C, type and device, with any spatial shape: a row for each row of content. Returns content
    instance-normalized, times the style's standard deviation, plus its mean: an instance norm whose
    gamma and beta come from another image. Shaped and typed as content; gradients flow to both.
    There is nothing to learn and there are no modes.

    Raises ValueError for a shape without spatial axes or with a single place, and for a style with
    another N or C; RuntimeError for one of another type or device; NotImplementedError if content
    does not hold floats.
    Source: Huang and Belongie (2017), "Arbitrary Style Transfer in Real-time with Adaptive Instance
    Normalization", equation 8.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    @one_node
    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """Return y; there are no modes."""
        _check_pair(content, style)
        N, C, *spatial = content.shape
        mean, var = F.moments(style.reshape(1, N * C, *style.shape[2:]))
        kind = F._float_type(content)
        affine = (var + self.eps).sqrt().to(kind), mean.to(kind)
        rows = content.reshape(1, N * C, *spatial)
        y: Tensor = F.batch_norm(rows, None, None, *affine, training=True, eps=self.eps)
        return y.reshape(content.shape)

    def extra_repr(self) -> str:
        """Return what stands between the brackets of the module's repr."""
        return f"eps={self.eps}"


def _check_pair(content: Tensor, style: Tensor) -> None:
    F._check_tensors(input=content)
    F._check_tensors(input=style)
    for name, image in (("content", content), ("style", style)):
        if image.dim() < 3 or math.prod(image.shape[2:]) == 1:
            raise ValueError(
                f"expected {name} of shape (N, C, *spatial) with more than 1 place, got "
                f"{tuple(image.shape)}; a single value is its own mean and has no spread"
            )
    if style.shape[:2] != content.shape[:2]:
        raise ValueError(
            f"expected style with N, C = {tuple(content.shape[:2])} as content has, got shape "
            f"{tuple(style.shape)}"
        )
    _check_kind("style", style, "content", content)
    F._check_floats(content, "batch_norm")


def _check_kind(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if (x.dtype, x.device) != (other.dtype, other.device):
        raise RuntimeError(
            f"expected {name} as {other_name}, {other.dtype} on {other.device}, got {x.dtype} on "
            f"{x.device}"
        )
