"""Read the chapters: notebooks, their cells, their tags and what is in them."""

import ast
import re
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml
from execute import load
from execute import parse as parse_python
from markdown_it.token import Token
from nbformat import NotebookNode
from prose import Heading, headings_of, parse

SETUP_TAGS = ["setup", "remove-cell"]
SETUP_SOURCE = """\
import sys

if "google.colab" in sys.modules:
    %pip install --quiet "batchnorm-book[book] @ git+{url}\""""


def chapter_number(path: Path) -> int:
    """Read the number of a chapter from the name of its file."""
    if not re.fullmatch(r"\d\d-[a-z0-9-]+\.ipynb", path.name):
        raise ValueError(f"{path}: expected a name like 01-normalize-a-batch.ipynb; rename it")
    return int(path.name[:2])


def read(path: Path) -> NotebookNode:
    """Read a notebook as it stands: nothing is converted, repaired or validated."""
    notebook = load(path)
    if notebook.get("nbformat") != 4:
        raise ValueError(f"{path}: expected a notebook of format 4; save it again in JupyterLab")
    return nbformat.v4.to_notebook(notebook)


def repository_url(root: Path) -> str:
    """Read `repository.url` from `_config.yml`."""
    path = root / "_config.yml"
    try:
        return str(yaml.safe_load(path.read_text(encoding="utf-8"))["repository"]["url"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected repository.url, the address of the book") from error


def setup_source(url: str) -> str:
    """Say what stands in the set-up cell of every notebook."""
    return SETUP_SOURCE.format(url=url)


def python(cell: NotebookNode) -> ast.Module:
    """Parse a code cell, without its magics."""
    return parse_python(cell.source)


def has_assert(cell: NotebookNode) -> bool:
    """Tell whether a code cell asserts something."""
    return any(isinstance(node, ast.Assert) for node in ast.walk(python(cell)))


def imports(cell: NotebookNode) -> list[str]:
    """List the imports in a code cell, also those inside functions."""
    nodes = ast.walk(python(cell))
    return [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def calls(cell: NotebookNode) -> list[str]:
    """List the function calls in a code cell."""
    nodes = ast.walk(python(cell))
    return [ast.unparse(node) for node in nodes if isinstance(node, ast.Call)]


def output_text(cell: NotebookNode) -> str:
    """Join what a code cell printed and showed as text."""
    texts = (out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)
    return "".join(texts)


def tags(cell: NotebookNode) -> list[str]:
    """List the tags of a cell."""
    return list(cell.metadata.get("tags", []))


def headings(path: Path) -> list[Heading]:
    """List the headings of a notebook or a Markdown file."""
    if path.suffix == ".ipynb":
        return notebook_headings(read(path))
    return headings_of([(0, path.read_text(encoding="utf-8"))])


def notebook_headings(notebook: NotebookNode) -> list[Heading]:
    """List the headings of a notebook."""
    cells = enumerate(notebook.cells)
    return headings_of([(i, cell.source) for i, cell in cells if cell.cell_type == "markdown"])


class Book:
    """What the chapters are compared with."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.url = repository_url(root)
        self.headings = cache(headings)
        glossary = self.headings(self.root / "back" / "glossary.md")
        self.glossary = {term.text.lower(): term.slug for term in glossary if term.level == 3}


class Chapter:
    """A notebook and the views of it that the rules share; cells go with their index."""

    def __init__(self, path: Path, book: Book) -> None:
        self.path = path.resolve()
        self.book = book
        self.number = chapter_number(path)
        self.notebook = read(path)
        self.cells: list[NotebookNode] = self.notebook.cells

    @cached_property
    def code(self) -> list[tuple[int, NotebookNode]]:
        """The code cells."""
        return [(i, cell) for i, cell in enumerate(self.cells) if cell.cell_type == "code"]

    @cached_property
    def markdown(self) -> list[tuple[int, list[Token]]]:
        """The Markdown cells, as tokens."""
        cells = enumerate(self.cells)
        return [(i, parse(cell.source)) for i, cell in cells if cell.cell_type == "markdown"]

    @cached_property
    def headings(self) -> list[Heading]:
        """The headings."""
        return notebook_headings(self.notebook)

    def exercises(self) -> Iterator[tuple[str, int, list[tuple[int, NotebookNode]]]]:
        """Find each exercise: its number, the cell of its heading, and its code cells."""
        stops = [h.cell for h in self.headings if h.level <= 3 or h.text.startswith("Exercise ")]
        for heading in self.headings:
            if match := re.match(r"Exercise (\d\d\.\d): \S", heading.text):
                end = min((i for i in stops if i > heading.cell), default=len(self.cells))
                yield match[1], heading.cell, [c for c in self.code if heading.cell < c[0] < end]

    def file(self, target: str) -> Path | None:
        """Find the file of the book that a link or an image means."""
        path = (self.path.parent / unquote(target)).resolve() if target else self.path
        return path if path.is_file() and path.is_relative_to(self.book.root) else None
