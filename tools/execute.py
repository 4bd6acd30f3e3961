"""Execute the notebooks whose stored outputs are out of date.

    python tools/execute.py                 # the stale notebooks of chapters/
    python tools/execute.py --check         # list them, run nothing
    python tools/execute.py --all           # run every notebook, stale or not
    python tools/execute.py chapters/01-normalize-a-batch.ipynb

A notebook is stale when its fingerprint differs from the one in its metadata. The fingerprint
covers the notebook's code, the files of bnlib that it reaches through import statements, and
requirements.txt. Markdown and outputs are not part of it.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jupyter_client import AsyncKernelManager

# nbclient, nbformat, jupyter_client and tqdm are imported where they are used: together they
# take a second, and most runs find nothing stale.

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "bnlib"
CELL_TIMEOUT = 300
TRACEBACK_LINES = 25

METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
# What JupyterLab, Colab and nbclient leave in cells and outputs: times, ids, the state of the view.
VOLATILE = {
    "ExecuteTime",
    "collapsed",
    "colab",
    "execution",
    "executionInfo",
    "outputId",
    "scrolled",
    "transient",
}
WIDGET = "application/vnd.jupyter.widget-"
MAGIC = re.compile(r"^([ \t]*)(?:[\w, ]+=[ \t]*)?[%!].*$", re.MULTILINE)
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NotebookFailed(Exception):
    """A notebook could not be executed; the message says where and why."""


class Run(NamedTuple):
    """The execution of one notebook."""

    notebook: Path
    seconds: float
    succeeded: bool


def find_notebooks(root: Path) -> list[Path]:
    """Return the notebooks of the book, in reading order."""
    return sorted((root / "chapters").glob("*.ipynb"))


def load(path: Path) -> dict[str, Any]:
    """Return a notebook as plain JSON; raise ValueError if the file holds something else."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(notebook["cells"], list) and isinstance(notebook["metadata"], dict):
            return dict(notebook)
        problem = "no list of cells"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ValueError(f"{path}: expected a Jupyter notebook ({problem}); repair or remove the file")


def stored_fingerprint(notebook: Mapping[str, Any]) -> str | None:
    """Return the fingerprint that was stored with the outputs, None if there is none."""
    stored: str | None = notebook["metadata"].get("batchnorm_book", {}).get("fingerprint")
    return stored


def fingerprint(notebook: Mapping[str, Any], root: Path) -> str:
    """Return the sha256 of what the outputs depend on: code, library files, requirements."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    files = [*reached_files(cells, root), root / "requirements.txt"]
    parts = [("cell", source.encode()) for source in cells]
    for file in files:
        # Git on Windows may check text out with other line ends: they change nothing.
        content = file.read_bytes().replace(b"\r\n", b"\n") if file.exists() else b""
        parts.append((file.relative_to(root).as_posix(), content))
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def is_stale(notebook: Mapping[str, Any], root: Path) -> bool:
    """Tell whether the stored outputs were made from other code than today's."""
    return stored_fingerprint(notebook) != fingerprint(notebook, root)


def reached_files(cells: Iterable[str], root: Path) -> list[Path]:
    """Return the library's files that code reaches through imports, and the data beside them.

    An import in a function counts. A module that is reached by its name in a string does not.
    """
    waiting = {name for cell in cells for name in imported_modules(cell, package="")}
    seen: set[str] = set()
    reached: set[Path] = set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for file in module_files(name, root):
            reached.add(file)
            package = ".".join(file.parent.relative_to(root).parts)
            waiting |= imported_modules(file.read_text(encoding="utf-8"), package) - seen
    data = {file for folder in {file.parent for file in reached} for file in data_files(folder)}
    return sorted(reached | data, key=Path.as_posix)


@cache
def imported_modules(source: str, package: str) -> frozenset[str]:
    """Return the library's modules that a piece of code imports, wherever in it.

    `from a import b` gives both a and a.b, since b may be a module.
    """
    names: set[str] = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                base = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # `from . import x` in a notebook: it fails when it runs
                continue
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return frozenset(name for name in names if name.split(".")[0] == LIBRARY)


def parse(source: str) -> ast.Module:
    """Parse Python or a notebook cell; what is neither counts as empty."""
    # Magics are replaced only where they must be: a line of a string may begin with % too.
    for code in (source, MAGIC.sub(r"\1pass", source)):
        try:
            return ast.parse(code)
        except SyntaxError:
            continue
    return ast.parse("")


