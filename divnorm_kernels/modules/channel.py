"""Layers that divide by a pool of neighbouring channels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..channels import Exponential, channel_norm
from ..checks import check_at_least_zero, check_flag, check_number, check_size
from .backend import WithBackend
from .base import listed
from .recording import Recorded


class _ChannelNorm(Recorded, WithBackend, nn.Module):
    """Scalars that are floats, or parameters of shape (1,) that start from them."""

    _learns_by_default: ClassVar[bool]

    def _set_scalars(self, learnable: bool, factory: dict[str, Any], **initial: float) -> None:
        for name, value in initial.items():
            if name in ("beta", "scale"):
                check_number(name, value, "a float")
            else:
                check_at_least_zero(name, value, "a float")
        check_flag("learnable", learnable)
        self.learnable, self.initial = learnable, {name: float(value) for name, value in initial.items()}
        for name, value in self.initial.items():
            # one dimension: torch's sharding takes no scalars
            setattr(self, name, nn.Parameter(torch.empty(1, **factory)) if learnable else value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets what is learned to its initial value."""
        for name, value in self.initial.items() if self.learnable else ():
            nn.init.constant_(getattr(self, name), value)

    def _shown(self, name: str) -> float:
        return self.initial[name] if self.learnable else getattr(self, name)

    def _options_repr(self) -> list[tuple[str, Any, Any]]:
        return [("learnable", self.learnable, self._learns_by_default), ("backend", self.backend, None)]


class LocalResponseNorm(_ChannelNorm, nn.LocalResponseNorm):
    """Local response normalization of (N, C, ...): ``x / (k + alpha / size * sum of x^2 over size channels)^beta``.

    Arguments, checkpoints and values are `torch.nn.LocalResponseNorm`'s. Source: Krizhevsky et al., NIPS 2012.

    Args:
        size: channels of the window, which is cut at the first and the last; an even one reaches one further down.
        alpha, beta, k: floats; of the former and the latter at least 0.
        learnable: whether the three are parameters, of shape (1,), that start from these; keys ``alpha``, ``beta``,
            ``k``. A learned beta takes the time of powers, where 0.5, 0.75 and 1 take roots.
        device, dtype: of the parameters.
        backend: as for `divnorm_kernels.channel_norm`.
    """

    _learns_by_default = False

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        learnable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_size("size", size)
        self.size, self.backend = size, backend
        self._set_scalars(learnable, {"device": device, "dtype": dtype}, alpha=alpha, beta=beta, k=k)

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes x."""
        node = self._as_node(input)
        if node is not None:
            return node
        return channel_norm(input, self.size, alpha=self.alpha, beta=self.beta, k=self.k, backend=self.backend)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        defaults = {"alpha": 1e-4, "beta": 0.75, "k": 1.0}
        scalars = [(name, self._shown(name), default) for name, default in defaults.items()]
        return listed([f"{self.size}"], scalars + self._options_repr())


class ExponentialNorm(_ChannelNorm):
    """Divisive normalization of (N, C, ...) by all channels, the nearer the more, with four scalars that learn.

    ``x^2 / (k (1 + alpha / scale * sum over channels j of exp(-abs(c - j) / scale) x_j^2))^beta`` at channel c. Source:
    Miller et al., "Divisive feature normalization improves image recognition performance in AlexNet", ICLR 2022, whose
    sum ends at four times the scale where this one goes on.

    Args:
        scale: lambda, in channels, above 0.
        alpha, beta, k: as in the equation; alpha and k at least 0.
        squared: whether x^2 stands in the numerator, as in the paper, or x.
        learnable: whether the four are parameters, of shape (1,), that start from these; keys ``scale``, ``alpha``,
            ``beta``, ``k``.
        device, dtype: of the parameters.
        backend: as for `divnorm_kernels.channel_norm`.
    """

    _learns_by_default = True

    def __init__(
        self,
        scale: float = 5.0,
        alpha: float = 1.0,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        squared: bool = True,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_number("scale", scale, "a float above 0")
        Exponential(scale)
        check_flag("squared", squared)
        self.squared, self.backend = squared, backend
        self._set_scalars(learnable, {"device": device, "dtype": dtype}, scale=scale, alpha=alpha, beta=beta, k=k)

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes x."""
        node = self._as_node(input)
        if node is not None:
            return node
        window, scalars = Exponential(self.scale), {"alpha": self.alpha, "beta": self.beta, "k": self.k}
        return channel_norm(input, window, **scalars, squared=self.squared, backend=self.backend)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        defaults = {"scale": 5.0, "alpha": 1.0, "beta": 0.75, "k": 1.0}
        scalars = [(name, self._shown(name), default) for name, default in defaults.items()]
        return listed([], [*scalars, ("squared", self.squared, True), *self._options_repr()])
