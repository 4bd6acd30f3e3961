"""Both fast cores against the readable functions in float64, against PyTorch and each other."""

import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bnlib.scratch import compiled, fast, functional, passes
from bnlib.scratch.layers import BatchNorm

ROOT = Path(__file__).parents[2]
CORES = {"numpy": False, "numba": True}
EPS = 1e-5


@pytest.fixture(params=CORES)
def core(request):
    with fast.use_compiled(CORES[request.param]):
        yield request.param


def per_channel(vector, ndim):
    return np.reshape(vector, (1, -1, *(1,) * (ndim - 2)))


def make(shape, dtype=np.float32, seed=0, mean=(-9, 9), std=(0.5, 5)):
    """Return x, gamma, beta and dy; each channel's mean and standard deviation from a range."""
    rng = np.random.default_rng(seed)
    C = shape[1]
    x = per_channel(rng.uniform(*std, C), len(shape)) * rng.standard_normal(shape)
    x += per_channel(rng.uniform(*mean, C), len(shape))
    gamma = rng.uniform(0.5, 3, C) * rng.choice([-1, 1], C)
    dy = 3 * rng.standard_normal(shape) + 1
    return x.astype(dtype), gamma, rng.normal(0, 4, C), dy.astype(dtype)


def wide(array):
    return np.ascontiguousarray(array, np.float64)


# Ways for an array to lie in memory: each returns one with the given values.
def gaps(array):
    room = np.zeros([2 * n for n in array.shape], array.dtype)
    room[tuple(slice(0, 2 * n, 2) for n in array.shape)] = array
    return room[tuple(slice(0, 2 * n, 2) for n in array.shape)]


def channels_last(array):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def channels_first(array):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, 0)), 0, 1)


def backward_strides(array):
    return np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]


def misaligned(array):
    room = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    room[...] = array
    return room


def swapped_bytes(array):
    return array.astype(array.dtype.newbyteorder())


LAYOUTS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "channels last": channels_last,
    "channels first": channels_first,
    "gaps": gaps,
    "backward": backward_strides,
    "misaligned": misaligned,
    "swapped bytes": swapped_bytes,
}


def assert_equals_functional(x, gamma, beta, dy, eps=EPS, out=lambda like: None):
    """Hold all results of fast to those of functional in float64, to the rounding of the type."""
    y, cache = fast.batch_norm(x, gamma, beta, eps, out=out(x))
    dx, dgamma, dbeta = fast.batch_norm_backward(dy, cache, out=out(dy))
    y_eval = fast.batch_norm_inference(x, cache.mean, cache.var, gamma, beta, eps, out=out(x))
    given = (x, cache.mean, cache.var, gamma, eps)
    dx_eval, dgamma_eval, dbeta_eval = fast.batch_norm_inference_backward(dy, *given, out=out(dy))
    assert y.shape == dx.shape == y_eval.shape == dx_eval.shape == x.shape
    assert y.dtype == y_eval.dtype == x.dtype
    assert dx.dtype == dx_eval.dtype == dy.dtype
    assert {a.dtype for a in (dgamma, dbeta, *cache[1:4])} == {np.dtype(np.float64)}
    if not x.size:
        assert not np.any([dgamma, dbeta, dgamma_eval, dbeta_eval, cache.mean, cache.var])
        return

    mean, var = functional.moments(wide(x))
    exact, kept = functional.batch_norm(wide(x), gamma, beta, eps)
    exact_dx, *exact_grads = functional.batch_norm_backward(wide(dy), kept)
    z = np.abs(kept.z_hat)
    axes = (0, *range(2, x.ndim))
    # what rounding to the type costs; float64 sums in another order differ by more than that
    step = max(np.finfo(x.dtype).eps, np.finfo(dy.dtype).eps, 1e-13)
    computing = min(step, np.finfo(np.float32).eps)  # float16 is computed in float32
    # far from 0 a float64 mean is itself rounded, on both sides
    computing = computing + 4e-16 * np.abs(mean) / kept.std

    # a few roundings of each term of the line, of which one is that of the statistics
    largest = np.abs(gamma) * (z.max(axes) + 1) + np.abs(beta)
    assert_within(y, exact, 4 * computing * largest + step * np.abs(exact).max(axes))
    assert_within(y_eval, exact, 4 * computing * largest + step * np.abs(exact).max(axes))
    # float32 sums of a few hundred values, added up in float64
    assert np.all(np.abs(cache.var - var) <= 16 * computing * var)
    assert np.all(np.abs(cache.mean - mean) <= 4 * computing * np.sqrt(var) + 1e-15 * np.abs(mean))

    slope = np.abs(gamma) / kept.std
    largest = slope * np.abs(wide(dy)).max(axes) * (2 + z.max(axes) ** 2)
    assert_within(dx, exact_dx, 8 * computing * largest + step * np.abs(exact_dx).max(axes))
    straight = wide(dy) * per_channel(gamma / kept.std, x.ndim)
    assert_within(dx_eval, straight, 4 * step * np.abs(straight).max(axes))
    terms = [(np.abs(wide(dy)) * z).sum(axes), np.abs(wide(dy)).sum(axes)]
    for grads in ([dgamma, dbeta], [dgamma_eval, dbeta_eval]):
        for grad, exact_grad, size in zip(grads, exact_grads, terms, strict=True):
            assert np.all(np.abs(grad - exact_grad) <= 8 * computing * size)


