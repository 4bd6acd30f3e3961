"""Check that every chapter keeps the rules of the book.

Usage: python tools/check_notebooks.py [--root FOLDER] [NOTEBOOK ...]

Prints `file: cell N (id): [rule] message` per problem; cells are counted from 0.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from urllib.parse import unquote, urlsplit

import nbformat
from execute import METADATA, ROOT, VOLATILE, find_notebooks
from lecture import CLAIMS
from nbformat import NotebookNode
from notebooks import (
    SETUP_TAGS,
    Book,
    Chapter,
    calls,
    has_assert,
    imports,
    output_text,
    setup_source,
    tags,
)
from prose import Passage, flat, images, links, parse, passage

OPENING = ["**You will**", "**You need**", "**Running time**"]
CLOSING = ["Summary", "Exercises", "What comes next", "Sources"]
PICTURES = {"image/png", "image/jpeg", "image/svg+xml"}
LOOSE_TAGS = {
    "nbval-ignore-output",
    "nbval-raises-exception",
    "pytest-validate-ignore-output",
    "raises-exception",
}
MYST_TOKENS = {
    "colon_fence": "directive",
    "math_block_label": "equation label",
    "myst_block_break": "block break",
    "myst_line_comment": "comment",
    "myst_role": "role",
    "myst_target": "label",
    "substitution_block": "substitution",
    "substitution_inline": "substitution",
}
SHORTEST_ALT = 30
LONGEST_CELL = 25
MEDIAN_CELL = 5


@dataclass(frozen=True)
class Problem:
    """What is wrong, and in which cell; None for the notebook as a whole."""

    cell: int | None
    message: str


Rule = Callable[[Chapter], Iterator[Problem]]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Add a rule, named as its function in kebab-case."""
    RULES[function.__name__.replace("_", "-")] = function
    return function


# The whole notebook


@rule
def notebook_format(chapter: Chapter) -> Iterator[Problem]:
    """Be a valid notebook of format 4.5 or newer, with unique cell ids."""
    notebook = chapter.notebook
    minor = notebook.get("nbformat_minor", 0)
    if minor < 5:
        yield Problem(None, f"expected format 4.5 or newer, got 4.{minor}")
    for error in nbformat.validator.iter_validate(notebook):
        part, index = [*error.relative_path, None, None][:2]
        yield Problem(
            index if part == "cells" else None, f"not a valid notebook: {error.message[:200]}"
        )
    ids = [cell.get("id") for cell in chapter.cells]
    for index, cell_id in enumerate(ids):
        if cell_id and cell_id in ids[:index]:
            yield Problem(index, "an earlier cell has the same id")
    if len(chapter.cells) < 3:
        yield Problem(None, f"expected title, set-up and imports, got {len(chapter.cells)} cells")


@rule
def metadata(chapter: Chapter) -> Iterator[Problem]:
    """Keep nothing in the metadata that depends on the machine or the day."""
    found = dict(chapter.notebook.metadata)
    book = found.pop("batchnorm_book", {})
    if found != METADATA:
        yield Problem(None, f"expected the notebook metadata {METADATA}, got {found}")
    if list(book) != ["fingerprint"] or not re.fullmatch("[0-9a-f]{64}", book["fingerprint"]):
        yield Problem(None, "expected a fingerprint alone in batchnorm_book; run tools/execute.py")
    for index, cell in enumerate(chapter.cells):
        if left := VOLATILE & cell.metadata.keys():
            yield Problem(index, f"{min(left)} is stored in the metadata; run tools/execute.py")


# Stored outputs


@rule
def execution_order(chapter: Chapter) -> Iterator[Problem]:
    """Execute every code cell once, from the first to the last."""
    expected = 1
    for index, cell in chapter.code:
        count = cell.execution_count
        if cell.source.strip():
            if count != expected:
                yield Problem(index, f"expected execution count {expected}, got {count}")
            expected = (count or expected) + 1


@rule
def empty_cell(chapter: Chapter) -> Iterator[Problem]:
    """Leave no code cell empty."""
    for index, cell in chapter.code:
        if not cell.source.strip():
            yield Problem(index, "the code cell is empty; delete it")


@rule
def error_output(chapter: Chapter) -> Iterator[Problem]:
    """Store no error."""
    for index, cell in chapter.code:
        for output in cell.outputs:
            if output.output_type == "error":
                yield Problem(index, f"the cell failed with {output.ename}: {output.evalue}")


