"""The command line: python -m bnlib.doctor checkpoint.pt."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cases
import jsonschema
import pytest
import torch

from bnlib.doctor.__main__ import main
from bnlib.doctor.report import SCHEMA

ROOT = Path(__file__).parents[2]


@pytest.fixture
def states():
    """Return the state of a healthy network, and of one with an error."""
    healthy, broken = cases.network().state_dict(), cases.network().state_dict()
    broken["1.running_var"][2] = torch.nan
    return healthy, broken


@pytest.fixture
def save(tmp_path):
    def save(content, name="checkpoint.pt"):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save


class TestExitCodes:
    def test_0_if_nothing_is_found(self, states, save, capsys):
        assert main([save(states[0])]) == 0
        assert capsys.readouterr().out.startswith("Nothing found.")

    def test_0_if_there_are_warnings_alone(self, states, save, capsys):
        states[0]["1.running_var"][:] = 0
        assert main([save(states[0])]) == 0
        assert "BN106 dead-channel" in capsys.readouterr().out

    def test_1_if_there_is_an_error(self, states, save, capsys):
        assert main([save(states[1])]) == 1
        out = capsys.readouterr().out
        assert out.startswith("1 error, 0 warnings, 0 notes")
        assert "BN105 non-finite-statistics" in out

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps({"a": 1})])
    def test_2_if_the_file_is_none_of_torch(self, content, tmp_path, capsys):
        (tmp_path / "x.pt").write_bytes(content)
        assert main([str(tmp_path / "x.pt")]) == 2
        assert "no state dict" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "content", [[1, 2], {}, {"epoch": 3}, torch.zeros(3), {1: torch.zeros(1)}]
    )
    def test_2_if_there_is_no_state_dict(self, content, save, capsys):
        assert main([save(content)]) == 2
        assert "holds no state dict" in capsys.readouterr().err

    def test_2_if_there_is_no_file(self, tmp_path, capsys):
        assert main([str(tmp_path / "missing.pt")]) == 2
        assert "missing.pt" in capsys.readouterr().err

    def test_2_for_an_unknown_rule(self, states, save, capsys):
        assert main([save(states[0]), "--select", "dead-chanel"]) == 2
        assert "got 'dead-chanel'; known are mode-mismatch," in capsys.readouterr().err

    def test_2_for_an_unknown_option(self, states, save, capsys):
        with pytest.raises(SystemExit) as stopped:
            main([save(states[0]), "--no-such-option"])
        assert stopped.value.code == 2


class Evil:
    """What would run when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_never_runs(save, tmp_path, capsys):
    path = save({"state_dict": {"a": torch.zeros(1)}, "x": Evil(str(tmp_path / "made"))})
    assert main([path]) == 2
    assert not (tmp_path / "made").exists()
    assert "no state dict" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "weights_of_it"])
def test_a_state_dict_inside_is_found(key, states, save, capsys):
    content = {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}, key: states[1]}
    assert main([save(content)]) == 1
    assert "BN105" in capsys.readouterr().out


def test_select_and_ignore(states, save, capsys):
    path = save(states[1])
    assert main([path, "--select", "dead-channel,never-updated"]) == 0
    assert "checked never-updated, dead-channel." in capsys.readouterr().out
    assert main([path, "--ignore", "non-finite-statistics"]) == 0
    assert "non-finite" not in capsys.readouterr().out


def test_json(states, save, capsys):
    assert main([save(states[1]), "--format", "json"]) == 1
    content = json.loads(capsys.readouterr().out)
    jsonschema.validate(content, SCHEMA)
    assert [f["slug"] for f in content["findings"]] == ["non-finite-statistics"]


def test_against_another_file(states, save, capsys):
    wanted = save(states[0], "wanted.pt")
    del states[1]["1.running_var"]
    assert main([save(states[1]), "--against", wanted]) == 1
    assert "BN111 missing-keys" in capsys.readouterr().out


def test_without_rich_it_prints_text(states, save, capsys, monkeypatch):
    for name in ("rich", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main([save(states[1])]) == 1
    assert "BN105 non-finite-statistics" in capsys.readouterr().out


def test_as_people_call_it(states, save):
    command = [sys.executable, "-m", "bnlib.doctor", save(states[1])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 80
