"""The live figures without a browser: their numbers, their HTML, and the widget."""

import base64
import copy
import html.parser
import io
import json
import re

import numpy as np
import pytest
import quickjs
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from bnlib.book import figures, live, style
from bnlib.doctor import diagnose

FIGURES = sorted(file.stem for file in (live.HERE / "live_figures").glob("*.js"))


def run(name="normalize"):
    """Return a function that calls one of a figure's functions in JavaScript."""
    engine = quickjs.Context()
    engine.eval(live.script(name))

    def call(function, *arguments):
        arguments = ", ".join(json.dumps(argument) for argument in arguments)
        return json.loads(engine.eval(f"JSON.stringify({function}({arguments}))"))

    return call


javascript = run()


def assert_equal(ours, theirs):
    """Compare two results, key by key; a sum that should be 0 may be off by rounding."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_equal(ours[key], theirs[key])
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


class TestHistogram:
    @given(
        st.lists(st.floats(-9, 9), min_size=1, max_size=60),
        st.floats(-5, 5),
        st.floats(0.01, 9),
        st.integers(1, 40),
    )
    def test_equals_numpy(self, values, low, width, bins):
        edges = np.linspace(low, low + width, bins + 1)
        for inputs in (values, edges.tolist(), np.nextafter(edges, np.inf).tolist()):
            expected, _ = np.histogram(inputs, bins, (low, low + width))
            assert javascript("histogram", inputs, low, low + width, bins) == expected.tolist()

    def test_an_edge_that_a_division_misses_counts_as_in_numpy(self):
        # 0.3 * 10 is 3, but the third edge of numpy.linspace(0, 1, 11) is a little above 0.3.
        expected, _ = np.histogram([0.3], 10, (0, 1))
        assert javascript("histogram", [0.3], 0, 1, 10) == expected.tolist()


class TestMoments:
    @pytest.mark.parametrize("size", [1, 2, 31, 500])
    def test_equal_numpy(self, size):
        values = np.random.default_rng(size).gamma(2, 3, size) - 40
        assert_equal(
            javascript("moments", values.tolist()), {"mean": values.mean(), "var": values.var()}
        )

    def test_skewness_equals_its_definition(self):
        values = np.random.default_rng(0).gamma(2, 3, 100)
        expected = np.mean((values - values.mean()) ** 3) / values.std() ** 3
        assert_equal(javascript("skewness", values.tolist()), expected)
        assert javascript("skewness", [-1, 0, 1]) == 0
        assert javascript("skewness", [2, 2, 2]) == 0  # not NaN


def draw_normalize(rng):
    nodes = [{"name": f"node {i}", "z": rng.gamma(2, 3, 50).tolist()} for i in range(3)]
    return {"nodes": nodes}, {
        "node": int(rng.integers(3)),
        "batch_size": int(2 ** rng.integers(1, 9)),  # up to more than there are
        "eps": 10 ** rng.uniform(-8, 0),
        "draw": int(rng.integers(100)),
    }


def draw_scale_and_shift(rng):
    return {"z": rng.gamma(2, 3, 32).tolist()}, {
        "gamma": rng.uniform(-4, 8),
        "beta": rng.uniform(-6, 6),
        "activation": int(rng.integers(3)),
    }


def draw_backward(rng):
    data = {"z": rng.normal(3, 2, 8).tolist(), "dy": rng.normal(size=8).tolist()}
    return data, {"example": int(rng.integers(8)), "by": rng.uniform(-4, 4)}


def draw_running(rng):
    sources = [
        {"name": n, "mean": rng.normal(2, 3, 60).tolist(), "var": rng.gamma(2, 3, 60).tolist()}
        for n in ("rest", "training")
    ]
    return {"sources": sources, "m": 64, "eps": 1e-5}, {
        "source": int(rng.integers(2)),
        "momentum": rng.uniform(0, 1),
        "fed": int(rng.integers(1, 61)),
        "trained": int(rng.integers(61)),
    }


def draw_variance(rng):
    data = {"z": rng.normal(size=200).round(5).tolist()}
    return data, {"mean": rng.uniform(0, 7), "std": rng.uniform(-3, 2)}


def draw_training(rng):
    curves = rng.uniform(0, 3, (3, 2, 7, 31)).round(3).tolist()
    starts = [{"name": f"start {i}", "with": a, "without": b} for i, (a, b) in enumerate(curves)]
    rates = (10 ** np.arange(-2, 1.5, 0.5)).tolist()
    params = {"rate": 10 ** rng.uniform(-2, 1), "start": int(rng.integers(3))}
    return {"rates": rates, "starts": starts, "block": 4, "cap": 3}, params


def draw_seven(rng):
    layers = [
        {
            "name": f"layer {i}",
            "inUse": int(rng.integers(2)),
            "inMemory": int(rng.integers(2)),
            "share": rng.uniform(0, 1),
            "start": int(rng.integers(2)),
        }
        for i in range(3)
    ]
    return {"z": rng.normal(1, 2, 50).tolist(), "layers": layers, "eps": 1e-5}, {
        "layer": int(rng.integers(3)),
        "size": int(2 ** rng.integers(1, 8)),  # up to more than there are
        "fed": int(rng.integers(61)),
    }


def draw_roofline(rng):
    cards = [
        {"name": name, "bandwidth": rng.uniform(300, 4000), "peak": rng.uniform(8, 70)}
        for name in ("T4", "A100", "H100")
    ]
    formats = [{"name": "float32", "bytes": 4}, {"name": "bfloat16", "bytes": 2}]
    data = {"cards": cards, "formats": formats, "trips": [3, 5], "operations": [9, 11]}
    return data, {
        "batch": int(rng.integers(11)),
        "channels": int(rng.integers(3, 12)),
        "height": int(rng.integers(1, 225)),
        "format": int(rng.integers(2)),
        "card": int(rng.integers(3)),
    }


def draw_momentum(rng):
    share = rng.choice([0, 1, rng.uniform(0, 1)], p=[0.05, 0.05, 0.9])
    params = {"convention": int(rng.integers(2)), "momentum": float(share)}
    return {}, {**params, "batches": int(rng.integers(1, 501))}


def draw_devices(rng):
    data = {"places": int(rng.integers(1, 900)), "speed": 10 ** rng.uniform(10, 15)}
    data["memory"] = 10 ** rng.uniform(9, 13)
    ranges = {"devices": (1, 11), "channels": (4, 12), "batch": (0, 10), "bandwidth": (0, 10)}
    params = {name: int(2 ** rng.integers(*limits)) for name, limits in ranges.items()}
    return data, {**params, "latency": 2.0 ** rng.integers(-1, 8)}


def draw_orders(rng):
    z = rng.normal(size=(10, 40)) * rng.uniform(0.1, 2) + rng.normal(size=(10, 1))
    return {"classes": z.tolist()}, {
        "together": int(rng.integers(4)),
        "distance": rng.uniform(0, 3),
        "momentum": rng.uniform(0.01, 1),
    }


def draw_gan(rng):
    steps = [4 * k * k for k in range(21)]
    numbers = {"distances": rng.uniform(1, 2000, 21).tolist(), "real": rng.uniform(1, 5)}
    losses = rng.uniform(0.2, 4, (21, 2)).tolist()
    sheet = {"frames": 21, "width": 178, "height": 118}
    return {"sheet": sheet, "steps": steps, "losses": losses, **numbers}, {
        "step": steps[rng.integers(21)]
    }


def draw_classes(rng):
    sheets = [{"frames": 145, "width": 28, "height": 28}] * 5
    data = {"sheets": sheets, "percents": rng.integers(0, 101, (5, 145, 10)).tolist()}
    first, second = (int(k) for k in rng.integers(10, size=2))
    share, point = rng.integers(5) / 4, int(rng.integers(1, 6))
    return data, {"first": first, "second": second, "share": share, "point": point}


def draw_truncation(rng):
    thresholds = [0.25 * k for k in range(1, 11)]
    sheet = {"frames": 20, "width": 178, "height": 118}
    data = {"sheet": sheet, "thresholds": thresholds}
    return data | {"distances": rng.uniform(50, 3000, (2, 10)).tolist()}, {
        "threshold": thresholds[rng.integers(10)],
        "statistics": int(rng.integers(2)),
    }


def draw_companions(rng):
    shapes = {"z": (9, 5), "gamma": 5, "beta": 5, "mean": 5, "weight": (4, 5), "bias": 4}
    data = {name: rng.normal(1, 2, shape).round(3).tolist() for name, shape in shapes.items()}
    data |= {"var": rng.gamma(2, 2, 5).tolist(), "eps": 1e-5}
    return data, {"beside": int(rng.integers(256)), "mode": int(rng.integers(2))}


def draw_drift(rng):
    data = {"noise": rng.normal(0, 0.125, 200).tolist(), "first": rng.uniform(0.5, 2), "m": 64}
    params = {"momentum": 10 ** rng.uniform(-2.5, 0), "drift": rng.uniform(0, 0.05)}
    return data, {**params, "batches": int(rng.integers(1, 201))}


def draw_frozen(rng):
    data = {"z": rng.normal(1, 2, 64).tolist(), "mean": rng.normal(), "var": rng.gamma(2, 1)}
    params = {"scale": 2 ** rng.uniform(-2, 2), "shift": rng.uniform(-4, 4)}
    data |= {"gamma": rng.uniform(0.5, 2), "beta": rng.normal()}
    return data, {**params, "eps": 10 ** rng.uniform(-5, 0)}


def draw_apart(rng):
    data = {kind: rng.normal(size=40).round(3).tolist() for kind in ("real", "fake")}
    choices = {
        name: int(rng.integers(n)) for name, n in {"batches": 2, "mode": 2, "order": 3}.items()
    }
    return data, {"distance": rng.uniform(0, 8), **choices}


def draw_doctor(rng):
    limits = {"left": rng.uniform(0.05, 0.2), "momentum": rng.uniform(0.2, 0.8), "values": 16}
    params = {name: int(rng.integers(2)) for name in ("layer", "frozen")}
    params |= {"momentum": 10 ** rng.uniform(-3, 0), "updates": int(rng.integers(1, 301))}
    return {"limits": limits}, {**params, "values": int(2 ** rng.integers(10))}


DRAW = {
    "normalize": draw_normalize,
    "scale_and_shift": draw_scale_and_shift,
    "backward": draw_backward,
    "running": draw_running,
    "variance": draw_variance,
    "training": draw_training,
    "seven": draw_seven,
    "roofline": draw_roofline,
    "momentum": draw_momentum,
    "devices": draw_devices,
    "orders": draw_orders,
    "gan": draw_gan,
    "classes": draw_classes,
    "truncation": draw_truncation,
    "companions": draw_companions,
    "drift": draw_drift,
    "frozen": draw_frozen,
    "apart": draw_apart,
    "doctor": draw_doctor,
}


def test_every_figure_is_tested(in_numpy):
    assert sorted(DRAW) == sorted(in_numpy) == FIGURES


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_computes_what_numpy_computes(in_numpy, name):
    call, rng = run(name), np.random.default_rng(0)
    for _ in range(50):
        data, params = DRAW[name](rng)
        ours = call(f"figures.{name}.compute", data, params)
        assert_equal(ours, in_numpy[name](data, **params))


def test_the_doctor_of_the_figure_is_the_doctor(in_numpy):
    limits, rng = {"left": 0.1, "momentum": 0.5, "values": 16}, np.random.default_rng(0)
    for seed in range(20):
        _, params = draw_doctor(rng)
        params["updates"] = min(params["updates"], 60)
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(3, momentum=params["momentum"], dtype=torch.float64)
        model = nn.Sequential(norm)
        for _ in range(params["updates"]):
            model(0.01 * torch.randn(64, 3, dtype=torch.float64))
        norm.requires_grad_(not params["frozen"]).train(not params["layer"])
        batch = 0.01 * torch.randn(params["values"], 3, dtype=torch.float64)
        expected = in_numpy["doctor"]({"limits": limits}, **params)["found"]
        found = diagnose(model, batch, select=expected).findings
        assert {f.slug for f in found} == {slug for slug, is_there in expected.items() if is_there}


@pytest.mark.parametrize("name", FIGURES)
def test_the_sentence_shows_no_number_that_is_none(name):
    call, rng = run(name), np.random.default_rng(1)
    for _ in range(50):
        data, params = DRAW[name](rng)
        result = call(f"figures.{name}.compute", data, params)
        sentence = call(f"figures.{name}.status", result, params)
        assert sentence.endswith(".")
        assert not re.search("NaN|Infinity|undefined|null|[\u2212-]0[.]0+\\b", sentence)


def test_an_unknown_figure_is_named_with_those_that_exist():
    expected = f"expected one of {', '.join(FIGURES)}, got 'normalise'"
    for function in (live.script, lambda name: live.fragment(name, {})):
        with pytest.raises(ValueError, match=expected):
            function("normalise")


HOSTILE = {"nodes": [{"name": "\"a\" & 'b' <c> </script> &amp; \u2212 ẑ", "z": [1.5, -2.0]}]}
PARAMS = {"node": 0, "batch_size": 2, "eps": 1e-5, "draw": 0}


class Tags(html.parser.HTMLParser):
    """Collects the tags of a document."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


