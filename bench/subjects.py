"""What is timed: our backends, the layers of torch they stand against, and a plain copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import divnorm_kernels
from divnorm_kernels.backends import KERNELS, triton
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import divisive_norm as reference

from .cases import Setting

OURS = "divnorm"
BATCH_NORM, GROUP_NORM = "BatchNorm", "GroupNorm"
LAYER_NORM, RESPONSE_NORM = "LayerNorm", "LocalResponseNorm"
EAGER, COMPILED = "eager reference", "torch.compile"
PEERS = (BATCH_NORM, GROUP_NORM, LAYER_NORM, RESPONSE_NORM, EAGER, COMPILED)


@dataclass
class Subject:
    """One thing to time: ``function(x)`` gives y; ``parameters`` get gradients beside x."""

    name: str
    implementation: str
    function: Callable[[Tensor], Tensor]
    parameters: list[Tensor]


def activation(setting: Setting, values: Tensor) -> Tensor:
    """The case's numbers in the setting's dtype and memory format."""
    x = values.to(device=setting.device, dtype=divnorm_dtype(setting))
    if setting.format == "channels_last" and x.dim() > 2:
        dims = x.dim()
        x = x.permute(0, *range(2, dims), 1).contiguous().permute(0, dims - 1, *range(1, dims - 1))
    return x


def divnorm_dtype(setting: Setting) -> torch.dtype:
    """The setting's dtype as torch's."""
    return getattr(torch, setting.dtype)


def groups_for(channels: int) -> int:
    """GroupNorm's groups: 32, or a quarter of the channels where 32 does not divide them, or one."""
    if channels % 32 == 0:
        return 32
    return channels // 4 if channels % 4 == 0 else 1


def _affine(x: Tensor) -> list[Tensor]:
    return [make(x.shape[1], device=x.device).requires_grad_() for make in (torch.ones, torch.zeros)]


def ours(setting: Setting, x: Tensor) -> list[Subject]:
    """The backends that serve this call."""
    g = geometry(Norm(setting.window), tuple(x.shape))
    subjects = []
    for backend, kernels in KERNELS.items():
        if kernels.refusal(g, x) is None and not (kernels is triton and triton.INTERPRETED):
            weight, bias = _affine(x)

            def call(x: Tensor, weight: Tensor = weight, bias: Tensor = bias, backend: str = backend) -> Tensor:
                return divnorm_kernels.divisive_norm(x, weight, bias, window=setting.window, backend=backend)

            subjects.append(Subject(f"{OURS} {backend}", kernels.description(), call, [weight, bias]))
    return subjects


def peers(setting: Setting, x: Tensor, compiled: bool) -> list[Subject]:
    """The other ways to normalize this activation."""
    channels, dims, dtype = x.shape[1], x.dim(), x.dtype
    batch_norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims]
    layers = {BATCH_NORM: batch_norm(channels), LAYER_NORM: nn.LayerNorm(x.shape[1:])}
    if dims > 2:
        layers[GROUP_NORM] = nn.GroupNorm(groups_for(channels), channels)
        if x.is_cuda or dtype in (torch.float32, torch.float64):  # on the CPU, torch has no other
            layers[RESPONSE_NORM] = nn.LocalResponseNorm(setting.window)
    subjects = []
    for name in PEERS:
        if name in layers:
            layer = layers[name].to(device=x.device, dtype=_parameter_dtype(layers[name], x))
            subjects.append(Subject(name, _implementation(layer, x), layer, list(layer.parameters())))
    subjects.append(_reference(EAGER, "divnorm_kernels.reference", setting, x, lambda f: f))
    if compiled:
        torch.compiler.reset()
        subjects.append(
            _reference(COMPILED, "torch.compile of the reference, inductor", setting, x, lambda f: torch.compile(f))
        )
    return subjects


def _parameter_dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """On a GPU cuDNN's BatchNorm takes half inputs with float32 parameters, as under autocast; the others x's dtype."""
    mixed = x.is_cuda and isinstance(layer, nn.modules.batchnorm._BatchNorm) and x.dtype != torch.float64
    return torch.float32 if mixed else x.dtype


def _implementation(layer: nn.Module, x: Tensor) -> str:
    """The layer, and which of its kernels PyTorch takes for ``x``."""
    kernel = f"PyTorch's native {x.device.type.upper()} kernel"
    if x.is_cuda and isinstance(layer, nn.modules.batchnorm._BatchNorm):
        statistics = layer.running_mean, layer.running_var
        chosen = torch._C._select_batch_norm_backend(x, layer.weight, layer.bias, *statistics, True, layer.eps)
        kernel = {"Cudnn": "cuDNN", "Miopen": "MIOpen"}.get(chosen.name, kernel)
    return f"torch.nn.{type(layer).__name__}, {kernel}"


def _reference(name: str, implementation: str, setting: Setting, x: Tensor, wrap: Callable) -> Subject:
    weight, bias = _affine(x)
    function = wrap(lambda x: reference(x, weight, bias, window=setting.window))
    return Subject(name, implementation, function, [weight, bias])
