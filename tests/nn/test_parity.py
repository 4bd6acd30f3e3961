"""The parity matrix: each behaviour of torch.nn.BatchNorm1d, 2d and 3d, held against ours.

A behaviour is a function of a case (1d, 2d or 3d) whose name says what is the same. Inputs lie far
from mean 0 and deviation 1.
"""

import copy
import io
import itertools
import pickle
import re
import warnings
import weakref
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from bnlib import nn as bnn

with warnings.catch_warnings():  # PyTorch's own, at the first use of forward mode
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._decomp.decompositions_for_jvp

CHANNELS = 3
BUFFERS = ["running_mean", "running_var", "num_batches_tracked"]

# Both sides sum a few hundred terms near 20: float64 rounds at 1e-16 of them, float32 at 6e-8.
# Half types: one rounding of the result, 5e-4 or 4e-3 of it, may fall either way.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """One pair of classes, and the shapes of their inputs."""

    dims: str
    shapes: list[tuple[int, ...]]

    @property
    def ours(self):
        return getattr(bnn, f"BatchNorm{self.dims}")

    @property
    def theirs(self):
        return getattr(torch.nn, f"BatchNorm{self.dims}")

    @property
    def shape(self):
        return self.shapes[0]

    def pair(self, dtype=torch.float64, seed=1, **options):
        """Return a layer of ours and one of PyTorch's, in the same random state."""
        ours = self.ours(CHANNELS, dtype=dtype, **options)
        rng = np.random.default_rng(seed)
        state = {
            "weight": rng.uniform(0.5, 3, CHANNELS) * [1, -1, 1],
            "bias": rng.normal(0, 4, CHANNELS),
            "running_mean": rng.normal(0, 3, CHANNELS),
            "running_var": rng.uniform(0.2, 9, CHANNELS),
            "num_batches_tracked": 5,
        }
        ours.load_state_dict({k: torch.as_tensor(state[k]) for k in ours.state_dict()})
        theirs = self.theirs(CHANNELS, dtype=dtype, **options)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    def x(self, shape=None, dtype=torch.float64, seed=0):
        rng = np.random.default_rng(seed)
        shape = shape or self.shape
        per_channel = (1, shape[1], *(1,) * (len(shape) - 2))
        x = rng.uniform(0.5, 5, per_channel) * rng.gamma(2, size=shape)
        return torch.from_numpy(x + rng.uniform(-9, 9, per_channel)).to(dtype)

    def same(self, *pair, x=None, training=True):
        """Run both layers of a pair on x, in one mode, and hold all results equal."""
        x = self.x(dtype=next(iter(pair[0].state_dict().values())).dtype) if x is None else x
        runs = [run(layer.train(training), x) for layer in pair]
        assert_same(*runs)


CASES = [
    Case("1d", [(8, 3), (6, 3, 5), (1, 3, 4)]),
    Case("2d", [(4, 3, 5, 6), (1, 3, 2, 2)]),
    Case("3d", [(2, 3, 3, 4, 5), (1, 3, 2, 1, 2)]),
]
BEHAVIOURS = []


def behaviour(function):
    """Put a check into the matrix; its name is the behaviour's."""
    BEHAVIOURS.append(function)
    return function


