"""Find batch-norm mistakes in a PyTorch model, its loader, or a checkpoint.

    report = diagnose(model, batch, optimizer=optimizer, loader=loader, loss=loss)
    report                                 a table; report.findings, report.ok, report.to_json()

    python -m bnlib.doctor checkpoint.pt   the same for a state dict

Nothing is changed: the model's flags, buffers, parameters, gradients and hooks, and the random
generators are afterwards bit for bit what they were before, also if the model raises.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from bnlib.doctor import probes
from bnlib.doctor.checks import Loss, Rule, Skip, Subject, norms_in, norms_of
from bnlib.doctor.passes import described, restored
from bnlib.doctor.report import BOOK, Finding, Report
from bnlib.statistics import as_before

__all__ = ["RULES", "Finding", "Report", "Rule", "diagnose", "diagnose_state"]

RULES: dict[str, Rule] = dict(sorted(probes.RULES.items(), key=lambda item: item[1].id))
ASKED = {
    "model": "the model: diagnose(model)",
    "batch": "a batch: diagnose(model, batch)",
    "optimizer": "the optimizer: diagnose(model, optimizer=optimizer)",
    "loader": "the loader: diagnose(model, loader=loader)",
    "loss": "a loss: diagnose(model, batch, loss=loss)",
    "checkpoint": "a state dict beside the model: diagnose(model, checkpoint=state_dict)",
    "wanted": "a second file: --against other.pt",
}


def diagnose(
    model: nn.Module,
    batch: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loader: Iterable[Any] | None = None,
    loss: Loss | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Look for batch-norm mistakes in a model; change nothing.

    model: any module, in the mode and state in which it trains or evaluates.
    batch: what one step gives the model: a tensor, (inputs, labels), or a dict of keyword
        arguments, as `bnlib.statistics.call` takes it. Without one, the loader's first.
    optimizer: for the rule on weight decay.
    loader: any iterable of batches; at most 20 are read.
    loss: a function loss(model, batch) that returns a scalar. It gets a copy of the model.
    checkpoint: a state dict, to compare its keys with the model's.
    select, ignore: slugs of rules, such as "mode-mismatch"; all are checked without.

    The rules that run the model run copies of it. What cannot be copied or run is in the report's
    `skipped`, with the reason. Raises TypeError if model is no module, ValueError for an unknown
    slug.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    rules = _chosen(select, ignore)
    subject = Subject([], model, batch, optimizer, loader, loss, checkpoint)
    generator = getattr(loader, "generator", None)
    with ExitStack() as stack:
        stack.enter_context(as_before(model))
        stack.enter_context(torch.inference_mode(False))
        if isinstance(generator, torch.Generator):
            stack.callback(generator.set_state, generator.get_state())
        if loss is not None:
            stack.enter_context(restored(model))
        subject.norms = norms_of(model)
        subject.wanted = None if checkpoint is None else model.state_dict()
        if batch is None and loader is not None:
            try:
                subject.batch = next(iter(loader), None)
            except Exception as error:
                subject.passes["batch"] = Skip(f"the loader raised {described(error)}")
        return _report(subject, rules)


def diagnose_state(
    state_dict: Mapping[str, Any],
    *,
    against: Mapping[str, Any] | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Look for batch-norm mistakes in a state dict, and in its keys against those of another.

    Modes, eps and momenta are no part of a state dict; PyTorch's defaults are assumed. The layers
    are those with a running mean and a running variance. Raises ValueError for an unknown slug.
    """
    rules = _chosen(select, ignore)
    return _report(Subject(norms_in(state_dict), checkpoint=state_dict, wanted=against), rules)


def _chosen(select: Iterable[str], ignore: Iterable[str]) -> list[Rule]:
    select, ignore = [*select], [*ignore]
    for slug in (*select, *ignore):
        if slug not in RULES:
            raise ValueError(f"expected slugs of rules, got {slug!r}; known are {', '.join(RULES)}")
    return [rule for s, rule in RULES.items() if (not select or s in select) and s not in ignore]


def _report(subject: Subject, rules: Iterable[Rule]) -> Report:
    findings, checked, skipped = [], [], {}
    for rule in rules:
        page, _, anchor = rule.section.partition("#")
        link = f"{BOOK}chapters/{page}.html{anchor and '#'}{anchor}"
        try:
            for need in rule.needs:
                if getattr(subject, need) is None:
                    raise subject.passes.get(need) or Skip(f"it needs {ASKED[need]}")
            for severity, layer, value, threshold, said, fix in [*rule.check(subject)]:
                numbers = float(value), float(threshold)
                message = f"{said} {rule.why}"
                findings.append(
                    Finding(rule.id, rule.slug, severity, layer, *numbers, message, fix, link)
                )
            checked.append(rule.slug)
        except Skip as reason:
            skipped[rule.slug] = str(reason)
        except Exception as error:
            skipped[rule.slug] = f"the check raised {described(error)}"
    return Report(findings, checked, skipped, len(subject.norms))
