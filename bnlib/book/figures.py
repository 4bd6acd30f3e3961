"""Pictures of the chapters that take more than ten lines to draw.

Each function returns a matplotlib figure in the book's look; call `style.use` first.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colors as mpl_colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from bnlib.book.style import WIDTH, color

GAP = "#dddddd"  # between the tiles of a sheet of digits


def digit_row(images: ArrayLike, columns: int = 8) -> Figure:
    """Show images, shape (n, 28, 28) with 0 as paper and 1 as ink, in rows of `columns`."""
    images = np.asarray(images)
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, WIDTH * rows / columns))
    for ax in axes.flat:
        ax.axis("off")
    for ax, image in zip(axes.flat, images, strict=False):
        ax.imshow(image, vmin=0, vmax=1)
    plt.close(figure)
    return figure


def histogram(
    ax: Axes,
    values: ArrayLike,
    thing: str,
    limits: tuple[float, float],
    bins: int = 24,
    band: bool = True,
) -> None:
    """Draw values as bars and ticks; the band reaches one standard deviation around their mean."""
    values = np.asarray(values)
    mean, std, hue = values.mean(), values.std(), color(thing)
    if band:
        ax.axvspan(mean - std, mean + std, color=hue, alpha=0.1, lw=0)
        ax.axvline(mean, color=hue, linestyle="--")
    ax.hist(values, bins=bins, range=limits, color=hue, alpha=0.4)
    ax.plot(values, np.full(values.size, 0.04), "|", color=hue, markersize=9, alpha=0.8,
            transform=ax.get_xaxis_transform())  # fmt: skip
    ax.set(xlim=limits, yticks=[])
    ax.spines["left"].set_visible(False)


def normalization(z: ArrayLike, z_hat: ArrayLike) -> Figure:
    """Show the values of one node, shape (m,), beside the same values normalized."""
    z, z_hat = np.asarray(z), np.asarray(z_hat)
    figure, (left, right) = plt.subplots(1, 2)
    unit = z.std() / z_hat.std()  # one step of z-hat, so that both panels cut the same bins
    histogram(left, z, "z", (z.mean() - 4 * unit, z.mean() + 4 * unit))
    histogram(right, z_hat, "z_hat", (-4, 4))
    left.set(title="$z$")
    right.set(title=r"$\hat z = (z - \mu)\,/\,\sqrt{\sigma^2 + \epsilon}$")
    plt.close(figure)
    return figure


def nodes(before: ArrayLike, after: ArrayLike, titles: tuple[str, str]) -> Figure:
    """Show two layers, each (m, nodes): a column of dots per node, and a bar at its mean."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.7))
    for ax, values, thing, title in zip(axes, (before, after), ("z", "z_hat"), titles, strict=True):
        values = np.asarray(values)
        for node, column in enumerate(values.T):
            ax.plot(np.full(len(column), node), column, "o", color=color(thing), markersize=3,
                    alpha=0.35, markeredgewidth=0)  # fmt: skip
            ax.plot([node - 0.35, node + 0.35], [column.mean()] * 2, color=color("ink"))
        ax.axhline(0, color=color("muted"), linewidth=0.8, zorder=0)
        ax.set(title=title, xlabel="node", xticks=range(values.shape[1]))
    plt.close(figure)
    return figure


def scale_and_shift(
    z_hat: ArrayLike, y: ArrayLike, activation: ArrayLike, name: str, flat: float
) -> Figure:
    """Show one node's values normalized, scaled and shifted, and behind the activation `name`.

    flat: where the activation's slope falls below a tenth of its steepest, on both sides of 0.
    """
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.2))
    parts = (
        (z_hat, "z_hat", (-10, 10), (-5, 0, 5), r"$\hat z$"),
        (y, "y", (-10, 10), (-5, 0, 5), r"$y = \gamma \hat z + \beta$"),
        (activation, "activation", (0, 1), (0, 0.5, 1), f"{name}$(y)$"),
    )
    for ax, (values, thing, limits, ticks, title) in zip(axes, parts, strict=True):
        histogram(ax, values, thing, limits, bins=32, band=False)
        ax.set(title=title, xticks=ticks)
    for side in (-1, 1):
        axes[1].axvspan(side * flat, side * 10, color=color("muted"), alpha=0.1, lw=0)
    plt.close(figure)
    return figure


def descent(gammas: ArrayLike, betas: ArrayLike, goals: tuple[ArrayLike, ArrayLike]) -> Figure:
    """Show gamma and beta over the steps, each (steps, nodes), and the goal of every node."""
    figure, axes = plt.subplots(1, 2)
    parts = ((gammas, goals[0], r"$\gamma$"), (betas, goals[1], r"$\beta$"))
    for ax, (values, goal, title) in zip(axes, parts, strict=True):
        values, goal = np.asarray(values), np.asarray(goal)
        ax.plot(values, color=color("y"), linewidth=1)
        ax.plot(np.full(len(goal), len(values) * 1.03), goal, "<", color=color("z"))
        ax.set(title=title, xlabel="step")
    plt.close(figure)
    return figure


def chosen(gammas: ArrayLike, betas: ArrayLike) -> Figure:
    """Show gamma against beta for every node of two layers, each (networks, 2, nodes)."""
    gammas, betas = np.asarray(gammas), np.asarray(betas)
    figure, ax = plt.subplots(figsize=(WIDTH, 3))
    for k, (name, mark, thing) in enumerate((("first", "o", "muted"), ("second", "^", "gradient"))):
        ax.plot(gammas[:, k].ravel(), betas[:, k].ravel(), mark, color=color(thing), alpha=0.5,
                markersize=4, label=f"{name} layer")  # fmt: skip
    ax.plot(1, 0, "+", color=color("ink"), markersize=16, label="start")
    ax.set(xlabel=r"$\gamma$", ylabel=r"$\beta$")
    ax.legend(loc="lower right")
    plt.close(figure)
    return figure


