"""The NumPy functions against PyTorch, and against float64 where PyTorch itself is off."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnlib.scratch import functional as F

SHAPES = [
    (32, 10),
    (2, 3),
    (7, 1),
    (4, 3, 5),
    (1, 2, 6),
    (8, 4, 5, 6),
    (1, 3, 2, 2),
    (2, 3, 2, 3, 4),
]

# float64: both sides round at 1e-16 and sum a few hundred terms.
# float32: PyTorch accumulates in float32 here, ours in float64; 1e-5 is PyTorch's error.
TOLERANCE = {np.float64: {"rtol": 1e-11, "atol": 1e-11}, np.float32: {"rtol": 2e-5, "atol": 2e-5}}


def make(shape, dtype=np.float64, seed=0):
    """Return x, gamma, beta and dy with means, scales and signs far from 0 and 1."""
    rng = np.random.default_rng(seed)
    channels = shape[1]
    spread = rng.uniform(0.5, 5, channels).reshape(1, -1, *(1,) * (len(shape) - 2))
    offset = rng.uniform(-9, 9, channels).reshape(spread.shape)
    x = (spread * rng.gamma(2, size=shape) + offset).astype(dtype)
    gamma = (rng.uniform(0.5, 3, channels) * rng.choice([-1, 1], channels)).astype(dtype)
    beta = rng.normal(0, 4, channels).astype(dtype)
    dy = (3 * rng.standard_normal(shape) + 1).astype(dtype)
    return x, gamma, beta, dy


def torch_batch_norm(x, gamma, beta, dy, eps=1e-5):
    """Return y, dx, dgamma, dbeta of torch.nn.functional.batch_norm in training mode."""
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, gamma, beta)]
    y = torch.nn.functional.batch_norm(
        tensors[0], None, None, tensors[1], tensors[2], training=True, eps=eps
    )
    grads = torch.autograd.grad(y, tensors, torch.from_numpy(dy))
    return [t.detach().numpy() for t in (y, *grads)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_both_backwards_match_pytorch(shape, eps, dtype):
    x, gamma, beta, dy = make(shape, dtype)
    y, dx, dgamma, dbeta = torch_batch_norm(x, gamma, beta, dy, eps)
    ours, cache = F.batch_norm(x, gamma, beta, eps)
    close = TOLERANCE[dtype]
    np.testing.assert_allclose(ours, y, **close)
    for backward in (F.batch_norm_backward, F.batch_norm_backward_by_graph):
        ours_dx, ours_dgamma, ours_dbeta = backward(dy, cache)
        scale = np.abs(dy).max() * np.abs(gamma).max()  # dx is a difference of terms of this size
        np.testing.assert_allclose(ours_dx / scale, dx / scale, **close)
        np.testing.assert_allclose(ours_dgamma, dgamma, rtol=1e-4 if dtype == np.float32 else 1e-10)
        np.testing.assert_allclose(ours_dbeta, dbeta, rtol=1e-4 if dtype == np.float32 else 1e-10)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 6), st.integers(0, 4)).flatmap(
        lambda nc: st.lists(st.integers(1, 4), max_size=3).map(lambda rest: (*nc, *rest))
    ),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_keeps_shape_and_dtype_and_matches_pytorch(shape, dtype, seed):
    if shape[0] * int(np.prod(shape[2:])) == 1:
        return
    x, gamma, beta, dy = make(shape, dtype, seed)
    y, cache = F.batch_norm(x, gamma, beta)
    dx, dgamma, dbeta = F.batch_norm_backward(dy, cache)
    assert y.shape == dx.shape == shape
    assert y.dtype == dx.dtype == dtype
    assert dgamma.shape == dbeta.shape == (shape[1],)
    if x.size:
        wide = [a.astype(np.float64) for a in (x, gamma, beta, dy)]
        expected = torch_batch_norm(*wide)
        for ours, reference in zip((y, dx, dgamma, dbeta), expected, strict=True):
            # two nearly equal values have a variance near eps, and 1 / std magnifies rounding
            np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=2e-4)


def test_moments_are_over_all_axes_but_the_channels():
    x = make((5, 3, 4, 6))[0]
    mean, var = F.moments(x)
    var_torch, mean_torch = torch.var_mean(torch.from_numpy(x), dim=(0, 2, 3), correction=0)
    np.testing.assert_allclose(mean, mean_torch.numpy(), rtol=1e-13)
    np.testing.assert_allclose(var, var_torch.numpy(), rtol=1e-13)


def test_variance_survives_a_mean_a_million_standard_deviations_away():
    rng = np.random.default_rng(1)
    x = rng.normal(1e4, 1e-2, (1_000_000, 2)).astype(np.float32)
    mean, var = F.moments(x)
    exact_mean = x.astype(np.float64).mean(0)
    exact_var = x.astype(np.float64).var(0)
    np.testing.assert_allclose(mean, exact_mean, rtol=1e-14)
    np.testing.assert_allclose(var, exact_var, rtol=1e-10)  # reached: about 1e-13
    assert np.abs(x.mean(0) - exact_mean).max() > 1e-4  # what float32 alone would have lost
    y, _ = F.batch_norm(x, np.ones(2), np.zeros(2))
    exact = (x - exact_mean) / np.sqrt(exact_var + 1e-5)
    np.testing.assert_allclose(y, exact, atol=1e-6)


@pytest.mark.parametrize("backward", [F.batch_norm_backward, F.batch_norm_backward_by_graph])
@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 4)])
def test_gradients_match_central_differences(backward, shape):
    x, gamma, beta, dy = make(shape)
    dx, dgamma, dbeta = backward(dy, F.batch_norm(x, gamma, beta)[1])

    def loss():
        return (F.batch_norm(x, gamma, beta)[0] * dy).sum()

    for value, gradient in ((x, dx), (gamma, dgamma), (beta, dbeta)):
        for i in np.ndindex(value.shape):
            h, old = 1e-5, value[i]
            value[i] = old + h
            above = loss()
            value[i] = old - h
            below = loss()
            value[i] = old
            assert abs((above - below) / (2 * h) - gradient[i]) < 1e-7 * np.abs(gradient).max()


def test_parts_compose_to_batch_norm():
    x, gamma, beta, _ = make((16, 5, 3))
    mean, var = F.moments(x)
    parts = F.scale_and_shift(F.normalize(x, mean, var, 1e-3), gamma, beta)
    np.testing.assert_allclose(F.batch_norm(x, gamma, beta, 1e-3)[0], parts, rtol=1e-13)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (3, 2, 0)])
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(shape):
    x = np.empty(shape, np.float32)
    y, cache = F.batch_norm(x, np.ones(shape[1]), np.zeros(shape[1]))
    assert y.shape == shape
    assert y.dtype == np.float32
    for backward in (F.batch_norm_backward, F.batch_norm_backward_by_graph):
        dx, dgamma, dbeta = backward(x, cache)
        assert dx.shape == shape
        assert (dgamma == 0).all()
        assert (dbeta == 0).all()


def test_the_callers_arrays_are_not_written_to():
    arrays = make((6, 3, 2))
    for a in arrays:
        a.flags.writeable = False
    x, gamma, beta, dy = arrays
    y, cache = F.batch_norm(x, gamma, beta)
    F.batch_norm_backward(dy, cache)
    F.batch_norm_backward_by_graph(dy, cache)
    F.normalize(x, *F.moments(x))
    assert not any(np.shares_memory(y, a) for a in arrays)


def test_the_cache_does_not_change_with_the_callers_arrays():
    x, gamma, beta, dy = make((6, 3))
    cache = F.batch_norm(x, gamma, beta)[1]
    before = F.batch_norm_backward(dy, cache)
    x += 100
    gamma *= 2
    after = F.batch_norm_backward(dy, cache)
    np.testing.assert_array_equal(before[0], after[0])


def test_the_cache_is_kept_in_float64():
    x, gamma, beta, dy = make((64, 2), np.float32)
    cache = F.batch_norm(x, gamma, beta)[1]
    assert {a.dtype for a in cache} == {np.dtype(np.float64)}
    wide = torch_batch_norm(*(a.astype(np.float64) for a in (x, gamma, beta, dy)))
    # dx rounds once, at the end: a float32 z_hat in the cache would cost three times as much
    np.testing.assert_allclose(F.batch_norm_backward(dy, cache)[0], wide[1], rtol=3e-7, atol=1e-8)


def test_a_nan_stays_in_its_channel():
    x, gamma, beta, dy = make((8, 3))
    x[2, 1] = np.nan
    y, cache = F.batch_norm(x, gamma, beta)
    dx = F.batch_norm_backward(dy, cache)[0]
    for a in (y, dx):
        assert np.isnan(a[:, 1]).all()
        assert np.isfinite(a[:, [0, 2]]).all()


def test_non_contiguous_input_is_read_by_its_strides():
    x, gamma, beta, _ = make((6, 4, 8))
    view = x.transpose(2, 1, 0)[::2]
    contiguous = F.batch_norm(view.copy(), gamma, beta)[0]
    # NumPy adds in memory order, so the sums may differ in their last bits
    np.testing.assert_allclose(F.batch_norm(view, gamma, beta)[0], contiguous, rtol=1e-12)


ONE, ZERO = np.ones(3), np.zeros(3)
X = np.zeros((4, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.batch_norm(X[:, 0], ONE, ZERO), ValueError, r"2 or more dimensions.*\(4,\)"),
        (lambda: F.batch_norm(X, np.ones(4), ZERO), ValueError, r"gamma of shape \(3,\).*\(4,\)"),
        (lambda: F.batch_norm(X, ONE, 0.0), ValueError, r"beta of shape \(3,\).*\(\)"),
        (lambda: F.batch_norm(X[:1], ONE, ZERO), ValueError, r"more than 1 value per .*\(1, 3\)"),
        (lambda: F.batch_norm(X[:1, :, None], ONE, ZERO), ValueError, r"more than 1 .*\(1, 3, 1\)"),
        (lambda: F.batch_norm(X, ONE, ZERO, 0.0), ValueError, "eps above 0 and finite, got 0.0"),
        (lambda: F.batch_norm(X, ONE, ZERO, -1e-5), ValueError, "eps above 0"),
        (lambda: F.batch_norm(X, ONE, ZERO, np.nan), ValueError, "eps above 0"),
        (lambda: F.batch_norm(X, ONE, ZERO, np.inf), ValueError, "eps above 0"),
        (lambda: F.batch_norm(X.astype(int), ONE, ZERO), TypeError, "x to hold floats, got int64"),
        (lambda: F.batch_norm(X + 0j, ONE, ZERO), TypeError, "got complex128"),
        (lambda: F.moments(X[:0]), ValueError, r"at least one value per channel.*\(0, 3\)"),
        (lambda: F.moments(X[0]), ValueError, "2 or more dimensions"),
        (lambda: F.normalize(X, np.zeros(2), ONE), ValueError, "mean of shape"),
        (lambda: F.normalize(X, ZERO, np.ones(2)), ValueError, "var of shape"),
        (lambda: F.normalize(X, ZERO, ONE, 0), ValueError, "eps above 0"),
        (lambda: F.scale_and_shift(X, np.ones(2), ZERO), ValueError, "gamma of shape"),
        (
            lambda: F.batch_norm_backward(X[:3], F.batch_norm(X, ONE, ZERO)[1]),
            ValueError,
            r"dy shaped as the output .*\(4, 3\), got \(3, 3\)",
        ),
        (
            lambda: F.batch_norm_backward_by_graph(X.astype(int), F.batch_norm(X, ONE, ZERO)[1]),
            TypeError,
            "dy to hold floats",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
