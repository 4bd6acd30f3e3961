"""What test_distributed.py runs in several processes, with torchrun.

    torchrun ... distributed_script.py checks report.json
    torchrun ... distributed_script.py checks-then-missing report.json

A check is a function of the number of processes. All processes run all checks, in the same order.
Each communicates first and asserts afterwards, so that a failure keeps nobody waiting; the first
process writes what failed where.
"""

import copy
import json
import os
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnlib.nn.distributed import SyncBatchNorm, convert_sync_batchnorm

C = 3
CHECKS = []
TIMEOUT = 3  # seconds
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def check(function):
    CHECKS.append(function)
    return function


def draw(shape, dtype=torch.float64, seed=0, mean=3.0, std=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)


def share(whole, sizes, rank=None):
    """Return a process's part of the whole batch, of which it holds sizes[rank] examples."""
    first, last = list(pairwise(accumulate(sizes, initial=0)))[
        dist.get_rank() if rank is None else rank
    ]
    return whole[first:last]


def assert_close(actual, exact, tolerance):
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    assert actual.dtype == exact.dtype, (actual.dtype, exact.dtype)
    if actual.numel():
        error = (actual - exact).abs().max().item()
        assert error <= tolerance * max(1, exact.abs().max().item()), f"off by {error:.1e}"


def pair(norm, dtype, **arguments):
    """Return ours, and PyTorch's batch norm for one process, with the same state."""
    ours = SyncBatchNorm(C, dtype=dtype, **arguments)
    arguments.pop("process_group", None)
    theirs = norm(C, dtype=dtype, **arguments)
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.data = draw((C,), dtype, seed=seed + 10, mean=1)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def step(ours, theirs, whole, dy, sizes, group=None, rank=None):
    """Return what a step gives: (ours in this process, theirs of the whole batch) by name."""
    x = share(whole, sizes, rank).clone().requires_grad_()
    all_x = whole.clone().requires_grad_()
    y, all_y = ours(x), theirs(all_x)
    (y * share(dy, sizes, rank)).sum().backward()
    (all_y * dy).sum().backward()
    results = {
        "y": (y.detach(), share(all_y.detach(), sizes, rank)),
        "dx": (x.grad, share(all_x.grad, sizes, rank)),
    }
    for name, parameter in ours.named_parameters():
        total = parameter.grad.clone()
        dist.all_reduce(total, group=group)
        results[f"the sum of d{name}"] = total, theirs.get_parameter(name).grad
    results |= {name: (buffer, theirs.get_buffer(name)) for name, buffer in ours.named_buffers()}
    return results


