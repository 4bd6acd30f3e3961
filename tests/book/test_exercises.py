"""The self-checks: right answers pass, wrong ones get a hint and never the answer."""

import json
import math
import operator
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bnlib.book import exercises
from bnlib.book.exercises import EXERCISES
from bnlib.doctor import diagnose
from bnlib.gan import frechet_distance
from bnlib.scratch.layers import Linear

CHAPTERS = sorted((Path(__file__).parents[2] / "chapters").glob("*.ipynb"))


def normalize_images(x, eps=1e-5, axes=(0, 2, 3)):
    mean, var = (f(x, axis=axes, keepdims=True) for f in (np.mean, np.var))
    return (x - mean) / np.sqrt(var + eps)


def images_backward(dy, z_hat, gamma, std, axes=(0, 2, 3)):
    dy_mean, along = ((dy * v).mean(axis=axes, keepdims=True) for v in (1, z_hat))
    return (gamma / std)[:, None, None] * (dy - dy_mean - z_hat * along)


def unbiased_backward(dy, z_hat, gamma, std, less=1):
    along = (dy * z_hat).sum() / (len(dy) - less)
    return gamma / std * (dy - dy.mean() - z_hat * along)


def batches_needed(momentum, share, kept=lambda momentum: 1 - momentum):
    k = 0
    while kept(momentum) ** k >= share:
        k += 1
    return k


def updates_needed(momentum, limit, too_much):
    k = 0
    while too_much((1 - momentum) ** k, limit) and k < 1000:
        k += 1
    return k


def fold_into_next(W, c, mean, var, gamma, beta, eps):
    a = gamma / np.sqrt(var + eps)
    return W @ np.diag(a), c + (W * (beta - a * mean)).sum(axis=1)


def merge(counts, means, variances):
    mean = np.average(means, weights=counts)
    square = np.average(variances + means**2, weights=counts)
    return mean, square - mean**2


def backward_line(gamma, std, mean, dgamma, dbeta, m):
    slope = -gamma * dgamma / (m * std**2)
    return gamma / std, slope, -gamma * dbeta / (m * std) - slope * mean


def normalize_once(model, x, go_on=True):
    for layer in model.layers:
        z = layer(x)
        if isinstance(layer, Linear):
            layer.bias -= z.mean(axis=0)
            layer.weight /= z.std(axis=0)[:, None]
            layer.bias /= z.std(axis=0)
        x = layer(x) if go_on else z


def frozen_backward(dy, x, weight, mean, invstd, axes=(0, 2, 3)):
    mean, invstd = mean[:, None, None], invstd[:, None, None]
    z_hat = (x - mean) * invstd
    return dy * weight[:, None, None] * invstd, (dy * z_hat).sum(axes), dy.sum(axes)


def whose(variances, m, running, correct=True):
    rules = {
        "PyTorch": (0.1, 1, m / (m - 1) if correct else 1),
        "textbook": (0.1, 1, 1),
        "d2l": (0.9, 1, 1),
        "CS231n": (0.1, 0, 1),
    }

    def arrive(share, start, factor):
        ages = np.arange(len(variances))[::-1]
        shares = share * (1 - share) ** ages
        return start * (1 - share) ** len(variances) + factor * (shares * variances).sum()

    return min(rules, key=lambda name: abs(arrive(*rules[name]) - running))


def from_keras_list(weights, scale, center, neutral=(1, 0)):
    weights = iter(weights)
    found = {
        "weight": next(weights) if scale else None,
        "bias": next(weights) if center else None,
        "running_mean": next(weights),
        "running_var": next(weights),
    }
    for name, value in zip(("weight", "bias"), neutral, strict=True):
        if found[name] is None:
            found[name] = np.full_like(found["running_var"], value)
    return found


def as_keras_has_it(running_var, momentum, batches, n):
    added = running_var - (1 - momentum) ** batches
    return running_var - added / n


def combine(first, second, apart=True):
    n = first[0] + second[0]
    if n == 0:
        return 0, 0.0, 0.0
    mean = (first[0] * first[1] + second[0] * second[1]) / n
    moved = sum(k * (own - mean) ** 2 for k, own, _ in (first, second))
    return n, mean, first[2] + second[2] + apart * moved


def group_size(n, e, error=lambda values: values**-0.5):
    p = 1
    while error(p * n) > e * (1 + 1e-9):
        p += 1
    return p


def without_padding(mean, var, p):
    square = var + mean**2
    return mean / (1 - p), (square - mean**2 / (1 - p)) / (1 - p)


def moved_statistics(mean, var, weight, bias, a, b):
    return b * (mean - bias) + bias + weight @ np.full(weight.shape[1], a), (b * np.sqrt(var)) ** 2


