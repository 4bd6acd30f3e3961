"""The passes over memory of a batch norm, compiled by Numba: the other core of `fast`.

The functions, their arrays and their vectors are those of `passes`; the loops are written out, in
memory order, and sums are kept in float64. `fast` imports this module when it is first called, if
Numba is installed. Numba keeps the machine code beside this file and makes it anew when this file
changes: so nothing here may call code of another file.

Source: see `passes`; Numba, numba.njit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from bnlib.scratch.functional import Array

FAR = 100  # as in `passes`; float64 sums bear a shift ten standard deviations from the mean
GROUP = 4  # samples that meet in registers before they go to the sums of their channels


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function, and keep its machine code where there is a folder to keep it in."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    # Sums may be reordered, as vector instructions need; NaN and infinity keep their meaning.
    options["fastmath"] = {"reassoc", "contract", "nsz"}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:
        return njit(function, **options)


@compiled
def moments(x: Array) -> tuple[Array, Array]:
    """Return mean and biased variance of each channel, from one pass in most cases."""
    C, m = x.shape[1], x.shape[0] * x.shape[2]
    mean, var = x[0, :, 0].astype(np.float64), np.empty(C)
    for _ in range(3):
        shift = np.where(np.isfinite(mean), mean, 0.0)
        total, squares = _sums(x, shift)
        near = True
        for c in range(C):
            offset = total[c] / m
            mean[c] = shift[c] + offset
            var[c] = max(squares[c] / m - offset**2, 0.0)
            near &= offset**2 <= FAR * var[c]
        if near:
            break
    return mean, var


@compiled
def batch_norm(x: Array, gamma: Array, beta: Array, eps: float, y: Array) -> tuple[Array, Array]:
    """Write the normalized, scaled and shifted x to y; return mean and biased variance."""
    mean, var = moments(x)
    inference(x, mean, var, gamma, beta, eps, y)
    return mean, var


@compiled
def inference(
    x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, y: Array
) -> None:
    """Write y = (x - hi) * slope + constant: one straight line per channel."""
    N, C, L = x.shape
    hi = mean.astype(x.dtype)
    slope, constant = np.empty_like(hi), np.empty_like(hi)
    for c in range(C):
        a = gamma[c] / np.sqrt(var[c] + eps)
        slope[c] = a
        constant[c] = beta[c] - (mean[c] - hi[c]) * a
    if L == 1:
        rows, y_rows = x.reshape(N, C), y.reshape(N, C)
        for n in range(N):
            for c in range(C):
                y_rows[n, c] = (rows[n, c] - hi[c]) * slope[c] + constant[c]
    else:
        for n in range(N):
            for c in range(C):
                k, a, b = hi[c], slope[c], constant[c]
                for i in range(L):
                    y[n, c, i] = (x[n, c, i] - k) * a + b


@compiled
def batch_norm_backward(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, eps: float, dx: Array
) -> tuple[Array, Array]:
    """Write dx = dy * a + (x - hi) * b + c; return dgamma and dbeta."""
    N, C, L = x.shape
    hi = mean.astype(x.dtype)
    dgamma, dbeta = _gradient_sums(dy, x, mean, var, eps)
    for_dy, for_x, constant = np.empty_like(hi), np.empty_like(hi), np.empty_like(hi)
    for c in range(C):
        std = np.sqrt(var[c] + eps)
        a = gamma[c] / std
        b = -a * dgamma[c] / (N * L * std)
        for_dy[c], for_x[c] = a, b
        constant[c] = -a * dbeta[c] / (N * L) - b * (mean[c] - hi[c])
    if L == 1:
        dy_rows, rows, dx_rows = dy.reshape(N, C), x.reshape(N, C), dx.reshape(N, C)
        for n in range(N):
            for c in range(C):
                z = (rows[n, c] - hi[c]) * for_x[c] + constant[c]
                dx_rows[n, c] = dy_rows[n, c] * for_dy[c] + z
    else:
        for n in range(N):
            for c in range(C):
                k, a, b, rest = hi[c], for_dy[c], for_x[c], constant[c]
                for i in range(L):
                    dx[n, c, i] = dy[n, c, i] * a + ((x[n, c, i] - k) * b + rest)
    return dgamma, dbeta


@compiled
def inference_backward(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, eps: float, dx: Array
) -> tuple[Array, Array]:
    """Write dx = dy * a, since the statistics stand still; return dgamma and dbeta."""
    dgamma, dbeta = _gradient_sums(dy, x, mean, var, eps)
    nothing = np.zeros(x.shape[1])
    inference(dy, nothing, var, gamma, nothing, eps, dx)
    return dgamma, dbeta


@compiled
def _sums(x: Array, shift: Array) -> tuple[Array, Array]:
    """Return the sums of x - shift and (x - shift)² of each channel."""
    N, C, L = x.shape
    total, squares = np.zeros(C), np.zeros(C)
    if L == 1:
        rows = x.reshape(N, C)
        whole = N - N % GROUP
        for n in range(0, whole, GROUP):
            for c in range(C):
                s, q = 0.0, 0.0
                for i in range(GROUP):
                    d = rows[n + i, c] - shift[c]
                    s += d
                    q += d * d
                total[c] += s
                squares[c] += q
        for n in range(whole, N):
            for c in range(C):
                d = rows[n, c] - shift[c]
                total[c] += d
                squares[c] += d * d
    else:
        for n in range(N):
            for c in range(C):
                k, s, q = shift[c], 0.0, 0.0
                for i in range(L):
                    d = x[n, c, i] - k
                    s += d
                    q += d * d
                total[c] += s
                squares[c] += q
    return total, squares


@compiled
def _gradient_sums(dy: Array, x: Array, mean: Array, var: Array, eps: float) -> tuple[Array, Array]:
    """Return dgamma, the sums of dy * z_hat, and dbeta, the sums of dy."""
    N, C, L = x.shape
    along, dbeta = np.zeros(C), np.zeros(C)
    if L == 1:
        dy_rows, rows = dy.reshape(N, C), x.reshape(N, C)
        whole = N - N % GROUP
        for n in range(0, whole, GROUP):
            for c in range(C):
                s, q = 0.0, 0.0
                for i in range(GROUP):
                    g = np.float64(dy_rows[n + i, c])
                    s += g
                    q += g * (rows[n + i, c] - mean[c])
                dbeta[c] += s
                along[c] += q
        for n in range(whole, N):
            for c in range(C):
                g = np.float64(dy_rows[n, c])
                dbeta[c] += g
                along[c] += g * (rows[n, c] - mean[c])
    else:
        for n in range(N):
            for c in range(C):
                k, s, q = mean[c], 0.0, 0.0
                for i in range(L):
                    g = np.float64(dy[n, c, i])
                    s += g
                    q += g * (x[n, c, i] - k)
                dbeta[c] += s
                along[c] += q
    return along / np.sqrt(var + eps), dbeta
