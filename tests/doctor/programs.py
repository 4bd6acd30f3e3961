"""Broken programs, each written after a real thread, and the same programs mended.

A program is a function of one flag. Broken or mended, it builds a small model, does with it what
the people of the thread did, and returns the arguments of `diagnose`. What the doctor should find
stands in the decorator: the rule, and the layers. A few mistakes cannot be seen from a model; these
say why.

`pytorch#86590` is issue or pull request 86590 of that repository.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from bnlib.data import digits
from bnlib.statistics import batch_norms, evaluating, recalibrate


@dataclass(frozen=True)
class Program:
    """One mistake.

    rules: any of these is the right answer. at: layers that it must name; "a|b" is either. not_at:
    healthy layers that it must not name. blind: why the doctor cannot see it, where it cannot.
    """

    run: Callable[[bool], dict[str, Any]]
    rules: tuple[str, ...]
    at: tuple[str, ...]
    not_at: tuple[str, ...]
    blind: str

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def thread(self) -> str:
        return (self.run.__doc__ or "").split(":")[0]


PROGRAMS: list[Program] = []


def program(
    *rules: str, at: str = "", not_at: str = "", blind: str = ""
) -> Callable[[Callable[[bool], dict[str, Any]]], Callable[[bool], dict[str, Any]]]:
    def add(run: Callable[[bool], dict[str, Any]]) -> Callable[[bool], dict[str, Any]]:
        PROGRAMS.append(Program(run, rules, tuple(at.split()), tuple(not_at.split()), blind))
        return run

    return add


# What the programs share: images, small networks, a training loop


def small_digits(split: str) -> tuple[Tensor, Tensor]:
    images, labels = digits(split)
    return F.avg_pool2d(torch.tensor(images)[:, None], 2), torch.tensor(labels).long()


X, Y = small_digits("train")  # (4000, 1, 14, 14)
X_TEST, Y_TEST = small_digits("test")
BATCH = X[2000:2064], Y[2000:2064]


def batches(steps: int, size: int = 32, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(X), (size,), generator=generator)
        yield X[rows], Y[rows]


def classify(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def train(model: nn.Module, data: Any, loss: Any = classify, lr: float = 0.05) -> nn.Module:
    """Train, with a rate that falls to zero, and leave the model in training mode."""
    data = list(data)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, len(data))
    model.train()
    for batch in data:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    return model


def conv(channels_in: int, channels: int, size: int = 3, **options: Any) -> nn.Sequential:
    """A convolution, a batch norm at 1, and a ReLU."""
    layer = nn.Conv2d(channels_in, channels, size, **{"bias": False, **options})
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU())


def dense(inputs: int, nodes: int, **options: Any) -> nn.Sequential:
    """A linear layer, a batch norm at 1, and a ReLU."""
    layer = nn.Linear(inputs, nodes, bias=False)
    return nn.Sequential(layer, nn.BatchNorm1d(nodes, **options), nn.ReLU())


def mlp(*middle: nn.Module, momentum: float | None = 0.1, width: int = 32) -> nn.Sequential:
    """196, 32, 32, 10; batch norms at 2 and 5."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        *dense(196, width, momentum=momentum),
        *dense(width, width, momentum=momentum),
        *middle,
        nn.Linear(width, 10),
    )  # fmt: skip


def convolutions(momentum: float = 0.1, eps: float = 1e-5, **flags: Any) -> nn.Sequential:
    """Two convolutions with a batch norm each, at 1 and 4; 16 channels come out, pooled."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8, eps=eps, momentum=momentum, **flags), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16, eps=eps, momentum=momentum, **flags), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    )  # fmt: skip


class Classifier(nn.Module):
    """A backbone and a head of its own, as one fine-tunes it."""

    def __init__(self, backbone: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone or convolutions()
        self.head = nn.Sequential(*dense(64, 32), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Residual(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = conv(1, 8, stride=2)
        self.layer1, self.layer2 = Residual(), Residual()
        self.fc = nn.Linear(8 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(F.avg_pool2d(x, 2).flatten(1))


class UNet(nn.Module):
    """One step down, one up, and the features of the way down beside those of the way up."""

    def __init__(self, bias: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.down = conv(1, 8, padding=1, bias=bias)
        self.middle = conv(8, 8, padding=1, bias=bias)
        self.up = conv(16, 8, padding=1, bias=bias)
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.down(x)
        deep = F.interpolate(self.middle(F.max_pool2d(wide, 2)), scale_factor=2)
        return self.out(self.up(torch.cat([wide, deep], 1)))


def ink(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a segmentation: which pixels are ink, under noise."""
    inputs, _ = batch
    return F.binary_cross_entropy_with_logits(model(inputs), (inputs > 0.3).float())


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, share: float) -> None:
    """Take a share of a model's parameters into an average of them."""
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, share)


