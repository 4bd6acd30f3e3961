"""What the rules are, and those that read a model, an optimizer or a state dict and run nothing.

A rule is a function of a `Subject` that yields what it `Found`. Its docstring says what it finds
and, in a second paragraph that stands in the report too, why that is a mistake and where the
threshold comes from. `RULES` holds all rules by their slugs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import getdoc
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlib.doctor.report import Severity

SECTIONS = {
    "BN101": "13-the-wrong-mode#you-wake-the-dropout-and-batch-normalization-with-it",
    "BN102": "14-frozen-layers#you-freeze-the-parameters-and-the-layer-still-changes",
    "BN103": "15-statistics-gone-wrong#a-target-network-that-gets-the-parameters-alone",
    "BN104": "12-two-modes#you-evaluate-before-the-statistics-have-arrived",
    "BN105": "15-statistics-gone-wrong#one-nan-in-one-batch",
    "BN106": "01-normalize-a-batch#epsilon",
    "BN107": "14-frozen-layers#you-pass-epsilon-where-you-mean-momentum",
    "BN108": "12-two-modes#you-copy-a-momentum-from-the-other-side",
    "BN109": "12-two-modes#you-switch-tracking-off-and-eval-has-nothing-to-evaluate-with",
    "BN110": "15-statistics-gone-wrong#statistics-in-half-precision",
    "BN111": "14-frozen-layers#you-load-a-checkpoint-with-missing-keys",
    "BN112": "14-frozen-layers#weight-decay-on-gamma",
    "BN113": "14-frozen-layers#you-delete-the-bias-because-it-is-redundant",
    "BN114": "15-statistics-gone-wrong#dropout-before-batch-normalization",
    "BN201": "13-the-wrong-mode#the-answer-depends-on-the-companions",
    "BN202": "15-statistics-gone-wrong#trained-here-used-there",
    "BN203": "13-the-wrong-mode#one-value-per-channel",
    "BN204": "15-statistics-gone-wrong#counted-more-than-once",
    "BN205": "13-the-wrong-mode#you-only-look-and-the-statistics-move",
    "BN206": "15-statistics-gone-wrong#recalibrate-well",
    "BN207": "18-where-it-goes-in-a-gan#the-gradient-penalty",
    "BN301": "13-the-wrong-mode#the-last-batch-of-one",
    "BN302": "15-statistics-gone-wrong#a-pass-in-sorted-order",
}
SCRIPTED = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
STATISTICS = ("running_mean", "running_var")
RECALIBRATE = "bnlib.statistics.recalibrate(model, loader)"
Loss = Callable[[nn.Module, Any], Tensor]


class Skip(Exception):
    """A rule cannot be checked; the message says why, without a full stop."""


class Found(NamedTuple):
    """What a rule yields: of a `Finding`, the parts that differ from layer to layer."""

    severity: Severity
    layer: str
    value: float
    threshold: float
    said: str
    fix: str


@dataclass(frozen=True)
class Norm:
    """A batch norm of a model or of a state dict, its statistics in float64 on the CPU.

    A state dict does not tell the module and its mode, which are None, nor momentum and eps, which
    are PyTorch's defaults. A momentum of None is the cumulative average.
    """

    name: str
    module: Any = None
    mean: Tensor | None = None
    var: Tensor | None = None
    updates: int | None = None
    dtype: torch.dtype | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    training: bool | None = None

    @property
    def initial(self) -> bool:
        """Whether the statistics are those it was made with."""
        made = self.mean is not None and self.var is not None
        return made and not self.mean.any() and bool((self.var == 1).all())  # type: ignore[union-attr]

    @property
    def left(self) -> float:
        """The weight of the initial values in the statistics: (1 - momentum) ** updates.

        0 if that cannot be: with a variance under this weight, the layer did not begin at 1. So it
        is with weights that were loaded without their counter.
        """
        if self.initial:
            return 1.0
        if not self.updates or self.var is None or self.momentum is None:
            return 0.0
        left = (1 - self.momentum) ** self.updates
        return left if bool((self.var >= left * (1 - 1e-3)).all()) else 0.0

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
    wanted: Mapping[str, Any] | None = None  # what the checkpoint should have
    passes: dict[str, Any] = field(default_factory=dict)


Check = Callable[[Subject], Iterator[Found]]


@dataclass(frozen=True)
class Rule:
    """A rule: its names, and the parts of a `Subject` that it cannot do without."""

    id: str
    slug: str
    needs: tuple[str, ...]
    check: Check

    @property
    def why(self) -> str:
        """The second paragraph of its docstring."""
        return " ".join((getdoc(self.check) or "\n\n").split("\n\n")[1].split())

    @property
    def section(self) -> str:
        """The section of the book that shows the mistake: page#heading."""
        return SECTIONS[self.id]