def compare(results, tolerance):
    for name, (actual, exact) in results.items():
        try:
            assert_close(actual, exact, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@contextmanager
def counted():
    """Count the calls that communicate."""
    names = [
        n for n in dir(dist) if n.startswith(("all_", "broadcast", "reduce", "gather", "barrier"))
    ]
    originals = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}
    calls = []
    for name, original in originals.items():

        def counting(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        setattr(dist, name, counting)
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def splits(world):
    """Return how many examples each process holds: equal, unequal, one none, one a single one."""
    return [
        [4] * world,
        [5, 2, 7][:world],
        [0, *[6, 3][: world - 1]],
        [5, *[1, 0][: world - 1]],
        [1] * world,
    ]


@check
def equals_one_process_with_the_whole_batch(world):
    for dtype in TOLERANCE:
        for sizes in splits(world):
            for norm, spatial in (
                (nn.BatchNorm1d, ()),
                (nn.BatchNorm2d, (4, 5)),
                (nn.BatchNorm3d, (2, 3, 2)),
            ):
                shape = (sum(sizes), C, *spatial)
                ours, theirs = pair(norm, dtype)
                for seed in range(2):  # the second step starts from moved statistics
                    ours.zero_grad(), theirs.zero_grad()
                    whole, dy = draw(shape, dtype, seed), draw(shape, dtype, seed + 5, mean=1)
                    compare(step(ours, theirs, whole, dy, sizes), TOLERANCE[dtype])


@check
def for_every_argument(world):
    sizes = [5, 2, 7][:world]
    for arguments in (
        {"momentum": None},
        {"momentum": 0.7, "eps": 0.1},
        {"track_running_stats": False},
        {"affine": False},
        {"bias": False},
        {"affine": False, "track_running_stats": False},
    ):
        ours, theirs = pair(nn.BatchNorm2d, torch.float64, **arguments)
        assert str(ours).removeprefix("Sync") == str(theirs).replace("BatchNorm2d", "BatchNorm")
        for seed in range(3):
            ours.zero_grad(), theirs.zero_grad()
            whole, dy = (draw((sum(sizes), C, 4, 5), seed=seed + s) for s in (0, 5))
            compare(step(ours, theirs, whole, dy, sizes), 1e-10)


@check
def keeps_statistics_that_were_switched_off(world):
    sizes = [5, 2, 7][:world]
    ours, theirs = pair(nn.BatchNorm2d, torch.float64)
    ours.track_running_stats = theirs.track_running_stats = False
    whole, dy = (draw((sum(sizes), C, 4, 5), seed=s) for s in (0, 5))
    results = step(ours, theirs, whole, dy, sizes)
    compare(results, 1e-10)
    assert ours.num_batches_tracked == 0


@check
def far_from_zero_and_from_each_other(world):
    """float32 has 7 digits: subtracting squares would leave none of the variance."""
    sizes = [40] * world
    whole = draw((sum(sizes), C), torch.float32, mean=1e4, std=1)
    whole += torch.arange(world).repeat_interleave(40)[:, None]
    ours, theirs = pair(nn.BatchNorm1d, torch.float32)
    exact = copy.deepcopy(theirs).double()
    y = ours(share(whole, sizes))
    all_y = exact(whole.double())
    assert_close(y.double().detach(), share(all_y.detach(), sizes), 1e-5)
    assert_close(ours.running_var, exact.running_var.float(), 1e-6)


@check
def half_precision_with_parameters_in_float(world):
    sizes = [5, 2, 7][:world]
    for dtype in (torch.float16, torch.bfloat16):
        ours, theirs = pair(nn.BatchNorm2d, torch.float32)
        whole = draw((sum(sizes), C, 4, 5), dtype).contiguous(memory_format=torch.channels_last)
        x = share(whole, sizes).requires_grad_()
        y = ours(x)
        y.backward(torch.ones_like(y))
        exact = theirs.double()(whole.double())
        assert y.dtype == x.grad.dtype == dtype
        assert ours.weight.grad.dtype == ours.running_mean.dtype == torch.float32
        assert y.is_contiguous(memory_format=torch.channels_last)
        ulp = torch.finfo(dtype).eps
        assert_close(y.double().detach(), share(exact.detach(), sizes), ulp)
        assert_close(ours.running_var, theirs.running_var.float(), 1e-5)


@check
def running_statistics_are_the_same_bits_in_all_processes(world):
    sizes = [5, 2, 7][:world]
    ours = SyncBatchNorm(C)
    for seed in range(5):
        ours(share(draw((sum(sizes), C, 4, 5), torch.float32, seed), sizes))
    states = [None] * world
    dist.all_gather_object(states, [b.tolist() for b in ours.buffers()])
    assert all(state == states[0] for state in states)


@check
def a_nan_stays_in_its_channel(world):
    sizes = [4] * world
    whole = draw((sum(sizes), C))
    whole[-1, 1] = torch.nan  # in the last process alone
    x = share(whole, sizes).requires_grad_()
    ours = SyncBatchNorm(C, dtype=torch.float64)
    y = ours(x)
    y.square().sum().backward()
    for result in (y, x.grad, ours.running_mean[None], ours.running_var[None]):
        assert result.isnan().all(0).tolist() == [False, True, False]
        assert not result[:, ::2].isnan().any()


@check
def one_value_in_all_is_refused_by_all(world):
    sizes = [0] * (world - 1) + [1]
    ours = SyncBatchNorm(C)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel when training"):
        ours(share(draw((1, C), torch.float32), sizes))
    assert ours.num_batches_tracked == 1, "as in torch.nn, it is counted before it is refused"
    assert all(
        torch.equal(before[name], ours.state_dict()[name])
        for name in ("running_mean", "running_var")
    )


@check
def nothing_in_all_moves_nothing(world):
    ours = SyncBatchNorm(C)
    ours.running_mean.fill_(5)
    x = torch.empty(0, C, 4, 5, requires_grad=True)
    y = ours(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, C, 4, 5)
    assert ours.running_mean.eq(5).all()
    assert ours.running_var.eq(1).all()
    assert ours.weight.grad.eq(0).all()
    assert ours.bias.grad.eq(0).all()
    assert ours.num_batches_tracked == 1


@check
def bad_input_is_refused_before_anything_is_sent(world):
    ours = SyncBatchNorm(C)
    with counted() as calls:
        with pytest.raises(ValueError, match=r"at least 2D input.*got shape \(4,\)"):
            ours(torch.ones(4))
        with pytest.raises(RuntimeError, match="should contain 4 elements not 3"):
            ours(torch.ones(4, C + 1))
        with pytest.raises(NotImplementedError, match="int32"):
            ours(torch.ones(4, C, dtype=torch.int32))
        ours.eps = 0.0
        with pytest.raises(ValueError, match="eps must be positive"):
            ours(torch.ones(4, C))
    assert calls == []


@check
def sends_twice_a_step_and_nothing_in_evaluation(world):
    x = draw((4, C), torch.float32)
    ours = SyncBatchNorm(C)
    with counted() as calls:
        ours(x).sum().backward()
        assert calls == ["all_gather"], calls  # x needs no gradient
        ours(x.clone().requires_grad_()).sum().backward()
        assert calls == ["all_gather", "all_gather", "all_reduce"], calls
        calls.clear()
        ours.eval()
        ours(x.clone().requires_grad_()).sum().backward()
        assert calls == []
        SyncBatchNorm(C, track_running_stats=False).eval()(x)
        assert calls == []
        single = SyncBatchNorm(C).eval()
        if dist.get_rank() == 0:  # nobody else is asked
            single(x)
        assert calls == []


@check
def two_forwards_before_one_backward(world):
    sizes = [5, 2, 7][:world]
    ours, theirs = pair(nn.BatchNorm2d, torch.float64)
    wholes = [draw((sum(sizes), C, 4, 5), seed=seed) for seed in range(2)]
    dys = [draw((sum(sizes), C, 4, 5), seed=seed + 5) for seed in range(2)]
    losses = []
    for norm, cut in ((ours, lambda t: share(t, sizes)), (theirs, lambda t: t)):
        xs = [cut(whole).clone().requires_grad_() for whole in wholes]
        ys = [norm(x) for x in xs]
        sum((y * cut(dy)).sum() for y, dy in zip(ys, dys, strict=True)).backward()
        losses.append([x.grad for x in xs])
    total = ours.weight.grad.clone()
    dist.all_reduce(total)
    for mine, exact in zip(*losses, strict=True):
        assert_close(mine, share(exact, sizes), 1e-10)
    assert_close(total, theirs.weight.grad, 1e-10)
    assert_close(ours.running_var, theirs.running_var, 1e-10)


@check
def a_second_derivative_is_an_error(world):
    x = draw((4, C)).requires_grad_()
    y = SyncBatchNorm(C, dtype=torch.float64)(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@check
def a_group_keeps_to_itself(world):
    members = list(range(world - 1)) if world > 2 else [0]
    group = dist.new_group(members)
    rank, sizes = dist.get_rank(), [5, 2][: len(members)]
    if rank in members:
        ours, theirs = pair(nn.BatchNorm2d, torch.float64, process_group=group)
        whole, dy = (draw((sum(sizes), C, 4, 5), seed=s) for s in (0, 5))
        results = step(ours, theirs, whole, dy, sizes, group=group)
    else:  # outside of the group: an ordinary batch norm, which waits for nobody
        ours, theirs = pair(nn.BatchNorm2d, torch.float64, process_group=group)
        x = draw((4, C, 4, 5))
        results = {"y": (ours(x).detach(), theirs(x).detach())}
    compare(results, 1e-10)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 9, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1),
    ).to(dtype)  # fmt: skip