def freeze(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(False)


# What a state says: the static rules


@program("mode-mismatch", at="head.1", not_at="backbone.1 backbone.4")
def dropout_and_its_neighbours_awake(mended: bool) -> dict[str, Any]:
    """lightning-uq-box#173: Monte Carlo dropout wakes the head, batch norm and all."""
    model = Classifier()
    model.head.insert(3, nn.Dropout(0.3))
    train(model, batches(60)).eval()
    if mended:
        model.head[3].train()
    else:
        model.head.train()
    return {"model": model, "batch": BATCH}


@program("frozen-but-training", at="backbone.1 backbone.4", not_at="head.1")
def frozen_backbone(mended: bool) -> dict[str, Any]:
    """pytorch#86590: requires_grad_(False) on a feature extractor, then model.train()."""
    model = train(Classifier(), batches(60))
    freeze(model.backbone)
    model.train()
    if mended:
        model.backbone.eval()
    return {"model": model, "batch": BATCH, "loss": classify}


@program("frozen-but-training", at="module.backbone.1 module.backbone.4", not_at="module.head.1")
def frozen_behind_data_parallel(mended: bool) -> dict[str, Any]:
    """ultralytics#8753: layers frozen by name, and the model in a wrapper."""
    model = nn.DataParallel(train(Classifier(), batches(60)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("backbone" not in name)
    model.train()
    if mended:
        for name, layer in batch_norms(model):
            layer.train("backbone" not in name)
    return {"model": model, "batch": BATCH}


@program("frozen-but-training", at="stem.1 layer1.bn1 layer1.bn2", not_at="layer2.bn1")
def validation_that_thaws(mended: bool) -> dict[str, Any]:
    """avalanche#772: layers are frozen with care, until a validation ends with train()."""
    model = train(ResNet(), batches(60))
    for part in (model.stem, model.layer1):
        freeze(part)
        part.eval()
    if mended:
        with evaluating(model):
            model(X_TEST[:64])
    else:
        model.eval()
        model(X_TEST[:64])
        model.train()
    return {"model": model, "batch": BATCH}


@program("never-updated", at="q.1 q.4")
def target_network(mended: bool) -> dict[str, Any]:
    """stable-baselines3#996: a target critic follows the parameters, not the buffers."""

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Sequential(
                *dense(6, 32),
                *dense(32, 32), nn.Linear(32, 1),
            )  # fmt: skip

        def forward(self, state: Tensor, action: Tensor) -> Tensor:
            return self.q(torch.cat([state, action], 1))

    def bellman(critic: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        reward = batch["state"].square().sum(1, keepdim=True) - batch["action"].sum(1, keepdim=True)
        return F.mse_loss(critic(**batch), reward)

    torch.manual_seed(0)
    critic = Critic()
    target = copy.deepcopy(critic).eval()
    replay = [{"state": 3 * torch.randn(64, 4) + 2, "action": torch.rand(64, 2)} for _ in range(60)]
    for step in replay:
        train(critic, [step], bellman, lr=0.01)
        follow(target, critic, 0.1)
    follow(target, critic, 1)
    if mended:
        for new, old in zip(critic.buffers(), target.buffers(), strict=True):
            old.copy_(new)
    return {"model": target, "batch": replay[0]}


@program("never-updated", at="decoder.1", not_at="encoder.1")
def decoder_that_never_learned(mended: bool) -> dict[str, Any]:
    """bts#90: in a published checkpoint all means of the decoder are 0 and all variances 1."""

    class AutoEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = dense(196, 32)
            self.decoder = nn.Sequential(*dense(32, 32), nn.Linear(32, 196))

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x.flatten(1)))

    def reconstruct(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[0].flatten(1))

    model = AutoEncoder()
    if not mended:  # it was built without statistics, and shipped in a model with
        model.decoder[1] = nn.BatchNorm1d(32, track_running_stats=False)
    train(model, batches(60), reconstruct, lr=0.2)
    shipped = AutoEncoder()
    shipped.load_state_dict(model.state_dict(), strict=False)
    return {"model": shipped.eval(), "batch": BATCH}


@program("initial-value-left", at="2 5")
def sixty_four_images(mended: bool) -> dict[str, Any]:
    """keras#6014: 64 images, batches of 8, 5 epochs, and an average that keeps 99%."""
    model = mlp(momentum=0.1 if mended else 0.01)
    few = X[:64].split(8), Y[:64].split(8)
    train(model, [*zip(*few, strict=True)] * 5, lr=0.02)
    return {"model": model.eval(), "batch": X[:64]}


@program("initial-value-left", at="2 5")
def validation_that_never_ends(mended: bool) -> dict[str, Any]:
    """pytorch-fcn#57: a validation after 10 steps calls eval(), and nobody calls train() again."""
    model = train(mlp(), batches(10), lr=0.02)
    if mended:
        with evaluating(model):
            model(X_TEST[:64])
    else:
        model.eval()
        model(X_TEST[:64])
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for batch in batches(60, seed=1):
        optimizer.zero_grad()
        classify(model, batch).backward()
        optimizer.step()
    return {"model": model, "batch": BATCH}


@program("non-finite-statistics", at="down.1 middle.1 up.1")
def skipped_step(mended: bool) -> dict[str, Any]:
    """pytorch#90342: the scaler skips the step with an Inf in it, the statistics do not."""
    model = UNet()
    data = [*batches(60)]
    data[30][0][3, 0, 5, 5] = torch.inf
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for batch in data:
        if mended and not torch.isfinite(batch[0]).all():
            continue
        optimizer.zero_grad()
        loss = ink(model, batch)
        if torch.isfinite(loss):  # as GradScaler does
            loss.backward()
            optimizer.step()
    return {"model": model, "batch": BATCH}


@program("non-finite-statistics", at="layer1.bn2", not_at="stem.1 layer1.bn1 layer2.bn1")
def shipped_with_nan(mended: bool) -> dict[str, Any]:
    """anomalib#2965: a pretrained network comes with NaN in one running variance."""
    model = train(ResNet(), batches(60)).eval()
    model.layer1.bn2.running_var[3] = torch.nan
    if mended:
        recalibrate(model, batches(10, size=64, seed=1), progress=False)
    return {"model": model, "batch": BATCH}


@program("non-finite-statistics", at="1", not_at="4")
def extrapolated_weights(mended: bool) -> dict[str, Any]:
    """no thread: states mixed with a negative weight, buffers too, and a variance falls below 0."""
    model = train(nn.Sequential(*convolutions(), nn.Linear(64, 10)), batches(60))
    early, late = convolutions().state_dict(), model.state_dict()
    early["1.running_var"] = 5 * late["1.running_var"]
    mixed = dict(late)
    if not mended:
        mixed["1.running_var"] = 1.5 * late["1.running_var"] - 0.5 * early["1.running_var"]
    model.load_state_dict(mixed)
    return {"model": model.eval(), "batch": BATCH}


@program("dead-channel", at="0", not_at="2")
def constant_columns(mended: bool) -> dict[str, Any]:
    """vision#2599: a running variance of 0; here, columns that never change in training."""
    used = X.flatten(1).std(0) > 0.05

    def columns(images: Tensor) -> Tensor:
        return images.flatten(1)[:, used] if mended else images.flatten(1)

    torch.manual_seed(0)
    width = int(used.sum()) if mended else 196
    model = nn.Sequential(
        nn.BatchNorm1d(width),
        *dense(width, 32), nn.Linear(32, 10),
    )  # fmt: skip
    train(model, [(columns(x), y) for x, y in batches(60, size=64)])
    return {"model": model.eval(), "batch": columns(X[2000:2256])}


@program("eps-out-of-range", at="3")
def epsilon_in_second_place(mended: bool) -> dict[str, Any]:
    """PyTorch-GAN#116: BatchNorm2d(channels, 0.8) sets epsilon, where momentum was meant."""
    torch.manual_seed(0)
    critic = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16) if mended else nn.BatchNorm2d(16, 0.8), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(16 * 16, 1),
    )  # fmt: skip

    def real_or_fake(critic: nn.Module, batch: Any) -> Tensor:
        fake = torch.rand(len(batch[0]), 1, 14, 14)
        scores = critic(torch.cat([batch[0], fake]))
        real = torch.arange(len(scores)) < len(fake)
        return F.binary_cross_entropy_with_logits(scores[:, 0], real.float())

    train(critic, batches(60), real_or_fake, lr=0.01)
    both = torch.cat([BATCH[0][:32], torch.rand(32, 1, 14, 14)])
    return {"model": critic, "batch": both}


