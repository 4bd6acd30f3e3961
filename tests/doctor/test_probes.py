"""Models of every kind, and what cannot be probed; the rules themselves: test_rules.py."""

import random

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rules import lively, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from bnlib.doctor import diagnose
from bnlib.doctor.checks import Skip, Subject, norms_of
from bnlib.doctor.passes import attempt, distances, evaluation, examples, mapped, size_of
from bnlib.statistics import recalibrate

NEED_A_BATCH = {
    "batch-dependent", "statistics-drift", "few-values", "updates-per-step", "moves-in-evaluation",
}  # fmt: skip


class Sum(nn.Module):
    """Two inputs, the second by name, and a norm that always uses the batch."""

    def __init__(self):
        super().__init__()
        self.norm = cases.Always(5, moves=True)

    def forward(self, a, b=None):
        return {"sum": self.norm(a + b), "rest": None, "size": len(a)}


def found(report):
    return {(f.slug, f.layer) for f in report.findings if f.severity != "note"}


BROKEN = {("batch-dependent", "norm"), ("moves-in-evaluation", "norm")}


class TestModelsOfAnyKind:
    @pytest.mark.parametrize(
        "batch",
        [
            ((cases.data(), cases.data()), cases.labels()),
            {"a": cases.data(), "b": cases.data()},
            ({"a": cases.data(), "b": cases.data()}, cases.labels()),
        ],
        ids=["a tuple of inputs", "keywords", "keywords and labels"],
    )
    def test_several_inputs(self, batch):
        model = Sum().eval()
        model.norm.running_var += 1
        assert found(diagnose(model, batch)) >= BROKEN

    def test_data_parallel(self):
        model = nn.DataParallel(cases.network(cases.Always(8)))
        report = diagnose(model.eval(), cases.data())
        assert found(report) == {("batch-dependent", "module.1")}
        report = diagnose(nn.DataParallel(cases.Twice()), cases.data())
        assert ("updates-per-step", "module.net.1") in found(report)

    def test_a_compiled_model(self):
        inner = cases.network(cases.Always(8))
        model = torch.compile(inner, backend="eager")
        assert found(diagnose(model.eval(), cases.data())) == {("batch-dependent", "_orig_mod.1")}
        inner.compile(backend="eager")
        assert found(diagnose(inner.eval(), cases.data())) == {("batch-dependent", "1")}

    def test_a_compiled_part(self):
        model = cases.network()
        model[1] = torch.compile(cases.Always(8), backend="eager")
        model[1](torch.randn(4, 8))
        report = diagnose(model.eval(), cases.data())
        assert ("batch-dependent", "1._orig_mod") in found(report)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_a_scripted_part(self):
        model = cases.network()
        model[1] = torch.jit.script(model[1])
        report = diagnose(model, cases.data())
        assert found(report) == set()
        assert report.batch_norms == 2
        assert set(report.skipped) & NEED_A_BATCH == set()

    def test_a_parametrized_layer_before(self):
        model = cases.network(bias=True)
        torch.nn.utils.parametrizations.weight_norm(model[0])
        report = diagnose(model, cases.data())
        assert [(f.slug, f.layer) for f in report.notes] == [("redundant-bias", "1")]

    def test_a_batch_norm_alone(self):
        report = diagnose(cases.Always(5).eval(), cases.data(), select=["batch-dependent"])
        assert [f.layer for f in report.findings] == [""]

    def test_hooks_of_the_models_own_run_and_stay(self):
        model, seen = cases.network(), []
        model[1].register_forward_hook(lambda module, args, output: seen.append(module))
        diagnose(model, cases.data())
        assert seen
        assert len(model[1]._forward_hooks) == 1

    def test_images_count_every_place(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        report = diagnose(model, torch.randn(1, 1, 5, 5), select=["few-values"])
        assert [f.value for f in report.warnings] == [9]

    def test_instance_norms_do_not_depend_on_the_batch(self):
        model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4), nn.GroupNorm(2, 4))
        assert diagnose(model, torch.randn(8, 2, 9)).ok

    def test_half_precision_is_not_taken_for_the_batch(self):
        model = cases.network().bfloat16().eval()
        report = diagnose(model, cases.data().bfloat16())
        assert "batch-dependent" in report.rules_checked
        assert report.ok

    def test_channels_first_in_time(self):
        class Turned(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.BatchNorm1d(5), cases.Always(5))

            def forward(self, x):
                return self.net(x.permute(1, 2, 0)).permute(2, 0, 1)

        model = Turned()
        cases.settle_like(model.net[0])
        report = diagnose(model, torch.randn(16, 40, 5), select=["batch-dependent"])
        assert [f.slug for f in report.findings] == ["batch-dependent"]