def columns(z_hat: ArrayLike, gradient: ArrayLike) -> Figure:
    """Show z-hat and the gradient for z of a small batch, one bar per example."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.4))
    parts = ((z_hat, "z_hat", r"$\hat z$"), (gradient, "gradient", "gradient for $z$"))
    for ax, (values, thing, title) in zip(axes, parts, strict=True):
        values = np.asarray(values)
        examples = np.arange(1, len(values) + 1)
        ax.bar(examples, values, width=0.7, color=color(thing), alpha=0.6)
        ax.axhline(0, color=color("muted"), linewidth=0.8)
        ax.set(title=title, xlabel="example", xticks=examples)
    plt.close(figure)
    return figure


def matrix(values: ArrayLike, xlabel: str, ylabel: str) -> Figure:
    """Show a square table of positive and negative numbers as colours, with their scale."""
    values = np.asarray(values)
    limit = np.abs(values).max()
    figure, ax = plt.subplots(figsize=(WIDTH, 3.4))
    image = ax.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit)
    ticks, labels = range(len(values)), [str(i + 1) for i in range(len(values))]
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(ticks, labels)
    ax.set_yticks(ticks, labels)
    figure.colorbar(image, shrink=0.85)
    plt.close(figure)
    return figure


def graph() -> Figure:
    """Show the computational graph of batch normalization, from z to y."""
    boxes = {  # name: (x, y, formula, colour)
        "z": (0.2, 1, "$z$", "z"),
        "mean": (0.9, 0, r"$\mu = \overline{z}$", "muted"),
        "centered": (2.0, 1, r"$c = z - \mu$", "muted"),
        "var": (2.8, 0, r"$\sigma^2 = \overline{c^2}$", "muted"),
        "std": (4.7, 0, r"$s = \sqrt{\sigma^2 + \epsilon}$", "muted"),
        "z_hat": (4.4, 1, r"$\hat z = c\,/\,s$", "z_hat"),
        "y": (6.5, 1, r"$y = \gamma \hat z + \beta$", "y"),
    }
    arrows = ("z mean", "z centered", "mean centered", "centered var", "var std", "std z_hat",
              "centered z_hat", "z_hat y")  # fmt: skip
    figure, ax = plt.subplots(figsize=(WIDTH, 1.7))
    ax.set(xlim=(0, 7.3), ylim=(-0.4, 1.4))
    ax.axis("off")
    drawn = {
        name: ax.text(x, y, formula, ha="center", va="center", fontsize=12, bbox={
            "boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": color(hue)})
        for name, (x, y, formula, hue) in boxes.items()
    }  # fmt: skip
    for start, end in (arrow.split() for arrow in arrows):
        ends = {"patchA": drawn[start].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch()}
        look = {"arrowstyle": "-|>", "color": color("ink"), "lw": 1, **ends}
        ax.annotate("", boxes[end][:2], boxes[start][:2], arrowprops=look)
    plt.close(figure)
    return figure


def answers(image: ArrayLike, scores: ArrayLike, fixed: ArrayLike | None = None) -> Figure:
    """Show an image beside its ten scores in many batches, shape (batches, 10): a dot per batch.

    fixed: the ten scores in evaluation mode, shape (10,), drawn as bars; None leaves them out.
    """
    scores = np.asarray(scores)
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(1, 2.6), figsize=(WIDTH, 2.4))
    left.imshow(np.asarray(image), vmin=0, vmax=1)
    left.axis("off")
    # Side by side, so that dots of one height do not cover each other.
    beside = np.linspace(-0.3, 0.3, len(scores))
    for k, column in enumerate(scores.T):
        right.plot(k + beside, column, "o", color=color("train"), alpha=0.4, markersize=2.5,
                   markeredgewidth=0)  # fmt: skip
    if fixed is not None:
        ends = np.arange(scores.shape[1])
        right.hlines(
            np.asarray(fixed), ends - 0.42, ends + 0.42, color=color("eval"), linewidth=2.5
        )
    right.set(xlabel="class", ylabel="score", xticks=range(scores.shape[1]))
    plt.close(figure)
    return figure


def chase(means: ArrayLike, variances: ArrayLike, running: tuple[ArrayLike, ArrayLike]) -> Figure:
    """Show a node's batch means and variances, shape (k,), and the running ones, shape (k + 1,)."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.6))
    parts = ((means, running[0], "mean"), (variances, running[1], "variance"))
    for ax, (batch, average, title) in zip(axes, parts, strict=True):
        batch = np.asarray(batch)
        ax.plot(np.arange(1, len(batch) + 1), batch, "o", color=color("train"), alpha=0.6,
                markersize=3.5, markeredgewidth=0)  # fmt: skip
        ax.plot(np.asarray(average), color=color("eval"))
        ax.set(title=title, xlabel="batch")
    plt.close(figure)
    return figure


def axes_of_batch_norm() -> Figure:
    """Show which values share a mean: a column of (N, C), and a slab of (N, C, places)."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.5), subplot_kw={"projection": "3d"})
    parts = (((5, 1, 6), "nodes"), ((5, 4, 6), "places"))
    for ax, ((images, places, channels), name) in zip(axes, parts, strict=True):
        # matplotlib's x, y and z: channels, places, images
        cubes = np.ones((channels, places, images), dtype=bool)
        hues = np.full(cubes.shape, "#f4f4f4", dtype=object)
        hues[2] = color("z_hat")
        ax.voxels(cubes, facecolors=hues, edgecolor=color("muted"), linewidth=0.4, shade=False)
        ax.set(xticks=[], yticks=[], zticks=[], box_aspect=(channels, places, images))
        ax.set_axis_off()
        ax.view_init(elev=24, azim=-58)
        ax.text(
            channels / 2, -0.9, -0.5, "nodes" if places == 1 else "channels", ha="center", va="top"
        )
        if places > 1:
            ax.text(-0.6, 0, images / 2, "images", ha="right", va="center")
            ax.text(channels + 0.4, places / 2, -0.4, name, ha="left", va="top")
    plt.close(figure)
    return figure


def roofline(points: dict[str, tuple[float, float]], bandwidth: float, peak: float) -> Figure:
    """Show versions of a program under the roof that memory and core put over them.

    points: by name, operations per byte and operations per second. bandwidth: bytes a second.
    peak: operations a second.
    """
    figure, ax = plt.subplots(figsize=(WIDTH, 3))
    intensity = np.array([0.05, peak / bandwidth, 5 * peak / bandwidth])
    ax.loglog(intensity, np.minimum(bandwidth * intensity, peak), color=color("ink"))
    for i, (name, (x, y)) in enumerate(points.items()):
        ax.plot(x, y, "o", color=color("y"), markersize=5)
        left = i % 2  # neighbours lie close: their names go to either side
        ax.annotate(name, (x, y), (-7 if left else 7, 0), textcoords="offset points", fontsize=9,
                    ha="right" if left else "left", va="center")  # fmt: skip
    ax.set(xlabel="operations per byte", ylabel="operations per second")
    plt.close(figure)
    return figure


def digits_right(digits: ArrayLike, names: list[str]) -> Figure:
    """Show how many digits several ways get right, one bar each."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.6))
    ax.bar(names, np.asarray(digits), color=color("y"), alpha=0.6)
    ax.set(ylabel="right digits", ylim=(0, 8.4))
    plt.close(figure)
    return figure


