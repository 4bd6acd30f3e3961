"""Processes that run a notebook's functions: their answers, their errors, their end."""

import inspect
import os

import pytest
import torch
import torch.distributed as dist

from bnlib.book import processes

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)


def total(rank, numbers):
    mine = numbers * (rank + 1)
    dist.all_reduce(mine)
    return rank, doubled(mine)


def doubled(numbers):
    return 2 * numbers


def fail(rank):
    raise KeyError(f"a name that {rank} lacks")


def leave(rank):
    if rank == 1:
        os._exit(0)
    return "still here"


def stay(rank):
    return rank


def test_two_processes_answer_fail_and_leave():  # one test: to start them is what takes long
    numbers = torch.tensor([1.0, 2.0])
    with processes.Processes(2) as two:
        two.define(doubled)
        assert [rank for rank, _ in two.run(total, numbers)] == [0, 1]
        for _, answer in two.run(total, numbers):
            assert answer.tolist() == [6, 12]
        with pytest.raises(
            RuntimeError, match=r"(?s)in process 0: .*KeyError: 'a name that 0 lacks'"
        ):
            two.run(fail)
        assert two.run(stay) == [0, 1]  # the answers of both were read
        assert two.run(leave) == ["still here", None]
        assert two.run(stay) == [0]


def test_processes_that_do_not_start_say_why(monkeypatch):
    command = ["sh", "-c", "echo no such luck"]
    monkeypatch.setattr(processes, "command", lambda count: [*command, str(count)])
    with pytest.raises(RuntimeError, match="the processes did not start: no such luck"):
        processes.Processes(2)


def test_the_source_that_the_chapter_shows_is_short():
    assert len(inspect.getsource(processes.work).splitlines()) <= 25
