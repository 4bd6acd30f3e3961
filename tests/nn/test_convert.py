"""Other people's models with our batch norms in them, and the way there and back."""

import copy
import warnings

import pytest
import torch
from torch import nn

from bnlib import nn as bnn

BATCH_NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
LAZY = [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d]


class Frozen(nn.BatchNorm2d):
    """Somebody's own batch norm."""


def model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, eps=0.2, momentum=None),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, affine=False)),
        nn.Flatten(),
        nn.BatchNorm1d(4 * 36, track_running_stats=False),
        nn.Linear(4 * 36, 2),
    )


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


class TestConvert:
    @pytest.mark.parametrize("theirs", BATCH_NORMS + LAZY)
    def test_each_class_becomes_the_one_of_its_name_and_comes_back(self, theirs):
        layer = theirs() if theirs in LAZY else theirs(3)
        assert bnn.convert(layer) is layer
        assert type(layer) is getattr(bnn, theirs.__name__)
        assert bnn.convert(layer) is layer
        assert bnn.revert(layer) is layer
        assert type(layer) is theirs

    def test_a_model_computes_the_same_before_between_and_after(self):
        net, x = model(), torch.randn(5, 3, 8, 8) * 3 + 2
        expected = copy.deepcopy(net)
        bnn.convert(net)
        assert {type(m).__module__ for m in norms(net)} == {"bnlib.nn.modules"}
        for change in (bnn.convert, bnn.revert):
            change(net)
            for training in (True, False):
                torch.testing.assert_close(
                    net.train(training)(x), expected.train(training)(x), rtol=1e-5, atol=1e-5
                )
        assert {type(m).__module__ for m in norms(net)} == {"torch.nn.modules.batchnorm"}

    def test_every_object_stays_what_it_is(self):
        net = model()
        before = dict(net.named_modules()), dict(net.named_parameters()), dict(net.named_buffers())
        repr_before, mode = repr(net), [m.training for m in net.modules()]
        bnn.convert(net)
        after = dict(net.named_modules()), dict(net.named_parameters()), dict(net.named_buffers())
        for old, new in zip(before, after, strict=True):
            assert list(old) == list(new)
            assert all(old[name] is new[name] for name in old)
        assert repr(net) == repr_before
        assert [m.training for m in net.modules()] == mode

    def test_an_optimizer_made_before_goes_on(self):
        net, x = model(), torch.randn(5, 3, 8, 8)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        bnn.convert(net)
        net(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(net[4].weight, torch.ones(4 * 36))
        assert net[4].weight in optimizer.state

    def test_mode_flags_hooks_and_gradients_stay(self):
        layer, calls = nn.BatchNorm2d(3), []
        layer.register_forward_hook(lambda *_: calls.append("forward"))
        layer.register_full_backward_hook(lambda *_: calls.append("backward"))
        layer.eval().weight.requires_grad_(False)
        layer.track_running_stats, layer.note = False, "mine"
        bnn.convert(layer)(torch.randn(2, 3, 4, 4).requires_grad_()).sum().backward()
        assert calls == ["forward", "backward"]
        assert not any([layer.training, layer.weight.requires_grad, layer.track_running_stats])
        assert layer.note == "mine"

    def test_a_module_used_twice_is_still_one(self):
        norm = nn.BatchNorm1d(4)
        net = nn.Sequential(norm, nn.Linear(4, 4), norm)
        bnn.convert(net)
        assert net[0] is net[2] is norm
        assert type(norm) is bnn.BatchNorm1d

    def test_others_are_left_alone(self):
        others = [nn.SyncBatchNorm(3), Frozen(3), nn.InstanceNorm2d(3), nn.LayerNorm(3)]
        others += [nn.ReLU(), bnn.BatchNorm2d(3)]
        net = bnn.convert(nn.Sequential(*others))
        assert [type(m) for m in net] == [
            nn.SyncBatchNorm, Frozen, nn.InstanceNorm2d, nn.LayerNorm, nn.ReLU, bnn.BatchNorm2d,
        ]  # fmt: skip
        subclass = type("Ours", (bnn.BatchNorm2d,), {})(3)
        assert type(bnn.revert(subclass)).__name__ == "Ours"

    def test_a_parametrized_layer_is_left_alone(self):
        layer = nn.BatchNorm1d(3)
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
        kind = type(layer)
        assert type(bnn.convert(layer)) is kind

    def test_a_compiled_model_compiles_again(self):
        net, x = model(), torch.randn(5, 3, 8, 8)
        net[1].momentum = 0.1  # None breaks PyTorch's in a full graph, not ours
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        expected = compiled(x)
        bnn.convert(net)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        operators = set()

        def watch(graph, _):
            operators.update(str(node.target) for node in graph.graph.nodes)
            return graph

        torch.compile(net, backend=watch, fullgraph=True)(x)
        assert not any("batch_norm" in name for name in operators)

    def test_what_is_no_module_is_refused(self):
        for change in (bnn.convert, bnn.revert):
            with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
                change([nn.BatchNorm1d(3)])


def efficientnet():
    from efficientnet_pytorch import EfficientNet

    scale = {"width_coefficient": 0.35, "depth_coefficient": 0.35, "image_size": 64}
    return EfficientNet.from_name("efficientnet-b0", num_classes=10, **scale), 3, 64


def resnet():
    from pytorchcv.models.resnet_cifar import resnet20_cifar10

    return resnet20_cifar10(), 3, 32


def unet():
    from unet import UNet2D

    options = {"num_encoding_blocks": 3, "out_channels_first_layer": 4, "padding": 1}
    net = UNet2D(in_channels=1, out_classes=10, normalization="batch", **options)
    return nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 1, 32


STRANGERS = [efficientnet, resnet, unet]


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda f: f.__name__)
class TestStrangers:
    """Networks written elsewhere, float32 and float64. Dropout draws the same numbers in both."""

    def pair(self, stranger):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what their packages warn of is not ours
            net, channels, size = stranger()
        ours = bnn.convert(copy.deepcopy(net))
        kinds = {type(m) for m in ours.modules() if isinstance(m, nn.BatchNorm2d)}
        assert kinds == {bnn.BatchNorm2d}
        return ours, net, torch.randn(4, channels, size, size)

    def test_outputs_are_equal_in_both_modes(self, stranger):
        ours, theirs, x = self.pair(stranger)
        for training in (True, True, False):
            outputs = []
            for net in (ours, theirs):
                torch.manual_seed(1)
                outputs.append(net.train(training)(x).detach())
            scale = outputs[1].abs().max().item()
            torch.testing.assert_close(*outputs, rtol=0, atol=1e-5 * max(scale, 1))

    def test_twenty_steps_of_training_stay_in_step(self, stranger):
        *nets, x = self.pair(stranger)
        x, labels = x.double(), torch.arange(4)
        losses = []
        for net in nets:
            net.double().train()
            torch.manual_seed(2)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
            losses.append([])
            for _ in range(20):
                loss = nn.functional.cross_entropy(net(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
        # Rounding, 1e-16 at first, grows through 20 steps and up to 31 batch norms.
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
        assert losses[0][-1] < losses[0][0]
        for ours, expected in zip(*(net.state_dict().values() for net in nets), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
