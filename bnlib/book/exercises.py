"""Self-checks of the exercises: a hint when the answer is not right yet, never the answer."""

import math
from collections.abc import Callable
from itertools import product
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


@exercise(
    "12.1",
    "how much does the start weigh after so many batches, and what was it, for each of the two? "
    "Subtract it; then the weights that are left no longer add up to 1.",
)
def _without_start(without_start: Any) -> bool:
    for momentum, batches in ((0.1, 5), (0.01, 20), (0.5, 1)):
        weights = momentum * (1 - momentum) ** np.arange(batches)[::-1]
        mean, var = weights @ sample((batches, 3)), weights @ sample((batches, 3), 1) ** 2
        found = without_start(mean, var + (1 - momentum) ** batches, momentum, batches)
        if not all(close(f, v / weights.sum()) for f, v in zip(found, (mean, var), strict=True)):
            return False
    return True


@exercise(
    "12.2",
    "one large batch takes the old average down to 1 - momentum of it; as many small ones together "
    "must do the same.",
)
def _same_horizon(same_horizon: Any) -> bool:
    cases = ((0.1, 64, 32), (0.1, 32, 256), (0.01, 100, 30), (0.3, 7, 7))
    return all(close(1 - same_horizon(a, n, m), (1 - a) ** (m / n)) for a, n, m in cases)


@exercise(
    "12.3",
    "the two rules under the table answer the first two; and what does a batch of one lack that "
    "only one way of normalizing needs?",
)
def _foretell(foretell: Any) -> bool:
    for training, track, buffers in product((True, False), repeat=3):
        uses_batch = training or not buffers
        expected = (uses_batch, training and track and buffers, uses_batch)
        if tuple(bool(answer) for answer in foretell(training, track, buffers)) != expected:
            return False
    return True


@exercise("13.1", "which axes hold the values of one channel? Multiply the lengths of all of them.")
def _raises(raises: Any) -> bool:
    alone = [(1, 512), (1, 512, 1, 1), (1, 3, 1), (1, 1)]
    enough = [(2, 512), (1, 64, 7, 7), (2, 512, 1, 1), (1, 3, 5), (1, 4, 1, 2), (8, 1)]
    answers = [raises(shape) for shape in alone + enough]
    return answers == [True] * len(alone) + [False] * len(enough)


@exercise(
    "13.2",
    "how many images are left for the last batch? And think of the smallest batch size of all.",
)
def _safe_sizes(safe_sizes: Any) -> bool:
    cases = {
        (3969, (16, 32, 48, 64, 100, 128)): [48, 100],
        (10, (10, 9, 5, 3, 2, 1)): [10, 5, 2],
        (65, (128, 64, 1)): [128],
    }
    return all(list(safe_sizes(n, list(sizes))) == right for (n, sizes), right in cases.items())


@exercise(
    "13.3",
    "look at every module of the model, not only at its children; and what have the names of all "
    "dropout classes in common, or their base class?",
)
def _only_dropout(only_dropout: Any) -> bool:
    from torch import nn

    inner = nn.Sequential(nn.Dropout2d(), nn.BatchNorm2d(3), nn.AlphaDropout())
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), inner, nn.Dropout())
    for start in (True, False):
        model.train(start)
        only_dropout(model)
        awake = {type(module).__name__ for module in model.modules() if module.training}
        if awake != {"Dropout", "Dropout2d", "AlphaDropout"}:
            return False
    return True


@exercise(
    "14.1",
    "a gradient moves one pair, a forward pass the other; which switch stops which? And something "
    "counts.",
)
def _what_moves(what_moves: Any) -> bool:
    buffers = {"running_mean", "running_var", "num_batches_tracked"}
    for grad, training, track in product((True, False), repeat=3):
        expected = ({"weight", "bias"} if grad else set()) | (
            buffers if training and track else set()
        )
        if set(what_moves(grad, training, track)) != expected:
            return False
    return True