def losses(with_norm: ArrayLike, without: ArrayLike, block: int) -> Figure:
    """Show training losses with batch norm and without, each (seeds, steps), a line per seed.

    block: over how many steps each point averages.
    """
    figure, ax = plt.subplots()
    for values, label, dash, thing in (
        (without, "without batch norm", "--", "muted"),
        (with_norm, "with batch norm", "-", "y"),
    ):
        values = np.asarray(values)
        smooth = values.reshape(len(values), -1, block).mean(axis=2)
        steps = (np.arange(smooth.shape[1]) + 0.5) * block
        lines = ax.plot(steps, smooth.T, dash, color=color(thing), alpha=0.8, linewidth=1.4)
        lines[0].set_label(label)
    ax.set(xlabel="step", ylabel="training loss", ylim=(0, 1.3 * ax.get_ylim()[1]))
    ax.legend(loc="upper right", ncols=2)
    plt.close(figure)
    return figure


def spreads(without: ArrayLike, with_norm: ArrayLike) -> Figure:
    """Show the spread of what each node hands on while training, each (steps, nodes)."""
    figure, ax = plt.subplots()
    looks = ((without, "z", "--", "$z$, without"), (with_norm, "y", "-", "$y$, with batch norm"))
    for values, thing, dash, label in looks:
        lines = ax.plot(np.asarray(values), dash, color=color(thing), linewidth=1.2)
        lines[0].set_label(label)
    ax.set(xlabel="step", ylabel="standard deviation", ylim=(0, 1.25 * ax.get_ylim()[1]))
    ax.legend(loc="upper left", ncols=2)
    plt.close(figure)
    return figure


def training(
    curves: tuple[ArrayLike, ArrayLike],
    ends: tuple[ArrayLike, ArrayLike],
    rates: ArrayLike,
    rate: float,
    block: int,
    cap: float,
) -> Figure:
    """Show the losses over the steps at one learning rate, and at the end for all of them.

    curves: with batch norm and without, one mean per block of steps, up to cap. ends: the last
    losses, one per rate.
    """
    figure, (left, right) = plt.subplots(1, 2, sharey=True)
    looks = (("with", "-", "y"), ("without", "--", "muted"))
    for (label, dash, thing), curve, end in zip(looks, curves, ends, strict=True):
        steps = (np.arange(len(np.asarray(curve))) + 0.5) * block
        left.plot(steps, curve, dash, color=color(thing), label=label)
        right.semilogx(rates, end, dash, color=color(thing))
    right.axvline(rate, color=color("ink"), linewidth=1)
    left.set(xlabel="step", ylabel="loss", ylim=(0, cap), title=f"learning rate {rate:g}")
    left.legend(loc="upper right")
    right.set(xlabel="learning rate", title="at the end, by rate")
    plt.close(figure)
    return figure


def gradient_sizes(sizes: dict[tuple[str, bool], ArrayLike]) -> Figure:
    """Show the gradient's size from layer 2 on; keys: (initial weights, whether batch norm)."""
    figure, ax = plt.subplots()
    marks = dict(zip(dict.fromkeys(start for start, _ in sizes), "^os", strict=False))
    for (start, norm), values in sizes.items():
        values = np.asarray(values)
        label = f"{start}, {'with' if norm else 'without'}"
        look = {"linestyle": "-" if norm else "--", "color": color("y" if norm else "muted")}
        layers = np.arange(2, len(values) + 2)
        ax.semilogy(layers, values, marker=marks[start], markersize=4, label=label, **look)
    ax.set(xlabel="layer", ylabel="size of the gradient", xticks=(2, 5, 10, 15, 20))
    ax.legend()
    plt.close(figure)
    return figure


def along_gradient(without: ArrayLike, with_norm: ArrayLike, steps: ArrayLike) -> Figure:
    """Show the lowest and highest loss along the gradient at some steps, each (steps, 2)."""
    figure, ax = plt.subplots()
    looks = ((without, "without batch norm", "muted"), (with_norm, "with batch norm", "y"))
    for bounds, label, thing in looks:
        low, high = np.asarray(bounds).T
        ax.fill_between(steps, low, high, color=color(thing), alpha=0.4, lw=0, label=label)
        ax.plot(steps, low, steps, high, color=color(thing), linewidth=1)
    ax.set(xlabel="step", ylabel="loss along the gradient", ylim=(0, None))
    ax.legend()
    plt.close(figure)
    return figure


def noise(sizes: ArrayLike, noises: dict[str, ArrayLike]) -> Figure:
    """Show kinds of noise against the batch size; the lines fall like its inverse root."""
    sizes = np.asarray(sizes)
    figure, ax = plt.subplots()
    for (label, values), mark, thing in zip(
        noises.items(), "o^s", ("z", "z_hat", "activation"), strict=False
    ):
        values = np.asarray(values)
        scale = values[-1] * sizes[-1] ** 0.5
        ax.loglog(sizes, scale / sizes**0.5, color=color(thing), linewidth=1)
        ax.loglog(sizes, values, mark, color=color(thing), label=label)
    ax.set(xlabel="batch size", ylabel="noise", xticks=sizes, xticklabels=sizes)
    ax.minorticks_off()
    ax.legend()
    plt.close(figure)
    return figure


def in_step(losses: ArrayLike, others: ArrayLike) -> Figure:
    """Show the losses of two runs, shape (steps,), and how far they are apart."""
    losses, others = np.asarray(losses), np.asarray(others)
    figure, (left, right) = plt.subplots(1, 2)
    steps = np.arange(1, len(losses) + 1)
    left.plot(steps, losses, color=color("muted"), label="PyTorch's")
    left.plot(steps[::3], others[::3], "o", color=color("y"), markersize=4, label="ours")
    left.set(xlabel="step", ylabel="loss")
    left.legend()
    right.semilogy(steps, np.maximum(abs(losses - others), 1e-17), color=color("ink"))
    right.set(xlabel="step", ylabel="difference")
    plt.close(figure)
    return figure


def verdicts(grid: dict[str, list[str]], columns: list[str]) -> Figure:
    """Show a grid of verdicts, row by row: same (dot), differs (square) or none (dash)."""
    looks = {"same": ("o", "muted", 4), "differs": ("s", "ink", 8), "none": ("_", "muted", 9)}
    figure, ax = plt.subplots(figsize=(WIDTH, 4.6))
    for verdict, (mark, hue, size) in looks.items():
        places = [(j, i) for i, row in enumerate(grid.values()) for j, v in enumerate(row)
                  if v == verdict]  # fmt: skip
        ax.plot(*np.reshape(places, (-1, 2)).T, mark, color=color(hue), markersize=size)
    ax.set(xlim=(-0.6, len(columns) - 0.4), ylim=(len(grid) - 0.4, -0.6))
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="left", rotation_mode="anchor")
    ax.set_yticks(range(len(grid)), list(grid))
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    plt.close(figure)
    return figure


