"""The rules that run the model, or look at its loader.

Their passes are in `bnlib.doctor.passes`. Three need no batch, and see more with one.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import DataLoader

from bnlib.doctor.checks import RECALIBRATE, RULES, Found, Skip, Subject, at, rule
from bnlib.doctor.passes import (
    attempt,
    copied,
    described,
    distances,
    evaluation,
    examples,
    given,
    layers_before,
    left_of,
    once,
    rows_of,
    size_of,
    tensors,
    unwrapped,
    whole_step,
)
from bnlib.doctor.report import Severity
from bnlib.statistics import batch_norms, call, recalibrate

__all__ = ["RULES"]

# Alpha dropout is none of them: it keeps the variance.
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
LEFT = 0.1
DROPOUT = 0.1
ROUNDING = 1e-3
DRIFT = 0.5
ERRORS = 2.5  # standard errors, for BN202 and BN206
FEW = 16
GAIN, PARTS = 0.3, 8
CROSS = 1e-3
BATCHES = 20


@rule("BN104", "initial-value-left")
def initial_value_left(subject: Subject) -> Iterator[Found]:
    """Find statistics in which the initial 0 and 1 weigh more than 10%: (1 - momentum) ** updates.

    Above a tenth, a channel whose variance is 0.1 is scaled as if it were 0.19 or more. PyTorch's
    momentum of 0.1 is below from 22 updates on.

    In a model that trains, a note: more steps mend it. Silent if the variances, or a batch, show
    that the statistics hold no initial values. A state dict does not tell its momentum: 0.1 there.
    """
    for norm in subject.norms:
        left = left_of(subject, norm)
        if LEFT < left < 1:
            said = f"{norm.updates} updates of momentum {norm.momentum:g} leave {left:.0%} of them."
            severity: Severity = "note" if norm.training else "warning"
            yield Found(severity, norm.name, left, LEFT, said, RECALIBRATE)


@rule("BN113", "redundant-bias", "model")
def redundant_bias(subject: Subject) -> Iterator[Found]:
    """Note a bias right before a batch norm that normalizes with the batch.

    The mean of the batch takes it out again, and beta does its work; none is needed. It is not
    redundant where the running mean is subtracted.
    """
    for norm, chain in layers_before(subject):
        layer = next((m for m in reversed(chain) if not isinstance(m, nn.Identity)), None)
        if norm.uses_batch and isinstance(layer, nn.Linear | _ConvNd) and layer.bias is not None:
            n, kind = layer.bias.numel(), type(layer).__name__
            said = f"The {kind} before it has a bias of {n} numbers."
            yield Found("note", norm.name, n, 0, said, f"nn.{kind}(..., bias=False)")


@rule("BN114", "dropout-before", "model")
def dropout_before(subject: Subject) -> Iterator[Found]:
    """Find dropout before a batch norm, with no other normalization between.

    Dropout of p widens values around 0 to 1 / (1 - p) times their variance, in training alone: the
    running variance is too large for evaluation. Up to p = 0.1 it is within 11%.

    Source: Li, Chen, Hu and Yang (2019), arXiv 1801.05134.
    """
    for norm, chain in layers_before(subject):
        p = max((m.p for m in chain if isinstance(m, DROPOUTS)), default=0)
        if norm.mean is not None and p > DROPOUT:
            said = f"Its inputs come through dropout of {p:g}."
            fix = "# put dropout behind the last batch norm"
            yield Found("warning", norm.name, p, DROPOUT, said, fix)


@rule("BN201", "batch-dependent", "model", "batch")
def batch_dependent(subject: Subject) -> Iterator[Found]:
    """Find outputs of one example, in evaluation, that change with its companions.

    They must not. In eight known networks rounding gave 0, one batch norm in training 0.017 and up.

    The first example is evaluated among the first eight, and among copies of itself: some models
    refuse a batch of one, and copies that come out different tell a random output. The value is the
    largest difference over the largest output. The layer is the first whose input agrees and whose
    output does not.
    """
    there = evaluation(subject)
    n = len(there.rows[-1].y) if there.rows else 0
    if n < 2 or not there.rows[-1].y.numel():
        raise Skip("the output in evaluation has no row for each of two or more examples")
    alone = rows_of(there.model, given(subject, examples(subject.batch, [0] * n)))
    ours, theirs = alone[-1].y, there.rows[-1].y
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        raise Skip("the output in evaluation is not finite")
    limit = max(ROUNDING, 32 * torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0)
    if unlike(ours, ours[:1].expand_as(ours)) > limit:
        raise Skip("the output in evaluation is random")
    value = unlike(ours[0], theirs[0])
    if value > limit:
        names = (
            a.name
            for a, b in zip(alone[:-1], there.rows, strict=False)
            if a.name == b.name and unlike(a.x, b.x) <= limit < unlike(a.y[0], b.y[0])
        )
        name = next((unwrapped(subject.model)[1] + name for name in names), "")
        said = f"Beside copies of itself, the first example comes out {value:.2g} of its size away."
        yield Found("error", name, value, limit, said, f"{at(name)}.eval()")


def unlike(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors over their largest value."""
    if a.shape != b.shape or not a.numel():
        return math.inf if a.shape != b.shape else 0.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max()).clamp(min=1e-30))