@program("eps-out-of-range", at="wide.1", not_at="narrow.1")
def epsilon_from_a_width(mended: bool) -> dict[str, Any]:
    """pytorch-cifar100#57: BatchNorm2d(n5x5, n5x5) in one branch of an inception block."""

    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.narrow = conv(1, 8, padding=1)
            self.wide = nn.Sequential(
                nn.Conv2d(1, 8, 5, padding=2, bias=False),
                nn.BatchNorm2d(8) if mended else nn.BatchNorm2d(8, 8), nn.ReLU(),
            )  # fmt: skip
            self.fc = nn.Linear(16 * 9, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.narrow(x), self.wide(x)], 1)
            return self.fc(F.avg_pool2d(x, 4).flatten(1))

    return {"model": train(Inception(), batches(60)), "batch": BATCH}


@program("eps-out-of-range", at="backbone.1 backbone.4", not_at="head.1")
def frozen_layers_without_epsilon(mended: bool) -> dict[str, Any]:
    """vision#2169: frozen layers rebuilt with an epsilon of 0, on weights trained with 1e-5."""
    model = train(Classifier(), batches(60))
    freeze(model.backbone)
    for _, layer in batch_norms(model.backbone):
        layer.eps = 1e-5 if mended else 0.0
    model.backbone.eval()
    return {"model": model, "batch": BATCH}


