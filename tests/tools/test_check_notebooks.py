import json

import check_notebooks
import pytest
from check_notebooks import RULES, problems
from nbformat.v4 import (
    new_code_cell,
    new_markdown_cell,
    new_notebook,
    new_output,
    writes,
)
from notebooks import Book, Chapter

URL = "https://github.com/OWNER/batchnorm-book"
NAME = "07-pytorch-parity.ipynb"
SETUP = f"""\
import sys

if "google.colab" in sys.modules:
    %pip install --quiet "batchnorm-book[book] @ git+{URL}\""""

TITLE = """\
# PyTorch parity

You compare your layer with the one that everybody uses.

**You will** read, compare and test.

**You need** chapter 4 and its batch mean.

**Running time**: 3 s.
"""
# What looks like a problem and is none: code, formulas, a compound, an other link, a magic.
TEXT = """\
## The mean

PyTorch takes `{batch mean}` and $x_{batch}$; a mini-batch is one. See [the batch][sources].
The [Batch
mean](../back/glossary.md#batch-mean) of a [batch](../back/glossary.md#batch) is $\\mu$,
of batches too: these are batch statistics. The weight $w$ decay is no term.

```python
{ref}`not a role`
(label)=
```

![One node, three arrows into it](../images/node.png)
<img src="../images/node.png" alt="the same node">

See [the start](#pytorch-parity), [the same](#the-mean-1),
[intro](../intro.md#to-run-it-make-book) and [PyTorch](https://pytorch.org#docs).

[sources]: #sources

### The mean
"""
GLOSSARY = """\
# Glossary

## Batch statistics

### Batch

### Batch mean

### Weight decay
"""
INTRO = "# The book\n\n## To run it: `make book`\n"


def printed(text):
    return [new_output("stream", name="stdout", text=text)]


def exercise(number, stub_id, solution_id):
    heading = f"### Exercise {number}: try it"
    stub = f'answer = None\nexercises.check("{number}", answer)'
    return [
        new_markdown_cell(heading, id=f"{stub_id}-text"),
        new_code_cell(
            stub,
            id=stub_id,
            metadata={"tags": ["exercise"]},
            outputs=printed(f"Exercise {number}: not yet. Hint: count.\n"),
        ),
        new_code_cell(
            f'# @title Solution {number}\nexercises.check("{number}", 7)' + "\n# long" * 30,
            id=solution_id,
            metadata={
                "tags": ["solution", "hide-cell"],
                "cellView": "form",
                "jupyter": {"source_hidden": True},
            },
            outputs=printed(f"7\nExercise {number}: correct.\n"),
        ),
    ]


def good_cells():
    picture = new_output(
        "display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}
    )
    return [
        new_markdown_cell(TITLE, id="title"),
        new_code_cell(SETUP, id="setup", metadata={"tags": ["setup", "remove-cell"]}),
        new_code_cell("import numpy as np\nfrom bnlib.book import exercises", id="imports"),
        new_markdown_cell(TEXT, id="text", metadata={"tags": ["lecture-L14"]}),
        new_code_cell("%timeit -n 1 pass", id="timing", metadata={"tags": ["nbval-ignore-output"]}),
        new_code_cell("mean = np.float64(4)\nassert mean == 4\nmean", id="mean"),
        new_code_cell(
            "draw(mean)",
            id="plot",
            metadata={
                "mystnb": {
                    "image": {"alt": "A histogram of 32 values around 4."},
                    "figure": {"caption": "The mean is 4."},
                }
            },
            outputs=[picture],
        ),
        new_markdown_cell("## Summary\n\nThe mean is 4.", id="summary"),
        new_markdown_cell("## Exercises", id="exercises"),
        *exercise("07.1", "stub-1", "solution-1"),
        *exercise("07.2", "stub-2", "solution-2"),
        new_markdown_cell("## What comes next\n\n[The start](07-pytorch-parity.ipynb)", id="next"),
        new_markdown_cell("## Sources\n\nKrogh: weight decay, 1991.", id="sources"),
    ]


