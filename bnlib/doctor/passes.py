"""The two passes that the probing rules share: a training step, and an evaluation of the batch.

Both run a copy of the model, once, and only if a rule asks for them. What made a pass impossible is
kept as the reason for which those rules are skipped.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from bnlib.doctor.checks import Norm, Skip, Subject
from bnlib.statistics import batch_norms, call

T = TypeVar("T")
Chain = tuple[nn.Module, ...]  # the layers that a tensor comes through, the nearest last


def once(run: Callable[[Subject], T]) -> Callable[[Subject], T]:
    """Run a pass once for all rules that ask for it, and keep why it could not be run."""

    @wraps(run)
    def kept(subject: Subject) -> T:
        name = run.__name__
        if name not in subject.passes:
            try:
                subject.passes[name] = run(subject)
            except Skip as reason:
                subject.passes[name] = reason
            except Exception as error:
                subject.passes[name] = Skip(f"the model raised {described(error)}")
        if isinstance(subject.passes[name], Skip):
            raise subject.passes[name]
        return subject.passes[name]  # type: ignore[no-any-return]

    return kept


def described(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first[:200]}"


# Batches


def mapped(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a batch with each of its tensors changed; what is no tensor stays the same."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [mapped(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, or of what a model takes or returns, but no scalars."""
    found: list[Tensor] = []
    mapped(batch, lambda x: found.append(x) if x.dim() else None)
    return found


def input_of(args: Any, kwargs: Any) -> Tensor | None:
    """Return the first tensor that a layer is called with."""
    return next(iter(tensors([args, kwargs])), None)


def size_of(batch: Any) -> int:
    """Return the number of examples: the length of the first tensor."""
    return next(map(len, tensors(batch)), 0)


def examples(batch: Any, chosen: slice | list[int]) -> Any:
    """Return some of the examples of a batch."""
    size = size_of(batch)
    return mapped(batch, lambda x: x[chosen] if x.dim() and len(x) == size else x)


def given(subject: Subject, batch: Any) -> Any:
    """Return a copy of a batch for one pass, on the model's device."""
    place = next(iter(subject.model.parameters()), None)  # type: ignore[union-attr]
    device = None if place is None else place.device
    return mapped(batch, lambda x: x.detach().to(device, copy=True).requires_grad_(x.requires_grad))


# Copies


def unwrapped(model: Any, prefix: str = "") -> tuple[nn.Module, str]:
    """Return what a compiled or parallel model holds, and how the names in it begin."""
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod, f"{prefix}_orig_mod.")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module, f"{prefix}module.")
    return model, prefix