def wandering(steady: ArrayLike, moving: ArrayLike, shares: tuple[str, str]) -> Figure:
    """Show two accuracies in percent, batch by batch; shares: the newest batch's weight in each."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.6))
    for values, hue, share in zip((steady, moving), ("muted", "eval"), shares, strict=True):
        values = np.asarray(values)
        ax.plot(np.arange(1, len(values) + 1), values, ".-", color=color(hue), linewidth=1.2,
                label=f"the newest batch weighs {share}")  # fmt: skip
    ax.set(xlabel="batch", ylabel="test accuracy in %")
    figure.legend(loc="outside upper center", ncols=2)
    plt.close(figure)
    return figure


def against_pytorch(z: ArrayLike, layer: dict[str, float], size: int, fed: int) -> Figure:
    """Show a layer's running variance and the width of its outputs beside PyTorch's.

    z: values of one node, taken in batches of `size`, from the start again at the end. layer: the
    corrections (0 or 1) `inUse` and `inMemory`, the `share` of a new batch, and the `start`.
    """
    z, torch = np.asarray(z), {"inUse": 0, "inMemory": 1, "share": 0.1, "start": 1}
    batches = z[np.arange(fed * size) % len(z)].reshape(fed, size)
    variances = batches.var(axis=1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.6), width_ratios=(1.6, 1))
    left.plot(np.arange(1, fed + 1), variances, "o", color=color("train"), alpha=0.6,
              markersize=3.5, markeredgewidth=0)  # fmt: skip
    for rule, hue, fill in ((torch, "muted", "none"), (layer, "eval", color("eval"))):
        run = [float(rule["start"])]
        for v in variances:
            new = v * (size / (size - 1)) ** rule["inMemory"]
            run.append((1 - rule["share"]) * run[-1] + rule["share"] * new)
        left.plot(run, color=color(hue))
        widths = [(1 - 1 / size) ** (rule["inUse"] / 2), np.sqrt(z.var() / run[-1])]
        right.bar((0, 1), widths, 0.6 if rule is layer else 0.8, color=fill, alpha=0.6,
                  edgecolor=color(hue))  # fmt: skip
    left.set(title="running variance", xlabel="batch")
    right.set(title="width of the output", xticks=(0, 1))
    right.set_xticklabels(("training", "evaluation"))
    plt.close(figure)
    return figure


def climbs(paths: dict[str, list[float]], goal: float) -> Figure:
    """Show averages on their way to a goal, by the name of their number format."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.6))
    highest = max(path[-1] for path in paths.values())
    for (name, path), thing in zip(paths.items(), ("ink", "z_hat", "z"), strict=True):
        ax.hlines(goal, 0, len(path), color=color("muted"), linestyle="--", linewidth=1)
        ax.plot(path, color=color(thing))
        above = path[-1] == highest  # two may end close together: their names go to either side
        ax.annotate(name, (len(path), path[-1]), (5, 0), textcoords="offset points", fontsize=9,
                    color=color(thing), va="bottom" if above else "top")  # fmt: skip
    ax.set(xlabel="batch", ylabel="running variance", xlim=(0, 1.22 * len(path)))
    ax.set_xticks(range(0, len(path) + 1, len(path) // 4))
    plt.close(figure)
    return figure


def painted(strips: ArrayLike, columns: int = 24) -> Figure:
    """Show memory in rows of `columns` values, coloured and numbered by program.

    strips: one strip of program numbers for each panel, shape (panels, values).
    """
    strips = np.asarray(strips)
    rows = strips.shape[1] // columns
    figure, axes = plt.subplots(len(strips), 1, figsize=(WIDTH, 0.6 * len(strips) * rows))
    hues = np.array([mpl_colors.to_rgb(color(c)) for c in ("z", "z_hat", "y", "activation")])
    for ax, strip in zip(np.atleast_1d(axes), strips, strict=True):
        table = strip.reshape(rows, columns)
        ax.imshow(1 - 0.45 * (1 - hues[table % len(hues)]), aspect="auto")
        ax.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=1)
        ax.tick_params(which="both", length=0)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        changes = np.flatnonzero(np.diff(strip, prepend=-1))
        for start, end in zip(changes, [*changes[1:], len(strip)], strict=True):
            row, first = divmod(int(start), columns)
            last = min(int(end), (row + 1) * columns) - 1 - row * columns
            ax.text((first + last) / 2, row, f"program {strip[start]}", ha="center", va="center",
                    fontsize=9)  # fmt: skip
    plt.close(figure)
    return figure


def roofs(
    cards: dict[str, tuple[float, float]], intensity: float, microseconds: ArrayLike
) -> Figure:
    """Show the roofs of several cards with a dot on the slope, and the least time on each.

    cards: by name, bytes a second and operations a second. intensity: operations per byte of the
    dot, which stands under the first card's roof. microseconds: one time for each card.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.6), width_ratios=(3, 2))
    x = np.logspace(-1, 3, 60)
    for i, (name, (bandwidth, peak)) in enumerate(cards.items()):
        hue = color("muted" if i else "ink")
        left.loglog(x, np.minimum(bandwidth * x, peak) / 1e12, color=hue)
        left.annotate(name, (x[-1], peak / 1e12), (0, -11), textcoords="offset points",
                      ha="right", color=hue, fontsize=9)  # fmt: skip
    bandwidth = next(iter(cards.values()))[0]
    left.plot(intensity, bandwidth * intensity / 1e12, "o", color=color("y"))
    left.set(xlabel="operations per byte", ylabel="$10^{12}$ operations a second")
    bars = right.bar(range(len(cards)), np.asarray(microseconds), color=color("y"), alpha=0.55)
    bars[0].set_alpha(1)
    right.set(ylabel="microseconds at least", xticks=range(len(cards)), xticklabels=[*cards])
    plt.close(figure)
    return figure


def bessel(curves: dict[int, ArrayLike]) -> Figure:
    """Show how a ratio of two running variances rises to n / (n - 1), a curve for each n."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.6))
    for n, curve in curves.items():
        curve = np.asarray(curve)
        ax.plot(np.arange(1, len(curve) + 1), curve, color=color("eval"))
        ax.hlines(n / (n - 1), 0, len(curve), color=color("muted"), linewidth=0.8, linestyle="--")
        ax.annotate(f"n = {n}", (len(curve), curve[-1]), (4, 0), textcoords="offset points",
                    fontsize=9, va="center", annotation_clip=False)  # fmt: skip
    ax.set(xlabel="batch", ylabel="PyTorch / Keras")
    plt.close(figure)
    return figure


def memory(share: float, batches: int) -> Figure:
    """Show the weights that a running average gives to its last 20 batches and to its start.

    share: the weight of the newest batch, PyTorch's momentum. Outlined: the weights for 1 - share.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.6))
    back, k = np.arange(20), np.arange(61)
    left.bar(back, (1 - share) * share**back, width=0.8, fill=False, edgecolor=color("muted"))
    left.bar(back, share * (1 - share) ** back, width=0.6, color=color("eval"), alpha=0.7)
    left.set(title="weight of a batch", xlabel="batches ago", ylim=(0, 1.05), xticks=[0, 10, 19])
    right.plot(k, (1 - share) ** k, color=color("eval"))
    right.axvline(batches, color=color("muted"), linewidth=0.8, linestyle="--")
    right.set(title="weight of the start", xlabel="batches", ylim=(0, 1.05))
    plt.close(figure)
    return figure


def shares(z: ArrayLike, alone: ArrayLike, together: ArrayLike) -> Figure:
    """Show one node's batch, shape (m,), half in each process: z, and z-hat in two versions.

    alone: normalized with the statistics of its half; together: with those of the whole batch.
    """
    z, alone, together = (np.asarray(values) for values in (z, alone, together))
    half = len(z) // 2
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.7))
    for k, mark in enumerate("o^"):
        own = slice(k * half, (k + 1) * half)
        at = np.arange(len(z))[own] + 1
        left.plot(at, z[own], mark, color=color("z"), markersize=5)
        left.hlines(z[own].mean(), at[0] - 0.5, at[-1] + 0.5, color=color("z"), linestyle="--")
        right.plot(at, together[own], mark, color=color("ink"), markersize=6, fillstyle="none")
        right.plot(at, alone[own], mark, color=color("z_hat"), markersize=4)
    left.axhline(z.mean(), color=color("ink"), linewidth=1)
    left.set(title="$z$", xlabel="example")
    right.set(title=r"$\hat z$", xlabel="example")
    plt.close(figure)
    return figure


def share_error(sizes: ArrayLike, errors: ArrayLike) -> Figure:
    """Show how far means of shares are off, in standard deviations, beside 1 / sqrt(size)."""
    sizes = np.asarray(sizes)
    figure, ax = plt.subplots(figsize=(WIDTH, 2.6))
    ax.loglog(sizes, 1 / np.sqrt(sizes), color=color("muted"), linewidth=1.2)
    ax.loglog(sizes, np.asarray(errors), "o", color=color("train"), markersize=5)
    ax.set(xlabel="examples in a share", ylabel=r"error of the mean, in $\sigma$")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
    ax.minorticks_off()
    plt.close(figure)
    return figure


def talk(devices: ArrayLike, curves: ArrayLike, at: int, bars: ArrayLike) -> Figure:
    """Show the share of a step that synchronising takes, and where the time of a step goes.

    curves: (2, devices), by ring and by doubling, marked at so many devices. bars: microseconds for
    the convolution, the batch norm, the bytes, the waits in a ring, and the waits by doubling.
    """
    devices, bars = np.asarray(devices), np.asarray(bars)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.7))
    for curve, thing, name, lift in zip(np.asarray(curves), ("gradient", "activation"),
                                        ("ring", "doubling"), (-13, -13), strict=True):  # fmt: skip
        left.semilogx(devices, 100 * curve, base=2, color=color(thing))
        k = int(np.flatnonzero(devices == at)[0])
        left.plot(at, 100 * curve[k], "o", color=color(thing), markersize=5)
        left.annotate(name, (at, 100 * curve[k]), (6, lift), textcoords="offset points", fontsize=9)
    left.set(title="% of a step spent talking", xlabel="devices", ylim=(0, 100))
    left.set_xticks([2, 16, 128, 1024], ["2", "16", "128", "1024"])
    hues = [color(thing) for thing in ("muted", "muted", "muted", "gradient", "activation")]
    right.bar(range(5), bars, width=0.7, color=hues, alpha=0.7)
    right.set(title="microseconds a step")
    names = ["conv.", "norm", "bytes", "waits:\nring", "waits:\ndoubling"]
    right.set_xticks(range(5), names, fontsize=7)
    plt.close(figure)
    return figure


def orders(classes: ArrayLike, share: float = 0.1) -> Figure:
    """Show a node's values, shape (classes, n), in batches of ten of one class: mean, variance.

    The running statistics start at those of all values, and take this share of each batch.
    """
    values = np.asarray(classes)
    batches = values.reshape(-1, 10)
    means, variances = batches.mean(axis=1), batches.var(axis=1, ddof=1)
    running = [np.array([values.mean(), values.var(ddof=1)])]
    for batch in zip(means, variances, strict=True):
        running.append((1 - share) * running[-1] + share * np.array(batch))
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.6))
    left.axhline(values.mean(), color=color("muted"), linestyle="--", linewidth=1.2)
    left.plot(np.arange(1, len(means) + 1), means, "o", color=color("train"), alpha=0.6,
              markersize=3.5, markeredgewidth=0)  # fmt: skip
    left.plot([mean for mean, _ in running], color=color("eval"))
    left.set(title="mean", xlabel="batch")
    bars = [values.var(ddof=1), variances.mean(), running[-1][1]]
    right.bar(["pooled", "averaged", "running"], bars, width=0.6, color=color("eval"), alpha=0.6)
    right.set(title="variance")
    plt.close(figure)
    return figure


def tiles(images: ArrayLike, columns: int) -> NDArray[np.float64]:
    """Return images as one sheet, row by row, with gaps of two pixels that hold NaN.

    images: shape (n, 28, 28) or (n, 1, 28, 28), arrays or tensors.
    """
    images = np.asarray(images, dtype=float).reshape(-1, 28, 28)
    rows, pitch = -(-len(images) // columns), 30
    sheet = np.full((rows * pitch - 2, columns * pitch - 2), np.nan)
    for i, image in enumerate(images):
        y, x = pitch * np.array(divmod(i, columns))
        sheet[y : y + 28, x : x + 28] = image
    return sheet


def _show_sheet(ax: Axes, sheet: ArrayLike) -> None:
    """Draw a sheet of `tiles`, without ticks."""
    ax.imshow(sheet, vmin=-1, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[], facecolor=GAP)
    ax.spines[:].set_visible(False)


def digit_grid(
    images: ArrayLike, columns: int = 10, rows: Sequence[str] = (), tops: Sequence[str] = ()
) -> Figure:
    """Show images as a sheet of `tiles`: the style of the chapters on GANs.

    images: shape (n, 28, 28) or (n, 1, 28, 28), arrays or tensors, -1 for paper and 1 for ink, row
    by row. rows: a name at the left of each row; tops: one above each column. The figure is as wide
    as the page allows, whatever the number of columns.
    """
    sheet = tiles(images, columns)
    # Inches for the names; the sheet fills what is left to the edges.
    left = 0.1 + 0.078 * max((len(name) for name in rows), default=-1)
    top = 0.24 if tops else 0.0
    tall = top + (WIDTH - left) * sheet.shape[0] / sheet.shape[1]
    figure = plt.figure(figsize=(WIDTH, tall), layout="none")
    ax = figure.add_axes((left / WIDTH, 0, 1 - left / WIDTH, 1 - top / tall))
    _show_sheet(ax, sheet)
    ax.set_yticks(30 * np.arange(len(rows)) + 13.5, rows)
    ax.set_xticks(30 * np.arange(len(tops)) + 13.5, tops)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    plt.close(figure)
    return figure


def _distances(ax: Axes, curves: dict[str, tuple[ArrayLike, ArrayLike]]) -> None:
    """Draw Fréchet distances on a logarithmic axis; curves: by the colour's thing, x and y."""
    for thing, (x, y) in curves.items():
        ax.semilogy(np.asarray(x), np.asarray(y), color=color(thing))
    ax.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    ax.minorticks_off()


def _over_steps(ax: Axes, steps: ArrayLike, curve: ArrayLike, floor: float) -> None:
    """Draw a Fréchet distance over the steps, and that of real digits."""
    _distances(ax, {"fake": (steps, curve)})
    ax.axhline(floor, color=color("real"), linestyle="--")
    ax.set(ylim=(1, 4000), xlabel="step")


def _points_and_distance(images: ArrayLike) -> tuple[Figure, Axes]:
    """Show images, (n, 1, 28, 28), in six columns; return the figure and the panel beside them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.3), width_ratios=(3, 2))
    _show_sheet(left, tiles(images, 6))
    left.set(title="the same 24 latent points")
    right.set(title="distance to real digits")
    return figure, right


def gan_moment(
    images: ArrayLike, steps: ArrayLike, curve: ArrayLike, floor: float, step: int
) -> Figure:
    """Show generated images, (n, 1, 28, 28) in six columns, and the distance over the steps.

    curve: one distance for each of the steps; floor: that of real digits; step: where we are.
    """
    figure, right = _points_and_distance(images)
    _over_steps(right, steps, curve, floor)
    right.axvline(step, color=color("ink"), linewidth=1)
    plt.close(figure)
    return figure


def narrowing(
    images: ArrayLike, thresholds: ArrayLike, curves: Sequence[ArrayLike], threshold: float
) -> Figure:
    """Show images of narrow latent points, (n, 1, 28, 28) in six columns, and two distances.

    curves: one distance per threshold, with running and with standing statistics.
    """
    figure, right = _points_and_distance(images)
    running, standing = curves
    _distances(right, {"eval": (thresholds, running), "train": (thresholds, standing)})
    right.axvline(threshold, color=color("ink"), linewidth=1)
    right.set(ylim=(30, 3000), xlim=(0, 2.6), xlabel="threshold")
    right.legend(right.lines[:2], ("running", "standing"))
    plt.close(figure)
    return figure


def duel(losses: ArrayLike, steps: ArrayLike, curve: ArrayLike, floor: float) -> Figure:
    """Show the losses of critic and generator, shape (steps, 2), and the distance below them.

    The losses are means of 20 steps, with those of a critic that cannot tell dashed. The others:
    see `gan_moment`.
    """
    losses = np.asarray(losses)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(WIDTH, 3.6), sharex=True)
    blocks = losses[: len(losses) // 20 * 20].reshape(-1, 20, 2).mean(axis=1)
    at = 20 * np.arange(len(blocks)) + 10
    parts = (("critic", "muted", 2 * np.log(2)), ("generator", "fake", np.log(2)))
    for values, (name, thing, blind) in zip(blocks.T, parts, strict=True):
        top.plot(at, values, color=color(thing), label=name)
        top.axhline(blind, color=color(thing), linewidth=0.9, linestyle="--")
    top.set(ylabel="loss", ylim=(0, None))
    top.legend(loc="upper right")
    _over_steps(bottom, steps, curve, floor)
    bottom.set(ylabel="distance")
    plt.close(figure)
    return figure


def axes_of_norms() -> Figure:
    """Show which values of (images, channels, places) share a mean, for four norms."""
    figure, axes = plt.subplots(
        1, 4, figsize=(WIDTH, 1.6), subplot_kw={"projection": "3d"}, layout="none"
    )
    every = slice(None)  # matplotlib's x, y and z: channels, places, images
    shared: dict[str, tuple[Any, ...]] = {
        "batch": (2, every, every),
        "layer": (every, every, 5),
        "instance": (2, every, 5),
        "group": (slice(2, 4), every, 5),
    }
    for ax, (name, values) in zip(axes, shared.items(), strict=True):
        hues = np.full((6, 4, 6), "#f4f4f4", dtype=object)
        hues[values] = color("z_hat")
        ax.voxels(np.ones(hues.shape, dtype=bool), facecolors=hues, edgecolor=color("muted"),
                  linewidth=0.4, shade=False)  # fmt: skip
        ax.set(xticks=[], yticks=[], zticks=[])
        ax.set_box_aspect((6, 4, 6), zoom=1.1)
        ax.set_axis_off()
        ax.view_init(elev=24, azim=-58)
        ax.set_title(name, y=1)
    for x, y, name, turn in (
        (0.3, 0, "channels", 0),
        (0.88, 0.06, "places", 0),
        (0, 0.5, "images", 90),
    ):
        axes[0].text2D(x, y, name, ha="center", va="center", fontsize=7, rotation=turn,
                       transform=axes[0].transAxes)  # fmt: skip
    figure.subplots_adjust(0.03, 0.02, 1, 0.95, wspace=0.04)
    plt.close(figure)
    return figure


def read_as(image: ArrayLike, percents: ArrayLike) -> Figure:
    """Show a drawn digit, -1 for paper and 1 for ink, and how sure a classifier is of each class.

    image: shape (28, 28). percents: shape (10,).
    """
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(1, 1.4), figsize=(WIDTH, 2.3))
    left.imshow(np.asarray(image), vmin=-1, vmax=1, interpolation="nearest")
    left.axis("off")
    right.bar(range(10), np.asarray(percents), color=color("fake"), alpha=0.7)
    right.set(xlabel="read as", ylabel="percent", xticks=range(10), ylim=(0, 100))
    plt.close(figure)
    return figure


def by_batch_size(sizes: ArrayLike, parts: dict[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Show the share right in training mode against the batch size, a panel for each model.

    parts: a title, with the shares in training mode, (networks, sizes), and in evaluation mode,
    (networks,), drawn as lines across.
    """
    sizes = np.asarray(sizes)
    figure, axes = plt.subplots(1, len(parts), figsize=(WIDTH, 2.7), sharey=True)
    for ax, (title, (training, evaluation)) in zip(np.atleast_1d(axes), parts.items(), strict=True):
        for right in np.asarray(evaluation):
            ax.axhline(100 * right, color=color("eval"), linewidth=1)
        for shares in np.asarray(training):
            ax.semilogx(sizes, 100 * shares, "o-", base=2, color=color("train"), alpha=0.7,
                        markersize=4, linewidth=1)  # fmt: skip
        ax.set(title=title, xlabel="images in a batch", ylim=(0, 100))
        ax.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
        ax.minorticks_off()
    np.atleast_1d(axes)[0].set_ylabel("% right")
    plt.close(figure)
    return figure


def margins(image: ArrayLike, leads: dict[int, ArrayLike], fixed: float) -> Figure:
    """Show an image beside its lead, in many batches of each size: the right score less the next.

    leads: for each batch size, one lead per batch; fixed: the lead in evaluation mode, a line.
    """
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(1, 2.6), figsize=(WIDTH, 2.4))
    left.imshow(np.asarray(image), vmin=0, vmax=1)
    left.axis("off")
    right.axhspan(-100, 0, color=color("muted"), alpha=0.2, linewidth=0)
    right.axhline(0, color=color("muted"), linewidth=1)
    for k, lead in enumerate(leads.values()):
        beside = np.linspace(-0.32, 0.32, np.size(lead))
        right.plot(k + beside, np.asarray(lead), "o", color=color("train"), alpha=0.4,
                   markersize=2.5, markeredgewidth=0)  # fmt: skip
    right.axhline(fixed, color=color("eval"), linewidth=2)
    low = min(np.min(lead) for lead in leads.values())
    high = max(np.max(lead) for lead in leads.values())
    right.set(xlabel="images in the batch", ylabel="lead of the right class")
    right.set_ylim(low - 1, high + 1)
    right.set_xticks(range(len(leads)), [str(size) for size in leads])
    plt.close(figure)
    return figure


