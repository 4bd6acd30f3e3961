"""The two passes that the probing rules share: a training step, and an evaluation of the batch.

Both run a copy of the model, once, and only if a rule asks for them. What made a pass impossible is
kept as the reason for which those rules are skipped.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
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
Parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)


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
    for name, wraps_it in (
        ("_orig_mod", hasattr),
        ("module", lambda m, _: isinstance(m, Parallel)),
    ):
        if wraps_it(model, name):
            return unwrapped(getattr(model, name), f"{prefix}{name}.")
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
    modules = [(m, m.training, dict(m._buffers)) for m in model.modules()]
    kept = [
        (x, x.detach().clone(), x.grad, None if x.grad is None else x.grad.detach().clone())
        for x in (*model.parameters(), *model.buffers())
        if not is_lazy(x)
    ]
    try:
        yield
    finally:
        for module, mode, buffers in modules:
            module.training = mode
            module._buffers.update(buffers)
        for x, value, grad, grad_value in kept:
            x.grad = grad
            for now, before in ((x.detach(), value), (grad, grad_value)):
                if now is not None and before is not None and not torch.equal(now, before):
                    now.copy_(before)


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
        x = next(iter(tensors([args, kwargs])), None)
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
                loss.backward()  # type: ignore[no-untyped-call]
    except Skip as reason:
        step.failed = reason
    except Exception as error:
        step.failed = Skip(f"a training step raised {described(error)}")
    after = counters(model)
    step.updates = {prefix + name: after.get(name, n) - n for name, n in before.items()}
    return step


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
    x = (x if x.dim() > 2 else x[..., None]).flatten(2).float()
    n, means = len(x), x.mean(2)
    mean = means.mean(0)
    squares = (x - mean[:, None]).square().mean(2)
    errors = [v.std(0, correction=0) / math.sqrt(max(n - 1, 1)) for v in (means, squares)]
    return Call(name, n, n * x.shape[2], *(v.cpu() for v in (mean, squares.mean(0), *errors)))


def drift(norm: Norm, seen: Call) -> tuple[float, float]:
    """Return how far running statistics are from a batch's, and how much of that is sampling.

    Root mean squares over channels of the distance between the normalized outputs with the two:
    sqrt(d**2 + (r - 1)**2), with d the difference of the means and r the ratio of the standard
    deviations, in units of the running one. Taken with the initial values or without, whichever is
    nearer.
    """
    scale = norm.var + norm.eps  # type: ignore[operator]
    ratio = ((seen.var + norm.eps) / scale).sqrt()
    noise = seen.mean_error.square() / scale
    noise = noise + (seen.var_error / (2 * (seen.var + norm.eps)) * ratio).square()
    old = 2 / (2 - (norm.momentum or 0))  # a running average of such batches varies as well
    nearest = min(_distance(norm, seen), _distance(norm, blended(norm, seen)))
    return nearest, float((old * noise).mean().sqrt())


def _distance(norm: Norm, seen: Call) -> float:
    scale = norm.var + norm.eps  # type: ignore[operator]
    shift = (seen.mean - norm.mean).square() / scale  # type: ignore[operator]
    return float((shift + (((seen.var + norm.eps) / scale).sqrt() - 1).square()).mean().sqrt())


def blended(norm: Norm, seen: Call) -> Call:
    """Return a batch's moments with the share of the initial 0 and 1 that a layer should have."""
    left = norm.left
    return replace(seen, mean=(1 - left) * seen.mean, var=(1 - left) * seen.var + left)


def left_of(subject: Subject, norm: Norm) -> float:
    """Return the weight of the initial values, but 0 if a batch shows that there are none.

    So it is after a recalibration, which counts few batches and keeps nothing from before: the
    statistics are nearer to the batch's own than to what they should be, or hardly differ.
    """
    if not 0 < norm.left < 1 or subject.batch is None:
        return norm.left
    with suppress(Skip):
        for seen in whole_step(subject).calls:
            if seen.name == norm.name:
                near = max(
                    _distance(norm, blended(norm, seen)), min(1.5 * drift(norm, seen)[1], 0.25)
                )
                if _distance(norm, seen) < near:
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
    """One call of a layer: its input for the first example, its output for the first eight."""

    name: str
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Evaluation:
    """A copy that has evaluated the batch: its layers' calls, and the buffers that moved."""

    model: nn.Module
    rows: list[Row]
    moved: dict[str, float]


@once
def evaluation(subject: Subject) -> Evaluation:
    """Evaluate the batch."""
    model, moved = copied(subject, training=False), dict[str, float]()
    _, prefix = unwrapped(subject.model)
    before = {name: x.clone() for name, x in model.named_buffers() if not is_lazy(x)}
    rows = first_rows(model, given(subject, subject.batch))
    for name, x in model.named_buffers():
        if name in before and not torch.equal(x.nan_to_num(), before[name].nan_to_num()):
            layer = prefix + name.rpartition(".")[0]
            change = float((x.double() - before[name].double()).abs().max())
            moved[layer] = max(change, moved.get(layer, 0.0))
    return Evaluation(model, rows, moved)


def first_rows(model: nn.Module, batch: Any) -> list[Row]:
    """Evaluate a batch; return the calls of the layers in their order, the model's own last."""
    rows: list[Row] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str) -> None:
        x = next(iter(tensors([args, kwargs])), None)
        if x is not None and len(x) > 1:
            ys = [y for y in tensors(output) if len(y) == len(x) and not y.is_complex()]
            y = [y[:8].detach().flatten(1) for y in ys]
            rows.append(Row(name, x[0].detach().clone(), torch.cat(y or [x.new_empty(1, 0)], 1)))

    handles = [
        module.register_forward_hook(partial(note, name=name), with_kwargs=True)
        for name, module in model.named_modules()
        if not name or is_layer(module)
    ]
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return rows