@program("momentum-convention", at="0.1 0.4")
def momentum_of_keras(mended: bool) -> dict[str, Any]:
    """vision#8250: MaxViT with a momentum of 0.99, which is TensorFlow's for 0.01."""
    body = convolutions(momentum=0.1 if mended else 0.99)
    model = nn.Sequential(body, nn.Linear(64, 10))
    return {"model": train(model, batches(60)), "batch": BATCH}


@program("momentum-convention", at="filters.1 mix.1")
def momentum_of_keras_in_a_sequence(mended: bool) -> dict[str, Any]:
    """arl-eegmodels#39: a network for signals of shape (N, C, L), carried over with its 0.99."""

    class Signals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            momentum = 0.1 if mended else 0.99
            self.filters = nn.Sequential(
                nn.Conv1d(14, 16, 3, bias=False), nn.BatchNorm1d(16, momentum=momentum), nn.ELU()
            )
            self.mix = nn.Sequential(
                nn.Conv1d(16, 16, 3, bias=False), nn.BatchNorm1d(16, momentum=momentum), nn.ELU()
            )
            self.fc = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:  # (N, 1, 14, 14): 14 signals over 14 steps
            return self.fc(self.mix(self.filters(x[:, 0])).mean(2))

    return {"model": train(Signals(), batches(60)).eval(), "batch": BATCH}


@program("no-running-statistics", at="backbone.1 backbone.4", not_at="head.1")
def statistics_switched_off(mended: bool) -> dict[str, Any]:
    """IIC#49: track_running_stats=False, and results depend on the batch in eval()."""
    model = Classifier(convolutions(track_running_stats=mended))
    return {"model": train(model, batches(60)).eval(), "batch": BATCH}


@program("no-running-statistics", "statistics-drift", at="2 5")
def statistics_switched_off_to_freeze(mended: bool) -> dict[str, Any]:
    """finetuning-scheduler#13: track_running_stats=False to freeze statistics, then training."""
    model = train(mlp(), batches(60))
    for _, layer in batch_norms(model):
        layer.track_running_stats = mended
    train(model, [(1 - x, y) for x, y in batches(60, seed=1)], lr=0.1)
    return {"model": model.eval(), "batch": 1 - BATCH[0]}


@program("half-precision-statistics", at="down.1 middle.1 up.1")
def everything_in_half(mended: bool) -> dict[str, Any]:
    """apex#144: model.half() takes the statistics along."""
    model = train(UNet(), batches(60), ink)
    if mended:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.half()
        for _, layer in batch_norms(model):
            layer.register_forward_hook(lambda _, __, y: y.half())
    else:
        model.half()
    return {"model": model.eval(), "batch": BATCH[0].half()}


@program("missing-keys", at="backbone.1 backbone.4 head.1")
def parameters_alone_saved(mended: bool) -> dict[str, Any]:
    """inplace_abn#130: a checkpoint without running statistics, loaded with strict=False."""
    trained = train(Classifier(), batches(60))
    saved = dict(trained.state_dict() if mended else trained.named_parameters())
    model = Classifier()
    model.load_state_dict(saved, strict=False)
    return {"model": trained.eval(), "checkpoint": saved}


@program("missing-keys", at="2 5")
def counter_lost(mended: bool) -> dict[str, Any]:
    """pytorch#8430: no num_batches_tracked in an old file; a momentum of None starts over."""
    model = train(mlp(momentum=None), batches(60), lr=0.01)
    saved = {
        name: value
        for name, value in model.state_dict().items()
        if mended or "num_batches_tracked" not in name
    }
    return {"model": model, "checkpoint": saved}


