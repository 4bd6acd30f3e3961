"""Look for batch-norm mistakes in a checkpoint: python -m bnlib.doctor checkpoint.pt.

Files are read with weights_only=True: tensors and plain containers, never code. Exit codes: 0 if
there is no error (warnings may be), 1 if there is one, 2 if the file or an argument is not usable.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bnlib.doctor import diagnose_state
from bnlib.doctor.report import BOOK, Report

NESTED = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module")


class BadInput(Exception):
    """A file or an argument that is not usable; the message says why."""


def read_state(path: str) -> Mapping[str, Any]:
    """Return the state dict in a file, also one level inside: {"state_dict": ..., "epoch": ...}."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path} is no state dict saved by torch.save: {first}") from error
    inside = content if isinstance(content, Mapping) else {}
    for candidate in (content, *(inside.get(key) for key in NESTED), *inside.values()):
        if is_state(candidate):
            return candidate  # type: ignore[no-any-return]
    raise BadInput(f"{path} holds no state dict; save one: torch.save(model.state_dict(), path)")


def is_state(content: Any) -> bool:
    """Return whether this is a mapping with names for keys and tensors among its values."""
    return (
        isinstance(content, Mapping)
        and all(isinstance(key, str) for key in content)
        and any(isinstance(value, torch.Tensor) for value in content.values())
    )


def show(report: Report) -> None:
    """Print a report as a table; plainly where rich is not installed."""
    try:
        from rich.console import Console
    except ImportError:
        print(report)
    else:
        Console().print(report)
    if report.findings and BOOK:
        print(f"\nThe book: {BOOK}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser("python -m bnlib.doctor", description=__doc__)
    parser.add_argument("checkpoint", help="a file written by torch.save(model.state_dict(), ...)")
    parser.add_argument("--against", metavar="FILE", help="a checkpoint that has the keys wanted")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    for option in ("--select", "--ignore"):
        parser.add_argument(option, default="", metavar="SLUGS", help="such as dead-channel,...")
    options = parser.parse_args(arguments)
    chosen = {
        key: [s for s in getattr(options, key).split(",") if s] for key in ("select", "ignore")
    }
    try:
        state = read_state(options.checkpoint)
        against = read_state(options.against) if options.against else None
        report = diagnose_state(state, against=against, **chosen)
    except (BadInput, ValueError) as error:
        print(f"bnlib.doctor: {error}", file=sys.stderr)
        return 2
    if options.format == "json":
        print(report.to_json())
    else:
        show(report)
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
