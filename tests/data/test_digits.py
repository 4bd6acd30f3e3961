"""The digits inside the package: what they are, and that they have not changed."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bnlib import data


def test_splits_hold_every_digit_equally_often():
    for split, n in (("train", 4000), ("test", 1000)):
        images, labels = data.digits(split)
        assert images.shape == (n, 28, 28)
        assert images.dtype == np.float32
        assert labels.dtype == np.int64
        assert images.min() == 0
        assert images.max() == 1
        np.testing.assert_array_equal(np.bincount(labels), np.full(10, n // 10))


def test_arrays_are_those_of_the_recorded_checksum():
    file = Path(data.__file__).with_name("digits.npz")
    assert file.stat().st_size <= 1_000_000
    with np.load(file) as arrays:
        digest = hashlib.sha256(arrays["images"].tobytes() + arrays["labels"].tobytes())
    assert digest.hexdigest() in data.__doc__


def test_no_image_is_in_both_splits():
    train, test = (data.digits(split)[0] for split in ("train", "test"))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_each_call_gives_arrays_of_its_own():
    images, labels = data.digits("test")
    images[:], labels[:] = 0, 0
    assert data.digits("test")[0].max() == 1


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r'"train" or "test", got \'validation\''):
        data.digits("validation")


@pytest.mark.parametrize("module", ["bnlib", "bnlib.scratch.functional", "bnlib.data"])
def test_numpy_alone_is_imported(module):
    code = (
        f"import sys, {module}; heavy = {{'torch', 'matplotlib', 'IPython', 'anywidget'}}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
