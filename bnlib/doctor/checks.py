"""The rules that read a model, an optimizer or a state dict and run nothing.

A rule is a function of a `Subject` that yields what it `Found`. `RULES` holds them all, in reading
order, by slug; those that run the model are in `bnlib.doctor.probes`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlib.doctor.report import Severity

STATISTICS = ("running_mean", "running_var")
LEFT = 0.1  # of the initial value: below a tenth, the variance of 1 it began with hardly shows
DEAD = 1e-5
SCRIPTED = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
Loss = Callable[[nn.Module, Any], Tensor]


class Skip(Exception):
    """A rule cannot be checked; the message says why, without a full stop."""


class Found(NamedTuple):
    """What a rule yields: the parts of a `Finding` that it alone knows."""

    severity: Severity
    layer: str
    value: float
    threshold: float
    message: str
    fix: str


@dataclass(frozen=True)
class Norm:
    """A batch norm of a model or of a state dict, its statistics in float64 on the CPU.

    What a state dict does not tell is None (module, training, momentum) or PyTorch's default (eps).
    """

    name: str
    module: Any
    mean: Tensor | None
    var: Tensor | None
    updates: int | None
    dtype: torch.dtype | None
    momentum: float | None
    eps: float
    training: bool | None

    @property
    def initial(self) -> bool:
        """Whether the statistics are those it was made with."""
        if self.mean is None or self.var is None:
            return False
        return not self.mean.any() and bool((self.var == 1).all())

    @property
    def left(self) -> float:
        """The weight of the initial values in the statistics: (1 - momentum) ** updates.

        0 when that cannot be: a variance under that weight did not begin at 1, as in weights that
        were loaded without their counter.
        """
        if self.initial:
            return 1.0
        if not self.updates or self.var is None or (self.module and self.momentum is None):
            return 0.0
        left = (1 - (0.1 if self.momentum is None else self.momentum)) ** self.updates
        return float(left) if (self.var >= left * (1 - 1e-3)).all() else 0.0

    @property
    def uses_batch(self) -> bool:
        """Whether it normalizes with the batch, in the mode that it is in."""
        return bool(self.training) or self.mean is None


@dataclass
class Subject:
    """All that a diagnosis was given, and what the passes through the model have shown."""

    norms: list[Norm]
    model: nn.Module | None = None
    batch: Any = None
    optimizer: torch.optim.Optimizer | None = None
    loader: Iterable[Any] | None = None
    loss: Loss | None = None
    checkpoint: Mapping[str, Any] | None = None
    expected: Mapping[str, Any] | None = None
    passes: dict[str, Any] = field(default_factory=dict)


Check = Callable[[Subject], Iterator[Found]]


@dataclass(frozen=True)
class Rule:
    """A rule: its names, the section of the book that reproduces the mistake, what it needs."""

    id: str
    slug: str
    section: str
    needs: tuple[str, ...]
    check: Check


RULES: dict[str, Rule] = {}


def rule(id: str, slug: str, section: str, *needs: str) -> Callable[[Check], Check]:
    """Enter a function into `RULES`. needs: the attributes of the subject that may not be None."""

    def enter(check: Check) -> Check:
        RULES[slug] = Rule(id, slug, section, needs, check)
        return check

    return enter


def norms_of(model: nn.Module) -> list[Norm]:
    """Return the batch norms of a model, also those of a scripted one."""
    return [_norm_of(name, module) for name, module in model.named_modules() if _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or getattr(module, "original_name", "") in SCRIPTED


def _norm_of(name: str, module: Any) -> Norm:
    values: list[Any] = [getattr(module, key, None) for key in (*STATISTICS, "num_batches_tracked")]
    mean, var, count = (
        None if value is None or is_lazy(value) or value.is_meta else value.detach().cpu()
        for value in values
    )
    return Norm(
        name=name,
        module=module,
        mean=None if mean is None else mean.double(),
        var=None if var is None else var.double(),
        updates=None if count is None else int(count),
        dtype=None if var is None else var.dtype,
        momentum=getattr(module, "momentum", None),
        eps=getattr(module, "eps", 1e-5),
        training=module.training,
    )


def norms_in(state: Mapping[str, Any]) -> list[Norm]:
    """Return the batch norms of a state dict: what has a running mean and a running variance."""
    found = []
    for key, mean in state.items():
        name, _, last = key.rpartition(".")
        var, count = (
            state.get(f"{name}.{k}".lstrip(".")) for k in ("running_var", "num_batches_tracked")
        )
        if last == "running_mean" and _is_vector(mean) and _is_vector(var):
            updates = int(count) if isinstance(count, Tensor) and count.numel() == 1 else None
            statistics = mean.detach().cpu().double(), var.detach().cpu().double()
            found.append(Norm(name, None, *statistics, updates, var.dtype, None, 1e-5, None))
    return found


def _is_vector(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() == 1
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_meta
    )


def at(name: str) -> str:
    """Return the expression for a layer in a fix."""
    return f'model.get_submodule("{name}")' if name else "model"


@rule("BN101", "mode-mismatch", "13-the-wrong-mode", "model")
def mode_mismatch(subject: Subject) -> Iterator[Found]:
    """Find a batch norm whose training flag is not that of the model.

    In training while the model evaluates: an error. In evaluation while the model trains: a
    warning, unless its parameters are frozen too, as one does to a layer that is to stay as it is.
    The threshold is the model's own flag.
    """
    root = subject.model.training  # type: ignore[union-attr]
    for norm in subject.norms:
        if norm.training and not root:
            message = "It trains while the model evaluates: outputs depend on the batch, and every "
            message += "call moves the statistics. The limit is the model's own flag."
            yield Found("error", norm.name, 1, 0, message, "model.eval()")
        elif root and not norm.training and not _frozen(subject, norm):
            message = "It evaluates while the model trains, and its parameters are trained. "
            message += "The limit is the model's own flag."
            yield Found("warning", norm.name, 0, 1, message, "model.train()")


@rule("BN102", "frozen-but-training", "14-frozen-layers", "model")
def frozen_but_training(subject: Subject) -> Iterator[Found]:
    """Find a batch norm whose parameters are frozen while its statistics move.

    The value is the share by which one batch moves them, the momentum; none may be.
    """
    for norm in subject.norms:
        momentum = 1 / ((norm.updates or 0) + 1) if norm.momentum is None else norm.momentum
        if norm.training and norm.mean is not None and momentum and _frozen(subject, norm):
            message = (
                f"Its parameters do not require gradients, yet each batch replaces {momentum:.3g} "
            )
            message += "of its running statistics: requires_grad freezes gamma and beta alone."
            yield Found("warning", norm.name, momentum, 0, message, f"{at(norm.name)}.eval()")


def _frozen(subject: Subject, norm: Norm) -> bool:
    """Whether no parameter of a batch norm is trained or, if it has none, none of its parent's."""
    assert norm.module is not None
    parent = subject.model.get_submodule(norm.name.rpartition(".")[0])  # type: ignore[union-attr]
    parameters = [*norm.module.parameters()] or [*parent.parameters()]
    return bool(parameters) and not any(p.requires_grad for p in parameters)