BATCH = cases.data(), cases.labels()


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_wherever_it_is_called(context):
    with context():
        report = diagnose(cases.network(), BATCH, loss=cases.cross_entropy, loader=[BATCH] * 6)
    assert report.findings == []
    assert set(report.skipped) == {"missing-keys", "weight-decay"}


def test_a_model_that_is_frozen_as_a_whole_takes_a_step_too():
    model = cases.Twice().requires_grad_(False)
    report = diagnose(model, BATCH, loss=cases.cross_entropy, select=["updates-per-step"])
    assert [f.value for f in report.findings] == [2, 2]


class TestWhatCannotBeProbed:
    def reasons(self, report):
        assert "dead-channel" in report.rules_checked
        return {report.skipped.get(slug, "checked") for slug in NEED_A_BATCH}

    def test_a_model_that_cannot_be_copied(self):
        model = cases.network()
        model.last = model(cases.data())
        (reason,) = self.reasons(diagnose(model, cases.data()))
        assert reason.startswith("the model cannot be copied (RuntimeError: Only Tensors created")

    def test_a_batch_that_does_not_fit(self):
        reasons = self.reasons(diagnose(cases.network(), torch.zeros(4, 7)))
        words = "raised RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x7 and 5x8)"
        assert reasons == {f"the model {words}", f"a training step {words}"}

    def test_an_empty_batch(self):
        for reason in self.reasons(diagnose(cases.network(), ())):
            assert "got an empty one" in reason or "two examples" in reason

    def test_one_example(self):
        model = cases.network().eval()
        report = diagnose(model, cases.data(1))
        assert report.findings == []
        assert "Expected more than 1 value" in report.skipped["statistics-drift"]

    def test_a_random_output(self):
        model = nn.Sequential(cases.network().eval(), nn.Dropout()).eval()
        model[1].train()
        report = diagnose(model, cases.data())
        assert report.skipped["batch-dependent"] == "the output in evaluation is random"

    def test_an_output_that_is_not_finite(self):
        model = cases.network().eval()
        model[1].running_mean[0] = torch.nan
        report = diagnose(model, cases.data())
        assert report.skipped["batch-dependent"] == "the output in evaluation is not finite"
        assert [f.slug for f in report.errors] == ["non-finite-statistics"]

    def test_an_output_for_the_whole_batch(self):
        class Mean(nn.Module):
            def forward(self, x):
                return x.mean()

        report = diagnose(nn.Sequential(cases.network(), Mean()), cases.data())
        assert "has no row for each" in report.skipped["batch-dependent"]

    def test_a_loss_that_raises(self):
        def loss(model, batch):
            raise KeyError("labels")

        report = diagnose(cases.network(), cases.data(), loss=loss)
        assert report.skipped["updates-per-step"] == "a training step raised KeyError: 'labels'"
        assert "moves-in-evaluation" in report.rules_checked

    def test_a_loader_without_a_length(self):
        class Endless(IterableDataset):
            def __iter__(self):
                while True:
                    yield cases.data(1)[0]

        report = diagnose(cases.network(), loader=DataLoader(Endless(), 8))
        assert report.skipped["last-batch-of-one"] == "the loader's data have no length"
        assert "not-iid" in report.rules_checked

    def test_a_loader_that_raises(self):
        def broken():
            raise OSError("the disk is gone")
            yield

        report = diagnose(cases.network(), loader=broken())
        assert report.skipped["few-values"] == "the loader raised OSError: the disk is gone"
        assert "mode-mismatch" in report.rules_checked

    def test_a_generator_does_not_tell_its_last_batch(self):
        report = diagnose(cases.network(), loader=(cases.data(8) for _ in range(9)))
        assert "last-batch-of-one" in report.skipped
        assert "not-iid" in report.rules_checked

    @pytest.mark.parametrize("loader", [[], [cases.data()] * 3])
    def test_a_short_loader(self, loader):
        assert "four batches" in diagnose(cases.network(), loader=loader).skipped["not-iid"]


class TestALossThatUsesTheOriginal:
    """Instead of the copy that it gets."""

    def test_is_named(self):
        model = cases.network()
        report = diagnose(
            model, (cases.data(), cases.labels()), loss=lambda _, b: cases.cross_entropy(model, b)
        )
        assert "did not use the model that it got" in report.skipped["updates-per-step"]

    @pytest.mark.parametrize("with_gradients", [False, True])
    def test_changes_nothing(self, with_gradients):
        model = cases.network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if with_gradients:
            lively({"model": model})
        arguments = {"model": model, "batch": cases.data()}
        before = snapshot(arguments)

        def loss(_, batch):
            model(batch).sum().backward()
            optimizer.step()
            model.eval()
            model[1].running_var = torch.rand(8)
            torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
            return model(batch).sum()

        diagnose(**arguments, loss=loss)
        assert snapshot(arguments) == before


