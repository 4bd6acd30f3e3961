"""What the built book needs beyond Jupyter Book: live figures on its pages, and no third party.

The directive `live` puts a live figure on a page that is not a notebook. Its argument names a
function of `bnlib.book.front`; its body is the caption.
"""

import base64
import io
from html import escape
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

from bnlib.book import front


class Live(SphinxDirective):
    """Insert a live figure; the option `alt` describes its still picture."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Return the picture, the live figure that takes its place, and the caption."""
        make = getattr(front, self.arguments[0], None)
        if make is None or "alt" not in self.options:
            raise self.error("live: expected a function of bnlib.book.front and the option :alt:")
        picture, fragment = make()
        png = io.BytesIO()
        picture.savefig(png, dpi=224)
        source = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        alt = escape(self.options["alt"])
        caption = escape(" ".join(self.content))
        html = (
            f'<figure class="cell_output"><img alt="{alt}" src="{source}">{fragment}'
            f"<figcaption><p>{caption}</p></figcaption></figure>"
        )
        return [nodes.raw("", html, format="html")]


class OneCaption(SphinxTransform):
    """Keep one caption for a live figure, that of its still picture.

    MyST-NB puts every output of a cell into a figure of its own, the HTML output too.
    """

    default_priority = 800

    def apply(self, **kwargs: Any) -> None:
        """Unwrap the figures that hold no picture."""
        for figure in list(self.document.findall(nodes.figure)):
            if figure.next_node(nodes.image) is None:
                kept = [node for node in figure.children if not isinstance(node, nodes.caption)]
                figure.replace_self(kept)


def without_thebe(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Drop the scripts of a launcher that the book does not use: one asks a foreign host."""
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in f"{script} {getattr(script, 'attributes', '')}".lower()
    ]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the parts with Sphinx."""
    app.add_directive("live", Live)
    app.add_transform(OneCaption)
    app.connect("html-page-context", without_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
