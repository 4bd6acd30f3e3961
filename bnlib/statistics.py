"""The running statistics of a model's batch norms: recompute them, freeze them, convert momenta.

    recalibrate(model, loader)            the statistics of the network as it is now
    with evaluating(model): ...           evaluation, and every module's own mode afterwards
    with frozen_statistics(model): ...    training, with the batch norms in evaluation mode

All of it takes the batch norms of torch.nn, those of `bnlib.nn` and every subclass of either.

Source: Ioffe and Szegedy (2015), Algorithm 2; Wu and Johnson (2021), "Rethinking 'Batch' in
BatchNorm", section 3; PyTorch, torch.optim.swa_utils.update_bn.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlib.nn.functional import moments, pooled
from bnlib.scratch.training import progress as progress_bar

M = TypeVar("M", bound=nn.Module)
Estimator = Literal["population", "mean_of_batches"]
ZERO = torch.zeros(())  # what sums begin with, on any device


def batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Return the name and the module of each batch norm of a model, in the order of its modules.

    A module that is used twice stands there once. Raises TypeError if model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]


def call(model: nn.Module, batch: Any) -> Any:
    """Return the model's output for a batch as a loader gives it.

    A tensor goes in as it is. Of a tuple or list, such as (inputs, labels), the first entry does. A
    dict goes in as keyword arguments; a tuple or list that is itself the first entry, as positional
    ones. Raises ValueError for an empty tuple or list.
    """
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError("expected a batch (inputs, ...), got an empty one")
        batch = batch[0]
        if isinstance(batch, tuple | list):
            return model(*batch)
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


@contextmanager
def evaluating(model: M) -> Iterator[M]:
    """Put every module of a model in evaluation mode, and back in its own mode afterwards.

    Only the flags `training` are set: no module's train() or eval() is called, since some do more
    than that. They are restored after an exception too.
    """
    with _in_evaluation(model.modules()):
        yield model


@contextmanager
def frozen_statistics(model: M) -> Iterator[M]:
    """Put the batch norms of a model in evaluation mode, and back in their own mode afterwards.

    Within, they normalize with their running statistics and leave them as they are; all other
    modules stay in their modes, and gradients flow. A batch norm without running statistics goes on
    normalizing with its batch. The modes are restored after an exception too.
    """
    with _in_evaluation(module for _, module in batch_norms(model)):
        yield model


def recalibrate(
    model: M,
    batches: Iterable[Any],
    *,
    forward: Callable[[M, Any], Any] = call,
    estimator: Estimator = "population",
    progress: bool = True,
) -> M:
    """Replace the running statistics by those of the given data, in one pass; return the model.

    model: any module with batch norms; its parameters stay as they are.
    batches: what a loader yields. Take large, shuffled ones: see below.
    forward: runs the model on one batch; `call` takes tensors, (inputs, labels), and dicts.
    estimator: "population" pools all values of a channel, whatever batch they came in: the mean and
        the unbiased variance over the data. "mean_of_batches" averages the means and the unbiased
        variances of the batches, as update_bn and a momentum of None do; it misses how much the
        means differ from batch to batch.
    progress: show a bar where someone can see it.

    All layers are measured in the same pass, each batch norm normalizing with its batch as it does
    in training; the other modules are in evaluation mode, so that dropout does not distort the
    variances. The statistics of a layer are therefore exact for the inputs that it has while the
    layers before it use their batches. To measure each layer only after the statistics of those
    before it are settled would take one pass for each, and data that can be read again. With large,
    shuffled batches the two hardly differ. In small ones no normalized value is far from 0, at most
    sqrt(n - 1) in a batch of n, and behind an activation the pooled variances of the later layers
    come out smaller, the averaged ones larger. Batches of one class lose what sets it apart.

    A batch norm that no batch reached keeps its statistics. num_batches_tracked becomes the number
    of batches that the layer saw. Modes, momenta, and the states of torch's, NumPy's and Python's
    random generators are as before.

    Raises TypeError if model is no module or batches is one tensor, ValueError for another
    estimator, for a model without running statistics or with a lazy layer that has not run, for one
    value per channel, if no batch reached a layer, and if a statistic is not finite. Whatever is
    raised, also by the model or the data, the model stays as it was.

    Source: Wu and Johnson (2021), section 3 (precise batch norm); Ioffe and Szegedy (2015),
    Algorithm 2; Chan, Golub and LeVeque (1983) for pooling.
    """
    if estimator not in ("population", "mean_of_batches"):
        raise ValueError(f"expected 'population' or 'mean_of_batches', got {estimator!r}")
    if isinstance(batches, Tensor):
        raise TypeError("expected batches, such as a DataLoader, got one tensor: put it in a list")
    seen = {
        module: _Seen(name)
        for name, module in batch_norms(model)
        if module.running_mean is not None and module.running_var is not None
    }
    if not seen:
        raise ValueError("expected a model with running statistics, found no batch norm with any")
    for module, record in seen.items():
        if is_lazy(module.running_mean):  # type: ignore[arg-type]
            raise ValueError(f"expected a model that has run, got {record.name!r} without a size")
    with as_before(model), torch.no_grad(), ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for module, record in seen.items():
            stack.enter_context(_measuring(module, record))
        for n, batch in enumerate(progress_bar(batches, "batch") if progress else batches):
            forward(model, batch)
            for record in seen.values():
                if not record.is_finite():
                    raise ValueError(
                        f"expected finite values at {record.name!r}, got NaN or Inf in batch {n}: "
                        "look for them in the data and in the layers before"
                    )
    measured = {m: record.statistics(estimator) for m, record in seen.items() if record.batches}
    if not measured:
        raise ValueError("expected at least one batch that reaches a batch norm, got none")
    for module, statistics in measured.items():
        for running, value in zip(
            (module.running_mean, module.running_var), statistics, strict=True
        ):
            if not torch.isfinite(value.to(running)).all():  # type: ignore[arg-type]
                raise ValueError(
                    f"expected statistics that {running.dtype} can hold at "  # type: ignore[union-attr]
                    f"{seen[module].name!r}, got {value.abs().max():.3g}: keep them in float32"
                )
    for module, (mean, var) in measured.items():
        module.running_mean.copy_(mean)  # type: ignore[union-attr]
        module.running_var.copy_(var)  # type: ignore[union-attr]
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(seen[module].batches)
    return model


def momentum_from_keras(momentum: float) -> float:
    """Return the momentum for PyTorch that does what Keras's does: 1 - momentum.

    Keras says what the old value keeps, PyTorch what the new one weighs. momentum: in [0, 1].
    Raises ValueError outside. Source: Keras, BatchNormalization; PyTorch, torch.nn.BatchNorm1d.
    """
    return 1 - _checked_momentum(momentum)


def effective_momentum(momentum: float, updates: float) -> float:
    """Return the momentum of one update that weighs as much as several.

    That is 1 - (1 - momentum)**updates. momentum: PyTorch's, in [0, 1]. updates: above 0. A layer
    that is updated twice a step, as under activation checkpointing, forgets like
    effective_momentum(0.1, 2) = 0.19; to undo it, give it effective_momentum(0.1, 1 / 2), about
    0.0513. Raises ValueError outside the ranges.
    """
    if not updates > 0:
        raise ValueError(f"expected updates above 0, got {updates}")
    return float(1 - (1 - _checked_momentum(momentum)) ** updates)


def _checked_momentum(momentum: float) -> float:
    if not 0 <= momentum <= 1:
        raise ValueError(f"expected a momentum between 0 and 1, got {momentum}")
    return momentum


@dataclass
class _Seen:
    """What a batch norm's inputs were so far, in float64.

    mean, var: of all values together, the variance biased. means, variances: the sums over the
    batches of their means and unbiased variances.
    """

    name: str
    batches: int = 0
    count: int = 0
    mean: Tensor = ZERO
    var: Tensor = ZERO
    means: Tensor = ZERO
    variances: Tensor = ZERO

    def add(self, x: Tensor) -> None:
        """Take in one batch, shape (N, C, *spatial)."""
        count = x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(
                f"expected more than one value per channel at {self.name!r}, got shape "
                f"{tuple(x.shape)}: leave out batches of one, as with drop_last=True"
            )
        mean, var = moments(x)
        self.batches, self.count = self.batches + 1, self.count + count
        self.mean, self.var = pooled(mean, var, self.mean, self.var, count / self.count)
        self.means = self.means + mean
        self.variances = self.variances + var * (count / (count - 1))

    def is_finite(self) -> bool:
        """Tell whether NaN or Inf has come in."""
        return bool(self.var.isfinite().all())

    def statistics(self, estimator: Estimator) -> tuple[Tensor, Tensor]:
        """Return the mean and the unbiased variance, each (C,)."""
        if estimator == "population":
            return self.mean, self.var * (self.count / (self.count - 1))
        return self.means / self.batches, self.variances / self.batches


@contextmanager
def _measuring(module: _BatchNorm, record: _Seen) -> Iterator[None]:
    """Let a batch norm normalize with its batches, keep its buffers, and record its inputs.

    Its mode is restored by the `evaluating` around this.
    """

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if x.dim() > 1:  # the module itself refuses other inputs
            record.add(x)

    hook = module.register_forward_pre_hook(look, with_kwargs=True)
    tracks = module.track_running_stats
    module.training, module.track_running_stats = True, False
    try:
        yield
    finally:
        module.track_running_stats = tracks
        hook.remove()


@contextmanager
def _in_evaluation(modules: Iterable[nn.Module]) -> Iterator[None]:
    before = [(module, module.training) for module in modules]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Within, run compiled models without their compilation; restore the random generators after.

    The generators are Python's, NumPy's and torch's, those of the model's CUDA devices included.
    """
    devices = {p.device for p in (*model.parameters(), *model.buffers()) if p.is_cuda}
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        # Compiled code would not call the hooks. Where nothing is compiled, set_stance would only
        # import the compiler, which takes seconds.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
