"""Training by hand: a loss, an optimizer and a loop.

Source: PyTorch 2.13, torch.nn.functional.cross_entropy and torch.optim.SGD.
"""

import sys
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from bnlib.scratch.functional import Array, _floats
from bnlib.scratch.layers import Layer


def softmax_cross_entropy(scores: ArrayLike, labels: ArrayLike) -> tuple[float, Array]:
    """Return the mean of -log(softmax(scores)) at the labels, and its gradient for the scores.

    scores: floats, shape (N, K), one row per example, one column per class; at least one row.
    labels: integers from 0 to K - 1, shape (N,). Returns the loss and dscores, shaped and typed as
    scores. Computed in float64, from scores minus the row's largest, so that exp cannot overflow.

    Raises TypeError if scores are not floats or labels not integers, ValueError if a shape or a
    label does not fit.
    Source: PyTorch, torch.nn.functional.cross_entropy.
    """
    scores, labels = _floats(scores, "scores"), np.asarray(labels)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"expected scores of shape (N, K), not empty, got shape {scores.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"expected integer labels, the columns of scores, got {labels.dtype}")
    N, K = scores.shape
    if labels.shape != (N,):
        raise ValueError(f"expected one label per row, shape ({N},), got shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= K:
        found = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"expected labels from 0 to {K - 1}, one per column, got {found}")
    shifted = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -log_softmax[np.arange(N), labels].mean()
    dscores = np.exp(log_softmax)
    dscores[np.arange(N), labels] -= 1
    return float(loss), (dscores / N).astype(scores.dtype)


class SGD:
    """Stochastic gradient descent with momentum and weight decay, by PyTorch's rule.

    For each parameter: g = gradient + weight_decay * parameter; velocity = momentum * velocity + g;
    parameter -= learning_rate * velocity, in place. The three numbers are at least 0 and finite,
    else ValueError; as attributes they may change between steps.
    Source: PyTorch, torch.optim.SGD.
    """

    def __init__(
        self, model: Layer, learning_rate: float, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        for name, value in vars(self).items():
            if not 0 <= value < np.inf:
                raise ValueError(f"expected {name} at least 0 and finite, got {value}")
        self.model = model
        self._velocity = {name: np.zeros_like(p) for name, p in model.parameters().items()}

    def step(self) -> None:
        """Move every parameter by the gradient that the model's last backward left.

        Raises RuntimeError, and moves nothing, if a parameter has no gradient yet.
        """
        parameters, grads = self.model.parameters(), self.model.grads
        if missing := ", ".join(name for name in parameters if name not in grads):
            raise RuntimeError(f"expected gradients for {missing}; call model.backward first")
        for name, parameter in parameters.items():
            velocity = self._velocity[name]
            velocity *= self.momentum
            velocity += grads[name] + self.weight_decay * parameter
            parameter -= self.learning_rate * velocity


def fit(
    model: Layer,
    images: ArrayLike,
    labels: ArrayLike,
    optimizer: SGD,
    *,
    epochs: int,
    batch_size: int,
    rng: np.random.Generator,
) -> list[float]:
    """Train the model on shuffled batches, and return the loss of each.

    images: as the model takes them, shape (n, ...). labels: integers, shape (n,). optimizer: of
    this model. Each epoch draws its order from rng, and leaves out the n % batch_size examples at
    its end: a last batch of one would stop batch norm. The model stays in training mode. A bar
    shows the progress where someone can see it, if tqdm is installed.

    Raises ValueError before any step if there is not one label per image, epochs is below 1,
    batch_size is not 1 to n, or the optimizer has another model; later, what a step raises.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    n = len(images)
    if len(labels) != n:
        raise ValueError(f"expected one label per image, got {n} images and {len(labels)} labels")
    if epochs < 1 or not 1 <= batch_size <= n:
        wrong = f"{epochs} and {batch_size}"
        raise ValueError(f"expected epochs from 1 and batch_size from 1 to {n}, got {wrong}")
    if optimizer.model is not model:
        raise ValueError("expected an optimizer of this model; make one with SGD(model, ...)")
    model.train()
    per_epoch, losses = n // batch_size, []
    for step in progress(range(epochs * per_epoch), "batch"):
        start = step % per_epoch * batch_size
        if start == 0:
            order = rng.permutation(n)
        batch = order[start : start + batch_size]
        loss, dscores = softmax_cross_entropy(model(images[batch]), labels[batch])
        model.backward(dscores)
        optimizer.step()
        losses.append(loss)
    return losses


def progress(steps: Iterable[int], unit: str) -> Iterable[int]:
    """Return the same steps, behind a progress bar where someone can see it.

    unit: what one step is, in a word. Without tqdm, or where nobody watches, there is no bar, and
    nothing of a bar stays in a notebook. Source: tqdm.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return steps
    bar: Iterable[int] = tqdm(steps, unit=unit, leave=False, disable=not _is_watched())
    return bar


def _is_watched() -> bool:
    """Tell whether a person can see a bar: at a terminal, or at a notebook that they run.

    A kernel that executes a notebook for its stored outputs is told that nobody can type.
    """
    ipython = sys.modules.get("IPython")
    kernel = getattr(ipython and ipython.get_ipython(), "kernel", None)
    return sys.stderr.isatty() if kernel is None else getattr(kernel, "_allow_stdin", False)