def copied(subject: Subject, *, training: bool) -> nn.Module:
    """Return a copy of the model as it trains, or as it evaluates, for a pass that may change it.

    If the model is in that mode, every module keeps its own; if not, the model's own train() or
    eval() is asked, which may leave some layers as they are.
    """
    model, _ = unwrapped(subject.model)
    if isinstance(model, torch.jit.ScriptModule):
        raise Skip("a scripted model cannot be probed; give the one that it was made from")
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise Skip(f"the model cannot be copied ({described(error)})") from error
    return model if model.training == training else model.train(training)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put a model back as it was, should a loss have used it and not the copy that it was given."""
    modules = [(m, m.training, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    kept = [
        (x, x.detach().clone()) for x in (*model.parameters(), *model.buffers()) if not is_lazy(x)
    ]
    gradients = [(p, p.grad) for p in model.parameters()]
    kept += [(grad, grad.clone()) for _, grad in gradients if grad is not None]
    try:
        yield
    finally:
        for module, mode, parameters, buffers in modules:
            module.training = mode
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for p, grad in gradients:
            p.grad = grad
        for x, value in kept:
            if not torch.equal(x, value):
                x.detach().copy_(value)


# A training step


@dataclass(frozen=True)
class Call:
    """What one call of a batch norm got: per channel the moments and their standard errors.

    The errors come from how much the examples differ: the values within one image are no
    independent draws.
    """

    name: str
    examples: int
    values: int
    mean: Tensor
    var: Tensor
    mean_error: Tensor
    var_error: Tensor


@dataclass
class Step:
    """What one training step showed, and why it broke off if it did.

    calls: those of the batch norms. updates: how often each moved its statistics. chains: the
    layers before each. cross: under a gradient penalty, the share of the first example's gradient,
    at the input of a batch norm, that lies at other examples.
    """

    calls: list[Call] = field(default_factory=list)
    updates: dict[str, int] = field(default_factory=dict)
    chains: dict[str, Chain] = field(default_factory=dict)
    cross: dict[str, float] = field(default_factory=dict)
    failed: Skip | None = None


@once
def attempt(subject: Subject) -> Step:
    """Take one training step, as far as it goes: forward and, with a loss, backward."""
    model, step = copied(subject, training=True), Step()
    _, prefix = unwrapped(subject.model)
    inputs: list[tuple[str, Tensor]] = []  # of the batch norms, since the model was last called
    outputs: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any, name: str) -> None:
        x = input_of(args, kwargs)
        if x is not None and x.dim() > 1:
            step.calls.append(measured(name, x.detach()))
            if x.requires_grad and (module.training or module.running_mean is None):
                inputs.append((name, x))

    def penalty(scores: list[Tensor], at: list[Tensor]) -> None:
        rows = [y for y in (*scores, *outputs[-1:]) if len(y) == size_of(at)]
        if rows and inputs and not any(x is p for x in at for p in model.parameters()):
            step.cross.update(cross_terms(rows[0], inputs))

    model.register_forward_pre_hook(lambda *_: inputs.clear())
    model.register_forward_hook(lambda m, args, output: outputs.extend(tensors(output)))
    follow(model, step.chains, prefix)
    for name, module in batch_norms(model):
        module.register_forward_pre_hook(partial(look, name=prefix + name), with_kwargs=True)
    before = counters(model)
    try:
        if subject.loss is None:
            with torch.no_grad():
                call(model, given(subject, subject.batch))
        else:
            with torch.enable_grad(), InputGradients(penalty):
                loss = subject.loss(model, given(subject, subject.batch))
                if not outputs and not step.calls:
                    raise Skip("the loss did not use the model that it got as its argument")
                if loss.requires_grad:  # not if all is frozen
                    backward(model, loss)
    except Skip as reason:
        step.failed = reason
    except Exception as error:
        step.failed = Skip(f"a training step raised {described(error)}")
    after = counters(model)
    step.updates = {prefix + name: after.get(name, n) - n for name, n in before.items()}
    return step


def backward(model: nn.Module, loss: Any) -> None:
    """Run the backward pass, where checkpointing runs layers again; as little of it as reaches all.

    That is the gradients of the batch norms' parameters; of all others, if one has none, or under a
    checkpoint with use_reentrant=True, which takes no choice.
    """
    norms = [module for _, module in batch_norms(model)]
    chosen = [p for module in norms for p in module.parameters() if p.requires_grad]
    if chosen and all(any(p.requires_grad for p in module.parameters()) for module in norms):
        with suppress(RuntimeError):
            loss.backward(inputs=chosen, retain_graph=True)
            return
    loss.backward()


def whole_step(subject: Subject) -> Step:
    """Return a training step; raise Skip if it broke off."""
    step = attempt(subject)
    if step.failed is not None:
        raise step.failed
    return step


def counters(model: nn.Module) -> dict[str, int]:
    """Return how many batches each batch norm in training has tracked."""
    trained = [(name, m.num_batches_tracked) for name, m in batch_norms(model) if m.training]
    return {name: int(count) for name, count in trained if count is not None}


def measured(name: str, x: Tensor) -> Call:
    """Return the moments of a batch norm's input, shape (N, C) or (N, C, ...)."""
    x = (x if x.dim() > 2 else x[..., None]).flatten(2)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    n, means = len(x), x.mean(2)
    mean = means.mean(0)
    squares = torch.linalg.vector_norm(x - mean[:, None], dim=2).square() / x.shape[2]
    errors = [v.std(0, correction=0) / math.sqrt(max(n - 1, 1)) for v in (means, squares)]
    return Call(name, n, n * x.shape[2], *(v.cpu() for v in (mean, squares.mean(0), *errors)))