@rule("BN202", "statistics-drift", "model", "batch")
def statistics_drift(subject: Subject) -> Iterator[Found]:
    """Find running statistics that are far from those of the batch, worst layers first.

    The value is how far apart the outputs with the two are, in standard deviations. Half a one and
    2.5 times what chance gives: of 48 healthy networks, none was above both in 960 trials.

    At most five layers. Statistics that are mostly initial values are left to BN103 and BN104.
    """
    norms = {norm.name: norm for norm in subject.norms}
    calls = [c for c in whole_step(subject).calls if norms[c.name].mean is not None]
    calls = [c for c in calls if c.examples >= 8 and left_of(subject, norms[c.name]) <= LEFT]
    if not calls:
        raise Skip("no batch norm with settled statistics saw eight examples")
    worst: dict[str, tuple[float, float]] = {}
    for seen in calls:
        own, mixed, error = distances(norms[seen.name], seen)
        if (value := min(own, mixed)) > max(DRIFT, ERRORS * error, *worst.get(seen.name, [0])):
            worst[seen.name] = value, error
    for name, (value, error) in sorted(worst.items(), key=lambda item: -item[1][0])[:5]:
        said = f"Its running statistics are {value:.2g} from the batch's; chance gives {error:.2g}."
        yield Found("warning", name, value, DRIFT, said, RECALIBRATE)


@rule("BN203", "few-values", "model", "batch")
def few_values(subject: Subject) -> Iterator[Found]:
    """Find a batch norm that normalizes with the batch and gets few values per channel: N * H * W.

    One value has no variance, and PyTorch raises. With fewer than 16 normal values, the standard
    error of their variance is above a third of it.
    """
    step, least = attempt(subject), dict[str, int]()
    uses_batch = {norm.name for norm in subject.norms if norm.uses_batch}
    for seen in step.calls:
        if seen.name in uses_batch and seen.values < FEW:
            least[seen.name] = min(seen.values, least.get(seen.name, FEW))
    if step.failed is not None and not least:
        raise step.failed
    for name, n in least.items():
        severity: Severity = "error" if n == 1 else "warning"
        said = f"It gets {n} value{'s' * (n > 1)} per channel in a training batch."
        fix = "DataLoader(..., batch_size=32, drop_last=True)"
        yield Found(severity, name, n, 2 if n == 1 else FEW, said, fix)


