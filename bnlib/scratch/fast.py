"""The functions of `functional`, in as few passes over memory as they can be done in.

Same names, arguments, results and errors, and `out` on top: an array to write the result to, so
that no memory has to be found and cleared. The arrays of a batch norm are read faster than they are
computed with, so what counts is how often they travel: the readable version reads or writes a
batch some twenty times on the way forward, this one three times.

A call checks its arguments, views its arrays as (N, C, L) and hands them to a core: `compiled`
where Numba is installed and all arrays are float32 or all float64, `passes`, in NumPy, elsewhere.
Both keep statistics in float64 and compute elementwise in the input's own type, at least float32.
NaN and infinity stay in their channel and raise no warning.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bnlib.scratch import functional as F
from bnlib.scratch import passes
from bnlib.scratch.functional import Array

COMPILED_TYPES = frozenset(np.dtype(t) for t in (np.float32, np.float64))  # in native byte order
_wanted: bool = True


class Cache(NamedTuple):
    """What the forward pass keeps for the backward pass.

    x: the input itself, not a copy: it must not be written to before the backward pass.
    mean, var: the batch's mean and biased variance per channel, float64, shape (C,).
    gamma: the scale per channel, float64, shape (C,). eps: what was added to the variance.
    """

    x: Array
    mean: Array
    var: Array
    gamma: Array
    eps: float


@contextmanager
def use_compiled(wanted: bool) -> Iterator[None]:
    """Inside a with block, use the compiled core or do without it.

    wanted: False for NumPy alone; True, as at first, for the compiled core where it is installed.
    Holds for all threads. Raises ImportError if wanted is True and Numba is not installed.
    """
    global _wanted
    if wanted and _compiled() is None:
        raise ImportError("expected Numba, got no module of that name; pip install numba")
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def moments(x: ArrayLike) -> tuple[Array, Array]:
    """Return the mean and the biased variance of each channel, as `functional.moments` does."""
    x = F._floats(x, "x")
    if not x.size:
        return F.moments(x)  # raises
    with np.errstate(all="ignore"):
        mean, var = _core(x).moments(_block(x, *_layout(x)))
    return mean, var


def batch_norm(
    x: ArrayLike, gamma: ArrayLike, beta: ArrayLike, eps: float = 1e-5, *, out: Array | None = None
) -> tuple[Array, Cache]:
    """Normalize a training batch with its own statistics, then scale and shift it.

    Arguments, y and errors: as in `functional.batch_norm`. out: where y goes, shaped and typed as
    x, or None for a new array; it may not share memory with x, which the backward pass reads
    again. Returns y and the cache for `batch_norm_backward`.

    Raises TypeError or ValueError for an out that does not fit; then nothing is written.
    Source: Ioffe and Szegedy (2015), Algorithm 1.
    """
    x = F._floats(x, "x")
    gamma = F._channel_vector(gamma, "gamma", x)
    beta = F._channel_vector(beta, "beta", x)
    if F._values_per_channel(x) == 1:
        F.batch_norm(x, gamma, beta)  # raises
    eps = float(F._positive(eps))
    y = _result(out, x, x.dtype, [x])
    mean, var = _run("batch_norm", [x], (gamma, beta, eps), y) or np.zeros((2, x.shape[1]))
    return y, Cache(x, mean, var, gamma, eps)


def batch_norm_backward(
    dy: ArrayLike, cache: Cache, *, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return the gradients of the loss for x, gamma and beta, in closed form.

    Arguments, results and errors: as in `functional.batch_norm_backward`. out: where dx goes,
    shaped and typed as dy; it may share no memory with dy and x.

    Raises TypeError or ValueError for an out that does not fit; then nothing is written.
    Source: Ioffe and Szegedy (2015), section 3, simplified as in chapter 3.
    """
    x, mean, var, gamma, eps = cache
    dy = F._gradient(dy, x.shape)
    dx = _result(out, x, dy.dtype, [dy, x])
    gradients = _run("batch_norm_backward", [dy, x], (mean, var, gamma, eps), dx)
    dgamma, dbeta = gradients or np.zeros((2, x.shape[1]))
    return dx, dgamma, dbeta


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike,
    beta: ArrayLike,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> Array:
    """Normalize with given statistics, then scale and shift: a fixed straight line per channel.

    Arguments, y and errors: as in `functional.batch_norm_inference`. out: where y goes, shaped and
    typed as x; x itself, or an array that shares no memory with it.

    Raises TypeError or ValueError for an out that does not fit; then nothing is written.
    Source: Ioffe and Szegedy (2015), Algorithm 2, line 11.
    """
    x = F._floats(x, "x")
    mean = F._channel_vector(mean, "mean", x)
    var, eps = F._channel_vector(var, "var", x), float(F._not_negative(eps))
    gamma = F._channel_vector(gamma, "gamma", x)
    beta = F._channel_vector(beta, "beta", x)
    y = _result(out, x, x.dtype, [x], in_place=True)
    _run("inference", [x], (mean, var, gamma, beta, eps), y)
    return y


