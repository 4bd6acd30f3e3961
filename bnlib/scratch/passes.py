"""The passes over memory of a batch norm, in NumPy: the core of `fast`.

An array here is (N, C, L), one block without gaps: N samples, C channels, L positions (L = 1 for
one value per node). Vectors are float64 of shape (C,). Each function reads its arrays in pieces
that stay in the processor's cache, and does all that it has to do to a piece while it is there.

Two facts carry the accuracy. The sums of x - shift and of its square do not cancel when the shift
lies near the mean, so one pass gives mean and variance. And x - hi is rounded once when hi is the
mean rounded to x's own type; what the rounding left over, lo = mean - hi, goes into the constant
of the line. Where all means lie near 0 already, both subtractions are left out: shift and hi are 0.

Source: Chan, Golub and LeVeque (1983), "Algorithms for Computing the Sample Variance", for the
shifted sums; Ioffe and Szegedy (2015), Algorithm 1 and section 3, for the rest.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from bnlib.scratch.functional import Array

CHUNK = 2**18  # values in a piece: a megabyte of float32, which stays in the cache of one core
ROW = 2**13  # values in a row of a piece, at least, and at most half a piece: NumPy likes long rows
SHORT = 16  # positions up to which a channel's sums run over the samples first
GUESSES = 16  # values of each channel that its shift is guessed from
FAR = 9  # squared distance from the mean, in variances, up to which float32 bears a shift
NEAR = 1  # the same, up to which x needs no centering

FloatType = np.dtype[np.floating]


def moments(x: Array, out: Array | None = None) -> tuple[Array, Array]:
    """Return mean and biased variance of each channel, from one pass in most cases.

    Where a shift turns out far from its mean, or squares overflow float32, the pass is run again:
    in float64, with the means just found as the shifts. out: an array whose values come later.
    """
    work, m, (shift, spread) = _working_type(x), x.size // x.shape[1], _guess(x)
    if x.dtype == work and _near(shift, spread, FAR / 4):
        shift = np.zeros_like(shift)
    for _ in range(3):
        shift = _rounded(shift, work)
        total, squares = _sums(x, shift, work, out)
        offset = total / m
        mean, var = shift + offset, np.maximum(squares / m - offset**2, 0)
        if _near(offset, var, FAR):
            break
        work, shift = np.result_type(work, np.float64), np.where(np.isfinite(mean), mean, 0)
    return mean, var


def batch_norm(x: Array, gamma: Array, beta: Array, eps: float, y: Array) -> tuple[Array, Array]:
    """Write the normalized, scaled and shifted x to y; return mean and biased variance."""
    mean, var = moments(x, y)
    inference(x, mean, var, gamma, beta, eps, y)
    return mean, var


def inference(
    x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, y: Array
) -> None:
    """Write y = (x - hi) * slope + constant: one straight line per channel."""
    work = _working_type(x)
    hi = _center(x, mean, var, work)
    slope = gamma / np.sqrt(var + eps)
    vectors = [slope, beta - (mean - hi) * slope]
    scratch = _scratch(x, work, y)
    for _, (x_piece, y_piece), k, (a, b) in _pieces([x, y], hi, vectors, work):
        room = _room(y_piece, scratch)
        z = _centered(x_piece, k, room)
        z = np.multiply(z, a, out=room)
        np.add(z, b, out=y_piece, casting="same_kind")


def batch_norm_backward(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, eps: float, dx: Array
) -> tuple[Array, Array]:
    """Write dx = ((x - hi) * b + c + dy) * a; return dgamma and dbeta.

    It is dx = gamma / std * (dy - mean(dy) - z_hat * mean(dy * z_hat)), with z_hat written out.
    """
    work, m, std = _working_type(dy, x), x.size // x.shape[1], np.sqrt(var + eps)
    dgamma, dbeta = _gradients(dy, x, mean, std, work, dx)
    hi, b = _center(x, mean, var, work), -dgamma / (m * std)
    vectors = [gamma / std, b, -dbeta / m - (mean - hi) * b]
    scratch = _scratch(x, work, dx)
    for _, (dy_piece, x_piece, dx_piece), k, (a, b, c) in _pieces([dy, x, dx], hi, vectors, work):
        room = _room(dx_piece, scratch)
        z = _centered(x_piece, k, room)
        z = np.multiply(z, b, out=room)
        z += c
        z += dy_piece
        np.multiply(z, a, out=dx_piece, casting="same_kind")
    return dgamma, dbeta


def inference_backward(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, eps: float, dx: Array
) -> tuple[Array, Array]:
    """Write dx = dy * a, since the statistics stand still; return dgamma and dbeta."""
    work, std = _working_type(dy, x), np.sqrt(var + eps)
    gradients = _gradients(dy, x, mean, std, work, dx)
    for _, (dy_piece, dx_piece), _, (a,) in _pieces([dy, dx], None, [gamma / std], work):
        np.multiply(dy_piece, a, out=dx_piece, casting="same_kind")
    return gradients


def _sums(x: Array, shift: Array, work: FloatType, out: Array | None) -> tuple[Array, Array]:
    """Return the sums of x - shift and of its square over each channel."""
    total, squares = np.zeros((2, x.shape[1]))
    scratch = _scratch(x, work, out)
    for channels, (piece,), k, _ in _pieces([x], shift, [], work):
        d = _centered(piece, k, _shaped(scratch, piece))
        total[channels] += _sum(d, work)
        squares[channels] += _dot(d, d)
    return total, squares


def _gradients(
    dy: Array, x: Array, mean: Array, std: Array, work: FloatType, dx: Array
) -> tuple[Array, Array]:
    """Return dgamma and dbeta, the sums of dy * z_hat and of dy over each channel."""
    along, dbeta = np.zeros((2, x.shape[1]))
    hi, scratch = _rounded(mean, work), _scratch(x, work, dx)
    for channels, (dy_piece, x_piece), k, _ in _pieces([dy, x], hi, [], work):
        z = _centered(x_piece, k, _shaped(scratch, x_piece))
        along[channels] += _dot(dy_piece, z)
        dbeta[channels] += _sum(dy_piece, work)
    if work == np.float32 and not np.isfinite(along + dbeta).all():  # perhaps float32 overflowed
        return _gradients(dy, x, mean, std, np.dtype(np.float64), dx)
    return (along - (mean - hi) * dbeta) / std, dbeta


def _center(x: Array, mean: Array, var: Array, work: FloatType) -> Array:
    """Return hi: the means rounded to the working type, or zeros where all of them are near 0."""
    if x.dtype == work and _near(mean, var, NEAR):
        return np.zeros_like(mean)
    return _rounded(mean, work)


def _rounded(vector: Array, work: FloatType) -> Array:
    return vector.astype(work).astype(np.float64)


def _near(offset: Array, var: Array, far: float) -> bool:
    """Return whether all offsets are within sqrt(far) finite standard deviations."""
    return bool((offset**2 <= far * var).all() and var.max() < np.inf)


def _pieces(
    arrays: list[Array], shift: Array | None, vectors: list[Array], work: FloatType
) -> Iterator[tuple[slice, list[Array], Array | None, list[Array]]]:
    """Cut (N, C, L) arrays into pieces that stay in the cache; spread vectors to fit a row of them.

    Yields the piece's channels; a view of each array, shape (rows, fold, channels, positions); the
    shift, None if it is 0 everywhere, and the vectors, each with a number for every place in a row,
    shape (fold, channels, positions). NumPy walks such a row in one go; along a broadcast axis it
    would start anew at each channel. Small samples are folded, several to a row, so that rows are
    long.
    """
    N, C, L = arrays[0].shape
    positions = min(L, ROW)
    channels = min(C, CHUNK // positions)
    fold = min(N, -(-ROW // (C * L)))  # rounded up
    step = fold * max(1, CHUNK // (fold * channels * positions))
    whole = N - N % fold
    shifts = [] if shift is None or not shift.any() else [shift]
    for c in range(0, C, channels):
        for p in range(0, L, positions):
            chosen, places = slice(c, c + channels), slice(p, p + positions)
            row = (min(channels, C - c), min(positions, L - p))
            spread = [_spread(v[chosen], (fold, *row), work) for v in (*vectors, *shifts)]
            for start, stop in pairwise([*range(0, whole, step), whole, N]):
                if n := min(fold, stop - start):
                    cut = [a[start:stop, chosen, places].reshape(-1, n, *row) for a in arrays]
                    rows = [v[:n] for v in spread]
                    yield chosen, cut, rows.pop() if shifts else None, rows


def _sum(piece: Array, work: FloatType) -> Array:
    """Add up a piece over all but its channels: within a row in the working type, then float64."""
    rows, _, _, positions = piece.shape
    if positions <= SHORT:
        return _of_columns(np.ones(rows, work) @ piece.reshape(rows, -1), piece)
    sums: Array = (piece @ np.ones(positions, work)).sum(axis=(0, 1), dtype=np.float64)
    return sums


def _dot(a: Array, b: Array) -> Array:
    """Add up the products of two pieces over all but their channels."""
    rows, _, _, positions = a.shape
    if positions <= SHORT:
        return _of_columns(np.einsum("ij,ij->j", a.reshape(rows, -1), b.reshape(rows, -1)), a)
    dots: Array = (a[..., None, :] @ b[..., None]).sum(axis=(0, 1, 3, 4), dtype=np.float64)
    return dots


def _of_columns(columns: Array, piece: Array) -> Array:
    """Add up what belongs to one channel, of sums for every place in a row."""
    row = columns.reshape(piece.shape[1:])
    sums: Array = np.einsum("fcl->c", row, dtype=np.float64, casting="same_kind")
    return sums


def _guess(x: Array) -> tuple[Array, Array]:
    """Return the mean and variance of a few values per channel, from all over the batch."""
    N, _, L = x.shape
    step = np.arange(GUESSES)
    values = x[step * N // GUESSES, :, step * L // GUESSES].astype(np.float64)
    offset = values - values[0]  # exact where all values are equal
    mean = np.ones(GUESSES) @ offset / GUESSES
    return values[0] + mean, np.einsum("gc,gc->c", offset, offset) / GUESSES - mean**2


def _spread(vector: Array, shape: tuple[int, ...], work: FloatType) -> Array:
    """Write out a vector for every place in a row."""
    row = np.empty(shape, work)
    row[...] = vector.astype(work)[:, None]
    return row


def _centered(piece: Array, shift: Array | None, room: Array) -> Array:
    """Return piece - shift, written to room, or the piece itself if there is no shift."""
    return piece if shift is None else np.subtract(piece, shift, out=room)


def _scratch(x: Array, work: FloatType, out: Array | None) -> Array:
    """Return room for a piece's intermediate results: in out, if out has the working type."""
    if out is not None and out.dtype == work:
        return out.reshape(-1)
    return np.empty(min(CHUNK, x.size), work)


def _room(piece: Array, scratch: Array) -> Array:
    """Return room for the results on the way to a piece of the output: the piece, if it fits."""
    return piece if piece.dtype == scratch.dtype else _shaped(scratch, piece)


def _shaped(scratch: Array, piece: Array) -> Array:
    return scratch[: piece.size].reshape(piece.shape)


def _working_type(*arrays: Array) -> FloatType:
    """Return the type to compute in: that of the arrays, at least float32."""
    return np.result_type(np.float32, *arrays)
