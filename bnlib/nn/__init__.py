"""Normalization layers for PyTorch, from scratch: drop-in replacements for those of torch.nn.

from bnlib import nn as bnn

model = bnn.convert(model)      # every torch.nn batch norm of a model
layer = bnn.BatchNorm2d(64)     # or one at a time
"""

from bnlib.nn import functional
from bnlib.nn.distributed import SyncBatchNorm, convert_sync_batchnorm
from bnlib.nn.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
    RMSNorm,
    convert,
    revert,
)
from bnlib.nn.variants import (
    AdaIN,
    BatchRenorm1d,
    BatchRenorm2d,
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    FrozenBatchNorm,
    FrozenBatchNorm2d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    VirtualBatchNorm1d,
    VirtualBatchNorm2d,
    convert_frozen_batchnorm,
)

__all__ = [
    "AdaIN",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "FrozenBatchNorm",
    "FrozenBatchNorm2d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "RMSNorm",
    "SyncBatchNorm",
    "VirtualBatchNorm1d",
    "VirtualBatchNorm2d",
    "convert",
    "convert_frozen_batchnorm",
    "convert_sync_batchnorm",
    "functional",
    "revert",
]
