import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import execute
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

LIBRARY = {
    "bnlib/__init__.py": "",
    "bnlib/scratch/__init__.py": "from . import layers",
    "bnlib/scratch/layers.py": "def forward():\n    from ..statistics import update\n",
    "bnlib/statistics.py": "import bnlib.book.live as live",
    "bnlib/book/__init__.py": "",
    "bnlib/book/live.py": "name = 'live figure'",
    "bnlib/book/live.js": "export function render() {}",
    "bnlib/book/frames/first.npz": "0 1 2",
    "bnlib/book/__pycache__/live.cpython-311.pyc": "bytecode",
    "bnlib/book/.live.js.swp": "an editor's copy",
    "bnlib/doctor/__init__.py": "",
    "bnlib/doctor/rules.json": "{}",
    "bnlib/unused.py": "",
    "requirements.txt": "numpy==2.0.0\n",
}


def make_book(root):
    for name, content in LIBRARY.items():
        write(root / name, content)
    (root / "chapters").mkdir()
    return root


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def make_notebook(path, *sources):
    cells = [new_markdown_cell("# Title", id="title")]
    cells += [new_code_cell(source, id=f"code-{n}") for n, source in enumerate(sources)]
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.fixture
def book(tmp_path):
    return make_book(tmp_path)


class TestFingerprint:
    @pytest.fixture
    def notebook(self, book):
        return make_notebook(book / "chapters/01.ipynb", "%matplotlib inline\nimport bnlib.scratch")

    @pytest.mark.parametrize(
        "name",
        [
            "bnlib/__init__.py",
            "bnlib/scratch/__init__.py",
            "bnlib/scratch/layers.py",
            "bnlib/statistics.py",
            "bnlib/book/live.py",
            "bnlib/book/live.js",
            "bnlib/book/frames/first.npz",
            "requirements.txt",
        ],
    )
    def test_changes_with_every_file_that_the_notebook_reaches(self, book, notebook, name):
        before = execute.fingerprint(execute.load(notebook), book)
        write(book / name, LIBRARY[name] + "\n# changed")
        assert execute.fingerprint(execute.load(notebook), book) != before

    @pytest.mark.parametrize(
        "name",
        [
            "bnlib/unused.py",
            "bnlib/doctor/__init__.py",
            "bnlib/doctor/rules.json",
            "bnlib/book/__pycache__/live.cpython-311.pyc",
            "bnlib/book/.live.js.swp",
            "README.md",
        ],
    )
    def test_does_not_change_with_any_other_file(self, book, notebook, name):
        before = execute.fingerprint(execute.load(notebook), book)
        write(book / name, "changed")
        assert execute.fingerprint(execute.load(notebook), book) == before

    def test_changes_when_a_file_is_added_beside_the_code(self, book, notebook):
        before = execute.fingerprint(execute.load(notebook), book)
        write(book / "bnlib/book/more.js", "")
        assert execute.fingerprint(execute.load(notebook), book) != before

    def test_changes_with_the_code_of_a_cell(self, book, notebook):
        content = execute.load(notebook)
        before = execute.fingerprint(content, book)
        content["cells"][1]["source"] = "import bnlib.scratch  # changed"
        assert execute.fingerprint(content, book) != before

    def test_changes_when_code_moves_from_one_cell_to_the_next(self, book):
        first = make_notebook(book / "chapters/02.ipynb", "a = 1", "b = 2")
        second = make_notebook(book / "chapters/03.ipynb", "a = 1b = 2", "")
        prints = {execute.fingerprint(execute.load(path), book) for path in (first, second)}
        assert len(prints) == 2

    def test_does_not_change_with_markdown_outputs_or_metadata(self, book, notebook):
        content = execute.load(notebook)
        before = execute.fingerprint(content, book)
        content["cells"][0]["source"] = "# Another title"
        content["cells"][1]["outputs"] = [new_output("stream", text="hello")]
        content["cells"][1]["metadata"] = {"tags": ["hide-input"]}
        content["metadata"] = {}
        assert execute.fingerprint(content, book) == before

    def test_does_not_change_with_the_line_ends_of_a_file(self, book, notebook):
        before = execute.fingerprint(execute.load(notebook), book)
        for name in ("bnlib/scratch/layers.py", "requirements.txt"):
            file = book / name
            file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
        assert execute.fingerprint(execute.load(notebook), book) == before

    @pytest.mark.parametrize(
        "source",
        [
            "import bnlib.doctor",
            "import bnlib.doctor.rules as rules",
            "from bnlib import doctor",
            "from bnlib.doctor import check",
            "def f():\n    from bnlib import doctor",
            "if here:\n    %pip install bnlib\n!ls\nnames = !ls\nimport bnlib.doctor",
            "%%time\nimport bnlib.doctor",
            "print('''\n% of all''')\nimport bnlib.doctor",
        ],
    )
    def test_sees_every_form_of_import(self, book, source):
        reached = execute.reached_files([source], book)
        assert book / "bnlib/doctor/__init__.py" in reached
        assert book / "bnlib/doctor/rules.json" in reached

    @pytest.mark.parametrize(
        "source", ["import numpy", "from . import doctor", "import bnlibrary", "a b", ""]
    )
    def test_follows_nothing_outside_the_library(self, book, source):
        assert execute.reached_files([source], book) == []

    def test_follows_imports_in_a_circle(self, book):
        write(book / "bnlib/doctor/__init__.py", "import bnlib.unused")
        write(book / "bnlib/unused.py", "import bnlib.doctor")
        assert book / "bnlib/unused.py" in execute.reached_files(["import bnlib.doctor"], book)