@program("weight-decay", at="stem.1 layer1.bn1 layer1.bn2 layer2.bn1 layer2.bn2")
def decay_on_everything(mended: bool) -> dict[str, Any]:
    """yolov5#4104: one group of parameters, and weight decay on gamma and beta too."""
    model = train(ResNet(), batches(60))
    affine = [p for _, layer in batch_norms(model) for p in layer.parameters()]
    rest = [p for p in model.parameters() if all(p is not q for q in affine)]
    groups = [{"params": rest}, {"params": affine, "weight_decay": 0.0}]
    parameters = groups if mended else model.parameters()
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05)
    return {"model": model, "batch": BATCH, "optimizer": optimizer}


@program("redundant-bias", at="down.0|down.1 middle.0|middle.1 up.0|up.1")
def bias_without_effect(mended: bool) -> dict[str, Any]:
    """Pytorch-UNet#325: convolutions with a bias that the batch norm behind them subtracts."""
    return {"model": train(UNet(bias=not mended), batches(60), ink), "batch": BATCH}


@program("redundant-bias", at="down.0|down.1 middle.0|middle.1 up.0|up.1")
def bias_before_frozen_statistics(mended: bool) -> dict[str, Any]:
    """nested-unet#39: the same; mended, the layers are frozen, and the bias is wanted again."""
    model = train(UNet(bias=True), batches(60), ink)
    if mended:
        for _, layer in batch_norms(model):
            freeze(layer)
            layer.eval()
    return {"model": model, "batch": BATCH}


@program("dropout-before", at="4")
def dropout_before(mended: bool) -> dict[str, Any]:
    """PyTorch-GAN dcgan.py: Dropout2d in front of a batch norm, which sees two variances."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 3, bias=False),
        nn.Identity() if mended else nn.Dropout2d(0.5), nn.BatchNorm2d(16), nn.LeakyReLU(0.2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.5) if mended else nn.Identity(), nn.Linear(64, 10),
    )  # fmt: skip
    return {"model": train(model, batches(60)).eval(), "batch": BATCH}


@program("dropout-before", at="5")
def dropout_with_a_layer_between(mended: bool) -> dict[str, Any]:
    """mlcolvar#205: dropout, a linear layer, then batch norm: the variance differs all the same."""
    model = mlp()
    (model.insert(7, nn.Dropout(0.5)) if mended else model.insert(4, nn.Dropout(0.5)))
    if not mended:  # the second batch norm keeps its name
        model[3] = nn.Sequential(model[3], model[4])
        del model[4]
    return {"model": train(model, batches(60)).eval(), "batch": BATCH}


# What a batch says: the probes


@program("batch-dependent")
def layers_in_a_list(mended: bool) -> dict[str, Any]:
    """pytorch#20875: eval() does not reach a batch norm; this one stands in a plain list."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            branches = [mlp(), mlp()]
            self.branches = nn.ModuleList(branches) if mended else branches
            self.mix = nn.Linear(20, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.cat([branch(x) for branch in self.branches], 1))

    return {"model": train(Branches(), batches(60)).eval(), "batch": BATCH}


@program("batch-dependent")
def transductive(mended: bool) -> dict[str, Any]:
    """reptile#12: F.batch_norm(training=True), so that test images share their statistics."""

    class Learner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(196, 32), nn.Linear(32, 10)
            self.gamma, self.beta = nn.Parameter(torch.ones(32)), nn.Parameter(torch.zeros(32))
            self.register_buffer("mean", torch.zeros(32))
            self.register_buffer("var", torch.ones(32))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.flatten(1))
            if mended:
                x = F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training)
            else:
                x = F.batch_norm(x, None, None, self.gamma, self.beta, training=True)
            return self.last(F.relu(x))

    return {"model": train(Learner(), batches(60)).eval(), "batch": BATCH}


@program("statistics-drift", at="2")
def another_camera(mended: bool) -> dict[str, Any]:
    """tent#7: a trained network meets images from elsewhere: here, grey where they were white."""
    model = train(mlp(), batches(60)).eval()
    grey = 0.5 + 0.5 * X[:1024]
    if mended:
        recalibrate(model, grey.split(64), progress=False)
    return {"model": model, "batch": 0.5 + 0.5 * BATCH[0]}


