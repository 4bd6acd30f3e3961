import lecture
import pytest
from lecture import CLAIMS, page
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, writes
from notebooks import headings
from prose import links, parse

ONE = "01-normalize-a-batch.ipynb"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "chapters").mkdir()
    (tmp_path / "back").mkdir()
    return tmp_path


def write_chapter(root, name, *cells):
    (root / "chapters" / name).write_text(writes(new_notebook(cells=list(cells))))


def text(source, *tags):
    return new_markdown_cell(source, metadata={"tags": list(tags)} if tags else {})


def code(source, *tags):
    return new_code_cell(source, metadata={"tags": list(tags)})


def section(root, number):
    """Return what the page says about one claim."""
    start = page(root).split(f"\n## {number}. ")[1]
    return start.split("\n## ")[0]


def run(root, *arguments):
    lecture.main(["--root", str(root), *arguments])


def test_there_are_twenty_claims_in_order():
    assert [claim.number for claim in CLAIMS] == list(range(1, 21))


def test_every_claim_has_an_owner_that_the_book_has():
    owners = {chapter for claim in CLAIMS for chapter in claim.chapters}
    assert all(claim.chapters for claim in CLAIMS)
    assert owners == {1, 2, 4, 5, 7, 11, 12, 13, 17, 20}


def test_the_page_says_every_claim(root):
    for claim in CLAIMS:
        said = section(root, claim.number)
        assert said.startswith(f"{claim.title}\n")
        assert f"**The lecture says:** {claim.says}\n" in said
        assert f"**To be exact:** {claim.exact}\n" in said


def test_a_claim_without_a_place_names_the_chapters_to_come(root):
    assert section(root, 3).endswith("\n\nNot written yet: chapter 5.\n")
    assert section(root, 14).endswith("\n\nNot written yet: chapters 7 and 11.\n")


def test_a_claim_links_to_the_nearest_heading_above_it(root):
    write_chapter(
        root,
        ONE,
        text("# Normalize a batch"),
        text("## The mean\n\nText.\n\n### One node"),
        code("mean", "lecture-L6"),
        text("## Epsilon"),
    )
    link = f"[Normalize a batch: One node](../chapters/{ONE}#one-node)"
    assert section(root, 6).endswith(f"\n\nTaught in {link}.\n")


def test_a_claim_below_the_title_links_to_the_chapter(root):
    write_chapter(root, ONE, text("# Normalize a batch"), code("1", "lecture-L1"), text("## Next"))
    assert section(root, 1).endswith(f"\n\nTaught in [Normalize a batch](../chapters/{ONE}).\n")


def test_a_cell_with_a_heading_teaches_under_that_heading(root):
    write_chapter(
        root, ONE, text("# Title"), text("## Before"), text("## Here\n\nText.", "lecture-L5")
    )
    assert f"[Title: Here](../chapters/{ONE}#here)" in section(root, 5)


def test_repeated_headings_have_their_own_anchors(root):
    write_chapter(root, ONE, text("# T"), text("## Check"), text("## Check", "lecture-L4"))
    assert f"[T: Check](../chapters/{ONE}#check-1)" in section(root, 4)


def test_a_cell_may_teach_two_claims(root):
    write_chapter(root, ONE, text("# T"), text("## Both", "lecture-L4", "lecture-L5"))
    for number in (4, 5):
        assert f"Taught in [T: Both](../chapters/{ONE}#both)." in section(root, number)


def test_a_chapter_teaches_a_claim_where_it_comes_first(root):
    first, second = text("## First", "lecture-L4"), text("## Second", "lecture-L4")
    write_chapter(root, ONE, text("# T"), first, second)
    assert section(root, 4).endswith(f"Taught in [T: First](../chapters/{ONE}#first).\n")


def test_a_claim_lists_all_its_places_in_order_and_the_missing_ones(root):
    write_chapter(root, "12-two-modes.ipynb", text("# Two modes", "lecture-L12"))
    other = "Taught in [Two modes](../chapters/12-two-modes.ipynb). Not written yet: chapter 4.\n"
    assert section(root, 12).endswith(other)
    write_chapter(root, "04-the-layer.ipynb", text("# The layer", "lecture-L12"))
    both = "Taught in [The layer](../chapters/04-the-layer.ipynb), [Two modes]"
    assert both in section(root, 12)
    assert "Not written yet" not in section(root, 12)


def test_every_link_of_the_page_resolves(root):
    write_chapter(
        root,
        ONE,
        text("# Normalize a batch"),
        text("## The value $z_i$ of `node`, again", "lecture-L4"),
        text("## Epsilon (and why?)", "lecture-L7"),
    )
    found = [link for link in links(parse(page(root))) if "#" in link]
    slugs = {heading.slug for heading in headings(root / "chapters" / ONE)}
    assert len(found) == 2
    assert {link.split("#")[1] for link in found} <= slugs


def test_the_page_does_not_show_how_it_is_made(root):
    write_chapter(root, ONE, text("# T"), text("## A", "lecture-L4"))
    assert "lecture-L" not in page(root)
    assert "tag" not in page(root)


def test_the_command_writes_the_page_and_then_finds_it_up_to_date(root):
    run(root)
    assert (root / "back" / "lecture.md").read_text(encoding="utf-8") == page(root)
    run(root, "--check")


@pytest.mark.parametrize("before", [None, "# The lecture's claims\n"])
def test_check_says_in_one_line_that_the_page_is_out_of_date(root, before):
    target = root / "back" / "lecture.md"
    if before:
        target.write_text(before)
    with pytest.raises(SystemExit, match=r"^\S+lecture\.md is out of date: run python tools/\S+$"):
        run(root, "--check")
    assert (target.read_text() if target.exists() else None) == before


def test_a_new_place_makes_the_page_out_of_date(root):
    run(root)
    write_chapter(root, ONE, text("# T"), text("## A", "lecture-L4"))
    with pytest.raises(SystemExit, match="out of date"):
        run(root, "--check")


def test_a_broken_notebook_is_one_clear_error_and_the_page_stays(root):
    run(root)
    before = page(root)
    (root / "chapters" / ONE).write_text("{")
    with pytest.raises(SystemExit, match=f"{ONE}: expected a Jupyter notebook"):
        run(root)
    assert (root / "back" / "lecture.md").read_text(encoding="utf-8") == before
