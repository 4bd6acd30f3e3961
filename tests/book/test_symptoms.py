"""The symptom index: its error messages are those that PyTorch raises, its rules the doctor's."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnlib.doctor import RULES

PAGE = (Path(__file__).parents[2] / "back/symptoms.md").read_text("utf-8")


def model(**norm):
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, **norm))


def write_in_between():
    layer = nn.BatchNorm1d(3).eval()
    y = layer(torch.randn(4, 3, requires_grad=True))
    layer.running_mean.add_(1)
    layer.running_var.add_(1)
    y.sum().backward()


def load(state, **norm):
    model(**norm).load_state_dict(state)


def without_counter():
    state = model().state_dict()
    del state["1.num_batches_tracked"]
    return state


RAISES = {
    "one value": lambda: nn.BatchNorm1d(512)(torch.randn(1, 512)),
    "one value, no statistics": lambda: nn.BatchNorm1d(512, track_running_stats=False).eval()(
        torch.randn(1, 512)
    ),
    "written in between": write_in_between,
    "parameters alone": lambda: load(dict(model().named_parameters())),
    "no counter": lambda: load(without_counter()),
    "no tracking": lambda: load(model().state_dict(), track_running_stats=False),
    "wrong axis": lambda: nn.BatchNorm1d(20)(torch.randn(8, 50, 20)),
    "2d after a linear layer": lambda: nn.BatchNorm2d(3)(torch.randn(2, 3)),
    "1d after a convolution": lambda: nn.BatchNorm1d(3)(torch.randn(2, 3, 4, 4)),
    "no epsilon": lambda: nn.BatchNorm1d(3, eps=0)(torch.randn(4, 3)),
    "functional": lambda: F.batch_norm(torch.randn(4, 3), None, None, training=False),
    "two types": lambda: nn.BatchNorm1d(3)(torch.randn(4, 3).double()),
    "vmap": lambda: torch.func.vmap(nn.BatchNorm1d(3))(torch.randn(5, 4, 3)),
}


def literal(message):
    """Return the part of a message that does not name a tensor or a version."""
    message = re.sub(r"^Error\(s\) in loading state_dict for Sequential:\s*", "", message)
    return re.split(r": \[torch|\. *\n|, but got|\. *$", message)[0].strip()


@pytest.mark.parametrize("case", RAISES)
def test_an_error_message_stands_there_as_pytorch_writes_it(case):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        RAISES[case]()
    assert literal(str(caught.value)) in PAGE


def test_every_rule_of_the_doctor_is_named_and_no_other():
    lists = re.findall(r"rules? ((?:`[a-z-]+`(?:, )?)+)", PAGE)
    named = {slug for text in lists for slug in re.findall(r"`([a-z-]+)`", text)}
    assert named - set(RULES) == set()
    assert set(RULES) - named == set()


def test_there_are_at_least_thirty_and_each_leads_somewhere():
    entries = re.findall(r"^- \*\*.*$", PAGE, re.MULTILINE)
    assert len(entries) >= 30
    assert [entry for entry in entries if "](../chapters/" not in entry] == []
