"""Layer, group, instance and RMS norm against torch.nn: values, gradients, states and errors."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from bnlib import nn as bnn
from bnlib.nn import functional as F

with warnings.catch_warnings():  # PyTorch's own, at the first use of forward mode
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._decomp.decompositions_for_jvp

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# One rounding of results near 20; in half types two, and of float32 sums of up to 60 terms.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

LAYERS = [  # class, arguments, shape of the input
    ("LayerNorm", (6,), (4, 5, 6)),
    ("LayerNorm", ((5, 6),), (4, 5, 6)),
    ("LayerNorm", ([4, 5, 6], 0.1), (4, 5, 6)),
    ("LayerNorm", (6, 1e-5, True, False), (3, 6)),
    ("LayerNorm", (6, 1e-5, False), (6,)),
    ("GroupNorm", (3, 6), (4, 6, 5)),
    ("GroupNorm", (1, 6, 0.3), (2, 6, 3, 4)),
    ("GroupNorm", (6, 6, 1e-5, False), (2, 6, 3, 2, 2)),
    ("GroupNorm", (2, 6), (5, 6)),
    ("InstanceNorm1d", (6,), (4, 6, 5)),
    ("InstanceNorm1d", (6,), (6, 5)),
    ("InstanceNorm2d", (6, 0.1, 0.3, True, True), (4, 6, 3, 5)),
    ("InstanceNorm2d", (6, 1e-5, None, True, True), (4, 6, 3, 5)),
    ("InstanceNorm3d", (6, 1e-5, 0.2, False, True), (2, 6, 3, 2, 2)),
    ("InstanceNorm3d", (6, 1e-5, 0.1, True), (6, 3, 2, 2)),
    ("RMSNorm", (6,), (4, 5, 6)),
    ("RMSNorm", ((5, 6), 0.3), (4, 5, 6)),
    ("RMSNorm", (6, None, False), (3, 6)),
]


def make(shape, dtype=torch.float64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.5, 5, shape[-1]) * rng.gamma(2, size=shape) + rng.uniform(-9, 9)
    return torch.from_numpy(x).to(dtype)


def pair(name, arguments, dtype=torch.float64):
    """Return a layer of ours and one of PyTorch's, in the same random state."""
    ours = getattr(bnn, name)(*arguments, dtype=dtype)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for _, p in ours.named_parameters():
            p.copy_(torch.from_numpy(rng.normal(1, 2, p.shape)))
        if getattr(ours, "running_mean", None) is not None:
            ours.running_mean.normal_()
            ours.running_var.uniform_(0.5, 4)
    theirs = getattr(nn, name)(*arguments, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def run(layer, x):
    x = x.detach().clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype")  # rms_norm tells of its slow path
        y = layer(x)
    dy = torch.from_numpy(np.random.default_rng(3).normal(1, 3, y.shape)).to(y.dtype)
    wanted = [x, *layer.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy), *layer.buffers()]


def assert_same(ours, theirs, dtype=torch.float64):
    for a, b in zip(ours, theirs, strict=True):
        scale = max(b.double().abs().max().item(), 1) if b.numel() else 1
        torch.testing.assert_close(
            a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale, equal_nan=True
        )


