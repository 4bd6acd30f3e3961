"""Self-checks of the exercises: a hint when the answer is not right yet, never the answer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bnlib.scratch import functional

Test = Callable[[Any], bool]


class Exercise(NamedTuple):
    """A test of the reader's answer, and the hint to print when it fails."""

    test: Test
    hint: str


EXERCISES: dict[str, Exercise] = {}


def check(number: str, answer: Any) -> None:
    """Print whether an answer is right, and a hint if it is not.

    number: the exercise, as "01.2". answer: a value or a function, as the exercise asks.
    An error inside the reader's function is reported, not raised.
    Raises ValueError if there is no such exercise.
    """
    if number not in EXERCISES:
        raise ValueError(f"expected one of {', '.join(EXERCISES)}, got {number!r}")
    exercise = EXERCISES[number]
    try:
        right, trouble = exercise.test(answer), ""
    except Exception as error:  # whatever the reader's code raises is part of the answer
        right, trouble = False, f" It stopped with {type(error).__name__}: {error}."
    if right:
        print(f"Exercise {number}: correct.")
    else:
        print(f"Exercise {number}: not yet.{trouble} Hint: {exercise.hint}")


def exercise(number: str, hint: str) -> Callable[[Test], Test]:
    """Register the decorated test under an exercise's number."""

    def register(test: Test) -> Test:
        EXERCISES[number] = Exercise(test, hint)
        return test

    return register


def close(answer: Any, expected: Any, rtol: float = 1e-6) -> bool:
    """Say whether an answer is numbers of the expected shape, equal to rtol."""
    try:
        answer = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    expected = np.asarray(expected, dtype=np.float64)
    return answer.shape == expected.shape and bool(np.allclose(answer, expected, rtol, 1e-9))


