"""What several tests share: one thread, and what NumPy computes for the live figures."""

import numpy as np
import pytest

from bnlib.scratch import functional

EPS = 1e-5


@pytest.fixture
def one_thread():
    """Keep PyTorch's small matrix products on one thread: a second one waits more than it works."""
    import torch  # here, since the tests of NumPy's part do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def moments(values):
    return {"mean": np.mean(values), "var": np.var(values)}


def skewness(values):
    centered = values - np.mean(values)
    return np.mean(centered**3) / np.var(values) ** 1.5 if np.var(values) > 0 else 0.0


def column(values):
    return np.asarray(values, dtype=float)[:, None]


def normalize(data, node, batch_size, eps, draw):
    values = np.array(data["nodes"][node]["z"])
    z = np.take(values, np.arange(draw * batch_size, (draw + 1) * batch_size), mode="wrap")
    z_hat = functional.normalize(column(z), *functional.moments(column(z)), eps=eps)[:, 0]
    return {
        "z": z,
        "zHat": z_hat,
        "range": [values.min(), values.max()],
        "before": {**moments(z), "skewness": skewness(z)},
        "after": {**moments(z_hat), "skewness": skewness(z_hat)},
    }


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


ACTIVATIONS = [  # each with its slope, divided by the largest slope
    (sigmoid, lambda y: 4 * sigmoid(y) * (1 - sigmoid(y))),
    (np.tanh, lambda y: 1 - np.tanh(y) ** 2),
    (lambda y: np.maximum(y, 0), lambda y: (y >= 0).astype(float)),
]


def scale_and_shift(data, gamma, beta, activation):
    y, cache = functional.batch_norm(column(data["z"]), [gamma], [beta], eps=EPS)
    g, slope = ACTIVATIONS[activation]
    return {
        "zHat": cache.z_hat[:, 0],
        "y": y[:, 0],
        "a": g(y[:, 0]),
        "flat": np.mean(slope(y) < 0.1),
        "moments": moments(y),
    }


def backward(data, example, by):
    def both(values):
        _, cache = functional.batch_norm(column(values), [1], [0], eps=EPS)
        dz, *_ = functional.batch_norm_backward(column(data["dy"]), cache)
        return {"zHat": cache.z_hat[:, 0], "dz": dz[:, 0]}

    moved = np.array(data["z"], dtype=float)
    moved[example] += by
    before, after = both(data["z"]), both(moved)
    change = np.abs(after["zHat"] - before["zHat"])
    return {
        "before": before,
        "after": after,
        "others": np.delete(change, example).max(),
        "sum": after["dz"].sum(),
        "along": after["dz"] @ after["zHat"],
    }


def running(data, source, momentum, fed, trained):
    batches = data["sources"][source]
    means, variances = (np.array(batches[key], dtype=float)[:, None] for key in ("mean", "var"))
    steps = [(np.zeros(1), np.ones(1))]
    for k in range(fed):
        share = momentum if k < trained else 0
        steps.append(
            functional.update_running(*steps[-1], means[k], variances[k], data["m"], share)
        )
    training = fed <= trained
    used = (means[fed - 1], variances[fed - 1]) if training else steps[-1]
    limits = [[*means[:, 0], 0], [*variances[:, 0], 1]]
    std = np.sqrt(used[1][0] + data["eps"])
    return {
        "running": {"mean": [s[0][0] for s in steps], "var": [s[1][0] for s in steps]},
        "means": means[:fed, 0],
        "vars": variances[:fed, 0],
        "training": int(training),
        "limits": [[min(v), max(v)] for v in limits],
        "y": {
            "mean": (means[fed - 1, 0] - used[0][0]) / std,
            "var": variances[fed - 1, 0] / std**2,
        },
    }