@pytest.mark.parametrize(("name", "arguments", "shape"), LAYERS)
class TestAsInPyTorch:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_values_gradients_and_statistics(self, name, arguments, shape, dtype, training):
        ours, theirs = pair(name, arguments, dtype)
        x = make(shape, dtype)
        assert_same(run(ours.train(training), x), run(theirs.train(training), x), dtype)
        if dtype in (torch.float16, torch.bfloat16):
            ours, theirs = pair(name, arguments, torch.float32)
            assert_same(run(ours.train(training), x), run(theirs.train(training), x), dtype)

    def test_what_is_seen_from_outside(self, name, arguments, shape):
        ours, theirs = pair(name, arguments)
        assert isinstance(ours, type(theirs))
        assert repr(ours) == repr(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        ours.reset_parameters()
        theirs.reset_parameters()
        assert_same(ours.state_dict().values(), theirs.state_dict().values())
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(again) is type(ours)
            torch.testing.assert_close(again(make(shape)), theirs(make(shape)))

    def test_layouts_of_memory(self, name, arguments, shape):
        ours, theirs = pair(name, arguments)
        x = make(shape)
        layouts = [
            x.transpose(0, -1).contiguous().transpose(0, -1),
            torch.stack([x, x], -1)[..., 1],
        ]
        if x.dim() == 4:
            layouts.append(x.contiguous(memory_format=torch.channels_last))
        for laid_out in layouts:
            assert_same(run(ours, laid_out), run(theirs, laid_out))
            if name != "RMSNorm":  # whose layout in PyTorch depends on the kernel it finds
                assert ours(laid_out).stride() == theirs(laid_out).stride()

    def test_second_derivatives_and_torch_func(self, name, arguments, shape):
        results = []
        for layer in pair(name, arguments):
            layer.track_running_stats = getattr(layer, "running_mean", None) is not None
            x = make(shape).requires_grad_()
            (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(dx.square().sum(), x)
            slope = grad(lambda x: layer(x).pow(3).sum())(make(shape))  # noqa: B023
            results.append([second, slope, *layer.buffers()])
            layer.eval()
            results[-1].append(vmap(layer)(torch.stack([make(shape), 2 * make(shape)])))
        for a, b in zip(*results, strict=True):
            scale = max(b.double().abs().max().item(), 1)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * scale)

    def test_compile_and_export(self, name, arguments, shape):
        ours, theirs = pair(name, arguments)
        x = make(shape)
        expected = theirs(x)
        torch.compiler.reset()
        compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(copy.deepcopy(ours), (x,), strict=False)
        torch.testing.assert_close(exported.module()(x), expected)
        graph = torch.fx.symbolic_trace(nn.Sequential(ours))
        assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            torch.testing.assert_close(torch.jit.script(copy.deepcopy(ours))(x), expected)


def outcome(function, *args, **options):
    """Return the class and the first words of the error, or the type and shape of the result."""
    try:
        y = function(*args, **options)
    except Exception as error:
        return type(error)
    return y.dtype, y.shape


X = make((4, 6, 3))
ONE, THREE, SIX = (torch.ones(n).double() for n in (1, 3, 6))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("layer_norm", (X, (4,))),
        ("layer_norm", (X, (1, 4, 6, 3))),
        ("layer_norm", (X, ())),
        ("layer_norm", (X, 3)),
        ("layer_norm", (X, (3,), SIX)),
        ("layer_norm", (X, (3,), None, SIX)),
        ("layer_norm", (X, (3,), THREE[None])),
        ("layer_norm", (X, (3,), THREE.float())),
        ("layer_norm", (X, (3,), THREE, THREE.float())),
        ("layer_norm", (X.half(), (3,), THREE.float(), THREE.float())),
        ("layer_norm", (X.half(), (3,), THREE)),
        ("layer_norm", (X.long(), (3,))),
        ("layer_norm", (X.long(), (3,), THREE)),
        ("layer_norm", (X.numpy(), (3,))),
        ("layer_norm", (X[:0], (3,), THREE)),
        ("layer_norm", (X[..., :0], (0,))),
        ("layer_norm", (X, (3,), THREE, THREE, 0.0)),
        ("layer_norm", (X, torch.Size([3]))),
        ("rms_norm", (X, (4,))),
        ("rms_norm", (X, (1, 4, 6, 3))),
        ("rms_norm", (X, ())),
        ("rms_norm", (X, 3)),
        ("rms_norm", (X, (3,), SIX)),
        ("rms_norm", (X.long(), (3,))),
        ("rms_norm", (X.half(), (3,))),
        ("rms_norm", (X[:0], (3,), THREE)),
        ("group_norm", (X[0, 0], 2)),
        ("group_norm", (X, 4)),
        ("group_norm", (X, 0)),
        ("group_norm", (X, -1)),
        ("group_norm", (X, 3, THREE)),
        ("group_norm", (X, 3, None, THREE)),
        ("group_norm", (X, 3, SIX[None])),
        ("group_norm", (X, 3, SIX.float())),
        ("group_norm", (X.long(), 3)),
        ("group_norm", (X.long(), 3, SIX)),
        ("group_norm", (X[:1, :, :1], 6)),
        ("group_norm", (X[:2, :, :1], 6)),
        ("group_norm", (X[:0], 3, SIX)),
        ("group_norm", (X[:, :, :0], 3, SIX)),
        ("instance_norm", (X[0],)),
        ("instance_norm", (X[:, :, :1],)),
        ("instance_norm", (X[:, :, :1], SIX, SIX, None, None, False)),
        ("instance_norm", (X, None, None, None, None, False)),
        ("instance_norm", (X, SIX, None)),
        ("instance_norm", (X, THREE, THREE)),
        ("instance_norm", (X, None, None, THREE)),
        ("instance_norm", (X, None, None, SIX.float())),
        ("instance_norm", (X, SIX.clone(), SIX.clone(), None, None, True, None)),
        ("instance_norm", (X.long(),)),
        ("instance_norm", (X[:0],)),
        ("instance_norm", (X[:, :, :0],)),
        ("instance_norm", (X, SIX.clone(), SIX.clone(), None, None, True, 0.1, 0.0)),
        ("instance_norm", (X, SIX.clone(), SIX.clone(), None, None, True, 0.1, -1.0)),
    ],
)
def test_bad_and_borderline_calls_end_as_in_pytorch(name, arguments):
    assert outcome(getattr(F, name), *arguments) == outcome(
        getattr(nn.functional, name), *arguments
    )