def explosion(kept: ArrayLike, forgotten: ArrayLike, starts: ArrayLike) -> Figure:
    """Show the losses of two runs up to 1e12, logarithmic; dashed lines where an epoch starts."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.6))
    for start in np.asarray(starts):
        ax.axvline(start, color=color("muted"), linewidth=1, linestyle="--")
    ax.semilogy(np.asarray(forgotten), color=color("eval"), linewidth=1.4)
    ax.semilogy(np.asarray(kept), color=color("train"), linewidth=1.4)
    ax.set(xlabel="step", ylabel="loss", ylim=(1e-2, 1e12))
    plt.close(figure)
    return figure


def beside(
    images: ArrayLike, z_hat: tuple[ArrayLike, ArrayLike], scores: tuple[ArrayLike, ArrayLike]
) -> Figure:
    """Show a batch, the image in question first, and that image's z-hat and ten scores.

    images: (m, 28, 28). z_hat, scores: beside these companions, and in evaluation mode (outlined).
    """
    images = np.asarray(images)
    figure = plt.figure(figsize=(WIDTH, 3.3))
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 3.4))
    above, below = (figure.add_subfigure(grid[k]) for k in (0, 1))
    for k, ax in enumerate(above.subplots(1, max(len(images), 8))):
        ax.axis("off")
        if k < len(images):
            ax.imshow(images[k], vmin=0, vmax=1)
            ax.set_title("the image" if k == 0 else "", fontsize=8)
    parts = ((z_hat, "z_hat", r"$\hat z$ of the image", "node"),
             (scores, "train", "its scores", "class"))  # fmt: skip
    for ax, ((now, fixed), thing, title, label) in zip(below.subplots(1, 2), parts, strict=True):
        at = np.arange(np.size(now))
        ax.bar(at, np.asarray(fixed), width=0.76, fill=False, edgecolor=color("muted"),
               linestyle="--", linewidth=0.8)  # fmt: skip
        ax.bar(at, np.asarray(now), width=0.6, color=color(thing), alpha=0.6)
        ax.axhline(0, color=color("muted"), linewidth=0.8)
        ax.set(title=title, xlabel=label, xticks=at[:: 1 if len(at) < 12 else 5])
    plt.close(figure)
    return figure


def parts_of_error(shares: ArrayLike, parts: dict[int, ArrayLike]) -> Figure:
    """Show what the error of a running mean consists of, for each momentum.

    shares: momenta, PyTorch's. parts: by the number of batches seen, an array (4, shares): what is
    left of the start, the lag, the noise, and all three together, in standard deviations.
    """
    figure, axes = plt.subplots(1, len(parts), figsize=(WIDTH, 2.8), sharey=True)
    looks = (("start", "muted", ":"), ("lag", "muted", "--"), ("noise", "train", "-"),
             ("all", "eval", "-"))  # fmt: skip
    for ax, (batches, curves) in zip(axes, parts.items(), strict=True):
        for (name, thing, dash), curve in zip(looks, np.asarray(curves), strict=True):
            ax.semilogx(shares, curve, dash, color=color(thing), label=name)
        ax.set(title=f"after {batches} batches", xlabel="momentum", ylim=(0, 0.5))
        ax.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    axes[0].set_ylabel(r"error, in $\sigma$")
    axes[-1].legend(loc="upper right")
    plt.close(figure)
    return figure


def drift(truth: ArrayLike, means: ArrayLike, running: ArrayLike, curves: ArrayLike,
          momentum: float) -> Figure:  # fmt: skip
    """Show batch means that drift, shape (k,), the running mean, and its error by momentum.

    running: shape (k + 1,), from 0 on. curves: (4, momenta): the momenta, then the parts of the
    error that are out of date, noise, and both.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.6))
    steps = np.arange(1, len(np.asarray(means)) + 1)
    left.plot(steps, truth, "--", color=color("muted"))
    left.plot(steps, means, "o", color=color("train"), alpha=0.6, markersize=3, markeredgewidth=0)
    left.plot(running, color=color("eval"))
    left.set(title="batch means, running mean", xlabel="batch", ylim=(0, None))
    at, stale, noise, both = np.asarray(curves)
    right.semilogx(at, stale, "--", color=color("muted"))
    right.semilogx(at, noise, color=color("train"))
    right.semilogx(at, both, color=color("eval"))
    right.axvline(momentum, color=color("ink"), linewidth=1)
    right.set(title="error (dashed: out of date)", xlabel="momentum", ylim=(0, 1))
    right.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    plt.close(figure)
    return figure


