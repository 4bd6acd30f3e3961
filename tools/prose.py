"""Read Markdown as the book does: headings and their anchors, links, images, running text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin
from mdit_py_plugins.myst_role import myst_role_plugin
from mdit_py_plugins.substitution import substitution_plugin

# The syntax that Jupyter Book reads, from the same plugins: what it takes for a role is one here.
MARKDOWN = (
    MarkdownIt("commonmark")
    .enable("table")
    .use(front_matter_plugin)
    .use(myst_block_plugin)
    .use(myst_role_plugin)
    .use(dollarmath_plugin, double_inline=True)
    .use(colon_fence_plugin)
    .use(substitution_plugin)
)


@dataclass(frozen=True)
class Heading:
    """A heading: level, Markdown, anchor, and the index of its cell (0 in a .md file)."""

    level: int
    text: str
    slug: str
    cell: int


def parse(markdown: str) -> list[Token]:
    """Parse Markdown into tokens."""
    return MARKDOWN.parse(markdown)


def flat(tokens: list[Token]) -> Iterator[Token]:
    """Walk through the tokens and the inline tokens inside them."""
    for token in tokens:
        yield token
        yield from flat(token.children or [])


def headings_of(sources: list[tuple[int, str]]) -> list[Heading]:
    """List the headings of a page, given as its Markdown cells with their indices."""
    found: list[Heading] = []
    for index, source in sources:
        for opening, inline in pairwise(parse(source)):
            if opening.type == "heading_open":
                slug = slug_of(inline, {heading.slug for heading in found})
                found.append(Heading(int(opening.tag[1]), inline.content, slug, index))
    return found


def slug_of(inline: Token, taken: set[str]) -> str:
    """Name the anchor of a heading as MyST does, after GitHub: a repeated one gets a number."""
    spoken = (child for child in inline.children or [] if child.type in ("text", "code_inline"))
    title = "".join(child.content for child in spoken)
    slug = re.sub(r"[^\w\- ]", "", title.lower().replace(" ", "-"))
    repeat = 1
    while slug in taken:
        slug = f"{slug}-{repeat}"
        repeat += 1
    return slug


def links(tokens: list[Token]) -> list[str]:
    """List the targets of the links, also of those written in HTML."""
    in_markdown = [str(t.attrs["href"]) for t in flat(tokens) if t.type == "link_open"]
    in_html = [attrs["href"] for attrs in html_tags(tokens, "a") if "href" in attrs]
    return in_markdown + in_html


def images(tokens: list[Token]) -> list[tuple[str, str]]:
    """List (alt text, source) of the images, also of those written in HTML."""
    in_markdown = [(t.content, str(t.attrs["src"])) for t in flat(tokens) if t.type == "image"]
    in_html = [(tag.get("alt", ""), tag.get("src", "")) for tag in html_tags(tokens, "img")]
    return in_markdown + in_html


def html_tags(tokens: list[Token], name: str) -> list[dict[str, str]]:
    """List the attributes of the HTML tags of one name."""
    found: list[dict[str, str]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == name:
                found.append({key: value or "" for key, value in attrs})

    for token in flat(tokens):
        if token.type in ("html_block", "html_inline"):
            Tags().feed(token.content)
    return found


@dataclass(frozen=True)
class Passage:
    """The running text of a block, and the links in it as (start, end, target)."""

    text: str
    links: list[tuple[int, int, str]]

    def link_around(self, start: int, end: int) -> str | None:
        """Find the target of the link that holds the text from start to end."""
        around = (target for first, last, target in self.links if first <= start and end <= last)
        return next(around, None)


def passage(inline: Token) -> Passage:
    """Read a block as a person does: code, formulas and pictures leave a gap."""
    text, found = "", []
    start, target = 0, ""
    for child in inline.children or []:
        if child.type == "text":
            text += child.content
        elif child.type in ("softbreak", "hardbreak"):
            text += " "
        elif child.type == "link_open":
            start, target = len(text), str(child.attrs["href"])
        elif child.type == "link_close":
            found.append((start, len(text), target))
        elif child.content and child.type != "html_inline":
            text += "\N{OBJECT REPLACEMENT CHARACTER}"
    return Passage(text, found)
