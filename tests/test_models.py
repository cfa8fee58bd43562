"""Whole models: transformers' ResNet and ConvNeXt with our layers, and their way to ONNX."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel

import divnorm_kernels as dk
from divnorm_kernels import convert_norm, l1_penalty


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetModel(ResNetConfig(**sizes))


def convnext():
    return ConvNextModel(ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1]))


MODELS = {"ResNet": resnet, "ConvNeXt": convnext}


def step(model, x):
    """The loss before and after a step of gradient descent."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = (model(x).pooler_output - 1).square().mean() + l1_penalty(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("to", ["bn", "ln*", "dn", "dn*"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:convert_norm. not carried over:UserWarning")
def test_a_converted_model_trains(name, to):
    torch.manual_seed(0)
    model = convert_norm(MODELS[name](), to, report=None)
    ours = [m for m in model.modules() if isinstance(m, dk.NormalizationLayer)]
    assert ours
    assert not [m for m in model.modules() if type(m) in (nn.BatchNorm2d, nn.LayerNorm)]
    before, after = step(model, torch.randn(4, 3, 32, 32))
    assert after < before
    for layer in ours:
        assert layer.weight.grad.abs().sum() > 0
        assert (layer.l1_weight > 0) == to.endswith("*")


@pytest.mark.parametrize(("name", "to"), [("ResNet", "bn"), ("ResNet", "dn"), ("ConvNeXt", "ln-s")])
def test_onnx(name, to, tmp_path):
    torch.manual_seed(0)
    model = convert_norm(MODELS[name](), to, report=None).eval()
    x = torch.randn(2, 3, 32, 32)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    (output, *_) = onnxruntime.InferenceSession(path).run(None, {"pixel_values": x.numpy()})
    np.testing.assert_allclose(output, model(x).last_hidden_state.detach(), rtol=1e-3, atol=1e-4)


def test_timm_itself():
    timm = pytest.importorskip("timm", reason="timm does not import here", exc_type=ImportError)
    model = timm.create_model("resnet10t", norm_layer=dk.DivisiveNorm2d)
    assert any(isinstance(m, dk.DivisiveNorm2d) for m in model.modules())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