def variance_in_evaluation(mean, var, p):
    kept = 1 - p
    return var / (kept * (var + mean**2) / kept**2 - mean**2)


def independent(mean_a, var_a, mean_b, var_b, spread=np.sqrt):
    return np.sum((mean_a - mean_b) ** 2) + np.sum((spread(var_a) - spread(var_b)) ** 2)


def group_norm(z, groups, eps=1e-5):
    rows = z.reshape(len(z), groups, -1)
    mean, var = (f(rows, axis=2, keepdims=True) for f in (np.mean, np.var))
    return ((rows - mean) / np.sqrt(var + eps)).reshape(z.shape)


def virtual_value(x, mean, var, R, eps=1e-5):
    own = 1 / (R + 1)
    new_var = (1 - own) * (var + own * (x - mean) ** 2)
    return (x - mean - own * (x - mean)) / np.sqrt(new_var + eps)


def straight_lines(weight, bias, mean, var, eps=1e-5):
    a = weight / np.sqrt(var + eps)
    return a, bias - a * mean


def too_small(t):
    density = np.exp(-t * t / 2) / np.sqrt(2 * np.pi)
    return np.sqrt(1 - 2 * t * density / math.erf(t / np.sqrt(2)))


def wake(*kinds):
    def only(model):
        for module in model.modules():
            module.training = type(module).__name__ in kinds

    return only


def without_start(mean, var, momentum, batches, start=1):
    rest = 1 - (1 - momentum) ** batches
    return mean / rest, (var - start * (1 - rest)) / rest


def foretell(training, track, buffers):
    return training or not buffers, training and track and buffers, training or not buffers


def what_moves(grad, training, track):
    names = ["weight", "bias"] * grad
    return names + ["running_mean", "running_var", "num_batches_tracked"] * (training and track)


def follow(mean, var, eps, factor):
    return factor * mean, factor**2 * var + (factor**2 - 1) * eps


def in_the_long_run(w, mean_r, var_r, mean_f, var_f):
    mean, square = np.average(
        [[mean_r, mean_r**2 + var_r], [mean_f, mean_f**2 + var_f]], axis=0, weights=[w, 1 - w]
    )
    return [mean, np.average([var_r, var_f], weights=[w, 1 - w]), mean, square - mean**2]