def behind(exact: ArrayLike, trails: dict[float, ArrayLike]) -> Figure:
    """Show one node's exact mean at every step, and the running means that come after it.

    trails: by momentum, from the start at 0 on.
    """
    figure, ax = plt.subplots()
    ax.plot(np.asarray(exact), color=color("ink"), label="exact")
    for (momentum, trail), dash in zip(trails.items(), ("-", "--"), strict=True):
        label = f"momentum {momentum}"
        ax.plot(np.asarray(trail), dash, color=color("eval"), label=label)
    ax.set(xlabel="step", ylabel="mean of the node")
    ax.legend()
    plt.close(figure)
    return figure


def tested(rights: dict[float, ArrayLike]) -> Figure:
    """Show the share of right answers in evaluation mode after each batch, for two momenta."""
    figure, ax = plt.subplots()
    for (momentum, right), thing in zip(rights.items(), ("eval", "muted"), strict=True):
        steps = np.arange(1, len(np.asarray(right)) + 1)
        ax.plot(steps, right, color=color(thing), label=f"momentum {momentum}")
    ax.set(xlabel="batches of 16", ylabel="right in evaluation")
    ax.legend(loc="lower left")
    plt.close(figure)
    return figure


def through_both(z: ArrayLike, mean: float, var: float, gamma: float, beta: float) -> Figure:
    """Show what a batch norm makes of a node's values, shape (m,), in training and when frozen.

    mean, var: its running statistics; gamma, beta: its scale and shift.
    """
    z = np.asarray(z)
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.6), sharex=True, sharey=True)
    looks = (("in training mode", "train", z.mean(), z.var()), ("frozen", "eval", mean, var))
    for ax, (title, thing, center, variance) in zip(axes, looks, strict=True):
        y = gamma * (z - center) / np.sqrt(variance + 1e-5) + beta
        histogram(ax, y, thing, (-6, 6), band=False)
        ax.axvline(0, color=color("muted"), linewidth=0.8, linestyle="--")
        ax.set(title=title, xlabel="$y$")
    plt.close(figure)
    return figure