class Draft:
    """A good chapter, for a test to spoil."""

    def __init__(self, root):
        self.root = root
        self.path = root / "chapters" / NAME
        self.notebook = new_notebook(cells=good_cells())
        self.notebook.metadata = {
            "kernelspec": {
                "display_name": "Python 3 (ipykernel)",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
            "batchnorm_book": {"fingerprint": "0123456789abcdef" * 4},
        }
        self.count()

    def count(self):
        code = [cell for cell in self.notebook.cells if cell.cell_type == "code"]
        for number, cell in enumerate(code, start=1):
            cell.execution_count = number

    def __getitem__(self, cell_id):
        return self.notebook.cells[self.index(cell_id)]

    def index(self, cell_id):
        return [cell.id for cell in self.notebook.cells].index(cell_id)

    def insert_before(self, cell_id, *cells):
        index = self.index(cell_id)
        self.notebook.cells[index:index] = cells
        self.count()

    def remove(self, *cell_ids):
        self.notebook.cells = [cell for cell in self.notebook.cells if cell.id not in cell_ids]
        self.count()

    def save(self):
        self.path.write_text(writes(self.notebook), encoding="utf-8")

    def problems(self):
        self.save()
        return list(problems(Chapter(self.path, Book(self.root))))


@pytest.fixture
def draft(tmp_path):
    for folder in ("chapters", "back", "images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "_config.yml").write_text(f"repository:\n  url: {URL}\n")
    (tmp_path / "back" / "glossary.md").write_text(GLOSSARY)
    (tmp_path / "intro.md").write_text(INTRO)
    (tmp_path / "images" / "node.png").write_bytes(b"")
    return Draft(tmp_path)


def test_a_good_chapter_has_no_problem(draft):
    assert draft.problems() == []


CASES = []


def breaks(rule, cell, *words):
    """Register a way to spoil a chapter, and the one line that should come of it."""

    def register(spoil):
        CASES.append(pytest.param(spoil, rule, cell, words, id=f"{rule}: {spoil.__name__}"))
        return spoil

    return register


# The whole notebook


@breaks("notebook-format", None, "4.4")
def older_format(draft):
    draft.notebook.nbformat_minor = 4
    for cell in draft.notebook.cells:
        del cell["id"]


@breaks("notebook-format", "mean", "execution_count")
def code_cell_without_a_count(draft):
    del draft["mean"]["execution_count"]


@breaks("notebook-format", None, "'surprise' was unexpected")
def unknown_property(draft):
    draft.notebook["surprise"] = 1


@breaks("notebook-format", None, "got 2 cells")
def too_short(draft):
    del draft.notebook.cells[2:]


@breaks("metadata", None, "3.11.9")
def python_version_left(draft):
    draft.notebook.metadata["language_info"]["version"] = "3.11.9"


@breaks("metadata", None, "widgets")
def widget_state_left(draft):
    draft.notebook.metadata["widgets"] = {}


@breaks("metadata", None, "fingerprint")
def no_fingerprint(draft):
    del draft.notebook.metadata["batchnorm_book"]


@breaks("metadata", None, "fingerprint")
def short_fingerprint(draft):
    draft.notebook.metadata["batchnorm_book"]["fingerprint"] = "abc"


@breaks("metadata", "mean", "execution")
def execution_times_left(draft):
    draft["mean"].metadata["execution"] = {"iopub.status.busy": "2024-01-01T00:00:00Z"}


# Stored outputs


@breaks("execution-order", "mean", "expected execution count 4", "None")
def unexecuted_cell(draft):
    draft["mean"].execution_count = None


@breaks("execution-order", "setup", "expected execution count 1", "got 2")
def executed_twice(draft):
    for cell in draft.notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count += 1


@breaks("empty-cell", "blank", "empty")
def empty_code_cell(draft):
    draft.notebook.cells.append(new_code_cell(" \n", id="blank"))


@breaks("error-output", "mean", "ZeroDivisionError", "by zero")
def stored_error(draft):
    error = new_output("error", ename="ZeroDivisionError", evalue="by zero", traceback=[])
    draft["mean"].outputs = [error]


@breaks("stderr-output", "mean", "UserWarning: old")
def stored_warning(draft):
    draft["mean"].outputs = [new_output("stream", name="stderr", text="UserWarning:\n  old\n")]


@breaks("strict-output", "timing", "nbval-ignore-output", "assert")
def no_assert_beside_a_loose_cell(draft):
    draft["mean"].source = "# assert\nmean = np.float64(4)"
    draft["plot"].source = "assert mean == 4  # too far away"


@breaks("strict-output", "mean", "raises-exception", "assert")
def no_assert_beside_a_raising_cell(draft):
    draft["timing"].metadata.tags = []
    draft["mean"].source = "1 / 0"
    draft["mean"].metadata.tags = ["raises-exception"]


@breaks("strict-output", "solution-2", "nbval-ignore-output", "assert")
def no_assert_at_the_end(draft):
    draft["solution-2"].metadata.tags.append("nbval-ignore-output")


@breaks("strict-output", "mean", "nbval-skip")
def skipped_cell(draft):
    draft["mean"].metadata.tags = ["nbval-skip"]


@breaks("strict-output", "mean", "comment")
def output_ignored_by_a_comment(draft):
    draft["mean"].source = "# NBVAL_IGNORE_OUTPUT\nassert True"


@breaks("figure-text", "plot", "mystnb.image.alt", "'A histogram'")
def short_alt_text(draft):
    draft["plot"].metadata["mystnb"]["image"]["alt"] = "A histogram"


@breaks("figure-text", "plot", "mystnb.figure.caption")
def no_caption(draft):
    del draft["plot"].metadata["mystnb"]["figure"]


@breaks("figure-text", "plot", "mystnb.figure.caption")
def no_caption_of_an_svg(draft):
    draft["plot"].outputs[0].data = {"image/svg+xml": "<svg/>"}
    del draft["plot"].metadata["mystnb"]["figure"]


# Markdown


def write(text):
    def spoil(draft):
        draft.insert_before("summary", new_markdown_cell(text, id="new"))

    return spoil


def breaks_as_text(rule, *words, name, text):
    spoil = write(text)
    spoil.__name__ = name
    breaks(rule, "new", *words)(spoil)


IMAGE = "../images/node.png"
for name, words, text in [
    ("no_alt_text", ["node.png", "alt"], f"![]({IMAGE})"),
    ("no_alt_text_in_html", ["node.png", "alt"], f'<p>\n<img\n src="{IMAGE}">\n</p>'),
    ("empty_alt_text_in_html", ["node.png", "alt"], f'A <img alt="" src="{IMAGE}"> b'),
    ("no_such_image", ["images/edge.png", "file"], "![An edge](../images/edge.png)"),
    ("image_from_elsewhere", ["https://a.org/b.png"], "![An edge](https://a.org/b.png)"),
]:
    breaks_as_text("markdown-image", *words, name=name, text=text)

for name, words, text in [
    ("directive", ["directive", "{note}"], "```{note}\nText.\n```"),
    ("colon_directive", ["directive", "{note}"], ":::{note}\nText.\n:::"),
    ("role", ["role", "ref x"], "See {ref}`x`."),
    ("role_in_a_link", ["role", "sub 2"], "[CO{sub}`2`](#the-mean)"),
    ("label", ["label", "here"], "(here)=\n## Title"),
    ("equation_label", ["equation label", "x = 1"], "$$\nx = 1\n$$ (one)"),
    ("substitution", ["substitution", "name"], "The {{ name }}."),
    ("comment", ["comment", "hidden"], "% hidden\ntext"),
]:
    breaks_as_text("plain-markdown", *words, name=name, text=text)

for name, words, text in [
    ("no_such_file", ["08-lost.ipynb", "file"], "[on](08-lost.ipynb)"),
    ("outside_the_book", ["../../../etc", "file"], "[on](../../../../../../../../etc/hosts)"),
    ("folder", ["../back", "file"], "[on](../back)"),
    ("absolute_path", ["/intro.md", "file"], "[on](/intro.md)"),
    ("nothing", ["file"], "[on]()"),
    ("no_such_heading", ["#to-walk", "heading of intro.md"], "[on](../intro.md#to-walk)"),
    (
        "capital_anchor",
        ["#To-run-it-make-book", "heading"],
        "[on](../intro.md#To-run-it-make-book)",
    ),
    ("no_such_heading_here", ["#the-mean-2", NAME], "[on](#the-mean-2)"),
    ("no_such_heading_in_a_notebook", ["#zap", NAME], f"[on]({NAME}#zap)"),
    ("link_in_html", ["#zap"], '<a href="#zap">on</a>'),
]:
    breaks_as_text("link-target", *words, name=name, text=text)

for name, words, text in [
    ("unlinked", ['"weight decay"', "#weight-decay"], "It is a weight decay."),
    ("plural", ['"Weight decays"'], "Weight decays differ."),
    ("split_by_a_line_end", ["#weight-decay"], "It is *weight*\ndecay."),
    ("in_a_table", ["#weight-decay"], "| weight decay |\n|---|\n| 1 |"),
    (
        "linked_later",
        ["#weight-decay"],
        "A weight decay; a [weight decay](../back/glossary.md#weight-decay).",
    ),
    ("linked_to_another_term", ["#weight-decay"], "A [weight decay](../back/glossary.md#batch)."),
    (
        "link_beside_the_term",
        ["#weight-decay"],
        "weight [decay](../back/glossary.md#weight-decay).",
    ),
]:
    breaks_as_text("glossary-first-use", *words, name=name, text=text)


@breaks("glossary-first-use", "text", '"batch" has no link')
def shorter_term_only_inside_a_longer_link(draft):
    link = "a [batch](../back/glossary.md#batch)"
    draft["text"].source = draft["text"].source.replace(link, "a batch")


# The frame of a chapter


@breaks("chapter-opening", "title", "# Title", "[]")
def no_title(draft):
    draft["title"].source = draft["title"].source.replace("# PyTorch parity", "PyTorch parity")
    draft["text"].source = draft["text"].source.replace("#pytorch-parity", "#the-mean")


@breaks("chapter-opening", "title", "# Title", "[0, 7]")
def second_title(draft):
    write("# Another title")(draft)


@breaks("chapter-opening", "title", "sentence of why")
def no_reason(draft):
    reason = "You compare your layer with the one that everybody uses.\n"
    draft["title"].source = draft["title"].source.replace(reason, "")


@breaks("chapter-opening", "title", "**You will**", "**Running time**")
def no_goals(draft):
    draft["title"].source = draft["title"].source.replace("**You will**", "You will")


@breaks("closing-headings", None, "Sources", "'What comes next']")
def no_sources(draft):
    draft.remove("sources")
    draft["text"].source = draft["text"].source.replace("#sources", "#summary")


@breaks("closing-headings", None, "got ['Exercises'")
def summary_at_the_end(draft):
    draft["summary"].source = "Nothing."
    draft.notebook.cells.append(new_markdown_cell("## Summary", id="end"))


@breaks("setup-cell", "setup", "!pip")
def other_setup(draft):
    draft["setup"].source += "\n!pip"


@breaks("setup-cell", "setup", "remove-cell")
def setup_shown(draft):
    draft["setup"].metadata.tags = ["setup"]


@breaks("setup-url", "setup", "https://github.com/ada/book", URL)
def other_repository(draft):
    draft["setup"].source = SETUP.replace(URL, "https://github.com/ada/book")


@breaks("import-cell", "imports", "expected the import cell")
def no_imports(draft):
    draft["imports"].source = "np = 1"


@breaks("import-cell", "new", "from math import sqrt", "cell 2")
def second_import_cell(draft):
    draft.insert_before("text", new_code_cell("from math import sqrt", id="new"))


@breaks("import-cell", "mean", "import math", "cell 2")
def late_import(draft):
    draft["mean"].source = "%matplotlib inline\nassert True\ndef f():\n    import math"


@breaks("lecture-claims", None, "lecture-L14", "What the frameworks keep")
def claim_without_a_tag(draft):
    draft["text"].metadata.tags = []


@breaks("lecture-claims", "plot", "lecture-L14", "earlier")
def claim_tagged_twice(draft):
    draft["plot"].metadata.tags = ["lecture-L14"]


@breaks("lecture-claims", "plot", "lecture-L21", "no such claim")
def unknown_claim(draft):
    draft["plot"].metadata.tags = ["lecture-L21"]


@breaks("cell-length", "mean", "26 lines", "25")
def long_cell(draft):
    draft["mean"].source = "assert True\n\n" + "x = 1\n" * 25


@breaks("cell-length", None, "median", "6 lines", "at most 5")
def long_cells(draft):
    for cell_id in ("timing", "mean", "plot", "stub-1", "stub-2"):
        draft[cell_id].source = "assert True\n" + "x = 1\n" * 5
    for number in (1, 2):
        draft[f"stub-{number}"].source += f'exercises.check("07.{number}", x)'


# Exercises


@breaks("exercise-headings", None, "2 to 4", "got 1")
def one_exercise(draft):
    draft.remove("stub-2-text", "stub-2", "solution-2")


@breaks("exercise-headings", None, "2 to 4", "got 5")
def five_exercises(draft):
    for number in (3, 4, 5):
        stub, solution = f"stub-{number}", f"solution-{number}"
        draft.insert_before("next", *exercise(f"07.{number}", stub, solution))


@breaks("exercise-headings", "stub-2-text", "### Exercise 07.2: title", "08.2")
def number_of_another_chapter(draft):
    for cell_id in ("stub-2-text", "stub-2", "solution-2"):
        draft[cell_id].source = draft[cell_id].source.replace("07.2", "08.2")
        for output in draft[cell_id].get("outputs", []):
            output.text = output.text.replace("07.2", "08.2")


@breaks("exercise-headings", "stub-2-text", "### Exercise 07.2: title", "#### Exercise")
def wrong_level(draft):
    draft["stub-2-text"].source = "#" + draft["stub-2-text"].source


@breaks("exercise-stub", "stub-2-text", "one cell tagged exercise", "got 0")
def no_stub(draft):
    draft["stub-2"].metadata.tags = []


@breaks("exercise-stub", "stub-1", 'exercises.check("07.1"')
def stub_that_checks_another(draft):
    draft["stub-1"].source = 'exercises.check("07.2", None)'


@breaks("exercise-stub", "stub-1", "Exercise 07.1: not yet")
def stub_that_is_solved(draft):
    draft["stub-1"].outputs = printed("Exercise 07.1: correct.\n")


@breaks("exercise-stub", "stub-1", "Exercise 07.1: not yet")
def stub_with_no_output(draft):
    draft["stub-1"].outputs = []


@breaks("exercise-solution", "stub-1-text", "one cell tagged solution", "['exercise']")
def no_solution(draft):
    draft.remove("solution-1")


@breaks("exercise-solution", "stub-1-text", "after the stub", "['solution', 'exercise']")
def solution_before_the_stub(draft):
    solution = draft["solution-1"]
    draft.remove("solution-1")
    draft.insert_before("stub-1", solution)


@breaks("exercise-solution", "solution-1", "hide-cell")
def solution_in_sight_on_the_page(draft):
    draft["solution-1"].metadata.tags = ["solution"]


@breaks("exercise-solution", "solution-1", "cellView")
def solution_in_sight_in_colab(draft):
    del draft["solution-1"].metadata["cellView"]


@breaks("exercise-solution", "solution-1", "source_hidden")
def solution_in_sight_in_jupyterlab(draft):
    draft["solution-1"].metadata["jupyter"]["source_hidden"] = False


@breaks("exercise-solution", "solution-1", "# @title Solution 07.1")
def solution_without_a_title(draft):
    draft["solution-1"].source = 'exercises.check("07.1", 7)'


@breaks("exercise-solution", "solution-1", 'call of exercises.check("07.1"')
def solution_that_prints_correct_itself(draft):
    draft["solution-1"].source = '# @title Solution 07.1\nprint("Exercise 07.1: correct")'


@breaks("exercise-solution", "solution-1", "Exercise 07.1: correct")
def solution_that_is_wrong(draft):
    draft["solution-1"].outputs = printed("Exercise 07.1: not yet. Hint: count.\n")


@pytest.mark.parametrize(("spoil", "rule", "cell", "words"), CASES)
def test_a_broken_rule_is_named_with_file_and_cell(draft, spoil, rule, cell, words):
    spoil(draft)
    [line] = draft.problems()
    place = f" cell {draft.index(cell)} ({cell}):" if cell else ""
    assert line.startswith(f"chapters/{NAME}:{place} [{rule}] ")
    assert "\n" not in line
    for word in words:
        assert word in line


def test_a_repeated_cell_id_is_a_problem(draft):
    draft.notebook.cells.append(new_markdown_cell("Again.", id="next"))
    [line] = draft.problems()
    assert line.startswith(f"chapters/{NAME}: cell 17 (next): [notebook-format] an earlier cell")


def test_every_rule_is_broken_by_a_case():
    assert {case.values[1] for case in CASES} == set(RULES)


# The command


def run(root, capsys, *arguments):
    """Return the exit status and what was printed."""
    try:
        check_notebooks.main(["--root", str(root), *map(str, arguments)])
        status = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):  # Python prints it and exits with 1
            return 1, stop.code
        status = stop.code
    return status, capsys.readouterr().out


def test_the_command_counts_what_it_checked(draft, capsys):
    draft.save()
    counts = f"notebooks: 1; cells: 17; rules: {len(RULES)}; problems: 0\n"
    assert run(draft.root, capsys) == (0, counts)


def test_the_command_prints_each_problem_and_fails(draft, capsys):
    draft["mean"].execution_count = None
    draft["plot"].metadata["mystnb"]["figure"]["caption"] = " "
    draft.save()
    status, out = run(draft.root, capsys, draft.path)
    assert status == 1
    first, second = out.splitlines()
    assert first.startswith(f"chapters/{NAME}: cell 5 (mean): [execution-order] ")
    assert second.startswith(f"chapters/{NAME}: cell 6 (plot): [figure-text] ")


def test_the_command_looks_at_the_named_notebooks_only(draft, capsys):
    draft.save()
    (draft.path.parent / "08-broken.ipynb").write_text("{}")
    assert run(draft.root, capsys, draft.path)[0] == 0
    assert run(draft.root, capsys)[0] == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"nbformat": 3, "cells": [], "metadata": {}}'])