RIGHT = {
    "01.1": [-1.0, 1.0],
    "01.2": normalize_images,
    "01.3": lambda eps: 0.9 * np.sqrt(eps / (1 - 0.9**2)),
    "02.1": 0.0,
    "02.2": lambda z, mean, std, eps: (std * np.sqrt(z.var() + eps) / z.std(), mean),
    "02.3": lambda z_hat, gamma: -gamma * np.median(z_hat),
    "03.1": images_backward,
    "03.2": 9,
    "03.3": unbiased_backward,
    "04.1": batches_needed,
    "04.2": fold_into_next,
    "04.3": merge,
    "06.1": lambda shape, size, trips, speed: np.prod(shape) * size * trips / speed,
    "06.2": lambda total, square, m: (square - total**2 / m) / square,
    "06.3": backward_line,
    "05.1": lambda n, m: n // m * n,
    "05.2": 400,
    "05.3": normalize_once,
    "07.1": frozen_backward,
    "07.2": lambda batches_before: 1 / (1 + batches_before),
    "07.3": lambda m: (m - 1) / m,
    "08.1": whose,
    "08.2": lambda running_var, k, m: 0.9**k + running_var * m / (m - 1),
    "08.3": lambda g, z_hat: g - g.mean() - z_hat * (g @ z_hat) / len(g),
    "09.1": lambda shape: 5 * 2 * np.prod(shape),
    "09.2": lambda M, C, rows, channels: np.ceil(M / rows) * np.ceil(C / channels),
    "09.3": lambda bits: 2 ** (bits + 1),
    "11.1": lambda var, eps, fixed_eps: var - (fixed_eps - eps),
    "11.2": from_keras_list,
    "11.3": as_keras_has_it,
    "10.1": combine,
    "10.2": lambda sizes: np.array(sizes) / np.mean(sizes),
    "10.3": group_size,
    "15.1": without_padding,
    "15.2": moved_statistics,
    "15.3": variance_in_evaluation,
    "17.1": [1568, 6272, 1568],
    "17.2": independent,
    "17.3": np.log,
    "20.1": group_norm,
    "20.2": virtual_value,
    "20.3": straight_lines,
    "19.1": too_small,
    "19.2": lambda decay: 1 - decay,
    "19.3": [2, 8],
    "13.1": lambda shape: np.prod(shape) == shape[1],
    "13.2": lambda n, sizes: [m for m in sizes if 1 not in {m, n % m}],
    "13.3": wake("Dropout", "Dropout2d", "AlphaDropout"),
    "12.1": without_start,
    "12.2": lambda momentum, old, new: 1 - (1 - momentum) ** (new / old),
    "12.3": foretell,
    "14.1": what_moves,
    "14.2": lambda c, mean, var, gamma, beta, eps: beta + gamma * c / np.sqrt(var + eps),
    "14.3": follow,
    "18.1": lambda x, mean, std: mean + std * (x - np.mean(x)) / np.std(x),
    "18.2": in_the_long_run,
    "18.3": lambda x1, x2, w: np.zeros(4),
    "16.1": ["momentum-convention", "frozen-but-training"],
    "16.2": lambda momentum, limit=0.1: updates_needed(momentum, limit, operator.gt),
    "16.3": lambda x: x.mean(axis=1).var() * x.shape[1] / x.var(),
}
WRONG = {  # the mistakes that the exercises are about
    "01.1": [-0.5, 0.5],
    "01.2": lambda x, eps=1e-5: normalize_images(x, eps, axes=0),
    "01.3": lambda eps: 0.81 * eps / 0.19,
    "02.1": 5.0,
    "02.2": lambda z, mean, std, eps: (std, mean),
    "02.3": lambda z_hat, gamma: -np.median(z_hat),
    "03.1": lambda dy, z_hat, gamma, std: images_backward(dy, z_hat, gamma, std, axes=0),
    "03.2": 3,
    "03.3": lambda dy, z_hat, gamma, std: unbiased_backward(dy, z_hat, gamma, std, less=0),
    "04.1": lambda momentum, share: batches_needed(momentum, share, kept=lambda m: m),
    "04.2": lambda W, c, *layer: (fold_into_next(W, c, *layer)[0], c),
    "04.3": lambda n, means, variances: (
        np.average(means, weights=n),
        np.average(variances, weights=n),
    ),
    "06.1": lambda shape, size, trips, speed: np.prod(shape) * size / speed,
    "06.2": lambda total, square, m: 1 - total**2 / square,
    "06.3": lambda gamma, std, mean, *sums: backward_line(gamma, std, 0 * mean, *sums),
    "05.1": lambda n, m: n,
    "05.2": 20,
    "05.3": lambda model, x: normalize_once(model, x, go_on=False),
    "07.1": lambda dy, x, *given: (dy, *frozen_backward(dy, x, *given)[1:]),
    "07.2": lambda batches_before: 1 / batches_before if batches_before else 1,
    "07.3": lambda m: m / (m - 1),
    "08.1": lambda *arguments: whose(*arguments, correct=False),
    "08.2": lambda running_var, k, m: running_var * m / (m - 1),
    "08.3": lambda g, z_hat: g - g.mean(),
    "09.1": lambda shape: 5 * 4 * np.prod(shape),
    "09.2": lambda M, C, rows, channels: np.ceil(M * C / (rows * channels)),
    "09.3": lambda bits: 2**bits,
    "11.1": lambda var, eps, fixed_eps: var * (var + eps) / (var + fixed_eps),
    "11.2": lambda *answer: from_keras_list(*answer, neutral=(0, 0)),
    "11.3": lambda running_var, momentum, batches, n: running_var * (n - 1) / n,
    "10.1": lambda first, second: combine(first, second, apart=False),
    "10.2": lambda sizes: np.array(sizes) / sum(sizes),
    "10.3": lambda n, e: group_size(n, e, error=lambda values: 1 / values),
    "15.1": lambda mean, var, p: (mean / (1 - p), var / (1 - p)),
    "15.2": lambda *given: moved_statistics(*given[:3], 0 * given[3], *given[4:]),
    "15.3": lambda mean, var, p: 1 - p,
    "17.1": [49, 196, 49],
    "17.2": lambda *moments: independent(*moments, spread=lambda var: var),
    "17.3": lambda r: r / (1 + r),
    "20.1": lambda z, groups: group_norm(z, z.shape[1] // groups),
    "20.2": lambda x, mean, var, R: (x - mean) / np.sqrt(var + 1e-5),
    "20.3": lambda weight, bias, mean, var: (weight / np.sqrt(var + 1e-5), bias),
    "19.1": lambda t: too_small(t) ** 2,
    "19.2": lambda decay: decay,
    "19.3": [2, 6],
    "13.1": lambda shape: shape[0] == 1,
    "13.2": lambda n, sizes: [m for m in sizes if n % m != 1],
    "13.3": wake("Dropout"),
    "12.1": lambda *answer: without_start(*answer, start=0),
    "12.2": lambda momentum, old, new: momentum * new / old,
    "12.3": lambda training, track, buffers: foretell(training, track, True),
    "14.1": lambda grad, training, track: what_moves(grad, grad and training, track),
    "14.2": lambda c, mean, var, gamma, beta, eps: beta + c,
    "14.3": lambda mean, var, eps, factor: follow(mean, var, 0, factor),
    "18.1": lambda x, mean, std: mean + std * x,
    "18.2": lambda *given: [*in_the_long_run(*given)[:2]] * 2,
    "18.3": lambda x1, x2, w: [w, -w, 0, 0],
    "16.1": ["momentum-convention", "few-values"],
    "16.2": lambda momentum, limit=0.1: updates_needed(momentum, limit, operator.ge),
    "16.3": lambda x: x.mean(axis=1).var() / x.var(),
}


def raises(*arguments):
    raise RuntimeError("no idea")


NONSENSE = {
    "None": None,
    "Ellipsis": ...,
    "text": "one",
    "NaN": float("nan"),
    "another shape": np.zeros((2, 3)),
    "ragged": [[1.0], [1.0, 2.0]],
    "no function": object(),
    "a function that raises": raises,
    "a function that returns nothing": lambda *arguments: None,
    "a function that returns another shape": lambda *arguments: np.zeros((1, 2, 3)),
}


def said(capsys, number, answer):
    exercises.check(number, answer)
    line, rest = capsys.readouterr().out.split("\n", 1)
    assert rest == ""
    return line


def test_every_exercise_is_tested():
    assert sorted(RIGHT) == sorted(WRONG) == sorted(EXERCISES)


@pytest.mark.parametrize("number", EXERCISES)
def test_a_right_answer_passes(capsys, number):
    assert said(capsys, number, RIGHT[number]) == f"Exercise {number}: correct."


@pytest.mark.parametrize("number", EXERCISES)
def test_a_mistake_gets_the_hint(capsys, number):
    expected = f"Exercise {number}: not yet. Hint: {EXERCISES[number].hint}"
    assert said(capsys, number, WRONG[number]) == expected


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE)
@pytest.mark.parametrize("number", EXERCISES)
def test_nonsense_gets_the_hint_too(capsys, number, answer):
    line = said(capsys, number, answer)
    assert line.startswith(f"Exercise {number}: not yet.")
    assert line.endswith(f"Hint: {EXERCISES[number].hint}")


