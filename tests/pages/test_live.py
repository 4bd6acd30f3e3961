"""The live figures in a browser: the keyboard moves them, and their numbers are NumPy's."""

import json
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
FIGURES = sorted(file.stem for file in (ROOT / "bnlib/book/live_figures").glob("*.js"))

# What to do with each control, by its accessible name, and the parameters that it leads to.
STEPS = {
    "normalize": [
        ("slider", "batch size m", "Home ArrowRight ArrowRight ArrowRight", {"batch_size": 16}),
        ("slider", "epsilon", "End ArrowLeft", {"eps": 10**-0.5}),
        ("combobox", "node", 1, {"node": 1}),
        ("button", "Draw another batch", "Enter Space", {"draw": 2}),
        ("slider", "epsilon", "Home", {"eps": 1e-8}),
        ("slider", "batch size m", "End", {"batch_size": 512}),
    ],
    "scale_and_shift": [
        ("slider", "gamma", "Home ArrowRight", {"gamma": -3.9}),
        ("slider", "beta", "End ArrowLeft ArrowLeft", {"beta": 5.8}),
        ("combobox", "activation function", 1, {"activation": 1}),
        ("slider", "gamma", "End", {"gamma": 8.0}),
        ("combobox", "activation function", 2, {"activation": 2}),
        (
            "button",
            "Undo",
            "Enter",
            lambda data: {
                "gamma": np.sqrt(np.var(data["z"]) + 1e-5),
                "beta": np.mean(data["z"]),
            },
        ),
    ],
    "backward": [
        ("slider", "move its z by", "End", {"by": 4.0}),
        ("combobox", "example to move", 0, {"example": 0}),
        ("slider", "move its z by", "Home ArrowRight", {"by": -3.9}),
    ],
    "running": [
        ("button", "Feed a batch", "Enter Space", {"fed": 22}),
        ("slider", "momentum", "Home ArrowRight", {"momentum": 0.01}),
        ("combobox", "batches from", 0, {"source": 0}),
        ("slider", "batches fed", "End ArrowLeft", {"fed": 59}),
        ("slider", "of them in training mode", "Home ArrowRight", {"trained": 1}),
        ("slider", "momentum", "End", {"momentum": 1.0}),
    ],
    "variance": [
        ("slider", "mean", "Home ArrowRight", {"mean": 0.25}),
        ("slider", "standard deviation", "End ArrowLeft", {"std": 1.75}),
        ("slider", "mean", "End", {"mean": 7.0}),
    ],
    "training": [
        ("slider", "learning rate", "End ArrowLeft ArrowLeft", {"rate": 1.0}),
        ("combobox", "initial weights", 0, {"start": 0}),
        ("slider", "learning rate", "Home ArrowRight", {"rate": 10**-1.5}),
        ("combobox", "initial weights", 3, {"start": 3}),
    ],
    "seven": [
        ("combobox", "layer", 5, {"layer": 5}),
        ("slider", "batches fed", "Home ArrowRight", {"fed": 1}),
        ("slider", "batch size m", "End", {"size": 128}),
        ("button", "Feed a batch", "Enter Space", {"fed": 3}),
        ("combobox", "layer", 1, {"layer": 1}),
        ("slider", "batch size m", "Home ArrowRight", {"size": 4}),
    ],
    "roofline": [
        ("slider", "batch size N", "Home ArrowRight", {"batch": 1}),
        ("slider", "channels C", "End", {"channels": 11}),
        ("slider", "height = width", "Home", {"height": 1}),
        ("combobox", "number format", 1, {"format": 1}),
        ("combobox", "card", 2, {"card": 2}),
        ("slider", "batch size N", "End ArrowLeft", {"batch": 9}),
        ("slider", "height = width", "End", {"height": 224}),
    ],
    "momentum": [
        ("slider", "momentum", "ArrowRight ArrowRight", {"momentum": 0.102}),
        ("combobox", "momentum as in", 1, {"convention": 1}),
        ("slider", "batches k", "Home ArrowRight ArrowRight", {"batches": 3}),
        ("slider", "momentum", "End ArrowLeft", {"momentum": 0.999}),
        ("slider", "batches k", "End", {"batches": 500}),
        ("combobox", "momentum as in", 0, {"convention": 0}),
        ("slider", "momentum", "Home", {"momentum": 0.0}),
    ],
    "devices": [
        ("slider", "devices", "End", {"devices": 1024}),
        ("slider", "channels", "Home ArrowRight", {"channels": 32}),
        ("slider", "batch per device", "End", {"batch": 512}),
        ("slider", "bandwidth", "Home", {"bandwidth": 1}),
        ("slider", "latency", "Home", {"latency": 0.5}),
        ("slider", "devices", "Home", {"devices": 2}),
    ],
    "orders": [
        ("slider", "distance of the classes", "End ArrowLeft", {"distance": 2.9}),
        ("slider", "classes in a batch", "ArrowRight", {"together": 1}),
        ("slider", "momentum", "End", {"momentum": 1.0}),
        ("slider", "classes in a batch", "End", {"together": 3}),
        ("slider", "distance of the classes", "Home", {"distance": 0.0}),
        ("slider", "momentum", "Home ArrowRight", {"momentum": 0.02}),
    ],
    "gan": [
        ("slider", "step", "Home", {"step": 0}),
        ("slider", "step", "ArrowRight ArrowRight", {"step": 16}),
        ("slider", "step", "End ArrowLeft", {"step": 1444}),
    ],
    "classes": [
        ("slider", "share of the second", "End", {"share": 1.0}),
        ("slider", "share of the second", "ArrowLeft", {"share": 0.75}),
        ("combobox", "gamma and beta of class", 9, {"first": 9}),
        ("combobox", "mixed with class", 4, {"second": 4}),
        ("slider", "latent point", "End", {"point": 5}),
        ("combobox", "gamma and beta of class", 4, {"first": 4}),
    ],
    "truncation": [
        ("slider", "threshold", "Home", {"threshold": 0.25}),
        ("slider", "threshold", "End ArrowLeft", {"threshold": 2.25}),
        ("combobox", "statistics", 1, {"statistics": 1}),
    ],
    "companions": [
        ("button", "A: a 3", "Enter", {"beside": 0xF001}),
        ("button", "P: a 0", "Space", {"beside": 0x7001}),
        ("combobox", "mode", 1, {"mode": 1}),
        ("combobox", "mode", 0, {"mode": 0}),
        ("button", "Seven others", "Enter", lambda data: {"beside": data["draws"][0]}),
        ("button", "Seven others", "Enter Space", lambda data: {"beside": data["draws"][2]}),
    ],
    "drift": [
        ("slider", "momentum", "Home ArrowRight", {"momentum": 0.00355}),
        ("slider", "batches k", "End ArrowLeft", {"batches": 199}),
        ("slider", "drift per batch", "End", {"drift": 0.05}),
        ("slider", "momentum", "End", {"momentum": 1.0}),
        ("slider", "drift per batch", "Home ArrowRight", {"drift": 0.0025}),
        ("slider", "batches k", "Home", {"batches": 1}),
    ],
    "frozen": [
        ("slider", "multiply z by", "End", {"scale": 4.0}),
        ("slider", "then add", "Home ArrowRight", {"shift": -3.9}),
        ("slider", "epsilon", "End ArrowLeft", {"eps": 0.316}),
        ("slider", "multiply z by", "Home ArrowRight", {"scale": 0.268}),
        ("slider", "then add", "End", {"shift": 4.0}),
    ],
    "apart": [
        ("slider", "distance", "Home ArrowRight", {"distance": 0.25}),
        ("combobox", "batches", 1, {"batches": 1}),
        ("slider", "distance", "End ArrowLeft", {"distance": 7.75}),
        ("combobox", "mode", 1, {"mode": 1}),
        ("combobox", "batches", 0, {"batches": 0}),
        ("combobox", "calls in a step", 2, {"order": 2}),
        ("combobox", "calls in a step", 1, {"order": 1}),
    ],
    "doctor": [
        ("slider", "momentum", "End", {"momentum": 1.0}),
        ("combobox", "its parameters", 0, {"frozen": 0}),
        ("slider", "values per channel", "Home ArrowRight", {"values": 2}),
        ("slider", "updates k", "Home ArrowRight", {"updates": 2}),
        ("slider", "momentum", "Home", {"momentum": 0.001}),
        ("combobox", "the layer is", 1, {"layer": 1}),
        ("slider", "updates k", "End", {"updates": 300}),
        ("combobox", "its parameters", 1, {"frozen": 1}),
    ],
}