def distances(norm: Norm, seen: Call) -> tuple[float, float, float]:
    """Return how far the running statistics are from a batch's, and how far chance puts them.

    First from the batch's own; then from those with the share of the initial 0 and 1 that the layer
    should hold. Each is a root mean square over channels of sqrt(d**2 + (r - 1)**2), with d the
    difference of the means and r the ratio of the standard deviations, in units of the running one:
    so far apart are the normalized outputs with the two. The last is the standard error of that.
    """
    left, running = norm.left, norm.mean
    scale = norm.var + norm.eps  # type: ignore[operator]

    def far(mean: Tensor, var: Tensor) -> float:
        shift, ratio = (mean - running).square() / scale, ((var + norm.eps) / scale).sqrt()  # type: ignore[operator]
        return float((shift + (ratio - 1).square()).mean().sqrt())

    errors = seen.mean_error.square() / scale
    errors = errors + seen.var_error.square() / (4 * scale * (seen.var + norm.eps))
    errors = errors * 2 / (2 - (norm.momentum or 0))  # a running average of such batches errs too
    mixed = far((1 - left) * seen.mean, (1 - left) * seen.var + left)
    return far(seen.mean, seen.var), mixed, float(errors.mean().sqrt())


def left_of(subject: Subject, norm: Norm) -> float:
    """Return the weight of the initial values, but 0 if a batch shows that there are none.

    So it is after a recalibration, which counts few batches and keeps nothing from before: the
    statistics are nearer to the batch's own than to what they should be, or as near as chance.
    """
    if 0 < norm.left < 1 and subject.batch is not None:
        with suppress(Skip):
            for seen in whole_step(subject).calls:
                if seen.name == norm.name:
                    own, mixed, error = distances(norm, seen)
                    if own < max(mixed, min(1.5 * error, 0.25)):
                        return 0.0
    return norm.left