class TestLoaders:
    def test_the_first_batch_serves_as_the_batch(self):
        report = diagnose(cases.Twice(), loader=[(cases.data(), 0)] * 4)
        assert ("updates-per-step", "net.1") in found(report)

    def test_a_loaders_generator_is_as_before(self):
        generator = torch.Generator().manual_seed(5)
        loader = cases.loader_of(256, shuffle=True, generator=generator)
        before = generator.get_state()
        diagnose(cases.network(), loader=loader)
        assert torch.equal(generator.get_state(), before)

    def test_a_last_batch_of_one_image_is_a_note(self):
        model = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3))
        report = diagnose(model, loader=cases.loader_of(33), select=["last-batch-of-one"])
        assert [(f.severity, f.value) for f in report.findings] == [("warning", 1)]
        model = nn.Sequential(nn.Unflatten(1, (1, 5, 1)), nn.Conv2d(1, 3, 1, padding=4))
        model.append(nn.BatchNorm2d(3))
        report = diagnose(model, loader=cases.loader_of(33), select=["last-batch-of-one"])
        assert [f.severity for f in report.findings] == ["note"]

    @pytest.mark.parametrize(
        "loader",
        [
            [cases.data(), cases.data(2)], cases.loader_of(5, batch_size=1),
            cases.loader_of(65, batch_size=None),
        ],
    )  # fmt: skip
    def test_no_last_batch_of_one(self, loader):
        report = diagnose(cases.network(), loader=loader, select=["last-batch-of-one"])
        assert report.findings == []

    def test_the_last_of_a_list(self):
        loader = [(cases.data(), 0), (cases.data(1), 0)]
        report = diagnose(cases.network(), loader=loader, select=["last-batch-of-one"])
        assert [f.slug for f in report.errors] == ["last-batch-of-one"]

    @pytest.mark.parametrize("seed", range(5))
    def test_random_batches_are_no_finding(self, seed):
        x = torch.randn(400, 5, generator=torch.Generator().manual_seed(seed)).exp()
        report = diagnose(cases.network(), loader=list(x.split(20)), select=["not-iid"])
        assert report.findings == []

    def test_the_variance_of_the_means_against_numpy(self):
        x = cases.data(320)[cases.data(320)[:, 2].argsort()].reshape(10, 32, 5)
        model = nn.Sequential(nn.BatchNorm1d(5))
        (finding,) = diagnose(model, loader=list(x), select=["not-iid"]).findings
        a = x.double().numpy()
        total = a.reshape(-1, 5).var(0, ddof=1)
        between = 32 * a.mean(1).var(0, ddof=1) / total
        within = a.var(1, ddof=1).mean(0) / total
        assert finding.value == pytest.approx(between.mean() / within.mean())
        assert finding.threshold == pytest.approx(1 + 4 * np.sqrt(2 / 9))


class TestGradientPenalty:
    def test_asked_for_with_another_name_of_grad(self):
        from torch.autograd import grad as slope_of

        def loss(model, batch):
            x = batch.requires_grad_()
            (slope,) = slope_of(outputs=model(x).sum(), inputs=x, create_graph=True)
            return slope.square().sum()

        report = diagnose(cases.network(), cases.data(), loss=loss, select=["gradient-penalty"])
        assert [f.layer for f in report.warnings] == ["1", "4"]

    def test_is_silent_in_evaluation(self):
        model = cases.network()
        for norm in (model[1], model[4]):
            norm.eval().requires_grad_(False)
        assert diagnose(model, cases.data(), loss=cases.penalty).ok

    def test_a_gradient_at_the_parameters_is_none(self):
        def loss(model, batch):
            wanted = [*model.parameters()]
            slopes = torch.autograd.grad(model(batch).sum(), wanted, create_graph=True)
            return sum(slope.square().sum() for slope in slopes)

        report = diagnose(cases.network(), cases.data(), loss=loss, select=["gradient-penalty"])
        assert report.findings == []

    def test_the_share_against_a_jacobian(self):
        model, x = cases.network(), cases.data(6)
        (finding,) = diagnose(
            nn.Sequential(model[1]), (h := model[0](x).detach()), loss=cases.penalty,
            select=["gradient-penalty"],
        ).findings  # fmt: skip

        def first(h):
            return F.batch_norm(h, None, None, training=True)[0].sum()

        slope = torch.autograd.functional.jacobian(first, h)
        expected = slope[1:].norm() / slope.norm()
        assert finding.value == pytest.approx(float(expected), rel=1e-4)