@exercise(
    "14.2",
    "write y with the bias and y without it, in evaluation mode; what is missing in the second, "
    "and which parameter adds the same number for every example?",
)
def _beta_without_bias(beta_without_bias: Any) -> bool:
    z, c = sample((5, 3)), sample((1, 3), 1)[0]
    mean, var, eps = sample((1, 3), 2)[0], sample((1, 3), 3)[0] ** 2, 0.1
    gamma, beta = sample((1, 3), 4)[0], sample((1, 3), 5)[0]
    expected = gamma * (z + c - mean) / np.sqrt(var + eps) + beta
    new = np.asarray(beta_without_bias(c, mean, var, gamma, beta, eps), dtype=np.float64)
    return close(gamma * (z - mean) / np.sqrt(var + eps) + new, expected)


@exercise(
    "14.3",
    "the mean scales as z does. The whole root has to scale as z does too, and under it stands "
    "epsilon, as large as before.",
)
def _follow(follow: Any) -> bool:
    z, mean, var = sample((5, 3)), sample((1, 3), 2)[0], sample((1, 3), 3)[0] ** 2
    for factor, eps in ((3.0, 1e-5), (0.5, 0.1), (10.0, 0.8)):
        new_mean, new_var = follow(mean, var, eps, factor)
        found = (factor * z - new_mean) / np.sqrt(np.asarray(new_var) + eps)
        if not close(found, (z - mean) / np.sqrt(var + eps)):
            return False
    return True


@exercise(
    "15.1",
    "zeros add nothing to a sum, nor to a sum of squares; what do they do to the number that it is "
    "divided by?",
)
def _without_padding(without_padding: Any) -> bool:
    values = sample((6, 1), seed=15)[:, 0]
    for zeros in (6, 2, 0):
        padded = np.concatenate([values, np.zeros(zeros)])
        answer = without_padding(padded.mean(), padded.var(), zeros / len(padded))
        if not close(answer, (values.mean(), values.var())):
            return False
    return True


@exercise(
    "15.2",
    "write down the new z of a node, and find the old one in it; what is left over is the same for "
    "every image.",
)
def _moved_statistics(moved_statistics: Any) -> bool:
    x, weight, bias = sample((50, 6)), sample((4, 6), seed=1), sample((4, 1), seed=2)[:, 0]
    z = x @ weight.T + bias
    for a, b in ((0.5, 0.5), (0, 0.3), (-2, 4)):
        new = (a + b * x) @ weight.T + bias
        given = (z.mean(axis=0), z.var(axis=0), weight, bias, a, b)
        if not close(moved_statistics(*given), (new.mean(axis=0), new.var(axis=0))):
            return False
    return True


@exercise(
    "15.3",
    "the mean stays; which share of the values is left, and how much larger is the square of each?",
)
def _variance_in_evaluation(variance_in_evaluation: Any) -> bool:
    values = sample((200, 1), seed=3)[:, 0]
    for moved, p in ((values, 0.5), (values - values.mean(), 0.2), (values + 3, 0.8)):
        mean, var = moved.mean(), moved.var()
        seen = (moved**2).mean() / (1 - p) - mean**2
        if not close(variance_in_evaluation(mean, var, p), var / seen):
            return False
    return True


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


@exercise(
    "17.1",
    "a channel has one value for each image and each place: how many places are there where the "
    "batch norm stands?",
)
def _sharing_a_mean(answer: Any) -> bool:
    return close(answer, [32 * 7 * 7, 32 * 14 * 14, 32 * 7 * 7])


@exercise(
    "17.2",
    "every feature adds its own share, as if it were the only one; what is the distance of two "
    "normal distributions of one number?",
)
def _independent(independent: Any) -> bool:
    mean_a, mean_b = sample((2, 5), seed=17)
    var_a, var_b = sample((2, 5), seed=18) ** 2
    expected = np.sum((mean_a - mean_b) ** 2 + (np.sqrt(var_a) - np.sqrt(var_b)) ** 2)
    return close(independent(mean_a, var_a, mean_b, var_b), expected)


@exercise(
    "17.3",
    "write the loss with p as the unknown, find where its slope is zero, and ask which score the "
    "sigmoid turns into that p.",
)
def _best_score(best_score: Any) -> bool:
    return all(close(best_score(r), math.log(r)) for r in (1.0, 3.0, 0.25, 40.0))


