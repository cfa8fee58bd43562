"""Functions of each number by itself: what takes a norm's place without statistics, and a ReLU's behind weight norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..addresses import check_held
from ..checks import check_activation, check_number, check_size, compute_dtype
from .base import listed
from .recording import Recorded

RELU_GAIN = math.sqrt(2 * math.pi / (math.pi - 1))
"""One by the standard deviation of relu(z), z standard normal."""


class _Pointwise(Recorded, nn.Module):
    """``weight * f(x) + bias`` with a number per channel and an f that has an alpha, and a shift where it says so."""

    _shifts = False

    def __init__(
        self,
        num_channels: int,
        alpha: float = 0.5,
        dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("num_channels", num_channels)
        check_number("alpha", alpha, "a float")
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim: got {dim!r} of type {type(dim).__name__}, expected an int")
        self.num_channels, self.dim, self.initial_alpha = num_channels, dim, float(alpha)
        # one dimension: torch's sharding takes no scalars
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if self._shifts else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weight to one, bias and shift to zero and alpha to what it starts from."""
        nn.init.constant_(self.alpha, self.initial_alpha)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        """y, with the shape and dtype of ``x``. In a graph that `torch.fx` records it is one node."""
        node = self._as_node(x)
        if node is not None:
            return node
        check_activation(x)
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != self.num_channels:
            expected = f"{self.num_channels} channels in dimension {self.dim}"
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected {expected}")
        if not torch.compiler.is_compiling():
            check_held(x=x)
        wide = x.to(compute_dtype(x))
        behind = [1] * (x.dim() - 1 - self.dim % x.dim())
        weight, bias = (t.to(wide.dtype).view(-1, *behind) for t in (self.weight, self.bias))
        return torch.addcmul(bias, self._function(wide), weight).to(x.dtype)

    def _function(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed([f"{self.num_channels}"], [("alpha", self.initial_alpha, 0.5), ("dim", self.dim, -1)])


class DyT(_Pointwise):
    """Dynamic tanh, ``weight * tanh(alpha * x) + bias``: in a norm's place, without statistics.

    Keys are those of the authors' ``DynamicTanh``: ``alpha`` of shape (1,), ``weight`` and ``bias`` of shape (C,).
    Source: Zhu et al., "Transformers without Normalization", CVPR 2025, equation 5.

    Args:
        num_channels: the number of channels, C.
        alpha: what the parameter starts from.
        dim: where the channels of x lie: -1 for tokens, 1 for images.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: on a bad argument; the message names it, what it got and what was expected.
    """

    def _function(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha.to(x.dtype) * x)


class Derf(_Pointwise):
    """Dynamic error function, ``weight * erf(alpha * x + shift) + bias``: in a norm's place, without statistics.

    ``alpha`` and ``shift``, which starts from zero, are parameters of shape (1,). Source: Chen et al., "Stronger
    Normalization-Free Transformers", 2025.

    Args:
        num_channels, alpha, dim, device, dtype: as for `DyT`.

    Raises:
        TypeError, ValueError: on a bad argument; the message names it, what it got and what was expected.
    """

    _shifts = True

    def _function(self, x: Tensor) -> Tensor:
        return torch.erf(self.alpha.to(x.dtype) * x + self.shift.to(x.dtype))


class StandardizedReLU(Recorded, nn.Module):
    """``sqrt(2 pi / (pi - 1)) * (relu(x) - 1 / sqrt(2 pi))``: of standard normal x, mean 0 and variance 1 again.

    It stands behind convolutions with weight norm in the place of a ReLU, as in Lubana et al., "Beyond BatchNorm",
    NeurIPS 2021. Source: Arpit et al., "Normalization Propagation", ICML 2016. x may have any shape.
    """

    def forward(self, x: Tensor) -> Tensor:
        """y, with the shape and dtype of ``x``. In a graph that `torch.fx` records it is one node."""
        node = self._as_node(x)
        if node is not None:
            return node
        check_activation(x)
        relu = torch.relu(x.to(compute_dtype(x)))
        return (RELU_GAIN * (relu - 1 / math.sqrt(2 * math.pi))).to(x.dtype)