@rule
def stderr_output(chapter: Chapter) -> Iterator[Problem]:
    """Write nothing to stderr."""
    for index, cell in chapter.code:
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                yield Problem(index, f"the cell wrote to stderr: {output.text[:80]}")


@rule
def strict_output(chapter: Chapter) -> Iterator[Problem]:
    """Let every output be compared with a fresh run, or put an assert beside it."""
    for position, (index, cell) in enumerate(chapter.code, start=1):
        follower = [cell for _, cell in chapter.code[position : position + 1]]
        if "nbval-skip" in tags(cell):
            yield Problem(index, "the tag nbval-skip is not allowed: every cell is executed")
        if re.search(r"^\s*#+\s*(NBVAL|PYTEST_VALIDATE)_", cell.source, re.MULTILINE):
            yield Problem(index, "a comment steers nbval; use a tag")
        loose = LOOSE_TAGS.intersection(tags(cell))
        if loose and not any(map(has_assert, [cell, *follower])):
            message = f"tagged {min(loose)}, but no assert in it or in the next code cell"
            yield Problem(index, message)


@rule
def figure_text(chapter: Chapter) -> Iterator[Problem]:
    """Give every figure an alt text that says what it shows, and a caption."""
    for index, cell in chapter.code:
        if not any(PICTURES.intersection(output.get("data", {})) for output in cell.outputs):
            continue
        dressing = cell.metadata.get("mystnb", {})
        alt = dressing.get("image", {}).get("alt", "")
        if len(alt.strip()) < SHORTEST_ALT:
            limit = f"at least {SHORTEST_ALT} characters in mystnb.image.alt"
            yield Problem(index, f"expected an alt text of {limit}, got {alt!r}")
        if not dressing.get("figure", {}).get("caption", "").strip():
            yield Problem(index, "expected a caption in mystnb.figure.caption")


# Markdown


@rule
def markdown_image(chapter: Chapter) -> Iterator[Problem]:
    """Give every image in the text an alt text, and keep its file in the book."""
    for index, tokens in chapter.markdown:
        for alt, source in images(tokens):
            if not alt.strip():
                yield Problem(index, f"the image {source} has no alt text")
            if not source or not chapter.file(source):
                yield Problem(index, f"the image {source} is not a file of the book")


@rule
def plain_markdown(chapter: Chapter) -> Iterator[Problem]:
    """Use no MyST directive, role or label: Colab and GitHub show them raw."""
    for index, tokens in chapter.markdown:
        for token in flat(tokens):
            directive = token.type == "fence" and token.info.lstrip().startswith("{")
            if directive or token.type in MYST_TOKENS:
                kind = MYST_TOKENS.get(token.type, "directive")
                text = f"{token.info} {token.meta.get('name', '')} {token.content}".split()
                yield Problem(index, f"MyST {kind}: {' '.join(text)[:60]}")


@rule
def link_target(chapter: Chapter) -> Iterator[Problem]:
    """Link only to files of the book that exist, and to headings that are in them."""
    for index, tokens in chapter.markdown:
        for link in links(tokens):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = chapter.file(url.path)
            if not link or target is None:
                yield Problem(index, f"the link {link} leads to no file of the book")
            elif url.fragment and target.suffix in (".ipynb", ".md"):
                slugs = {heading.slug for heading in chapter.book.headings(target)}
                if unquote(url.fragment) not in slugs:
                    yield Problem(index, f"the link {link} leads to no heading of {target.name}")


@rule
def glossary_first_use(chapter: Chapter) -> Iterator[Problem]:
    """Link a word of the glossary where the chapter first uses it."""
    terms = chapter.book.glossary
    seen: set[str] = set()
    for index, block in prose(chapter):
        for match in any_of(terms).finditer(block.text):
            slug = terms[" ".join(match[1].lower().split())]
            link = unquote(block.link_around(*match.span()) or "")
            # Inside a link to elsewhere a word cannot carry its own link: its turn comes later.
            if slug in seen or (link and "glossary.md" not in link):
                continue
            seen.add(slug)
            if not link.endswith(f"glossary.md#{slug}"):
                yield Problem(index, f'first use of "{match[0]}" has no link to glossary.md#{slug}')


# The frame of a chapter


@rule
def chapter_opening(chapter: Chapter) -> Iterator[Problem]:
    """Open with title, reason, goals, needs and running time."""
    titles = [heading.cell for heading in chapter.headings if heading.level == 1]
    if titles != [0] or not chapter.cells[0].source.startswith("# "):
        yield Problem(0, f"expected the only # Title on top of cell 0, got titles in {titles}")
    pairs = pairwise(parse(chapter.cells[0].source))
    paragraphs = [text.content for mark, text in pairs if mark.type == "paragraph_open"]
    if not paragraphs or paragraphs[0].startswith("**"):
        yield Problem(0, "expected one sentence of why under the title")
    openings = [opening for text in paragraphs for opening in OPENING if text.startswith(opening)]
    if openings != OPENING:
        yield Problem(0, f"expected paragraphs that start with {OPENING}, got {openings}")