def said_by_normalize(result, params):
    numbers = [params["batch_size"]]
    for part in ("before", "after"):
        numbers += [result[part][key] for key in ("mean", "var", "skewness")]
    return numbers


def said_by_scale_and_shift(result, params):
    y = result["moments"]
    return [y["mean"], np.sqrt(y["var"]), 100 * result["flat"]]


def said_by_backward(result, params):
    moved = [params["example"] + 1, params["by"]]
    return [*moved, result["others"], result["sum"], result["along"]]


def said_by_running(result, params):
    fed = params["fed"]
    return [
        *(fed, result["means"][fed - 1], result["vars"][fed - 1]),
        *(result["running"]["mean"][fed], result["running"]["var"][fed]),
        *(result["y"]["mean"], result["y"]["var"]),
    ]


def said_by_variance(result, params):
    return list(result["digits"])


def said_by_training(result, params):
    last = result["last"]
    return [params["rate"], 5 * result["block"], last["with"], last["without"]]


def said_by_seven(result, params):
    keys = ("training", "evaluation", "place")
    return [result[rule][key] for rule in ("ours", "theirs") for key in keys]


def said_by_roofline(result, params):
    return [*result["megabytes"], *result["times"], result["intensity"], 100 * result["share"]]


def said_by_momentum(result, params):
    share = result["share"]
    conventions = [share, 1 - share]
    return [*conventions, 100 * share, params["batches"], 100 * result["left"], 100 * (1 - share)]