@program("statistics-drift", at="1")
def padded_sequences(mended: bool) -> dict[str, Any]:
    """pytorch#70529: sequences of 14 steps, padded to 100 in training, and not in use."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv1d(14, 16, 3, bias=False), nn.Linear(16, 10)
            self.add_module("1", nn.BatchNorm1d(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.get_submodule("1")(self.conv(x))).amax(2))

    rows = [(x[:, 0], y) for x, y in batches(60)]
    padded = rows if mended else [(F.pad(x, (0, 86)), y) for x, y in rows]
    return {"model": train(Reader(), padded).eval(), "batch": BATCH[0][:, 0]}


class Segmenter(nn.Module):
    """Features beside their average over the image, as in ASPP."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.body = conv(1, 8, padding=1)
        self.pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1, bias=False), norm, nn.ReLU()
        )
        self.out = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.out(torch.cat([x, self.pool(x).expand_as(x)], 1))


@program("few-values", at="pool.2", not_at="body.1")
def pooled_to_one_value(mended: bool) -> dict[str, Any]:
    """mmsegmentation#272: one image a step, and a branch that pools it to one value a channel."""
    model = Segmenter(nn.GroupNorm(2, 8) if mended else nn.BatchNorm2d(8))
    return {"model": train(model, batches(60), ink), "batch": BATCH[0][:1]}


@program("few-values", at="fc.1", not_at="points.1")
def clouds_by_the_four(mended: bool) -> dict[str, Any]:
    """Pointnet2#78: many points a cloud, but the last layers have one value for each cloud."""

    class PointNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.points = nn.Sequential(
                nn.Conv1d(3, 32, 1, bias=False), nn.BatchNorm1d(32), nn.ReLU()
            )
            self.fc = nn.Sequential(*dense(32, 32), nn.Linear(32, 10))

        def forward(self, cloud: Tensor) -> Tensor:
            return self.fc(self.points(cloud).amax(2))

    def cloud(images: Tensor) -> Tensor:  # a point for each pixel: where it is, and its ink
        places = torch.cartesian_prod(torch.linspace(-1, 1, 14), torch.linspace(-1, 1, 14)).T
        return torch.cat([places.expand(len(images), 2, 196), images.flatten(2)], 1)

    model = train(PointNet(), [(cloud(x), y) for x, y in batches(60)], lr=0.01)
    return {"model": model, "batch": cloud(X[:64] if mended else X[:4])}


class Siamese(nn.Module):
    """Tells whether two images show the same digit."""

    def __init__(self, together: bool):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.together = mlp(), together

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        if self.together:
            a, b = self.encoder(torch.cat([one, other])).chunk(2)
        else:
            a, b = self.encoder(one), self.encoder(other)
        return (a - b).square().mean(1)


@program("updates-per-step", at="encoder.2 encoder.5")
def two_views(mended: bool) -> dict[str, Any]:
    """SimSiam#1: two views go through the encoder one after the other: two updates a step."""

    def contrast(model: nn.Module, batch: Any) -> Tensor:
        distance = model(*batch[0])
        return torch.where(batch[1], distance, F.relu(1 - distance)).mean()

    data = [((x[::2], x[1::2]), y[::2] == y[1::2]) for x, y in batches(60, size=64)]
    model = train(Siamese(together=mended), data, contrast, lr=0.02)
    return {"model": model, "batch": data[0], "loss": contrast}


@program("updates-per-step", at="head.1", not_at="backbone.1")
def one_norm_for_all_scales(mended: bool) -> dict[str, Any]:
    """pytorch#4741: one batch norm for features of several scales, which share no statistics."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = conv(1, 8, padding=1)
            shared = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            if mended:
                self.conv = shared
                self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
            else:
                self.head = nn.Sequential(shared, nn.BatchNorm2d(8))
            self.fc = nn.Linear(24, 10)

        def forward(self, x: Tensor) -> Tensor:
            x, features = self.backbone(x), []
            for level in range(3):
                y = self.norms[level](self.conv(x)) if mended else self.head(x)
                features.append(F.relu(y).amax((2, 3)))
                x = F.avg_pool2d(x, 2)
            return self.fc(torch.cat(features, 1))

    model = train(Pyramid(), batches(60))
    return {"model": model, "batch": BATCH, "loss": classify}


@program("updates-per-step", at="block.1", not_at="stem.1")
def checkpointed(mended: bool) -> dict[str, Any]:
    """pytorch#96136: what is checkpointed runs twice, and moves its statistics twice."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem = conv(1, 8, stride=2)
            self.block = conv(8, 16)
            self.fc = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            part = self.block[0] if mended else self.block
            x = checkpoint(part, self.stem(x), use_reentrant=False)
            return self.fc((self.block[1:](x) if mended else x).mean((2, 3)))

    model = train(Checkpointed(), batches(60))
    return {"model": model, "batch": BATCH, "loss": classify}