@rule
def closing_headings(chapter: Chapter) -> Iterator[Problem]:
    """Close with summary, exercises, what comes next, sources."""
    found = [heading.text for heading in chapter.headings if heading.level == 2][-len(CLOSING) :]
    if found != CLOSING:
        yield Problem(None, f"expected the last level-2 headings to be {CLOSING}, got {found}")


@rule
def setup_cell(chapter: Chapter) -> Iterator[Problem]:
    """Have the set-up cell in cell 1, the same in all notebooks."""
    cell = chapter.cells[1]
    found = setup_url_of(cell) or chapter.book.url
    if cell.cell_type != "code" or cell.source != setup_source(found):
        message = f"expected the code {setup_source(chapter.book.url)!r}, got {cell.source!r}"
        yield Problem(1, message)
    if tags(cell) != SETUP_TAGS:
        yield Problem(1, f"expected the tags {SETUP_TAGS}, got {tags(cell)}")


@rule
def setup_url(chapter: Chapter) -> Iterator[Problem]:
    """Install from the repository of the book."""
    found = setup_url_of(chapter.cells[1])
    if found and found != chapter.book.url:
        yield Problem(1, f"installs from {found}, but repository.url is {chapter.book.url}")


@rule
def import_cell(chapter: Chapter) -> Iterator[Problem]:
    """Keep all imports in cell 2."""
    if chapter.cells[2].cell_type != "code" or not imports(chapter.cells[2]):
        yield Problem(2, "expected the import cell")
    for index, cell in chapter.code:
        if index > 2 and imports(cell):
            yield Problem(index, f"{imports(cell)[0]}: belongs in cell 2, with all imports")


@rule
def lecture_claims(chapter: Chapter) -> Iterator[Problem]:
    """Tag, once, each claim of the lecture that the chapter owns."""
    known = {claim.tag for claim in CLAIMS}
    found: set[str] = set()
    for index, cell in enumerate(chapter.cells):
        for tag in tags(cell):
            if tag.startswith("lecture-") and tag not in known:
                yield Problem(index, f"{tag}: the lecture has no such claim")
            if tag in found and tag in known:
                yield Problem(index, f"{tag} is on an earlier cell already")
            found.add(tag)
    for claim in CLAIMS:
        if chapter.number in claim.chapters and claim.tag not in found:
            yield Problem(None, f"no cell is tagged {claim.tag} ({claim.title})")


@rule
def cell_length(chapter: Chapter) -> Iterator[Problem]:
    """Keep code cells small; set-up and solutions are not counted."""
    lengths = []
    for index, cell in chapter.code:
        if not {"setup", "solution"}.intersection(tags(cell)):
            lengths.append(sum(1 for line in cell.source.splitlines() if line.strip()))
            if lengths[-1] > LONGEST_CELL:
                yield Problem(index, f"{lengths[-1]} lines of code; at most {LONGEST_CELL}")
    if lengths and median(lengths) > MEDIAN_CELL:
        message = f"the median code cell has {median(lengths):g} lines; at most {MEDIAN_CELL}"
        yield Problem(None, message)


# Exercises


@rule
def exercise_headings(chapter: Chapter) -> Iterator[Problem]:
    """Have two to four exercises, numbered after the chapter."""
    meant = [heading for heading in chapter.headings if heading.text.startswith("Exercise ")]
    if not 2 <= len(meant) <= 4:
        yield Problem(None, f"expected 2 to 4 exercises, got {len(meant)}")
    for position, heading in enumerate(meant, start=1):
        expected = f"Exercise {chapter.number:02}.{position}: "
        if heading.level != 3 or not heading.text.startswith(expected):
            message = f'expected "### {expected}title", got "{"#" * heading.level} {heading.text}"'
            yield Problem(heading.cell, message)


@rule
def exercise_stub(chapter: Chapter) -> Iterator[Problem]:
    """Give each exercise one stub, which runs as it stands and checks itself."""
    for number, start, cells in chapter.exercises():
        stubs = [(index, cell) for index, cell in cells if "exercise" in tags(cell)]
        if len(stubs) != 1:
            yield Problem(start, f"expected one cell tagged exercise, got {len(stubs)}")
        for index, cell in stubs:
            if not checks(cell, number):
                yield Problem(index, f'expected a call of exercises.check("{number}", ...)')
            if not output_text(cell).startswith(f"Exercise {number}: not yet"):
                yield Problem(index, f'expected an output that starts "Exercise {number}: not yet"')


