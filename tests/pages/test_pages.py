"""Every page of the book as a reader meets it: in both themes, on a phone, without JavaScript."""

import functools
import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from axe_playwright_python.base import AXE_SCRIPT
from bs4 import BeautifulSoup

ROOT = Path(__file__).parents[2]

# Text that a reader sees, without code and without what MathJax made of the formulas.
PROSE = """() => {
  const skipped = "pre, code, script, style, mjx-container, .live";
  const walker = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  let text = "";
  while (walker.nextNode()) {
    if (!walker.currentNode.parentElement.closest(skipped)) text += walker.currentNode.data;
  }
  return text;
}"""

# Open what is folded, and wait until it has faded in.
OPEN_SOLUTIONS = """() => {
  document.querySelectorAll("article details").forEach((details) => { details.open = true; });
  return Promise.all(document.getAnimations().map((animation) => animation.finished));
}"""

# Elements that stick out of the window, unless they stand in a scroller that does not.
OUTSIDE = """() => {
  const fits = (element) => {
    const { left, right } = element.getBoundingClientRect();
    return left >= 0 && right <= window.innerWidth + 0.5;
  };
  const scrolls = (element) => /auto|scroll/.test(getComputedStyle(element).overflowX);
  const inScroller = ({ parentElement: parent }) =>
    parent !== null && ((scrolls(parent) && fits(parent)) || inScroller(parent));
  return [...document.querySelectorAll("article *")]
    .filter((element) => element.checkVisibility() && !element.closest("mjx-assistive-mml"))
    .filter((element) => !fits(element) && !inScroller(element))
    .map((element) => element.outerHTML.slice(0, 120));
}"""

# Leave one token of each colour in the code: axe spends most of its time on the others.
ONE_TOKEN_PER_COLOR = """() => {
  const seen = new Set();
  for (const token of document.querySelectorAll("pre span")) {
    const ground = token.closest(".cell_input, .cell_output, article")?.className;
    const key = `${getComputedStyle(token).color} ${ground}`;
    if (seen.has(key)) token.replaceWith(...token.childNodes);
    seen.add(key);
  }
}"""

# axe looks for imports of stylesheets in the wrong folder; no rule that runs here needs them.
AXE = "() => axe.run({ preload: false, resultTypes: ['violations'] })"


@functools.cache
def parsed(file):
    return BeautifulSoup(file.read_text("utf-8"), "html.parser")


def article(site, path):
    return parsed(site / path).select_one("article")


def test_opens_without_trouble_and_asks_nobody_else(visit, troubles, path_or_search):
    visit(path_or_search)
    assert troubles == []


def test_the_site_opens_with_the_first_page(visit):
    page = visit("index.html", javascript=False)
    page.wait_for_url("**/intro.html")


def test_the_search_finds_words_of_the_book(visit):
    page = visit("search.html?q=epsilon")
    page.locator("#search-results li a").first.wait_for()


def test_formulas_are_rendered(site, visit, path):
    page = visit(path)
    formulas = article(site, path).select(".math")
    assert page.locator("article mjx-container").count() == len(formulas)
    # An unknown command does not stop MathJax: it shows the command in red.
    wrong = page.locator("article :is(mjx-merror, mjx-container [style*='color: red'])")
    assert wrong.all_inner_texts() == []
    prose = page.evaluate(PROSE)
    assert [mark for mark in (r"\(", r"\[", "$") if mark in prose] == []


def test_fits_a_phone(visit, path_or_search):
    page = visit(path_or_search, width=375)
    page.evaluate(OPEN_SOLUTIONS)
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_is_accessible(visit, path_or_search, theme):
    # Each theme once and each width once; what surrounds the text is the same on every page.
    check_accessibility(visit, path_or_search, theme, {"light": 1200, "dark": 375}[theme])


@pytest.mark.parametrize(("shown", "width"), [("light", 375), ("dark", 1200)])
def test_the_other_widths_are_accessible(visit, shown, width):
    check_accessibility(visit, "chapters/01-normalize-a-batch.html", shown, width)


def check_accessibility(visit, path, theme, width):
    page = visit(path, theme=theme, width=width)
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    page.evaluate(OPEN_SOLUTIONS)
    page.evaluate(ONE_TOKEN_PER_COLOR)
    page.evaluate(AXE_SCRIPT)
    violations = page.evaluate(AXE)["violations"]
    found = [(rule["id"], node["html"][:200]) for rule in violations for node in rule["nodes"]]
    assert found == []


def resolves(site, path, link):
    target = urlsplit(link)
    if target.scheme or not link.strip("#"):
        return True
    file = site / path
    if target.path:  # one that starts with a slash would leave a site that is a folder of a host
        file = (file.parent / unquote(target.path)).resolve()
    if not (file.is_relative_to(site) and file.is_file()):
        return False
    return not target.fragment or bool(parsed(file).find(id=unquote(target.fragment)))


def test_links_resolve(site, path):
    elements = parsed(site / path).select("[href], [src]")
    links = [element.get("href") or element.get("src") or "" for element in elements]
    assert [link for link in links if not resolves(site, path, link)] == []


def test_pictures_are_described_and_captioned(site, path):
    body = article(site, path)
    for picture in body.select("img"):
        name = Path(urlsplit(picture["src"]).path).stem
        assert len(picture.get("alt", "").split()) > 2, f"alt text of {name}"
        assert name not in picture["alt"]
        assert picture.find_parent("figure"), f"{name} stands in no figure"
    figures = body.select("figure")
    captions = [[caption.get_text() for caption in figure("figcaption")] for figure in figures]
    assert [len(texts) for texts in captions] == [1] * len(figures)
    assert len({texts[0] for texts in captions}) == len(figures), "a caption stands twice"


def test_a_chapter_opens_in_colab_and_downloads(site, chapter):
    repository = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]
    copy = repository["url"].removeprefix("https://github.com/")
    page = parsed(site / f"{chapter}.html")
    colab = page.select_one("a[href^='https://colab.research.google.com/']")
    assert colab["href"] == (
        "https://colab.research.google.com/github/"
        f"{copy}/blob/{repository['branch']}/{chapter}.ipynb"
    )
    download = page.select_one("a.btn-download-source-button")
    notebook = site / Path(chapter).parent / download["href"]
    assert json.loads(notebook.read_text("utf-8"))["nbformat"] == 4


@pytest.mark.parametrize("javascript", [True, False], ids=["scripts", "no scripts"])
def test_a_live_figure_takes_the_place_of_its_picture(site, visit, live, javascript):
    path, n = live
    figure = article(site, path).select("[data-live]")[n].find_previous("img")
    page = visit(path, javascript=javascript)
    picture = page.locator(f"article img[alt={json.dumps(figure['alt'])}]")
    if not javascript:
        assert picture.is_visible()
        assert page.locator("article .live").count() == 0
        return
    assert not picture.is_visible()
    moving = page.locator("article .live").nth(n)
    assert moving.is_visible()
    assert moving.locator("xpath=ancestor::a").count() == 0, "a click would leave the page"
    # One figure: the picture's, with its caption below.
    assert moving.locator("xpath=ancestor::figure").locator("figcaption").count() == 1
