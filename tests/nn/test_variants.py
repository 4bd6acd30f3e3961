"""The relatives of batch norm, against torch.nn's batch norm or a paper's formula in float64."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.optim.swa_utils import update_bn

from bnlib import nn as bnn

C = 3
SHAPES = {"1d": (12, C), "2d": (8, C, 4, 5)}
DIMS = pytest.mark.parametrize("dims", SHAPES)
# One rounding of results near 20 (half types: two), and of float32 sums of some hundred terms.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make(shape, dtype=torch.float64, seed=0):
    """Return values far from mean 0 and deviation 1, other ones in each channel."""
    rng = np.random.default_rng(seed)
    channel = (C, *[1] * (len(shape) - 2))
    x = rng.uniform(0.5, 5, channel) * rng.gamma(2, size=shape) + rng.uniform(-9, 9, channel)
    return torch.from_numpy(x).to(dtype)


def state(seed=1, dtype=torch.float64):
    """Return the state of a batch norm that has seen 5 batches."""
    rng = np.random.default_rng(seed)
    vectors = {
        "weight": rng.uniform(0.5, 3, C) * [1, -1, 1],
        "bias": rng.normal(0, 4, C),
        "running_mean": rng.normal(0, 3, C),
        "running_var": rng.uniform(0.2, 9, C),
    }
    tensors = {k: torch.from_numpy(v).to(dtype) for k, v in vectors.items()}
    return {**tensors, "num_batches_tracked": torch.tensor(5)}


def loaded(layer):
    layer.load_state_dict(state(dtype=next(layer.buffers()).dtype))
    return layer


def theirs(dims, dtype=torch.float64, **options):
    return loaded(getattr(nn, f"BatchNorm{dims}")(C, dtype=dtype, **options))


def ours(name, dims, *arguments, dtype=torch.float64, **options):
    return loaded(getattr(bnn, f"{name}{dims}")(C, *arguments, dtype=dtype, **options))


def agree(actual, expected):
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 20)


def same_buffers(ours, theirs):
    for (name, ours_), (_, theirs_) in zip(
        ours.named_buffers(), theirs.named_buffers(), strict=True
    ):
        agree(ours_, theirs_) if "running" in name else torch.equal(ours_, theirs_)


def same_gradients(ours, theirs, *inputs):
    """Hold the gradients of a weighted sum of y against theirs, for inputs and parameters."""
    for a, b in zip(inputs[0::2], inputs[1::2], strict=True):
        agree(a.grad, b.grad)
    for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        agree(a.grad.reshape(b.grad.shape), b.grad)


def leaves(x):
    return x.clone().requires_grad_(), x.clone().requires_grad_()


def refused(layer, error, match, *inputs):
    """Assert that a call raises this, and that the layer's state is as it was."""
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=match):
        layer(*inputs)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


class TestGhost:
    @DIMS
    @pytest.mark.parametrize("size", [4, 5, 100])
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_it_is_torchs_batch_norm_on_one_ghost_after_the_other(self, dims, size, momentum):
        ghost = ours("GhostBatchNorm", dims, size, momentum=momentum)
        reference = theirs(dims, momentum=momentum)
        x, x_ = leaves(make(SHAPES[dims]))
        y, y_ = ghost(x), torch.cat([reference(part) for part in x_.split(size)])
        agree(y, y_)
        same_buffers(ghost, reference)
        for result in (y, y_):
            (result * make(SHAPES[dims], seed=2)).sum().backward()
        same_gradients(ghost, reference, x, x_)

    @DIMS
    def test_evaluation_is_that_of_a_batch_norm(self, dims):
        ghost, reference = ours("GhostBatchNorm", dims, 4).eval(), theirs(dims).eval()
        agree(ghost(make(SHAPES[dims])), reference(make(SHAPES[dims])))
        same_buffers(ghost, reference)

    def test_without_running_statistics_evaluation_has_ghosts_too(self):
        ghost = bnn.GhostBatchNorm1d(C, 4, track_running_stats=False, dtype=torch.float64)
        x = make(SHAPES["1d"])
        assert torch.equal(ghost.eval()(x), ghost.train()(x))

    def test_a_batch_of_k_ghosts_moves_the_statistics_as_hoffers_algorithm_says(self):
        ghost, x = ours("GhostBatchNorm", "1d", 4, momentum=0.3), make(SHAPES["1d"])
        expected = ghost.running_mean * 0.7**3
        for i, part in enumerate(x.split(4)):
            expected = expected + 0.7 ** (2 - i) * 0.3 * part.mean(0)
        ghost(x)
        agree(ghost.running_mean, expected)
        assert ghost.num_batches_tracked == 8

    def test_a_last_ghost_of_one_value_is_refused(self):
        layer = ours("GhostBatchNorm", "1d", 4)
        refused(layer, ValueError, "more than 1 value per channel in each ghost", make((9, C)))
        assert layer.eval()(make((9, C))).shape == (9, C)

    def test_a_size_below_one_is_refused(self):
        with pytest.raises(ValueError, match="virtual_batch_size of 1 or more, got 0"):
            bnn.GhostBatchNorm1d(C, 0)