@rule("BN204", "updates-per-step", "model", "batch")
def updates_per_step(subject: Subject) -> Iterator[Found]:
    """Find a batch norm that one training step updates more than once or, a note, never.

    Once is meant. More often, the layer is shared, the model is called again, or checkpointing runs
    it twice: the momentum acts as a larger one, on other data.

    The step includes the backward pass if there is a loss; without, checkpointing does not show.
    """
    for name, n in whole_step(subject).updates.items():
        if n > 1:
            said = f"A training step moves its statistics {n} times."
            fix = f"{at(name)}.momentum = bnlib.statistics.effective_momentum(momentum, 1 / {n})"
            yield Found("warning", name, n, 1, said, fix)
        elif n == 0:
            said = "A training step does not reach it."
            yield Found("note", name, 0, 1, said, f"{at(name)}  # is it in use?")


@rule("BN205", "moves-in-evaluation", "model", "batch")
def moves_in_evaluation(subject: Subject) -> Iterator[Found]:
    """Find floating-point buffers that an evaluation moves; the value is the largest change.

    None may move: what is evaluated leaks into the model.
    """
    for name, change in evaluation(subject).moved.items():
        said = f"Evaluating the batch moves its buffers by up to {change:.3g}."
        yield Found("error", name, change, 0, said, f"{at(name)}.eval()")


@rule("BN206", "recalibration-helps", "model", "batch", "loss")
def recalibration_helps(subject: Subject) -> Iterator[Found]:
    """Compare the loss in evaluation before and after recalibrating a copy.

    More than 0.3 of it goes away, by more than 2.5 standard errors: in 1,536 trials on 64 healthy
    networks that came once.

    Recalibrated with the loader's next eight batches, without a loader with half of the batch; the
    loss is that of the others, in eight parts. A model that trains and still holds initial values
    is skipped.
    """
    if subject.model.training and any(left_of(subject, norm) > LEFT for norm in subject.norms):  # type: ignore[union-attr]
        raise Skip("the statistics still hold their initial values, as when training begins")
    held, half = subject.batch, size_of(subject.batch) // 2
    data = list(islice(() if subject.loader is None else subject.loader, 1, 9))
    if not data:
        data, held = [examples(held, slice(half))], examples(held, slice(half, None))
    if size_of(held) < 2 * PARTS:
        raise Skip(f"to tell a gain from chance takes a loader, or a batch of {4 * PARTS}")
    model = copied(subject, training=False)
    before = losses(subject, model, held)
    try:
        recalibrate(model, [given(subject, batch) for batch in data], progress=False)
    except ValueError as reason:
        raise Skip(str(reason).rstrip(".")) from reason
    after = losses(subject, model, held)
    if not after.isfinite().all():
        raise Skip("the loss is not finite after recalibration either")
    was, gain, error = before.mean(), (before - after).mean(), (before - after).std() / PARTS**0.5
    share = float(gain / was.abs()) if was.isfinite() else math.inf
    said = f"The loss in evaluation goes from {was:.3g} to {after.mean():.3g}."
    if share == math.inf or (share > GAIN and gain > ERRORS * error):
        yield Found("warning", "", share, GAIN, said, RECALIBRATE)


def losses(subject: Subject, model: nn.Module, batch: Any) -> Tensor:
    """Return the losses of the parts of a batch; with gradients if it is not to be had without."""

    def of_parts() -> Tensor:
        parts = (given(subject, examples(batch, slice(i, None, PARTS))) for i in range(PARTS))
        return torch.stack([subject.loss(model, part).detach().cpu() for part in parts])  # type: ignore[misc]

    try:
        with suppress(RuntimeError), torch.no_grad():
            return of_parts()
        with torch.enable_grad():
            return of_parts()
    except Exception as error:
        raise Skip(f"the loss in evaluation raised {described(error)}") from error


@rule("BN207", "gradient-penalty", "model", "batch", "loss")
def gradient_penalty(subject: Subject) -> Iterator[Found]:
    """Find batch norms that use the batch under a loss that penalises gradients at the inputs.

    The penalty is meant for each example's own gradient. Batch statistics spread it over the batch;
    without them, the share at other examples is exactly 0.

    The loss does so if it calls torch.autograd.grad with create_graph=True. Source: Gulrajani et
    al. (2017), section 4, "No critic batch normalization".
    """
    for name, share in whole_step(subject).cross.items():
        if share > CROSS:
            said = f"{share:.0%} of the first score's gradient, at its input, is at other examples."
            fix = f"{at(name)}  # GroupNorm or LayerNorm in its place"
            yield Found("warning", name, share, CROSS, said, fix)