def variance(data, mean, std):
    x = (10**mean + 10**std * np.array(data["z"])).astype(np.float32)

    def average(values):  # one by one, as the figure adds, in the type of the values
        return np.cumsum(values)[-1] / values.dtype.type(len(values))

    def squares(values):
        return average(values * values) - average(values) ** 2

    running = total = np.float32(0)
    for i, value in enumerate(x, start=1):
        off = value - running
        running = running + off / np.float32(i)
        total = total + off * (value - running)
    wide = x.astype(float)
    exact = average((wide - average(wide)) ** 2)
    found = [
        average((x - average(x)) ** 2),
        squares(x),
        total / np.float32(len(x)),
        squares(x - x[0]),
        squares(wide),
    ]
    error = np.abs(np.array(found, dtype=float) - exact) / exact if exact else np.ones(5)
    return {
        "exact": exact,
        "found": [float(v) for v in found],
        "digits": np.maximum(0, -np.log10(np.maximum(error, 1e-8))),
    }


def training(data, rate, start):
    at = np.argmin(np.abs(np.log10(data["rates"]) - np.log10(rate)))
    curves = {key: np.array(data["starts"][start][key]) for key in ("with", "without")}
    ends = {key: curve[:, -5:].mean(axis=1) for key, curve in curves.items()}
    return {
        **{key: curve[at] for key, curve in curves.items()},
        **{key: data[key] for key in ("rates", "block", "cap")},
        "ends": ends,
        "last": {key: end[at] for key, end in ends.items()},
    }


PYTORCH = {"inUse": 0, "inMemory": 1, "share": 0.1, "start": 1}


def seven(data, layer, size, fed):
    z = np.array(data["z"], dtype=float)
    batches = np.resize(z, (fed + 1, size))  # as often as needed, from the start again
    variances = batches.var(axis=1)

    def rule(kind):
        mean, running = 0.0, [float(kind["start"])]
        for batch in batches[:fed]:
            new = batch.var(ddof=kind["inMemory"])
            mean = (1 - kind["share"]) * mean + kind["share"] * batch.mean()
            running.append((1 - kind["share"]) * running[-1] + kind["share"] * new)
        used, std = batches[fed].var(ddof=kind["inUse"]), np.sqrt(running[-1] + data["eps"])
        return {
            "variance": running,
            "training": np.sqrt(variances[fed] / (used + data["eps"])),
            "evaluation": z.std() / std,
            "place": (z.mean() - mean) / std,
        }

    ours, theirs = rule(data["layers"][layer]), rule(PYTORCH)
    return {"ours": ours, "theirs": theirs, "vars": variances[:fed]}


def roofline(data, batch, channels, height, format, card):
    values = np.prod([2.0**batch, 2.0**channels, height, height])
    size = data["formats"][format]["bytes"]
    moved = np.array(data["trips"]) * size * values
    bandwidths, peaks = (np.array([c[key] for c in data["cards"]]) for key in ("bandwidth", "peak"))
    intensity = data["operations"][0] / (data["trips"][0] * size)
    attained = np.minimum(1e9 * bandwidths * intensity, 1e12 * peaks)[card]
    return {
        "megabytes": moved / 1e6,
        "times": 1e6 * moved / (1e9 * bandwidths[card]),
        "steps": 1e6 * moved.sum() / (1e9 * bandwidths),
        "intensity": intensity,
        "rate": attained / 1e12,
        "share": attained / (1e12 * peaks[card]),
        "roofs": {
            "start": 1e9 * bandwidths * 0.1 / 1e12,
            "ridge": 1e12 * peaks / (1e9 * bandwidths),
            "peak": peaks,
        },
    }


def momentum(data, convention, momentum, batches):
    share = [momentum, 1 - momentum][convention]
    back, at = np.arange(20), np.linspace(0, max(60, batches), 101)
    return {
        "share": share,
        "other": 1 - momentum,
        "weights": share * (1 - share) ** back,
        "copied": (1 - share) * share**back,
        "at": at,
        "start": (1 - share) ** at,
        "left": (1 - share) ** batches,
    }