@check
def training_with_ddp_is_training_on_the_whole_batch(world):
    alone, together = network(), convert_sync_batchnorm(network())
    spread = DistributedDataParallel(together)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (alone, spread)]
    sizes = [4] * world
    for seed in range(5):
        whole = draw((sum(sizes), 2, 5, 5), seed=seed)
        target = draw((sum(sizes), 1), seed=seed + 20)
        batches = (whole, target), (share(whole, sizes), share(target, sizes))
        for model, optimizer, (x, t) in zip((alone, spread), optimizers, batches, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), t).backward()
            optimizer.step()
    mine = together.state_dict()
    compare({name: (mine[name], value) for name, value in alone.state_dict().items()}, 1e-10)


@check
def two_forwards_through_ddp(world):
    """The buffers are broadcast between the forwards; what the backward needs is not in them."""
    spread = DistributedDataParallel(convert_sync_batchnorm(network()))
    first, second = (spread(draw((4, 2, 5, 5), seed=seed)) for seed in (0, 1))
    (first - second).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in spread.parameters())


def run_checks():
    world, failed = dist.get_world_size(), {}
    for function in CHECKS:
        try:
            function(world)
            outcome = ""
        except (AssertionError, pytest.fail.Exception):
            outcome = traceback.format_exc()
        outcomes = [None] * world
        dist.all_gather_object(outcomes, outcome)
        failed[function.__name__] = "\n".join(
            f"process {rank}: {text}" for rank, text in enumerate(outcomes) if text
        )
    return failed


def run_without_the_other(seen):
    """Process 1 is busy elsewhere for longer than its group waits, and then dies quietly."""
    dist.barrier()
    impatient = SyncBatchNorm(C, process_group=dist.new_group(timeout=timedelta(seconds=TIMEOUT)))
    patient = SyncBatchNorm(C)
    x = draw((4, C), torch.float32)
    for layer in (impatient, patient):
        layer(x)
    if dist.get_rank() == 1:
        time.sleep(TIMEOUT + 2)
        os._exit(0)  # as if all were well: torchrun ends nobody for that
    for layer in (impatient, patient):
        began = time.monotonic()
        with pytest.raises(RuntimeError) as error:
            layer(x)
        seen.append({"seconds": time.monotonic() - began, "error": str(error.value)})
    raise error.value


if __name__ == "__main__":
    warnings.simplefilter("error")
    _, mode, path = sys.argv
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    report = {"failures": run_checks(), "missing": []}
    try:
        if mode == "checks-then-missing":
            run_without_the_other(report["missing"])
    finally:
        if dist.get_rank() == 0:
            Path(path).write_text(json.dumps(report))
    dist.destroy_process_group()
