"""One smallest case for each rule, on the wrong side of its threshold and right beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnlib.statistics import recalibrate


@dataclass(frozen=True)
class Case:
    """What a rule finds: severity, layer and value, in what `make` returns for `diagnose`.

    make(beside): the arguments; with beside, of the program next to it that is all right.
    """

    slug: str
    severity: str
    layer: str
    value: Any
    make: Callable[[bool], dict[str, Any]]

    def __repr__(self) -> str:
        return f"{self.slug}-{self.severity}-{self.make.__name__}"


CASES: list[Case] = []


def case(slug: str, severity: str, layer: str = "1", value: Any = None) -> Callable[..., Any]:
    def add(make: Callable[[bool], dict[str, Any]]) -> Callable[[bool], dict[str, Any]]:
        CASES.append(Case(slug, severity, layer, value, make))
        return make

    return add


def data(n: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) * 3 - 1


def labels(n: int = 64) -> torch.Tensor:
    return torch.arange(n) % 3


def network(norm: nn.Module | None = None, bias: bool = False, before: Any = ()) -> nn.Sequential:
    """Return a network with batch norms at 1 and 4, and statistics that fit `data`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(5, 8, bias=bias), norm or nn.BatchNorm1d(8), nn.ReLU(),
            nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3),
        )  # fmt: skip
    for i, layer in enumerate(before):
        model.insert(i, layer)
    settle(model)
    return model


def settle(model: nn.Module, x: torch.Tensor | None = None) -> None:
    """Give a network the statistics of data, as after many batches."""
    recalibrate(model, [data(2000, seed=9) if x is None else x], progress=False)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(1000)


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


# The static rules


@case("mode-mismatch", "error", value=1)
def trains_while_the_model_evaluates(beside):
    model = network().eval()
    model[1].train(not beside)
    return {"model": model}


@case("mode-mismatch", "warning", value=0)
def evaluates_while_the_model_trains(beside):
    model = network()
    model[1].eval()
    model[1].requires_grad_(not beside)
    return {"model": model}


@case("frozen-but-training", "warning", value=0.1)
def frozen(beside):
    model = network()
    model[1].requires_grad_(False)
    model[1].bias.requires_grad_(beside)
    return {"model": model}


@case("frozen-but-training", "warning", "0.1", value=1 / 1001)
def frozen_without_parameters(beside):
    norm = nn.BatchNorm1d(8, affine=False, momentum=None)
    inner = network(norm).requires_grad_(False)
    inner[4].eval()
    inner[6].requires_grad_(beside)
    return {"model": nn.Sequential(inner, nn.Linear(3, 2))}


@case("never-updated", "error", value=0)
def never_updated(beside):
    model = network().eval()
    model[1].reset_running_stats()
    model[1].running_var[3] += 1e-3 * beside
    return {"model": model}


@case("never-updated", "warning", value=0)
def never_updated_beside_one_that_is(beside):
    model = network()
    model[1].reset_running_stats()
    if beside:
        model[4].reset_running_stats()
    return {"model": model}


@case("initial-value-left", "warning", value=0.9**21)
def initial_value_left(beside):
    model = network()
    model[1].reset_running_stats()
    for _ in range(21 + beside):
        model[1](0.1 * torch.randn(9, 8))
    return {"model": model.eval()}


@case("non-finite-statistics", "error", value=3)
def non_finite(beside):
    model = network()
    bad = torch.tensor([torch.nan, torch.inf, -1e-9])
    model[1].running_var[2:5] = torch.rand(3) if beside else bad
    return {"model": model}


@case("dead-channel", "warning", value=0.5)
def half_dead(beside):
    model = network()
    model[1].running_var[:4] = 1.1e-5 if beside else 0.9e-5
    return {"model": model}


@case("dead-channel", "note", value=1 / 8)
def one_dead_since_a_few_updates(beside):
    model = network()
    model[1].reset_running_stats()
    x = torch.randn(9, 8)
    x[:, 2] *= beside
    for _ in range(30):
        model[1](x)
    return {"model": model}


@case("eps-out-of-range", "warning", value=0.0101)
def large_eps(beside):
    return {"model": network(nn.BatchNorm1d(8, 0.01 if beside else 0.0101))}


@case("eps-out-of-range", "warning", value=0)
def no_eps(beside):
    model = network()
    model[1].eps = 1e-9 if beside else 0.0
    return {"model": model}


