"""The NumPy layers against torch.nn: outputs, gradients, statistics, states and errors."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnlib.scratch import functional as F
from bnlib.scratch.layers import BatchNorm, Layer, Linear, ReLU, Sequential, Sigmoid

TORCH = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}
TORCH[5] = torch.nn.BatchNorm3d
SHAPES = [(32, 3), (2, 3), (4, 3, 5), (1, 3, 6), (8, 3, 5, 6), (1, 3, 2, 2), (2, 3, 2, 3, 4)]

# float64: both sides round at 1e-16 and sum a few hundred terms.
# float32: PyTorch accumulates in float32 here, ours in float64; 2e-5 is PyTorch's error.
TOLERANCE = {np.float64: {"rtol": 1e-11, "atol": 1e-11}, np.float32: {"rtol": 2e-5, "atol": 2e-5}}


def make(shape, dtype=np.float64, seed=0):
    """Return a batch whose channels have means and scales far from 0 and 1, and a gradient."""
    rng = np.random.default_rng(seed)
    per_channel = (1, shape[1], *(1,) * (len(shape) - 2))
    x = rng.uniform(0.5, 5, per_channel) * rng.gamma(2, size=shape)
    x += rng.uniform(-9, 9, per_channel)
    return x.astype(dtype), (3 * rng.standard_normal(shape) + 1).astype(dtype)


def to_torch(state):
    return {name: torch.from_numpy(array) for name, array in state.items()}


def to_numpy(state):
    return {name: tensor.numpy() for name, tensor in state.items()}


def pair(ndim=2, dtype=np.float64, seed=1, **options):
    """Return our batch norm of 3 channels and PyTorch's, with the same random state."""
    ours = BatchNorm(3, dtype=dtype, **options)
    rng = np.random.default_rng(seed)
    state = {
        "weight": rng.uniform(0.5, 3, 3) * [1, -1, 1],
        "bias": rng.normal(0, 4, 3),
        "running_mean": rng.normal(0, 3, 3),
        "running_var": rng.uniform(0.2, 9, 3),
        "num_batches_tracked": 5,
    }
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    theirs = TORCH[ndim](3, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, **options)
    theirs.load_state_dict(to_torch(ours.state_dict()))
    return ours, theirs


def run(ours, theirs, x, dy, close):
    """Run both forward and backward on one batch, and hold all results equal."""
    x_torch = torch.from_numpy(x.copy()).requires_grad_()
    theirs.zero_grad()
    y_torch = theirs(x_torch)
    y_torch.backward(torch.from_numpy(dy))
    y, dx = ours(x), ours.backward(dy)
    assert y.dtype == dx.dtype == x.dtype
    np.testing.assert_allclose(y, y_torch.detach().numpy(), **close)
    np.testing.assert_allclose(dx, x_torch.grad.numpy(), **close)
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert list(ours.grads) == list(gradients)
    for name, grad in ours.grads.items():
        assert grad.dtype == gradients[name].dtype
        np.testing.assert_allclose(grad, gradients[name], **{**close, "atol": 10 * close["atol"]})
    assert_same_state(ours, theirs, close["rtol"])


def assert_same_state(ours, theirs, rtol):
    state, expected = ours.state_dict(), to_numpy(theirs.state_dict())
    assert list(state) == list(expected)
    for name, array in state.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_allclose(array, expected[name], rtol=rtol, atol=rtol, err_msg=name)


