"""No error and no warning on healthy networks: ours, and those of other people's packages."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnlib.data import digits
from bnlib.doctor import diagnose
from bnlib.statistics import recalibrate

pytestmark = pytest.mark.usefixtures("one_thread")


def described(report):
    return [f"{f.slug} at {f.layer!r}: {f.value:.3g}" for f in (*report.errors, *report.warnings)]


def efficientnet():
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0", num_classes=10), (16, 3, 32, 32)


def unet():
    from unet import UNet2D

    shape = {"num_encoding_blocks": 3, "out_channels_first_layer": 4, "padding": 1}
    return UNet2D(normalization="batch", dropout=0.1, **shape), (4, 1, 32, 32)


def of_pytorchcv(name, shape):
    def build():
        from pytorchcv.model_provider import get_model

        model = get_model(name, num_classes=10)
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs takes one size alone
        return model, shape

    return build


OTHERS = {
    "efficientnet_pytorch": efficientnet,
    "unet": unet,
    "resnet20_cifar10": of_pytorchcv("resnet20_cifar10", (4, 3, 32, 32)),
    "densenet40_k12_cifar10": of_pytorchcv("densenet40_k12_cifar10", (2, 3, 16, 16)),
    "mobilenetv2_wd4": of_pytorchcv("mobilenetv2_wd4", (8, 3, 64, 64)),
    "shufflenetv2_wd2": of_pytorchcv("shufflenetv2_wd2", (8, 3, 64, 64)),
}


def loss(model, batch):
    y = model(batch)
    return (y.flatten(1) - 1).square().mean()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
class TestOtherPeoplesNetworks:
    def test_new(self, build):
        torch.manual_seed(0)
        model, shape = build()
        report = diagnose(model, torch.rand(shape), loss=loss)
        assert described(report) == []
        assert report.batch_norms > 5
        assert {"batch-dependent", "few-values", "updates-per-step"} <= {*report.rules_checked}

    def test_trained_and_evaluated(self, build):
        torch.manual_seed(0)
        model, shape = build()
        x = torch.rand(8 * shape[0], *shape[1:])
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, weight_decay=1e-4)
        for batch in x.split(shape[0])[:2]:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        recalibrate(model, x.split(shape[0]), progress=False)
        report = diagnose(
            model.eval(), x[: shape[0]], optimizer=optimizer, loader=x.split(shape[0]), loss=loss
        )
        assert described(report) == []


def mlp():
    layers = [nn.Flatten()]
    for width in (196, 64, 64):
        layers += [nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(400, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Dropout(0.5), nn.Linear(32, 10),
    )  # fmt: skip


def with_pixels_normalized():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(196), *mlp()[1:])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("build", [mlp, convolutions, with_pixels_normalized])
def test_digits(build, seed):
    torch.manual_seed(seed)
    images, labels = (torch.tensor(values) for values in digits("train"))
    data = TensorDataset(F.avg_pool2d(images[:, None], 2), labels)
    loader = DataLoader(data, 64, shuffle=True)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    arguments = {"optimizer": optimizer, "loader": loader, "loss": loss}
    batch = next(iter(loader))
    for mode in (True, False):
        report = diagnose(model.train(mode), batch, **arguments)
        assert described(report) == []
        assert set(report.skipped) == {"missing-keys"}