def assert_within(ours, exact, bound):
    error = np.abs(wide(ours) - exact)
    assert np.all(error <= per_channel(bound, ours.ndim)), error.max()


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(1, 5)).flatmap(
        lambda nc: st.lists(st.integers(1, 6), max_size=3).map(lambda rest: (*nc, *rest))
    ),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
    result=st.sampled_from([None, "same", "gaps", "C"]),
    mean=st.sampled_from([0, 1, -3, 50, 1e3]),
    std=st.sampled_from([1e-2, 1, 30]),
    pieces=st.sampled_from([(2**18, 2**13, 16), (16, 8, 2), (64, 1, 2), (24, 12, 1)]),
    core=st.sampled_from(list(CORES)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_type_and_layout_equals_the_readable_functions(
    shape, dtype, layouts, result, mean, std, pieces, core, seed
):
    if shape[0] * np.prod(shape[2:], dtype=int) == 1:
        return
    x, gamma, beta, dy = make(shape, dtype, seed, (mean, mean + 2 * std), (std / 2, std))
    x, dy = LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](dy)

    def out(like):
        if result is None:
            return None
        return gaps(like) if result == "gaps" else np.empty_like(like, order="CK"[result == "same"])

    with fast.use_compiled(CORES[core]), pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("CHUNK", "ROW", "SHORT"), pieces, strict=True):
            patch.setattr(passes, name, value)  # small pieces: their borders fall into small arrays
        assert_equals_functional(x, gamma, beta, dy, out=out)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from([(40, 3), (5, 3, 7), (3, 2, 5, 5), (2, 3, 40)]),
    dtype=st.sampled_from([np.float32, np.float64]),
    scale=st.integers(-12, 12),
    distance=st.sampled_from([0, 1, 1e3, 1e6]),
    core=st.sampled_from(list(CORES)),
    seed=st.integers(0, 2**32 - 1),
)
@example((40, 3), np.float32, 25, 0, "numpy", 0)  # squares overflow float32
@example((3, 2, 5, 5), np.float32, 25, 1e3, "numpy", 0)
def test_any_scale_and_distance_from_zero(shape, dtype, scale, distance, core, seed):
    std = 10.0**scale
    x, gamma, beta, dy = make(shape, dtype, seed, (distance * std, 2 * distance * std), (std, std))
    with fast.use_compiled(CORES[core]):
        assert_equals_functional(x, gamma, beta, dy, eps=min(EPS, 1e-3 * std**2))