class TestNormalise:
    @pytest.fixture
    def notebook(self):
        stream = [
            new_output("stream", name=name, text=text)
            for name, text in [
                ("stdout", "a\n"),
                ("stdout", "b\n"),
                ("stderr", "c"),
                ("stdout", "d"),
            ]
        ]
        widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "4711"}}
        results = [
            new_output("display_data", data=dict(widget)),
            new_output("display_data", data={**widget, "text/plain": "a slider"}),
            new_output("execute_result", data={"text/plain": "1"}, execution_count=7),
        ]
        results[2]["metadata"] = {"outputId": "x", "image/png": {"width": 300}}
        cells = [
            new_markdown_cell("text", id="text", metadata={"executionInfo": {}, "tags": ["kept"]}),
            new_code_cell("print()", id="streams", outputs=stream, execution_count=7),
            new_code_cell(" ", id="empty", outputs=stream, execution_count=8),
            new_code_cell("1", id="result", outputs=results, execution_count=9),
        ]
        cells[3]["metadata"] = {"execution": {"iopub.execute_input": "noon"}, "cellView": "form"}
        notebook = new_notebook(cells=cells, metadata={"widgets": {}})
        execute.normalise(notebook, "abc")
        return notebook

    def test_metadata_is_what_the_book_keeps_and_nothing_else(self, notebook):
        assert notebook["metadata"] == {
            "kernelspec": {
                "display_name": "Python 3 (ipykernel)",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
            "batchnorm_book": {"fingerprint": "abc"},
        }

    def test_cells_lose_times_and_keep_ids_and_tags(self, notebook):
        assert [cell["id"] for cell in notebook["cells"]] == ["text", "streams", "empty", "result"]
        metadata = [cell["metadata"] for cell in notebook["cells"]]
        assert metadata == [{"tags": ["kept"]}, {}, {}, {"cellView": "form"}]

    def test_cells_that_run_are_counted_from_one(self, notebook):
        counts = [cell.get("execution_count") for cell in notebook["cells"]]
        assert counts == [None, 1, None, 2]
        assert notebook["cells"][3]["outputs"][-1]["execution_count"] == 2

    def test_neighbouring_streams_of_one_name_are_one(self, notebook):
        streams = [(out["name"], out["text"]) for out in notebook["cells"][1]["outputs"]]
        assert streams == [("stdout", "a\nb\n"), ("stderr", "c"), ("stdout", "d")]

    def test_an_empty_cell_has_no_outputs(self, notebook):
        assert notebook["cells"][2]["outputs"] == []

    def test_widget_views_and_volatile_output_metadata_are_dropped(self, notebook):
        outputs = notebook["cells"][3]["outputs"]
        assert [out["data"] for out in outputs] == [{"text/plain": "a slider"}, {"text/plain": "1"}]
        assert outputs[1]["metadata"] == {"image/png": {"width": 300}}


GOOD = """\
import os, sys
from pathlib import Path
import bnlib.book.live
print(bnlib.book.live.name, "in", Path.cwd().name)
print("threads", os.environ["OMP_NUM_THREADS"], "hash", os.environ["PYTHONHASHSEED"])
print("backend", os.environ["MPLBACKEND"].split(".")[0])
print("interpreter", sys.executable)
print("é")
1 + 1"""
FAILING = "def f(x):\n    return 1 / x\nf(0)"


class TestExecution:
    """One run of three notebooks, of which two cannot be executed, looked at from all sides."""

    @pytest.fixture(scope="class")
    @staticmethod
    def run(tmp_path_factory):
        root = make_book(tmp_path_factory.mktemp("book"))
        chapters = root / "chapters"
        make_notebook(chapters / "01-failing.ipynb", "print('before')", FAILING, "print('after')")
        make_notebook(chapters / "02-dying.ipynb", "import os\nos._exit(3)")
        make_notebook(chapters / "03-good.ipynb", GOOD, "", "import builtins\n2 + 2")
        before = {path.name: path.read_bytes() for path in chapters.iterdir()}
        spec = {"argv": ["no-such-python"], "display_name": "another", "language": "python"}
        write(root / "jupyter/kernels/python3/kernel.json", json.dumps(spec))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JUPYTER_PATH", str(root / "jupyter"))
            patch.setenv("MPLBACKEND", "agg")
            with pytest.MonkeyPatch.context() as streams:
                out, err = root / "out", root / "err"
                with out.open("w") as stdout, err.open("w") as stderr:
                    streams.setattr(sys, "stdout", stdout)
                    streams.setattr(sys, "stderr", stderr)
                    code = execute.main([], root)
        return root, before, code, out.read_text(), err.read_text()

    def test_exit_code_says_that_a_notebook_failed(self, run):
        assert run[2] == 1

    def test_failing_notebooks_are_left_byte_for_byte(self, run):
        root, before, *_ = run
        for name in ("01-failing.ipynb", "02-dying.ipynb"):
            assert (root / "chapters" / name).read_bytes() == before[name]

    def test_message_names_notebook_cell_source_and_error(self, run):
        message = run[4][run[4].index("01-failing") :]
        assert message.startswith(
            "01-failing.ipynb, cell 2 (id code-1): ZeroDivisionError: division by zero\n"
            "    def f(x):\n        return 1 / x\n    f(0)\n"
        )
        assert "----> 2     return 1 / x" in message
        assert "\x1b" not in message

    def test_message_says_that_a_kernel_died(self, run):
        message = run[4][run[4].index("02-dying") :]
        assert message.startswith(
            "02-dying.ipynb, cell 1 (id code-0): DeadKernelError: Kernel died\n"
            "    import os\n    os._exit(3)\n"
        )

    def test_the_other_notebook_was_executed_where_it_lies_by_this_interpreter(self, run):
        notebook = nbformat.read(run[0] / "chapters/03-good.ipynb", as_version=4)
        assert [cell.get("execution_count") for cell in notebook.cells] == [None, 1, None, 2]
        printed, result = notebook.cells[1].outputs
        assert printed.text.splitlines() == [
            "live figure in chapters",
            "threads 1 hash 0",
            "backend module://matplotlib_inline",
            f"interpreter {sys.executable}",
            "é",
        ]
        assert result.data == {"text/plain": "2"}

    def test_it_is_written_as_nbformat_writes_it(self, run):
        path = run[0] / "chapters/03-good.ipynb"
        text = path.read_text(encoding="utf-8")
        assert text == nbformat.writes(nbformat.reads(text, as_version=4)) + "\n"
        assert '\n "cells": [' in text
        assert "é" in text
        assert [cell["id"] for cell in json.loads(text)["cells"]] == [
            "title", "code-0", "code-1", "code-2"
        ]  # fmt: skip
        assert json.loads(text)["metadata"] == {
            **execute.METADATA,
            "batchnorm_book": {"fingerprint": execute.fingerprint(json.loads(text), run[0])},
        }

    def test_last_line_sums_up(self, run):
        (line,) = run[3].splitlines()
        assert line.startswith("Notebooks: executed 03-good (")
        assert "failed 01-failing (" in line
        assert line.endswith("; 0 up to date")

    def test_nothing_else_is_left_in_the_folder(self, run):
        assert {path.name for path in (run[0] / "chapters").iterdir()} == set(run[1])

    def test_check_lists_what_is_stale(self, run, capsys):
        chapters = run[0] / "chapters"
        assert execute.main(["--check"], run[0]) == 1
        assert capsys.readouterr().out.splitlines() == [
            f"stale: {chapters / '01-failing.ipynb'}",
            f"stale: {chapters / '02-dying.ipynb'}",
        ]
        assert execute.main(["--check", str(chapters / "03-good.ipynb")], run[0]) == 0

    def test_second_run_executes_and_imports_nothing(self, run):
        path = run[0] / "chapters/03-good.ipynb"
        before = path.stat()
        start = time.perf_counter()
        done = run_in_a_process(run[0], str(path))
        assert done.stdout.splitlines() == ["Notebooks: 1 up to date", "[]"]
        assert done.returncode == 0
        assert time.perf_counter() - start < 1.5  # 0.1 s on a free machine
        assert path.stat() == before

    def test_all_executes_what_is_up_to_date(self, run, capsys):
        path = run[0] / "chapters/03-good.ipynb"
        before, old_file = path.read_bytes(), path.stat().st_ino
        assert execute.main(["--all", "--workers", "1", str(path)], run[0]) == 0
        assert capsys.readouterr().out.startswith("Notebooks: executed 03-good (")
        assert path.read_bytes() == before
        assert path.stat().st_ino != old_file  # replaced, not written into


def command(root, *arguments):
    heavy = "[m for m in ('nbclient', 'nbformat', 'zmq', 'tqdm') if m in sys.modules]"
    code = f"""\
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(execute.__file__).parent)!r})
import execute
code = execute.main({arguments!r}, Path({str(root)!r}))
print({heavy})
sys.exit(code)"""
    return [sys.executable, "-c", code]


def run_in_a_process(root, *arguments):
    return subprocess.run(command(root, *arguments), capture_output=True, text=True, check=False)


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_ctrl_c_leaves_every_notebook_whole_and_no_kernel(book):
    chapters = book / "chapters"
    slow = "import os, time\nfrom pathlib import Path\n"
    slow += "Path(f'../kernel-{os.getpid()}').touch()\ntime.sleep(60)"
    for name in ("01.ipynb", "02.ipynb", "03.ipynb"):
        make_notebook(chapters / name, slow)
    before = {path.name: path.read_bytes() for path in chapters.iterdir()}
    process = subprocess.Popen(command(book), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(book.glob("kernel-*"))) == 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines() == ["", "Interrupted; every notebook is whole."]
    assert {path.name: path.read_bytes() for path in chapters.iterdir()} == before
    kernels = [int(path.name.removeprefix("kernel-")) for path in book.glob("kernel-*")]
    assert len(kernels) == 2
    assert not any(alive(kernel) for kernel in kernels)


def test_a_notebook_edited_while_it_runs_keeps_the_edit(book, capsys):
    path = book / "chapters/01.ipynb"
    make_notebook(path, "from pathlib import Path\nPath('01.ipynb').write_text('my edit')")
    assert execute.main([], book) == 1
    assert path.read_text() == "my edit"
    assert "changed while it was executed" in capsys.readouterr().err


def test_a_cell_that_takes_too_long_fails(book, capsys, monkeypatch):
    monkeypatch.setattr(execute, "CELL_TIMEOUT", 1)
    make_notebook(book / "chapters/01.ipynb", "import time\ntime.sleep(60)")
    assert execute.main([], book) == 1
    assert "cell 1 (id code-0): CellTimeoutError: A cell timed out" in capsys.readouterr().err


def test_a_long_traceback_is_cut_in_the_middle():
    lines = [f"\x1b[31mline {n}\x1b[0m" for n in range(100)]
    error = new_output("error", ename="ValueError", evalue="a\nb", traceback=["\n".join(lines)])
    cell = new_code_cell("f()", id="here", outputs=[error])
    message = execute.describe(cell, 4, RuntimeError()).splitlines()
    assert message[:3] == ["cell 4 (id here): ValueError: a", "    f()", "line 0"]
    assert message[-1] == "line 99"
    assert len(message) < 30


def test_a_write_that_breaks_off_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "01.ipynb"
    path.write_bytes(b"old")

    def full_disk(self, content):
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        execute.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_mode_of_the_old_one(tmp_path):
    path = tmp_path / "01.ipynb"
    path.write_bytes(b"old")
    path.chmod(0o640)
    execute.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("content", ["<<<<<<< ours", "[]", "{}", '{"cells": {}, "metadata": {}}'])
def test_what_is_not_a_notebook_is_refused_before_anything_runs(book, capsys, content):
    make_notebook(book / "chapters/01.ipynb", "raise SystemExit")
    write(book / "chapters/02.ipynb", content)
    with pytest.raises(SystemExit, match="2"):
        execute.main([], book)
    assert "02.ipynb: expected a Jupyter notebook" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["missing.ipynb"], ["--workers", "0"], ["--all", "--check"]])
def test_bad_arguments_are_refused(book, capsys, arguments):
    make_notebook(book / "chapters/01.ipynb", "1")
    with pytest.raises(SystemExit, match="2"):
        execute.main(arguments, book)
    assert "error:" in capsys.readouterr().err


def test_a_book_with_no_notebooks_is_refused(book, capsys):
    with pytest.raises(SystemExit, match="2"):
        execute.main([], book)
    assert "found none" in capsys.readouterr().err
