"""EvoNorm: a norm and an activation found as one layer by search."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..addresses import check_held
from ..checks import check_activation, check_at_least_zero, check_flag, check_number, check_size, compute_dtype
from ..functional import divisive_norm
from .backend import WithBackend
from .base import listed
from .recording import Recorded
from .running import along_channels


class EvoNorm2d(Recorded, nn.Module):
    """What `EvoNorm2dB0` and `EvoNorm2dS0` share: parameters by the names of timm's layers, and what x may be."""

    v: Tensor | None

    def __init__(
        self,
        num_channels: int,
        apply_act: bool,
        eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_size("num_channels", num_channels)
        check_flag("apply_act", apply_act)
        check_at_least_zero("eps", eps, "a float")
        self.num_channels, self.eps = num_channels, float(eps)
        for name in ("weight", "bias", "v"):
            made = apply_act or name != "v"
            own = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype)) if made else None
            self.register_parameter(name, own)

    @property
    def activates(self) -> bool:
        """Whether the layer is an activation too."""
        return self.v is not None

    def reset_parameters(self) -> None:
        """Sets weight and v to one and bias to zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.v is not None:
            nn.init.ones_(self.v)

    def forward(self, x: Tensor) -> Tensor:
        """y, with the shape and dtype of ``x``, (N, C, H, W). In a graph that `torch.fx` records it is one node."""
        node = self._as_node(x)
        if node is not None:
            return node
        check_activation(x)
        if x.dim() != 4 or x.shape[1] != self.num_channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, {self.num_channels}, H, W)")
        if not torch.compiler.is_compiling():
            check_held(x=x)
        wide = x.to(compute_dtype(x))
        weight, bias = (along_channels(t.to(wide.dtype), x) for t in (self.weight, self.bias))
        y = wide if self.v is None else self._normalized(wide, along_channels(self.v.to(wide.dtype), x))
        return torch.addcmul(bias, y, weight).to(x.dtype)

    def _normalized(self, x: Tensor, v: Tensor) -> Tensor:
        """Y without weight and bias, in the dtype that is computed in."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed([f"{self.num_channels}"], [("apply_act", self.activates, True)])


class EvoNorm2dS0(WithBackend, EvoNorm2d):
    """EvoNorm-S0 of (N, C, H, W): ``weight * x * sigmoid(v * x) / sqrt(var + eps) + bias``, no activation behind.

    The variance is the biased one of a group of channels of a sample, as `GroupNorm`'s. Arguments come in the order of
    timm's ``EvoNorm2dS0``, which calls the first one num_features, and the state_dict has its keys. Source: Liu et al.,
    "Evolving Normalization-Activation Layers", NeurIPS 2020, table 2.

    Args:
        num_channels: the number of channels, C.
        groups: equal groups of channels; it divides C.
        group_size: channels of a group, in the place of ``groups``.
        apply_act: without, the layer is weight and bias alone.
        eps: at least 0.
        device, dtype: of the parameters.
        backend: as for `divnorm_kernels.divisive_norm`, which divides by the deviation.

    Raises:
        TypeError, ValueError: on a bad argument; the message names it, what it got and what was expected.
    """

    def __init__(
        self,
        num_channels: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(num_channels, apply_act, eps, device, dtype)
        name, size = ("groups", groups) if group_size is None else ("group_size", group_size)
        check_size(name, size)
        if num_channels % size:
            raise ValueError(f"{name}: got {size}, expected a divisor of num_channels, {num_channels}")
        self.groups = size if group_size is None else num_channels // size
        self.backend = backend
        self.reset_parameters()

    def _normalized(self, x: Tensor, v: Tensor) -> Tensor:
        field = {"window": "all", "groups": self.groups, "sigma": self.eps**0.5, "subtract_mean": False}
        return divisive_norm(x, **field, backend=self.backend) * torch.sigmoid(v * x)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        options = [("groups", self.groups, 32), ("eps", self.eps, 1e-5), ("backend", self.backend, None)]
        return listed([super().extra_repr()], options)


class EvoNorm2dB0(EvoNorm2d):
    """EvoNorm-B0 of (N, C, H, W), with no activation behind.

    ``weight * x / max(sqrt(var_NHW + eps), v * x + sqrt(var_HW + eps)) + bias``, by the biased variances of each
    channel over the batch and over a sample. In eval mode the former is the running one, which moves by the unbiased
    variance, as `BatchNorm2d`'s, and where a channel has a single value not at all. Arguments come in the order of
    timm's ``EvoNorm2dB0``, which calls the first one num_features, and the state_dict has its keys. Source: Liu et al.,
    "Evolving Normalization-Activation Layers", NeurIPS 2020, table 2.

    Args:
        num_channels: the number of channels, C.
        apply_act: without, the layer is weight and bias alone.
        momentum: the share of the newest batch in the running variance.
        eps: at least 0.
        device, dtype: of the parameters and the buffer.

    Raises:
        TypeError, ValueError: on a bad argument; the message names it, what it got and what was expected.
    """

    running_var: Tensor

    def __init__(
        self,
        num_channels: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, apply_act, eps, device, dtype)
        check_number("momentum", momentum, "a float")
        self.momentum = float(momentum)
        self.register_buffer("running_var", torch.ones(num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weight, v and the running variance to one and bias to zero."""
        super().reset_parameters()
        nn.init.ones_(self.running_var)

    def _normalized(self, x: Tensor, v: Tensor) -> Tensor:
        batch = along_channels(self._variance(x), x)
        instance = x.var((2, 3), correction=0, keepdim=True)
        return x / torch.maximum((batch + self.eps).sqrt(), v * x + (instance + self.eps).sqrt())

    def _variance(self, x: Tensor) -> Tensor:
        """Of each channel over the batch, which the running one follows; in eval mode the running one."""
        if not self.training:
            return self.running_var.to(x.dtype)
        variance = x.var((0, 2, 3), correction=0)
        count = x.numel() // self.num_channels
        if count > 1:
            newest = variance.detach() * (count / (count - 1))
            self.running_var.copy_(self.running_var.to(x.dtype).lerp(newest, self.momentum))
        return variance

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed([super().extra_repr()], [("momentum", self.momentum, 0.1), ("eps", self.eps, 1e-3)])