class TestFragment:
    fragment = live.fragment("normalize", HOSTILE, **PARAMS)

    def test_is_the_same_each_time(self):
        assert live.fragment("normalize", copy.deepcopy(HOSTILE), **PARAMS) == self.fragment

    def test_carries_its_state_through_html(self):
        tags = Tags(self.fragment).found
        assert [tag for tag, _ in tags] == ["style", "div", "p", "script"]
        (state,) = (attributes["data-state"] for _, attributes in tags if "data-live" in attributes)
        assert json.loads(state) == {"figure": "normalize", "data": HOSTILE, **PARAMS}

    @pytest.mark.parametrize("name", FIGURES)
    def test_fetches_nothing(self, name):
        fragment = live.fragment(name, {})
        assert fragment.count("http") == fragment.count("http://www.w3.org/2000/svg") == 1
        assert not re.search(r"@import|url\(|\bsrc=|<link|import\(|fetch\(|[\"']//", fragment)

    def test_has_the_colours_of_both_themes(self):
        for light, dark in style.COLORS.values():
            assert f": {light};" in self.fragment
            assert f": {dark};" in self.fragment


def test_pixels_are_digits_of_the_mean_of_four():
    image = np.zeros((4, 4))
    image[0, 0], image[2:, 2:] = 1, 1
    assert live.pixels(image) == "2009"


