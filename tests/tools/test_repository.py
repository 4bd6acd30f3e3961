import json

import execute
import pytest
import repository

OLD = "https://github.com/OWNER/batchnorm-book"
NEW = "https://gitlab.com/ada/batch.norm_book"
CONFIG = f"""\
title: The Batch Norm Book   # as on the cover
html:
  url: {OLD}

repository:  # make repository URL=...

  # Where the book lives.
  path_to_book: ""
  url: {OLD}  # the only place
  branch: main
"""
SETUP = f"""\
import sys

if "google.colab" in sys.modules:
    %pip install --quiet "batchnorm-book[book] @ git+{OLD}\""""


def cell(source, *tags):
    lines = source.splitlines(keepends=True)
    return {
        "cell_type": "code",
        "execution_count": 1,
        "id": tags[0] if tags else "cell",
        "metadata": {"tags": list(tags)},
        "outputs": [{"name": "stdout", "output_type": "stream", "text": [f"é {OLD}\n"]}],
        "source": lines,
    }


def write_notebook(root, name, *cells, fresh=True):
    notebook = {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    stamp = execute.fingerprint(notebook, root) if fresh else "made from older code"
    notebook["metadata"] = {"batchnorm_book": {"fingerprint": stamp}}
    path = root / "chapters" / name
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def book(tmp_path):
    (tmp_path / "chapters").mkdir()
    (tmp_path / "requirements.txt").write_text("numpy==2.0.0\n")
    (tmp_path / "_config.yml").write_text(CONFIG)
    (tmp_path / "README.md").write_bytes(
        f"Clone {OLD}.git, read {OLD}/issues. Not {OLD}-2, not {OLD}.eu.\r\nSee {OLD}.".encode()
    )
    (tmp_path / "pyproject.toml").write_text(f'Repository = "{OLD}"\n')
    (tmp_path / "other.md").write_text(OLD)
    write_notebook(tmp_path, "01.ipynb", cell(SETUP, "setup"), cell(f"print('git+{OLD}')"))
    write_notebook(tmp_path, "02.ipynb", cell(SETUP, "setup"), fresh=False)
    return tmp_path


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_one_line_of_the_configuration_changes(book):
    assert repository.main([NEW], book) == 0
    expected = CONFIG.replace(f"{OLD}  # the only place", f"{NEW}  # the only place")
    assert (book / "_config.yml").read_text() == expected


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_quoted_address_keeps_its_quotes(book, quote):
    config = book / "_config.yml"
    config.write_bytes(f"repository:\r\n  url: {quote}{OLD}{quote}\r\ntitle: x\r\n".encode())
    assert repository.main([NEW], book) == 0
    expected = f"repository:\r\n  url: {quote}{NEW}{quote}\r\ntitle: x\r\n"
    assert config.read_bytes() == expected.encode()


def test_only_the_set_up_cell_and_the_fingerprint_of_a_notebook_change(book):
    path = book / "chapters/01.ipynb"
    before = path.read_text(encoding="utf-8").splitlines()
    assert repository.main([NEW], book) == 0
    after = path.read_text(encoding="utf-8").splitlines()
    changed = [line for line, old in zip(after, before, strict=True) if line != old]
    assert len(changed) == 2
    assert f"git+{NEW}" in changed[0]
    assert '"fingerprint"' in changed[1]


def test_a_fresh_notebook_stays_fresh_and_a_stale_one_stale(book):
    assert repository.main([NEW], book) == 0
    notebooks = [execute.load(path) for path in execute.find_notebooks(book)]
    assert [execute.is_stale(notebook, book) for notebook in notebooks] == [False, True]
    for notebook in notebooks:
        assert f"git+{NEW}" in "".join(notebook["cells"][0]["source"])


def test_a_source_in_one_string_stays_one_string(book):
    setup = cell(SETUP, "setup")
    setup["source"] = SETUP
    path = write_notebook(book, "03.ipynb", setup)
    assert repository.main([NEW], book) == 0
    assert execute.load(path)["cells"][0]["source"] == SETUP.replace(OLD, NEW)


def test_the_other_files_name_the_new_address(book):
    assert repository.main([NEW], book) == 0
    assert (book / "README.md").read_bytes().decode() == (
        f"Clone {NEW}.git, read {NEW}/issues. Not {OLD}-2, not {OLD}.eu.\r\nSee {NEW}."
    )
    assert (book / "pyproject.toml").read_text() == f'Repository = "{NEW}"\n'
    assert (book / "other.md").read_text() == OLD


def test_it_says_what_it_wrote(book, capsys):
    repository.main([NEW], book)
    assert capsys.readouterr().out == (
        f"repository: {NEW} written into "
        "chapters/01.ipynb, chapters/02.ipynb, README.md, pyproject.toml, _config.yml\n"
    )


def test_the_second_time_nothing_is_written(book, capsys):
    repository.main([NEW], book)
    before = contents(book)
    assert repository.main([NEW], book) == 0
    assert contents(book) == before
    assert "nothing" in capsys.readouterr().out


def test_there_and_back_again_changes_nothing(book):
    before = contents(book)
    repository.main([NEW], book)
    repository.main([OLD], book)
    assert contents(book) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [""],
        [NEW, NEW],
        [NEW + "/"],
        [NEW + ".git"],
        ["http" + NEW.removeprefix("https")],
        ["git@github.com:ada/batchnorm-book"],
        ["https://github.com"],
        ["https://github.com/ada lovelace/book"],
        [f" {NEW}"],
        [f"{NEW}\n"],
        [f"{NEW}?tab=readme"],
        [f"{NEW}#readme"],
        ['https://github.com/ada/"book'],
        ["https://github.com/ada//book"],
    ],
)
def test_a_bad_address_gets_one_line_and_changes_nothing(book, capsys, arguments):
    before = contents(book)
    assert repository.main(arguments, book) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("repository: expected")
    assert contents(book) == before


def break_config(book):
    (book / "_config.yml").write_text(f"repository:\n  branch: main\nurl: {OLD}\n")


def remove_config(book):
    (book / "_config.yml").unlink()


def add_notebook_without_setup(book):
    write_notebook(book, "03.ipynb", cell("1 + 1"))


def add_broken_notebook(book):
    (book / "chapters/03.ipynb").write_text("<<<<<<< ours")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (break_config, "_config.yml"),
        (remove_config, "_config.yml"),
        (add_notebook_without_setup, "03.ipynb"),
        (add_broken_notebook, "03.ipynb"),
    ],
)
def test_a_damaged_book_gets_one_line_and_changes_nothing(book, capsys, damage, named):
    damage(book)
    before = contents(book)
    assert repository.main([NEW], book) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert contents(book) == before