def three_ways(steps: ArrayLike, found: dict[str, ArrayLike]) -> Figure:
    """Show a critic over training, shown the same images apart, mixed, and in evaluation mode.

    steps: when. found: for each way, shape (moments, 2): the shares right, and ranked rightly.
    """
    things = dict(zip(found, (("train", "-"), ("train", ":"), ("eval", "-")), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.7), sharey=True)
    for ax, column, title in zip(axes, (0, 1), ("% right", "% of pairs ranked"), strict=True):
        for name, rows in found.items():
            thing, dash = things[name]
            values = 100 * np.asarray(rows)[:, column]
            ax.plot(np.asarray(steps), values, dash, color=color(thing), label=name)
        ax.axhline(50, color=color("muted"), linewidth=0.8)
        ax.set(title=title, xlabel="step", ylim=(45, 101))
    axes[1].legend(loc="lower left", bbox_to_anchor=(0, 0.06))
    plt.close(figure)
    return figure


def influence(shares: ArrayLike) -> Figure:
    """Show how much each score depends on each image, shape (n, n), as shares of its own image."""
    shares = np.asarray(shares)
    figure, ax = plt.subplots(figsize=(WIDTH, 3.2))
    picture = ax.imshow(shares, vmin=0, vmax=1)
    ticks, labels = range(len(shares)), [str(i + 1) for i in range(len(shares))]
    ax.set(xlabel="image", ylabel="score of image")
    ax.set_xticks(ticks, labels)
    ax.set_yticks(ticks, labels)
    figure.colorbar(picture, shrink=0.85)
    plt.close(figure)
    return figure


