"""Batch normalization as pure functions of NumPy arrays.

An array is (N, C), one value per example and node, or (N, C, *spatial), one map per example and
channel. Statistics are per channel: over the batch and all spatial axes. They are computed in
float64, whatever the input's type, because a float32 mean near 1e4 is already off by up to 5e-4;
results come back in the input's own type.

Source: Ioffe and Szegedy (2015), "Batch Normalization", Algorithm 1 and section 3.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating]


class Cache(NamedTuple):
    """What the forward pass keeps for the backward pass, in float64.

    z_hat: the normalized values, shaped as the input.
    std: sqrt(var + eps) per channel, shape (C,).
    gamma: the scale per channel, shape (C,).
    """

    z_hat: Array
    std: Array
    gamma: Array


def moments(x: ArrayLike) -> tuple[Array, Array]:
    """Return the mean and the biased variance of each channel.

    x: floats, shape (N, C) or (N, C, *spatial), at least one value per channel.
    Returns two float64 arrays of shape (C,). The variance divides by the number of values m,
    not by m - 1: over the batch it is the whole population.

    Raises TypeError if x does not hold floats, ValueError if it has fewer than two dimensions or
    no value at all.
    Source: Ioffe and Szegedy (2015), Algorithm 1, lines 1 and 2.
    """
    x = _floats(x, "x")
    if x.size == 0:
        raise ValueError(
            f"expected at least one value per channel, got an empty array of shape {x.shape}; "
            "an empty batch has no mean"
        )
    axes = _batch_axes(x)
    mean = x.mean(axis=axes, dtype=np.float64)
    centered = x - _per_channel(mean, x.ndim)
    var = np.square(centered).mean(axis=axes)
    return mean, var


def normalize(x: ArrayLike, mean: ArrayLike, var: ArrayLike, eps: float = 1e-5) -> Array:
    """Subtract the mean and divide by the standard deviation, channel by channel.

    x: floats, shape (N, C) or (N, C, *spatial). mean, var: shape (C,), var at least 0.
    eps: added to the variance, inside the root; above 0. Returns z_hat, shaped and typed as x.

    Raises TypeError if x does not hold floats; ValueError if it has fewer than two dimensions,
    mean or var is not of shape (C,), or eps is not above 0 and finite.
    Source: Ioffe and Szegedy (2015), Algorithm 1, line 3.
    """
    x = _floats(x, "x")
    mean = _channel_vector(mean, "mean", x)
    var = _channel_vector(var, "var", x)
    std = np.sqrt(var + _positive(eps))
    z_hat = (x - _per_channel(mean, x.ndim)) / _per_channel(std, x.ndim)
    return z_hat.astype(x.dtype)


def scale_and_shift(z_hat: ArrayLike, gamma: ArrayLike, beta: ArrayLike) -> Array:
    """Return gamma * z_hat + beta, channel by channel.

    z_hat: floats, shape (N, C) or (N, C, *spatial). gamma, beta: shape (C,).
    Returns y, shaped and typed as z_hat.

    Raises TypeError if z_hat does not hold floats; ValueError if it has fewer than two dimensions,
    or gamma or beta is not of shape (C,).
    Source: Ioffe and Szegedy (2015), Algorithm 1, line 4.
    """
    z_hat = _floats(z_hat, "z_hat")
    gamma = _channel_vector(gamma, "gamma", z_hat)
    beta = _channel_vector(beta, "beta", z_hat)
    y = _per_channel(gamma, z_hat.ndim) * z_hat + _per_channel(beta, z_hat.ndim)
    return y.astype(z_hat.dtype)


def batch_norm(
    x: ArrayLike, gamma: ArrayLike, beta: ArrayLike, eps: float = 1e-5
) -> tuple[Array, Cache]:
    """Normalize a training batch with its own statistics, then scale and shift it.

    x: floats, shape (N, C) or (N, C, *spatial). gamma, beta: shape (C,). eps: above 0, finite.
    Returns y, shaped and typed as x, and the cache for `batch_norm_backward`. An empty batch
    gives an empty y. The caller's arrays are not written to.

    Raises TypeError if x does not hold floats; ValueError if it has fewer than two dimensions,
    gamma or beta is not of shape (C,), eps is not above 0 and finite, or the batch holds exactly
    one value per channel.
    Source: Ioffe and Szegedy (2015), Algorithm 1.
    """
    x = _floats(x, "x")
    gamma = _channel_vector(gamma, "gamma", x)
    beta = _channel_vector(beta, "beta", x)
    if _values_per_channel(x) == 1:
        raise ValueError(
            f"expected more than 1 value per channel when training, got input of shape {x.shape}; "
            "a single value is its own mean, so it would always become 0: use a larger batch"
        )
    nothing = np.zeros(x.shape[1])  # an empty batch has no statistics, and nothing to normalize
    mean, var = moments(x) if x.size else (nothing, nothing)
    z_hat = normalize(x.astype(np.float64), mean, var, eps)
    y = scale_and_shift(z_hat, gamma, beta).astype(x.dtype)
    return y, Cache(z_hat, np.sqrt(var + eps), gamma)


def batch_norm_backward(dy: ArrayLike, cache: Cache) -> tuple[Array, Array, Array]:
    """Return the gradients of the loss for x, gamma and beta, in closed form.

    dy: the gradient for y, floats, shaped as y. cache: from `batch_norm`.
    Returns dx, shaped and typed as dy, and dgamma and dbeta, float64 of shape (C,).

    dx = gamma / std * (dy - mean(dy) - z_hat * mean(dy * z_hat)): dy without its average and
    without the part that points along z_hat, since a shift or a scaling of x changes nothing.

    Raises TypeError if dy does not hold floats, ValueError if its shape is not that of y.
    Source: Ioffe and Szegedy (2015), section 3, simplified as in chapter 3.
    """
    dy = _like_y(dy, cache)
    z_hat, std, gamma = cache
    axes = _batch_axes(dy)
    dbeta = dy.sum(axis=axes, dtype=np.float64)
    dgamma = (dy * z_hat).sum(axis=axes)
    m = max(_values_per_channel(dy), 1)  # empty: 0, not 0 / 0
    mean_dy = _per_channel(dbeta / m, dy.ndim)
    mean_dy_z_hat = _per_channel(dgamma / m, dy.ndim)
    rest = dy - mean_dy - z_hat * mean_dy_z_hat
    dx = _per_channel(gamma / std, dy.ndim) * rest
    return dx.astype(dy.dtype), dgamma, dbeta


def batch_norm_backward_by_graph(dy: ArrayLike, cache: Cache) -> tuple[Array, Array, Array]:
    """Return the same gradients as `batch_norm_backward`, one node of the graph at a time.

    The graph of the forward pass, read backward: x reaches y straight, through the variance and
    through the mean, and where the paths meet their shares add. Arguments, results and errors:
    see `batch_norm_backward`.
    Source: Ioffe and Szegedy (2015), section 3, the six derivatives.
    """
    dy = _like_y(dy, cache)
    z_hat, std, gamma = cache
    axes, m = _batch_axes(dy), max(_values_per_channel(dy), 1)
    std_, gamma_ = _per_channel(std, dy.ndim), _per_channel(gamma, dy.ndim)
    centered = z_hat * std_

    dbeta = dy.sum(axis=axes, dtype=np.float64)  # y = gamma * z_hat + beta
    dgamma = (dy * z_hat).sum(axis=axes)
    dz_hat = dy * gamma_
    dcentered = dz_hat / std_  # z_hat = centered / std, the straight path
    dstd = -(dz_hat * centered).sum(axis=axes) / std**2
    dvar = dstd / (2 * std)  # std = sqrt(var + eps)
    dcentered = dcentered + _per_channel(dvar, dy.ndim) * 2 * centered / m  # var = mean(centered²)
    dmean = -dcentered.sum(axis=axes)  # centered = x - mean
    dx = dcentered + _per_channel(dmean, dy.ndim) / m  # mean = sum(x) / m
    return dx.astype(dy.dtype), dgamma, dbeta


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike,
    beta: ArrayLike,
    eps: float = 1e-5,
) -> Array:
    """Normalize with given statistics, then scale and shift: a fixed straight line per channel.

    x: floats, shape (N, C) or (N, C, *spatial), of any N. mean, var, gamma, beta: shape (C,), var
    at least 0. eps: at least 0, finite; 0 is allowed, as in PyTorch, since var may be above 0
    everywhere. Returns y, shaped and typed as x: each example's y depends on that example alone.

    Raises TypeError if x does not hold floats; ValueError if it has fewer than two dimensions,
    a vector is not of shape (C,), or eps is below 0 or not finite.
    Source: Ioffe and Szegedy (2015), Algorithm 2, line 11.
    """
    x = _floats(x, "x")
    mean = _channel_vector(mean, "mean", x)
    std = np.sqrt(_channel_vector(var, "var", x) + _not_negative(eps))
    gamma = _channel_vector(gamma, "gamma", x)
    beta = _channel_vector(beta, "beta", x)
    centered = x - _per_channel(mean, x.ndim)
    y = _per_channel(gamma / std, x.ndim) * centered + _per_channel(beta, x.ndim)
    return y.astype(x.dtype)


def batch_norm_inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike,
    eps: float = 1e-5,
) -> tuple[Array, Array, Array]:
    """Return the gradients of the loss for x, gamma and beta when the statistics are given.

    dy: the gradient for y, floats, shaped as y. The others: as in `batch_norm_inference`.
    Returns dx, shaped and typed as dy, and dgamma and dbeta, float64 of shape (C,).

    dx = gamma / std * dy: the mean and the variance do not move with x, so no other path is left.

    Raises what `batch_norm_inference` raises, and ValueError if dy is not shaped as x.
    Source: the derivative of Ioffe and Szegedy (2015), Algorithm 2, line 11.
    """
    x = _floats(x, "x")
    dy = _gradient(dy, x.shape)
    mean = _channel_vector(mean, "mean", x)
    std = np.sqrt(_channel_vector(var, "var", x) + _not_negative(eps))
    gamma = _channel_vector(gamma, "gamma", x)
    z_hat = (x - _per_channel(mean, x.ndim)) / _per_channel(std, x.ndim)
    axes = _batch_axes(x)
    dx = _per_channel(gamma / std, x.ndim) * dy
    return dx.astype(dy.dtype), (dy * z_hat).sum(axis=axes), dy.sum(axis=axes, dtype=np.float64)


def update_running(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    count: int,
    momentum: float = 0.1,
) -> tuple[Array, Array]:
    """Return the running mean and variance, moved toward the statistics of a batch.

    running = (1 - momentum) * running + momentum * batch. The batch's variance comes in biased, as
    `moments` returns it, and goes in unbiased, times count / (count - 1): it estimates the variance
    of all data, of which the batch is a sample.

    running_mean, running_var, mean, var: shape (C,). count: how many values of a channel the batch
    has, N times the spatial sizes; at 0, an empty batch, nothing moves. momentum: 0 to 1, the
    weight of the batch. Returns two new arrays, each typed as its old one (floats in place of
    integers).

    Raises ValueError if the four are not vectors of one length, count is 1 or negative, or momentum
    is outside 0 to 1.
    Source: PyTorch, torch.nn.BatchNorm1d (Keras and ONNX call 1 - momentum the momentum).
    """
    vectors = [np.asarray(v) for v in (running_mean, running_var, mean, var)]
    if len({v.shape for v in vectors}) > 1 or vectors[0].ndim != 1:
        shapes = ", ".join(str(v.shape) for v in vectors)
        raise ValueError(
            f"expected running_mean, running_var, mean and var of one shape (C,), got {shapes}"
        )
    if count == 1 or count < 0:
        raise ValueError(
            f"expected more than 1 value per channel for an unbiased variance, got count {count}; "
            "it divides by count - 1: use a larger batch"
        )
    momentum = _fraction(momentum)
    old_mean, old_var, mean, var = (v.astype(np.float64) for v in vectors)
    if count:
        unbiased = var * (count / (count - 1))
        old_mean = (1 - momentum) * old_mean + momentum * mean
        old_var = (1 - momentum) * old_var + momentum * unbiased
    return old_mean.astype(_float_type(running_mean)), old_var.astype(_float_type(running_var))


def _batch_axes(x: Array) -> tuple[int, ...]:
    """Return every axis but the channel's."""
    return (0, *range(2, x.ndim))