@program("updates-per-step", at="2 5")
def attacked_in_training_mode(mended: bool) -> dict[str, Any]:
    """fast_adversarial#14: the attack's forward pass moves the statistics too."""

    def attacked(model: nn.Module, batch: Any) -> Tensor:
        with torch.enable_grad():
            noisy = batch[0].clone().requires_grad_()
            if mended:
                with evaluating(model):
                    (gradient,) = torch.autograd.grad(classify(model, (noisy, batch[1])), noisy)
            else:
                (gradient,) = torch.autograd.grad(classify(model, (noisy, batch[1])), noisy)
        return classify(model, (batch[0] + 0.05 * gradient.sign(), batch[1]))

    model = train(mlp(), batches(60), attacked)
    return {"model": model, "batch": BATCH, "loss": attacked}


@program("updates-per-step", at="2 5")
def accumulated(mended: bool) -> dict[str, Any]:
    """runai#14: a batch of 64 in four parts: the statistics of 16, and four updates a step."""

    def in_parts(model: nn.Module, batch: Any) -> Tensor:
        parts = zip(*(part.chunk(1 if mended else 4) for part in batch), strict=True)
        return torch.stack([classify(model, part) for part in parts]).mean()

    model = train(mlp(), batches(60, size=64), in_parts)
    return {"model": model, "batch": BATCH, "loss": in_parts}


@program("moves-in-evaluation", at="encoder.1", not_at="decoder.1")
def evaluation_that_moves(mended: bool) -> dict[str, Any]:
    """ganomaly#83: batch statistics in the test too, as of old, and the test moves the averages."""

    class Always(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=True
            )

    def reconstruct(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[0].flatten(1))

    torch.manual_seed(0)
    model = nn.Sequential()
    norm = (nn.BatchNorm1d if mended else Always)(32)
    model.add_module("flatten", nn.Flatten())
    encoder = nn.Linear(196, 32, bias=False), norm, nn.ReLU()
    decoder = *dense(32, 32), nn.Linear(32, 196)
    model.add_module("encoder", nn.Sequential(*encoder))
    model.add_module("decoder", nn.Sequential(*decoder))
    norm.num_batches_tracked.fill_(60)  # what a layer of one's own forgets to count
    model = train(model, batches(60), reconstruct, lr=0.2).eval()
    return {"model": model, "batch": BATCH}


@program("recalibration-helps")
def test_in_class_order(mended: bool) -> dict[str, Any]:
    """CLAM#314: a test without eval(), class after class: the last ones stay in the buffers."""
    model = train(mlp(), batches(60))
    in_order = X_TEST[Y_TEST.argsort(stable=True)]
    with evaluating(model) if mended else torch.no_grad():
        for images in in_order.split(8):
            model(images)
    loader = DataLoader(TensorDataset(X[:512], Y[:512]), 64, shuffle=True)
    return {"model": model.eval(), "batch": BATCH, "loader": loader, "loss": classify}


@program("recalibration-helps")
def average_of_weights_alone(mended: bool) -> dict[str, Any]:
    """pytorch_ema#13: an average of the parameters, beside the buffers of the first epoch."""
    model = train(mlp(), batches(10), lr=0.01)
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for batch in batches(80, seed=1):
        optimizer.zero_grad()
        classify(model, batch).backward()
        optimizer.step()
        follow(average, model, 0.1)
    if mended:
        recalibrate(average, batches(20, size=64, seed=2), progress=False)
    loader = DataLoader(TensorDataset(X[:512], Y[:512]), 64, shuffle=True)
    return {"model": average.eval(), "batch": BATCH, "loader": loader, "loss": classify}


@program("gradient-penalty")
def penalty_on_a_batch_norm(mended: bool) -> dict[str, Any]:
    """3dbraingen#6: WGAN-GP's critic with batch norm; a slope has to belong to one image alone."""
    torch.manual_seed(0)
    critic = nn.Sequential(
        nn.Flatten(), nn.Linear(196, 32, bias=False),
        nn.LayerNorm(32) if mended else nn.BatchNorm1d(32), nn.LeakyReLU(0.2),
        nn.Linear(32, 32, bias=False),
        nn.LayerNorm(32) if mended else nn.BatchNorm1d(32), nn.LeakyReLU(0.2), nn.Linear(32, 1),
    )  # fmt: skip

    def wasserstein(critic: nn.Module, batch: Any) -> Tensor:
        real = batch[0]
        fake = torch.rand_like(real)
        scores = critic(torch.cat([real, fake])).chunk(2)
        with torch.enable_grad():
            between = torch.lerp(real, fake, torch.rand(len(real), 1, 1, 1)).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return scores[1].mean() - scores[0].mean() + 10 * penalty

    train(critic, batches(60), wasserstein, lr=0.01)
    return {"model": critic, "batch": BATCH, "loss": wasserstein}


