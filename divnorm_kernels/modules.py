"""Layers in torch.nn's manners over the one operator."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .backends import check_name
from .checks import check_flag, check_number, check_size
from .fields import Window, geometry
from .functional import divisive_norm


class _DivisiveNorm(nn.Module):
    """What the layers share: parameters, the penalty and the call."""

    l1: Tensor | None
    _input_dims: ClassVar[int]
    _input_form: ClassVar[str]

    def __init__(
        self,
        affine_size: int,
        window: Window,
        norm_window: Window,
        *,
        sigma: float,
        learn_sigma: bool,
        groups: int,
        affine: bool,
        edges: str,
        l1_weight: float,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_size(self._size_name, affine_size)
        # The geometry of an input with one position, for its checks.
        geometry((1, affine_size, *[1] * (self._input_dims - 2)), window, norm_window, groups, edges, False)
        check_number("sigma", sigma, "a float")
        check_flag("learn_sigma", learn_sigma)
        check_flag("affine", affine)
        check_number("l1_weight", l1_weight, "a number of at least 0")
        if l1_weight < 0:
            raise ValueError(f"l1_weight: got {l1_weight}, expected a number of at least 0")
        check_name(backend)
        self.window, self.norm_window = window, norm_window
        self.initial_sigma, self.learn_sigma = float(sigma), learn_sigma
        self.groups, self.edges = groups, edges
        self.affine, self.l1_weight, self.backend = affine, float(l1_weight), backend
        setattr(self, self._size_name, affine_size)
        factory = {"device": device, "dtype": dtype}
        if affine:
            self.weight = nn.Parameter(torch.empty(affine_size, **factory))
            self.bias = nn.Parameter(torch.empty(affine_size, **factory))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        if learn_sigma:
            self.sigma = nn.Parameter(torch.empty((), **factory))
        else:
            self.sigma = float(sigma)
        self.l1 = None
        self.reset_parameters()

    _size_name: ClassVar[str] = "num_channels"

    def reset_parameters(self) -> None:
        """Sets weight to one, bias to zero and a learned sigma to its initial value."""
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
        if self.learn_sigma:
            nn.init.constant_(self.sigma, self.initial_sigma)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes ``x``; in training with ``l1_weight > 0`` also keeps the penalty of this call in ``l1``."""
        shape = x.shape
        if len(shape) != self._input_dims:
            raise ValueError(f"x: got {len(shape)} dimensions, expected {self._input_dims}, {self._input_form}")
        size = getattr(self, self._size_name)
        if shape[1] != size:
            what = self._size_name.removeprefix("num_")
            raise ValueError(f"x: got {shape[1]} {what}, expected {self._size_name}, {size}")
        wants_l1 = self.l1_weight > 0 and self.training
        result = divisive_norm(
            x,
            self.weight,
            self.bias,
            window=self.window,
            norm_window=self.norm_window,
            sigma=self.sigma,
            groups=self.groups,
            edges=self.edges,
            return_l1=wants_l1,
            backend=self.backend,
        )
        if wants_l1:
            y, self.l1 = result
            return y
        if self.l1 is not None:  # setting a module's attribute costs as much as a small kernel
            self.l1 = None
        return result

    def __getstate__(self) -> dict[str, object]:
        """Leaves the penalty of the last call out of copies and pickles: it belongs to that call's graph."""
        return {**super().__getstate__(), "l1": None}

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        parts = [f"{getattr(self, self._size_name)}", f"window={self.window!r}"]
        sigma = self.initial_sigma
        defaults = (
            ("norm_window", self.norm_window, "same"),
            ("sigma", sigma, 1.0),
            ("learn_sigma", self.learn_sigma, False),
            ("groups", self.groups, 1),
            ("affine", self.affine, True),
            ("edges", self.edges, "valid"),
            ("l1_weight", self.l1_weight, 0.0),
            ("backend", self.backend, None),
        )
        return ", ".join(parts + [f"{name}={value!r}" for name, value, default in defaults if value != default])


class _DivisiveNormNd(_DivisiveNorm):
    def __init__(
        self,
        num_channels: int,
        window: Window = 5,
        norm_window: Window = "same",
        *,
        sigma: float = 1.0,
        learn_sigma: bool = False,
        groups: int = 1,
        affine: bool = True,
        edges: str = "valid",
        l1_weight: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_channels,
            window,
            norm_window,
            sigma=sigma,
            learn_sigma=learn_sigma,
            groups=groups,
            affine=affine,
            edges=edges,
            l1_weight=l1_weight,
            backend=backend,
            device=device,
            dtype=dtype,
        )


class DivisiveNorm1d(_DivisiveNormNd):
    """Divisive normalization of (N, C, L). Arguments as for `DivisiveNorm2d`."""

    _input_dims = 3
    _input_form = "(N, C, L)"


class DivisiveNorm2d(_DivisiveNormNd):
    """Divisive normalization of (N, C, H, W) over local windows: `divnorm_kernels.divisive_norm` as a layer.

    Args:
        num_channels: C.
        window, norm_window, groups, edges, backend: as for `divnorm_kernels.divisive_norm`.
        sigma: the smoothing constant, or its initial value.
        learn_sigma: makes sigma a parameter, one scalar.
        affine: gives the layer a weight and a bias of shape (C,).
        l1_weight: the coefficient of the paper's sparse penalty on the centred activations. Above 0, each call in
            training mode keeps mean abs(v) in ``l1``; add `l1_penalty` of the model to the loss.
        device, dtype: of the parameters.

    Example:
        >>> layer = DivisiveNorm2d(64, window=5, sigma=0.5)
        >>> layer(torch.randn(8, 64, 32, 32)).shape
        torch.Size([8, 64, 32, 32])
    """

    _input_dims = 4
    _input_form = "(N, C, H, W)"


class DivisiveNorm3d(_DivisiveNormNd):
    """Divisive normalization of (N, C, D, H, W). Arguments as for `DivisiveNorm2d`."""

    _input_dims = 5
    _input_form = "(N, C, D, H, W)"


class DivisiveNormFeatures(_DivisiveNorm):
    """Divisive normalization of (N, F): windows over the features, as in the paper's recurrent layers.

    Args:
        num_features: F; weight and bias have shape (F,).
        window: features in a window.
        others: as for `DivisiveNorm2d`.
    """

    _input_dims = 2
    _input_form = "(N, F)"
    _size_name = "num_features"

    def __init__(
        self,
        num_features: int,
        window: Window,
        norm_window: Window = "same",
        *,
        sigma: float = 1.0,
        learn_sigma: bool = False,
        affine: bool = True,
        edges: str = "valid",
        l1_weight: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            window,
            norm_window,
            sigma=sigma,
            learn_sigma=learn_sigma,
            groups=1,
            affine=affine,
            edges=edges,
            l1_weight=l1_weight,
            backend=backend,
            device=device,
            dtype=dtype,
        )


def l1_penalty(model: nn.Module) -> Tensor:
    """The sum of ``l1_weight * l1`` over the layers of ``model``, from each layer's last call in training mode.

    A scalar to add to the loss; zero where no layer has a penalty.
    """
    terms = [m.l1_weight * m.l1 for m in model.modules() if isinstance(m, _DivisiveNorm) and m.l1 is not None]
    if not terms:
        return torch.zeros(())
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
