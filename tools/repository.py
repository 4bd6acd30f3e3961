"""Write the address of your copy of the repository wherever the book names it.

    python tools/repository.py https://github.com/you/batchnorm-book

The address stands in _config.yml (repository.url), from where this script takes the old one,
and in the set-up cell of every notebook, which installs the library in Colab. README.md, intro.md,
CITATION.cff and pyproject.toml name it too.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from execute import ROOT, find_notebooks, fingerprint, is_stale, load, write_whole

# Only what needs no quoting in YAML, TOML, Python and a shell.
ADDRESS = re.compile(r"https://[\w.-]+(:\d+)?(/[\w.~-]+)+", re.ASCII)
REPOSITORY_BLOCK = re.compile(r"^repository:.*(?:\n(?:[ \t\r#].*)?)*", re.MULTILINE)
URL_LINE = re.compile(r"^[ \t]+url:[ \t]*[\"']?(?P<url>[^\s\"'#]+)", re.MULTILINE)
INSTALLED_FROM = re.compile(r"git\+https://[^\s\"']+")
ALSO_IN = ("README.md", "intro.md", "CITATION.cff", "pyproject.toml")


class BadInput(Exception):
    """Something to put right before anything is written; the message says what."""


def check_address(url: str) -> None:
    """Raise BadInput unless this is the plain https address of a repository."""
    if not ADDRESS.fullmatch(url) or url.endswith(".git"):
        raise BadInput(
            "expected an https address with no trailing slash, no .git and no spaces, "
            f"such as https://github.com/you/batchnorm-book, got {url!r}"
        )


def current_address(config: str) -> re.Match[str]:
    """Find repository.url in the text of _config.yml."""
    block = REPOSITORY_BLOCK.search(config)
    found = block and URL_LINE.search(config, block.start(), block.end())
    if not found:
        raise BadInput("expected `repository:` with a `url:` below it in _config.yml, found none")
    return found


def with_address(text: str, old: str, new: str) -> str:
    """Replace an address, but not a longer one of which it is the beginning."""
    whole = re.compile(re.escape(old) + r"(?![\w~-]|\.(?!git\b)\w)")
    return whole.sub(lambda _: new, text)


def readdress_notebook(path: Path, url: str, root: Path) -> bytes:
    """Return a notebook whose set-up cell installs from `url`, stale only if it was stale."""
    notebook = load(path)
    fresh = not is_stale(notebook, root)
    cells = [cell for cell in notebook["cells"] if "setup" in cell["metadata"].get("tags", [])]
    changed = sum(readdress_cell(cell, url) for cell in cells)
    if changed != 1:
        raise BadInput(f"{path}: expected one git+https:// line in a set-up cell, found {changed}")
    if fresh:
        notebook["metadata"]["batchnorm_book"]["fingerprint"] = fingerprint(notebook, root)
    return (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()


def readdress_cell(cell: dict[str, Any], url: str) -> int:
    """Write the address into a cell in place, and return how often it stood there."""
    source = "".join(cell["source"])
    source, count = INSTALLED_FROM.subn(lambda _: f"git+{url}", source)
    # A notebook may store its source as one string or as lines.
    cell["source"] = source if isinstance(cell["source"], str) else source.splitlines(True)
    return count


def plan(url: str, root: Path) -> dict[Path, bytes]:
    """Return the new content of every file that names another address; write nothing."""
    check_address(url)
    config = root / "_config.yml"
    if not config.is_file():
        raise BadInput(f"expected {config}, found none; run this in a copy of the book")
    text = config.read_bytes().decode()
    line = current_address(text)
    new = {}
    for notebook in find_notebooks(root):
        new[notebook] = readdress_notebook(notebook, url, root)
    for file in [root / name for name in ALSO_IN if (root / name).is_file()]:
        new[file] = with_address(file.read_bytes().decode(), line["url"], url).encode()
    # The last: as long as it holds the old address, a second run finishes what a first one began.
    new[config] = (text[: line.start("url")] + url + text[line.end("url") :]).encode()
    return {path: content for path, content in new.items() if content != path.read_bytes()}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write the address; return 0, or 2 with one line if something is wrong with the input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if len(arguments) != 1:
            raise BadInput(f"expected one address, got {len(arguments)} arguments")
        changes = plan(arguments[0], root)
    except (BadInput, ValueError) as error:
        print(f"repository: {error}", file=sys.stderr)
        return 2
    for path, content in changes.items():
        write_whole(path, content)
    names = ", ".join(path.relative_to(root).as_posix() for path in changes)
    print(f"repository: {arguments[0]} written into {names or 'nothing: it stood everywhere'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