def module_files(name: str, root: Path) -> list[Path]:
    """Return the files that `import name` runs: the module and its parents' __init__."""
    path = root.joinpath(*name.split("."))
    inside = path.relative_to(root)
    packages = [root / folder / "__init__.py" for folder in (inside, *inside.parents[:-1])]
    return [file for file in (*packages, path.with_suffix(".py")) if file.is_file()]


def data_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a package that are not Python, without those of its subpackages."""
    for entry in folder.iterdir():
        if entry.name.startswith((".", "__pycache__")) or entry.name.endswith("~"):
            continue
        if entry.is_file() and entry.suffix != ".py":
            yield entry
        elif entry.is_dir() and not (entry / "__init__.py").exists():
            yield from data_files(entry)


def normalise(notebook: dict[str, Any], stamp: str) -> None:
    """Leave in an executed notebook only what is the same in every run."""
    notebook["metadata"] = {**METADATA, "batchnorm_book": {"fingerprint": stamp}}
    count = 0
    for cell in notebook["cells"]:
        drop_volatile(cell["metadata"])
        if cell["cell_type"] != "code":
            continue
        if not cell["source"].strip():
            cell.update(execution_count=None, outputs=[])
            continue
        count += 1
        cell["execution_count"] = count
        cell["outputs"] = tidy_outputs(cell["outputs"], count)


def tidy_outputs(outputs: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Merge neighbouring streams, drop widget views, number the results."""
    tidy: list[dict[str, Any]] = []
    for output in outputs:
        if output["output_type"] == "stream":
            if tidy and tidy[-1].get("name") == output["name"]:
                tidy[-1]["text"] += output["text"]
                continue
        elif "data" in output:
            for bundle in (output["data"], output["metadata"]):
                for mime in [mime for mime in bundle if mime.startswith(WIDGET)]:
                    del bundle[mime]
            drop_volatile(output["metadata"])
            if not output["data"]:
                continue
        if output["output_type"] == "execute_result":
            output["execution_count"] = count
        tidy.append(output)
    return tidy


def drop_volatile(metadata: dict[str, Any]) -> None:
    """Remove the entries that differ from run to run or from editor to editor."""
    for key in VOLATILE & metadata.keys():
        del metadata[key]


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def new_kernel() -> AsyncKernelManager:
    """Return a manager for a kernel of the interpreter that runs this script."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    # With no folders to search, a "python3" that the user has installed elsewhere is not found.
    specs = KernelSpecManager(kernel_dirs=[])
    # A kernel that talks to us in plain text prints a warning about it.
    return AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=specs, transport_encryption="auto"
    )


def kernel_environment(root: Path, settings: str) -> dict[str, str]:
    """Return the variables under which every kernel runs; `settings` is an empty folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    environment["IPYTHONDIR"] = settings  # your own profile may draw figures in another format
    environment.pop("MPLBACKEND", None)  # another backend draws no figures into the notebook
    # The kernel imports the files that the fingerprint covers, whatever else is installed.
    paths = [str(root), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


async def run_cells(
    notebook: Any, folder: Path, environment: dict[str, str], cell_done: Callable[[], object]
) -> None:
    """Run the cells of a notebook in a fresh kernel; raise NotebookFailed at the first error."""
    from nbclient import NotebookClient

    manager = new_kernel()
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=CELL_TIMEOUT,
        iopub_timeout=30,
        raise_on_iopub_timeout=True,
        record_timing=False,
        store_widget_state=False,
    )
    try:
        await manager.start_kernel(cwd=str(folder), env=environment)
        client.kc = manager.client()
        client.kc.start_channels()
        await client.kc.wait_for_ready(timeout=60)
        client.kc.allow_stdin = False
        for index, cell in enumerate(notebook.cells):
            try:
                await client.async_execute_cell(cell, index)
            except Exception as error:
                if stopping():
                    raise asyncio.CancelledError from None
                raise NotebookFailed(describe(cell, index, error)) from error
            if cell.cell_type == "code":
                cell_done()
    finally:
        if client.kc is not None:
            client.kc.stop_channels()
        await manager.shutdown_kernel(now=True)


