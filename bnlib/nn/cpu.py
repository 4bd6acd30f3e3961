"""The fast core of `bnlib.scratch`, for tensors in the memory of a CPU.

A tensor and a NumPy array can share their memory, so nothing is copied on the way there and back.
The functions take the place of whole forward and backward passes in `bnlib.nn.functional`, which
checks the arguments. Vectors are (C,) or None, for a weight of 1 or a bias of 0; out is where y or
dx goes.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from bnlib.scratch import fast

Array = NDArray[np.floating[Any]]

NUMPY_TYPES = {torch.float32: np.float32, torch.float64: np.float64}
LARGE = 2**22  # bytes: where NumPy begins to ask for huge pages
PLAIN = (Tensor, Parameter)  # and no subclass: it may hold its values elsewhere


def available(x: Tensor, *others: Tensor | None, eps: float) -> bool:
    """Return whether the core can take x, the other tensors and eps.

    True for float32 and float64 in a CPU's memory, at least one value, and eps above 0; False
    while a dispatch mode is on, such as FakeTensorMode: it would not see what NumPy does.
    """
    if x.dtype not in NUMPY_TYPES or not 0 < eps < math.inf or torch._C._len_torch_dispatch_stack():
        return False
    for tensor in (x, *others):
        if tensor is None:
            continue
        own_memory = type(tensor) in PLAIN and torch._C._has_storage(tensor)
        if not (own_memory and tensor.is_cpu and tensor.numel() and not tensor.is_neg()):
            return False
    return True


def empty_like(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return a tensor shaped and typed as x, with any values in it.

    A large one takes memory from NumPy, which asks the system for huge pages: clearing the small
    ones that PyTorch gets would take longer than the arithmetic. memory_format: as in torch.empty.
    """
    if x.nbytes < LARGE:
        return torch.empty_like(x, memory_format=memory_format, requires_grad=False)
    N, C, *spatial = x.shape
    if memory_format is torch.contiguous_format:
        array = np.empty((N, C, *spatial), NUMPY_TYPES[x.dtype])
    else:
        array = np.moveaxis(np.empty((N, *spatial, C), NUMPY_TYPES[x.dtype]), -1, 1)
    return torch.from_numpy(array)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the batch's mean and biased variance, as `fast.batch_norm` computes them."""
    affine = _vector(weight, x, 1), _vector(bias, x, 0)
    _, kept = fast.batch_norm(_array(x), *affine, eps, out=_array(out))
    return out, torch.from_numpy(kept.mean), torch.from_numpy(kept.var)


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx and the gradients for bias and weight, with the batch's own statistics."""
    gamma = _vector(weight, x, 1).astype(np.float64)
    kept = fast.Cache(_array(x), _array(mean), _array(var), gamma, eps)
    _, dgamma, dbeta = fast.batch_norm_backward(_array(dy), kept, out=_array(out))
    return out, _like_x(dbeta, kept.x), _like_x(dgamma, kept.x)


def inference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> Tensor:
    """Return y with given statistics, as `fast.batch_norm_inference` computes it."""
    vectors = _array(mean), _array(var), _vector(weight, x, 1), _vector(bias, x, 0)
    fast.batch_norm_inference(_array(x), *vectors, eps, out=_array(out))
    return out


def inference_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx and the gradients for bias and weight, with given statistics."""
    array, vectors = _array(x), (_array(mean), _array(var), _vector(weight, x, 1))
    _, dgamma, dbeta = fast.batch_norm_inference_backward(
        _array(dy), array, *vectors, eps, out=_array(out)
    )
    return out, _like_x(dbeta, array), _like_x(dgamma, array)


def _array(x: Tensor) -> Array:
    """Return x as an array of NumPy's, on the same memory."""
    array: Array = x.detach().numpy()
    return array


def _like_x(vector: Array, x: Array) -> Tensor:
    """Return a vector as a tensor of x's type: NumPy casts short vectors faster than PyTorch."""
    return torch.from_numpy(vector.astype(x.dtype))


def _vector(vector: Tensor | None, x: Tensor, otherwise: float) -> Array:
    return np.full(x.shape[1], otherwise) if vector is None else _array(vector).reshape(-1)
