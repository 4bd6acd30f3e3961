"""The rules that run the model, or look at its loader.

Two passes serve them all, each run once and only if a rule asks for it: one training step
(`attempt`) and one evaluation (`evaluation`). They run on copies. A pass that cannot be run says
why, and the rules that need it are skipped.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import AlphaDropout, FeatureAlphaDropout, _DropoutNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from bnlib.doctor.checks import LEFT, Found, Norm, Skip, Subject, at, rule
from bnlib.doctor.report import Severity
from bnlib.statistics import batch_norms, call, recalibrate

T = TypeVar("T")
Chain = tuple[nn.Module, ...]  # the layers that a tensor comes through, the last one last
Chains = dict[str, Chain]
BATCHES = 20  # of a loader, for BN302
RECALIBRATION = 8  # of a loader, for BN206
WORST = 5
DROPOUT, ROUNDING, DRIFT, FEW, GAIN, CROSS = 0.1, 1e-3, 0.5, 16, 0.1, 1e-3


def once(run: Callable[[Subject], T]) -> Callable[[Subject], T]:
    """Run a pass once for all rules that ask for it; why it could not be run is kept as well."""

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
    """Return the tensors of a batch, or of what a model takes or returns."""
    found: list[Tensor] = []
    mapped(batch, found.append)
    return found


def size_of(batch: Any) -> int:
    """Return the number of examples: the length of the first tensor."""
    return next((len(x) for x in tensors(batch) if x.dim()), 0)


def examples(batch: Any, chosen: slice | list[int]) -> Any:
    """Return some of the examples of a batch."""
    size = size_of(batch)
    return mapped(batch, lambda x: x[chosen] if x.dim() and len(x) == size else x)


def unwrapped(model: Any) -> tuple[nn.Module, str]:
    """Return what a compiled or parallel model holds, and how the names in it begin."""
    prefix = ""
    while True:
        if hasattr(model, "_orig_mod"):
            inner = "_orig_mod"
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = "module"
        else:
            return model, prefix
        model, prefix = getattr(model, inner), f"{prefix}{inner}."


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


def given(subject: Subject, batch: Any) -> Any:
    """Return a copy of a batch for one pass, on the model's device."""
    place = next(iter(subject.model.parameters()), None)  # type: ignore[union-attr]
    device = None if place is None else place.device
    return mapped(batch, lambda x: x.detach().to(device, copy=True).requires_grad_(x.requires_grad))


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
        with torch.no_grad():
            for x, value, grad, grad_value in kept:
                x.grad = grad
                for now, before in ((x, value), (grad, grad_value)):
                    if now is not None and not torch.equal(now, before):  # type: ignore[arg-type]
                        now.copy_(before)  # type: ignore[arg-type]


