"""The four steps and their paths against float64, and the functions against torch.nn.functional."""

import itertools
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bnlib.nn import cpu
from bnlib.nn import functional as F

THEIRS = torch.nn.functional
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# What a kernel of PyTorch's that normalizes, or reduces to a variance, would be called.
KERNELS = ("norm", "var", "std", "cudnn", "miopen", "welford")


@contextmanager
def plain_operations():
    """Do without the fast core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "available", lambda *_, **__: False)
        yield


def channels_of(x):
    """Return x as (C, m) in float64."""
    return x.double().movedim(1, 0).flatten(1)


def make(shape, mean=0.0, std=1.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def vector(C, seed=0):
    return make((C,), 0.5, 2, seed=seed)


def norm(function, x, dy, training, *, weight=None, bias=None, **options):
    """Return y, the gradients for x, weight and bias, and the running statistics after it."""
    x = x.detach().clone().requires_grad_()
    C, wide = x.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, var = torch.full((C,), 0.5, dtype=wide), torch.full((C,), 2.0, dtype=wide)
    affine = [None if v is None else v.to(wide).requires_grad_() for v in (weight, bias)]
    y = function(x, mean, var, *affine, training, **options)
    wanted = [x, *(v for v in affine if v is not None)]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype)), mean, var]


class TestSteps:
    @pytest.mark.parametrize("shape", [(16, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
    def test_moments_are_those_of_the_channels(self, shape):
        x = make(shape, 3, 2)
        mean, var = F.moments(x)
        torch.testing.assert_close(mean, channels_of(x).mean(1))
        torch.testing.assert_close(var, channels_of(x).var(1, correction=0))

    def test_moments_of_nothing_are_zeros(self):
        mean, var = F.moments(torch.empty(0, 3))
        assert mean.tolist() == var.tolist() == [0, 0, 0]

    def test_the_variance_of_a_constant_channel_is_not_negative(self):
        for value in (0.1, 1e4, -3e-7):
            _, var = F.moments(torch.full((1000, 2), value))
            assert (var >= 0).all()

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_the_steps_make_a_forward_and_a_backward_pass(self, dtype):
        x, dy, weight, bias = make((8, 3, 4), 3, 2, dtype), make((8, 3, 4), 1), vector(3), vector(3)
        leaf, dy = x.double().requires_grad_(), dy.to(dtype)
        y = THEIRS.batch_norm(leaf, None, None, weight, bias, True)
        expected = [y.detach(), *torch.autograd.grad(y, leaf, dy.double())]
        mean, var = F.moments(x)
        invstd = (var + 1e-5).rsqrt()
        sums = F.reduce(dy, x, mean, invstd)
        y = F.normalize(x, mean, invstd, weight, bias)
        dx = F.input_gradient(dy, x, mean, invstd, weight, *sums, 32)
        assert y.dtype == dx.dtype == dtype
        assert mean.dtype == sums[0].dtype == sums[1].dtype == torch.float64
        eps = torch.finfo(dtype).eps  # one rounding of values up to 5, and of sums of 32 terms
        torch.testing.assert_close([y.double(), dx.double()], expected, rtol=4 * eps, atol=20 * eps)

    def test_the_count_may_be_a_tensor(self):
        x, dy = make((8, 3)), make((8, 3), seed=1)
        mean, var = F.moments(x)
        arguments = dy, x, mean, var.rsqrt(), None, *F.reduce(dy, x, mean, var.rsqrt())
        torch.testing.assert_close(
            F.input_gradient(*arguments, torch.tensor(8)), F.input_gradient(*arguments, 8)
        )


class TestExactness:
    """A float32 batch whose mean is far from 0, against the same batch in float64."""

    # Errors grow from 4e-7 without an offset to 3e-5, 2e-2 and 3e-2 in PyTorch's CPU kernel.
    @pytest.mark.parametrize(("mean", "std"), [(1e3, 1), (1e4, 1e-2), (1e6, 1)])
    @pytest.mark.parametrize("path", ["plain", "fast", "compiled"])
    def test_an_offset_costs_no_digits(self, path, mean, std):
        x, dy = make((64, 4, 50), mean, std, torch.float32), make((64, 4, 50), seed=1)
        errors = []
        function = F.batch_norm
        if path == "compiled":
            function = torch.compile(F.batch_norm, backend="aot_eager", fullgraph=True)
        exact = norm(THEIRS.batch_norm, x.double(), dy, True)
        for each in (function, THEIRS.batch_norm):
            if path == "plain":
                with plain_operations():
                    results = norm(each, x, dy, True)
            else:
                results = norm(each, x, dy, True)
            errors.append([(a - b).abs().max().item() for a, b in zip(results, exact, strict=True)])
        (y, dx, *_), (their_y, *_) = errors
        assert y < 3e-6
        assert dx * std < 3e-6
        assert y < their_y / 10

    @pytest.mark.parametrize("path", ["plain", "fast"])
    def test_without_an_offset_the_error_is_of_pytorchs_order(self, path):
        x, dy = make((64, 4, 50), dtype=torch.float32), make((64, 4, 50), seed=1)
        exact = norm(THEIRS.batch_norm, x.double(), dy, True)
        theirs = norm(THEIRS.batch_norm, x, dy, True)
        if path == "plain":
            with plain_operations():
                ours = norm(F.batch_norm, x, dy, True)
        else:
            ours = norm(F.batch_norm, x, dy, True)
        for a, b, c in zip(ours[:2], theirs[:2], exact[:2], strict=True):
            assert (a - c).abs().max() < 3 * (b - c).abs().max()

    def test_half_precision_is_summed_in_float32(self):
        x = make((64, 2, 32), 0, 1, torch.float16) * 300  # squares overflow, sums as well
        mean, var = F.moments(x)
        torch.testing.assert_close(mean, channels_of(x).mean(1), rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(var, channels_of(x).var(1, correction=0), rtol=1e-6, atol=0)


class TestPaths:
    shapes = ((16, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4))

    @settings(max_examples=80, deadline=None)
    @given(
        shape=st.tuples(st.integers(0, 6), st.integers(1, 4)).flatmap(
            lambda nc: st.lists(st.integers(1, 4), max_size=3).map(lambda rest: (*nc, *rest))
        ),
        dtype=st.sampled_from(FLOATS),
        training=st.booleans(),
        affine=st.tuples(st.booleans(), st.booleans()),
        order=st.sampled_from(["as it is", "channels last", "transposed", "sliced", "expanded"]),
        seed=st.integers(0, 999),
    )
    def test_any_shape_type_and_layout_matches_pytorch(
        self, shape, dtype, training, affine, order, seed
    ):
        N, C, *spatial = shape
        count = N * torch.Size(spatial).numel()
        if training and count == 1:
            shape = (2, C, *spatial)
        x = laid_out(make(shape, 3, 2, dtype, seed), order)
        weight, bias = (vector(C, seed) if wanted else None for wanted in affine)
        dy = laid_out(make(x.shape, 1, 1, seed=seed), order)
        options = {"weight": weight, "bias": bias, "eps": 0.01, "momentum": 0.3}
        expected = norm(THEIRS.batch_norm, x, dy, training, **options)
        fast = norm(F.batch_norm, x, dy, training, **options)
        with plain_operations():
            plain = norm(F.batch_norm, x, dy, training, **options)
        # Results near 10 to 100, rounded once to x's type; float32 sums up to 384 terms.
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
        # Terms of dx that may cancel are as large as 1 / sqrt(eps) in a constant channel.
        least = [1, 1 / math.sqrt(options["eps"])] + [1] * (len(expected) - 2)
        for ours in (fast, plain):
            for a, b, size in zip(ours, expected, least, strict=True):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                scale = max(b.abs().max().item(), size) if b.numel() else 1
                torch.testing.assert_close(a, b, rtol=4 * tolerance, atol=8 * tolerance * scale)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("order", ["channels last", "transposed", "sliced", "expanded"])
    def test_the_plain_path_lays_out_memory_as_pytorch_does(self, order, training):
        x, dy, strides = *(laid_out(make((2, 3, 4, 5), seed=i), order) for i in range(2)), []
        with plain_operations():
            for function in (F.batch_norm, THEIRS.batch_norm):
                leaf = x.detach().requires_grad_()
                y = function(leaf, *torch.ones(2, 3).double(), training=training)
                (dx,) = torch.autograd.grad(y, leaf, dy)
                strides.append((y.stride(), dx.stride()))
        assert strides[0] == strides[1]

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("shape", shapes)
    def test_the_fast_core_runs_where_it_should(self, shape, training, monkeypatch):
        def refuse(*_):
            raise AssertionError("plain operations ran")

        for step in ("normalize", "reduce", "input_gradient"):
            monkeypatch.setattr(F, step, refuse)
        for dtype in (torch.float32, torch.float64):
            norm(F.batch_norm, make(shape, dtype=dtype), make(shape), training)
        with pytest.raises(AssertionError):
            norm(F.batch_norm, make(shape, dtype=torch.bfloat16), make(shape), training)

    def test_the_fast_core_needs_memory_that_nobody_watches(self):
        x = make((4, 3))
        assert cpu.available(x, None, eps=1e-5)
        with Recorder():
            assert not cpu.available(x, eps=1e-5)
        for other in (x[:0], x.to("meta"), torch._neg_view(x), x.as_subclass(Recorded)):
            assert not cpu.available(other, eps=1e-5)
            assert not cpu.available(x, None, other, eps=1e-5)
        assert not cpu.available(x.half(), eps=1e-5)
        assert not cpu.available(x, eps=0)
        assert not cpu.available(x, eps=float("nan"))

    def test_negated_views_are_read_as_what_they_mean(self):
        x = make((4, 3))
        torch.testing.assert_close(
            F.batch_norm(torch._neg_view(x), None, None, training=True),
            F.batch_norm(-x, None, None, training=True),
        )

    def test_eps_that_is_no_number_gives_no_numbers(self):
        x, nan = make((4, 3)), float("nan")
        for function in (F.batch_norm, THEIRS.batch_norm):
            assert function(x, None, None, training=True, eps=nan).isnan().all()


def laid_out(x, order):
    """Return the values of x, laid out in memory otherwise."""
    if order == "channels last" and x.dim() in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.contiguous(memory_format=formats[x.dim()])
    if order == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if order == "sliced":
        return torch.stack([x, x], dim=-1)[..., 1]
    if order == "expanded" and len(x):
        return x[:1].expand(x.shape)
    return x


class Recorded(torch.Tensor):
    """A subclass, which may hold its values elsewhere."""


class Recorder(TorchDispatchMode):
    """Write down every operator that PyTorch dispatches."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