@pytest.mark.parametrize("shape", [(64, 5), (8, 5, 7, 7), (2, 5, 40, 40), (16, 3, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_forward_and_backward_match_pytorch(shape, dtype, core):
    x, gamma, beta, dy = make(shape, dtype)
    tensors = [torch.from_numpy(wide(a)).requires_grad_() for a in (x, gamma, beta)]
    y = torch.nn.functional.batch_norm(tensors[0], None, None, *tensors[1:], training=True)
    expected = [y, *torch.autograd.grad(y, tensors, torch.from_numpy(wide(dy)))]
    ours, cache = fast.batch_norm(x, gamma, beta)
    tolerance = 1e-12 if dtype == np.float64 else 1e-6
    for a, reference in zip((ours, *fast.batch_norm_backward(dy, cache)), expected, strict=True):
        scale = reference.abs().max().item()
        np.testing.assert_allclose(a, reference.detach().numpy(), atol=tolerance * scale)


@pytest.mark.parametrize("shape", [(100_000, 2), (100, 2, 30, 30), (20_000, 8), (3, 2, 200, 90)])
@pytest.mark.parametrize(
    ("mean", "std", "eps"),
    [(0, 1, 1e-5), (1e3, 1, 1e-5), (1e4, 1e-2, 1e-5), (1e4, 1e-2, 1e-12), (1e6, 1, 1e-5)],
)
def test_float32_results_are_exact_far_from_zero(shape, mean, std, eps, core):
    x, _, _, dy = make(shape, np.float32, 3, (mean, mean), (std, std))
    ones, zeros = np.ones(shape[1]), np.zeros(shape[1])
    y, cache = fast.batch_norm(x, ones, zeros, eps)
    exact, kept = functional.batch_norm(wide(x), ones, zeros, eps)
    assert np.abs(y - exact).max() < 2e-6  # PyTorch: 2e-2 at a mean of 1e4 and of 1e6
    exact_dx, exact_dgamma, exact_dbeta = functional.batch_norm_backward(wide(dy), kept)
    dx, dgamma, dbeta = fast.batch_norm_backward(dy, cache)
    assert np.abs(dx - exact_dx).max() < 1e-6 * np.abs(exact_dx).max()
    assert np.abs(dgamma - exact_dgamma).max() < 1e-6 * np.linalg.norm(wide(dy)) * 4
    np.testing.assert_allclose(dbeta, exact_dbeta, rtol=1e-6)


def test_a_first_sample_far_from_the_rest_does_not_spoil_the_variance(core):
    for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-10)):
        x, gamma, beta, dy = make((50, 4, 6, 6), dtype)
        far = np.array([1e7, 1e3, -1e5, 0], dtype)
        x[0] += 0 * x[0]
        x[:, :] += per_channel(far, 4)
        x[0] = 0  # an empty picture first
        x[17] = 0
        exact = functional.moments(wide(x))
        mean, var = fast.moments(x)
        np.testing.assert_allclose(mean, exact[0], rtol=tolerance)
        np.testing.assert_allclose(var, exact[1], rtol=tolerance)
        assert_equals_functional(x, gamma, beta, dy)


def test_a_first_value_far_from_the_rest_costs_no_digits(core):
    x = np.random.default_rng(0).standard_normal((200_000, 2))
    x[0] = 1e4  # sums about it lose five digits
    exact = functional.moments(x.astype(np.longdouble))[1]
    np.testing.assert_allclose(fast.moments(x)[1], exact, rtol=1e-13)


def test_a_constant_channel_has_variance_zero_and_gives_beta(core):
    for dtype in (np.float32, np.float64):
        x = np.broadcast_to(np.array([0.1, 0, -1e6], dtype), (33, 3))
        y, cache = fast.batch_norm(x, np.ones(3), [1, 2, 3])
        assert (cache.var == 0).all()
        np.testing.assert_array_equal(y, np.broadcast_to(np.array([1, 2, 3], dtype), (33, 3)))


def test_gamma_zero_is_a_number_like_any_other(core):
    x, _, beta, dy = make((12, 3, 5))
    assert_equals_functional(x, np.zeros(3), beta, dy)
    assert_equals_functional(x, np.ones(3), np.zeros(3), dy)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(20, 3), (4, 3, 5, 5), (2, 3, 40)])
def test_nan_and_infinity_stay_in_their_channel(shape, bad, core):
    x, gamma, beta, dy = make(shape)
    x[1, 1] = bad
    mean, var = fast.moments(x)
    y, cache = fast.batch_norm(x, gamma, beta)
    dx, dgamma, _ = fast.batch_norm_backward(dy, cache)
    y_eval = fast.batch_norm_inference(x, np.zeros(3), np.ones(3), gamma, beta)
    for a in (y, dx):
        assert np.isnan(a[:, 1]).all()
    with np.errstate(invalid="ignore"):  # the readable functions warn where infinities meet
        exact_mean, exact_var = functional.moments(x)
        exact, _ = functional.batch_norm(x, gamma, beta)
    np.testing.assert_array_equal(mean[1], exact_mean[1])
    assert np.isnan(var[1]) and np.isnan(exact_var[1]) and np.isnan(dgamma[1])  # noqa: PT018
    good = [0, 2]
    np.testing.assert_allclose(y[:, good], exact[:, good], rtol=1e-5, atol=1e-5)
    assert np.isfinite(dx[:, good]).all()
    rest = np.arange(shape[0]) != 1
    assert np.isfinite(y_eval[rest]).all()


