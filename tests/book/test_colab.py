"""A chapter in Colab: an empty folder, no copy of the book, and the library from its wheel."""

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


@pytest.mark.skipif(os.name == "nt", reason="makes its environment of symbolic links")
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_a_chapter_needs_nothing_but_the_library(wheel, colab, chapter, tmp_path):
    absent = "import importlib.util, sys; sys.exit(importlib.util.find_spec('bnlib') is not None)"
    subprocess.run([colab, "-c", absent], check=True, cwd=tmp_path)

    notebook = nbformat.read(chapter, as_version=4)
    (setup,) = (cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", []))
    setup.source, count = re.subn(r"git\+https://[^\s\"]+", wheel.as_uri(), setup.source)
    assert count == 1
    where = nbformat.v4.new_code_cell("import bnlib; print(bnlib.__file__)")
    notebook.cells.append(where)

    folder = tmp_path / "content"
    folder.mkdir()
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, kernel_name="colab", timeout=120, resources=resources).execute()
    assert Path(where.outputs[0].text.strip()).is_relative_to(tmp_path / "venv")
    assert list(folder.iterdir()) == []
