"""The static rules on healthy states that look ill, on scripted models and on checkpoints."""

import cases
import pytest
import torch
from torch import nn

from bnlib import nn as bnn
from bnlib.doctor import diagnose, diagnose_state
from bnlib.doctor.checks import norms_in, norms_of
from bnlib.statistics import recalibrate


def slugs(report):
    return [finding.slug for finding in report.findings]


class TestHealthyStates:
    def test_a_new_model_that_is_to_train(self):
        model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        assert slugs(diagnose(model, torch.randn(8, 1, 9, 9))) == []

    def test_a_model_that_has_begun_to_train(self):
        model = cases.network()
        for norm in (model[1], model[4]):
            norm.reset_running_stats()
        for _ in range(5):
            model(cases.data())
        report = diagnose(model, cases.data(), loss=cases.cross_entropy)
        assert {finding.severity for finding in report.findings} == {"note"}
        assert slugs(report) == ["initial-value-left"] * 2
        assert [finding.layer for finding in diagnose(model.eval()).warnings] == ["1", "4"]

    def test_an_old_checkpoint_without_a_counter(self):
        model = cases.network().eval()
        model[1].num_batches_tracked.zero_()
        assert diagnose(model).ok

    def test_a_loaded_model_with_a_counter_that_begins_anew(self):
        model = cases.network()
        for norm in (model[1], model[4]):
            norm.num_batches_tracked.fill_(3)
            norm.running_var[0] = 0.7  # after three updates, no less than .9 ** 3 can be left of 1
        assert slugs(diagnose(model.eval())) == []

    def test_a_recalibrated_model_as_its_batch_shows(self):
        model = cases.network().eval()
        recalibrate(model, [20 * x for x in cases.data(640).split(64)], progress=False)
        assert set(slugs(diagnose(model))) == {"initial-value-left"}  # no way to tell
        assert diagnose(model, 20 * cases.data()).ok

    def test_a_cumulative_average(self):
        model = nn.Sequential(nn.BatchNorm1d(5, momentum=None))
        model(cases.data() * 9)
        assert diagnose(model.eval()).ok

    def test_a_model_without_batch_norms(self):
        report = diagnose(nn.Linear(5, 3), cases.data())
        assert report.ok
        assert report.batch_norms == 0

    def test_a_lazy_layer_that_has_not_run(self):
        report = diagnose(nn.Sequential(nn.LazyBatchNorm1d()))
        assert report.findings == []
        assert report.batch_norms == 1


def test_a_momentum_of_0_never_updates():
    model = nn.Sequential(nn.BatchNorm1d(5, momentum=0.0), nn.BatchNorm1d(5, momentum=0.0))
    model(cases.data())
    assert slugs(diagnose(model)) == ["never-updated"] * 2


def test_a_negative_eps_is_an_error():
    model = cases.network()
    model[1].eps = -1e-5
    (finding,) = diagnose(model).errors
    assert (finding.slug, finding.threshold) == ("eps-out-of-range", 0)


def test_dead_channels_that_are_not_finite_are_left_to_another_rule():
    model = cases.network()
    model[1].running_var[:] = torch.nan
    assert slugs(diagnose(model)) == ["non-finite-statistics"]


def test_a_layer_in_another_shape_is_missing():
    state = cases.network(nn.BatchNorm1d(8)).state_dict()
    state["1.running_mean"] = torch.zeros(4)
    (finding,) = diagnose(cases.network(), checkpoint=state).errors
    assert (finding.slug, finding.layer, finding.value) == ("missing-keys", "1", 1)


def test_keys_under_another_name_are_missing_and_left_over():
    state = {f"module.{key}": value for key, value in cases.network().state_dict().items()}
    report = diagnose(cases.network(), checkpoint=state)
    assert [f.layer for f in report.errors] == ["1", "4"]
    assert [f.layer for f in report.warnings] == ["module.1", "module.4"]


def test_our_batch_norms_are_read_as_torchs():
    model = cases.network()
    model[1].running_var[2] = torch.nan
    ours = bnn.convert(model.eval())
    assert isinstance(ours[1], bnn.BatchNorm1d)
    assert diagnose(ours).findings == diagnose(model).findings


class TestScripted:
    def broken(self):
        model = cases.network(nn.BatchNorm1d(8, momentum=0.9)).eval()
        model[1].running_var[2] = -1
        model[4].train()
        return model

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_the_static_rules_run(self):
        scripted = torch.jit.script(self.broken())
        report = diagnose(scripted, cases.data())
        expected = {("mode-mismatch", "4"), ("non-finite-statistics", "1")}
        assert {(f.slug, f.layer) for f in report.errors} == expected
        assert [f.slug for f in report.warnings] == ["momentum-convention"]
        assert report.skipped["few-values"].startswith("a scripted model cannot be probed")

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_a_traced_one_too(self):
        traced = torch.jit.trace(self.broken().eval(), cases.data())
        assert [(f.slug, f.layer) for f in diagnose(traced).errors] == [
            ("non-finite-statistics", "1")
        ]


class TestStateDicts:
    def test_the_rules_on_statistics(self):
        model = cases.network()
        model[1].running_mean[0] = torch.inf
        model[4].half()
        report = diagnose_state(model.state_dict())
        found = [(f.severity, f.slug, f.layer) for f in report.findings]
        assert found == [
            ("error", "non-finite-statistics", "1"),
            ("warning", "half-precision-statistics", "4"),
        ]
        assert report.batch_norms == 2
        assert "mode-mismatch" in report.skipped

    def test_what_was_never_updated_is_an_error(self):
        state = nn.Sequential(nn.BatchNorm1d(5)).state_dict()
        (finding,) = diagnose_state(state).errors
        assert (finding.slug, finding.layer) == ("never-updated", "0")

    def test_one_layer_alone(self):
        norm = nn.BatchNorm1d(5)
        norm.running_var[1] = torch.nan
        assert [f.layer for f in diagnose_state(norm.state_dict()).findings] == [""]

    def test_against_another(self):
        state = cases.network().state_dict()
        wanted = dict(state)
        del state["4.running_var"]
        (finding,) = diagnose_state(state, against=wanted).errors
        assert (finding.slug, finding.layer, finding.value) == ("missing-keys", "4", 1)

    @pytest.mark.parametrize(
        "mean",
        [
            "a text", None, torch.zeros(()), torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64),
            torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"),
        ],
    )  # fmt: skip
    def test_what_is_no_statistic_is_passed_over(self, mean):
        assert norms_in({"a.running_mean": mean, "a.running_var": mean, "b": 1}) == []

    def test_the_same_norms_as_in_the_model(self):
        model = cases.network()
        for there, here in zip(norms_of(model), norms_in(model.state_dict()), strict=True):
            assert (there.name, there.updates) == (here.name, here.updates)
            assert torch.equal(there.mean, here.mean)