def devices(data, devices, channels, batch, bandwidth, latency):
    values = batch * data["places"] * channels
    layer = 1e6 * np.array([54 * channels * values / data["speed"], 32 * values / data["memory"]])

    def talk(p):
        sent = (p - 1) * (8 + 16 * channels) + 32 * channels * (1 - 1 / p)
        waits = 3 * latency * np.array([p - 1, np.log2(p)])
        return sent / bandwidth / 1000, waits

    def shares(p):
        send, waits = talk(p)
        return 100 * (1 - layer.sum() / (send + waits + layer.sum()))

    send, (ring, doubling) = talk(devices)
    curves = np.array([shares(2**k) for k in range(1, 11)]).T
    return {
        **dict(zip(("convolution", "norm"), layer, strict=True)),
        **{"send": send, "ring": ring, "doubling": doubling},
        "share": dict(zip(("ring", "doubling"), shares(devices), strict=True)),
        "curves": dict(zip(("ring", "doubling"), curves, strict=True)),
    }


def orders(data, together, distance, momentum):
    z, size, mixed = np.array(data["classes"]), 10, [1, 2, 5, 10][together]
    centres = z.mean(axis=1)
    middle = centres.mean()
    z = z - (centres - middle)[:, None] * (1 - distance)
    stream = z.reshape(-1, mixed, z.shape[1]).transpose(0, 2, 1).ravel()
    batches = stream.reshape(-1, size)
    means, variances = batches.mean(axis=1), batches.var(axis=1, ddof=1)
    steps = [(stream.mean(), stream.var(ddof=1))]
    for batch in zip(means, variances, strict=True):
        steps.append(tuple((1 - momentum) * np.array(steps[-1]) + momentum * np.array(batch)))
    ends = middle + 3 * (centres - middle)
    wide = np.var(data["classes"], axis=1, ddof=1).mean() + 9 * centres.var()
    return {
        "means": means,
        "running": {"mean": [s[0] for s in steps], "var": [s[1] for s in steps]},
        "pooled": {"mean": stream.mean(), "var": stream.var(ddof=1)},
        "averaged": variances.mean(),
        "size": size,
        "mixed": mixed,
        "limits": [min(ends), max(ends)],
        "top": wide,
    }


def gan(data, step):
    frame = data["steps"].index(step)
    shown = {key: data[key] for key in ("sheet", "steps", "distances", "real")}
    return {
        **shown,
        "frame": frame,
        "distance": data["distances"][frame],
        "losses": data["losses"][frame],
    }


def classes(data, first, second, share, point):
    states = [{k: 1.0} for k in range(10)]
    for a in range(10):
        for b in range(a + 1, 10):
            states += [{a: 1 - t, b: t} for t in (0.25, 0.5, 0.75)]
    wanted = {first: 1 - share, second: share} if first != second else {first: 1.0}
    frame = states.index({k: part for k, part in wanted.items() if part})
    read = data["percents"][point - 1][frame]
    given = {"sheet": data["sheets"][point - 1], "frame": frame, "read": read}
    return {**given, "best": max(read), "digit": int(np.argmax(read))}


def truncation(data, threshold, statistics):
    k = data["thresholds"].index(threshold)
    shown = {key: data[key] for key in ("sheet", "thresholds", "distances")}
    frame = statistics * len(data["thresholds"]) + k
    return {**shown, "frame": frame, "both": [curve[k] for curve in data["distances"]]}


def companions(data, beside, mode, feed=0):
    z, gamma, beta, mean, var, bias = (
        np.array(data[key], dtype=float) for key in ("z", "gamma", "beta", "mean", "var", "bias")
    )
    inside = [0, *(i + 1 for i in range(len(z) - 1) if beside & 2**i)]

    def network(mean, var):
        z_hat = functional.normalize(z[inside], mean, var, eps=data["eps"])[0]
        scores = np.array(data["weight"]) @ np.maximum(gamma * z_hat + beta, 0) + bias
        first, second = np.argsort(-scores, kind="stable")[:2]
        return {"zHat": z_hat, "scores": scores, "first": first, "second": second}

    evaluation = network(mean, var)
    now = evaluation if mode else network(*functional.moments(z[inside]))
    return {"now": now, "evaluation": evaluation, "others": len(inside) - 1}