def run(layer, x, seed=3):
    """Return what one forward and backward pass through a layer gives, and leaves in it."""
    x = x.detach().clone().requires_grad_() if x.is_floating_point() else x
    y = layer(x)
    dy = torch.from_numpy(np.random.default_rng(seed).normal(1, 3, y.shape)).to(y.dtype)
    wanted = {"x": x, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(y, [*wanted.values()], dy)
    results = {"y": y.detach(), **{f"d{n}": g for n, g in zip(wanted, grads, strict=True)}}
    return {**results, **copy.deepcopy(layer.state_dict())}


def assert_same(ours, theirs, factor=1.0):
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        got = ours[name]
        assert (got.dtype, got.shape, got.device) == (
            expected.dtype,
            expected.shape,
            expected.device,
        )
        types = {v.dtype for v in theirs.values() if v.is_floating_point()} or {torch.float64}
        tolerance = factor * max(TOLERANCE[t] for t in types)
        scale = expected.double().abs().nan_to_num().max().item() if expected.numel() else 0
        torch.testing.assert_close(
            got, expected, rtol=tolerance, atol=tolerance * max(scale, 1), equal_nan=True
        )


def raised(function, *args):
    """Return the error that a call raises."""
    with pytest.raises(Exception) as info:  # noqa: PT011
        function(*args)
    return info.value


def state_of(layer):
    return copy.deepcopy(layer.state_dict())


# Values


@behaviour
def training_outputs_and_gradients(case):
    for shape in case.shapes:
        case.same(*case.pair(), x=case.x(shape))
        case.same(*case.pair(torch.float32), x=case.x(shape, torch.float32))


@behaviour
def evaluation_outputs_and_gradients(case):
    for shape in case.shapes:
        case.same(*case.pair(), x=case.x(shape), training=False)
        case.same(*case.pair(torch.float32), x=case.x(shape, torch.float32), training=False)


@behaviour
def running_statistics_over_ten_batches(case):
    for momentum in (0.1, 0.9, 0.0, 1.0, 1, None):
        ours, theirs = case.pair(momentum=momentum)
        for seed in range(10):
            case.same(ours, theirs, x=case.x((2 + seed, *case.shape[1:]), seed=seed))


@behaviour
def momentum_none_is_the_plain_average(case):
    layer = case.ours(CHANNELS, momentum=None, dtype=torch.float64)
    batches = [case.x(seed=seed) for seed in range(6)]
    for x in batches:
        layer(x)
    values = [x.movedim(1, 0).flatten(1) for x in batches]
    mean = torch.stack([v.mean(1) for v in values]).mean(0)
    var = torch.stack([v.var(1, correction=1) for v in values]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=1e-12)


@behaviour
def every_constructor_argument(case):
    options = [{"eps": 0.3}, {"affine": False}, {"bias": False}, {"track_running_stats": False}]
    options += [{"affine": False, "bias": False}, {"affine": False, "track_running_stats": False}]
    for given, training in itertools.product(options, (True, False)):
        case.same(*case.pair(**given), x=case.x(), training=training)
    for arguments in ((3, 0.8), (3, 1e-3, 0.2, False), (3, 1e-5, None, True, False, "cpu")):
        ours, theirs = case.ours(*arguments), case.theirs(*arguments)
        assert repr(ours) == repr(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
        assert ours.eps == theirs.eps
    raised(case.ours, 3, 1e-5, 0.1, True, True, None, None, False)  # bias is no position
    layer = case.ours(3, dtype=torch.float16)
    assert {v.dtype for v in layer.state_dict().values()} == {torch.float16, torch.int64}


@behaviour
def initial_state(case):
    assert_same(state_of(case.ours(3)), state_of(case.theirs(3)))
    assert [n for n, _ in case.ours(3).named_parameters()] == ["weight", "bias"]
    layer = case.ours(3, affine=False, track_running_stats=False)
    assert (layer.weight, layer.bias, layer.running_mean, layer.state_dict()) == (*[None] * 3, {})


@behaviour
def flags_switched_after_construction(case):
    for training, track, buffers in itertools.product([True, False], repeat=3):
        ours, theirs = case.pair(track_running_stats=buffers)
        ours.track_running_stats = theirs.track_running_stats = track
        before = state_of(ours)
        case.same(ours, theirs, training=training)
        moved = [n for n, v in ours.state_dict().items() if not torch.equal(v, before[n])]
        assert moved == (BUFFERS if training and track and buffers else [])


@behaviour
def momentum_and_eps_switched_between_batches(case):
    ours, theirs = case.pair()
    for seed, (momentum, eps) in enumerate([(0.5, 1e-5), (None, 1e-2), (0.2, 1)]):
        for layer in (ours, theirs):
            layer.momentum, layer.eps = momentum, eps
        case.same(ours, theirs, x=case.x(seed=seed))


@behaviour
def requires_grad_false_does_not_freeze_the_statistics(case):
    for names in (["weight"], ["bias"], ["weight", "bias"]):
        pair = case.pair()
        for layer, name in itertools.product(pair, names):
            getattr(layer, name).requires_grad_(False)
        before = state_of(pair[0])
        case.same(*pair)
        assert not torch.equal(pair[0].running_mean, before["running_mean"])


@behaviour
def no_grad_does_not_freeze_the_statistics(case):
    for guard in (torch.no_grad, torch.inference_mode):
        pair = case.pair()
        with guard():
            ys = [layer(case.x()) for layer in pair]
        assert not ys[0].requires_grad
        assert_same(state_of(pair[0]), state_of(pair[1]))


@behaviour
def reset_running_stats(case):
    for track in (True, False):
        ours, theirs = case.pair(momentum=None)
        for layer in (ours, theirs):
            layer.track_running_stats = track
            layer.reset_running_stats()
        case.same(ours, theirs)
    case.ours(3, track_running_stats=False).reset_running_stats()


# Derivatives


@behaviour
def gradients_checked_numerically_twice(case):
    shape = (3, 2, 2, 1, 1)[: len(case.shape)]
    x = case.x(shape).requires_grad_()
    weight, bias = (torch.tensor(v).double().requires_grad_() for v in ([1.5, -2], [0.3, 9]))
    mean, var = torch.tensor([1.0, -2]).double(), torch.tensor([0.0, 3]).double()
    for training in (True, False):
        norm = partial(bnn.functional.batch_norm, training=training, eps=0.1)
        for given in ((weight, bias), (weight, None), (None, bias), (None, None)):
            inputs = (x, mean.clone(), var.clone(), *given)
            assert gradcheck(norm, inputs, check_forward_ad=True)
            assert gradgradcheck(norm, inputs)
    assert bool(torch.isfinite(norm(x, mean, var)).all())


@behaviour
def second_derivatives(case):
    results = []
    for layer in case.pair():
        x = case.x().requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        wanted = {"x": x, **dict(layer.named_parameters())}
        grads = torch.autograd.grad(dx.square().sum(), [*wanted.values()], allow_unused=True)
        results.append({n: g for n, g in zip(wanted, grads, strict=True) if g is not None})
    assert_same(*results, factor=1e3)  # of the order of 1e4 to 1e6, sums of cancelling terms


@behaviour
def torch_func_grad_and_hessian(case):
    x = case.x((3, 2, *case.shape[2:])[: len(case.shape)])
    results = []
    for norm in (bnn.functional.batch_norm, torch.nn.functional.batch_norm):
        mean, var = torch.zeros(2).double(), torch.ones(2).double()
        loss = lambda x, norm=norm: norm(x, None, None, training=True).pow(3).sum()  # noqa: E731
        moving = lambda x, norm=norm: norm(x, mean, var, training=True).pow(3).sum()  # noqa: E731, B023
        results.append({"h": hessian(loss)(x), "g": grad(moving)(x), "m": mean, "v": var})
    assert_same(*results, factor=1e2)


@behaviour
def torch_func_functional_call(case):
    results = []
    for layer in case.pair():
        parameters = dict(layer.named_parameters())
        buffers = {n: b.clone() for n, b in layer.named_buffers()}
        loss = lambda p, b, x, layer=layer: functional_call(layer, (p, b), (x,)).pow(3).sum()  # noqa: E731
        results.append({**grad(loss)(parameters, buffers, case.x()), **buffers})
        assert "captured" in str(raised(grad(lambda p: loss(p, {}, case.x())), parameters))  # noqa: B023
        assert torch.equal(layer.num_batches_tracked, torch.tensor(5))
    assert_same(*results)


@behaviour
def torch_func_vmap(case):
    x = torch.stack([case.x(seed=seed) for seed in range(3)])
    results = []
    for layer in case.pair():
        y = vmap(layer.eval())(x)
        layers = [copy.deepcopy(layer).train() for _ in x]
        parameters, buffers = stack_module_state(layers)
        call = lambda p, b, x, layer=layers[0]: functional_call(layer, (p, b), (x,))  # noqa: E731
        ensemble = vmap(call)(parameters, buffers, x)
        stateless = vmap(lambda x: type(layer)(3, track_running_stats=False).double()(x))(x)  # noqa: B023
        slopes = vmap(grad(lambda x: layer(x).pow(3).sum()))(x)  # noqa: B023
        results.append({"y": y, "e": ensemble, "s": stateless, "g": slopes, **buffers})
        assert "not batched" in str(raised(vmap(layer.train()), x))
    assert_same(*results, factor=10)


@behaviour
def forward_mode(case):
    results = []
    for layer, training in itertools.product(case.pair(), (True, False)):
        layer.train(training)
        _, tangent = jvp(partial(call_without_buffers, layer), (case.x(),), (case.x(seed=7),))
        with forward_ad.dual_level():
            x = forward_ad.make_dual(case.x(), case.x(seed=8))
            dual = forward_ad.unpack_dual(layer(x)).tangent
        x = case.x().requires_grad_()
        y = layer(x)
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(case.x(seed=2), case.x(seed=4))
            (dx,) = torch.autograd.grad(y, x, dy)
            of_dx = forward_ad.unpack_dual(dx).tangent
        results.append({"func": tangent, "dual": dual, "of_dx": of_dx, **state_of(layer)})
    assert_same(results[0], results[2])
    assert_same(results[1], results[3])


def call_without_buffers(layer, x):
    norm = type(layer)(3, dtype=torch.float64, track_running_stats=False)
    return norm(x) if layer.training else layer(x)


@behaviour
def jacobian_by_batched_gradients(case):
    x, results = case.x((2, 3, 2, 1, 1)[: len(case.shape)]), []
    for layer in case.pair():
        for training in (True, False):
            layer.train(training)
            jacobian = torch.autograd.functional.jacobian(layer, x, vectorize=True)
            results.append({"jacobian": jacobian})
    assert_same(*results[::2])
    assert_same(*results[1::2])


@behaviour
def graph_kept_and_used_twice(case):
    results = []
    for layer in case.pair():
        x = case.x().requires_grad_()
        (layer(x).pow(2).sum() + layer(2 * x).pow(3).sum()).backward(retain_graph=False)
        y = layer(x).pow(2).sum()
        y.backward(retain_graph=True)
        y.backward()
        results.append({"x": x.grad, "w": layer.weight.grad, "b": layer.bias.grad})
    assert_same(*results)


@behaviour
def writing_to_what_backward_needs_is_an_error(case):
    for layer, name in itertools.product(case.pair(), ("x", "weight")):
        x = case.x().requires_grad_()
        middle = x * 1
        y = layer(middle)
        with torch.no_grad():
            (middle if name == "x" else layer.weight).mul_(2)
        assert "modified by an inplace operation" in str(raised(y.sum().backward))


@behaviour
def buffers_keep_no_graph_alive(case):
    layer, _ = case.pair()
    x = case.x().requires_grad_()
    y = layer(x)
    assert not any(b.requires_grad or b.grad_fn for b in layer.buffers())
    node = weakref.ref(y.grad_fn)
    del y
    assert node() is None


@behaviour
def saved_tensor_hooks(case):
    results = []
    for layer in case.pair():
        x = case.x().requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            y = layer(x)
        y.pow(2).sum().backward()
        results.append({"x": x.grad, "weight": layer.weight.grad})
    assert_same(*results)


@behaviour
def activation_checkpointing(case):
    for reentrant in (True, False):
        results = []
        for layer in case.pair():
            x = case.x().requires_grad_()
            checkpoint(layer, x, use_reentrant=reentrant).pow(2).sum().backward()
            results.append({"x": x.grad, "weight": layer.weight.grad, **state_of(layer)})
            assert layer.num_batches_tracked == 7  # counted by the forward pass and by its repeat
        assert_same(*results)


# Types, shapes and memory


@behaviour
def half_types(case):
    for dtype, own, training in itertools.product(
        (torch.float16, torch.bfloat16), (True, False), (True, False)
    ):
        x = case.x(dtype=dtype)
        x[:, 1] *= 300  # squared, 300 overflows float16
        pair = case.pair(dtype=dtype if own else torch.float32)
        for layer in pair:
            layer.running_mean[1], layer.running_var[1] = 900, 6e4
        case.same(*pair, x=x, training=training)


@behaviour
def autocast(case):
    for dtype, training in itertools.product((torch.float16, torch.bfloat16), (True, False)):
        for of_x in (torch.float32, dtype):
            with torch.autocast("cpu", dtype):
                case.same(*case.pair(torch.float32), x=case.x(dtype=of_x), training=training)


@behaviour
def types_that_do_not_fit(case):
    for of_x, of_layer, training in itertools.product(
        (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.complex64),
        (torch.float16, torch.float32, torch.float64),
        (True, False),
    ):
        pair = [layer.train(training) for layer in case.pair(dtype=of_layer)]
        outcomes = []
        for layer in pair:
            try:
                outcomes.append(layer(case.x().to(of_x)).dtype)
            except Exception as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1], (of_x, of_layer)
        assert_same(state_of(pair[0]), state_of(pair[1]))


@behaviour
def layers_moved_between_types(case):
    pair = [layer.float().half().double() for layer in case.pair()]
    case.same(*pair)
    half = [layer.half() for layer in case.pair()]
    case.same(*half, x=case.x(dtype=torch.float16))


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def layouts(x):
    """Yield the values of x, laid out in memory in several ways."""
    yield x
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    yield torch.cat([x, x], dim=-1)[..., ::2] if x.dim() > 2 else torch.cat([x, x])[::2]
    yield x.movedim(1, 0).contiguous().movedim(0, 1)
    yield x[:1].expand(x.shape)
    if x.dim() in FORMATS:
        last = x.contiguous(memory_format=FORMATS[x.dim()])
        yield last
        yield torch.cat([last, last], dim=2).contiguous(memory_format=FORMATS[x.dim()])[:, :, ::2]


@behaviour
def memory_layout_of_outputs_and_gradients(case):
    for training, shape in itertools.product((True, False), case.shapes):
        for x in layouts(case.x((4, *shape[1:]))):
            strides = []
            for layer in case.pair():
                leaf = x.detach().requires_grad_()
                y = layer.train(training)(leaf)
                (dx,) = torch.autograd.grad(y.square().sum(), leaf)
                strides.append((y.stride(), dx.stride()))
            assert strides[0] == strides[1], (x.shape, x.stride())
            case.same(*case.pair(), x=x, training=training)


@behaviour
def channels_last_with_one_channel_or_one_pixel(case):
    if len(case.shape) not in FORMATS:
        return
    channels_last = FORMATS[len(case.shape)]
    spatial = (3, 4, 5)[: len(case.shape) - 2]
    for shape in ((4, 1, *spatial), (4, 3, *(1,) * len(spatial))):
        x = case.x(shape).contiguous(memory_format=channels_last)
        layer = case.ours(shape[1], dtype=torch.float64)
        y = layer(x)
        assert y.is_contiguous()
        assert y.is_contiguous(memory_format=channels_last)
        torch.testing.assert_close(y, case.theirs(shape[1], dtype=torch.float64)(x))


@behaviour
def inputs_are_not_written_to(case):
    layer, _ = case.pair()
    for training in (True, False):
        x, before = case.x().requires_grad_(), case.x()
        layer.train(training)(x).square().sum().backward()
        assert torch.equal(x, before)


@behaviour
def empty_batches(case):
    shapes = [(0, *case.shape[1:]), (2, 3, *(0,) * (len(case.shape) - 2))]
    for shape, training, momentum in itertools.product(shapes, (True, False), (0.1, None)):
        if 0 in shape:
            pair = case.pair(momentum=momentum)
            x = torch.empty(shape, dtype=torch.float64)
            before = state_of(pair[0])
            case.same(*pair, x=x, training=training)
            assert torch.equal(pair[0].running_mean, before["running_mean"])
            assert pair[0].num_batches_tracked == 5 + training


@behaviour
def one_value_per_channel(case):
    x = case.x((1, 3, 1, 1, 1)[: len(case.shape)])
    case.same(*case.pair(), x=x, training=False)
    assert_same_error(case, lambda layer: layer(x))
    assert_same_error(case, lambda layer: layer.eval()(x), track_running_stats=False)


@behaviour
def one_image_of_many_pixels(case):
    if len(case.shape) > 2:
        case.same(*case.pair(), x=case.x((1, *case.shape[1:])))


@behaviour
def nan_and_infinity_stay_in_their_channel(case):
    for value, training in itertools.product((np.nan, np.inf), (True, False)):
        layer, _ = case.pair()
        x = case.x()
        x[1, 1] = value
        results = run(layer.train(training), x)
        counter = results.pop("num_batches_tracked")
        assert counter == 5 + training
        for name, value_of in results.items():
            others = value_of[:, [0, 2]] if value_of.dim() > 1 else value_of[[0, 2]]
            assert torch.isfinite(others).all(), name
        assert not torch.isfinite(results["y"][1, 1]).any()
        assert torch.isfinite(results["running_mean"][1]) != training


@behaviour
def tensor_subclasses(case):
    class Named(torch.Tensor):
        pass

    for layer in case.pair():
        assert type(layer(case.x().as_subclass(Named))) is Named


# Errors


def assert_same_error(case, act, words=(), dtype=torch.float64, **options):
    """Let both layers fail: with one class of error, PyTorch's words in ours, and equal states."""
    pair = case.pair(dtype, **options)
    ours, theirs = (raised(act, layer) for layer in pair)
    assert type(ours) is type(theirs)
    for word in words or [str(theirs).splitlines()[0]]:
        assert word in str(ours), (word, str(ours))
        assert word in str(theirs), (word, str(theirs))
    assert_same(state_of(pair[0]), state_of(pair[1]))


@behaviour
def wrong_numbers_of_dimensions(case):
    for ndim in range(7):
        if ndim not in {len(shape) for shape in case.shapes}:
            x = torch.ones((2, 3, 2, 2, 2, 2, 2)[:ndim]).double()
            assert_same_error(case, lambda layer: layer(x))  # noqa: B023
            assert_same_error(case, lambda layer: layer.eval()(x))  # noqa: B023


@behaviour
def wrong_numbers_of_channels(case):
    x = torch.ones(2, 5, *case.shape[2:]).double()
    for mode, options in itertools.product(
        (True, False), ({}, {"track_running_stats": False}, {"affine": False})
    ):
        if options != {"track_running_stats": False} or mode:
            assert_same_error(
                case,
                lambda layer: layer.train(mode)(x),  # noqa: B023
                **options,
            )


@behaviour
def wrong_vectors(case):
    for name, training in itertools.product(
        ("weight", "bias", "running_mean", "running_var"), (True, False)
    ):

        def act(layer):
            vector = torch.ones(4).double()
            parameter = name in ("weight", "bias")  # noqa: B023
            setattr(layer, name, torch.nn.Parameter(vector) if parameter else vector)  # noqa: B023
            layer.train(training)(case.x())  # noqa: B023

        assert_same_error(case, act)


@behaviour
def wrong_or_missing_statistics(case):
    for name, training in itertools.product(("running_mean", "running_var"), (True, False)):

        def without(layer):
            setattr(layer, name, None)  # noqa: B023
            layer.train(training)(case.x())  # noqa: B023

        def with_gradient(layer):
            getattr(layer, name).requires_grad_()  # noqa: B023
            layer.train(training)(case.x())  # noqa: B023

        assert_same_error(case, without)
        assert_same_error(case, with_gradient, [f"with respect to argument '{name}'"])


@behaviour
def eps_out_of_range(case):
    for eps in (0, -1):
        assert_same_error(case, lambda layer: layer(case.x()), eps=eps)
    assert_same_error(case, lambda layer: layer.eval()(case.x()), eps=-1)
    case.same(*case.pair(eps=0), training=False)


@behaviour
def arguments_that_are_no_tensors(case):
    assert_same_error(case, lambda layer: layer(case.x().numpy()), ["has no attribute 'dim'"])
    assert_same_error(case, lambda layer: layer(), ["missing 1 required positional argument"])


@behaviour
def sparse_inputs(case):
    x = case.x((8, 3, 2, 2, 2)[: len(case.shape)]).to_sparse()
    assert_same_error(case, lambda layer: layer(x), ["Sparse"[1:]])


# States


@behaviour
def states_travel_both_ways(case):
    for options in ({}, {"affine": False}, {"bias": False}, {"track_running_stats": False}):
        ours, theirs = case.pair(**options)
        case.same(ours, theirs)
        new_ours, new_theirs = case.ours(3, **options), case.theirs(3, **options)
        assert str(new_ours.double().load_state_dict(theirs.state_dict())) == str(
            new_theirs.double().load_state_dict(ours.state_dict())
        )
        assert_same(state_of(new_ours), state_of(new_theirs))
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


@behaviour
def states_without_a_counter(case):
    for versioned, missing in itertools.product((True, False), ("num_batches_tracked", "weight")):
        outcomes = []
        for layer in case.pair():
            state = layer.state_dict()
            del state[missing]
            plain = state if versioned else dict(state)
            if versioned:
                plain._metadata = state._metadata
            try:
                layer.load_state_dict(plain)
                outcomes.append(layer.num_batches_tracked.item())
            except RuntimeError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
    fresh = [cls(3) for cls in (case.ours, case.theirs)]
    old = {n: v for n, v in fresh[0].state_dict().items() if n != "num_batches_tracked"}
    for layer in fresh:
        layer.load_state_dict(old)
        assert layer.num_batches_tracked == 0


@behaviour
def copies_and_pickles(case):
    ours, theirs = case.pair()
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    for again in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(stream, weights_only=False),
    ):
        assert type(again) is case.ours
        case.same(again, copy.deepcopy(theirs))
    case.same(ours, theirs)  # the copies shared nothing with it


