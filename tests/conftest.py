"""What NumPy computes for the live figures, for the tests with and without a browser."""

import numpy as np
import pytest

from bnlib.scratch import functional

EPS = 1e-5


def moments(values):
    return {"mean": np.mean(values), "var": np.var(values)}


def skewness(values):
    centered = values - np.mean(values)
    return np.mean(centered**3) / np.var(values) ** 1.5 if np.var(values) > 0 else 0.0


def column(values):
    return np.asarray(values, dtype=float)[:, None]


def normalize(data, node, batch_size, eps, draw):
    values = np.array(data["nodes"][node]["z"])
    z = np.take(values, np.arange(draw * batch_size, (draw + 1) * batch_size), mode="wrap")
    z_hat = functional.normalize(column(z), *functional.moments(column(z)), eps=eps)[:, 0]
    return {
        "z": z,
        "zHat": z_hat,
        "range": [values.min(), values.max()],
        "before": {**moments(z), "skewness": skewness(z)},
        "after": {**moments(z_hat), "skewness": skewness(z_hat)},
    }


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


ACTIVATIONS = [  # each with its slope, divided by the largest slope
    (sigmoid, lambda y: 4 * sigmoid(y) * (1 - sigmoid(y))),
    (np.tanh, lambda y: 1 - np.tanh(y) ** 2),
    (lambda y: np.maximum(y, 0), lambda y: (y >= 0).astype(float)),
]


def scale_and_shift(data, gamma, beta, activation):
    y, cache = functional.batch_norm(column(data["z"]), [gamma], [beta], eps=EPS)
    g, slope = ACTIVATIONS[activation]
    return {
        "zHat": cache.z_hat[:, 0],
        "y": y[:, 0],
        "a": g(y[:, 0]),
        "flat": np.mean(slope(y) < 0.1),
        "moments": moments(y),
    }


def backward(data, example, by):
    def both(values):
        _, cache = functional.batch_norm(column(values), [1], [0], eps=EPS)
        dz, *_ = functional.batch_norm_backward(column(data["dy"]), cache)
        return {"zHat": cache.z_hat[:, 0], "dz": dz[:, 0]}

    moved = np.array(data["z"], dtype=float)
    moved[example] += by
    before, after = both(data["z"]), both(moved)
    change = np.abs(after["zHat"] - before["zHat"])
    return {
        "before": before,
        "after": after,
        "others": np.delete(change, example).max(),
        "sum": after["dz"].sum(),
        "along": after["dz"] @ after["zHat"],
    }


def training(data, rate, start):
    at = np.argmin(np.abs(np.log10(data["rates"]) - np.log10(rate)))
    curves = {key: np.array(data["starts"][start][key]) for key in ("with", "without")}
    ends = {key: curve[:, -5:].mean(axis=1) for key, curve in curves.items()}
    return {
        **{key: curve[at] for key, curve in curves.items()},
        **{key: data[key] for key in ("rates", "block", "cap")},
        "ends": ends,
        "last": {key: end[at] for key, end in ends.items()},
    }


@pytest.fixture(scope="session")
def in_numpy():
    """Return the functions that compute each live figure's numbers, by name."""
    return {
        "normalize": normalize,
        "scale_and_shift": scale_and_shift,
        "backward": backward,
        "training": training,
    }