def batch_norm_inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return the gradients of the loss for x, gamma and beta when the statistics are given.

    Arguments, results and errors: as in `functional.batch_norm_inference_backward`. out: where dx
    goes, shaped and typed as dy; it may share no memory with dy and x.

    Raises TypeError or ValueError for an out that does not fit; then nothing is written.
    Source: the derivative of Ioffe and Szegedy (2015), Algorithm 2, line 11.
    """
    x = F._floats(x, "x")
    dy = F._gradient(dy, x.shape)
    mean = F._channel_vector(mean, "mean", x)
    var, eps = F._channel_vector(var, "var", x), float(F._not_negative(eps))
    gamma = F._channel_vector(gamma, "gamma", x)
    dx = _result(out, x, dy.dtype, [dy, x])
    gradients = _run("inference_backward", [dy, x], (mean, var, gamma, eps), dx)
    dgamma, dbeta = gradients or np.zeros((2, x.shape[1]))
    return dx, dgamma, dbeta


def _result(
    out: Array | None,
    x: Array,
    dtype: np.dtype[np.floating],
    inputs: Sequence[Array],
    in_place: bool = False,
) -> Array:
    """Return out if it can take a result shaped as x, or a new array.

    inputs: the arrays that out may share no memory with. in_place: out may be x itself.
    """
    if out is None:
        return np.empty_like(x, dtype)
    if not isinstance(out, np.ndarray) or out.dtype != dtype:
        raise TypeError(f"expected out to be an array of {dtype}, got {_kind(out)}")
    if out.shape != x.shape or not out.flags.writeable:
        state = "writable" if out.flags.writeable else "read-only"
        raise ValueError(f"expected a writable out of shape {x.shape}, got {out.shape}, {state}")
    if any(np.may_share_memory(out, a) for a in inputs) and not (in_place and _same(out, x)):
        raise ValueError(
            "expected out to share no memory with the input, which is read again after the first "
            "values are written; give another array, or None for a new one"
        )
    return out


def _run(step: str, arrays: list[Array], vectors: tuple[Any, ...], out: Array) -> Any:
    """Run one step of the core: read the arrays and vectors, write to out, return what it returns.

    An empty batch runs nothing and returns None.
    """
    if not out.size:
        return None
    order, shape = _layout(arrays[-1])
    *blocks, target = (_block(a, order, shape) for a in (*arrays, out))
    with np.errstate(all="ignore"):
        results = getattr(_core(*arrays), step)(*blocks, *vectors, target)
    if not np.may_share_memory(target, out):  # out lies otherwise in memory
        view = out.transpose(order)
        view[...] = target.reshape(view.shape)
    return results


def _layout(x: Array) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Return an order of x's axes in which it has no gaps, and its shape (N, C, L) in that order.

    In each order the channels are one axis: (C, N, *spatial), (N, C, *spatial) or (N, *spatial, C).
    If x has gaps in all of them it is the usual one.
    """
    N, C, *spatial = x.shape
    places = tuple(range(2, x.ndim))
    L = math.prod(spatial)
    if x.flags.c_contiguous and N > 1 and C > 1:
        return (0, 1, *places), (N, C, L)
    if x.transpose(1, 0, *places).flags.c_contiguous:
        return (1, 0, *places), (1, C, N * L)
    if x.transpose(0, *places, 1).flags.c_contiguous:
        return (0, *places, 1), (N * L, C, 1)
    return (0, 1, *places), (N, C, L)


def _block(x: Array, order: tuple[int, ...], shape: tuple[int, int, int]) -> Array:
    """View x as (N, C, L) in an order of its axes; copy it if it has gaps in that order."""
    return np.ascontiguousarray(x.transpose(order)).reshape(shape)


def _core(*arrays: Array) -> ModuleType:
    """Return the compiled core where it is wanted, installed and made for the arrays' type."""
    types = {a.dtype for a in arrays}
    if _wanted and len(types) == 1 and types <= COMPILED_TYPES:
        return _compiled() or passes
    return passes


@cache
def _compiled() -> ModuleType | None:
    """Import the compiled core, once; return None if Numba is not installed."""
    try:
        from bnlib.scratch import compiled
    except ImportError:
        return None
    return compiled


def _same(a: Array, b: Array) -> bool:
    """Return whether two arrays of one type and shape are the same places in memory."""
    start = a.__array_interface__["data"] == b.__array_interface__["data"]
    return start and a.strides == b.strides


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__