def said_by_devices(result, params):
    layer, send = result["convolution"] + result["norm"], result["send"]
    numbers = [params["devices"], layer]
    for way in ("ring", "doubling"):
        numbers += [send + result[way], result["share"][way]]
    return numbers


def said_by_orders(result, params):
    last = [result["running"][key][-1] for key in ("mean", "var")]
    pooled = [result["pooled"][key] for key in ("mean", "var")]
    sizes = [result["size"], result["mixed"]]
    return [*sizes, *pooled, result["averaged"], len(result["means"]), *last]


def said_by_gan(result, params):
    return [params["step"], result["distance"], result["real"], *result["losses"]]


def said_by_classes(result, params):
    first, second, read = params["first"], params["second"], result["read"]
    found = [result["digit"], result["best"]]
    if first == second:
        return [params["point"], first, *found]
    shares = [first, 1 - params["share"], second, params["share"]]
    return [params["point"], *shares, *found, first, read[first], second, read[second]]


def said_by_truncation(result, params):
    return [params["threshold"], *result["both"]]


def said_by_companions(result, params):
    numbers = [] if params["mode"] == 0 and result["others"] == 0 else [result["others"]]
    for answer in ("now", "evaluation")[: 1 if params["mode"] or not result["others"] else 2]:
        for place in ("first", "second"):
            winner = result[answer][place]
            numbers += [winner, result[answer]["scores"][winner]]
    return numbers