def test_gradients_whose_products_overflow_float32(core):
    x, gamma, beta, dy = make((30, 3, 4), mean=(0, 0), std=(1e15, 1e15))
    dy *= np.float32(1e30)
    assert_equals_functional(x, gamma, beta, dy)


def test_mixed_types_come_back_as_they_came(core):
    x, gamma, beta, dy = make((9, 3, 4))
    cache, kept = (module.batch_norm(x, gamma, beta)[1] for module in (fast, functional))
    expected = functional.batch_norm_backward(wide(dy), kept)[0]
    for dtype in (np.float16, np.float64):
        dx, *_ = fast.batch_norm_backward(dy.astype(dtype), cache)
        assert dx.dtype == dtype
        in_float64 = 1e-11 if core == "numba" else 1e-6  # NumPy took the statistics in float32
        tolerance = 1e-3 if dtype == np.float16 else in_float64
        np.testing.assert_allclose(dx, expected, rtol=tolerance, atol=10 * tolerance)


def test_lists_are_taken_as_by_functional(core):
    rows = [[1.0, 2.0], [3.0, 5.0], [4.0, -1.0]]
    y, cache = fast.batch_norm(rows, [1, 1], [0, 0])
    np.testing.assert_allclose(y, functional.batch_norm(rows, [1, 1], [0, 0])[0], rtol=1e-12)
    assert fast.batch_norm_backward(rows, cache)[0].shape == (3, 2)


def test_both_cores_give_the_same_to_rounding():
    x, gamma, beta, dy = make((20, 6, 9, 9), np.float64)
    results = []
    for wanted in CORES.values():
        with fast.use_compiled(wanted):
            y, cache = fast.batch_norm(x, gamma, beta)
            results.append([y, cache.mean, cache.var, *fast.batch_norm_backward(dy, cache)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_cache_keeps_the_input_itself_and_copies_of_the_parameters(core):
    x, gamma, beta, dy = make((6, 3))
    cache = fast.batch_norm(x, gamma, beta)[1]
    assert cache.x is x
    before = fast.batch_norm_backward(dy, cache)[0]
    gamma *= 2
    np.testing.assert_array_equal(fast.batch_norm_backward(dy, cache)[0], before)


def test_read_only_arrays_are_read(core):
    arrays = make((6, 3, 4))
    for a in arrays:
        a.flags.writeable = False
    x, gamma, beta, dy = arrays
    y, cache = fast.batch_norm(x, gamma, beta)
    assert not np.shares_memory(y, x)
    fast.batch_norm_backward(dy, cache)


class TestOut:
    @pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "swapped bytes"])
    def test_the_result_is_written_to_out_and_returned(self, layout, core):
        x, gamma, beta, dy = make((6, 3, 4, 5))
        out, dx_out = LAYOUTS[layout](np.zeros_like(x)), LAYOUTS[layout](np.zeros_like(x))
        y, cache = fast.batch_norm(x, gamma, beta, out=out)
        dx, *_ = fast.batch_norm_backward(dy, cache, out=dx_out)
        assert y is out
        assert dx is dx_out
        np.testing.assert_array_equal(out, fast.batch_norm(x, gamma, beta)[0])
        np.testing.assert_array_equal(dx_out, fast.batch_norm_backward(dy, cache)[0])

    @pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "swapped bytes"])
    def test_inference_may_write_over_its_input(self, layout, core):
        x, gamma, beta, _ = make((6, 3, 4, 5), mean=(50, 60))
        x = LAYOUTS[layout](x)
        given = (*functional.moments(x), gamma, beta)
        expected = fast.batch_norm_inference(x, *given)
        assert fast.batch_norm_inference(x, *given, out=x) is x
        np.testing.assert_array_equal(x, expected)

    @pytest.mark.parametrize("layout", ["F", "channels last"])
    def test_a_new_array_lies_as_the_input_does(self, layout, core):
        x, gamma, beta, dy = make((6, 3, 4, 5))
        x = LAYOUTS[layout](x)
        y, cache = fast.batch_norm(x, gamma, beta)
        assert y.strides == x.strides
        assert fast.batch_norm_backward(dy, cache)[0].strides == x.strides

    @pytest.mark.parametrize(
        ("out", "error", "message"),
        [
            (lambda x, dy: np.full((4, 2), 7, "f4"), ValueError, r"shape \(4, 3\), got \(4, 2\)"),
            (lambda x, dy: np.full((4, 3), 7.0), TypeError, "array of float32, got float64"),
            (lambda x, dy: [[7] * 3] * 4, TypeError, "array of float32, got list"),
            (lambda x, dy: np.broadcast_to(np.float32(7), (4, 3)), ValueError, r"got \(4, 3\), r"),
            (lambda x, dy: x, ValueError, "share no memory with the input"),
            (lambda x, dy: x[::-1], ValueError, "share no memory"),
            (lambda x, dy: dy, ValueError, "share no memory"),
            (lambda x, dy: dy[::-1], ValueError, "share no memory"),
        ],
    )
    def test_an_out_that_does_not_fit_is_refused_and_nothing_is_written(
        self, out, error, message, core
    ):
        x, gamma, beta, dy = make((4, 3))
        cache, before = fast.batch_norm(x, gamma, beta)[1], (x.copy(), dy.copy())
        out = out(x, dy)
        calls = [
            lambda: fast.batch_norm_backward(dy, cache, out=out),
            lambda: fast.batch_norm_inference_backward(dy, x, beta, gamma**2, gamma, out=out),
        ]
        if not np.shares_memory(out, dy):
            calls.append(lambda: fast.batch_norm(x, gamma, beta, out=out))
            if out is not x:
                given = (beta, gamma**2, gamma, beta)
                calls.append(lambda: fast.batch_norm_inference(x, *given, out=out))
        for call in calls:
            with pytest.raises(error, match=message):
                call()
        np.testing.assert_array_equal(x, before[0])
        np.testing.assert_array_equal(dy, before[1])
        assert np.shares_memory(out, x) or np.shares_memory(out, dy) or (np.array(out) == 7).all()

    def test_an_out_that_overlaps_otherwise_is_refused(self, core):
        room = np.zeros((9, 8), np.float32)
        for x, out in [(room[:8], room[1:]), (room[:8], room[:8].T)]:
            with pytest.raises(ValueError, match="share no memory"):
                fast.batch_norm_inference(x, *[np.ones(8)] * 4, out=out)
        assert not room.any()