@contextmanager
def generator_as_before(loader: Any) -> Iterator[None]:
    """Put a loader's own random generator back in its state."""
    generator = getattr(loader, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        yield
    finally:
        if state is not None:
            loader.generator.set_state(state)


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
    """What one training step showed, and why it broke off if it did."""

    calls: list[Call] = field(default_factory=list)
    updates: dict[str, int] = field(default_factory=dict)
    chains: Chains = field(default_factory=dict)
    cross: dict[str, float] = field(default_factory=dict)
    penalised: bool = False
    failed: Skip | None = None


@once
def attempt(subject: Subject) -> Step:
    """Take one training step with a copy, as far as it goes: forward and, with a loss, backward."""
    model, step = copied(subject, training=True), Step()
    _, prefix = unwrapped(subject.model)
    names = {module: prefix + name for name, module in batch_norms(model)}
    inputs: list[tuple[str, Tensor]] = []  # of the batch norms, since the model was last called
    outputs: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        x = next(iter(tensors([args, kwargs])), None)
        if x is not None and x.dim() > 1:
            step.calls.append(measured(names[module], x.detach()))
            if x.requires_grad and (module.training or module.running_mean is None):
                inputs.append((names[module], x))

    def penalty(scores: list[Tensor], wanted: list[Tensor]) -> None:
        mine = {id(x) for x in model.parameters()}
        rows = [y for y in (*scores, *outputs) if y.dim() and len(y) == size_of(wanted)]
        if rows and inputs and not any(id(x) in mine for x in wanted):
            step.penalised = True
            step.cross.update(cross_terms(rows[0], inputs))

    model.register_forward_pre_hook(lambda *_: inputs.clear())
    model.register_forward_hook(lambda m, args, output: outputs.extend(tensors(output)))
    follow(model, step.chains, prefix)
    for module in names:
        module.register_forward_pre_hook(look, with_kwargs=True)
    before = counters(model)
    try:
        if subject.loss is None:
            with torch.no_grad():
                call(model, given(subject, subject.batch))
        else:
            with torch.enable_grad(), InputGradients(penalty):
                loss = subject.loss(model, given(subject, subject.batch))
                if not outputs and not step.calls:
                    raise Skip("the loss did not use the model that it was given as its argument")
                loss.backward()  # type: ignore[no-untyped-call]
    except Skip as reason:
        step.failed = reason
    except Exception as error:
        step.failed = Skip(f"one training step raised {described(error)}")
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
    return {
        name: int(m.num_batches_tracked)
        for name, m in batch_norms(model)
        if m.training and m.num_batches_tracked is not None
    }


def measured(name: str, x: Tensor) -> Call:
    """Return the moments of a batch norm's input, shape (N, C) or (N, C, ...)."""
    x = (x if x.dim() > 2 else x[..., None]).flatten(2).float()
    n, means = len(x), x.mean(2)
    mean = means.mean(0)
    squares = (x - mean[:, None]).square().mean(2)
    errors = [v.std(0, correction=0) / math.sqrt(max(n - 1, 1)) for v in (means, squares)]
    moments = [v.cpu() for v in (mean, squares.mean(0), *errors)]
    return Call(name, n, n * x.shape[2], *moments)


def follow(model: nn.Module, chains: Chains, prefix: str) -> None:
    """Let the batch norms of a model enter, at their first call, the layers before them.

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
            output._chain = (grown(current.get(module, ()), module), output._version)  # type: ignore[attr-defined]

    for name, module in model.named_modules():
        if is_layer(module):
            begin_named = partial(begin, name=name)
            module.register_forward_pre_hook(begin_named, with_kwargs=True)
            module.register_forward_hook(end)


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is one operation: a known layer, or without modules inside."""
    known = nn.Linear | _ConvNd | _DropoutNd | _BatchNorm
    return isinstance(module, known) or not any(True for _ in module.children())


def grown(chain: Chain, module: nn.Module) -> Chain:
    """Return a chain with one more layer; a normalization begins a new one."""
    if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm):
        return (module,)
    return (*chain, module)


def sequences(model: nn.Module) -> Chains:
    """Return the layers before each batch norm, as far as nn.Sequential tells without a batch."""
    chains: Chains = {}
    names: dict[nn.Module, str] = {module: name for name, module in batch_norms(model)}

    def walk(module: nn.Module, chain: Chain) -> Chain:
        if type(module).forward is nn.Sequential.forward:
            for child in module.children():
                chain = walk(child, chain)
            return chain
        if module in names:
            chains.setdefault(names[module], chain)
        return grown(chain, module) if is_layer(module) else ()

    for module in model.modules():
        if type(module).forward is nn.Sequential.forward:
            walk(module, ())
    return chains


def layers_before(subject: Subject) -> Iterator[tuple[Norm, Chain]]:
    """Yield the batch norms and the layers before them: from a step, or else from nn.Sequential."""
    assert subject.model is not None
    chains = sequences(subject.model)
    if subject.batch is not None:
        with suppress(Skip):
            chains |= attempt(subject).chains
    for norm in subject.norms:
        if chain := chains.get(norm.name):
            yield norm, chain


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
    """Return how much of the gradient of the first score, at each tensor, is at other examples."""
    gradients = torch.autograd.grad(
        scores[0].sum(), [x for _, x in inputs], retain_graph=True, allow_unused=True
    )
    return {
        name: float(gradient[1:].norm() / gradient.norm())
        for (name, _), gradient in zip(inputs, gradients, strict=True)
        if gradient is not None and gradient.any()
    }


@dataclass(frozen=True)
class Row:
    """One call of a layer: its input for the first example, its output for the first two."""

    name: str
    x: Tensor
    y: Tensor


@dataclass
class Evaluation:
    """A copy that has evaluated the batch: its calls, and the layers whose buffers moved."""

    model: nn.Module
    rows: list[Row]
    moved: dict[str, float]