def test_show_displays_the_picture_and_then_the_figure(monkeypatch):
    shown = []
    monkeypatch.setattr(live, "display", shown.append)
    picture = object()
    live.show("normalize", picture, HOSTILE, **PARAMS)
    assert shown[0] is picture
    assert shown[1].data == live.fragment("normalize", HOSTILE, **PARAMS)
    assert len(shown) == 2


def test_show_displays_nothing_if_there_is_no_such_figure(monkeypatch):
    shown = []
    monkeypatch.setattr(live, "display", shown.append)
    with pytest.raises(ValueError, match="normalise"):
        live.show("normalise", object(), {})
    assert shown == []


class TestSheet:
    frames = np.random.default_rng(0).uniform(-1, 1, (3, 5, 1, 28, 28))
    sheet = live.sheet(frames, columns=2)

    def test_holds_every_frame_to_sixteen_greys(self):
        kind, _, data = self.sheet["href"].partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            grey = np.asarray(picture.convert("L"), dtype=float)
        width, height = self.sheet["width"], self.sheet["height"]
        assert grey.shape == (self.sheet["frames"] * height, width) == (3 * 88, 58)
        for frame, shown in zip(self.frames, grey.reshape(3, height, width), strict=True):
            expected = figures.tiles(frame, 2)
            gap = np.isnan(expected)
            assert (shown[gap] == int(figures.GAP[1:3], 16)).all()
            ink = 1 - shown[~gap] / 255
            assert abs(ink - (expected[~gap] + 1) / 2).max() <= 1 / 30 + 1e-9

    def test_paper_is_white_and_ink_black(self):
        sheet = live.sheet(np.array([-1, 1.0]).repeat(784).reshape(1, 2, 28, 28), 2)
        with Image.open(io.BytesIO(base64.b64decode(sheet["href"].partition(",")[2]))) as picture:
            grey = np.asarray(picture.convert("L"))
        assert (grey[:, :28] == 255).all()
        assert (grey[:, 30:] == 0).all()


class TestWidget:
    @pytest.fixture
    def widget(self):
        return live.widget("normalize", HOSTILE, **PARAMS)

    def test_links_every_parameter_to_python(self, widget):
        ours = {"figure": "normalize", "data": HOSTILE, **PARAMS}
        assert {name: getattr(widget, name) for name in ours} == ours
        assert set(ours) <= set(widget.keys)  # what is synchronised with the page
        seen = []
        widget.observe(lambda change: seen.append(change["new"]), "batch_size")
        widget.set_state({"batch_size": 64})  # as the slider does
        assert (widget.batch_size, seen) == (64, [64])

    def test_two_widgets_move_apart(self, widget):
        other = live.widget("normalize", HOSTILE, **PARAMS)
        other.eps = 1.0
        assert widget.eps == 1e-5

    def test_is_the_module_of_the_page(self, widget):
        code, export = widget._esm.split("export default")
        assert code == live.script("normalize")
        assert export.strip() == "{ render };"
        assert quickjs.Context().eval(f"{code}; typeof render") == "function"
        assert widget._css == live.stylesheet()
