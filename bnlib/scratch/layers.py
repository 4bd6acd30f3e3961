"""Layers in NumPy with PyTorch's names, modes and states.

A layer computes `forward`, keeps what `backward` needs, and leaves its parameters' gradients in
`grads`. A state is a dict of NumPy arrays under PyTorch's key names, so it travels both ways:
`torch.from_numpy` makes of each array what torch.nn loads, `Tensor.numpy` makes it an array again.

Source: PyTorch 2.13, torch.nn: Linear, ReLU, Sigmoid, BatchNorm1d to 3d, Sequential.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bnlib.scratch import fast
from bnlib.scratch import functional as F
from bnlib.scratch.functional import Array

PARAMETERS = ("weight", "bias")  # what training moves
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # what it does not


class Layer:
    """What every layer shares: two modes, arrays with names, and gradients.

    training: True after `train()` and at first, False after `eval()`.
    grads: the gradients of the last `backward`, under the names of `parameters()`; each call
    replaces them, nothing is added up.
    """

    def __init__(self) -> None:
        self.training = True
        self.grads: dict[str, Array] = {}
        self._kept: Any = None

    def __call__(self, x: ArrayLike) -> Array:
        """Call `forward`."""
        return self.forward(x)

    def forward(self, x: ArrayLike) -> Array:
        """Return the layer's output for x, and keep what `backward` needs."""
        raise NotImplementedError

    def backward(self, dy: ArrayLike) -> Array:
        """Return dx for the last `forward`, and leave the parameters' gradients in `grads`.

        dy: the gradient for the output, floats, shaped as the output. Raises RuntimeError before
        the first `forward`, TypeError if dy does not hold floats, ValueError for another shape.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, or to evaluation mode if mode is False; return the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation mode; return the layer."""
        return self.train(False)

    def parameters(self) -> dict[str, Array]:
        """Return the arrays that training moves, by name: the layer's own, not copies."""
        return self._named(PARAMETERS)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return copies of all parameters and buffers, under PyTorch's names."""
        return {name: a.copy() for name, a in self._named(PARAMETERS + BUFFERS).items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy the values of a state into the layer; each array keeps its own type.

        state: real numbers for every name of `state_dict()`, shaped as there. The counter too:
        PyTorch lets num_batches_tracked be absent from a plain dict, for its oldest checkpoints.
        Raises ValueError that names every key that is missing, unexpected or does not fit; then
        nothing is loaded.
        """
        arrays = self._named(PARAMETERS + BUFFERS)
        values = {name: np.asarray(value) for name, value in state.items()}
        problems = [f"missing {name!r}" for name in arrays if name not in values]
        problems += [f"unexpected {name!r}" for name in values if name not in arrays]
        for name in [name for name in arrays if name in values]:
            shape, value = arrays[name].shape, values[name]
            if value.shape != shape or value.dtype.kind not in "fiu":
                wrong = f"{value.dtype} of shape {value.shape}"
                problems.append(f"expected {name!r} of shape {shape}, real numbers, got {wrong}")
        if problems:
            raise ValueError(f"the state does not fit, nothing is loaded: {'; '.join(problems)}")
        for name, array in arrays.items():
            array[...] = values[name]

    def _named(self, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Return those of the named arrays that the layer has."""
        arrays = {name: getattr(self, name, None) for name in names}
        return {name: array for name, array in arrays.items() if array is not None}

    def _from_forward(self) -> Any:
        if self._kept is None:
            raise RuntimeError("expected a forward pass before backward; call the layer on x first")
        return self._kept


class Linear(Layer):
    """Multiply by a weight and add a bias: y = x @ weight.T + bias.

    weight: shape (out_features, in_features), bias: shape (out_features,), both drawn uniformly
    from ±1/sqrt(in_features) with the NumPy Generator rng. bias=False leaves the bias out; a batch
    norm behind the layer subtracts it again. x: floats, shape (N, in_features).

    Raises ValueError for another shape of x or no features, TypeError if x does not hold floats.
    Source: PyTorch, torch.nn.Linear and its default initialisation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
        *,
        rng: np.random.Generator,
    ) -> None:
        super().__init__()
        shape = _count(out_features, "out_features"), _count(in_features, "in_features")
        bound, dtype = in_features**-0.5, _float_type(dtype)
        self.weight = rng.uniform(-bound, bound, shape).astype(dtype)
        self.bias = rng.uniform(-bound, bound, out_features).astype(dtype) if bias else None

    def forward(self, x: ArrayLike) -> Array:
        """Return x @ weight.T + bias."""
        x, in_features = F._floats(x, "x"), self.weight.shape[1]
        if x.shape[1:] != (in_features,):
            raise ValueError(
                f"expected x of shape (N, {in_features}), got {x.shape}; images become rows with "
                "x.reshape(len(x), -1)"
            )
        self._kept = x.copy()  # the caller may write to x before backward
        y = x @ self.weight.T
        return np.asarray(y if self.bias is None else y + self.bias)

    def backward(self, dy: ArrayLike) -> Array:
        """Return dx = dy @ weight; the weight's gradient is dy.T @ x, the bias's the sum of dy."""
        x = self._from_forward()
        dy = F._gradient(dy, (len(x), len(self.weight)))
        grads = {"weight": dy.T @ x, "bias": dy.sum(axis=0)}
        self.grads = {name: grads[name].astype(p.dtype) for name, p in self.parameters().items()}
        return np.asarray(dy @ self.weight)


class ReLU(Layer):
    """Keep what is above 0 and put 0 for the rest: y = max(x, 0).

    x: floats, shape (N, C) or (N, C, *spatial). The slope at 0 is 0; NaN stays NaN.
    Raises TypeError if x does not hold floats, ValueError if it has fewer than two dimensions.
    Source: PyTorch, torch.nn.ReLU.
    """

    def forward(self, x: ArrayLike) -> Array:
        """Return max(x, 0)."""
        x = F._floats(x, "x")
        self._kept = x <= 0
        return np.where(self._kept, x.dtype.type(0), x)

    def backward(self, dy: ArrayLike) -> Array:
        """Return dy where x was above 0, and 0 elsewhere."""
        off = self._from_forward()
        dy = F._gradient(dy, off.shape)
        return np.where(off, dy.dtype.type(0), dy)


class Sigmoid(Layer):
    """Squash every value into 0 to 1: y = 1 / (1 + exp(-x)).

    x: floats, shape (N, C) or (N, C, *spatial).
    Raises TypeError if x does not hold floats, ValueError if it has fewer than two dimensions.
    Source: PyTorch, torch.nn.Sigmoid.
    """

    def forward(self, x: ArrayLike) -> Array:
        """Return 1 / (1 + exp(-x)), written so that exp cannot overflow."""
        x = F._floats(x, "x")
        y = np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))
        self._kept = y * (1 - y)
        return np.asarray(y)

    def backward(self, dy: ArrayLike) -> Array:
        """Return dy times the slope, y * (1 - y)."""
        slope = self._from_forward()
        return np.asarray(F._gradient(dy, slope.shape) * slope)


class BatchNorm(Layer):
    """Batch normalization with PyTorch's two modes, running statistics and state.

    x: floats, shape (N, num_features) or (N, num_features, *spatial); y is shaped and typed as x.
    Training normalizes with the batch's own mean and biased variance, and moves the running
    statistics toward its mean and unbiased variance. Evaluation normalizes with the running
    statistics, and takes any batch, a single example too.

    eps: added to the variance; at least 0, and above 0 where the batch's statistics are used.
    momentum: the weight of a new batch, 0 to 1; None weighs all batches alike, 1/n for the n-th.
    affine: False leaves out weight (gamma, at first 1) and bias (beta, at first 0).
    track_running_stats: False from the start leaves out running_mean (at first 0), running_var (at
    first 1) and num_batches_tracked, so that both modes use the batch's statistics; False later on
    freezes them in training, and evaluation goes on using them.
    dtype: the float type of all arrays but the counter, which is int64; x may have another.

    The layer keeps x itself, not a copy: do not write to x between `forward` and `backward`. It
    computes with `fast`.

    Nothing moves before an error; PyTorch has counted a batch by the time it refuses it
    (`_BatchNorm.forward` adds to the counter first). An empty batch moves the counter alone.

    Raises ValueError if num_features, eps or momentum is out of range, if x has fewer than two
    dimensions or another number of channels, or where the batch's statistics are used and it has
    one value per channel or eps is 0; TypeError if x does not hold floats.
    Source: Ioffe and Szegedy (2015), Algorithms 1 and 2; PyTorch, torch.nn.BatchNorm1d.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__()
        C, dtype = _count(num_features, "num_features"), _float_type(dtype)
        self.num_features, self.eps = C, F._not_negative(eps)
        self.momentum = None if momentum is None else F._fraction(momentum)
        self.affine, self.track_running_stats = affine, track_running_stats
        self.weight = np.ones(C, dtype) if affine else None
        self.bias = np.zeros(C, dtype) if affine else None
        self.running_mean = np.zeros(C, dtype) if track_running_stats else None
        self.running_var = np.ones(C, dtype) if track_running_stats else None
        self.num_batches_tracked = np.array(0, np.int64) if track_running_stats else None

    def forward(self, x: ArrayLike) -> Array:
        """Return y; in training mode, move the running statistics."""
        x, C = F._floats(x, "x"), self.num_features
        if x.shape[1] != C:
            raise ValueError(
                f"expected {C} channels along axis 1, got {x.shape[1]}: input of shape {x.shape}"
            )
        gamma = np.ones(C) if self.weight is None else self.weight
        beta = np.zeros(C) if self.bias is None else self.bias
        if not self.training and self.running_mean is not None and self.running_var is not None:
            vectors = {"mean": self.running_mean, "var": self.running_var, "gamma": gamma}
            given: dict[str, Any] = {name: v.copy() for name, v in vectors.items()}
            y = fast.batch_norm_inference(x, beta=beta, eps=self.eps, **given)
            self._kept = partial(fast.batch_norm_inference_backward, x=x, eps=self.eps, **given)
            return y
        if x.size == C:
            why = "in training mode" if self.training else "without running statistics"
            raise ValueError(
                f"expected more than 1 value per channel, since {why} the batch's own statistics "
                f"are used, got input of shape {x.shape}; use a larger batch"
            )
        y, cache = fast.batch_norm(x, gamma, beta, self.eps)
        if self.training and self.track_running_stats:
            self._track(cache.mean, cache.var, x.size // C)
        self._kept = partial(fast.batch_norm_backward, cache=cache)
        return y

    def backward(self, dy: ArrayLike) -> Array:
        """Return dx, through the batch's statistics too where `forward` used them."""
        dx, *grads = self._from_forward()(dy)
        if self.weight is not None:
            grads = [grad.astype(self.weight.dtype) for grad in grads]
            self.grads = dict(zip(PARAMETERS, grads, strict=True))
        return np.asarray(dx)

    def reset_running_stats(self) -> None:
        """Set the running mean and the counter to 0 and the variance to 1, if they are tracked."""
        for name, array in self._named(BUFFERS).items():
            if self.track_running_stats:
                array[...] = 1 if name == "running_var" else 0

    def _track(self, mean: Array, var: Array, count: int) -> None:
        old_mean, old_var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        if old_mean is not None and old_var is not None and counter is not None:
            momentum = 1 / (int(counter) + 1) if self.momentum is None else self.momentum
            new = F.update_running(old_mean, old_var, mean, var, count, momentum)
            old_mean[...], old_var[...] = new
            counter += 1  # an empty batch too, which has moved nothing else


class Sequential(Layer):
    """Feed each layer's output to the next; names carry the layer's position, as in "0.weight".

    layers: each object once, since it keeps one forward pass for its backward. When a layer
    refuses its input, the layers before it have done their forward pass.
    Raises TypeError for what is not a layer, ValueError for a layer that comes twice.
    Source: PyTorch, torch.nn.Sequential.
    """

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        if wrong := [type(layer).__name__ for layer in layers if not isinstance(layer, Layer)]:
            raise TypeError(f"expected Sequential(first, second, ...) of layers, got {wrong}")
        if len(set(layers)) < len(layers):
            raise ValueError("expected each layer once, got one twice; make a second one")
        self.layers = layers

    def forward(self, x: ArrayLike) -> Array:
        """Return the last layer's output."""
        for layer in self.layers:
            x = layer(x)
        return np.asarray(x)

    def backward(self, dy: ArrayLike) -> Array:
        """Return dx, from the last layer to the first."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        each = enumerate(self.layers)
        self.grads = {f"{i}.{name}": g for i, layer in each for name, g in layer.grads.items()}
        return np.asarray(dy)

    def train(self, mode: bool = True) -> Self:
        """Switch every layer to training mode, or to evaluation mode if mode is False."""
        for layer in self.layers:
            layer.train(mode)
        return super().train(mode)

    def _named(self, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        each = enumerate(self.layers)
        return {f"{i}.{name}": a for i, layer in each for name, a in layer._named(names).items()}


def _count(value: int, name: str) -> int:
    if value < 1:
        raise ValueError(f"expected {name} to be 1 or more, got {value}")
    return value


def _float_type(dtype: DTypeLike) -> np.dtype[Any]:
    if not np.issubdtype(dtype, np.floating):
        raise TypeError(f"expected a float type such as numpy.float32, got {np.dtype(dtype)}")
    return np.dtype(dtype)