# The rest of PyTorch


@behaviour
def lazy_initialisation(case):
    for options in ({}, {"affine": False}, {"bias": False}, {"track_running_stats": False}):
        lazy = [
            getattr(module, f"LazyBatchNorm{case.dims}")(dtype=torch.float64, **options)
            for module in (bnn, torch.nn)
        ]
        assert repr(lazy[0]) == repr(lazy[1])
        case.same(*lazy, x=case.x())
        assert [type(layer) for layer in lazy] == [case.ours, case.theirs]
        assert repr(lazy[0]) == repr(lazy[1])
    lazy = getattr(bnn, f"LazyBatchNorm{case.dims}")()
    lazy.load_state_dict(case.theirs(3).state_dict())
    wrong = torch.ones((2, 3, 2, 2, 2, 2, 2)[: len(case.shape) + 2])
    assert isinstance(raised(getattr(bnn, f"LazyBatchNorm{case.dims}")(), wrong), ValueError)


@behaviour
def isinstance_of_torch_nn(case):
    assert issubclass(case.ours, case.theirs)
    ours, _ = case.pair()
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(synchronised) is torch.nn.SyncBatchNorm
    assert synchronised.weight is ours.weight


@behaviour
def update_bn_finds_the_layer(case):
    models = [torch.nn.Sequential(layer) for layer in case.pair()]
    for model in models:
        update_bn([case.x(seed=seed) for seed in range(4)], model)
    assert_same(*(state_of(model) for model in models))
    assert models[0][0].num_batches_tracked == 4