def test_a_file_that_is_no_notebook_is_one_clear_error(draft, capsys, text):
    draft.path.write_text(text)
    status, out = run(draft.root, capsys)
    assert status == 1
    assert NAME in out
    assert "expected a" in out


def test_a_misnamed_chapter_is_one_clear_error(draft, capsys):
    draft.path = draft.path.with_name("parity.ipynb")
    draft.save()
    status, out = run(draft.root, capsys)
    assert status == 1
    assert "parity.ipynb: expected a name like 01-normalize-a-batch.ipynb" in out


@pytest.mark.parametrize("config", ["", "repository: {}", "a: [", "repository"])
def test_a_config_without_the_address_is_one_clear_error(draft, capsys, config):
    draft.save()
    (draft.root / "_config.yml").write_text(config)
    status, out = run(draft.root, capsys)
    assert status == 1
    assert "_config.yml: expected repository.url" in out


@pytest.mark.parametrize("missing", ["_config.yml", "back/glossary.md"])
def test_a_missing_file_is_one_clear_error(draft, capsys, missing):
    draft.save()
    (draft.root / missing).unlink()
    status, out = run(draft.root, capsys)
    assert status == 1
    assert missing in out


def test_no_notebooks_are_an_error(draft, capsys):
    status, out = run(draft.root, capsys)
    assert status == 1
    assert "found none" in out


def test_a_notebook_with_lines_as_lists_is_read_alike(draft):
    draft.save()
    notebook = json.loads(draft.path.read_text())
    assert isinstance(notebook["cells"][0]["source"], list)
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    draft.path.write_text(json.dumps(notebook))
    assert list(problems(Chapter(draft.path, Book(draft.root)))) == []


def test_a_term_with_an_accent_may_be_linked(draft):
    with (draft.root / "back" / "glossary.md").open("a") as file:
        file.write("\n## Fréchet distance\n")
    draft["text"].source += "\n\nA [Fréchet distance](../back/glossary.md#fréchet-distance)."
    assert draft.problems() == []


def test_an_empty_glossary_asks_for_nothing(draft):
    (draft.root / "back" / "glossary.md").write_text("# Glossary\n\n## Batch mean\n\n## Batch\n")
    assert draft.problems() == []
