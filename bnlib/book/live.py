"""Figures that move without a kernel: one JavaScript module, in the page and in a notebook.

`show` leaves two outputs: a picture, for GitHub, paper and readers without JavaScript, and the
figure itself, which takes the picture's place where scripts run. `widget` gives the same figure
as a Jupyter widget, its parameters linked to Python both ways.
"""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from IPython.display import HTML, display
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image

from bnlib.book import figures, style

HERE = Path(__file__).parent
STILL = "A still picture: run this cell, or read the book online, to move the sliders."


def script(name: str) -> str:
    """Return the JavaScript of one figure: the frame, then the figure's own file.

    Raises ValueError with the known names if there is no such figure.
    """
    file = HERE / "live_figures" / f"{name}.js"
    if not file.exists():
        known = sorted(path.stem for path in file.parent.glob("*.js"))
        raise ValueError(f"expected one of {', '.join(known)}, got {name!r}")
    return (HERE / "live.js").read_text("utf-8") + file.read_text("utf-8")


def stylesheet() -> str:
    """Return the CSS of the frame, with the book's colours for both themes."""
    light, dark = (
        " ".join(f"--live-{thing}: {pair[i]};" for thing, pair in style.COLORS.items())
        for i in (0, 1)
    )
    css = (HERE / "live.css").read_text("utf-8")
    return css.replace("/* light */", light).replace("/* dark */", dark)


def fragment(name: str, data: dict[str, Any], **params: float) -> str:
    """Return the HTML of a live figure: its style, state and script, with nothing to fetch.

    data: what the figure computes from, as JSON can hold it; params: a value for each control.
    Raises ValueError if there is no such figure.
    """
    code = script(name)
    state = json.dumps({"figure": name, "data": data, **params}, separators=(",", ":"))
    return (
        f"<style>{stylesheet()}</style>"
        f'<div data-live="{name}" data-state="{html.escape(state)}">'
        f'<p class="still">{STILL}</p></div>'
        f'<script type="module">{code}'
        f"document.querySelectorAll('[data-live={name}]:not([data-mounted])').forEach(mount);"
        "</script>"
    )


def pixels(image: ArrayLike) -> str:
    """Return a small picture for a live figure: a digit per pixel, 0 for paper to 9 for ink.

    image: shape (2n, 2n), values from 0 to 1; each digit is the mean of four of its pixels.
    """
    image = np.asarray(image)
    half = len(image) // 2
    coarse = image.reshape(half, 2, half, 2).mean(axis=(1, 3))
    return "".join(f"{9 * value:.0f}" for value in coarse.ravel())


def show(name: str, picture: Figure, data: dict[str, Any], **params: float) -> None:
    """Display a live figure: first its still picture, then the figure that takes its place.

    picture: the same figure at its first position, drawn with matplotlib. Others: see `fragment`.
    """
    markup = fragment(name, data, **params)
    display(picture)
    display(HTML(markup))


def widget(name: str, data: dict[str, Any], **params: float) -> Any:
    """Return the figure as a Jupyter widget: each parameter is a trait, linked both ways.

    Needs a running kernel and anywidget (`pip install anywidget`). Arguments: see `fragment`.
    """
    import anywidget
    import traitlets

    synced = {"figure": name, "data": data, **params}
    traits: dict[str, Any] = {
        key: traitlets.Any(value).tag(sync=True) for key, value in synced.items()
    }
    code = script(name) + "export default { render };"
    return type(
        "LiveFigure", (anywidget.AnyWidget,), {"_esm": code, "_css": stylesheet(), **traits}
    )()


def sheet(frames: ArrayLike, columns: int) -> dict[str, Any]:
    """Pack frames of digits into one picture, of which a figure shows one at a time.

    frames: shape (frames, n, 28, 28) or (frames, n, 1, 28, 28), -1 for paper and 1 for ink; each
    becomes a sheet of `figures.tiles`. Returns what `digits` in live.js takes: "href", a PNG of 16
    greys with the frames below each other, as a data URL; their number "frames"; and "width" and
    "height" of one of them.
    """
    sheets = np.stack([figures.tiles(frame, columns) for frame in np.asarray(frames)])
    grey = int(figures.GAP[1:3], 16)
    levels = np.where(np.isnan(sheets), grey / 17, 15 * (1 - sheets.clip(-1, 1)) / 2)
    image = Image.fromarray(levels.round().astype(np.uint8).reshape(-1, sheets.shape[2]))
    image.putpalette([17 * level for level in range(16) for _ in range(3)])
    file = io.BytesIO()
    image.save(file, "PNG", bits=4, optimize=True)
    href = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    count, height, width = sheets.shape
    return {"href": href, "frames": count, "width": width, "height": height}