@rule
def exercise_solution(chapter: Chapter) -> Iterator[Problem]:
    """Give each exercise one hidden, executed solution that passes its check."""
    for number, start, cells in chapter.exercises():
        kinds = [tag for _, cell in cells for tag in tags(cell) if tag in ("exercise", "solution")]
        if kinds.count("solution") != 1 or kinds[-1] != "solution":
            yield Problem(start, f"expected one cell tagged solution after the stub, got {kinds}")
        for index, cell in cells:
            if "solution" in tags(cell):
                for message in solution_faults(cell, number):
                    yield Problem(index, message)


def solution_faults(cell: NotebookNode, number: str) -> Iterator[str]:
    """Say what a solution lacks."""
    hidden = cell.metadata.get("jupyter", {}).get("source_hidden") is True
    if "hide-cell" not in tags(cell):
        yield "expected the tag hide-cell"
    if cell.metadata.get("cellView") != "form" or not hidden:
        yield 'expected the metadata "cellView": "form", "jupyter": {"source_hidden": true}'
    if cell.source.split("\n")[0] != f"# @title Solution {number}":
        yield f'expected the first line "# @title Solution {number}"'
    if not checks(cell, number):
        yield f'expected a call of exercises.check("{number}", ...)'
    if f"Exercise {number}: correct" not in output_text(cell):
        yield f'expected an output with "Exercise {number}: correct"'


# What the rules ask


def checks(cell: NotebookNode, number: str) -> bool:
    """Tell whether a code cell calls exercises.check with the number of the exercise."""
    return any(call.startswith(f"exercises.check({number!r}, ") for call in calls(cell))


def setup_url_of(cell: NotebookNode) -> str | None:
    """Find the address that the set-up cell installs from."""
    match = re.search(r"git\+([^\"\s]+)", cell.source)
    return match[1] if match else None


def any_of(terms: dict[str, str]) -> re.Pattern[str]:
    """Match any term as a whole word, also its plural; the longest term wins."""
    longest_first = sorted(terms, key=len, reverse=True)
    either = "|".join(re.escape(term).replace(r"\ ", r"\s+") for term in longest_first)
    return re.compile(rf"(?<![\w-])({either or '(?!)'})(?:e?s)?(?![\w-])", re.IGNORECASE)


def prose(chapter: Chapter) -> Iterator[tuple[int, Passage]]:
    """Walk through the running text between the opening and the sources."""
    section = ""
    for index, tokens in chapter.markdown:
        for before, token in pairwise(tokens):
            if before.type == "heading_open":
                section = token.content if before.tag in ("h1", "h2") else section
            elif token.type == "inline" and index > 0 and section != "Sources":
                yield index, passage(token)


def problems(chapter: Chapter) -> Iterator[str]:
    """Say each problem of a chapter in a line; in a malformed notebook look no further."""
    name = chapter.path.relative_to(chapter.book.root)
    malformed = any(notebook_format(chapter))
    for rule_name, check in RULES.items():
        if malformed and check is not notebook_format:
            continue
        for problem in check(chapter):
            where = f"{name}:"
            if problem.cell is not None:
                cell_id = chapter.cells[problem.cell].get("id", "no id")
                where += f" cell {problem.cell} ({cell_id}):"
            yield f"{where} [{rule_name}] {' '.join(problem.message.split())}"


def main(arguments: list[str] | None = None) -> None:
    """Check notebooks; exit with 1 if there is a problem."""
    parser = argparse.ArgumentParser(description="Check that chapters keep the rules of the book.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: chapters/*.ipynb")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of the book")
    options = parser.parse_args(arguments)

    try:
        book = Book(options.root)
        paths = options.notebooks or find_notebooks(book.root)
        chapters = [Chapter(path, book) for path in paths]
        found = [line for chapter in chapters for line in problems(chapter)]
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if not chapters:
        sys.exit(f"{book.root}: expected notebooks in chapters/, found none")
    if found:
        print("\n".join(found))
        sys.exit(1)
    cells = sum(len(chapter.cells) for chapter in chapters)
    print(f"notebooks: {len(chapters)}; cells: {cells}; rules: {len(RULES)}; problems: 0")


if __name__ == "__main__":
    main()