RULES: dict[str, Rule] = {}


def rule(id: str, slug: str, *needs: str) -> Callable[[Check], Check]:
    """Enter a function into `RULES`. needs: attributes of the subject that may not be None."""

    def enter(check: Check) -> Check:
        RULES[slug] = Rule(id, slug, needs, check)
        return check

    return enter


def norms_of(model: nn.Module) -> list[Norm]:
    """Return the batch norms of a model, also those of a scripted one."""
    return [
        _norm_of(name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) or getattr(module, "original_name", "") in SCRIPTED
    ]


def _norm_of(name: str, module: Any) -> Norm:
    values: list[Any] = [getattr(module, key, None) for key in (*STATISTICS, "num_batches_tracked")]
    mean, var, count = (None if v is None or is_lazy(v) or v.is_meta else v.cpu() for v in values)
    rest = {key: getattr(module, key) for key in ("momentum", "eps") if hasattr(module, key)}
    return _norm(name, mean, var, count, module=module, training=module.training, **rest)


def norms_in(state: Mapping[str, Any]) -> list[Norm]:
    """Return the batch norms of a state dict: what has a running mean and a running variance."""
    found = []
    for name in dict.fromkeys(key.rpartition(".")[0] for key in state):
        keys = [f"{name}.{key}".lstrip(".") for key in (*STATISTICS, "num_batches_tracked")]
        mean, var, count = (state.get(key) for key in keys)
        if _is_vector(mean) and _is_vector(var):
            found.append(_norm(name, mean.cpu(), var.cpu(), count))  # type: ignore[union-attr]
    return found


def _norm(name: str, mean: Any, var: Any, count: Any, **rest: Any) -> Norm:
    if mean is not None and var is not None:
        rest |= {"mean": mean.double(), "var": var.double(), "dtype": var.dtype}
    if isinstance(count, Tensor) and count.numel() == 1:
        rest["updates"] = int(count)
    return Norm(name, **rest)