def stopping() -> bool:
    """Tell whether this task was cancelled: nbclient turns that into an error of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def describe(cell: Any, index: int, error: Exception) -> str:
    """Say which cell failed (counted from 0) and how; then its source and the traceback."""
    name, message, traceback = type(error).__name__, str(error), [""]
    for output in cell.get("outputs", []):
        if output["output_type"] == "error":
            name, message, traceback = output["ename"], output["evalue"], output["traceback"]
    reason = ": ".join([name, *message.strip().splitlines()[:1]])
    source = [f"    {line}" for line in cell["source"].splitlines()]
    lines = ANSI.sub("", "\n".join(traceback)).strip().splitlines()
    if len(lines) > TRACEBACK_LINES:
        lines = [*lines[:10], "...", *lines[10 - TRACEBACK_LINES :]]
    return "\n".join([f"cell {index} (id {cell.get('id')}): {reason}", *source, *lines])


async def execute(path: Path, root: Path, cell_done: Callable[[], object]) -> None:
    """Execute one notebook and put it, normalised, in the place of the old file.

    Raises NotebookFailed, and leaves the file as it was, when a cell fails.
    """
    import nbformat

    before = path.read_bytes()
    notebook = nbformat.reads(before.decode(), as_version=4)
    # Taken before the run: code that changes meanwhile leaves the notebook stale.
    stamp = fingerprint(notebook, root)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as settings:
        environment = kernel_environment(root, settings)
        await run_cells(notebook, path.parent, environment, cell_done)
    normalise(notebook, stamp)
    content = nbformat.writes(notebook).rstrip("\n") + "\n"
    if path.read_bytes() != before:
        raise NotebookFailed("the file was changed while it was executed; execute it again")
    write_whole(path, content.encode())


async def execute_all(notebooks: Sequence[Path], root: Path, workers: int) -> list[Run]:
    """Execute notebooks, so many at a time; report failures and go on with the others."""
    from tqdm import tqdm

    free_worker = asyncio.Semaphore(workers)
    cells = sum(cell["cell_type"] == "code" for path in notebooks for cell in load(path)["cells"])
    with tqdm(total=cells, desc="Executing", unit=" cells", leave=False, disable=None) as bar:

        async def run(path: Path) -> Run:
            async with free_worker:
                start = time.perf_counter()
                try:
                    await execute(path, root, bar.update)
                except Exception as error:
                    problem = str(error) or type(error).__name__
                    tqdm.write(f"Failed, left as it was: {path}, {problem}\n", file=sys.stderr)
                    return Run(path, time.perf_counter() - start, succeeded=False)
                return Run(path, time.perf_counter() - start, succeeded=True)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(path)) for path in notebooks]
    return [task.result() for task in tasks]


def summary(runs: Sequence[Run], up_to_date: int) -> str:
    """Say in one line what was executed, what failed and how much there was to do."""
    parts = []
    for word, succeeded in (("executed", True), ("failed", False)):
        done = [
            f"{run.notebook.stem} ({run.seconds:.1f} s)"
            for run in runs
            if run.succeeded == succeeded
        ]
        if done:
            parts.append(f"{word} {', '.join(done)}")
    return "Notebooks: " + "; ".join([*parts, f"{up_to_date} up to date"])


def positive(text: str) -> int:
    """Read a count from the command line."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Execute what is stale; return 0, 1 if a notebook failed, 2 for bad input, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description="Execute the notebooks that are stale.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: those of chapters/")
    parser.add_argument("--workers", type=positive, default=2, help="notebooks at a time (2)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--all", action="store_true", help="execute those that are up to date too")
    mode.add_argument("--check", action="store_true", help="list the stale ones; exit 1 if any")
    options = parser.parse_args(arguments)

    notebooks = options.notebooks or find_notebooks(root)
    if not notebooks:
        parser.error(f"expected notebooks in {root / 'chapters'}, found none")
    try:
        stale = [path for path in notebooks if is_stale(load(path), root) or options.all]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.check:
        for path in stale:
            print(f"stale: {path}")
        return 1 if stale else 0

    runs: list[Run] = []
    if stale:
        try:
            runs = asyncio.run(execute_all(stale, root, options.workers))
        except KeyboardInterrupt:
            print("\nInterrupted; every notebook is whole.", file=sys.stderr)
            return 130
    print(summary(runs, up_to_date=len(notebooks) - len(stale)))
    return 0 if all(run.succeeded for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