@rule("BN103", "never-updated", "15-statistics-gone-wrong")
def never_updated(subject: Subject) -> Iterator[Found]:
    """Find statistics that are what they were made with: mean 0, variance 1.

    An error where they are used: in evaluation, and in a state dict. In training, where a new model
    begins so, a warning if at least half of the other layers have moved, or if this one counted
    updates. The value is the number of updates, the threshold one. A counter of 0 beside other
    statistics is no finding: old checkpoints have none.
    """
    still = [norm for norm in subject.norms if norm.initial]
    alone = 2 * len(still) <= sum(norm.mean is not None for norm in subject.norms)
    for norm in still:
        if not norm.training or norm.updates or alone:
            message = "Its running mean is 0 and its running variance 1, as they were made: no "
            message += "batch has moved them, and one is the least."
            severity: Severity = "warning" if norm.training else "error"
            fix = "bnlib.statistics.recalibrate(model, loader)"
            yield Found(severity, norm.name, norm.updates or 0, 1, message, fix)


@rule("BN104", "initial-value-left", "12-two-modes")
def initial_value_left(subject: Subject) -> Iterator[Found]:
    """Find statistics in which the initial values weigh more than 10%: (1 - momentum) ** updates.

    In a model that trains, a note: more steps mend it. A state dict does not tell its momentum;
    there it is PyTorch's 0.1. From 10% on, a channel of a hundredth of the initial variance seems
    more than ten times as wide as it is; below, PyTorch's default has had 22 updates.
    """
    for norm in subject.norms:
        if norm.left > LEFT and not norm.initial:
            momentum = "a momentum of 0.1" if norm.momentum is None else "its momentum"
            message = (
                f"After {norm.updates} updates with {momentum}, {norm.left:.0%} of the running "
            )
            message += "statistics are the 0 and 1 they began with; above a tenth, a channel of "
            message += "small variance is scaled far too low."
            severity: Severity = "note" if norm.training else "warning"
            fix = "bnlib.statistics.recalibrate(model, loader)"
            yield Found(severity, norm.name, norm.left, LEFT, message, fix)