class TestRenorm:
    @DIMS
    def test_with_r_max_1_and_d_max_0_it_is_torchs_batch_norm(self, dims):
        renorm, reference = ours("BatchRenorm", dims, 1, 0), theirs(dims)
        x, x_ = leaves(make(SHAPES[dims]))
        for layer, input in ((renorm, x), (reference, x_)):
            (layer(input) * make(SHAPES[dims], seed=2)).sum().backward()
        agree(renorm(x), reference(x_))
        same_buffers(renorm, reference)
        same_gradients(renorm, reference, x, x_)

    @DIMS
    @pytest.mark.parametrize("affine", [True, False])
    def test_it_is_ioffes_algorithm(self, dims, affine):
        renorm = getattr(bnn, f"BatchRenorm{dims}")(C, 1.5, 4.0, affine=affine, dtype=torch.float64)
        given = state()
        renorm.load_state_dict({k: given[k] for k in renorm.state_dict()})
        x, x_ = leaves(make(SHAPES[dims]))
        vector, axes = (1, C, *[1] * (x.dim() - 2)), tuple({*range(x.dim())} - {1})
        mean, std = x_.mean(axes), (x_.var(axes, correction=0) + 1e-5).sqrt()
        running_std = (given["running_var"] + 1e-5).sqrt()
        r = (std / running_std).detach().clamp(1 / 1.5, 1.5)
        d = ((mean - given["running_mean"]) / running_std).detach().clamp(-4, 4)
        assert r.unique().numel() == C > (d.abs() == 4).sum() > 0  # some are clipped, not all
        expected = (x_ - mean.view(vector)) / std.view(vector) * r.view(vector) + d.view(vector)
        if affine:
            expected = expected * given["weight"].view(vector) + given["bias"].view(vector)
        y = renorm(x)
        agree(y, expected)
        for result in (y, expected):
            (result * make(SHAPES[dims], seed=2)).sum().backward()
        agree(x.grad, x_.grad)

    @DIMS
    def test_unclipped_training_gives_what_evaluation_gives(self, dims):
        renorm = ours("BatchRenorm", dims, float("inf"), float("inf"))
        expected = theirs(dims).eval()(make(SHAPES[dims]))
        agree(renorm(make(SHAPES[dims])), expected)

    @DIMS
    def test_evaluation_is_that_of_a_batch_norm(self, dims):
        agree(
            ours("BatchRenorm", dims).eval()(make(SHAPES[dims])),
            theirs(dims).eval()(make(SHAPES[dims])),
        )

    def test_bias_may_be_missing(self):
        with_zeros = bnn.BatchRenorm1d(C, dtype=torch.float64)
        without = bnn.BatchRenorm1d(C, affine=False, dtype=torch.float64)
        agree(without(make((12, C))), with_zeros(make((12, C))))

    @pytest.mark.parametrize("limits", [(0.5, 5), (3, -1), (float("nan"), 5)])
    def test_limits_that_exclude_batch_norm_are_refused(self, limits):
        with pytest.raises(ValueError, match="r_max >= 1 and d_max >= 0"):
            bnn.BatchRenorm1d(C, *limits)

    def test_it_needs_running_statistics(self):
        with pytest.raises(ValueError, match="has to track them"):
            bnn.BatchRenorm1d(C, track_running_stats=False)


def conditional(dims, num_classes, dtype=torch.float64, **options):
    torch.manual_seed(3)
    cls = getattr(bnn, f"ConditionalBatchNorm{dims}")
    return cls(C, num_classes, weight_std=2, bias_std=4, dtype=dtype, **options)