def drift(data, momentum, batches, drift):
    truth = data["first"] + drift * np.arange(batches)
    means = truth + np.array(data["noise"][:batches])
    running = [0.0]
    for mean in means:
        running.append((1 - momentum) * running[-1] + momentum * mean)

    def parts(share):
        weights = share * (1 - share) ** np.arange(batches)  # the newest batch first
        left = (1 - share) ** batches
        return {
            "left": left,
            "start": -left * truth[-1],
            "lag": weights @ (truth[::-1] - truth[-1]),
            "noise": np.sqrt((weights**2).sum() / data["m"]),
        }

    at = np.logspace(-2.5, 0, 51)
    each = [parts(share) for share in at]
    stale = np.array([abs(p["start"] + p["lag"]) for p in each])
    noises = np.array([p["noise"] for p in each])
    return {
        **{"truth": truth, "means": means, "running": running, "off": running[-1] - truth[-1]},
        **parts(momentum),
        **{"at": at, "stale": stale, "noises": noises, "all": np.hypot(stale, noises)},
        "best": at[np.argmin(np.hypot(stale, noises))],
    }


def frozen(data, scale, shift, eps):
    moved = scale * column(data["z"]) + shift
    stored = np.array([data["mean"]]), np.array([data["var"]])

    def through(mean, var):
        y = data["gamma"] * functional.normalize(moved, mean, var, eps=eps)[:, 0] + data["beta"]
        return {"y": y, "mean": y.mean(), "std": y.std(), "passed": np.mean(y > 0)}

    return {"training": through(*functional.moments(moved)), "frozen": through(*stored)}


def apart(data, distance, batches, mode, order):
    z = {
        "real": np.array(data["real"]) + distance / 2,
        "fake": np.array(data["fake"]) - distance / 2,
    }
    both = np.concatenate([z["real"], z["fake"]])
    groups = {"real": both, "fake": both} if batches else z
    kinds = [["real", "fake", "fake"], ["fake", "real", "fake"], ["real", "fake"]][order]
    running, share = np.array([0.0, 1.0]), 0.0
    for _ in range(200):
        for kind in kinds:
            values = groups[kind]
            running = 0.9 * running + 0.1 * np.array([values.mean(), values.var(ddof=1)])
            share = 0.9 * share + 0.1 * (kind == "real")
    hat = {}
    for kind, values in z.items():
        used = running if mode else (groups[kind].mean(), groups[kind].var())
        hat[kind] = functional.normalize(column(values), [used[0]], [used[1]], eps=EPS)[:, 0]
    return {
        "z": z,
        "zHat": hat,
        "share": share,
        "running": {"mean": running[0], "var": running[1]},
        "after": {kind: moments(values) for kind, values in hat.items()},
    }


def doctor(data, layer, frozen, momentum, updates, values):
    limits, training = data["limits"], layer == 0
    left, at = (1 - momentum) ** updates, np.linspace(0, max(60, updates), 101)
    few = limits["values"] / values if training else 0
    return {
        "left": left,
        "at": at,
        "start": (1 - momentum) ** at,
        "limits": limits,
        "over": [left / limits["left"], momentum / limits["momentum"], few],
        "found": {
            "mode-mismatch": int(not training and not frozen),
            "frozen-but-training": int(training and frozen),
            "initial-value-left": int(left > limits["left"]),
            "momentum-convention": int(momentum > limits["momentum"]),
            "few-values": int(few > 1),
        },
    }


@pytest.fixture(scope="session")
def in_numpy():
    """Return the functions that compute each live figure's numbers, by name."""
    return {
        "normalize": normalize,
        "scale_and_shift": scale_and_shift,
        "backward": backward,
        "running": running,
        "variance": variance,
        "training": training,
        "seven": seven,
        "roofline": roofline,
        "momentum": momentum,
        "devices": devices,
        "orders": orders,
        "gan": gan,
        "classes": classes,
        "truncation": truncation,
        "companions": companions,
        "drift": drift,
        "frozen": frozen,
        "apart": apart,
        "doctor": doctor,
    }
