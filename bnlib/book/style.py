"""One look for every figure: the same colour for the same thing through the whole book.

Colours are darkened from Okabe and Ito's palette, safe for colour-blind readers (Wong, 2011,
"Points of view: Color blindness"). Each has a twin for the dark theme, used by the live figures;
pictures keep a white ground, which the book's stylesheet inverts in the dark theme.
"""

import matplotlib as mpl
from cycler import cycler
from matplotlib_inline import backend_inline

COLORS = {  # the thing: (light theme, dark theme)
    "z": ("#0072b2", "#56b4e9"),
    "z_hat": ("#c24e00", "#f0904d"),
    "y": ("#007f5f", "#3fc79a"),
    "activation": ("#95478e", "#d79bd3"),
    "gradient": ("#806000", "#dfbf52"),
    "train": ("#4b4ba6", "#a3a3f5"),
    "eval": ("#b3204d", "#ff8fa8"),
    "real": ("#006d77", "#5fc9d3"),
    "fake": ("#a8470a", "#f0a26b"),
    "ink": ("#333333", "#d5d8dc"),
    "muted": ("#767676", "#9aa0a6"),
}

WIDTH = 5.0  # inches; the book shows 112 px an inch, and a phone still about 68


def color(thing: str) -> str:
    """Return the colour of a thing, one of the keys of `COLORS`, on the light ground.

    Raises KeyError with the known names for another.
    """
    if thing not in COLORS:
        raise KeyError(f"expected one of {', '.join(COLORS)}, got {thing!r}")
    return COLORS[thing][0]


def use() -> None:
    """Set matplotlib's defaults to the book's look, in a notebook or a script."""
    ink, muted = color("ink"), color("muted")
    mpl.rcParams.update(
        {
            "figure.figsize": (WIDTH, 2.6),
            "figure.dpi": 112,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": muted,
            "axes.labelcolor": ink,
            "axes.titlesize": 10,
            "axes.titleweight": "normal",
            "axes.titlecolor": ink,
            "axes.labelsize": 10,
            "axes.prop_cycle": cycler(
                color=[color(c) for c in ("z", "z_hat", "y", "activation", "gradient")]
            ),
            "font.size": 10,
            "text.color": ink,
            "xtick.color": muted,
            "ytick.color": muted,
            "xtick.labelcolor": ink,
            "ytick.labelcolor": ink,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.8,
            "image.cmap": "gray_r",  # ink on paper
            "mathtext.fontset": "cm",
        }
    )
    # Twice the pixels for sharp text; no cropping, so that all figures keep one scale.
    backend_inline.set_matplotlib_formats("retina", bbox_inches=None)
