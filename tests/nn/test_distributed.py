"""Synchronised batch norm: in several processes with torchrun, over gloo, and in one."""

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import update_bn

from bnlib import nn as bnn
from bnlib.nn.distributed import SyncBatchNorm, convert_sync_batchnorm, sync_batch_norm

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)


@needs_gloo
class TestInSeveralProcesses:
    """Run distributed_script.py, which says what it checks: to start it is what takes long."""

    def test_three_equal_one_with_the_whole_batch(self, tmp_path, subtests):
        result, report = self.launch("checks", 3, tmp_path)
        assert result.returncode == 0, result.stderr
        self.assert_passed(report["failures"], subtests)

    def test_two_equal_one_and_one_that_is_missing_is_an_error(self, tmp_path, subtests):
        result, report = self.launch("checks-then-missing", 2, tmp_path)
        self.assert_passed(report["failures"], subtests)
        assert result.returncode != 0
        away, dead = report["missing"]
        assert "Timed out" in away["error"]
        assert 2.5 < away["seconds"] < 20  # set to 3; the machine may be busy
        assert "peer" in dead["error"]  # closed or reset, whichever is seen first
        assert dead["seconds"] < 20  # its group would wait for 60

    def assert_passed(self, failures, subtests):
        assert len(failures) > 10
        for name, failure in failures.items():
            with subtests.test(name.replace("_", " ")):
                assert failure == ""

    def launch(self, mode, processes, folder):
        """Run the script; it finds its processes by the loopback address, on a free port."""
        root, report = Path(__file__).parents[2], folder / "report.json"
        torchrun = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=1", f"--nproc-per-node={processes}", "--local-addr=127.0.0.1"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"),
        ]
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        environment = {
            **os.environ,
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": loopback,
        }
        script = Path(__file__).with_name("distributed_script.py")
        result = subprocess.run(
            [*torchrun, str(script), mode, str(report)],
            env=environment,
            cwd=folder,
            text=True,
            capture_output=True,
            timeout=150,
        )
        assert report.exists(), result.stderr
        return result, json.loads(report.read_text())


class TestInOneProcess:
    @pytest.mark.parametrize("spatial", [(), (7,), (4, 5), (2, 3, 4)], ids=str)
    def test_is_an_ordinary_batch_norm(self, spatial):
        ours, theirs = SyncBatchNorm(3), nn.SyncBatchNorm(3)
        assert not dist.is_initialized()
        for _ in range(2):
            x = (torch.randn(6, 3, *spatial) * 2 + 3).requires_grad_()
            y, expected = ours(x), theirs(x)
            torch.testing.assert_close(y, expected)
            (dx,), (exact,) = (torch.autograd.grad(v.pow(3).sum(), x) for v in (y, expected))
            torch.testing.assert_close(dx, exact, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))

    def test_constructor_attributes_and_text_are_those_of_pytorch(self):
        ours, theirs = (inspect.signature(c).parameters for c in (SyncBatchNorm, nn.SyncBatchNorm))
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]
        for arguments in ({}, {"affine": False}, {"bias": False}, {"track_running_stats": False}):
            ours, theirs = SyncBatchNorm(3, **arguments), nn.SyncBatchNorm(3, **arguments)
            assert repr(ours) == repr(theirs)
            assert {*vars(ours)} == {*vars(theirs)}
            assert [*ours.state_dict()] == [*theirs.state_dict()]
            ours.load_state_dict(theirs.state_dict())

    def test_too_few_dimensions_are_an_error(self):
        with pytest.raises(ValueError, match=r"at least 2D input \(got 1D input\).*shape \(3,\)"):
            SyncBatchNorm(3)(torch.ones(3))
        with pytest.raises(ValueError, match=r"at least 2D input \(got 1D input\)"):
            sync_batch_norm(torch.ones(3), None, None)

    def test_update_bn_finds_it(self):
        model, data = SyncBatchNorm(3), torch.randn(4, 20, 3) + 5
        update_bn(data, model)
        torch.testing.assert_close(model.running_mean, data.mean((0, 1)))

    def test_can_be_copied(self):
        layer = copy.deepcopy(SyncBatchNorm(3))
        assert layer.process_group is None


class TestConvert:
    @pytest.mark.parametrize(
        "convert", [convert_sync_batchnorm, SyncBatchNorm.convert_sync_batchnorm]
    )
    def test_changes_every_batch_norm_and_nothing_else(self, convert):
        class Own(nn.BatchNorm2d):
            pass

        shared = bnn.BatchNorm2d(4)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4, eps=0.1, momentum=None),
            nn.Sequential(shared, nn.ReLU(), shared, Own(4)),
            nn.SyncBatchNorm(4, affine=False),
            nn.InstanceNorm2d(4, affine=True),
            nn.GroupNorm(2, 4),
        ).eval()
        before, state = [*model.modules()], copy.deepcopy(model.state_dict())
        group = object()
        assert convert(model, group) is model
        after = [*model.modules()]
        assert all(a is b for a, b in zip(after, before, strict=True))
        kinds = [type(m) for m in (model[1], shared, model[2][3], model[3])]
        assert kinds == [SyncBatchNorm] * 4
        assert [type(m) for m in (model[0], model[4], model[5])] == [
            nn.Conv2d,
            nn.InstanceNorm2d,
            nn.GroupNorm,
        ]
        assert model[1].process_group is group
        assert (model[1].eps, model[1].momentum, model[1].training) == (0.1, None, False)
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)

    def test_of_a_batch_norm_itself(self):
        layer = nn.BatchNorm1d(3)
        weight = layer.weight
        assert type(convert_sync_batchnorm(layer)) is SyncBatchNorm
        assert layer.weight is weight
        assert layer.process_group is None

    def test_refuses_a_lazy_one_and_changes_nothing(self):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
        with pytest.raises(ValueError, match="got LazyBatchNorm1d; call the model once"):
            convert_sync_batchnorm(model)
        assert type(model[0]) is nn.BatchNorm1d
        model(torch.randn(4, 3))
        assert type(convert_sync_batchnorm(model)[1]) is SyncBatchNorm

    def test_refuses_what_is_no_module(self):
        with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got Tensor"):
            convert_sync_batchnorm(torch.ones(3))