@case("momentum-convention", "warning", value=0.51)
def large_momentum(beside):
    return {"model": network(nn.BatchNorm1d(8, momentum=0.5 if beside else 0.51))}


@case("no-running-statistics", "warning", value=0)
def no_running_statistics(beside):
    return {"model": network(nn.BatchNorm1d(8, track_running_stats=beside))}


@case("half-precision-statistics", "warning", value=2**-10)
def half_precision(beside):
    model = network()
    if not beside:
        model[1].half()
    return {"model": model}


@case("half-precision-statistics", "note", value=2**-7)
def half_precision_in_evaluation(beside):
    model = network().eval()
    if not beside:
        model[1].bfloat16()
    return {"model": model}


@case("missing-keys", "error", value=2)
def missing_keys(beside):
    model = network()
    state = model.state_dict()
    for key in ("running_mean", "running_var"):
        if not beside:
            del state[f"1.{key}"]
    return {"model": model, "checkpoint": state}


@case("missing-keys", "note", value=1)
def missing_counter(beside):
    model = network()
    state = model.state_dict()
    if not beside:
        del state["1.num_batches_tracked"]
    return {"model": model, "checkpoint": state}


@case("missing-keys", "warning", value=2)
def keys_left_over(beside):
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    state = network().state_dict()
    if not beside:
        del state["1.num_batches_tracked"]
    return {"model": network(None if beside else norm), "checkpoint": state}


@case("weight-decay", "note", value=0.01)
def weight_decay(beside):
    model = network()
    groups = [{"params": model[1].parameters(), "weight_decay": 0.0 if beside else 0.01}]
    groups += [{"params": model[0].parameters(), "weight_decay": 0.1}]
    return {"model": model, "optimizer": torch.optim.AdamW(groups)}


# Rules that read nn.Sequential, or follow a batch


class Plain(nn.Module):
    """The same layers, called one by one."""

    def __init__(self, layers: nn.Sequential, between: Callable[[Any], Any] = lambda x: x):
        super().__init__()
        self.layers, self.between = nn.ModuleList(layers), between

    def forward(self, x):
        for layer in self.layers:
            x = layer(self.between(x))
        return x


@case("redundant-bias", "note", value=8)
def redundant_bias(beside):
    return {"model": network(bias=not beside)}


@case("redundant-bias", "note", value=8)
def bias_before_running_statistics(beside):
    return {"model": network(bias=True).train(not beside)}


@case("redundant-bias", "note", "layers.1", value=8)
def redundant_bias_called_one_by_one(beside):
    between = (lambda x: x + 0) if beside else (lambda x: x)
    return {"model": Plain(network(bias=True), between), "batch": data()}


@case("redundant-bias", "note", "layers.1", value=8)
def bias_before_a_function_in_place(beside):
    between = (lambda x: x.relu_()) if beside else (lambda x: x)
    return {"model": Plain(network(bias=True), between), "batch": data()}


@case("dropout-before", "warning", "2", value=0.11)
def dropout_before(beside):
    return {"model": network(before=[nn.Dropout(0.1 if beside else 0.11)])}


@case("dropout-before", "warning", "layers.3", value=0.5)
def dropout_before_called_one_by_one(beside):
    between = nn.LayerNorm(5) if beside else nn.Identity()
    return {"model": Plain(network(before=[nn.Dropout(0.5), between])), "batch": data()}


# With a batch


class Always(nn.BatchNorm1d):
    """A batch norm that forgets what mode it is in."""

    def __init__(self, features: int, moves: bool = False):
        super().__init__(features)
        self.moves = moves

    def forward(self, x):
        kept = (self.running_mean, self.running_var) if self.moves else (None, None)
        return F.batch_norm(x, *kept, self.weight, self.bias, True, self.momentum, self.eps)


@case("batch-dependent", "error")
def batch_dependent(beside):
    return {"model": network(None if beside else Always(8)).eval(), "batch": data()}


