"""The parametrizations: w = gain c / norm(c) for each row c of a weight, centred or not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import compute_dtype


class Rows(nn.Module):
    """The base: rows are what a weight holds at one index of ``dim``, or all of it for ``None``."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def _others(self, v: Tensor) -> list[int] | None:
        return None if self.dim is None else [d for d in range(v.dim()) if d != self.dim]

    def _norms(self, v: Tensor, p: float = 2.0) -> Tensor:
        """One norm a row, in the shape of torch's gains: 1 but for ``dim``, or () for the whole weight."""
        return torch.linalg.vector_norm(v.to(compute_dtype(v)), p, self._others(v), keepdim=self.dim is not None)

    def _scaled(self, v: Tensor, gain: Tensor, p: float = 2.0) -> Tensor:
        """``gain v / norm(v)``; a row of zeros stays one, its gradient as if its norm were 1."""
        norms = self._norms(v, p)
        scale = gain.to(norms.dtype) / torch.where(norms == 0, 1.0, norms)
        return (v.to(norms.dtype) * scale).to(v.dtype)

    def _standardized(self, v: Tensor, gain: Tensor | float, eps: float) -> Tensor:
        """``gain (v - mean) / sqrt(var + eps)`` with the biased variance of a row."""
        compute = v.to(compute_dtype(v))
        var, mean = torch.var_mean(compute, self._others(v), correction=0, keepdim=True)
        return ((compute - mean) * ((var + eps).rsqrt() * gain)).to(v.dtype)

    def extra_repr(self) -> str:
        """The options."""
        options = {name: value for name, value in vars(self).items() if name[0] != "_" and name != "training"}
        return ", ".join(f"{name}={value}" for name, value in options.items())


class WeightNorm(Rows):
    """A learned norm for each row."""

    def forward(self, gain: Tensor, v: Tensor) -> Tensor:
        """The weight."""
        return self._scaled(v, gain)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and v of a weight."""
        return self._norms(weight).to(weight.dtype), weight


class _Bound(Rows):
    """What the bounded ones share: the exponent, and the bound, which a weight sets."""

    rho: Tensor

    def __init__(self, dim: int | None, p: float) -> None:
        super().__init__(dim)
        self.p = p
        self.register_buffer("rho", None)


class BoundedWeightNorm(_Bound):
    """The norms of the rows are learned, but not the norm of these norms."""

    def forward(self, gain: Tensor, v: Tensor) -> Tensor:
        """The weight."""
        gain, rho = gain.to(compute_dtype(v)), self.rho.to(compute_dtype(v))
        norm = torch.linalg.vector_norm(gain)
        return self._scaled(v, gain * (rho / torch.where(norm == 0, 1.0, norm)), self.p)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and v of a weight, which sets the bound."""
        norms = self._norms(weight, self.p)
        self.rho = torch.linalg.vector_norm(norms)
        return norms.to(weight.dtype), weight


class SharedBound(_Bound):
    """The same with one norm for all rows, their average at the start."""

    def forward(self, v: Tensor) -> Tensor:
        """The weight."""
        return self._scaled(v, self.rho, self.p)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """V of a weight, which sets the bound."""
        self.rho = self._norms(weight, self.p).mean()
        return weight


class WeightStandardization(Rows):
    """Rows of mean 0 and standard deviation 1."""

    def __init__(self, dim: int | None, eps: float) -> None:
        super().__init__(dim)
        self.eps = eps

    def forward(self, v: Tensor) -> Tensor:
        """The weight."""
        return self._standardized(v, 1.0, self.eps)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight


class ScaledWeightStandardization(Rows):
    """Rows of mean 0 and norm gamma, times a learned gain each."""

    def __init__(self, dim: int | None, eps: float, gamma: float) -> None:
        super().__init__(dim)
        self.eps = eps
        self.gamma = gamma

    def forward(self, gain: Tensor, v: Tensor) -> Tensor:
        """The weight."""
        fan_in = v.numel() // gain.numel()
        return self._standardized(v, gain.to(compute_dtype(v)) * (self.gamma * fan_in**-0.5), self.eps)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gains of one, and the weight itself."""
        return torch.ones_like(self._norms(weight), dtype=weight.dtype), weight
