"""What chapter 11 says of Keras holds on every backend that is installed, TensorFlow's too."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bnlib.scratch import functional

# A backend is chosen once in a process, so each one is asked in a process of its own.
QUESTIONS = """
import json, sys
import keras
import numpy as np

given = {name: np.array(value, "float32") for name, value in json.load(sys.stdin).items()}
x, new = given.pop("x"), keras.layers.BatchNormalization
to_list = lambda tensor: keras.ops.convert_to_numpy(tensor).tolist()

def after(training=True, trainable=True, silent=False):
    layer = new()
    layer.build(x.shape)
    layer.trainable = trainable
    y = layer(x) if silent else layer(x, training=training)
    return {"y": to_list(y), **{w.name: to_list(w) for w in layer.weights}}

carried = new(momentum=0.9, epsilon=1e-5)
carried.build(x.shape)
carried.set_weights(list(given.values()))
single = new()(x[:1], training=True)
answers = {
    "backend": keras.backend.backend(),
    "defaults": [carried.axis, new().epsilon, new().momentum],
    "names": [w.name for w in carried.weights],
    "training": after(),
    "evaluation": after(training=False),
    "frozen": after(trainable=False),
    "silent": after(silent=True),
    "single": to_list(single),
    "carried": to_list(carried(x, training=False)),
}
print(json.dumps(answers))
"""
RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (8, 5)).astype(np.float32)
STATE = {
    "gamma": RNG.normal(1, 0.5, 5),
    "beta": RNG.normal(0, 2, 5),
    "mean": RNG.normal(3, 1, 5),
    "var": RNG.uniform(0.01, 4, 5),
}
START = {"moving_mean": np.zeros(5), "moving_variance": np.ones(5)}
NEW = {"gamma": np.ones(5), "beta": np.zeros(5)}


@pytest.fixture(scope="module", params=["torch", "jax", "tensorflow"])
def answers(request):
    """Return what Keras's layer answers on one backend."""
    for package in ("keras", request.param):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; it is not needed to build the book")
    quiet = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    given = {"x": X.tolist(), **{name: array.tolist() for name, array in STATE.items()}}
    done = subprocess.run(
        [sys.executable, "-c", QUESTIONS],
        input=json.dumps(given),
        text=True,
        capture_output=True,
        env={**os.environ, **quiet, "KERAS_BACKEND": request.param},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["backend"] == request.param
    return found


def test_the_defaults_are_those_of_the_chapter(answers):
    assert answers["defaults"] == [-1, 1e-3, 0.99]
    assert answers["names"] == ["gamma", "beta", "moving_mean", "moving_variance"]


def test_training_normalizes_with_the_biased_variance_and_stores_it(answers):
    mean, var = functional.moments(X)
    # The variance is computed in one pass in float32, which costs a digit.
    y = functional.normalize(X.astype(float), mean, var, eps=1e-3)
    np.testing.assert_allclose(answers["training"]["y"], y, rtol=0, atol=1e-5)
    np.testing.assert_allclose(answers["training"]["moving_mean"], 0.01 * mean, rtol=1e-5)
    np.testing.assert_allclose(answers["training"]["moving_variance"], 0.99 + 0.01 * var, rtol=1e-5)
    assert abs(0.01 * var / 7).min() > 1e-4  # an unbiased variance would have been seen


@pytest.mark.parametrize("way", ["evaluation", "frozen", "silent"])
def test_these_calls_use_the_moving_statistics_and_move_nothing(answers, way):
    start = {"mean": np.zeros(5), "var": np.ones(5)}
    y = functional.batch_norm_inference(X, **start, **NEW, eps=1e-3)
    np.testing.assert_allclose(answers[way]["y"], y, rtol=1e-5)
    for name, untouched in {**NEW, **START}.items():
        np.testing.assert_array_equal(answers[way][name], untouched)


def test_a_batch_of_one_becomes_zero(answers):
    np.testing.assert_allclose(answers["single"], np.zeros((1, 5)), rtol=0, atol=1e-3)


def test_a_carried_layer_answers_as_ours(answers):
    y = functional.batch_norm_inference(X.astype(float), **STATE, eps=1e-5)
    np.testing.assert_allclose(answers["carried"], y, rtol=0, atol=1e-5 * abs(y).max())