def test_an_error_in_the_answer_is_reported(capsys):
    assert "It stopped with RuntimeError: no idea." in said(capsys, "01.2", raises)


@pytest.mark.parametrize("number", EXERCISES)
def test_a_hint_does_not_give_the_answer(number):
    if callable(answer := RIGHT[number]):
        return
    hint = EXERCISES[number].hint
    if any(isinstance(part, str) for part in np.atleast_1d(answer)):
        assert not any(word in hint for word in answer)
        return
    numbers = {abs(float(text)) for text in re.findall(r"\d+(?:\.\d+)?", hint)}
    assert not numbers & set(np.abs(np.atleast_1d(answer)))


def test_the_unbiased_gradient_is_that_of_autograd():
    rng = np.random.default_rng(0)
    x, dy = torch.tensor(rng.normal(2, 3, 7), requires_grad=True), torch.tensor(rng.normal(size=7))
    std = (x.var(correction=1) + 1e-5).sqrt()
    z_hat = (x - x.mean()) / std
    (expected,) = torch.autograd.grad(1.7 * z_hat, x, dy)
    ours = unbiased_backward(dy.numpy(), z_hat.detach().numpy(), 1.7, std.item())
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_an_unknown_exercise_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"expected one of 01\.1, .*, got '99\.9'"):
        exercises.check("99.9", 1)


def test_each_exercise_is_used_in_the_chapter_of_its_number_and_nowhere_else():
    used = {}
    for chapter in CHAPTERS:
        cells = json.loads(chapter.read_text("utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        for number in set(re.findall(r"""exercises\.check\(\s*["'](.+?)["']""", code)):
            used.setdefault(number, []).append(chapter.name[:2])
    assert used == {number: [number[:2]] for number in EXERCISES}


def test_the_distance_of_independent_features_is_the_librarys():
    rng = np.random.default_rng(0)
    points = rng.permuted(np.linspace(-1, 1, 40)), rng.permuted(np.linspace(-1, 1, 40))
    plane = np.array([np.tile(points[0], 40), np.repeat(points[1], 40)]).T  # not correlated
    a, b = 3 * plane + 1, plane * [0.5, 4] - 2
    moments = [f(c) for c in (a, b) for f in (lambda c: c.mean(0), lambda c: c.var(0, ddof=1))]
    np.testing.assert_allclose(independent(*moments), frechet_distance(a, b), rtol=1e-9)


def test_the_patient_of_16_1_has_the_two_faults_that_its_exercise_asks_for():
    found = diagnose(exercises.patient())
    assert {finding.slug for finding in (*found.errors, *found.warnings)} == set(RIGHT["16.1"])