@rule("BN105", "non-finite-statistics", "15-statistics-gone-wrong")
def non_finite_statistics(subject: Subject) -> Iterator[Found]:
    """Find channels whose running mean or variance is NaN or infinite, or the variance negative."""
    for norm in subject.norms:
        if norm.mean is not None and norm.var is not None:
            fine = norm.mean.isfinite() & norm.var.isfinite() & (norm.var >= 0)
            if bad := int((~fine).sum()):
                message = (
                    f"{bad} of {len(fine)} channels hold NaN, infinity or a negative variance. "
                )
                message += "No further batch mends that: 0.9 times NaN is NaN. None may."
                fix = "bnlib.statistics.recalibrate(model, clean_loader)"
                yield Found("error", norm.name, bad, 0, message, fix)


@rule("BN106", "dead-channel", "15-statistics-gone-wrong")
def dead_channel(subject: Subject) -> Iterator[Found]:
    """Find channels whose variance is below 1e-5, the usual eps: eps scales them, not the data.

    The value is their share of the layer. From half on, a warning; below, a note: weight decay and
    dead ReLUs leave some in healthy networks, and the border of MNIST is black in every image. What
    is left of the initial variance of 1 is subtracted first.
    """
    for norm in subject.norms:
        if norm.var is None or norm.left == 1:
            continue
        var = (norm.var - norm.left) / (1 - norm.left)
        share = float((var < DEAD).double().mean())
        if share > 0 and norm.var.isfinite().all():
            message = (
                f"{share:.0%} of its channels have a variance below eps, {norm.eps:g}: they are "
            )
            message += "constant, or so small that eps scales them. Half of a layer is no accident."
            severity: Severity = "warning" if share >= 0.5 else "note"
            fix = "look at the layer before: dead ReLUs, zero weights, a constant input"
            yield Found(severity, norm.name, share, 0.5, message, f"# {fix}")


@rule("BN107", "eps-out-of-range", "14-frozen-layers", "model")
def eps_out_of_range(subject: Subject) -> Iterator[Found]:
    """Find an eps that is 0 or less, or above 1e-2.

    PyTorch has 1e-5, Keras and TensorFlow 1e-3. Above ten times that, eps is part of the scale.
    """
    for norm in subject.norms:
        if not 0 < norm.eps <= 1e-2:
            message = f"With eps = {norm.eps:g}, "
            message += (
                f"a channel of variance 1 comes out with {1 / (1 + norm.eps):.3f}. The largest "
                "default in use is 1e-3. The second argument of a batch norm is eps."
                if norm.eps > 0
                else "a channel of variance 0 divides by 0."
            )
            limit = 1e-2 if norm.eps > 0 else 0
            severity: Severity = "error" if norm.eps < 0 else "warning"
            yield Found(
                severity, norm.name, norm.eps, limit, message, f"{at(norm.name)}.eps = 1e-5"
            )


@rule("BN108", "momentum-convention", "12-two-modes", "model")
def momentum_convention(subject: Subject) -> Iterator[Found]:
    """Find a momentum above 0.5: the newest batch outweighs all before it, as Keras's .99 would.

    PyTorch's momentum is the weight of the newest batch, Keras's that of the old statistics.
    """
    for norm in subject.norms:
        if norm.momentum is not None and norm.momentum > 0.5:
            message = (
                f"The newest batch makes up {norm.momentum:.0%} of the running statistics; above "
            )
            message += "half it outweighs all others. Keras's momentum is 1 minus PyTorch's."
            fix = f"{at(norm.name)}.momentum = {1 - norm.momentum:.3g}"
            yield Found("warning", norm.name, norm.momentum, 0.5, message, fix)