def two_kinds(real: ArrayLike, fake: ArrayLike, real_hat: ArrayLike, fake_hat: ArrayLike) -> Figure:
    """Show z of real and generated images, and z-hat, as histograms over each other."""
    figure, axes = plt.subplots(1, 2)
    z, z_hat = (tuple(map(np.asarray, pair)) for pair in ((real, fake), (real_hat, fake_hat)))
    for ax, pair, title in zip(axes, (z, z_hat), ("$z$", r"$\hat z$"), strict=True):
        for values, thing in zip(pair, ("real", "fake"), strict=True):
            histogram(ax, values, thing, (-6, 6), band=False)
            ax.axvline(values.mean(), color=color(thing), linestyle="--")
        ax.set_title(title, y=1.06)
    for values, thing, name in zip(z, ("real", "fake"), ("real", "generated"), strict=True):
        axes[0].text(values.mean(), 1, name, color=color(thing), ha="center", va="bottom",
                     transform=axes[0].get_xaxis_transform(), fontsize=9)  # fmt: skip
    plt.close(figure)
    return figure


def examination(
    momentum: float, updates: int, values: int, limits: dict[str, float], found: int
) -> Figure:
    """Show the weight of the start over the updates, and three numbers in units of their limits.

    limits: "left", "momentum" and "values", as the doctor's rules have them. found: how many rules
    apply, for the title.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.7))
    k, start = np.arange(max(60, updates) + 1), (1 - momentum) ** updates
    left.plot(k, (1 - momentum) ** k, color=color("eval"))
    left.plot(updates, start, "o", color=color("eval"), markersize=5)
    left.axhline(limits["left"], color=color("muted"), linewidth=0.8, linestyle="--")
    left.set(title="weight of the start", xlabel="updates k", ylim=(0, 1.05))
    over = [start / limits["left"], momentum / limits["momentum"], limits["values"] / values]
    right.bar(range(3), np.minimum(over, 3), width=0.6, color=color("eval"), alpha=0.7)
    right.axhline(1, color=color("muted"), linewidth=0.8, linestyle="--")
    right.set(title=f"times the limit; {found} found", ylim=(0, 3))
    right.set_xticks(range(3), ["start\nleft", "momentum", "few\nvalues"], fontsize=8)
    plt.close(figure)
    return figure


def treatments(cases: dict[str, tuple[float, float]]) -> Figure:
    """Show a line for each patient, from its accuracy before the treatment to that after, in %."""
    figure, ax = plt.subplots(figsize=(WIDTH, 0.8 + 0.27 * len(cases)))
    for row, (before, after) in enumerate(cases.values()):
        ax.annotate("", (after, row), (before, row),
                    arrowprops={"arrowstyle": "->", "color": color("muted")})  # fmt: skip
        ax.plot(before, row, "o", color=color("eval"), markersize=6)
        ax.plot(after, row, "s", color=color("train"), markersize=6)
    ax.set_yticks(range(len(cases)), [*cases])
    ax.set(xlabel="% of the test images right", xlim=(0, 100))
    ax.invert_yaxis()
    plt.close(figure)
    return figure