class TestInstanceNorm:
    def test_wrong_numbers_of_channels_warn_or_raise(self):
        for module in (bnn, nn):
            with pytest.warns(UserWarning, match="num_features"):
                module.InstanceNorm1d(5)(X.float())
            with pytest.raises(ValueError, match="to match num_features"):
                module.InstanceNorm1d(5, affine=True)(X.float())

    def test_old_states(self):
        state = {"running_mean": SIX, "running_var": SIX}
        for module in (bnn, nn):
            with pytest.raises(RuntimeError, match="Unexpected running stats buffer"):
                module.InstanceNorm1d(6).load_state_dict(state)

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_lazy(self, dims):
        x = make((4, 6, 3, 2, 2)[: dims + 2], torch.float32)
        ours, theirs = (getattr(m, f"LazyInstanceNorm{dims}d")() for m in (bnn, nn))
        assert repr(ours) == repr(theirs)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        assert type(ours) is getattr(bnn, f"InstanceNorm{dims}d")

    def test_the_running_variance_is_the_mean_of_unbiased_variances(self):
        layer = bnn.InstanceNorm1d(6, momentum=1, track_running_stats=True, dtype=torch.float64)
        layer(X)
        torch.testing.assert_close(layer.running_var, X.var(2, correction=1).mean(0))
        torch.testing.assert_close(layer.running_mean, X.mean((0, 2)))


def test_a_layer_norm_of_single_values_gives_the_bias():
    ours, theirs = pair("LayerNorm", (1,))
    x = make((4, 1)).requires_grad_()
    y = ours(x)
    torch.testing.assert_close(y, theirs(x))
    torch.testing.assert_close(y, ours.bias.expand(4, 1))
    assert (torch.autograd.grad(y.pow(2).sum(), x)[0] == 0).all()  # PyTorch's rounds to 1e-12


def test_rms_norm_of_tiny_values_uses_the_eps_of_its_own_type():
    for dtype, value in ((torch.float32, 1e-4), (torch.float64, 1e-9), (torch.float16, 1e-3)):
        x = torch.full((1, 3), value, dtype=dtype)
        torch.testing.assert_close(F.rms_norm(x, (3,)), nn.functional.rms_norm(x, (3,)))