class TestBatchNorm:
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    @pytest.mark.parametrize("options", [{}, {"eps": 0.3, "momentum": 0.7}, {"affine": False}])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_both_modes_match_pytorch(self, shape, training, options, dtype):
        ours, theirs = pair(len(shape), dtype, **options)
        run(ours.train(training), theirs.train(training), *make(shape, dtype), TOLERANCE[dtype])

    @pytest.mark.parametrize(
        ("training", "track", "buffers"), [*itertools.product([True, False], repeat=3)]
    )
    def test_the_truth_table_of_modes_tracking_and_buffers(self, training, track, buffers):
        ours, theirs = pair(track_running_stats=buffers)
        for layer in (ours, theirs):
            layer.train(training)
            layer.track_running_stats = track
        before = ours.state_dict()
        run(ours, theirs, *make((16, 3)), TOLERANCE[np.float64])
        after = ours.state_dict()
        moved = [name for name in before if (before[name] != after[name]).any()]
        expected = ["running_mean", "running_var", "num_batches_tracked"]
        assert moved == (expected if training and track and buffers else [])

    @pytest.mark.parametrize("momentum", [0.1, 0.9, 0.0, 1.0, 0, 1, None])
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_the_statistics_follow_pytorch_over_ten_batches(self, momentum, dtype):
        ours = BatchNorm(3, momentum=momentum, dtype=dtype)
        theirs = torch.nn.BatchNorm1d(
            3, momentum=momentum, dtype=torch.from_numpy(np.empty(0, dtype)).dtype
        )
        for i in range(10):
            x, _ = make((2 + 5 * i, 3), dtype, seed=i)
            ours(x)
            theirs(torch.from_numpy(x))
            assert_same_state(ours, theirs, 1e-12 if dtype == np.float64 else 2e-6)
        assert ours.num_batches_tracked == 10

    def test_momentum_none_is_the_plain_average_over_the_batches(self):
        layer = BatchNorm(3, momentum=None, dtype=np.float64)
        batches = [make((8, 3), seed=i)[0] for i in range(6)]
        for x in batches:
            layer(x)
        means, variances = zip(*((x.mean(0), x.var(0, ddof=1)) for x in batches), strict=True)
        np.testing.assert_allclose(layer.running_mean, np.mean(means, axis=0), rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, np.mean(variances, axis=0), rtol=1e-12)

    def test_momentum_may_change_between_batches(self):
        ours, theirs = pair()
        for i, momentum in enumerate([0.5, None, 0.2]):
            ours.momentum = theirs.momentum = momentum
            run(ours, theirs, *make((8, 3), seed=i), TOLERANCE[np.float64])

    def test_the_biased_variance_normalizes_and_the_unbiased_one_is_stored(self):
        layer = BatchNorm(1, eps=1e-12, momentum=1, dtype=np.float64)
        y = layer(np.array([[1.0], [3.0]]))
        np.testing.assert_allclose(y, [[-1], [1]])  # the biased variance is 1
        np.testing.assert_allclose(layer.running_var, [2])

    def test_a_new_layer_starts_with_ones_and_zeros(self):
        layer = BatchNorm(3)
        assert_same_state(layer, torch.nn.BatchNorm1d(3), 0)
        assert list(BatchNorm(3, affine=False).state_dict()) == [
            "running_mean",
            "running_var",
            "num_batches_tracked",
        ]
        assert BatchNorm(3, affine=False, track_running_stats=False).state_dict() == {}
        assert BatchNorm(3, affine=False).parameters() == {}
        assert layer.training

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
    def test_an_empty_batch_moves_the_counter_alone(self, shape, training, momentum):
        ours, theirs = pair(len(shape), momentum=momentum)
        before = ours.state_dict()
        x = np.empty(shape)
        run(ours.train(training), theirs.train(training), x, x, TOLERANCE[np.float64])
        assert all((grad == 0).all() for grad in ours.grads.values())
        for name in ("running_mean", "running_var"):
            np.testing.assert_array_equal(ours.state_dict()[name], before[name])
        assert ours.num_batches_tracked == 5 + training

    @pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
    def test_evaluation_with_running_statistics_takes_a_single_value_per_channel(self, shape):
        ours, theirs = pair(len(shape))
        run(ours.eval(), theirs.eval(), *make(shape), TOLERANCE[np.float64])

    def test_in_evaluation_each_example_stands_alone(self):
        ours, _ = pair()
        x, _ = make((8, 3))
        whole = ours.eval()(x)
        np.testing.assert_array_equal(np.vstack([ours(row[None]) for row in x]), whole)

    @pytest.mark.parametrize("track", [True, False])
    def test_reset_running_stats_only_where_tracked(self, track):
        ours, theirs = pair()
        ours.track_running_stats = theirs.track_running_stats = track
        ours.reset_running_stats()
        theirs.reset_running_stats()
        assert_same_state(ours, theirs, 0)
        assert (ours.num_batches_tracked == 0) == track
        BatchNorm(3, track_running_stats=False).reset_running_stats()  # there is nothing to reset

    def test_cumulative_averages_start_again_after_a_reset(self):
        ours, theirs = pair(momentum=None)
        for i in range(3):
            run(ours, theirs, *make((8, 3), seed=i), TOLERANCE[np.float64])
        ours.reset_running_stats()
        theirs.reset_running_stats()
        run(ours, theirs, *make((8, 3), seed=9), TOLERANCE[np.float64])

    @pytest.mark.parametrize("training", [True, False])
    def test_half_precision_input_returns_half_and_the_statistics_stay_float32(self, training):
        ours, theirs = pair(dtype=np.float32)
        x, dy = make((16, 3), np.float16)
        x[:, 1] *= 1000  # squared, 1,000 overflows float16
        y = ours.train(training)(x)
        expected = theirs.train(training)(torch.from_numpy(x)).detach().numpy()
        assert y.dtype == ours.backward(dy).dtype == np.float16
        # |y| in evaluation reaches tens of thousands, where float16 steps are 1e-3 of the value
        np.testing.assert_allclose(y, expected, rtol=2e-3, atol=2e-2)
        assert_same_state(ours, theirs, 1e-3)  # same dtypes; PyTorch sums float16 in float32

    def test_float64_input_meets_float32_parameters(self):
        layer = BatchNorm(3)
        x, dy = make((16, 3))
        y, dx = layer(x), layer.backward(dy)
        assert y.dtype == dx.dtype == np.float64
        assert layer.grads["weight"].dtype == layer.running_mean.dtype == np.float32

    @pytest.mark.parametrize("training", [True, False])
    def test_a_nan_stays_in_its_channel(self, training):
        ours, _ = pair()
        x, dy = make((8, 3))
        x[2, 1] = np.nan
        y, dx = ours.train(training)(x), ours.backward(dy)
        state = [ours.running_mean, ours.running_var]
        for a in (y, dx, *(s[None] for s in [*state, *ours.grads.values()])):
            assert np.isfinite(a[:, [0, 2]]).all()
        assert np.isnan(y[2, 1])
        assert np.isnan(ours.running_mean[1]) == training

    def test_eps_zero_is_refused_in_training_and_taken_in_evaluation_as_in_pytorch(self):
        ours, theirs = pair(eps=0)
        for layer, kind in ((ours, np.asarray), (theirs, torch.from_numpy)):
            with pytest.raises(ValueError, match="eps"):
                layer(kind(make((4, 3))[0]))
        theirs.num_batches_tracked.fill_(5)  # it has counted the batch that it refused
        run(ours.eval(), theirs.eval(), *make((4, 3)), TOLERANCE[np.float64])

    @settings(max_examples=60, deadline=None)
    @given(
        shape=st.tuples(st.integers(0, 6), st.integers(1, 4)).flatmap(
            lambda nc: st.lists(st.integers(1, 4), max_size=3).map(lambda rest: (*nc, *rest))
        ),
        dtype=st.sampled_from([np.float32, np.float64]),
        training=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_shape_keeps_shape_and_dtype_and_matches_pytorch(
        self, shape, dtype, training, seed
    ):
        N, C, *spatial = shape
        if training and N * np.prod(spatial, dtype=int) == 1:
            return
        x, dy = make(shape, dtype, seed)
        layer = BatchNorm(C).train(training)
        y, dx = layer(x), layer.backward(dy)
        assert y.shape == dx.shape == shape
        assert y.dtype == dx.dtype == dtype
        assert layer.grads["weight"].shape == layer.running_mean.shape == (C,)
        wide = TORCH[len(shape)](C, dtype=torch.float64).train(training)
        expected = wide(torch.from_numpy(x.astype(np.float64))).detach().numpy()
        # two nearly equal values have a variance near eps, and 1 / std magnifies rounding
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-4)
        assert_close_statistics(layer, wide)


