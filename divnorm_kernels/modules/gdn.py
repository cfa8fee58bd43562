"""Generalized divisive normalization as a layer, with the parametrization that published codecs are trained in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_activation, check_at_least_zero, check_flag, check_size, compute_dtype
from ..gdn import gdn
from ..norm import Norm, Window
from .backend import WithBackend
from .base import listed
from .recording import Recorded

_OFFSET = 2.0**-18
"""The least raw value: its square, the pedestal, is what values at zero are stored as."""


class _Bounded(torch.autograd.Function):
    """max(raw, bound), whose gradient also reaches a raw value below the bound where it would raise that."""

    generate_vmap_rule = True

    @staticmethod
    def forward(raw: Tensor, bound: Tensor) -> Tensor:
        return torch.maximum(raw, bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        raw, bound = ctx.saved_tensors
        return torch.where((raw >= bound) | (grad < 0), grad, 0), None


class _LowerBound(nn.Module):
    bound: Tensor

    def __init__(self, bound: float, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._initial = bound
        self.register_buffer("bound", torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the buffer."""
        self.bound.fill_(self._initial)

    def forward(self, raw: Tensor) -> Tensor:
        """``raw``, raised to the bound."""
        return _Bounded.apply(raw, self.bound.to(raw.dtype))


class _NonNegative(nn.Module):
    """Values of at least ``least``, stored as roots, so that a value near zero moves slowly."""

    pedestal: Tensor

    def __init__(self, least: float, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.register_buffer("pedestal", torch.empty(1, device=device, dtype=dtype))
        self.lower_bound = _LowerBound((least + _OFFSET**2) ** 0.5, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the buffers."""
        self.pedestal.fill_(_OFFSET**2)
        self.lower_bound.reset_parameters()

    def forward(self, raw: Tensor) -> Tensor:
        """The values of ``raw`` ones, in the type that they are computed with."""
        bounded = self.lower_bound(raw.to(compute_dtype(raw)))
        return bounded * bounded - self.pedestal.to(bounded.dtype)


class GDN(Recorded, WithBackend, nn.Module):
    """Generalized divisive normalization of (N, C, ...): ``y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)``.

    It takes the place of CompressAI's ``GDN``, and simplified of its ``GDN1``: its arguments in its order, its
    parametrization and the keys of its state_dict, so that checkpoints of published codecs load. Unlike theirs, on the
    CPU y in float32 and float64 is kept for backward: torch raises where it was changed in place before, as by
    ``nn.ReLU(inplace=True)``. The parameters are roots:
    ``beta = max(raw, sqrt(beta_min + 2^-36))^2 - 2^-36``, gamma likewise with a least value of 0. A raw value below its
    bound has a gradient where that would raise it. They and what is computed from them are float32 beside half types.
    Source: Balle, Laparra & Simoncelli, ICLR 2016 (arXiv 1511.06281); simplified: Johnston et al., 2019.

    Args:
        in_channels: the number of channels, C.
        inverse: multiply by the root, as decoders do.
        beta_min: the least beta, at least 0.
        gamma_init: the diagonal that gamma starts with, at least 0; beta starts at 1.
        simplified: abs(x) in the place of x^2, and no root.
        window: averages x^2 (or abs(x)) around each position first, as for `divnorm_kernels.gdn`; `torch.export`
            records it for extents from as many positions on as of `DivisiveNorm`.
        device, dtype: of the parameters and buffers.
        backend: as for `divnorm_kernels.gdn`.

    Raises:
        TypeError, ValueError: on a bad argument; the message names it, what it got and what was expected.
    """

    beta: Tensor
    gamma: Tensor

    def __init__(
        self,
        in_channels: int,
        inverse: bool = False,
        beta_min: float = 1e-6,
        gamma_init: float = 0.1,
        simplified: bool = False,
        window: Window = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        check_size("in_channels", in_channels)
        check_flag("inverse", inverse)
        check_at_least_zero("beta_min", beta_min, "a float")
        check_at_least_zero("gamma_init", gamma_init, "a float")
        check_flag("simplified", simplified)
        super().__init__()
        self.in_channels, self.inverse, self.simplified, self.backend = in_channels, inverse, simplified, backend
        self.beta_min, self.gamma_init = float(beta_min), float(gamma_init)
        self.window = Norm(window, None).window
        made = {"device": device, "dtype": dtype}
        self.beta_reparam = _NonNegative(self.beta_min, **made)
        self.beta = nn.Parameter(torch.empty(in_channels, **made))
        self.gamma_reparam = _NonNegative(0.0, **made)
        self.gamma = nn.Parameter(torch.empty(in_channels, in_channels, **made))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets beta to one and gamma to ``gamma_init`` on its diagonal and zero elsewhere, and fills the buffers."""
        self.beta.fill_((1 + _OFFSET**2) ** 0.5)
        self.gamma.fill_(_OFFSET).fill_diagonal_((self.gamma_init + _OFFSET**2) ** 0.5)
        self.beta_reparam.reset_parameters()
        self.gamma_reparam.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """y, with the shape, dtype and memory format of ``x``, (N, C, ...) with up to three spatial dimensions.

        In a graph that `torch.fx` records the layer is one node, as torch.nn's are.
        """
        node = self._as_node(x)
        if node is not None:
            return node
        check_activation(x)
        if x.dim() > 1 and x.shape[1] != self.in_channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, {self.in_channels}, ...)")
        beta, gamma = self.beta_reparam(self.beta), self.gamma_reparam(self.gamma)
        options = {"inverse": self.inverse, "simplified": self.simplified, "window": self.window}
        return gdn(x, beta, gamma, **options, backend=self.backend)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed(
            [f"{self.in_channels}"],
            [
                ("inverse", self.inverse, False),
                ("beta_min", self.beta_min, 1e-6),
                ("gamma_init", self.gamma_init, 0.1),
                ("simplified", self.simplified, False),
                ("window", self.window, None),
                ("backend", self.backend, None),
            ],
        )