def sample(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return numbers whose mean and scale differ from channel to channel, axis 1."""
    rng = np.random.default_rng(seed)
    per_channel = (1, -1, *(1,) * (len(shape) - 2))
    offset, spread = rng.uniform(-5, 5, shape[1]), rng.uniform(0.5, 4, shape[1])
    return rng.normal(size=shape) * spread.reshape(per_channel) + offset.reshape(per_channel)


@exercise("01.1", "the mean lies in the middle: how far is each value from it, in units of sigma?")
def _batch_of_two(answer: Any) -> bool:
    return close(answer, [-1.0, 1.0], rtol=1e-4)  # with or without epsilon


@exercise(
    "01.2",
    "one mean and one biased variance per channel, over all other axes, kept as axes of length 1; "
    "divide by sqrt(var + eps).",
)
def _normalize_images(normalize: Any) -> bool:
    x = sample((6, 3, 5, 4))
    mean, var = functional.moments(x)
    right = close(normalize(x), functional.normalize(x, mean, var))
    return right and close(normalize(x, eps=0.5), functional.normalize(x, mean, var, eps=0.5))


@exercise(
    "01.3",
    "the section on epsilon has the formula for the standard deviation of z-hat; solve it for the "
    "variance of z, and do not stop there.",
)
def _smallest_std(answer: Any) -> bool:
    return all(close(answer(eps), np.sqrt(0.81 / 0.19 * eps)) for eps in (1e-5, 1e-3, 0.8))


@exercise("02.1", "write down the new batch mean, and subtract it from z + 5.")
def _bias_before(answer: Any) -> bool:
    return not isinstance(answer, bool | None) and close(answer, 0.0)


@exercise(
    "02.2",
    "z-hat has mean 0 and standard deviation sqrt(var / (var + eps)); beta moves it, gamma "
    "stretches it.",
)
def _place(place: Any) -> bool:
    z = sample((40, 1), seed=3) * 1e-2  # so small that epsilon counts
    for mean, std, eps in ((-2.0, 3.0, 1e-5), (4.0, 0.5, 1e-3)):
        gamma, beta = place(z[:, 0], mean, std, eps)
        y, _ = functional.batch_norm(z, [gamma], [beta], eps)
        if not (close(y.mean(), mean) and close(y.std(), std)):
            return False
    return True


@exercise("02.3", "for which z-hat is y = 0? Half of the batch must lie above that point.")
def _half_off(half_off: Any) -> bool:
    z_hat = np.random.default_rng(5).gamma(2, size=100) - 2
    passed = [np.sum(gamma * z_hat + half_off(z_hat, gamma) > 0) for gamma in (0.5, 3.0)]
    return passed == [50, 50]


@exercise("03.1", "both means are per channel, over all other axes; so are gamma and std.")
def _images_backward(backward: Any) -> bool:
    x, dy = sample((5, 3, 4, 2)), sample((5, 3, 4, 2), seed=1)
    _, cache = functional.batch_norm(x, gamma := np.array([0.5, -2.0, 3.0]), np.zeros(3))
    expected, _, _ = functional.batch_norm_backward(dy, cache)
    return close(backward(dy, cache.z_hat, gamma, cache.std), expected)


@exercise("03.2", "two things change: the gradient, and the weights that the step is measured by.")
def _three_times(answer: Any) -> bool:
    return close(answer, 9.0, rtol=1e-2)


@exercise("03.3", "go back to the step of the variance: which of the two means came from there?")
def _unbiased_backward(backward: Any) -> bool:
    x, dy, gamma, m = sample((7, 1))[:, 0], sample((7, 1), seed=1)[:, 0], 1.7, 7
    std = np.sqrt(x.var(ddof=1) + 1e-5)
    z_hat = (x - x.mean()) / std
    # d z_hat_i / d x_j = (delta_ij - 1/m - z_hat_i z_hat_j / (m - 1)) / std
    jacobian = (np.eye(m) - 1 / m - np.outer(z_hat, z_hat) / (m - 1)) / std
    return close(backward(dy, z_hat, gamma, std), gamma * dy @ jacobian)


@exercise(
    "04.1",
    "after one batch the start weighs 1 - momentum; after k batches? Solve for k with logarithms, "
    "and round up.",
)
def _batches_needed(batches_needed: Any) -> bool:
    # (0.5, 0.25) needs a third batch: after two, the start weighs 0.25, which is not less
    expected = {(0.1, 0.01): 44, (0.01, 0.01): 459, (0.5, 0.25): 3, (0.9, 0.5): 1}
    return all(close(batches_needed(*case), k) for case, k in expected.items())


@exercise(
    "04.2",
    "write batch normalization as a * x + b, put it into W (a * x + b) + c, and collect what "
    "multiplies x.",
)
def _fold_into_next(fold: Any) -> bool:
    x, W, c = sample((5, 3)), sample((4, 3), seed=1), np.array([1.0, -2, 3, 0.5])
    mean, var = np.array([1.0, -3, 0.2]), np.array([4.0, 0.3, 0.01])
    gamma, beta, eps = np.array([2.0, -1, 0.5]), np.array([0.3, 1, -4]), 1e-2
    weight, bias = fold(W, c, mean, var, gamma, beta, eps)
    y = functional.batch_norm_inference(x, mean, var, gamma, beta, eps)
    return close(x @ np.asarray(weight).T + bias, y @ W.T + c)


@exercise(
    "04.3",
    "weigh by the counts; and a value is away from the common mean by its distance from the mean "
    "of its piece plus that mean's distance from the common one.",
)
def _merge(merge: Any) -> bool:
    pieces = np.split(sample((60, 1), seed=4)[:, 0] ** 2, [5, 17, 40])
    counts, means, variances = (np.array([f(p) for p in pieces]) for f in (len, np.mean, np.var))
    values = np.concatenate(pieces)
    return close(merge(counts, means, variances), [values.mean(), values.var()])


@exercise("06.1", "count the bytes that travel: every value, its bytes, and once for each trip.")
def _least_time(least_time: Any) -> bool:
    cases = (((64, 64, 56, 56), 4, 3, 2e10), ((256, 512), 2, 14, 1e11))
    return all(
        close(least_time(shape, size, trips, speed), math.prod(shape) * size * trips / speed)
        for shape, size, trips, speed in cases
    )


@exercise(
    "06.2",
    "the variance is the mean square of x - k minus the square of the mean of x - k; what share of "
    "the first is it?",
)
def _share_left(share_left: Any) -> bool:
    d = sample((50, 1), seed=6)[:, 0]
    return all(
        close(share_left(v.sum(), (v**2).sum(), len(v)), v.var() / (v**2).mean())
        for v in (d, d - d.mean(), d + 30)
    )


@exercise(
    "06.3",
    "write chapter 3's line with (x - mean) / std for z_hat and with dbeta / m and dgamma / m for "
    "the two averages; then collect what multiplies dy, what multiplies x, and the rest.",
)
def _backward_line(backward_line: Any) -> bool:
    x, dy, gamma = sample((9, 3)), sample((9, 3), seed=1), np.array([0.5, -2.0, 3.0])
    _, cache = functional.batch_norm(x, gamma, np.zeros(3))
    expected, dgamma, dbeta = functional.batch_norm_backward(dy, cache)
    A, B, C = backward_line(gamma, cache.std, x.mean(axis=0), dgamma, dbeta, 9)
    return close(A * dy + B * x + C, expected)


@exercise(
    "10.1",
    "go from the first mean toward the second by the second's part of the count; both means are "
    "then away from the new one, each by a part of the distance between them. Nothing and nothing "
    "is nothing, not 0 / 0.",
)
def _combine(combine: Any) -> bool:
    values = sample((24, 1), seed=10)[:, 0]

    def describe(x: np.ndarray) -> tuple[int, float, float]:
        return (len(x), float(x.mean()), float(x.var() * len(x))) if len(x) else (0, 0.0, 0.0)

    cases = ((0, 7, 24), (0, 12, 13), (0, 0, 5), (0, 5, 5), (0, 0, 1), (3, 3, 3))
    return all(
        close(combine(describe(values[a:b]), describe(values[b:c])), describe(values[a:c]))
        for a, b, c in cases
    )


@exercise(
    "10.2",
    "write the mean over the whole batch as a sum over the processes of weight times own mean, and "
    "undo the division by the number of processes.",
)
def _fair_shares(factors: Any) -> bool:
    return all(
        close(factors(sizes), np.array(sizes) * len(sizes) / sum(sizes))
        for sizes in ([15, 0, 1], [8, 8], [5, 2, 7, 2])
    )


@exercise(
    "10.3",
    "how large is the batch of so many devices, and by how much is the mean of such a batch off? "
    "Round up, and mind rounding errors where the quotient is a whole number.",
)
def _group_size(group_size: Any) -> bool:
    expected = {(8, 0.125): 8, (32, 0.2): 1, (2, 0.1): 50, (4, 0.3): 3, (2, 0.05): 200}
    return all(close(group_size(*case), p) for case, p in expected.items())