@exercise(
    "18.1",
    "first take away the brightness and the contrast that the batch has, then give it those that "
    "were asked for; one mean and one standard deviation for all pixels.",
)
def _disguise(disguise: Any) -> bool:
    x = sample((6, 1, 5, 5), seed=18)
    y = np.asarray(disguise(x, 0.3, 0.2), dtype=np.float64)
    seen = [functional.batch_norm(v, [1.0], [0.0], eps=1e-12)[0] for v in (x, y)]
    return y.shape == x.shape and close([y.mean(), y.std()], [0.3, 0.2]) and close(seen[0], seen[1])


@exercise(
    "18.2",
    "apart, the running variance averages variances that were each taken around a mean of their "
    "own; mixed, all values are compared with one mean.",
)
def _in_the_long_run(in_the_long_run: Any) -> bool:
    for w, mean_r, var_r, mean_f, var_f in ((0.5, 2, 1, -2, 1), (0.299, 1, 0.5, 3, 2)):
        mean, var = w * mean_r + (1 - w) * mean_f, w * var_r + (1 - w) * var_f
        mixed = var + w * (1 - w) * (mean_r - mean_f) ** 2
        if not close(in_the_long_run(w, mean_r, var_r, mean_f, var_f), [mean, var, mean, mixed]):
            return False
    return True


@exercise(
    "18.3",
    "what do two different numbers become, and what does that change when one of them moves a "
    "little?",
)
def _two_images(gradients: Any) -> bool:
    return close(gradients(3.0, 1.0, 0.7), np.zeros(4)) and close(gradients(5, 4, -2), np.zeros(4))


@exercise(
    "19.1",
    "a linear layer multiplies every variance by the same factor, and in evaluation mode the batch "
    "norm divides by the old standard deviation; take the root of what is left.",
)
def _too_small(too_small: Any) -> bool:
    def left(t: float) -> float:
        density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        return math.sqrt(1 - 2 * t * density / math.erf(t / math.sqrt(2)))

    return all(close(too_small(t), left(t)) for t in (0.3, 0.5, 1.0, 2.5))


@exercise(
    "19.2",
    "write down what each of the two averages keeps of the old value in one step; PyTorch's "
    "momentum is the weight of the new one.",
)
def _momentum_for(momentum_for: Any) -> bool:
    return all(close(momentum_for(d), 1 - d) for d in (0.9, 0.98, 0.999))


@exercise(
    "19.3",
    "what does normalizing make of two numbers, whatever they are? And how many lists of three "
    "such values are there?",
)
def _two_at_a_time(answer: Any) -> bool:
    return close(answer, [2, 8])


@exercise(
    "20.1",
    "a row of z is an image; cut it into `groups` pieces of equal length, normalize each piece by "
    "itself, and give the array its old shape back.",
)
def _group_norm(group_norm: Any) -> bool:
    z = sample((4, 6, 3, 5))
    for groups in (1, 2, 3, 6):
        rows = z.reshape(4 * groups, -1)
        expected = (rows.T - rows.mean(axis=1)) / np.sqrt(rows.var(axis=1) + 1e-5)
        if not close(group_norm(z.copy(), groups), expected.T.reshape(z.shape)):
            return False
    return True


@exercise(
    "20.2",
    "x is one of R + 1 values: what is their mean, and what their variance around it? Both the "
    "distance of x and that of the reference from the new mean count.",
)
def _virtual_value(virtual_value: Any) -> bool:
    for seed, R in enumerate((2, 8, 31)):
        values = sample((R + 1, 1), seed)[:, 0]
        *reference, x = values
        expected = (x - values.mean()) / np.sqrt(values.var() + 1e-5)
        answer = virtual_value(x, np.mean(reference), np.var(reference), R)
        if not close(answer, expected):
            return False
    return True


@exercise(
    "20.3",
    "y = gamma_k (z - mean) / sqrt(var + eps) + beta_k: what multiplies z, and what is left over?",
)
def _straight_lines(straight_lines: Any) -> bool:
    weight, bias, (mean, spread, z) = sample((4, 3), 1), sample((4, 3), 2), sample((3, 3), 3)
    var = 1 + spread**2
    a, b = straight_lines(weight.copy(), bias.copy(), mean, var)
    return close(a * z + b, weight * (z - mean) / np.sqrt(var + 1e-5) + bias)
