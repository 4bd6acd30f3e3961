"""The untrained network of chapter 1, for the chapters that go on with its values."""

import numpy as np
from numpy.typing import NDArray


def pre_activations(images: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return z of the second hidden layer, shape (n, 10), for images of shape (n, 28, 28).

    784 inputs, 20 and 10 nodes, ReLU between them, no biases; random weights from a fixed seed.
    """
    rng = np.random.default_rng(2)
    W1 = rng.normal(0, np.sqrt(2 / 784), (784, 20))
    W2 = rng.normal(0, np.sqrt(2 / 20), (20, 10))
    z: NDArray[np.float64] = np.maximum(images.reshape(len(images), 784) @ W1, 0) @ W2
    return z