def _values_per_channel(x: Array) -> int:
    """Return m, how many values the statistics of one channel are taken over."""
    return math.prod((x.shape[0], *x.shape[2:]))


def _per_channel(vector: Array, ndim: int) -> Array:
    """Shape a (C,) vector so that it broadcasts along the channel axis of an ndim-array."""
    return vector.reshape(1, -1, *(1,) * (ndim - 2))


def _floats(x: ArrayLike, name: str) -> Array:
    x = np.asarray(x)
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(
            f"expected {name} to hold floats, got {x.dtype}; convert it, "
            f"for example {name}.astype(numpy.float32)"
        )
    if x.ndim < 2:
        raise ValueError(
            f"expected 2 or more dimensions, (N, C) or (N, C, *spatial), got shape {x.shape}; "
            f"for one node write {name}.reshape(-1, 1)"
        )
    return x


def _channel_vector(vector: ArrayLike, name: str, x: Array) -> Array:
    vector = np.array(vector, dtype=np.float64)  # a copy: the cache keeps it
    if vector.shape != (x.shape[1],):
        raise ValueError(
            f"expected {name} of shape ({x.shape[1]},), one number per channel of an input of "
            f"shape {x.shape}, got shape {vector.shape}"
        )
    return vector


def _float_type(vector: ArrayLike) -> np.dtype[np.floating]:
    return np.result_type(np.asarray(vector), np.float16)  # float16 is below every other float


def _positive(eps: float) -> float:
    if not (np.isfinite(eps) and eps > 0):
        raise ValueError(
            f"expected eps above 0 and finite, got {eps}; without it a channel whose values are "
            "all equal is divided by 0 (PyTorch uses 1e-5)"
        )
    return eps


def _not_negative(eps: float) -> float:
    if not (np.isfinite(eps) and eps >= 0):
        raise ValueError(
            f"expected eps at least 0 and finite, got {eps}; it is added to a variance "
            "(PyTorch uses 1e-5)"
        )
    return eps


def _fraction(momentum: float) -> float:
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"expected momentum from 0 to 1, got {momentum}; it is the weight of the new batch "
            "(PyTorch uses 0.1)"
        )
    return momentum


def _like_y(dy: ArrayLike, cache: Cache) -> Array:
    return _gradient(dy, cache.z_hat.shape)


def _gradient(dy: ArrayLike, shape: tuple[int, ...]) -> Array:
    dy = _floats(dy, "dy")
    if dy.shape != shape:
        raise ValueError(
            f"expected dy shaped as the output of the forward pass, {shape}, got {dy.shape}"
        )
    return dy