def assert_close_statistics(ours, theirs):
    for name in ("running_mean", "running_var"):
        expected = theirs.state_dict()[name].numpy()
        np.testing.assert_allclose(getattr(ours, name), expected, rtol=1e-5, atol=1e-5)
    assert ours.num_batches_tracked == theirs.num_batches_tracked.item()


def network(dtype=np.float64, seed=0, activation=ReLU):
    rng = np.random.default_rng(seed)
    return Sequential(
        Linear(6, 5, dtype=dtype, rng=rng),
        BatchNorm(5, dtype=dtype),
        activation(),
        Sequential(Linear(5, 4, dtype=dtype, rng=rng), BatchNorm(4, momentum=None, dtype=dtype)),
        Sigmoid(),
    )


def torch_network(dtype=torch.float64, activation=torch.nn.ReLU):
    nn = torch.nn
    return nn.Sequential(
        nn.Linear(6, 5),
        nn.BatchNorm1d(5),
        activation(),
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None)),
        nn.Sigmoid(),
    ).to(dtype)


class TestOtherLayers:
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    @pytest.mark.parametrize("n", [0, 1, 7])
    @pytest.mark.parametrize("bias", [True, False])
    def test_linear_matches_pytorch(self, bias, n, dtype):
        ours = Linear(6, 4, bias, dtype, rng=np.random.default_rng(0))
        theirs = torch.nn.Linear(6, 4, bias, dtype=torch.from_numpy(np.empty(0, dtype)).dtype)
        theirs.load_state_dict(to_torch(ours.state_dict()))
        run(ours, theirs, make((n, 6), dtype)[0], make((n, 4), dtype)[1], TOLERANCE[dtype])

    @pytest.mark.parametrize(
        ("ours", "theirs"), [(ReLU, torch.nn.ReLU), (Sigmoid, torch.nn.Sigmoid)]
    )
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    @pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 4)])
    def test_activations_match_pytorch(self, ours, theirs, shape, dtype):
        x, dy = make(shape, dtype)
        x[0, 0] = 0  # the slope of ReLU at 0 is a matter of agreement
        run(ours(), theirs(), x, dy, TOLERANCE[dtype])

    @pytest.mark.parametrize(("ours", "theirs"), [(ReLU, torch.relu), (Sigmoid, torch.sigmoid)])
    def test_activations_at_the_extremes_match_pytorch(self, ours, theirs):
        x = np.array([[-np.inf, -1e4, -100, -0.0, 1e4, np.inf, np.nan]])
        y = theirs(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(ours()(x), y, rtol=1e-14)  # warnings are errors in the tests

    def test_relu_passes_no_gradient_where_it_is_off_and_keeps_nan(self):
        x = np.array([[-1.0, 0.0, 2.0, np.nan]])
        x_torch = torch.from_numpy(x).requires_grad_()
        dy = np.array([[np.inf, np.nan, 3.0, 4.0]])
        torch.relu(x_torch).backward(torch.from_numpy(dy))
        layer = ReLU()
        layer(x)
        np.testing.assert_array_equal(layer.backward(dy), x_torch.grad.numpy())

    def test_linear_starts_uniform_as_in_pytorch(self):
        layer = Linear(100, 400, rng=np.random.default_rng(0))
        theirs = torch.nn.Linear(100, 400)
        for ours, reference in ((layer.weight, theirs.weight), (layer.bias, theirs.bias)):
            assert ours.shape == reference.shape
            assert ours.dtype == np.float32
            assert 0.098 < np.abs(ours).max() <= 0.1  # of 400 values or more, within 1/sqrt(100)
            # a uniform distribution over ±0.1 has this deviation; 400 draws stay within 7%
            np.testing.assert_allclose(ours.std(), 0.1 / 3**0.5, rtol=0.07)
            np.testing.assert_allclose(reference.std().item(), 0.1 / 3**0.5, rtol=0.12)
        again = Linear(100, 400, rng=np.random.default_rng(0))
        np.testing.assert_array_equal(layer.weight, again.weight)

    def test_sequential_switches_every_layer(self):
        model = network()
        inner = [*model.layers, *model.layers[3].layers]
        assert model.eval() is model
        assert not any(layer.training for layer in [model, *inner])
        assert model.train() is model
        assert all(layer.training for layer in [model, *inner])

    def test_sequential_matches_pytorch(self):
        ours, theirs = network(), torch_network()
        theirs.load_state_dict(to_torch(ours.state_dict()))
        for training in (True, True, False):
            x, dy = make((8, 6))[0], make((8, 4))[1]
            run(ours.train(training), theirs.train(training), x, dy, TOLERANCE[np.float64])
        assert list(ours.parameters()) == [name for name, _ in theirs.named_parameters()]

    def test_gradients_are_replaced_not_added(self):
        layer = Linear(6, 4, dtype=np.float64, rng=np.random.default_rng(0))
        x, dy = make((5, 6))[0], make((5, 4))[1]
        for _ in range(2):
            layer(x)
            layer.backward(dy)
        np.testing.assert_allclose(layer.grads["weight"], dy.T @ x)


LAYERS = {
    "Linear": lambda: Linear(3, 4, dtype=np.float64, rng=np.random.default_rng(0)),
    "ReLU": ReLU,
    "Sigmoid": Sigmoid,
    "BatchNorm": lambda: pair()[0],
    "BatchNorm.eval": lambda: pair()[0].eval(),
    "BatchNorm without tracking": lambda: pair(track_running_stats=False)[0].eval(),
    "Sequential": lambda: Sequential(LAYERS["Linear"](), Sigmoid(), BatchNorm(4, dtype=float)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_match_central_differences(name):
    layer = LAYERS[name]()
    x, _ = make((4, 3))
    x += 0.01 * np.sign(x)  # no kink of ReLU between x - h and x + h
    dy = make(layer(x).shape)[1]
    dx = layer.backward(dy)
    pairs = [(x, dx), *((p, layer.grads[n]) for n, p in layer.parameters().items())]
    for value, gradient in pairs:
        for i in np.ndindex(value.shape):
            h, old = 1e-5, value[i]
            value[i] = old + h
            above = (layer(x) * dy).sum()
            value[i] = old - h
            below = (layer(x) * dy).sum()
            value[i] = old
            # differences of h leave h**2 of truncation and 1e-16 / h of rounding
            error = abs((above - below) / (2 * h) - gradient[i])
            assert error < 1e-7 * max(np.abs(gradient).max(), 1)


@pytest.mark.parametrize("name", LAYERS)
def test_the_callers_arrays_are_not_written_to_nor_kept(name):
    layer = LAYERS[name]()
    x, _ = make((4, 3))
    x.flags.writeable = False
    y = layer(x)
    dy = make(y.shape)[1]
    dy.flags.writeable = False
    dx, grads = layer.backward(dy), layer.grads
    x.flags.writeable = dy.flags.writeable = True
    if not name.startswith("BatchNorm"):  # it keeps x itself, and says so
        x += 100
    y += 100  # the layer's output is the caller's too
    np.testing.assert_array_equal(layer.backward(dy), dx)
    for parameter, grad in grads.items():
        np.testing.assert_array_equal(layer.grads[parameter], grad)
    for array in layer.parameters().values():
        assert not any(np.shares_memory(array, a) for a in (x, y, dy, dx))


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_keeps_its_input_and_not_a_copy(training):
    layer, (x, dy) = BatchNorm(3).train(training), make((4, 3))
    layer(x)
    layer.backward(dy)
    before = layer.grads["weight"]
    x[0] += 1
    layer.backward(dy)
    assert (layer.grads["weight"] != before).all()


def test_a_changed_weight_or_statistic_does_not_reach_the_backward_of_an_earlier_forward():
    for layer in (LAYERS["BatchNorm"](), LAYERS["BatchNorm.eval"]()):
        x, dy = make((4, 3))
        layer(x)
        before = layer.backward(dy)
        for array in (layer.weight, layer.running_mean, layer.running_var):
            array[...] = 7
        np.testing.assert_array_equal(layer.backward(dy), before)


class TestStates:
    def test_a_state_travels_to_pytorch_and_back(self):
        ours, theirs = network(), torch_network()
        for i in range(3):
            ours(make((8, 6), seed=i)[0])
        theirs.load_state_dict(to_torch(ours.state_dict()))  # strict: every name and shape
        x, _ = make((8, 6), seed=5)
        y = theirs.eval()(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(y, ours.eval()(x), rtol=1e-12)
        theirs.train()(torch.from_numpy(make((9, 6), seed=6)[0]))
        back = network(seed=1)
        back.load_state_dict(to_numpy(theirs.state_dict()))
        assert_same_state(back, theirs, 0)
        y = theirs.eval()(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(back.eval()(x), y, rtol=1e-12)

    def test_a_state_travels_between_float_types(self):
        wide, narrow = network(), network(np.float32, seed=1)
        narrow.load_state_dict(wide.state_dict())
        for name, array in narrow.state_dict().items():
            kept = np.int64 if name.endswith("num_batches_tracked") else np.float32
            assert array.dtype == kept
            np.testing.assert_array_equal(array, wide.state_dict()[name].astype(kept))

    def test_a_state_is_a_copy_both_ways(self):
        model = network()
        state = model.state_dict()
        for array in state.values():
            array += 1
        assert model.state_dict()["1.num_batches_tracked"] == 0
        model.load_state_dict(state)
        for array in state.values():
            array += 1
        assert model.state_dict()["1.num_batches_tracked"] == 1

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_a_copy_of_a_model_lives_on_its_own(self, duplicate):
        model = network()
        x, dy = make((8, 6))[0], make((8, 4))[1]
        model(x)
        twin = duplicate(model)
        np.testing.assert_array_equal(twin.backward(dy), model.backward(dy))
        before = model.state_dict()
        twin(x + 1)
        for array in twin.parameters().values():
            array += 1
        for name, array in model.state_dict().items():
            np.testing.assert_array_equal(array, before[name])
        assert (twin.state_dict()["1.num_batches_tracked"]) == 2

    def test_what_was_loaded_is_what_parameters_returned_before(self):
        model = network()
        parameters = model.parameters()
        model.load_state_dict(network(seed=3).state_dict())
        for name, array in model.parameters().items():
            assert array is parameters[name]

    def test_a_state_that_does_not_fit_is_refused_whole_with_every_name(self):
        model = network()
        before = model.state_dict()
        state = network(seed=3).state_dict()
        del state["0.bias"], state["1.num_batches_tracked"]
        state["0.extra"] = state["weight"] = np.ones(3)
        state["1.running_mean"] = np.ones((5, 1))
        state["1.running_var"] = np.ones(5) + 1j
        state["3.1.weight"] = np.float64(1)
        with pytest.raises(ValueError, match="nothing is loaded") as error:
            model.load_state_dict(state)
        message = str(error.value)
        for part in [
            "missing '0.bias'",
            "missing '1.num_batches_tracked'",
            "unexpected '0.extra'",
            "unexpected 'weight'",
            "'1.running_mean' of shape (5,), real numbers, got float64 of shape (5, 1)",
            "'1.running_var' of shape (5,), real numbers, got complex128",
            "'3.1.weight' of shape (4,), real numbers, got float64 of shape ()",
        ]:
            assert part in message
        assert message.count("'") == 14
        for name, array in model.state_dict().items():
            np.testing.assert_array_equal(array, before[name])


RNG = np.random.default_rng(0)
X = np.zeros((4, 3))


@pytest.mark.parametrize("name", LAYERS)
def test_a_backward_that_does_not_fit_is_refused(name):
    layer = LAYERS[name]()
    with pytest.raises(RuntimeError, match="forward pass before backward"):
        layer.backward(X)
    y = layer(make((4, 3))[0])
    with pytest.raises(ValueError, match="dy shaped as"):
        layer.backward(y[:2])
    with pytest.raises(TypeError, match="dy to hold floats"):
        layer.backward(y.astype(int))
    assert layer.grads == {}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BatchNorm(0), ValueError, "num_features to be 1 or more, got 0"),
        (lambda: BatchNorm(-2), ValueError, "num_features"),
        (lambda: BatchNorm(3, eps=-1e-5), ValueError, "eps at least 0 and finite, got -1e-05"),
        (lambda: BatchNorm(3, eps=np.nan), ValueError, "eps"),
        (lambda: BatchNorm(3, eps=np.inf), ValueError, "eps"),
        (lambda: BatchNorm(3, momentum=1.1), ValueError, "momentum from 0 to 1, got 1.1"),
        (lambda: BatchNorm(3, momentum=-0.1), ValueError, "momentum"),
        (lambda: BatchNorm(3, momentum=np.nan), ValueError, "momentum"),
        (lambda: BatchNorm(3, momentum=np.inf), ValueError, "momentum"),
        (lambda: BatchNorm(3, dtype=np.int64), TypeError, "a float type .* got int64"),
        (lambda: Linear(0, 3, rng=RNG), ValueError, "in_features to be 1 or more"),
        (lambda: Linear(3, 0, rng=RNG), ValueError, "out_features to be 1 or more"),
        (lambda: Linear(3, 3, dtype=int, rng=RNG), TypeError, "a float type"),
        (lambda: Linear(5, 2, rng=RNG)(X), ValueError, r"\(N, 5\), got \(4, 3\).*reshape"),
        (lambda: Linear(3, 2, rng=RNG)(X[:, :, None]), ValueError, r"\(N, 3\), got \(4, 3, 1\)"),
        (lambda: Linear(3, 2, rng=RNG)(X.astype(int)), TypeError, "x to hold floats"),
        (lambda: ReLU()(X.astype(int)), TypeError, "x to hold floats, got int64"),
        (lambda: Sigmoid()(X.astype(int)), TypeError, "x to hold floats"),
        (lambda: ReLU()(X[0]), ValueError, "2 or more dimensions"),
        (lambda: Sequential(ReLU(), np.tanh), TypeError, r"layers, got \['ufunc'\]"),
        (lambda: Sequential([ReLU()]), TypeError, r"layers, got \['list'\]"),
        (lambda: Sequential(*[ReLU()] * 2), ValueError, "each layer once"),
        (lambda: Layer()(X), NotImplementedError, "^$"),
        (lambda: Layer().backward(X), NotImplementedError, "^$"),
        (lambda: F.update_running(*X, 1), ValueError, "unbiased variance.*count - 1"),
        (lambda: F.update_running(*X, -4), ValueError, "got count -4"),
        (lambda: F.update_running(*X, 4, 1.5), ValueError, "momentum from 0 to 1"),
        (lambda: F.update_running(X[0, :2], *X[1:], 4), ValueError, r"got \(2,\), \(3,\)"),
        (lambda: F.update_running(*X[:3], X[0, :2], 4), ValueError, r"\(3,\), \(2,\)$"),
        (lambda: F.update_running(X, X, X, X, 4), ValueError, r"one shape \(C,\), got \(4, 3\)"),
        (lambda: F.batch_norm_inference(X, *X[:4], eps=-1), ValueError, "eps at least 0"),
        (lambda: F.batch_norm_inference(X, X[0, :2], *X[:3]), ValueError, "mean of shape"),
        (lambda: F.batch_norm_inference(X, *X[:3], 0.0), ValueError, "beta of shape"),
        (lambda: F.batch_norm_inference(X[0], *X[:4]), ValueError, "2 or more dimensions"),
        (
            lambda: F.batch_norm_inference_backward(X[:2], X, *X[:3]),
            ValueError,
            r"dy shaped as .*\(4, 3\), got \(2, 3\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "x", "error", "message"),
    [
        ({}, np.zeros((4, 5)), ValueError, r"3 channels along axis 1, got 5.*\(4, 5\)"),
        ({}, np.zeros(4), ValueError, r"2 or more dimensions.*\(4,\)"),
        ({}, np.zeros((1, 3)), ValueError, r"more than 1 value .* in training mode .*\(1, 3\)"),
        ({}, np.zeros((1, 3, 1)), ValueError, "more than 1 value per channel"),
        ({"track_running_stats": False}, np.zeros((1, 3)), ValueError, "more than 1 value"),
        ({}, np.zeros((4, 3), int), TypeError, "x to hold floats, got int64"),
        ({"eps": 0.0}, X, ValueError, "eps above 0"),
        ({"eps": -1.0, "training": False}, X, ValueError, "eps at least 0"),
        ({"momentum": 2.0}, X, ValueError, "momentum from 0 to 1"),
        ({"momentum": np.nan}, X, ValueError, "momentum from 0 to 1"),
        ({"training": False}, np.zeros((4, 2)), ValueError, "3 channels along axis 1, got 2"),
    ],
)
def test_nothing_moves_before_an_error(change, x, error, message):
    layer = BatchNorm(3, dtype=np.float64)
    good, dy = make((4, 3))
    layer(good)
    before, dx = layer.state_dict(), layer.backward(dy)
    for name, value in change.items():
        setattr(layer, name, value)
    with pytest.raises(error, match=message):
        layer(x)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(layer.backward(dy), dx)


def test_pytorch_counts_a_batch_that_it_refuses():
    theirs = torch.nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        theirs(torch.zeros(1, 3))
    assert theirs.num_batches_tracked == 1  # the one difference that BatchNorm documents


def test_one_value_per_channel_is_refused_in_evaluation_without_running_statistics():
    layer = BatchNorm(3, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="without running statistics the batch's own statistics"):
        layer(np.zeros((1, 3)))


class TestFunctions:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_update_running_returns_new_arrays_and_matches_pytorch(self, shape, dtype):
        x, _ = make(shape, dtype)
        mean, var = np.array([1.0, -2, 3]), np.array([0.5, 2, 9])
        mean.flags.writeable = var.flags.writeable = False
        expected = [torch.from_numpy(a.copy()) for a in (mean, var)]
        torch.nn.functional.batch_norm(
            torch.from_numpy(x.astype(np.float64)), *expected, training=True, momentum=0.3
        )
        ours = F.update_running(mean, var, *F.moments(x), x.size // 3, 0.3)
        for new, reference in zip(ours, expected, strict=True):
            assert new.dtype == np.float64
            np.testing.assert_allclose(new, reference.numpy(), rtol=1e-12)

    @pytest.mark.parametrize("count", [0, 4])
    def test_update_running_keeps_each_type_and_shares_nothing(self, count):
        mean, var = np.ones(3, np.float32), np.ones(3, np.float16)
        new_mean, new_var = F.update_running(mean, var, np.zeros(3), np.ones(3), count)
        if count == 0:  # an empty batch moves nothing
            assert (new_mean == mean).all()
            assert (new_var == var).all()
        assert (new_mean.dtype, new_var.dtype) == (np.float32, np.float16)
        assert not np.shares_memory(new_mean, mean)
        assert not np.shares_memory(new_var, var)
        from_lists = F.update_running([0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3], count)
        assert {a.dtype for a in from_lists} == {np.dtype(np.float64)}

    def test_inference_computes_in_float64(self):
        rng = np.random.default_rng(0)
        x = rng.normal(1e4, 1e-2, (1000, 1)).astype(np.float32)
        mean, var = F.moments(x)
        y = F.batch_norm_inference(x, mean, var, [2.0], [1.0], 1e-9)
        exact = 2 * (x - mean) / np.sqrt(var + 1e-9) + 1
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, exact, rtol=1e-6, atol=1e-6)
        dx, dgamma, _ = F.batch_norm_inference_backward(x, x, mean, var, [2.0], 1e-9)
        assert (dx.dtype, dgamma.dtype) == (np.float32, np.float64)
        np.testing.assert_allclose(dgamma, (x * (x - mean) / np.sqrt(var + 1e-9)).sum(0))