ONE, ZERO, X = np.ones(3), np.zeros(3), np.zeros((4, 3))
BAD = {
    "batch_norm": [
        (X[:, 0], ONE, ZERO),
        (X, np.ones(4), ZERO),
        (X, ONE, 0.0),
        (X[:1], ONE, ZERO),
        (X[:1, :, None], ONE, ZERO),
        (X, ONE, ZERO, 0.0),
        (X, ONE, ZERO, -1e-5),
        (X, ONE, ZERO, np.nan),
        (X[:0], ONE, ZERO, np.inf),
        (X.astype(int), ONE, ZERO),
        (X + 0j, ONE, ZERO),
    ],
    "moments": [(X[:0],), (X[0],), (X.astype(int),)],
    "batch_norm_inference": [
        (X, *X[:4], -1),
        (X, X[0, :2], *X[:3]),
        (X, X[0], X[0, :2], *X[:2]),
        (X, *X[:2], 1.0, X[0]),
        (X, *X[:3], 0.0),
        (X[0], *X[:4]),
        (X.astype(int), *X[:4]),
    ],
    "batch_norm_inference_backward": [
        (X[:2], X, *X[:3]),
        (X.astype(int), X, *X[:3]),
        (X, X.astype(int), *X[:3]),
        (X, X, *X[:3], np.inf),
        (X, X, X[0, :2], *X[:2]),
        (X, X, X[0], X[0, :2], X[0]),
        (X, X, *X[:2], X[0, :2]),
    ],
}


@pytest.mark.parametrize(("name", "arguments"), [(n, a) for n, many in BAD.items() for a in many])
def test_bad_input_gets_the_error_of_functional(name, arguments, core):
    with pytest.raises((TypeError, ValueError)) as expected:
        getattr(functional, name)(*arguments)
    out = {} if name == "moments" else {"out": np.full_like(X, 7)}
    with pytest.raises(expected.type) as error:
        getattr(fast, name)(*arguments, **out)
    assert str(error.value) == str(expected.value)
    assert all((a == 7).all() for a in out.values())