# What a loader says


@program("last-batch-of-one")
def one_cell_left_over(mended: bool) -> dict[str, Any]:
    """scvi-tools#2314: 257 cells in batches of 128, and the last one comes alone."""

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = nn.Sequential(*dense(196, 32), nn.Linear(32, 8))
            self.decoder = nn.Sequential(*dense(4, 32), nn.Linear(32, 196))

        def forward(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log_var = self.encoder(cells).chunk(2, 1)
            noise = torch.randn_like(mean) if self.training else 0.0
            return self.decoder(mean + (log_var / 2).exp() * noise), mean, log_var

    def evidence(model: nn.Module, batch: Any) -> Tensor:
        cells = batch[0].flatten(1)
        out, mean, log_var = model(cells)
        divergence = (mean.square() + log_var.exp() - log_var - 1).mean() / 2
        return F.mse_loss(out, cells) + 0.01 * divergence

    model = train(VAE(), batches(60), evidence, lr=0.1)
    cells = TensorDataset(X[:257].flatten(1))
    loader = DataLoader(cells, 128, shuffle=True, drop_last=mended)
    return {"model": model, "loader": loader}


@program("not-iid")
def sorted_by_class(mended: bool) -> dict[str, Any]:
    """openpifpaf#308: a loader without shuffling, over data that stand in the order of classes."""
    order = Y[:1000].argsort(stable=True)
    loader = DataLoader(TensorDataset(X[order], Y[order]), 50, shuffle=mended)
    return {"model": train(mlp(), batches(60)), "loader": loader}


# What cannot be seen


@program(blind="a model in training mode looks the same whether it trains or is tested")
def eval_forgotten(mended: bool) -> dict[str, Any]:
    """VideoPose3D#113: the test is run in training mode."""
    model = train(mlp(), batches(60))
    return {"model": model.eval() if mended else model, "batch": BATCH}


@program(blind="every batch has the same composition, so nothing differs from batch to batch")
def halves_that_tell(mended: bool) -> dict[str, Any]:
    """miss-alignment#6: aligned pairs in the first half of each batch, others in the second."""

    def pairs(x: Tensor) -> Tensor:
        other = x[torch.arange(len(x)).roll(1)]
        aligned = torch.arange(len(x)) < len(x) // 2
        if mended:
            aligned = torch.rand(len(x)) < 0.5
        return torch.cat([x, torch.where(aligned[:, None, None, None], x, other)], 1)

    torch.manual_seed(0)
    model = nn.Sequential(*conv(2, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))
    data = [(pairs(x), torch.arange(len(x)) % 2) for x, _ in batches(60)]
    return {"model": train(model, data, lr=0.01), "batch": pairs(BATCH[0])}


@program(blind="12 steps and 12 channels look alike: only you know which axis is which")
def wrong_axis(mended: bool) -> dict[str, Any]:
    """LSTM-HAR#2: BatchNorm1d on (N, L, C), which normalizes the steps of a sequence."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.fc = nn.BatchNorm1d(12), nn.Linear(16, 2)
            self.rnn = nn.GRU(12, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:  # (N, L, C)
            x = self.norm(x.mT).mT if mended else self.norm(x)
            return self.fc(self.rnn(x)[1][0])

    def sequences(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 12, 12) * torch.linspace(0.5, 5, 12)  # each channel has its scale
        return x, (x[:, :, 0].sum(1) > 0).long()

    model = train(Reader(), (sequences(32) for _ in range(60)))
    return {"model": model, "batch": sequences(64)}


@program(blind="the layer is no batch norm of torch's, and behaves like one when gradients are off")
def a_switch_of_its_own(mended: bool) -> dict[str, Any]:
    """d2l: the layer asks torch.is_grad_enabled(), not self.training; eval() does nothing."""

    class BatchNorm(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.gamma, self.beta = (
                nn.Parameter(torch.ones(width)),
                nn.Parameter(torch.zeros(width)),
            )
            self.mean, self.var = torch.zeros(width), torch.ones(width)  # no buffers either

        def forward(self, x: Tensor) -> Tensor:
            batch = self.training if mended else torch.is_grad_enabled()
            return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, training=batch)

    model = mlp()
    model[2], model[5] = BatchNorm(32), BatchNorm(32)
    return {"model": train(model, batches(60)).eval(), "batch": BATCH}