@once
def evaluation(subject: Subject) -> Evaluation:
    """Evaluate the batch with a copy."""
    model = copied(subject, training=False)
    _, prefix = unwrapped(subject.model)
    before = {name: x.clone() for name, x in model.named_buffers() if not is_lazy(x)}
    rows = first_rows(model, given(subject, subject.batch))
    moved: dict[str, float] = {}
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
        found = [x for x in tensors([args, kwargs]) if x.dim()]
        if found and len(found[0]) > 1:
            x, size = found[0], len(found[0])
            ys = [y for y in tensors(output) if y.dim() and len(y) == size and not y.is_complex()]
            y = [y[:2].detach().flatten(1).double() for y in ys if y.numel()]
            rows.append(
                Row(name, x[0].detach().clone(), torch.cat(y, 1) if y else torch.zeros(2, 0))
            )

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


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors over the largest value; infinite if unlike."""
    if a.shape != b.shape or not a.numel():
        return math.inf if a.shape != b.shape else 0.0
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-30)
    return float((a.double() - b.double()).abs().max()) / scale


@rule("BN113", "redundant-bias", "14-frozen-layers", "model")
def redundant_bias(subject: Subject) -> Iterator[Found]:
    """Note a bias that a batch norm right behind it subtracts again, with the mean of the batch.

    Not so where the batch norm uses its running statistics: there a bias shifts the output. The
    value is the number of parameters that do nothing.
    """
    for norm, chain in layers_before(subject):
        layer = next((m for m in reversed(chain) if not isinstance(m, nn.Identity)), None)
        bias = getattr(layer, "bias", None)
        if isinstance(layer, nn.Linear | _ConvNd) and bias is not None and norm.uses_batch:
            message = (
                f"The layer before it has a bias of {bias.numel()} numbers, which the mean of "
            )
            message += "the batch takes out again; none is needed. beta is the bias."
            fix = f"{type(layer).__name__}(..., bias=False)"
            yield Found("note", norm.name, bias.numel(), 0, message, fix)


@rule("BN114", "dropout-before", "15-statistics-gone-wrong", "model")
def dropout_before(subject: Subject) -> Iterator[Found]:
    """Find dropout before a batch norm, with no other normalization between.

    Dropout with probability p widens what comes out in training: values of mean 0 have 1 / (1 - p)
    times the variance. The running variance keeps that, and in evaluation is too large. Up to
    p = 0.1 it is within 11%. Source: Li et al. (2019), arXiv 1801.05134.
    """
    for norm, chain in layers_before(subject):
        p = max(
            (m.p for m in chain if isinstance(m, _DropoutNd) and not keeps_variance(m)), default=0.0
        )
        if norm.mean is not None and p > DROPOUT:
            message = (
                f"Dropout of {p:g} comes before it: its running variance is that of training, "
            )
            message += (
                f"up to {1 / max(1 - p, 1e-9):.3g} times what it meets in evaluation. Up to 0.1, "
            )
            message += "the two are within 11%."
            yield Found(
                "warning", norm.name, p, DROPOUT, message, "# put Dropout behind the last one"
            )


def keeps_variance(module: nn.Module) -> bool:
    """Return whether a dropout leaves mean and variance as they are."""
    return isinstance(module, AlphaDropout | FeatureAlphaDropout)


@rule("BN201", "batch-dependent", "13-the-wrong-mode", "model", "batch")
def batch_dependent(subject: Subject) -> Iterator[Found]:
    """Find outputs of one example, in evaluation, that change with its companions.

    The first example is evaluated within the batch, and beside itself alone: twice, since some
    models refuse a batch of one. The value is the largest difference, as a share of the largest
    output; the layer is the first whose input agrees and whose output does not. Float rounding
    stays below 1e-5, batch statistics give more than 0.01.
    """
    if size_of(subject.batch) < 2:
        raise Skip("the batch needs two examples")
    there = evaluation(subject)
    alone = first_rows(there.model, given(subject, examples(subject.batch, [0, 0])))
    if not there.rows or not alone or there.rows[-1].name or not alone[-1].y.numel():
        raise Skip("the output has no row for each example")
    y = alone[-1].y
    if not (y.isfinite().all() and there.rows[-1].y.isfinite().all()):
        raise Skip("the output in evaluation is not finite")
    if distance(y[0], y[1]) > ROUNDING:
        raise Skip("the output in evaluation is random")
    value = distance(y[0], there.rows[-1].y[0])
    if value > ROUNDING:
        layer = next(
            (
                a.name
                for a, b in zip(there.rows[:-1], alone, strict=False)
                if a.name == b.name
                and distance(a.x, b.x) <= ROUNDING
                and distance(a.y[0], b.y[0]) > ROUNDING
            ),
            "",
        )
        message = (
            f"In evaluation the first example's output differs by {value:.2g} of its size between "
        )
        message += "the batch and itself alone. Rounding stays below 1e-5, batch statistics do not."
        name = unwrapped(subject.model)[1] + layer if layer else ""
        yield Found("error", name, value, ROUNDING, message, f"{at(name)}.eval()")


@rule("BN202", "statistics-drift", "15-statistics-gone-wrong", "model", "batch")
def statistics_drift(subject: Subject) -> Iterator[Found]:
    """Find running statistics that are far from those of the batch; the five worst layers.

    The value is how far a layer's normalized output in evaluation is from that in training, as a
    root mean square over channels: with d the shift of the mean and r the ratio of the standard
    deviations, both in units of the running one, sqrt(d**2 + (r - 1)**2). A finding is above both
    0.5 and three times what sampling so many examples explains. Statistics that are mostly
    initial values are left to BN103 and BN104.
    """
    step, worst = whole_step(subject), dict[str, tuple[float, float]]()
    norms = {norm.name: norm for norm in subject.norms}
    compared = 0
    for seen in step.calls:
        norm = norms[seen.name]
        if norm.mean is None or norm.var is None or norm.left > LEFT or seen.examples < 8:
            continue
        compared += 1
        value, noise = drift(norm, seen)
        if value > DRIFT and value > 3 * noise:
            worst[seen.name] = max((value, noise), worst.get(seen.name, (0.0, 0.0)))
    if not compared:
        raise Skip("no batch norm with settled statistics saw eight examples")
    for name, (value, noise) in sorted(worst.items(), key=lambda item: -item[1][0])[:WORST]:
        message = (
            f"With the running statistics its output is {value:.2g} standard deviations from that "
        )
        message += (
            f"with the batch's; sampling explains {noise:.1g}, and half a deviation is a lot."
        )
        fix = "bnlib.statistics.recalibrate(model, loader)"
        yield Found("warning", name, value, DRIFT, message, fix)


def drift(norm: Norm, seen: Call) -> tuple[float, float]:
    """Return how far batch statistics are from the running ones, and what sampling explains."""
    assert norm.mean is not None
    assert norm.var is not None
    scale = norm.var + norm.eps
    shift = (seen.mean - norm.mean).square() / scale
    ratio = ((seen.var + norm.eps) / scale).sqrt()
    noise = seen.mean_error.square() / scale
    noise = noise + (seen.var_error / (2 * (seen.var + norm.eps)) * ratio).square()
    old = 2 / (2 - (norm.momentum or 0))  # the running average is of such batches too
    return float((shift + (ratio - 1).square()).mean().sqrt()), float((old * noise).mean().sqrt())


@rule("BN203", "few-values", "13-the-wrong-mode", "model", "batch")
def few_values(subject: Subject) -> Iterator[Found]:
    """Find a batch norm that normalizes with the batch, and gets few values per channel: N * H * W.

    One is an error, and PyTorch raises. Fewer than 16 are a warning: the standard error of the
    variance of 16 normal values is 37% of it.
    """
    norms = {norm.name: norm for norm in subject.norms}
    least: dict[str, int] = {}
    for seen in attempt(subject).calls:
        if norms[seen.name].uses_batch:
            least[seen.name] = min(seen.values, least.get(seen.name, seen.values))
    failed = attempt(subject).failed
    if failed is not None and not any(n < FEW for n in least.values()):
        raise failed
    for name, n in sorted(least.items(), key=lambda item: item[1]):
        if n < FEW:
            message = f"It gets {n} value{'s' * (n != 1)} per channel in a training batch. "
            message += "One has no variance; of 16, the variance is 37% off."
            fix = "DataLoader(..., batch_size=32, drop_last=True)"
            yield Found(
                "error" if n == 1 else "warning", name, n, 2 if n == 1 else FEW, message, fix
            )


@rule("BN204", "updates-per-step", "15-statistics-gone-wrong", "model", "batch")
def updates_per_step(subject: Subject) -> Iterator[Found]:
    """Find a batch norm that one training step updates more than once, or (a note) not at all.

    With a loss, the step includes the backward pass, where activation checkpointing runs the layer
    again.
    """
    for name, n in whole_step(subject).updates.items():
        if n > 1:
            message = (
                f"One training step moves its statistics {n} times: the layer is shared, the model "
            )
            message += "is called several times, or checkpointing runs it again. Once is meant."
            fix = f"{at(name)}.momentum = bnlib.statistics.effective_momentum(momentum, 1 / {n})"
            yield Found("warning", name, n, 1, message, fix)
        elif n == 0:
            message = "The training step does not reach it. Once is meant."
            yield Found("note", name, 0, 1, message, f"{at(name)}  # is it in use?")


@rule("BN205", "moves-in-evaluation", "13-the-wrong-mode", "model", "batch")
def moves_in_evaluation(subject: Subject) -> Iterator[Found]:
    """Find buffers that evaluating a batch moves; none may. The value is the largest change."""
    for layer, change in evaluation(subject).moved.items():
        message = (
            f"Evaluating one batch moves its buffers by up to {change:.3g}: what is evaluated "
        )
        message += "leaks into the model. None may move."
        yield Found("error", layer, change, 0, message, f"{at(layer)}.eval()")


@rule("BN206", "recalibration-helps", "15-statistics-gone-wrong", "model", "batch", "loss")
def recalibration_helps(subject: Subject) -> Iterator[Found]:
    """Compare the loss in evaluation before and after recalibrating a copy.

    With a loader on its next eight batches, without on half of the batch; the loss is that of the
    rest. The value is the share of the loss that goes away; above 10% is a finding. In training,
    a model whose statistics still hold their initial values is skipped.
    """
    assert subject.model is not None
    if subject.model.training and any(norm.left > LEFT for norm in subject.norms):
        raise Skip("the statistics still hold their initial values, as training begins")
    half = size_of(subject.batch) // 2
    data, held = [subject.batch], subject.batch
    if subject.loader is not None:
        data = [given(subject, b) for b in islice(subject.loader, 1, RECALIBRATION + 1)] or data
    elif half > 1:
        data = [examples(held, slice(half))]
        held = examples(held, slice(half, None))
    model = copied(subject, training=False)
    before = evaluated(subject, model, held)
    try:
        recalibrate(model, [given(subject, batch) for batch in data], progress=False)
    except ValueError as reason:
        raise Skip(str(reason).rstrip(".")) from reason
    after = evaluated(subject, model, held)
    if not math.isfinite(after):
        raise Skip(f"the loss after recalibration is {after}")
    gain = (before - after) / max(abs(before), 1e-12) if math.isfinite(before) else math.inf
    if gain > GAIN:
        message = (
            f"Recalibrated, the loss in evaluation goes from {before:.3g} to {after:.3g}: the "
        )
        message += "running statistics do not fit the network. A tenth of the loss is a lot."
        fix = "bnlib.statistics.recalibrate(model, loader)"
        yield Found("warning", "", gain, GAIN, message, fix)


def evaluated(subject: Subject, model: nn.Module, batch: Any) -> float:
    """Return the loss of a batch; a loss may differentiate."""
    assert subject.loss is not None
    try:
        with torch.enable_grad():
            return float(subject.loss(model, given(subject, batch)).detach())
    except Exception as error:
        raise Skip(f"the loss in evaluation raised {described(error)}") from error


@rule("BN207", "gradient-penalty", "18-where-it-goes-in-a-gan", "model", "batch", "loss")
def gradient_penalty(subject: Subject) -> Iterator[Found]:
    """Find batch norms in training under a loss that penalises the gradient at single inputs.

    The loss does so if it asks torch.autograd.grad for a gradient at its inputs with
    create_graph=True. The value is the share of the first score's gradient, at the input of the
    batch norm, that lies at other examples. Without batch statistics it is exactly 0.
    Source: Gulrajani et al. (2017), section 4, "No critic batch normalization".
    """
    for name, share in whole_step(subject).cross.items():
        if share > CROSS:
            message = (
                f"The loss penalises the gradient of each score at its own input, but {share:.0%} "
            )
            message += "of it lies at other examples: batch statistics tie them. Without, it is 0."
            yield Found(
                "warning", name, share, CROSS, message, f"{at(name)}  # LayerNorm or GroupNorm"
            )


@rule("BN301", "last-batch-of-one", "13-the-wrong-mode", "model", "loader")
def last_batch_of_one(subject: Subject) -> Iterator[Found]:
    """Find a loader whose last batch has a single example: len(dataset) % batch_size == 1.

    An error if a batch norm gets one value per channel from one example, a warning if it gets fewer
    than 16, else a note.
    """
    loader = subject.loader
    if isinstance(loader, list | tuple):
        last = size_of(loader[-1]) if loader else 0
        size = max((size_of(batch) for batch in loader), default=0)
    elif isinstance(loader, DataLoader) and loader.batch_size is not None:
        try:
            n = len(loader.sampler)  # type: ignore[arg-type]
        except TypeError as error:
            raise Skip("the loader's data have no length") from error
        size = loader.batch_size
        last = size if loader.drop_last else n % size or size
    else:
        raise Skip("the loader does not tell the size of its last batch")
    if last != 1 or size == 1 or not subject.norms:
        return
    uses = {norm.name for norm in subject.norms if norm.uses_batch}
    try:
        calls = [seen for seen in attempt(subject).calls if seen.name in uses]
    except Skip:
        calls = []
    least = min((seen.values // seen.examples for seen in calls), default=1)
    severity: Severity = "error" if least == 1 else "warning" if least < FEW else "note"
    message = f"The last batch has one example, and a batch norm gets {least} value"
    message += f"{'s' * (least != 1)} per channel from it; of one value PyTorch makes an error."
    yield Found(severity, "", 1, 2, message, "DataLoader(..., drop_last=True)")


class _Reached(Exception):
    """The first batch norm has its input: the rest of the model need not run."""


@once
def first_inputs(subject: Subject) -> list[Tensor]:
    """Return the inputs of the first batch norm for some batches, averaged over positions."""
    model, found = copied(subject, training=False), list[Tensor]()

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = tensors([args, kwargs])[0].detach()
        found.append(x.double() if x.dim() < 3 else x.flatten(2).double().mean(2))
        raise _Reached

    for _, module in batch_norms(model):
        module.register_forward_pre_hook(stop, with_kwargs=True)
    for batch in islice(subject.loader or (), BATCHES):
        try:
            with torch.no_grad():
                call(model, given(subject, batch))
        except _Reached:
            pass
    return [x for x in found if len(x) > 1]


@rule("BN302", "not-iid", "15-statistics-gone-wrong", "model", "loader")
def not_iid(subject: Subject) -> Iterator[Found]:
    """Compare how much the means of a loader's batches vary with what chance makes them vary.

    The value is the variance of the batch means, at the first batch norm, over sigma**2 / n,
    averaged over channels. It is 1 for batches drawn at random, with a standard deviation of at
    most sqrt(2 / (k - 1)) over k batches; four of those above 1 is a finding. At most 20 batches
    are read.
    """
    data = first_inputs(subject)
    k, total = len(data), sum(len(x) for x in data)
    if k < 4:
        raise Skip("four batches of two or more that reach a batch norm are the least")
    everything = torch.cat(data)
    mean, var = everything.mean(0), everything.var(0)
    between = sum(len(x) * (x.mean(0) - mean).square() for x in data) / (k - 1)
    within = sum((x - x.mean(0)).square().sum(0) for x in data) / (total - k)
    alive = var > 1e-12 * var.max()
    if not alive.any():
        raise Skip("the inputs of the first batch norm are constant")
    value = float((between / var)[alive].mean() / (within / var)[alive].mean().clamp(min=1e-12))  # type: ignore[union-attr]
    limit = 1 + 4 * math.sqrt(2 / (k - 1))
    if value > limit:
        message = (
            f"The means of {k} batches vary {value:.3g} times as much as those of random batches; "
        )
        message += f"chance makes that {limit:.2g} at most. The data come sorted or in groups."
        yield Found("warning", "", value, limit, message, "DataLoader(..., shuffle=True)")
