"""The passes over memory of a batch norm, in NumPy: the core of `fast`.

An array here is (N, C, L), one block without gaps: N samples, C channels, L positions (L = 1 for
one value per node). Vectors are float64 of shape (C,). Each function reads its arrays in pieces
that stay in the processor's cache, and does all that it has to do to a piece while it is there.

Two facts carry the accuracy. A sum of (x - shift)² does not cancel when the shift lies near the
mean, so one pass gives mean and variance. And x - hi loses nothing when hi is the mean rounded to
x's own type; what the rounding left over, lo = mean - hi, goes into the constant of the line.

Source: Chan, Golub and LeVeque (1983), "Algorithms for Computing the Sample Variance", for the
shifted sums; Ioffe and Szegedy (2015), Algorithm 1 and section 3, for the rest.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import DTypeLike

from bnlib.scratch.functional import Array

CHUNK = 2**17  # values in a piece: half a megabyte of float32, in the cache of one core
ROW = 2**12  # values in a row of a piece, at least: NumPy starts anew at each row
SHORT = 16  # positions up to which a channel's sums run over the samples first
GUESSES = 16  # values of a channel that its shift is guessed from
FAR = (
    4  # squared distance of a shift from the mean, in variances, at which float32 sums are too bad
)


def moments(x: Array) -> tuple[Array, Array]:
    """Return mean and biased variance of each channel, from one pass in most cases.

    A channel whose first shift was far from its mean, or whose squares overflow float32, makes the
    pass run again: in float64, with the mean just found as the shift.
    """
    work, shift = _working_type(x), _guess(x)
    for _ in range(3):
        total, squares = _sums(x, shift.astype(work), work)
        shift = shift.astype(work).astype(np.float64)
        mean, var, near = merge(shift, total, squares, x.size // x.shape[1], FAR)
        if near:
            break
        work, shift = np.result_type(work, np.float64), np.where(np.isfinite(mean), mean, 0)
    return mean, var


def batch_norm(x: Array, gamma: Array, beta: Array, eps: float, y: Array) -> tuple[Array, Array]:
    """Write the normalized, scaled and shifted x to y; return mean and biased variance."""
    mean, var = moments(x)
    inference(x, mean, var, gamma, beta, eps, y)
    return mean, var


def inference(
    x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, y: Array
) -> None:
    """Write y = (x - hi) * slope + constant: one straight line per channel."""
    work = _working_type(x)
    hi = mean.astype(work)
    vectors = [v.astype(work) for v in (hi, *line(mean - hi, var, gamma, beta, eps))]
    scratch = np.empty(CHUNK, work)
    for _, (x_piece, y_piece), (hi, slope, constant) in _pieces([x, y], vectors):
        z = np.subtract(x_piece, hi, out=_shaped(scratch, x_piece))
        np.multiply(z, slope, out=z)
        np.add(z, constant, out=y_piece, casting="same_kind")


def batch_norm_backward(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, eps: float, dx: Array
) -> tuple[Array, Array]:
    """Write dx = dy * a + (x - hi) * b + c; return dgamma and dbeta."""
    work = _working_type(dy, x)
    hi = mean.astype(work)
    lo = mean - hi
    dgamma, dbeta = _gradient_sums(dy, x, hi, lo, np.sqrt(var + eps))
    coefficients = plane(dgamma, dbeta, x.size // x.shape[1], lo, var, gamma, eps)
    vectors = [v.astype(work) for v in (hi, *coefficients)]
    scratch, more = np.empty(CHUNK, work), np.empty(CHUNK, work)
    for _, (dy_piece, x_piece, dx_piece), (hi, a, b, c) in _pieces([dy, x, dx], vectors):
        z = np.subtract(x_piece, hi, out=_shaped(scratch, x_piece))
        np.multiply(z, b, out=z)
        np.add(z, c, out=z)
        straight = np.multiply(dy_piece, a, out=_shaped(more, x_piece))
        np.add(straight, z, out=dx_piece, casting="same_kind")
    return dgamma, dbeta


def inference_backward(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, eps: float, dx: Array
) -> tuple[Array, Array]:
    """Write dx = dy * a, since the statistics stand still; return dgamma and dbeta."""
    work = _working_type(dy, x)
    hi, std = mean.astype(work), np.sqrt(var + eps)
    gradients = _gradient_sums(dy, x, hi, mean - hi, std)
    for _, (dy_piece, dx_piece), (a,) in _pieces([dy, dx], [(gamma / std).astype(work)]):
        np.multiply(dy_piece, a, out=dx_piece, casting="same_kind")
    return gradients


def merge(
    shift: Array, total: Array, squares: Array, m: int, far: float
) -> tuple[Array, Array, bool]:
    """Return mean and variance from the sums about a shift, and whether all shifts were near.

    total, squares: the sums of x - shift and (x - shift)² over m values. Not near: further from
    the mean than sqrt(far) standard deviations, or NaN or infinite.
    """
    offset = total / m
    var = squares / m - offset**2
    return shift + offset, np.maximum(var, 0), bool(np.all(offset**2 <= far * var))


def line(lo: Array, var: Array, gamma: Array, beta: Array, eps: float) -> tuple[Array, Array]:
    """Return slope and constant of y = (x - hi) * slope + constant, with lo = mean - hi."""
    slope = gamma / np.sqrt(var + eps)
    return slope, beta - lo * slope


def plane(
    dgamma: Array, dbeta: Array, m: int, lo: Array, var: Array, gamma: Array, eps: float
) -> tuple[Array, Array, Array]:
    """Return a, b, c of dx = dy * a + (x - hi) * b + c, with lo = mean - hi.

    It is dx = gamma / std * (dy - dbeta / m - z_hat * dgamma / m), sorted by dy and x.
    """
    std = np.sqrt(var + eps)
    a = gamma / std
    b = -a * dgamma / (m * std)
    return a, b, -a * dbeta / m - b * lo


def _sums(x: Array, shift: Array, work: DTypeLike) -> tuple[Array, Array]:
    """Return the sums of x - shift and (x - shift)² of each channel."""
    total, squares = np.zeros((2, x.shape[1]))
    scratch = np.empty(CHUNK, work)
    for channels, (piece,), (k,) in _pieces([x], [shift]):
        d = np.subtract(piece, k, out=_shaped(scratch, piece))
        total[channels] += _sum(d)
        squares[channels] += _dot(d, d)
    return total, squares


def _gradient_sums(dy: Array, x: Array, hi: Array, lo: Array, std: Array) -> tuple[Array, Array]:
    """Return dgamma, the sums of dy * z_hat, and dbeta, the sums of dy."""
    work = hi.dtype
    while True:
        along, dbeta = np.zeros((2, x.shape[1]))
        scratch = np.empty(CHUNK, work)
        for channels, (dy_piece, x_piece), (k,) in _pieces([dy, x], [hi.astype(work)]):
            z = np.subtract(x_piece, k, out=_shaped(scratch, x_piece))
            along[channels] += _dot(dy_piece, z)
            dbeta[channels] += _sum(dy_piece)
        if work != np.float32 or np.isfinite(along + dbeta).all():
            return (along - lo * dbeta) / std, dbeta
        work = np.dtype(np.float64)  # a product overflowed, or there is a NaN


def _pieces(
    arrays: list[Array], vectors: list[Array]
) -> Iterator[tuple[slice, list[Array], list[Array]]]:
    """Cut (N, C, L) arrays into pieces that stay in the cache; spread vectors to fit a row of them.

    Yields the piece's channels, a view of each array, shape (rows, fold, channels, positions), and
    each vector with a number for every place in a row, shape (fold, channels, positions). NumPy
    walks such a row in one run; along a broadcast axis it would start anew at each channel. Small
    samples are folded, several to a row, so that a row is long.
    """
    N, C, L = arrays[0].shape
    positions = min(L, ROW)
    channels = min(C, CHUNK // positions)
    fold = max(1, min(N, ROW // (C * L)))
    step = fold * max(1, CHUNK // (fold * channels * positions))
    whole = N - N % fold
    for c in range(0, C, channels):
        for p in range(0, L, positions):
            chosen, places = slice(c, c + channels), slice(p, p + positions)
            shape = (fold, min(channels, C - c), min(positions, L - p))
            rows = [np.broadcast_to(v[chosen, None], shape).copy() for v in vectors]
            for start, stop in pairwise([*range(0, whole, step), whole, N]):
                if n := min(fold, stop - start):
                    pieces = [
                        a[start:stop, chosen, places].reshape(-1, n, *shape[1:]) for a in arrays
                    ]
                    yield chosen, pieces, [row[:n] for row in rows]


def _sum(piece: Array) -> Array:
    """Add up a piece over all but its channels, in float64 from one row to the next."""
    rows, fold, channels, positions = piece.shape
    if positions > SHORT:
        return (piece @ np.ones(positions, piece.dtype)).sum(axis=(0, 1), dtype=np.float64)
    columns = np.ones(rows, piece.dtype) @ piece.reshape(rows, -1)
    return columns.reshape(fold, channels, positions).sum(axis=(0, 2), dtype=np.float64)


def _dot(a: Array, b: Array) -> Array:
    """Add up the products of two pieces over all but their channels."""
    rows, fold, channels, positions = a.shape
    if positions > SHORT:
        dots = (a[..., None, :] @ b[..., None])[..., 0, 0]
        return dots.sum(axis=(0, 1), dtype=np.float64)
    columns = np.einsum("ij,ij->j", a.reshape(rows, -1), b.reshape(rows, -1))
    return columns.reshape(fold, channels, positions).sum(axis=(0, 2), dtype=np.float64)


def _guess(x: Array) -> Array:
    """Return a value near each channel's mean: the mean of a few values from all over the batch."""
    N, _, L = x.shape
    spread = np.arange(GUESSES)
    values = x[spread * N // GUESSES, :, spread * L // GUESSES].astype(np.float64)
    return values[0] + (values - values[0]).mean(axis=0)  # exact where all values are equal


def _working_type(*arrays: Array) -> np.dtype[np.floating]:
    """Return the type to compute in: that of the arrays, at least float32."""
    return np.result_type(np.float32, *arrays)


def _shaped(scratch: Array, piece: Array) -> Array:
    return scratch[: piece.size].reshape(piece.shape)
