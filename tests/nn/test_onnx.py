"""Our layers exported to ONNX, run by the reference implementation of ONNX itself."""

import warnings

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from bnlib import nn as bnn


@pytest.mark.parametrize("training", [False, True])
def test_an_exported_network_computes_the_same(training):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), bnn.BatchNorm2d(3), torch.nn.ReLU(), bnn.GroupNorm(1, 3)
    )
    for _ in range(3):
        net(torch.randn(4, 2, 6, 7) * 3 + 5)
    net.train(training)
    x = torch.randn(4, 2, 6, 7) * 3 + 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, and its word on training mode
        program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    model = program.model_proto
    (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})[:1]
    np.testing.assert_allclose(y, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)
