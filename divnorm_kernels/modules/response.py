"""Filter response normalization: every channel of every sample by its root mean square, and a threshold behind."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..addresses import check_held
from ..checks import check_at_least_zero, check_flag, check_size
from ..norm import Norm
from ..reference import power
from .base import NormalizationLayer, Options, listed, of_form
from .forms import Images


class FilterResponseNorm(NormalizationLayer):
    """`FilterResponseNorm2d` of one to three spatial dimensions."""

    _dims: ClassVar[tuple[int, ...]] = (3, 4, 5)
    """The dimensions of x."""
    _default_eps = 1e-6
    _default_activation = "tlu"
    num_features = of_form("channels")

    def __init__(
        self,
        num_features: int,
        eps: float | None = None,
        learn_eps: bool = False,
        activation: str | None = "tlu",
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        check_size("num_features", num_features)
        check_flag("learn_eps", learn_eps)
        check_flag("affine", affine)
        check_flag("bias", bias)
        if learn_eps and (options.get("sigma") is not None or options.get("learn_sigma")):
            raise ValueError("learn_eps: got True beside sigma or learn_sigma, expected eps alone")
        if learn_eps and eps == 0:
            raise ValueError("eps: got 0 beside learn_eps, expected a number above it: its size has no slope at 0")
        super().__init__(
            Norm(None, "all", groups=num_features),
            Images(self._dims, num_features),
            (num_features,),
            weight=affine,
            bias=affine and bias,
            eps=eps,
            device=device,
            dtype=dtype,
            activation=activation,
            **options,
        )
        self.affine, self.learn_eps = affine, learn_eps
        if learn_eps:
            self.initial_eps = self._default_eps if eps is None else float(eps)
            # past register_parameter, which takes no name that the class has
            self._parameters["eps"] = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def eps(self) -> Tensor | float:
        """What is added under the root.

        With ``learn_eps`` the parameter, of which the size counts; with ``learn_sigma`` that parameter's power p, on
        the meta device a tensor without a value; else a number.
        """
        if not self.learn_eps:
            return self.sigma**self._norm.root
        own = self._parameters.get("eps", self.__dict__.get("eps"))  # the latter in a replica
        if own is None:
            raise AttributeError("eps")
        return own

    @eps.setter
    def eps(self, value: float) -> None:
        if self.learn_eps:  # in a replica: a parameter's place is not a property's
            self.__dict__["eps"] = value
            return
        if self.learn_sigma:
            raise AttributeError("eps: sigma is learned, set layer.sigma")
        check_at_least_zero("eps", value, "a float")
        self.sigma = self.initial_sigma = float(value) ** (1 / self._norm.root)

    def reset_parameters(self) -> None:
        """Sets weight to one, bias and threshold to zero, a learned eps or sigma to its initial value."""
        super().reset_parameters()
        if self.learn_eps:
            nn.init.constant_(self.eps, self.initial_eps)

    def _at_once(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return NotImplemented if self.learn_eps else super()._at_once(x, residual)

    def _call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._form(x.shape)
        return self._normalize(x, residual, self.weight, self.bias, self.threshold)[0]

    def _sigma(self) -> Tensor | float:
        if not self.learn_eps:
            return self.sigma
        eps = self.eps
        if not torch.compiler.is_compiling():
            check_held(eps=eps)
        return power(eps * eps.detach().sign(), 1 / self._norm.root)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        shown = self._options_repr()
        if self.learn_eps:
            shown = [("eps", self.initial_eps, self._default_eps), ("learn_eps", True, False), *shown[1:]]
        return listed(
            [f"{self.num_features}"],
            [("affine", self.affine, True), ("bias", self.bias is not None, self.affine), *shown],
        )


class FilterResponseNorm1d(FilterResponseNorm):
    """Filter response normalization of (N, C, L). Arguments as for `FilterResponseNorm2d`."""

    _dims = (3,)


class FilterResponseNorm2d(FilterResponseNorm):
    """Filter response normalization of (N, C, H, W): ``max(weight * x / sqrt(mean x^2 + abs(eps)) + bias, threshold)``.

    The mean is that of each channel of each sample; no mean is subtracted. Source: Singh & Krishnan, "Filter Response
    Normalization Layer", CVPR 2020.

    Args:
        num_features: the number of channels, C.
        eps: 1e-6 where neither it nor sigma, its root, is given.
        learn_eps: makes eps a parameter, one number for all channels, under the key ``eps``, of shape (1,).
        activation: ``"tlu"``, the paper's thresholded linear unit, whose ``threshold`` of shape (C,) learns from zero,
            or another, as for `NormalizationLayer`.
        affine: gives the layer a weight and, with ``bias``, a bias of shape (C,).
        device, dtype: of the parameters.
        bias: whether there is a bias.
        options: as for `NormalizationLayer`.
    """

    _dims = (4,)


class FilterResponseNorm3d(FilterResponseNorm):
    """Filter response normalization of (N, C, D, H, W). Arguments as for `FilterResponseNorm2d`."""

    _dims = (5,)
