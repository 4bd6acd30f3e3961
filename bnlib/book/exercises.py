"""Self-checks of the exercises: a hint when the answer is not right yet, never the answer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bnlib.scratch import functional
from bnlib.scratch.layers import Linear, ReLU, Sequential

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


# Chapter 5


@exercise(
    "05.1", "how many steps has an epoch, and how many images does each of them send forward?"
)
def _images_forward(images_forward: Any) -> bool:
    return all(close(images_forward(n, m), n * (n // m)) for n, m in ((12, 4), (4000, 64)))


@exercise(
    "05.2", "by how many standard deviations does a batch of m miss? Set that to a twentieth."
)
def _batch_large_enough(answer: Any) -> bool:
    return close(answer, 400.0)


@exercise(
    "05.3",
    "go through the layers in order; at each Linear change weight and bias so that its own output "
    "is normalized, and send that on, since the next layer's values depend on it.",
)
def _normalize_once(normalize_once: Any) -> bool:
    rng = np.random.default_rng(0)
    first, second, third = (
        Linear(inputs, nodes, dtype=np.float64, rng=rng)
        for inputs, nodes in ((9, 8), (8, 7), (7, 3))
    )
    x = sample((50, 9))
    normalize_once(Sequential(first, ReLU(), second, ReLU(), third), x.copy())
    for linear in (first, second, third):
        z = linear(x)
        if not (
            close(z.mean(axis=0), np.zeros(z.shape[1]))
            and close(z.std(axis=0), np.ones(z.shape[1]), 1e-3)
        ):
            return False
        x = ReLU()(z)
    return True


@exercise(
    "07.1",
    "y = weight * invstd * (x - mean) + bias, and nothing in front of x moves with x: which path "
    "of chapter 3 is left?",
)
def _frozen_backward(frozen_backward: Any) -> bool:
    import torch

    x, dy = (torch.tensor(sample((4, 3, 2, 5), seed)) for seed in (0, 1))
    mean, invstd, weight = torch.tensor([[1.0, -2, 3], [0.5, 4, 1], [2, -1, 0.3]]).double()
    dy_, x_, mean_, var_, weight_ = (v.numpy() for v in (dy, x, mean, invstd**-2, weight))
    expected = functional.batch_norm_inference_backward(dy_, x_, mean_, var_, weight_, eps=0)
    pairs = zip(frozen_backward(dy, x, weight, mean, invstd), expected, strict=True)
    return all(close(answer, right) for answer, right in pairs)


@exercise("07.2", "the first batch replaces the start entirely; the second is one of two.")
def _momentum_of(momentum_of: Any) -> bool:
    return all(close(momentum_of(n), 1 / (n + 1)) for n in (0, 1, 9))


@exercise(
    "07.3",
    "one of the two stored variances makes evaluation repeat training; what does PyTorch do before "
    "it stores its own?",
)
def _factor(factor: Any) -> bool:
    return all(close(factor(m), 1 - 1 / m) for m in (2, 8, 32))


@exercise(
    "08.1",
    "carry out each of the rules on the variances: where does it start, which variance does it "
    "average, how much does the newest batch weigh? Compare where they arrive.",
)
def _whose(whose: Any) -> bool:
    def followed(variances: np.ndarray, share: float, start: float, factor: float) -> float:
        running = start
        for v in variances:
            running = (1 - share) * running + share * factor * v
        return running

    rng = np.random.default_rng(8)
    for k, m in ((3, 4), (12, 8), (30, 2)):
        variances = rng.gamma(4, 0.7, k)
        rules = {
            "PyTorch": (0.1, 1.0, m / (m - 1)),
            "textbook": (0.1, 1.0, 1.0),
            "d2l": (0.9, 1.0, 1.0),
            "CS231n": (0.1, 0.0, 1.0),
        }
        if any(whose(variances, m, followed(variances, *r)) != name for name, r in rules.items()):
            return False
    return True


@exercise(
    "08.2",
    "write both averages as a sum: how much does the start weigh after k batches, and what does "
    "each batch carry in one that it does not in the other?",
)
def _to_pytorch(to_pytorch: Any) -> bool:
    rng = np.random.default_rng(9)
    for k, m in ((1, 2), (10, 8), (60, 64)):
        theirs, ours = np.zeros(3), np.ones(3)
        for v in rng.gamma(4, 0.7, (k, 3)):
            theirs, ours = 0.9 * theirs + 0.1 * v, 0.9 * ours + 0.1 * v * m / (m - 1)
        if not close(to_pytorch(theirs, k, m), ours):
            return False
    return True


@exercise(
    "08.3",
    "chapter 3's line subtracts two things from dy before it multiplies by gamma / std; here that "
    "factor is inside g already.",
)
def _put_back(put_back: Any) -> bool:
    x, dy, gamma = sample((7, 1)), sample((7, 1), seed=1), 1.7
    _, cache = functional.batch_norm(x, [gamma], [0.0], eps=1e-12)
    dx, _, _ = functional.batch_norm_backward(dy, cache)
    g = gamma / cache.std * dy
    return close(put_back(g[:, 0], cache.z_hat[:, 0]), dx[:, 0])


@exercise(
    "09.1",
    "count the trips first: what is read for the sums, what is read again, what is written? Then "
    "the bytes of a value with 16 bits.",
)
def _backward_bytes(backward_bytes: Any) -> bool:
    shapes = ((256, 64, 56, 56), (4096, 1024), (3, 5, 7))
    return all(close(backward_bytes(shape), 10 * math.prod(shape)) for shape in shapes)


@exercise("09.2", "a tile that sticks out needs a program too, in each of the two directions.")
def _programs_needed(programs_needed: Any) -> bool:
    cases = {(10, 1, 4, 1): 3, (200_704, 64, 4096, 1): 3136, (33, 70, 32, 64): 4, (8, 3, 8, 4): 1}
    return all(close(programs_needed(*case), count) for case, count in cases.items())


@exercise(
    "09.3",
    "with the leading one a number has one bit more; from which power of two on are "
    "neighbours two apart?",
)
def _stops_at(stops_at: Any) -> bool:
    return all(close(stops_at(bits), total) for bits, total in ((3, 16), (7, 256), (10, 2048)))


@exercise("11.1", "the layer divides by one root; which sum has to stay the same under it?")
def _variance_for(variance_for: Any) -> bool:
    var = np.array([4.0, 0.3, 1e-6])
    return all(
        close(variance_for(var, eps, fixed) + fixed, var + eps)
        for eps, fixed in ((1e-5, 1e-3), (1e-3, 1e-5), (0.1, 0.0))
    )


@exercise(
    "11.2",
    "mean and variance are the last two, whatever is missing; and which scale and which shift "
    "leave a value as it is?",
)
def _from_keras_list(from_keras_list: Any) -> bool:
    names = ("weight", "bias", "running_mean", "running_var")
    full = dict(zip(names, sample((3, 4)).T, strict=True))
    neutral = {"weight": np.ones(3), "bias": np.zeros(3)}
    for scale, center in ((True, True), (True, False), (False, True), (False, False)):
        missing = {"weight": not scale, "bias": not center}
        weights = [a.copy() for name, a in full.items() if not missing.get(name)]
        expected = {n: neutral[n] if missing.get(n) else a for n, a in full.items()}
        found = from_keras_list(weights, scale, center)
        if set(found) != set(expected) or not all(close(found[n], expected[n]) for n in expected):
            return False
    return True


@exercise(
    "11.3",
    "split the running variance into what is left of the start and what the batches added; only "
    "one of the two carries the factor.",
)
def _as_keras_has_it(as_keras_has_it: Any) -> bool:
    for momentum, batches, n in ((0.1, 3, 4), (0.01, 50, 8), (0.5, 1, 32)):
        theirs = ours = np.ones(3)
        for seed in range(batches):
            var = sample((n, 3), seed).var(axis=0)
            theirs = (1 - momentum) * theirs + momentum * var
            ours = (1 - momentum) * ours + momentum * var * n / (n - 1)
        if not close(as_keras_has_it(ours, momentum, batches, n), theirs):
            return False
    return True


@exercise(
    "10.1",
    "the new mean lies between the two: how near to which? Then each piece's squares grow as in "
    "the chapter's formula. Nothing and nothing is nothing, not 0 / 0.",
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
    "which weight should the mean of each share have in the mean of the whole batch, and which "
    "does the plain average give it?",
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


def patient() -> Any:
    """Return the network of exercise 16.1: two batch norms, of torch.nn, each with a fault."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(16)
        model = nn.Sequential(
            nn.Linear(10, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16, momentum=0.99), nn.ReLU(),
            nn.Linear(16, 3),
        )  # fmt: skip
        for _ in range(60):
            model(torch.randn(64, 10))
    model[1].requires_grad_(False)
    return model


@exercise(
    "16.1",
    "the state alone shows both: give `diagnose` the patient alone, and read the slugs of its "
    "errors and warnings. The order does not matter.",
)
def _patient(answer: Any) -> bool:
    return sorted(answer) == ["frozen-but-training", "momentum-convention"]


@exercise(
    "16.2",
    "each update leaves 1 - momentum of the start. At the limit itself the rule is silent already.",
)
def _updates_needed(updates_needed: Any) -> bool:
    expected = {(0.1, 0.1): 22, (0.01, 0.1): 230, (0.5, 0.25): 2, (0.3, 0.01): 13, (1.0, 0.1): 1}
    return all(close(updates_needed(*case), k) for case, k in expected.items())


@exercise(
    "16.3",
    "what is the variance of a mean of m values drawn at random? Divide by that, and take the "
    "variance of the values over all batches.",
)
def _order_ratio(order_ratio: Any) -> bool:
    batches = sample((50, 8), seed=16)
    return all(
        close(order_ratio(x), 8 * x.mean(axis=1).var() / x.var())
        for x in (batches, np.sort(batches.ravel()).reshape(50, 8))
    )