class InputGradients(TorchFunctionMode):
    """Within, look at what torch.autograd.grad is asked for with create_graph=True."""

    def __init__(self, look: Callable[[list[Tensor], list[Tensor]], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func is torch.autograd.grad and kwargs.get("create_graph"):
            self.look(tensors(args[0]), tensors(args[1]))
        return func(*args, **kwargs)


def cross_terms(scores: Tensor, inputs: list[tuple[str, Tensor]]) -> dict[str, float]:
    """Return the share of the first score's gradient at each tensor that lies at other examples."""
    wanted = [x for _, x in inputs]
    gradients = torch.autograd.grad(scores[0].sum(), wanted, retain_graph=True, allow_unused=True)
    return {
        name: float(gradient[1:].norm() / gradient.norm())
        for (name, _), gradient in zip(inputs, gradients, strict=True)
        if gradient is not None and gradient.any()
    }


# The layers before a batch norm


def follow(model: nn.Module, chains: dict[str, Chain], prefix: str) -> None:
    """Let the batch norms of a model enter, when they are called, the layers before them.

    A tensor remembers the layers that it comes through, from the last normalization on, as long as
    modules hand it on: a function in between makes another tensor, a change in place another
    version.
    """
    current: dict[nn.Module, Chain] = {}

    def begin(module: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        found = tensors([args, kwargs])
        chain, version = getattr(found[0], "_chain", ((), 0)) if len(found) == 1 else ((), 0)
        current[module] = chain if chain and found[0]._version == version else ()
        if isinstance(module, _BatchNorm):
            chains.setdefault(prefix + name, current[module])

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.is_inference():
            chain = grown(current.get(module, ()), module)
            output._chain = chain, output._version  # type: ignore[attr-defined]

    for name, module in model.named_modules():
        if is_layer(module):
            module.register_forward_pre_hook(partial(begin, name=name), with_kwargs=True)
            module.register_forward_hook(end)


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is one operation: a known layer, or without modules inside."""
    if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
        return False
    known = nn.Linear | _ConvNd | _DropoutNd | _BatchNorm
    return isinstance(module, known) or next(module.children(), None) is None


def grown(chain: Chain, module: nn.Module) -> Chain:
    """Return a chain with one more layer; a normalization begins a new one."""
    starts = isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm)
    return (module,) if starts else (*chain, module)


def sequences(model: nn.Module) -> dict[str, Chain]:
    """Return the layers before each batch norm, as far as nn.Sequential tells without a batch."""
    chains: dict[str, Chain] = {}
    names: dict[nn.Module, str] = {module: name for name, module in batch_norms(model)}

    def is_sequence(module: nn.Module) -> bool:
        return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward

    def walk(module: nn.Module, chain: Chain) -> Chain:
        if is_sequence(module):
            for child in module.children():
                chain = walk(child, chain)
            return chain
        if module in names:
            chains.setdefault(names[module], chain)
        return grown(chain, module) if is_layer(module) else ()

    for module in filter(is_sequence, model.modules()):
        walk(module, ())
    return chains


def layers_before(subject: Subject) -> Iterator[tuple[Norm, Chain]]:
    """Yield the batch norms and the layers before them: from a step, or else from nn.Sequential."""
    chains = sequences(subject.model)  # type: ignore[arg-type]
    if subject.batch is not None:
        with suppress(Skip):
            chains |= attempt(subject).chains
    for norm in subject.norms:
        if chain := chains.get(norm.name):
            yield norm, chain


# An evaluation


@dataclass(frozen=True)
class Row:
    """One call of a layer: the first row of its input and of its output; of the model's, all."""

    name: str
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Evaluation:
    """A copy that has evaluated some examples: its layers' calls, and the buffers that moved."""

    model: nn.Module
    rows: list[Row]
    moved: dict[str, float]


@once
def evaluation(subject: Subject) -> Evaluation:
    """Evaluate the first eight examples, or the whole batch if it cannot be cut."""
    model, moved = copied(subject, training=False), dict[str, float]()
    _, prefix = unwrapped(subject.model)
    buffers = [(name, x) for name, x in model.named_buffers() if not is_lazy(x)]
    before = {name: x.clone() for name, x in buffers if x.is_floating_point()}
    try:
        rows = rows_of(model, given(subject, examples(subject.batch, slice(8))))
    except Exception:
        rows = rows_of(model, given(subject, subject.batch))
    for name, x in model.named_buffers():
        if name in before and not torch.equal(x.nan_to_num(), before[name].nan_to_num()):
            layer = prefix + name.rpartition(".")[0]
            change = float((x.double() - before[name].double()).abs().max())
            moved[layer] = max(change, moved.get(layer, 0.0))
    return Evaluation(model, rows, moved)


def rows_of(model: nn.Module, batch: Any) -> list[Row]:
    """Evaluate a batch; return the calls of the layers in their order, the model's own last."""
    rows: list[Row] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str) -> None:
        x = input_of(args, kwargs)
        if x is not None and len(x):
            ys = [y for y in tensors(output) if len(y) == len(x) and not y.is_complex()]
            y = [y[: None if module is model else 1].detach().flatten(1) for y in ys]
            rows.append(Row(name, x[0].detach().clone(), torch.cat(y or [x.new_empty(1, 0)], 1)))

    handles = [
        module.register_forward_hook(partial(note, name=name), with_kwargs=True)
        for name, module in model.named_modules()
        if module is model or is_layer(module)
    ]
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return rows