@pytest.mark.parametrize("dy", [X[:3], X.astype(int)])
def test_a_gradient_that_does_not_fit_gets_the_error_of_functional(dy, core):
    with pytest.raises((TypeError, ValueError)) as expected:
        functional.batch_norm_backward(dy, functional.batch_norm(X, ONE, ZERO)[1])
    with pytest.raises(expected.type) as error:
        fast.batch_norm_backward(dy, fast.batch_norm(X, ONE, ZERO)[1])
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("shape", [(64, 64, 56, 56), (48_000, 256), (4, 16, 448, 448)])
@pytest.mark.parametrize(("reuse", "limit"), [(False, 2.1), (True, 0.1)])
def test_peak_memory(shape, reuse, limit, core):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) + 3 for _ in range(2))
    gamma, beta = np.ones(shape[1]), np.zeros(shape[1])
    outs = [np.empty_like(x), np.empty_like(x)] if reuse else [None, None]

    def step():
        y, cache = fast.batch_norm(x, gamma, beta, out=outs[0])
        return y, fast.batch_norm_backward(dy, cache, out=outs[1])

    fast.batch_norm(x[:2], gamma, beta)  # loads what is loaded once
    tracemalloc.start()
    try:
        step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit * x.nbytes


class TestWhichCore:
    @pytest.fixture
    def called(self, monkeypatch):
        """Return the names of the cores that compute moments, in order."""
        names = []
        for core in (compiled, passes):

            def noted(*arguments, core=core, moments=core.moments):
                names.append(core.__name__.rpartition(".")[2])
                return moments(*arguments)

            monkeypatch.setattr(core, "moments", noted)
        return names

    def test_numba_where_it_is_installed_and_has_the_type(self, called):
        x = make((6, 3))[0]
        for dtype in (np.float64, np.float32, np.float16, ">f4"):
            fast.moments(x.astype(dtype))
        with fast.use_compiled(False):
            fast.moments(x)
            with fast.use_compiled(True):
                fast.moments(x)
            fast.moments(x)
        fast.moments(x)
        expected = ["compiled"] * 2 + ["passes"] * 3 + ["compiled", "passes", "compiled"]
        assert called == expected

    def test_the_choice_ends_with_an_error_too(self, called):
        with pytest.raises(RuntimeError, match="stop"), fast.use_compiled(False):
            raise RuntimeError("stop")
        fast.moments(make((6, 3))[0])
        assert called == ["compiled"]

    def test_without_numba_numpy_is_used(self, called, monkeypatch):
        monkeypatch.setattr(fast, "_compiled", lambda: None)
        fast.moments(make((6, 3))[0])
        assert called == ["passes"]
        with pytest.raises(ImportError, match="pip install numba"), fast.use_compiled(True):
            pass

    def test_a_folder_that_cannot_be_written_to_is_no_error(self, monkeypatch):
        def refuse(function, cache=False, **options):
            if cache:
                raise RuntimeError("no locator available")
            return ("compiled", function, options)

        monkeypatch.setattr(compiled, "njit", refuse)
        assert compiled.compiled(len)[:2] == ("compiled", len)


def test_threads_do_not_disturb_each_other(core):
    arguments = [make((200, 8, 6, 6), seed=i) for i in range(4)]
    expected = [fast.batch_norm(*a[:3])[0] for a in arguments]
    wrong = []

    def work(i):
        for _ in range(20):
            if (fast.batch_norm(*arguments[i][:3])[0] != expected[i]).any():
                wrong.append(i)

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


NUMPY_ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("numpy", "bnlib"):
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
sys.meta_path.insert(0, Refuse())
import numpy as np
import bnlib.data, bnlib.scratch.layers, bnlib.scratch.training
from bnlib.scratch import fast
assert not {"numba", "torch"} & set(sys.modules)
y, cache = fast.batch_norm(np.arange(12.0).reshape(4, 3), np.ones(3), np.zeros(3))
fast.batch_norm_backward(y, cache)
layer = bnlib.scratch.layers.BatchNorm(3)
layer.backward(layer(y))
assert fast._compiled() is None
assert "numba" not in sys.modules
print("done")
"""


def test_numpy_alone_is_enough():
    result = subprocess.run(
        [sys.executable, "-c", NUMPY_ALONE], cwd=ROOT, text=True, capture_output=True
    )
    assert (result.stdout, result.stderr) == ("done\n", "")


def test_importing_fast_does_not_import_numba():
    code = "import sys; from bnlib.scratch import fast, layers; print('numba' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert (result.stdout, result.stderr) == ("False\n", "")


def test_the_layer_reads_its_input_once_for_the_moments(monkeypatch):
    def refuse(x):
        raise AssertionError("the moments are in the cache already")

    monkeypatch.setattr(functional, "moments", refuse)
    monkeypatch.setattr(fast, "moments", refuse)
    layer = BatchNorm(3)
    layer(make((8, 3))[0])
    assert layer.running_mean.any()