@behaviour
def hooks(case):
    results = []
    for layer in case.pair():
        seen = {}
        layer.register_forward_pre_hook(lambda _, x: (2 * x[0],))
        layer.register_forward_hook(lambda _, x, y: y + 1)
        layer.register_full_backward_hook(lambda _, dx, dy, seen=seen: seen.update(dx=dx[0]))
        results.append({**run(layer, case.x()), **seen})
    assert_same(*results)


@behaviour
def meta_and_fake_tensors(case):
    from torch._subclasses import FakeTensorMode

    for training, fake in itertools.product((True, False), (True, False)):
        facts = []
        for cls in (case.ours, case.theirs):
            with FakeTensorMode() if fake else torch.device("meta"):
                layer = cls(3).train(training)
                x = torch.empty(case.shape, requires_grad=True)
                y = layer(x)
                y.sum().backward()
            tensors = (y, x.grad, layer.weight.grad, layer.running_mean)
            facts.append([(type(t), t.shape, t.dtype, t.device, t.stride()) for t in tensors])
        assert facts[0] == facts[1]
    empty = case.ours(3, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert_same(state_of(empty), state_of(case.theirs(3)))


@behaviour
def torch_compile(case):
    for training, momentum in ((True, 0.1), (False, 0.1), (True, None)):
        torch.compiler.reset()
        ours, theirs = (layer.train(training) for layer in case.pair(momentum=momentum))
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        results = [run_alike(layer, theirs, case.x()) for layer in (compiled, theirs)]
        assert_same(*results)
        assert_same(state_of(ours), state_of(theirs))


def run_alike(layer, example, x):
    """Run a layer whose parameters have other names as its example has."""
    results = run(layer, x)
    names = ["y", "dx", *(f"d{n}" for n, _ in example.named_parameters())]
    return dict(zip(names, results.values(), strict=False))


@behaviour
def torch_export(case):
    for training in (True, False):
        ours, theirs = (layer.train(training) for layer in case.pair())
        batch = {"input": {0: torch.export.Dim("N", min=2)}}
        exported = torch.export.export(ours, (case.x(),), dynamic_shapes=batch, strict=False)
        module, x = exported.module(), case.x((5, *case.shape[1:]))
        assert_same({"y": module(x).detach()}, {"y": theirs(x).detach()})
        assert_same(state_of(module), state_of(theirs))


@behaviour
def torch_fx_keeps_the_layer_whole(case):
    targets = []
    for layer in case.pair():
        model = torch.nn.Sequential(torch.nn.Identity(), layer)
        graph = torch.fx.symbolic_trace(model)
        targets.append([(node.op, node.target) for node in graph.graph.nodes])
        assert graph.get_submodule("1") is layer
    assert targets[0] == targets[1]


@behaviour
def torch_jit(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeprecationWarning and TracerWarning, for PyTorch's too
        for training in (True, False):
            ours, theirs = (layer.train(training) for layer in case.pair())
            scripted = torch.jit.script(ours)
            assert_same({"y": scripted(case.x())}, {"y": theirs(case.x())})
            assert_same(state_of(ours), state_of(theirs))  # one state, two modules
            traced = torch.jit.trace(ours, case.x(), check_trace=False)
            theirs(case.x())  # tracing runs it once
            x = case.x((5, *case.shape[1:]))
            assert_same({"y": traced(x)}, {"y": theirs(x)})
            assert_same(state_of(ours), state_of(theirs))


@behaviour
def fused_with_a_convolution(case):
    from torch.nn.utils import fuse_conv_bn_eval

    if len(case.shape) > 2:
        conv = getattr(torch.nn, f"Conv{case.dims}")(3, 3, 1).double().eval()
        fused = [fuse_conv_bn_eval(conv, layer.eval()) for layer in case.pair()]
        assert_same(*(state_of(layer) for layer in fused))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.dims)
@pytest.mark.parametrize("check", BEHAVIOURS, ids=lambda check: check.__name__)
def test_behaviour(check, case):
    check(case)


def test_the_words_of_an_error_say_what_to_do():
    layer = bnn.BatchNorm2d(3)
    assert re.search("BatchNorm1d", str(raised(layer, torch.ones(2, 3))))
    assert "larger batch" in str(raised(layer, torch.ones(1, 3, 1, 1)))
    assert ".to(dtype)" in str(raised(layer, torch.ones(2, 3, 1, 1).double()))