@rule("BN301", "last-batch-of-one", "model", "loader")
def last_batch_of_one(subject: Subject) -> Iterator[Found]:
    """Find a loader whose last batch is a single example: len(dataset) % batch_size == 1.

    Two are the least: where a batch norm gets one value per channel, PyTorch raises, at the end of
    the first epoch.

    An error if a batch norm gets one value from one example, a warning below 16, else a note.
    """
    loader = subject.loader
    if isinstance(loader, list | tuple):
        last, size = size_of(loader[-1:]), max(map(size_of, loader), default=0)
    elif isinstance(loader, DataLoader) and loader.batch_size is not None:
        try:
            n, size = len(loader.sampler), loader.batch_size  # type: ignore[arg-type]
        except TypeError as error:
            raise Skip("the loader's data have no length") from error
        last = size if loader.drop_last else n % size or size
    else:
        raise Skip("the loader does not tell the size of its last batch")
    uses_batch = {norm.name for norm in subject.norms if norm.uses_batch}
    if last == 1 and size > 1 and uses_batch:
        calls = []
        with suppress(Skip):
            calls = [c for c in attempt(subject).calls if c.name in uses_batch]
        least = min((c.values // c.examples for c in calls), default=1)
        severity: Severity = "error" if least == 1 else "warning" if least < FEW else "note"
        said = f"The last batch has one example; a batch norm gets {least} per channel from it."
        yield Found(severity, "", 1, 2, said, "DataLoader(..., drop_last=True)")


class _Reached(Exception):
    """The first batch norm has its input; the rest of the model need not run."""


@once
def first_inputs(subject: Subject) -> list[Tensor]:
    """Return the inputs of the first batch norm for some batches, averaged over positions."""
    model, found = copied(subject, training=False), list[Tensor]()

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = tensors([args, kwargs])[0].detach().double()
        found.append(x if x.dim() < 3 else x.flatten(2).mean(2))
        raise _Reached

    for _, module in batch_norms(model):
        module.register_forward_pre_hook(stop, with_kwargs=True)
    for batch in islice(subject.loader, BATCHES):  # type: ignore[arg-type]
        with suppress(_Reached), torch.no_grad():
            call(model, given(subject, batch))
    return [x for x in found if len(x) > 1]


@rule("BN302", "not-iid", "model", "loader")
def not_iid(subject: Subject) -> Iterator[Found]:
    """Compare how much the means of a loader's batches vary with what chance makes them vary.

    The value is the variance of the means over sigma**2 / n. Batches drawn at random give 1, with a
    standard deviation of at most sqrt(2 / (batches - 1)); the limit is four of those above.

    At the first batch norm, averaged over its channels, for at most 20 batches.
    """
    data = first_inputs(subject)
    k, everything = len(data), torch.cat([*data, torch.empty(0)])
    if k < 4:
        raise Skip("four batches of two or more that reach a batch norm are the least")
    mean, var = everything.mean(0), everything.var(0)
    between = torch.stack([len(x) * (x.mean(0) - mean).square() for x in data]).sum(0) / (k - 1)
    within = torch.stack([(x - x.mean(0)).square().sum(0) for x in data]).sum(0)
    alive = var > 1e-12 * var.max()
    if not alive.any():
        raise Skip("the inputs of the first batch norm are constant")
    within = (within / var)[alive].mean() / (len(everything) - k)
    value = float((between / var)[alive].mean() / within.clamp(min=1e-12))
    limit = 1 + 4 * math.sqrt(2 / (k - 1))
    if value > limit:
        said = f"The means of {k} batches vary {value:.3g} times as much as those of random ones."
        yield Found("warning", "", value, limit, said, "DataLoader(..., shuffle=True)")
