"""Each rule finds its case at the right layer, is silent beside the threshold, changes nothing."""

import random
from dataclasses import replace

import cases
import numpy as np
import pytest
import torch

from bnlib import doctor
from bnlib.doctor import RULES, diagnose
from bnlib.statistics import batch_norms


def snapshot(arguments):
    """Return all that a diagnosis may not change, in a form that == compares bit for bit."""
    model = arguments["model"]
    tensors = [*model.parameters(), *model.buffers()]
    gradients = [p.grad for p in model.parameters()]
    batch = arguments.get("batch")
    inputs = [] if batch is None else [batch] if isinstance(batch, torch.Tensor) else [*batch]
    return {
        "identities": [id(x) for x in (*tensors, *gradients)],
        "bytes": [
            x.detach().numpy().tobytes() if x.dtype != torch.bfloat16 else x.detach().tolist()
            for x in (*tensors, *(g for g in gradients if g is not None), *inputs)
        ],
        "wants gradients": [x.requires_grad for x in (*tensors, *inputs)],
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            [[*hooks] for key, hooks in vars(module).items() if key.endswith("_hooks")]
            for module in model.modules()
        ],
        "settings": [(m.eps, m.momentum, m.track_running_stats) for _, m in batch_norms(model)],
        "random": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
        ),
        "gradients are on": torch.is_grad_enabled(),
    }


class Restless(torch.nn.Module):
    """Draws random numbers of every kind, and returns what it gets."""

    def forward(self, x):
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return x


def lively(arguments):
    """Add to a case what can be changed: gradients, hooks, use of the random generators."""
    model = arguments["model"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.register_forward_hook(lambda module, args, output: output)
    if isinstance(model, torch.nn.Sequential):
        model.append(Restless())
    return arguments


def made(case, beside=False):
    torch.manual_seed(3)
    return case.make(beside)


@pytest.mark.parametrize("case", cases.CASES, ids=repr)
class TestARule:
    def test_finds_its_case_at_its_layer(self, case):
        report = diagnose(**made(case), select=[case.slug])
        assert report.skipped == {}
        (finding,) = (f for f in report.findings if f.layer == case.layer)
        assert finding.rule == RULES[case.slug].id
        assert finding.severity == case.severity
        assert case.value is None or finding.value == pytest.approx(case.value)

    def test_is_silent_beside_its_threshold(self, case):
        report = diagnose(**made(case, beside=True), select=[case.slug])
        assert report.findings == []
        assert report.rules_checked == [case.slug]

    def test_changes_nothing(self, case):
        arguments = lively(made(case))
        before = snapshot(arguments)
        report = diagnose(**arguments)
        assert case.slug in report.rules_checked
        assert snapshot(arguments) == before

    def test_changes_nothing_when_the_model_raises(self, case):
        arguments = lively(made(case))
        arguments["model"].register_forward_pre_hook(self.fail)
        arguments.setdefault("batch", cases.data())
        before = snapshot(arguments)
        report = diagnose(**arguments)
        assert "OSError: the disk is gone" in report.skipped["moves-in-evaluation"]
        assert "mode-mismatch" in report.rules_checked
        assert snapshot(arguments) == before

    @staticmethod
    def fail(*_):
        torch.rand(1)
        raise OSError("the disk is gone.\nSecond line")


def test_every_rule_has_a_case():
    assert {case.slug for case in cases.CASES} == set(RULES)


def test_rules_are_in_reading_order():
    assert [rule.id for rule in RULES.values()] == sorted(rule.id for rule in RULES.values())


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.slug)
def test_every_rule_says_what_it_finds_and_why(rule):
    first, why, *_ = rule.check.__doc__.split("\n\n")
    assert first.startswith(("Find ", "Note ", "Compare "))
    assert rule.why == " ".join(why.split())
    assert rule.why.endswith(".")


def test_a_check_that_raises_is_skipped_and_changes_nothing(monkeypatch):
    def broken(subject):
        torch.rand(1)
        raise ZeroDivisionError("no")
        yield

    monkeypatch.setitem(doctor.RULES, "dead-channel", replace(RULES["dead-channel"], check=broken))
    arguments = lively({"model": cases.network(), "batch": cases.data()})
    before = snapshot(arguments)
    report = diagnose(**arguments)
    assert report.skipped["dead-channel"] == "the check raised ZeroDivisionError: no"
    assert "never-updated" in report.rules_checked
    assert snapshot(arguments) == before


class TestSelection:
    def test_of_some(self):
        report = diagnose(cases.network(), select=["dead-channel", "mode-mismatch"])
        assert report.rules_checked == ["mode-mismatch", "dead-channel"]

    def test_of_all_but_some(self):
        report = diagnose(cases.network(), cases.data(), ignore=["dead-channel"])
        assert "dead-channel" not in [*report.rules_checked, *report.skipped]
        assert len(report.rules_checked) + len(report.skipped) == len(RULES) - 1

    @pytest.mark.parametrize("key", ["select", "ignore"])
    def test_of_what_there_is_not(self, key):
        with pytest.raises(ValueError, match="got 'dead-chanel'; known are mode-mismatch, "):
            diagnose(cases.network(), **{key: ["dead-chanel"]})


def test_a_rule_that_lacks_something_says_what():
    skipped = diagnose(cases.network()).skipped
    assert skipped["few-values"] == "it needs a batch: diagnose(model, batch)"
    assert skipped["not-iid"] == "it needs the loader: diagnose(model, loader=loader)"
    assert skipped["missing-keys"].startswith("it needs a state dict beside the model")


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="got dict"):
        diagnose({})
