"""The book's look: colours that everybody can tell from the ground, in both themes."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from bnlib.book import style

GROUNDS = ("#ffffff", "#121212")  # the pages' own, light and dark


def luminance(color):
    """Return the relative luminance that WCAG 2 defines."""
    channels = np.array(to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(a, b):
    darker, lighter = sorted([luminance(a), luminance(b)])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("thing", style.COLORS)
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_a_colour_stands_out_from_the_ground(thing, theme):
    least = 4.5 if thing == "ink" else 3  # WCAG 2: text, and parts of a picture
    assert contrast(style.COLORS[thing][theme], GROUNDS[theme]) >= least


def test_each_thing_has_a_colour_of_its_own():
    for theme in (0, 1):
        assert len({pair[theme] for pair in style.COLORS.values()}) == len(style.COLORS)


def test_a_colour_is_that_of_the_light_ground():
    assert style.color("z") == style.COLORS["z"][0]


def test_an_unknown_thing_is_named_with_those_that_exist():
    with pytest.raises(KeyError, match=r"expected one of z, z_hat, .*, got 'zhat'"):
        style.color("zhat")


def test_use_sets_the_look():
    with mpl.rc_context():
        style.use()
        assert mpl.rcParams["axes.prop_cycle"].by_key()["color"][0] == style.color("z")
        assert mpl.rcParams["figure.figsize"][0] == style.WIDTH
        assert mpl.rcParams["image.cmap"] == "gray_r"