class TestUpdates:
    def test_more_than_two(self):
        report = diagnose(cases.Twice(3), cases.data(), select=["updates-per-step"])
        assert {f.value for f in report.findings} == {3}
        assert "effective_momentum(momentum, 1 / 3)" in report.findings[0].fix

    def test_a_model_that_evaluates_is_asked_to_train(self):
        report = diagnose(cases.Twice().eval(), cases.data(), select=["updates-per-step"])
        assert {f.value for f in report.findings} == {2}

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("affine", [False, True])
    def test_under_either_kind_of_checkpoint(self, reentrant, affine):
        class Halves(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
                self.second = nn.Sequential(nn.BatchNorm1d(8, affine=affine), nn.Linear(8, 3))

            def forward(self, x):
                return checkpoint(self.second, self.first(x), use_reentrant=reentrant)

        batch = cases.data(), cases.labels()
        report = diagnose(Halves(), batch, loss=cases.cross_entropy, select=["updates-per-step"])
        assert [(f.layer, f.value) for f in report.findings] == [("second.0", 2)]

    def test_a_layer_that_stays_frozen_is_not_counted(self):
        model = cases.Twice()
        model.net[1].eval()
        report = diagnose(model, cases.data(), select=["updates-per-step"])
        assert [f.layer for f in report.findings] == ["net.4"]


class TestDrift:
    def test_against_float64(self):
        model, x = nn.Sequential(nn.BatchNorm2d(3, eps=1e-3)), torch.randn(20, 3, 4, 4) * 3 + 1
        cases.settle_like(model[0])
        model[0].running_mean += torch.tensor([0.5, 1.0, 2.0])
        subject = Subject(norms_of(model), model, x)
        (call,) = attempt(subject).calls
        value, _, noise = distances(subject.norms[0], call)
        z = x.double().numpy()
        trained = (z - z.mean((0, 2, 3), keepdims=True)) / np.sqrt(
            z.var((0, 2, 3), keepdims=True) + 1e-3
        )
        evaluated = (z - np.array([0.5, 1, 2]).reshape(1, 3, 1, 1)) / np.sqrt(2 + 1e-3)
        # a variance within eps of 1 in training, hence the tolerance
        assert value == pytest.approx(np.sqrt(((evaluated - trained) ** 2).mean()), rel=1e-3)
        assert 0 < noise < 1

    def test_sampling_explains_what_it_predicts(self):
        ratios = []
        for seed in range(30):
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed)) ** 3
            model = nn.Sequential(nn.BatchNorm1d(8, momentum=0.0))
            model[0].running_var.fill_(15)  # of the cube of a normal number
            subject = Subject(norms_of(model), model, x)
            value, _, noise = distances(subject.norms[0], attempt(subject).calls[0])
            ratios.append(value / noise)
        assert 0.5 < np.median(ratios) < 1.5

    def test_the_five_worst_layers_come_first(self):
        model = nn.Sequential(*(nn.BatchNorm1d(5, affine=False) for _ in range(7)))
        x = cases.data(200)
        recalibrate(model, [x], progress=False)
        for i, layer in enumerate(model):
            layer.num_batches_tracked.fill_(1000)
            layer.running_mean += (1 + i) * (layer.running_var + layer.eps).sqrt()
        report = diagnose(model, x, select=["statistics-drift"])
        assert [f.layer for f in report.findings] == ["6", "5", "4", "3", "2"]


class TestBatches:
    batch = ({"a": torch.zeros(4, 2), "b": [torch.zeros(4), torch.zeros(3)]}, "text", 7)

    def test_examples_of_what_has_a_row_for_each(self):
        part = examples(self.batch, slice(2))
        assert part[0]["a"].shape == (2, 2)
        assert [x.shape for x in part[0]["b"]] == [(2,), (3,)]
        assert part[1:] == ("text", 7)
        assert size_of(self.batch) == 4

    def test_named_tuples_stay_named(self):
        pair = torch.zeros(3, 2).max(1)
        assert mapped(tuple(pair), lambda x: x + 1)[0].tolist() == [1, 1, 1]
        Pair = __import__("collections").namedtuple("Pair", "x y")
        assert mapped(Pair(torch.zeros(1), 2), lambda x: x + 1) == Pair(torch.ones(1), 2)

    def test_inputs_that_a_model_changes_are_as_before(self):
        model = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(5))
        x = cases.data()
        diagnose(model, x, loader=[x] * 5)
        assert torch.equal(x, cases.data())


def test_passes_run_once():
    model, calls = cases.network(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    diagnose(model, cases.data())
    assert len(calls) == 3  # a step, an evaluation, the first example alone
    subject = Subject(norms_of(model), model, torch.zeros(4, 7))
    for _ in range(2):
        with pytest.raises(Skip, match="mat1 and mat2"):
            evaluation(subject)
