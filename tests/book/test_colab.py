"""A chapter in Colab: an empty folder, no copy of the book, and the library from its wheel."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
# A chapter's first live figure and data, and one that starts processes of its own; nbval runs all.
WHOLE = [file for file in CHAPTERS if file.name.startswith(("01", "10"))]
FILES = re.compile(  # those of a temporary folder may be opened
    r"\bopen\(|\bPath\((?!folder\.name)|__file__|read_text|read_bytes|\bnp\.load|loadtxt"
)
OURS = re.compile("bnlib|batchnorm_book|_editable_impl_batchnorm_book")
COLAB = (  # JAX asks Colab's package for `output` when it is imported there
    "import sys, types; colab = sys.modules['google.colab'] = types.ModuleType('google.colab'); "
    "colab.output = types.ModuleType('google.colab.output')"
)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Build the wheel that Colab would build from the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True)
    return next(folder.glob("*.whl"))


def name_kernel(python, folder):
    """Describe a kernel of that Python, by the name of "colab", in a folder of Jupyter's."""
    spec = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Colab",
        "language": "python",
    }
    (folder / "kernels/colab").mkdir(parents=True)
    (folder / "kernels/colab/kernel.json").write_text(json.dumps(spec))


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """Make an environment with all that is installed here, but our library, and a fake Colab."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for file in Path(sysconfig.get_path("purelib")).iterdir():
        if not OURS.match(file.name):
            (packages / file.name).symlink_to(file)
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    paths = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site_packages = Path(subprocess.check_output(paths, text=True).strip())
    (site_packages / "colab.pth").write_text(f"{packages}\n{COLAB}\n")
    for variable in ("PYTHONPATH", "MPLBACKEND"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # what is not here cannot be had
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    name_kernel(python, tmp_path / "jupyter")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return python


def cells(chapter, wheel):
    """Return a chapter's cells, and its set-up cell, which installs the wheel."""
    notebook = nbformat.read(chapter, as_version=4)
    (setup,) = (cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", []))
    setup.source, count = re.subn(r"git\+https://[^\s\"]+", wheel.as_uri(), setup.source)
    assert count == 1
    return notebook.cells, setup


def run_in_colab(colab, cells, tmp_path):
    """Run cells in an empty folder; assert that the library was installed and no file written."""
    absent = "import importlib.util, sys; sys.exit(importlib.util.find_spec('bnlib') is not None)"
    subprocess.run([colab, "-c", absent], check=True, cwd=tmp_path)
    where = nbformat.v4.new_code_cell("import bnlib; print(bnlib.__file__)")
    notebook = nbformat.v4.new_notebook(cells=[*cells, where])
    folder = tmp_path / "content"
    folder.mkdir()
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, kernel_name="colab", timeout=120, resources=resources).execute()
    assert Path(where.outputs[0].text.strip()).is_relative_to(tmp_path / "venv")
    assert list(folder.iterdir()) == []


def imports(cell):
    """Return the import statements of a cell, wherever in it they stand."""
    lines = [line for line in cell.source.split("\n") if not line.lstrip().startswith("%")]
    tree = ast.parse("\n".join(lines))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(map(ast.unparse, found))


LINKS = pytest.mark.skipif(os.name == "nt", reason="makes its environment of symbolic links")


@LINKS
@pytest.mark.parametrize("chapter", WHOLE, ids=lambda chapter: chapter.stem)
def test_a_chapter_needs_nothing_but_the_library(wheel, colab, chapter, tmp_path):
    run_in_colab(colab, cells(chapter, wheel)[0], tmp_path)


@LINKS
def test_every_chapter_finds_what_it_imports(wheel, colab, tmp_path):
    statements = set()
    for chapter in CHAPTERS:
        all_cells, setup = cells(chapter, wheel)
        codes = [cell for cell in all_cells if cell.cell_type == "code" and cell is not setup]
        statements.update(line for cell in codes for line in imports(cell).split("\n"))
    assert any("bnlib.book" in line for line in statements)
    keras = "import os; os.environ['KERAS_BACKEND'] = 'torch'"  # as chapter 11 sets it before
    code = "\n".join([keras, *sorted(statements)])
    run_in_colab(colab, [setup, nbformat.v4.new_code_cell(code)], tmp_path)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_a_chapter_reads_no_file_that_a_copy_of_the_book_would_have(chapter):
    codes = [c.source for c in nbformat.read(chapter, as_version=4).cells if c.cell_type == "code"]
    assert [line for code in codes for line in code.split("\n") if FILES.search(line)] == []