class TestFromScratch:
    def norms(self):
        weight, bias = vector(4).requires_grad_(), vector(4).requires_grad_()
        mean, var = torch.zeros(4).double(), torch.ones(4).double()
        for training in (True, False):
            yield lambda x, t=training: F.batch_norm(x, mean, var, weight, bias, t)
            yield lambda x, t=training: F.instance_norm(x, mean, var, weight, bias, t)
        yield lambda x: F.layer_norm(
            x, (5, 4), torch.ones(5, 4).double(), torch.ones(5, 4).double()
        )
        yield lambda x: F.group_norm(x, 2, weight, bias)
        yield lambda x: F.rms_norm(x, (4,), weight)

    def test_no_kernel_that_normalizes_is_called(self):
        for function in self.norms():
            x = make((3, 4, 5, 4)).requires_grad_()
            with Recorder() as recorder:
                y = function(x)
                (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
                dx.pow(2).sum().backward()
            assert "aten::mul.Tensor" in recorder.names  # the plain path, seen
            found = [n for n in recorder.names if any(kernel in n for kernel in KERNELS)]
            assert found == []

    def test_the_recorder_sees_pytorchs(self):
        x = make((3, 4, 5)).requires_grad_()
        with Recorder() as recorder:
            THEIRS.batch_norm(x, None, None, training=True).pow(3).sum().backward()
        assert {"aten::native_batch_norm", "aten::native_batch_norm_backward"} <= recorder.names

    @pytest.mark.parametrize("training", [True, False])
    def test_nothing_is_called_behind_the_fast_core(self, training):
        x, names = make((3, 4, 5), dtype=torch.float32).requires_grad_(), []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            F.batch_norm(x, *torch.ones(2, 4), None, None, training).pow(3).sum().backward()
        names = {event.name for event in profile.events() if event.name.startswith("aten::")}
        assert [n for n in names if any(kernel in n for kernel in KERNELS)] == []


class TestErrors:
    """Bad calls of batch_norm: the class of error is PyTorch's, and nothing has moved before it.

    PyTorch has moved the statistics by the time it refuses a bias of another type than the weight.
    """

    def outcome(self, function, *args, **options):
        try:
            function(*args, **options)
        except Exception as error:
            return type(error)
        return None

    def assert_same(self, x, mean, var, *args, **options):
        theirs, ours = ([None if v is None else v.clone() for v in (mean, var)] for _ in range(2))
        expected = self.outcome(THEIRS.batch_norm, x, *theirs, *args, **options)
        assert self.outcome(F.batch_norm, x, *ours, *args, **options) is expected
        for v, old, other in zip(ours, (mean, var), theirs, strict=True):
            if v is not None and not v.is_meta:
                torch.testing.assert_close(v, other if expected is None else old)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("of_weight", [*FLOATS, None])
    @pytest.mark.parametrize("of_statistics", [*FLOATS, None])
    def test_types(self, of_statistics, of_weight, training):
        for of_x in (*FLOATS, torch.int64, torch.bool, torch.complex64):
            statistics = [None if of_statistics is None else torch.ones(3, dtype=of_statistics)] * 2
            weight = None if of_weight is None else torch.ones(3, dtype=of_weight)
            for affine in ((weight, None), (None, weight), (weight, torch.ones(3))):
                self.assert_same(make((4, 3), 3).to(of_x), *statistics, *affine, training)

    @pytest.mark.parametrize("training", [True, False])
    def test_shapes(self, training):
        x, one, four = make((4, 3)), torch.ones(3).double(), torch.ones(4).double()
        good = [one, one, one, one]
        for place, wrong in itertools.product(range(4), (four, one[None], one[:1])):
            self.assert_same(x, *good[:place], wrong, *good[place + 1 :], training)
        for wrong in (x[0, 0], x[0], x[:1], x[:0], x[:, :0], make((2, 3, 1, 1, 1, 2))):
            self.assert_same(wrong, *good, training)
        self.assert_same(x[:0], four, four, one, one, training)

    def test_a_vector_is_refused_without_statistics_too(self):
        with pytest.raises(RuntimeError, match="2 or more dimensions"):
            F.batch_norm(torch.ones(3), None, None, training=True)
        with pytest.raises(IndexError):  # what happens to PyTorch there
            THEIRS.batch_norm(torch.ones(3), None, None, training=True)

    @pytest.mark.parametrize("training", [True, False])
    def test_values(self, training):
        x, one = make((4, 3)), torch.ones(3).double()
        for mean, var in itertools.product((one, None), repeat=2):
            self.assert_same(x, mean, var, None, None, training)
        for eps in (0, -1, 1e-300, "a"):
            self.assert_same(x, one, one, None, None, training, eps=eps)
        for momentum in (None, -1, 2):
            self.assert_same(x, one, one, None, None, training, momentum=momentum)
        for name in ("weight", "bias"):
            self.assert_same(x, one, one, training=training, **{name: [1, 1, 1]})
            self.assert_same(x, one, one, training=training, **{name: one.to("meta")})
        self.assert_same(x.to("meta"), one, one, None, None, training)
        self.assert_same(x, one.to("meta"), one.to("meta"), None, None, training)
        self.assert_same(x.to_sparse(), one, one, None, None, training)
        self.assert_same(x.numpy(), one, one, None, None, training)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad])
    def test_statistics_that_require_a_gradient(self, guard, training):
        x, outcomes = make((4, 3)), []
        for function in (F.batch_norm, THEIRS.batch_norm):
            mean, var = torch.zeros(3).double().requires_grad_(), torch.ones(3).double()
            with guard():
                outcomes.append(self.outcome(function, x, mean, var, None, None, training))
        assert outcomes[0] is outcomes[1]


