"""The built book, served on loopback, and a browser that sees nothing else."""

import functools
import http.server
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]
SITE = ROOT / "_build" / "html"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = [
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def sources(toc):
    """List the documents of the table of contents, in order."""
    if isinstance(toc, list):
        return [document for entry in toc for document in sources(entry)]
    if not isinstance(toc, dict):
        return []
    own = [toc[key] for key in ("root", "file") if key in toc]
    return own + [document for value in toc.values() for document in sources(value)]


def live_figures(document):
    """Count the live figures of a document."""
    if (notebook := ROOT / f"{document}.ipynb").exists():
        return notebook.read_text("utf-8").count(r"data-live=\"")
    return (ROOT / f"{document}.md").read_text("utf-8").count("```{live}")


DOCUMENTS = sources(yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8")))
PARAMETERS = {
    "path": [f"{name}.html" for name in DOCUMENTS],
    "path_or_search": [f"{name}.html" for name in DOCUMENTS] + ["search.html?q=epsilon"],
    "chapter": [name for name in DOCUMENTS if (ROOT / f"{name}.ipynb").exists()],
    "live": [(f"{name}.html", n) for name in DOCUMENTS for n in range(live_figures(name))],
    "theme": ["light", "dark"],
}


def pytest_generate_tests(metafunc):
    """Run a test once for each page, chapter, live figure or theme that it asks for."""
    for name, values in PARAMETERS.items():
        if name in metafunc.fixturenames:
            ids = [
                value if isinstance(value, str) else "-".join(map(str, value)) for value in values
            ]
            metafunc.parametrize(name, values, ids=ids)


@pytest.fixture(scope="session")
def site():
    """Return the folder of the built book."""
    if not (SITE / "index.html").exists():
        pytest.fail(f"{SITE}/index.html is missing: run `make book` first", pytrace=False)
    return SITE


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, over connections that stay open, and prints nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def address(site):
    """Serve the book and return its address."""
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def find_chromium(bundled):
    """Return the browser to use, or None; `bundled` is where Playwright would put its own."""
    if named := os.environ.get("CHROMIUM"):
        if found := shutil.which(named):
            return found
        pytest.fail(f"expected $CHROMIUM to be a program, got {named!r}", pytrace=False)
    return next(filter(None, map(shutil.which, (*NAMES, bundled, MAC))), None)


@pytest.fixture(scope="session")
def browser():
    """Start Chromium, or say how to get it."""
    with sync_playwright() as playwright:
        program = find_chromium(playwright.chromium.executable_path)
        if program is None:
            missing = (
                "no Chromium to look at the pages with: `apt-get install chromium` (Debian), "
                "or `.venv/bin/playwright install chromium`"
            )
            if os.environ.get("REQUIRE_CHROMIUM") == "1":
                pytest.fail(missing, pytrace=False)
            pytest.skip(missing)
        yield (started := playwright.chromium.launch(executable_path=program, args=FLAGS))
        started.close()


@pytest.fixture
def troubles():
    """Collect what went wrong on the pages that a test visits."""
    return []


@pytest.fixture
def visit(browser, address, troubles):
    """Return a function that opens a page of the book as a new reader, formulas and all."""
    contexts = []

    def block(route):
        troubles.append(f"asked another host: {route.request.url}")
        route.abort()

    def visit(path, *, width=1200, theme="light", javascript=True):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, java_script_enabled=javascript
        )
        contexts.append(context)
        context.route(re.compile(f"^(?!{re.escape(address)})"), block)
        context.add_init_script(  # the theme that the reader chose the last time
            f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}');"
        )
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("requestfailed", lambda request: troubles.append(f"failed: {request.url}"))
        page.on(
            "response",
            lambda answer: answer.ok or troubles.append(f"{answer.status}: {answer.url}"),
        )
        page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and troubles.append(f"console: {message.text} ({message.location['url']})")
            ),
        )
        page.goto(address + path)
        if javascript:
            page.evaluate("Promise.all([window.MathJax?.startup?.promise, document.fonts.ready])")
        return page

    yield visit
    for context in contexts:
        context.close()
