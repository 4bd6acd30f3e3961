"""A few processes on this machine that run a notebook's functions, as so many devices would.

`Processes` starts them with torchrun, over gloo and the loopback address. They share no memory: a
function travels to them as its text; arguments and results travel pickled.
"""

import inspect
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from io import BufferedRWPair
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel  # noqa: F401  # for the functions that come

from bnlib.nn.distributed import SyncBatchNorm  # noqa: F401

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
PATIENCE = 120  # seconds for the processes to start, and for each answer


class Processes:
    """Start so many processes with torchrun, and keep them until `close`.

    count: 1 or more. Each does what `work` says. They end when this object is closed, and also when
    the process that made it ends. Raises RuntimeError, with what they wrote, if they do not start.
    """

    def __init__(self, count: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._log, address = folder / "log", folder / "socket"
        with socket.socket(socket.AF_UNIX) as server, self._log.open("w") as log:
            server.bind(str(address))
            server.listen()
            server.settimeout(1)
            self._torchrun = subprocess.Popen(
                [*command(count), "-m", __name__, str(address)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            lines = [self._accept(server) for _ in range(count)]
        by_rank = sorted((pickle.load(line), line) for line in lines)
        self._lines: dict[int, BufferedRWPair] = dict(by_rank)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run function(rank, *arguments) in all processes at once; return what each returns.

        function: undecorated; it sees what this module imports, and the functions that were run or
        defined before. A process that ends on the way returns None, and is not asked again.

        Raises RuntimeError, with the traceback, if the function fails in a process; TimeoutError if
        one does not answer in 120 seconds.
        """
        return self._ask(inspect.getsource(function), function.__name__, arguments)

    def define(self, *functions: Callable[..., Any]) -> None:
        """Make functions known to all processes, for others to call."""
        for function in functions:
            self._ask(inspect.getsource(function), "", ())

    def close(self) -> None:
        """End the processes."""
        for line in self._lines.values():
            line.close()
        self._torchrun.wait(PATIENCE)
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self, server: socket.socket) -> BufferedRWPair:
        deadline = time.monotonic() + PATIENCE
        while self._torchrun.poll() is None and time.monotonic() < deadline:
            try:
                line, _ = server.accept()
            except TimeoutError:
                continue
            with line:
                line.settimeout(PATIENCE)
                return line.makefile("rwb")
        self._torchrun.terminate()
        self._torchrun.wait()
        wrote = self._log.read_text()
        self._folder.cleanup()
        raise RuntimeError(f"the processes did not start: {wrote[-2000:]}")

    def _ask(self, source: str, name: str, arguments: tuple[Any, ...]) -> list[Any]:
        for line in self._lines.values():
            pickle.dump((source, name, arguments), line)
            line.flush()
        answers = {rank: self._receive(rank) for rank in list(self._lines)}
        for rank, (_, trouble) in answers.items():
            if trouble:
                raise RuntimeError(f"in process {rank}: {trouble}")
        return [result for result, _ in answers.values()]

    def _receive(self, rank: int) -> tuple[Any, str]:
        try:
            answer: tuple[Any, str] = pickle.load(self._lines[rank])
        except (EOFError, ConnectionError):  # it has ended
            self._lines.pop(rank).close()
            return None, ""
        return answer


def command(count: int) -> list[str]:
    """Return torchrun's command line for so many processes, which meet at the loopback address."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=1", f"--nproc-per-node={count}", "--local-addr=127.0.0.1"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"),
    ]


def work(notebook: BufferedRWPair) -> None:
    """Do what the notebook asks for, until it hangs up."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    rank, known = dist.get_rank(), dict(globals())
    answer: Any = rank
    while True:
        pickle.dump(answer, notebook)
        notebook.flush()
        try:
            source, name, arguments = pickle.load(notebook)
        except EOFError:
            return
        try:
            exec(source, known)
            answer = (known[name](rank, *arguments) if name else None), ""
        except Exception:
            answer = None, traceback.format_exc()


if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(sys.argv[1])
        with line.makefile("rwb") as stream:
            work(stream)
    dist.destroy_process_group()