class TestLargeResults:
    """On a CPU a large result takes its memory from NumPy; nobody should notice."""

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_equal_pytorchs_and_lie_in_memory_as_they_do(self, training, memory_format):
        x = make((8, 16, 96, 96), 3, 2, torch.float32).contiguous(memory_format=memory_format)
        dy = make(x.shape, dtype=torch.float32, seed=1)
        assert x.nbytes >= cpu.LARGE
        options = {"weight": vector(16), "bias": vector(16, 1)}
        ours, theirs = (norm(f.batch_norm, x, dy, training, **options) for f in (F, THEIRS))
        for a, b in zip(ours, theirs, strict=True):
            # PyTorch's float32 sums of 70,000 values are off by some thousandths.
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-4 if a.dim() == 4 else 2e-2)
        y = F.batch_norm(x, torch.zeros(16), torch.ones(16), training=training)
        assert y.is_contiguous(memory_format=memory_format)

    def test_can_be_changed_in_place_behind_the_layer(self):
        x = make((8, 16, 96, 96), dtype=torch.float32).requires_grad_()
        for function in (F, THEIRS):
            y = torch.relu_(function.batch_norm(x, None, None, training=True))
            (grad,) = torch.autograd.grad(y.square().sum(), x)
            if function is F:
                ours = grad
        torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-4)