def _is_vector(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    return value.dim() == 1 and value.is_floating_point()


def at(name: str) -> str:
    """Return the expression for a layer in a fix."""
    return f'model.get_submodule("{name}")' if name else "model"


def is_frozen(subject: Subject, norm: Norm) -> bool:
    """Return whether no parameter of a batch norm is trained; if it has none, of its parent."""
    parent = subject.model.get_submodule(norm.name.rpartition(".")[0])  # type: ignore[union-attr]
    parameters = [*norm.module.parameters()] or [*parent.parameters()]
    return bool(parameters) and not any(p.requires_grad for p in parameters)


@rule("BN101", "mode-mismatch", "model")
def mode_mismatch(subject: Subject) -> Iterator[Found]:
    """Find a batch norm whose training flag is not that of the model.

    The limit is the model's own flag. In training, a batch norm makes outputs depend on the batch
    and moves its statistics; in evaluation, it does neither.

    Training in a model that evaluates is an error. Evaluation in a model that trains is a warning,
    unless the layer's parameters are frozen too: so one keeps a layer as it is.
    """
    root = subject.model.training  # type: ignore[union-attr]
    for norm in subject.norms:
        if norm.training and not root:
            yield Found("error", norm.name, 1, 0, "It trains, the model evaluates.", "model.eval()")
        elif root and not norm.training and not is_frozen(subject, norm):
            said = "It evaluates, the model trains, and its gamma and beta are not frozen."
            yield Found("warning", norm.name, 0, 1, said, "model.train()")


@rule("BN102", "frozen-but-training", "model")
def frozen_but_training(subject: Subject) -> Iterator[Found]:
    """Find a batch norm whose parameters are frozen while its statistics move.

    requires_grad freezes gamma and beta alone; a frozen layer is to take nothing from a batch.

    A batch norm without parameters counts as frozen if all parameters of its parent are. The value
    is the share of its statistics that the next batch replaces.
    """
    for norm in subject.norms:
        share = norm.momentum if norm.momentum is not None else 1 / ((norm.updates or 0) + 1)
        if norm.training and norm.mean is not None and share and is_frozen(subject, norm):
            said = f"Its parameters are frozen, yet a batch replaces {share:.3g} of its statistics."
            yield Found("warning", norm.name, share, 0, said, f"{at(norm.name)}.eval()")


@rule("BN103", "never-updated")
def never_updated(subject: Subject) -> Iterator[Found]:
    """Find statistics that are what they were made with.

    One batch is the least; without, evaluation normalizes with a mean of 0 and a variance of 1.

    An error where they are in use: in evaluation, and in a state dict. In training, where every
    model begins so, a warning if half of the batch norms have moved, or if this one counted
    batches. A counter of 0 beside other statistics is fine: old checkpoints have no counter.
    """
    still = [norm for norm in subject.norms if norm.initial]
    few = 2 * len(still) <= sum(norm.mean is not None for norm in subject.norms)
    for norm in still:
        if not norm.training or norm.updates or few:
            severity: Severity = "warning" if norm.training else "error"
            said = "Its running mean is 0 and its running variance 1 in every channel."
            yield Found(severity, norm.name, 0, 1, said, RECALIBRATE)


@rule("BN105", "non-finite-statistics")
def non_finite_statistics(subject: Subject) -> Iterator[Found]:
    """Find channels whose running mean or variance is NaN or infinite, or the variance negative.

    None may be: evaluation gives NaN, and no later batch mends it, since 0.9 times NaN is NaN.
    """
    for norm in subject.norms:
        if norm.mean is not None and norm.var is not None:
            bad = ~(norm.mean.isfinite() & norm.var.isfinite() & (norm.var >= 0))
            if bad.any():
                said = f"{int(bad.sum())} of {len(bad)} channels: NaN, infinite or negative."
                fix = "bnlib.statistics.recalibrate(model, clean_loader)"
                yield Found("error", norm.name, int(bad.sum()), 0, said, fix)


@rule("BN106", "dead-channel")
def dead_channel(subject: Subject) -> Iterator[Found]:
    """Find channels whose variance is below 1e-5, PyTorch's eps: their share of the layer.

    They are constant, or so small that eps scales them. Weight decay, dead ReLUs and the black
    border of MNIST leave some in healthy networks; half of a layer is a mistake.

    From half on a warning, below a note. What is left of the initial variance is subtracted first.
    """
    for norm in subject.norms:
        if norm.var is None or norm.left == 1 or not norm.var.isfinite().all():
            continue
        dead = (norm.var - norm.left) / (1 - norm.left) < 1e-5
        share = float(dead.double().mean())
        if share > 0:
            said = f"{int(dead.sum())} of {len(dead)} channels have a variance below 1e-5."
            severity: Severity = "warning" if share >= 0.5 else "note"
            fix = "# look for dead ReLUs, zero weights or a constant input before it"
            yield Found(severity, norm.name, share, 0.5, said, fix)


@rule("BN107", "eps-out-of-range", "model")
def eps_out_of_range(subject: Subject) -> Iterator[Found]:
    """Find an eps that is 0 or less, or above 1e-2.

    PyTorch's default is 1e-5, Keras's 1e-3; above ten times that, eps is part of the scale. It is
    the second argument of a batch norm, where people put a momentum or a width.
    """
    for norm in subject.norms:
        fix = f"{at(norm.name)}.eps = 1e-5"
        if norm.eps > 1e-2:
            said = f"With {norm.eps:g}, a variance of 1 comes out as {1 / (1 + norm.eps):.3g}."
            yield Found("warning", norm.name, norm.eps, 1e-2, said, fix)
        elif norm.eps <= 0:
            said = f"With {norm.eps:g}, a constant channel divides by 0."
            yield Found("error" if norm.eps else "warning", norm.name, norm.eps, 0, said, fix)


@rule("BN108", "momentum-convention", "model")
def momentum_convention(subject: Subject) -> Iterator[Found]:
    """Find a momentum above 0.5.

    Above a half, the newest batch outweighs all before it. PyTorch's momentum is the weight of the
    new batch, Keras's that of the old statistics: 0.99 there is 0.01 here.
    """
    for norm in subject.norms:
        if norm.momentum is not None and norm.momentum > 0.5:
            said = f"The newest batch makes up {norm.momentum:.0%} of the running statistics."
            fix = f"{at(norm.name)}.momentum = {1 - norm.momentum:.3g}"
            yield Found("warning", norm.name, norm.momentum, 0.5, said, fix)


@rule("BN109", "no-running-statistics", "model")
def no_running_statistics(subject: Subject) -> Iterator[Found]:
    """Find a batch norm without running statistics.

    Without its two, the mean and the variance, it normalizes with the batch in evaluation too.
    """
    for norm in subject.norms:
        if getattr(norm.module, "running_mean", None) is None:
            said = "It has no running statistics."
            fix = f"{at(norm.name)}  # make it with track_running_stats=True"
            yield Found("warning", norm.name, 0, 2, said, fix)


@rule("BN110", "half-precision-statistics")
def half_precision_statistics(subject: Subject) -> Iterator[Found]:
    """Find running statistics with fewer digits than float32: the distance from 1 to the next one.

    Updates smaller than half that distance are lost, large variances overflow and small ones become
    0. The limit is float32's.

    In a model that evaluates, a note: nothing is added to them any more.
    """
    limit = torch.finfo(torch.float32).eps
    for norm in subject.norms:
        if norm.dtype is not None and torch.finfo(norm.dtype).eps > limit:
            severity: Severity = "note" if norm.training is False else "warning"
            said, fix = f"Its running variance is {norm.dtype}.", f"{at(norm.name)}.float()"
            yield Found(severity, norm.name, torch.finfo(norm.dtype).eps, limit, said, fix)


@rule("BN111", "missing-keys", "checkpoint", "wanted")
def missing_keys(subject: Subject) -> Iterator[Found]:
    """Find batch norms whose entries a checkpoint lacks, has in another shape, or has too many of.

    None may be missing or left over: with strict=False, a model keeps what it was made with.

    What is missing is an error, but for a counter, a note: files from before PyTorch 0.4.1 have
    none. What is left over is a warning.
    """
    state, wanted = subject.checkpoint or {}, subject.wanted or {}
    fix = "model.load_state_dict(state_dict)  # strict"
    norms = [*subject.norms, *norms_in(wanted), *norms_in(state)]
    for name in dict.fromkeys(norm.name for norm in norms):
        prefix = f"{name}." if name else ""
        keys = [prefix + k for k in ("weight", "bias", *STATISTICS, "num_batches_tracked")]
        missing = [k for k in keys if k in wanted and _shape(state, k) != _shape(wanted, k)]
        extra = [k for k in keys if k in state and k not in wanted]
        if missing:
            counter = missing == [f"{prefix}num_batches_tracked"]
            said = f"The checkpoint lacks {', '.join(missing)}, or has another shape."
            yield Found("note" if counter else "error", name, len(missing), 0, said, fix)
        if extra:
            said = f"The checkpoint has {', '.join(extra)}, for which there is no place."
            yield Found("warning", name, len(extra), 0, said, fix)


def _shape(state: Mapping[str, Any], key: str) -> Any:
    return getattr(state.get(key), "shape", None)


@rule("BN112", "weight-decay", "model", "optimizer")
def weight_decay(subject: Subject) -> Iterator[Found]:
    """Note a gamma or beta that the optimizer decays toward 0.

    Recipes that set gamma and beta apart give them 0. Opinions differ: measure.
    """
    groups = subject.optimizer.param_groups  # type: ignore[union-attr]
    decays = {id(p): float(g.get("weight_decay") or 0) for g in groups for p in g["params"]}
    fix = 'SGD([{"params": others}, {"params": of_batch_norms, "weight_decay": 0}])'
    for norm in subject.norms:
        decay = max((decays.get(id(p), 0.0) for p in norm.module.parameters()), default=0.0)
        if decay > 0:
            said = f"A weight decay of {decay:g} pulls its gamma and beta toward 0."
            yield Found("note", norm.name, decay, 0, said, fix)