@rule("BN109", "no-running-statistics", "12-two-modes", "model")
def no_running_statistics(subject: Subject) -> Iterator[Found]:
    """Find a batch norm without running statistics: it uses the batch in evaluation too."""
    for norm in subject.norms:
        if norm.mean is None and not is_lazy(norm.module.running_mean):
            message = "It has no running statistics, so that it normalizes with the batch in "
            message += "evaluation too; two are needed."
            fix = f"{at(norm.name)}  # make it with track_running_stats=True"
            yield Found("warning", norm.name, 0, 2, message, fix)


@rule("BN110", "half-precision-statistics", "15-statistics-gone-wrong")
def half_precision_statistics(subject: Subject) -> Iterator[Found]:
    """Find running statistics with fewer digits than float32.

    The value is the distance from 1 to the next number, the threshold float32's. In a model that
    evaluates, a note: nothing is added to them any more.
    """
    limit = torch.finfo(torch.float32).eps
    for norm in subject.norms:
        if norm.dtype is not None and torch.finfo(norm.dtype).eps > limit:
            step = torch.finfo(norm.dtype).eps
            message = f"Its statistics are {norm.dtype}: an update that changes them by less than "
            message += f"{step / 2:.1g} of their value is lost. float32 keeps 6e-08."
            severity: Severity = "note" if norm.training is False else "warning"
            yield Found(severity, norm.name, step, limit, message, f"{at(norm.name)}.float()")


@rule("BN111", "missing-keys", "14-frozen-layers", "checkpoint", "expected")
def missing_keys(subject: Subject) -> Iterator[Found]:
    """Find batch norms whose entries a checkpoint lacks, has in another shape, or has too many of.

    Missing statistics or parameters are an error, a missing counter a note: files older than
    PyTorch 0.4.1 have none. Statistics that the model has no place for are a warning.
    """
    state, expected = subject.checkpoint or {}, subject.expected or {}
    names = dict.fromkeys(norm.name for norm in [*subject.norms, *norms_in(state)])
    fix = "model.load_state_dict(state)  # strict, and read what it says"
    for name in names:
        prefix = f"{name}." if name else ""
        keys = [prefix + k for k in ("weight", "bias", *STATISTICS, "num_batches_tracked")]
        missing = [k for k in keys if k in expected and _shape(state, k) != _shape(expected, k)]
        extra = [k for k in keys if k in state and k not in expected]
        if missing:
            message = f"The checkpoint lacks {', '.join(missing)}, or has another shape; with "
            message += "strict=False the model keeps what it was made with. None may be missing."
            counter = missing == [f"{prefix}num_batches_tracked"]
            yield Found("note" if counter else "error", name, len(missing), 0, message, fix)
        if extra:
            message = (
                f"The checkpoint has {', '.join(extra)}, for which there is no place. None may "
            )
            message += "be left over."
            yield Found("warning", name, len(extra), 0, message, fix)


def _shape(state: Mapping[str, Any], key: str) -> Any:
    return getattr(state.get(key), "shape", None)


@rule("BN112", "weight-decay", "14-frozen-layers", "model", "optimizer")
def weight_decay(subject: Subject) -> Iterator[Found]:
    """Note a gamma or beta that the optimizer decays toward 0; many recipes leave them out."""
    assert subject.optimizer is not None
    decayed = {
        id(p): float(group["weight_decay"])
        for group in subject.optimizer.param_groups
        for p in group["params"]
        if group.get("weight_decay")
    }
    for norm in subject.norms:
        assert norm.module is not None
        decay = max((decayed.get(id(p), 0.0) for p in norm.module.parameters()), default=0.0)
        if decay:
            message = (
                f"A weight decay of {decay:g} pulls its gamma and beta toward 0; recipes that "
            )
            message += "set them apart use 0. Opinions differ: measure."
            fix = 'optimizer = SGD([{"params": others}, {"params": norms, "weight_decay": 0}])'
            yield Found("note", norm.name, decay, 0, message, fix)