@case("batch-dependent", "error")
def batch_dependent_by_its_own_mode(beside):
    class Stubborn(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(True)

    return {"model": network(None if beside else Stubborn(8)), "batch": (data(), labels())}


@case("statistics-drift", "warning", value=pytest.approx(0.55, abs=0.05))
def drift_of_the_mean(beside):
    model = network()
    settle(model, data(400))
    norm = model[1]
    norm.running_mean += (0.45 if beside else 0.55) * (norm.running_var + norm.eps).sqrt()
    return {"model": model, "batch": data(400)}


@case("statistics-drift", "warning", value=pytest.approx(0.6, abs=0.05))
def drift_of_the_variance(beside):
    model = network().eval()
    settle(model, data(400))
    model[1].running_var /= (1.45 if beside else 1.6) ** 2
    return {"model": model, "batch": data(400)}


@case("statistics-drift", "warning", value=pytest.approx(1.2, abs=0.2))
def drift_beyond_what_few_examples_explain(beside):
    model = network()
    norm = model[1]
    x = data(12)
    settle(model, x)
    norm.running_mean += (0.55 if beside else 1.2) * (norm.running_var + norm.eps).sqrt()
    return {"model": model, "batch": x}


@case("few-values", "warning", value=15)
def few_values(beside):
    return {"model": network(), "batch": data(15 + beside)}


@case("few-values", "error", value=1)
def one_value(beside):
    model = network()
    model[1].train(not beside)
    model[1].requires_grad_(False)
    model[4].eval().requires_grad_(False)
    return {"model": model, "batch": data(1)}


class Twice(nn.Module):
    def __init__(self, times: int = 2):
        super().__init__()
        self.net, self.times = network(), times

    def forward(self, x):
        return sum(self.net(x) for _ in range(self.times))


@case("updates-per-step", "warning", "net.1", value=2)
def two_updates(beside):
    return {"model": Twice(1 if beside else 2), "batch": data()}


class Checkpointed(nn.Module):
    def __init__(self, on: bool):
        super().__init__()
        self.net, self.on = network(), on

    def forward(self, x):
        if not self.on:
            return self.net(x)
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)


@case("updates-per-step", "warning", "net.4", value=2)
def checkpointed(beside):
    model, batch = Checkpointed(not beside), (data(), labels())
    return {"model": model, "batch": batch, "loss": cross_entropy}


@case("updates-per-step", "note", "spare", value=0)
def no_update(beside):
    model = Twice(1)
    model.spare = nn.BatchNorm1d(3)
    settle_like(model.spare)
    if beside:
        model.spare.eval().requires_grad_(False)
    return {"model": model, "batch": data()}


def settle_like(norm: nn.Module) -> None:
    norm.running_var += 1
    norm.num_batches_tracked += 1000


@case("moves-in-evaluation", "error")
def moves_in_evaluation(beside):
    return {"model": network(None if beside else Always(8, moves=True)).eval(), "batch": data()}


def trained() -> tuple[nn.Sequential, Any]:
    """Return a network that has learned which input is the largest, and a batch."""
    x = data(1200)
    y = x[:, :3].argmax(1)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for i in range(120):
        rows = torch.arange(i * 50, i * 50 + 50) % 1000
        optimizer.zero_grad()
        cross_entropy(model, (x[rows], y[rows])).backward()
        optimizer.step()
    settle(model, x[:1000])
    model.zero_grad(set_to_none=True)
    return model.eval(), (x[1000:], y[1000:])


@case("recalibration-helps", "warning", "")
def recalibration_helps(beside):
    model, batch = trained()
    if not beside:
        model[1].running_var *= 30
    return {"model": model, "batch": batch, "loss": cross_entropy}


def penalty(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    x = batch.requires_grad_()
    scores = model(x).sum(1)
    (slope,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
    return scores.mean() + (slope.norm(dim=1) - 1).square().mean()


@case("gradient-penalty", "warning")
def gradient_penalty(beside):
    model = network()
    if beside:
        model[1], model[4] = nn.LayerNorm(8), nn.LayerNorm(6)
    return {"model": model, "batch": data(), "loss": penalty}


# With a loader


def loader_of(n: int, **options: Any) -> torch.utils.data.DataLoader:
    options = {"batch_size": 32} | options
    dataset = torch.utils.data.TensorDataset(data(n), labels(n))
    return torch.utils.data.DataLoader(dataset, **options)


@case("last-batch-of-one", "error", "", value=1)
def last_batch_of_one(beside):
    return {"model": network(), "loader": loader_of(66 if beside else 65)}


@case("last-batch-of-one", "error", "", value=1)
def last_batch_of_one_dropped(beside):
    return {"model": network(), "loader": loader_of(65, drop_last=beside)}


@case("not-iid", "warning", "")
def not_iid(beside):
    x = data(640)
    if not beside:
        x = x[x[:, 0].argsort()]
    return {"model": network(), "loader": list(x.split(32))}