class TestConditional:
    @DIMS
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_with_one_class_it_is_torchs_batch_norm(self, dims, momentum):
        given = state()
        table = {**given, "weight": given["weight"][None], "bias": given["bias"][None]}
        layer = conditional(dims, 1, momentum=momentum)
        layer.load_state_dict(table)
        reference = theirs(dims, momentum=momentum)
        x, x_ = leaves(make(SHAPES[dims]))
        label = torch.zeros(len(x), dtype=torch.int64)
        y, y_ = layer(x, label), reference(x_)
        agree(y, y_)
        same_buffers(layer, reference)
        for result in (y, y_):
            (result * make(SHAPES[dims], seed=2)).sum().backward()
        same_gradients(layer, reference, x, x_)
        agree(layer.eval()(x, label), reference.eval()(x_))

    @DIMS
    @pytest.mark.parametrize("mode", [True, False])
    def test_each_class_has_its_own_straight_line_after_common_statistics(self, dims, mode):
        layer, x = conditional(dims, 4).train(mode), make(SHAPES[dims])
        plain = getattr(nn, f"BatchNorm{dims}")(C, affine=False, dtype=torch.float64).train(mode)
        label = torch.arange(len(x), dtype=torch.int32) % 4
        y, z_hat = layer(x, label), plain(x)
        for n, k in enumerate(label):
            vector = (C, *[1] * (x.dim() - 2))
            expected = z_hat[n] * layer.weight[k].view(vector) + layer.bias[k].view(vector)
            agree(y[n], expected)

    def test_absent_classes_get_no_gradient(self):
        layer = conditional("1d", 4)
        layer(make((12, C)), torch.full((12,), 2)).square().sum().backward()
        assert [bool(row.any()) for row in layer.bias.grad] == [False, False, True, False]

    def test_the_start_is_a_batch_norms_or_random(self):
        layer = bnn.ConditionalBatchNorm2d(C, 4)
        assert (layer.weight == 1).all()
        assert (layer.bias == 0).all()
        wide = bnn.ConditionalBatchNorm2d(500, 10, weight_std=0.5, bias_std=2)
        found = [wide.weight.mean(), wide.weight.std(), wide.bias.mean(), wide.bias.std()]
        # 5,000 numbers: a standard error of 0.03 or less
        torch.testing.assert_close(
            torch.stack(found), torch.tensor([1, 0.5, 0, 2]), rtol=0, atol=0.2
        )

    def test_its_state_goes_into_another(self):
        layer, other = conditional("1d", 4), bnn.ConditionalBatchNorm1d(C, 4, dtype=torch.float64)
        layer(make((12, C)), torch.arange(12) % 4)
        other.load_state_dict(layer.state_dict())
        label = torch.arange(12) % 3
        agree(other.eval()(make((12, C)), label), layer.eval()(make((12, C)), label))

    @pytest.mark.parametrize(
        ("label", "error", "match"),
        [
            (torch.tensor([0, 1, 4]), IndexError, "classes from 0 to 3, got 4"),
            (torch.tensor([0, -1, 2]), IndexError, "classes from 0 to 3, got -1"),
            (torch.tensor([0.0, 1, 2]), TypeError, "int64 or int32, got torch.float32"),
            (torch.tensor([True, False, True]), TypeError, "got torch.bool"),
            ([0, 1, 2], TypeError, "got list"),
            (torch.tensor([0, 1]), ValueError, r"label of shape \(3,\)"),
            (torch.tensor([[0, 1, 2]]), ValueError, r"got \(1, 3\)"),
            (torch.eye(3).long(), ValueError, r"label of shape \(3,\)"),
        ],
    )
    def test_wrong_labels_are_refused(self, label, error, match):
        refused(conditional("1d", 4), error, match, make((3, C)), label)

    def test_no_classes_are_refused(self):
        with pytest.raises(ValueError, match="1 class or more"):
            bnn.ConditionalBatchNorm1d(C, 0)

    def test_an_empty_batch_is_an_empty_batch(self):
        y = conditional("2d", 4)(torch.empty(0, C, 4, 5).double(), torch.empty(0).long())
        assert y.shape == (0, C, 4, 5)

    def test_label_may_be_named(self):
        layer, x, label = conditional("1d", 4), make((12, C)), torch.arange(12) % 4
        agree(layer(input=x, label=label), layer(x, label))

    def test_it_stays_one_node_in_a_graph(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = conditional("1d", 4)

            def forward(self, x, label):
                return self.norm(x, label=label).relu()

        model = Model().eval()
        graph = torch.fx.symbolic_trace(model)
        x, label = make((12, C)), torch.arange(12) % 4
        assert [node.op for node in graph.graph.nodes].count("call_module") == 1
        agree(graph(x, label), model(x, label))


class TestVirtual:
    @DIMS
    @pytest.mark.parametrize("affine", [True, False])
    def test_each_row_is_torchs_batch_norm_of_the_reference_and_itself(self, dims, affine):
        layer = getattr(bnn, f"VirtualBatchNorm{dims}")(C, affine=affine, dtype=torch.float64)
        plain = getattr(nn, f"BatchNorm{dims}")(C, affine=affine, dtype=torch.float64)
        if affine:
            for norm in (layer, plain):
                norm.load_state_dict({k: state()[k] for k in ("weight", "bias")}, strict=False)
        x, x_ = leaves(make(SHAPES[dims]))
        reference, reference_ = leaves(make((6, *SHAPES[dims][1:]), seed=4) + 2)
        rows = [plain(torch.cat([reference_, x_[n : n + 1]]))[-1:] for n in range(len(x_))]
        y, y_ = layer(x, reference), torch.cat(rows)
        agree(y, y_)
        for result in (y, y_):
            (result * make(SHAPES[dims], seed=2)).sum().backward()
        same_gradients(layer, plain, x, x_, reference, reference_)
        agree(layer(reference), plain(reference))

    def test_companions_have_no_say(self):
        layer, x = bnn.VirtualBatchNorm2d(C, dtype=torch.float64), make(SHAPES["2d"])
        reference, others = make(SHAPES["2d"], seed=5), x.clone()
        others[1:] += 7
        agree(layer(others, reference)[0], layer(x, reference)[0])
        assert (layer(others)[0] - layer(x)[0]).abs().max() > 0.1

    def test_there_are_no_modes_and_no_buffers(self):
        layer, x = bnn.VirtualBatchNorm1d(C, dtype=torch.float64), make((12, C))
        assert torch.equal(layer.train()(x), layer.eval()(x))
        assert [*layer.state_dict()] == ["weight", "bias"]

    @pytest.mark.parametrize("shape", [(6, C + 1, 4, 5), (6, C, 4, 4), (6, C), (0, C, 4, 5)])
    def test_a_reference_of_another_shape_is_refused(self, shape):
        layer = bnn.VirtualBatchNorm2d(C, dtype=torch.float64)
        reference = torch.ones(shape, dtype=torch.float64)
        refused(layer, ValueError, "expected a reference of shape", make(SHAPES["2d"]), reference)

    def test_a_reference_of_another_type_is_refused(self):
        layer, x = bnn.VirtualBatchNorm2d(C, dtype=torch.float64), make(SHAPES["2d"])
        refused(layer, RuntimeError, "expected a reference as the input", x, x.float())
        refused(layer, TypeError, "must be Tensor", x, [1, 2])

    def test_a_batch_of_one_is_refused_only_as_the_reference(self):
        layer, x = bnn.VirtualBatchNorm1d(C, dtype=torch.float64), make((12, C))
        refused(layer, ValueError, "more than 1 value per channel", x[:1])
        assert layer(x[:1], x[1:]).shape == (1, C)


class TestFrozen:
    @DIMS
    @pytest.mark.parametrize("mode", [True, False])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_it_is_torchs_batch_norm_in_evaluation(self, dims, mode, dtype):
        reference = theirs(dims, dtype=dtype).eval()
        frozen = bnn.convert_frozen_batchnorm(copy.deepcopy(reference)).train(mode)
        x, x_ = leaves(make(SHAPES[dims], dtype))
        y, y_ = frozen(x), reference(x_)
        agree(y, y_)
        for result in (y, y_):
            result.float().square().sum().backward()
        agree(x.grad / x.grad.abs().max(), x_.grad / x.grad.abs().max())

    def test_a_batch_norms_state_loads_with_its_counter(self):
        frozen = bnn.FrozenBatchNorm2d(C, dtype=torch.float64)
        assert frozen.load_state_dict(state())
        agree(frozen(make(SHAPES["2d"])), theirs("2d").eval()(make(SHAPES["2d"])))
        again = bnn.FrozenBatchNorm2d(C, dtype=torch.float64)
        again.load_state_dict(frozen.state_dict())
        assert [*frozen.state_dict()] == ["weight", "bias", "running_mean", "running_var"]

    def test_a_fresh_one_is_a_fresh_batch_norm(self):
        frozen, x = bnn.FrozenBatchNorm2d(C), make(SHAPES["2d"], torch.float32)
        agree(frozen(x), nn.BatchNorm2d(C).eval()(x))

    def test_it_has_no_parameters_and_nothing_moves(self):
        frozen = ours("FrozenBatchNorm", "2d").train()
        before = copy.deepcopy(frozen.state_dict())
        frozen(make(SHAPES["2d"]).requires_grad_()).sum().backward()
        assert not list(frozen.parameters())
        assert all(torch.equal(before[k], v) for k, v in frozen.state_dict().items())

    def test_other_shapes_and_types_are_refused(self):
        frozen = bnn.FrozenBatchNorm2d(C)
        refused(frozen, ValueError, "expected 4D input", torch.ones(3, C))
        refused(frozen, RuntimeError, f"should contain {C + 1}", torch.ones(2, C + 1, 4, 4))
        refused(
            frozen,
            NotImplementedError,
            "not implemented for 'int64'",
            torch.ones(2, C, 1, 1).long(),
        )


class TestConvertFrozen:
    def model(self):
        shared = nn.BatchNorm2d(C, eps=0.1)
        return nn.Sequential(
            nn.Conv2d(1, C, 3),
            shared,
            nn.Sequential(nn.ReLU(), bnn.BatchNorm2d(C, affine=False), shared),
            nn.Flatten(),
            nn.BatchNorm1d(C * 4),
        ).double()

    def test_a_model_in_training_does_what_it_did_in_evaluation(self):
        torch.manual_seed(0)
        model, x = self.model(), torch.randn(8, 1, 4, 4).double()
        model(x)
        expected = model.eval()(x)
        assert bnn.convert_frozen_batchnorm(model) is model
        agree(model.train()(x), expected)
        kinds = [type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__]
        assert kinds == ["FrozenBatchNorm2d", "FrozenBatchNorm2d", "FrozenBatchNorm"]
        assert model[1] is model[2][2]

    def test_update_bn_passes_it_by(self):
        model = bnn.convert_frozen_batchnorm(nn.Sequential(theirs("1d")))
        update_bn([make((12, C))], model)
        agree(model[0].running_mean, state()["running_mean"])

    @pytest.mark.parametrize(
        ("norm", "match"),
        [
            (nn.BatchNorm1d(C, track_running_stats=False), "running statistics, got 1"),
            (nn.LazyBatchNorm1d(), "running statistics, got 1"),
            (bnn.ConditionalBatchNorm1d(C, 2), "one gamma and beta, got 1"),
        ],
    )
    def test_what_cannot_be_frozen_is_named_and_nothing_changes(self, norm, match):
        model = nn.Sequential(nn.BatchNorm1d(C), norm)
        with pytest.raises(ValueError, match=match):
            bnn.convert_frozen_batchnorm(model)
        assert type(model[0]) is nn.BatchNorm1d

    def test_only_modules_are_converted(self):
        with pytest.raises(TypeError, match=r"expected a torch.*Module, got dict"):
            bnn.convert_frozen_batchnorm({})


class TestAdaIN:
    @pytest.mark.parametrize("shape", [(4, C, 6), (4, C, 5, 6), (2, C, 3, 4, 2)])
    def test_it_is_torchs_instance_norm_with_the_styles_statistics(self, shape):
        x, x_ = leaves(make(shape))
        s, s_ = leaves(make((*shape[:2], 7, *shape[2:]), seed=3) * 3)
        axes = tuple(range(2, s.dim()))
        mean, var = s_.mean(axes), s_.var(axes, correction=0)
        vector = (*shape[:2], *[1] * (len(shape) - 2))
        normalized = nn.functional.instance_norm(x_)
        expected = normalized * (var + 1e-5).sqrt().view(vector) + mean.view(vector)
        y = bnn.AdaIN()(x, s)
        agree(y, expected)
        for result in (y, expected):
            (result * make(shape, seed=2)).sum().backward()
        agree(x.grad, x_.grad)
        agree(s.grad, s_.grad)

    def test_an_image_is_its_own_style(self):
        x = make((4, C, 5, 6))
        torch.testing.assert_close(bnn.AdaIN()(x, x), x)

    @pytest.mark.parametrize(
        ("content", "style", "error", "match"),
        [
            (torch.ones(4, C), torch.ones(4, C), ValueError, "expected content of shape"),
            (torch.ones(4, C, 1, 1), torch.ones(4, C, 2, 2), ValueError, "expected content"),
            (torch.ones(4, C, 2, 2), torch.ones(4, C, 1), ValueError, "expected style of shape"),
            (torch.ones(4, C, 2, 2), torch.ones(3, C, 2, 2), ValueError, r"N, C = \(4, 3\)"),
            (torch.ones(4, C, 2), torch.ones(4, C, 2).double(), RuntimeError, "style as content"),
            (torch.ones(4, C, 2), 5, TypeError, "must be Tensor, not int"),
        ],
    )
    def test_wrong_pairs_are_refused(self, content, style, error, match):
        refused(bnn.AdaIN(), error, match, content, style)


def call(layer, x):
    """Call a relative as it wants to be called."""
    if isinstance(layer, (bnn.ConditionalBatchNorm1d, bnn.ConditionalBatchNorm2d)):
        return layer(x, torch.arange(len(x)) % layer.num_classes)
    if isinstance(layer, bnn.AdaIN):
        return layer(x, x.flip(0))
    if isinstance(layer, (bnn.VirtualBatchNorm1d, bnn.VirtualBatchNorm2d)):
        return layer(x, x.flip(0))
    return layer(x)


EVERY = {
    "ghost": lambda **kind: bnn.GhostBatchNorm2d(C, 4, **kind),
    "renorm": lambda **kind: bnn.BatchRenorm2d(C, **kind),
    "conditional": lambda **kind: bnn.ConditionalBatchNorm2d(C, 4, weight_std=1, **kind),
    "virtual": lambda **kind: bnn.VirtualBatchNorm2d(C, **kind),
    "frozen": lambda **kind: bnn.FrozenBatchNorm2d(C, **kind),
    "adain": lambda **_: bnn.AdaIN(),
}

BATCH_NORMS = ["ghost", "renorm", "conditional", "virtual"]


@pytest.mark.parametrize("name", EVERY)
class TestEvery:
    @pytest.mark.parametrize("mode", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_lower_types_round_what_float64_gives(self, name, mode, dtype):
        torch.manual_seed(0)
        exact = EVERY[name](dtype=torch.float64).train(mode)
        rounded = EVERY[name](dtype=torch.float32).train(mode)
        rounded.load_state_dict(exact.state_dict())
        x = make(SHAPES["2d"], dtype)
        y, expected = call(rounded, x), call(exact, x.double())
        assert y.dtype == dtype
        agree(y, expected.to(dtype))

    @pytest.mark.parametrize("mode", [True, False])
    def test_two_derivatives_are_right(self, name, mode):
        torch.manual_seed(0)
        layer = EVERY[name](dtype=torch.float64).train(mode)
        if name == "renorm":
            layer.r_max, layer.d_max = 1, 0  # its gradient holds r and d for constants
        x = make((4, C, 2, 2)).requires_grad_()
        assert gradcheck(lambda x: call(copy.deepcopy(layer), x), x)
        assert gradgradcheck(lambda x: call(copy.deepcopy(layer), x), x)

    def test_images_with_the_channels_last_give_the_same(self, name):
        layer = EVERY[name](dtype=torch.float64)
        x = make(SHAPES["2d"])
        other = copy.deepcopy(layer)
        agree(call(other, x.to(memory_format=torch.channels_last)), call(layer, x))

    def test_it_survives_pickling_and_says_what_it_is(self, name):
        layer = EVERY[name](dtype=torch.float64)
        again = pickle.loads(pickle.dumps(layer))
        assert repr(again) == repr(layer)
        assert "eps=1e-05" in repr(layer)
        agree(call(again, make(SHAPES["2d"])), call(layer, make(SHAPES["2d"])))

    def test_torch_finds_the_batch_norms_among_them(self, name):
        layer = EVERY[name]()
        expected = name in BATCH_NORMS
        assert isinstance(layer, nn.BatchNorm2d) == expected


@pytest.mark.parametrize("name", BATCH_NORMS)
class TestBatchNorms:
    def test_a_batch_of_one_value_or_another_shape_is_not_even_counted(self, name):
        layer = EVERY[name](dtype=torch.float64)
        label = [torch.zeros(1).long()] if name == "conditional" else []
        one = torch.ones(1, C, 1, 1).double()
        refused(layer, ValueError, "more than 1 value per channel", one, *label)
        refused(layer, ValueError, "expected 4D input", one[0], *label)
        four = torch.ones(1, C + 1, 2, 2).double()
        refused(layer, RuntimeError, f"should contain {C + 1} elements", four, *label)
        refused(layer, RuntimeError, "mixed dtype", four[:, :C].float(), *label)

    @pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")
    def test_jit_script_is_told_what_to_do_instead(self, name):
        with pytest.raises(NotImplementedError, match=r"use torch\.jit\.trace"):
            torch.jit.script(EVERY[name]())