def said_by_drift(result, params):
    numbers = [params["batches"], params["momentum"], 100 * result["left"]]
    return [*numbers, *(result[key] for key in ("start", "lag", "noise", "off", "best"))]


def said_by_frozen(result, params):
    return [
        number
        for part in (result["training"], result["frozen"])
        for number in (part["mean"], part["std"], 100 * part["passed"])
    ]


def said_by_apart(result, params):
    running, after = result["running"], result["after"]
    means = [after[kind]["mean"] for kind in ("real", "fake")]
    return [params["distance"], *means, 100 * result["share"], running["mean"], running["var"]]


def said_by_doctor(result, params):
    limits = result["limits"]
    return [
        *(100 * result["left"], 100 * limits["left"]),
        *(params["momentum"], limits["momentum"], params["values"], limits["values"]),
    ]


SAID = {
    "normalize": said_by_normalize,
    "scale_and_shift": said_by_scale_and_shift,
    "backward": said_by_backward,
    "running": said_by_running,
    "variance": said_by_variance,
    "training": said_by_training,
    "seven": said_by_seven,
    "roofline": said_by_roofline,
    "momentum": said_by_momentum,
    "devices": said_by_devices,
    "orders": said_by_orders,
    "gan": said_by_gan,
    "classes": said_by_classes,
    "truncation": said_by_truncation,
    "companions": said_by_companions,
    "drift": said_by_drift,
    "frozen": said_by_frozen,
    "apart": said_by_apart,
    "doctor": said_by_doctor,
}


def assert_says(status, expected):
    """Compare the numbers of a sentence, each to the digits that it shows."""
    shown = re.findall(r"-?\d+(?:\.\d+)?", status.replace("\u2212", "-"))
    assert len(shown) == len(expected), status
    for text, number in zip(shown, expected, strict=True):
        digits = len(text.partition(".")[2])
        assert abs(float(text) - number) <= 0.501 * 10**-digits, f"{number} in: {status}"


def test_every_figure_has_a_test_and_a_page(site):
    assert sorted(STEPS) == sorted(SAID) == FIGURES
    pages = [page for page in site.rglob("*.html") if "_static" not in page.parts]
    shown = {name for page in pages for name in re.findall(r'data-live="(\w+)"', page.read_text())}
    assert sorted(shown) == FIGURES


def test_the_keyboard_moves_the_numbers(visit, troubles, in_numpy, live):
    path, n = live
    page = visit(path)
    root, box = page.locator("[data-live]").nth(n), page.locator(".live").nth(n)
    state = json.loads(root.get_attribute("data-state"))
    name, data = state.pop("figure"), state.pop("data")
    params = {key: state[key] for key in state if key not in ("undo", "feed")}

    def check():
        expected = SAID[name](in_numpy[name](data, **params), params)
        assert_says(box.get_by_role("status").inner_text(), expected)

    check()
    for role, label, keys, change in STEPS[name]:
        picture = box.locator(".panels").inner_html()
        control = box.get_by_role(role, name=label)
        control.focus()
        if role == "combobox":  # how its keys work is the system's affair
            control.select_option(index=keys)
        else:
            for key in keys.split():
                page.keyboard.press(key)
        params |= change(data) if callable(change) else change
        check()
        assert box.locator(".panels").inner_html() != picture, f"{label} moved nothing"
    assert troubles == []


def test_tab_reaches_every_control_in_order(visit, live):
    path, n = live
    page = visit(path)
    controls = page.locator(".live").nth(n).locator("input, select, button")
    controls.first.focus()
    for i in range(controls.count()):
        assert controls.nth(i).evaluate("(control) => control === document.activeElement")
        page.keyboard.press("Tab")


def test_a_slider_says_its_value_in_words(visit, live):
    path, n = live
    page = visit(path)
    for slider in page.locator(".live").nth(n).get_by_role("slider").all():
        label = slider.locator("xpath=..")
        assert slider.get_attribute("aria-valuetext") == label.locator("b").inner_text()
