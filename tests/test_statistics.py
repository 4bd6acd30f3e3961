"""The statistics tools, beside torch.optim.swa_utils.update_bn, torch itself and float64."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bnlib import nn as bnn
from bnlib.statistics import (
    batch_norms,
    call,
    effective_momentum,
    evaluating,
    frozen_statistics,
    momentum_from_keras,
    recalibrate,
)

ESTIMATORS = ["population", "mean_of_batches"]


def network():
    """Return a trained-looking network: statistics moved, one layer frozen, mixed modes."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 6),
        nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 2),
    )  # fmt: skip
    for _ in range(3):
        model(torch.randn(7, 5) * 3 - 1)
    model[1].eval()
    return model


def batches(sizes=(20, 12, 31), scale=4.0):
    rng = torch.Generator().manual_seed(2)
    return [torch.randn(n, 5, generator=rng) * scale + i for i, n in enumerate(sizes)]


def snapshot(model):
    """Return all that a tool may not change: states, flags, momenta, hooks, random generators."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [
            (m.training, len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs))
            for m in model.modules()
        ],
        [(m.momentum, m.track_running_stats, m.eps) for _, m in batch_norms(model)],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
    )


def same(before, after):
    """Tell whether two snapshots agree bit for bit, NaN included."""
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(before[3], after[3], rtol=0, atol=0)
    return before[1:3] == after[1:3] and before[4:] == after[4:]


def moved(model, names=("running_mean", "running_var", "num_batches_tracked")):
    return {n: v for n, v in model.state_dict().items() if n.rpartition(".")[2] in names}


class TestRecalibrate:
    def test_pools_all_values_of_a_channel(self):
        model, data = network().double(), [b.double() for b in batches()]
        recalibrate(model, data)
        inputs = torch.cat([model[0](b) for b in data])
        torch.testing.assert_close(model[1].running_mean, inputs.mean(0))
        torch.testing.assert_close(model[1].running_var, inputs.var(0))
        assert model[1].num_batches_tracked == 3

    def test_a_later_layer_sees_what_its_batches_gave_it(self):
        model, data = network().double(), [b.double() for b in batches()]
        recalibrate(model, data)
        model[1].train()
        model[3].eval()
        second = torch.cat([model[:5](b) for b in data])
        torch.testing.assert_close(model[5].running_mean, second.mean(0))
        torch.testing.assert_close(model[5].running_var, second.var(0))

    def test_mean_of_batches_is_what_update_bn_computes(self):
        model, data = network().double(), [b.double() for b in batches()]
        theirs = copy.deepcopy(model)
        theirs[3] = nn.Identity()  # update_bn leaves dropout on
        theirs[1].train()  # and skips what is frozen
        update_bn(data, theirs)
        recalibrate(model, data, estimator="mean_of_batches")
        torch.testing.assert_close(moved(model), moved(theirs))

    def test_one_batch_gives_both_estimators_what_a_momentum_of_1_gives(self):
        for estimator in ESTIMATORS:
            model = network().double()
            theirs = copy.deepcopy(model).train()
            theirs[1].momentum = theirs[5].momentum = 1.0
            theirs[3].p = 0
            data = batches()[2].double()
            theirs(data)
            recalibrate(model, [data], estimator=estimator)
            keys = ("running_mean", "running_var")
            torch.testing.assert_close(moved(model, keys), moved(theirs, keys))

    def test_the_estimators_differ_by_the_spread_of_the_batch_means(self):
        model = nn.Sequential(nn.BatchNorm1d(1)).double()
        data = [torch.tensor([[0.0], [2.0]]).double() + 10 * i for i in range(2)]
        recalibrate(model, data, estimator="mean_of_batches")
        assert model[0].running_var.item() == pytest.approx(2)
        recalibrate(model, data)
        assert model[0].running_var.item() == pytest.approx(np.var([0, 2, 10, 12], ddof=1))

    @pytest.mark.parametrize("shape", [(6, 3, 4), (6, 3, 4, 5), (6, 3, 2, 4, 5)])
    def test_counts_every_place_of_an_image(self, shape):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 5
        model = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][len(shape) - 3](3).double()
        recalibrate(model, [x[:2], x[2:]])
        values = x.transpose(0, 1).flatten(1)
        torch.testing.assert_close(model.running_mean, values.mean(1))
        torch.testing.assert_close(model.running_var, values.var(1))

    def test_keeps_the_variance_far_from_0(self):
        x = torch.randn(4, 64, 2) + 1e6
        model = nn.BatchNorm1d(2)
        recalibrate(model, list(x))
        expected = x.double().flatten(0, 1).var(0)
        torch.testing.assert_close(model.running_var.double(), expected, rtol=1e-6, atol=0)

    def test_ours_and_torchs_come_out_alike(self):
        theirs, ours = network(), bnn.convert(network())
        recalibrate(theirs, batches())
        recalibrate(ours, batches())
        torch.testing.assert_close(moved(ours), moved(theirs), rtol=1e-5, atol=1e-5)

    def test_a_shared_layer_pools_its_calls(self):
        norm = nn.BatchNorm1d(5).double()
        x = batches()[0].double()
        recalibrate(nn.Sequential(norm, nn.ReLU(), norm), [x])
        once = nn.functional.batch_norm(x, None, None, training=True).relu()
        torch.testing.assert_close(norm.running_mean, torch.cat([x, once]).mean(0))
        assert norm.num_batches_tracked == 2

    def test_takes_pairs_dicts_several_inputs_and_a_function(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(5)

            def forward(self, a, b):
                return self.norm(a + b)

        x = batches()[0]
        expected = recalibrate(nn.BatchNorm1d(5), [x + x]).running_mean
        for batch in ([(x, x), 0], ({"a": x, "b": x}, 0), {"a": x, "b": x}):
            assert torch.equal(recalibrate(Two(), [batch]).norm.running_mean, expected)
        model = recalibrate(Two(), [x], forward=lambda model, batch: model(batch, batch))
        assert torch.equal(model.norm.running_mean, expected)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_leaves_all_else_as_it_was(self, estimator):
        model = network()
        before = snapshot(model)

        def data():
            for batch in batches():
                yield batch + 0 * torch.rand(1) + 0 * random.random() + 0 * np.random.rand()  # noqa: NPY002

        recalibrate(model, data(), estimator=estimator)
        after = snapshot(model)
        statistics = moved(model)
        for states in (before[0], after[0]):
            for name in statistics:
                del states[name]
        assert same(before, after)

    def test_mends_a_network_poisoned_by_nan(self):
        model = network().eval()
        model[1].running_mean[0] = torch.nan
        assert model(batches()[0]).isnan().any()
        recalibrate(model, batches())
        assert model(batches()[0]).isfinite().all()

    def test_dropout_does_not_distort_the_variance(self):
        model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).double()
        x = torch.randn(1000, 3, dtype=torch.float64)
        recalibrate(model, [x])
        torch.testing.assert_close(model[1].running_var, x.var(0))
        assert model[0].training

    def test_leaves_alone_what_no_batch_reaches(self):
        model = nn.ModuleDict({"used": nn.BatchNorm1d(5), "unused": nn.BatchNorm1d(5)})
        recalibrate(model, batches(), forward=lambda model, x: model["used"](x))
        assert model["used"].num_batches_tracked == 3
        assert model["unused"].num_batches_tracked == 0
        assert torch.equal(model["unused"].running_var, torch.ones(5))

    def test_a_compiled_model(self):
        model = network()
        expected = moved(recalibrate(copy.deepcopy(model), batches()))
        compiled = torch.compile(model, backend="eager")
        compiled(batches()[0])
        recalibrate(compiled, batches())
        assert moved(model).keys() == expected.keys()
        torch.testing.assert_close(moved(model), expected)


def broken_data():
    yield batches()[0]
    raise OSError("the disk is gone")


class TestRecalibrateRefuses:
    @pytest.mark.parametrize(
        ("data", "error", "words"),
        [
            ([], ValueError, "at least one batch"),
            (batches()[0], TypeError, "got one tensor"),
            ([batches()[0], torch.full((4, 5), torch.inf)], ValueError, "'1', got .* in batch 1"),
            ([batches()[0], torch.zeros(1, 5)], ValueError, r"at '1', got shape \(1, 8\)"),
            ([()], ValueError, "got an empty one"),
            ([torch.zeros(4, 3)], RuntimeError, "mat1 and mat2"),
            (broken_data(), OSError, "the disk is gone"),
        ],
    )  # fmt: skip
    def test_and_leaves_the_model_as_it_was(self, data, error, words):
        model = network()
        before = snapshot(model)
        with pytest.raises(error, match=words):
            recalibrate(model, data)
        assert same(before, snapshot(model))

    def test_another_estimator(self):
        with pytest.raises(ValueError, match="got 'median'"):
            recalibrate(network(), batches(), estimator="median")

    @pytest.mark.parametrize(
        "model", [nn.Linear(5, 2), nn.BatchNorm1d(5, track_running_stats=False)]
    )
    def test_a_model_without_running_statistics(self, model):
        with pytest.raises(ValueError, match="no batch norm with any"):
            recalibrate(model, batches())

    def test_what_is_no_module(self):
        with pytest.raises(TypeError, match="got dict"):
            recalibrate({}, batches())

    def test_a_lazy_layer_that_has_not_run(self):
        model = nn.Sequential(nn.LazyBatchNorm1d())
        with pytest.raises(ValueError, match="'0' without a size"):
            recalibrate(model, batches())
        assert isinstance(model[0], nn.LazyBatchNorm1d)

    def test_statistics_that_half_precision_cannot_hold(self):
        model = nn.BatchNorm1d(5)
        model.running_var = model.running_var.half()
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"torch\.float16 can hold"):
            recalibrate(model, batches(scale=1e3))
        assert same(before, snapshot(model))


class TestModes:
    def test_evaluating_puts_every_module_in_evaluation_and_back(self):
        model = network()
        before, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
        with evaluating(model) as same:
            assert same is model
            assert not any(m.training for m in model.modules())
            model(batches()[0])
        assert [m.training for m in model.modules()] == before
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)

    def test_frozen_statistics_touches_the_batch_norms_alone(self):
        model = network()
        before, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
        with frozen_statistics(model):
            assert [m.training for m in model] == [True, False, True, True, True, False, True]
            model(batches()[0]).sum().backward()
        assert [m.training for m in model.modules()] == before
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
        assert model[1].weight.grad is not None

    @pytest.mark.parametrize("manager", [evaluating, frozen_statistics])
    def test_an_exception_restores_the_modes_too(self, manager):
        model = network()
        before = [m.training for m in model.modules()]
        with pytest.raises(KeyError), manager(model):
            raise KeyError
        assert [m.training for m in model.modules()] == before

    def test_no_train_or_eval_of_the_modules_own_is_called(self):
        class Merging(nn.Linear):
            def train(self, mode=True):
                raise AssertionError("called")

        with evaluating(Merging(2, 2)) as layer:
            assert not layer.training
        assert layer.training


class TestMomentum:
    def test_from_keras(self):
        assert momentum_from_keras(0.99) == pytest.approx(0.01)

    def test_two_updates_weigh_as_much_as_one_with_the_effective_momentum(self):
        x = batches()[0]
        twice, once = nn.BatchNorm1d(5), nn.BatchNorm1d(5, momentum=effective_momentum(0.1, 2))
        twice(x), twice(x), once(x)
        torch.testing.assert_close(twice.running_mean, once.running_mean)
        assert once.momentum == pytest.approx(0.19)

    def test_half_an_update_undoes_two(self):
        assert effective_momentum(0.1, 1 / 2) == pytest.approx(1 - 0.9**0.5)
        assert effective_momentum(effective_momentum(0.1, 1 / 2), 2) == pytest.approx(0.1)

    @pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
    def test_outside_0_to_1(self, momentum):
        with pytest.raises(ValueError, match="between 0 and 1"):
            momentum_from_keras(momentum)
        with pytest.raises(ValueError, match="between 0 and 1"):
            effective_momentum(momentum, 2)

    @pytest.mark.parametrize("updates", [0, -1, float("nan")])
    def test_updates_above_0(self, updates):
        with pytest.raises(ValueError, match="updates above 0"):
            effective_momentum(0.1, updates)


def test_batch_norms_finds_subclasses_and_each_once():
    shared = bnn.BatchNorm2d(3)
    model = nn.Sequential(shared, nn.SyncBatchNorm(3), nn.GroupNorm(1, 3), nn.Sequential(shared))
    assert [name for name, _ in batch_norms(model)] == ["0", "1"]


def test_call_takes_a_batch_as_loaders_give_it():
    x = torch.ones(2)
    assert call(lambda x: x, x) is x
    assert call(lambda x: x, [x, 1]) is x
    assert call(lambda a, b: (a, b), ((x, x), 1)) == (x, x)
    assert call(lambda a, b: (a, b), {"a": x, "b": x}) == (x, x)
