"""The paper's layers over local windows: divisive normalization, and its per-channel and per-position kin."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_flag, check_size
from ..fields import Window, geometry, listless
from .base import EPS, NormalizationLayer, Options, listed


class _Windowed(NormalizationLayer):
    """Windows over the positions of ``(N, C, *S)``."""

    _input_dims: ClassVar[int]
    _input_form: ClassVar[str]
    _default_eps = 1.0

    def __init__(
        self,
        num_channels: int,
        window: Window = 5,
        norm_window: Window = "same",
        *,
        eps: float | None = None,
        groups: int = 1,
        affine: bool = True,
        edges: str = "valid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_size("num_channels", num_channels)
        check_flag("affine", affine)
        # The geometry of an input with one position, for its checks.
        geometry((1, num_channels, *[1] * (self._input_dims - 2)), window, norm_window, groups, edges, False)
        super().__init__((num_channels,), weight=affine, bias=affine, eps=eps, device=device, dtype=dtype, **options)
        self.num_channels, self.window, self.norm_window = num_channels, listless(window), listless(norm_window)
        self.groups, self.edges, self.affine = groups, edges, affine
        self.reset_parameters()

    def _call(self, x: Tensor) -> Tensor:
        shape = x.shape
        if len(shape) != self._input_dims:
            raise ValueError(f"x: got {len(shape)} dimensions, expected {self._input_dims}, {self._input_form}")
        if shape[1] != self.num_channels:
            raise ValueError(f"x: got {shape[1]} channels, expected num_channels, {self.num_channels}")
        return self._normalize(
            x, self.window, self.norm_window, self.groups, weight=self.weight, bias=self.bias, edges=self.edges
        )[0]

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed(
            [f"{self.num_channels}", f"window={self.window!r}"],
            [
                ("norm_window", self.norm_window, "same"),
                ("groups", self.groups, 1),
                ("affine", self.affine, True),
                ("edges", self.edges, "valid"),
                *self._options_repr(),
            ],
        )


class DivisiveNorm1d(_Windowed):
    """Divisive normalization of (N, C, L). Arguments as for `DivisiveNorm2d`."""

    _input_dims = 3
    _input_form = "(N, C, L)"


class DivisiveNorm2d(_Windowed):
    """Divisive normalization of (N, C, H, W) over local windows: `divnorm_kernels.divisive_norm` as a layer.

    Source: Ren et al., "Normalizing the Normalizers", ICLR 2017.

    Args:
        num_channels: C.
        window, norm_window, groups, edges: as for `divnorm_kernels.divisive_norm`.
        eps: sigma squared; 1 where neither it nor sigma is given.
        affine: gives the layer a weight and a bias of shape (C,).
        device, dtype: of the parameters.
        options: as for `NormalizationLayer`.

    Example:
        >>> layer = DivisiveNorm2d(64, window=5, sigma=0.5)
        >>> layer(torch.randn(8, 64, 32, 32)).shape
        torch.Size([8, 64, 32, 32])
    """

    _input_dims = 4
    _input_form = "(N, C, H, W)"


class DivisiveNorm3d(_Windowed):
    """Divisive normalization of (N, C, D, H, W). Arguments as for `DivisiveNorm2d`."""

    _input_dims = 5
    _input_form = "(N, C, D, H, W)"


class LocalContrastNorm2d(_Windowed):
    """Local contrast normalization of (N, C, H, W): every channel by the windows of its own.

    Source: Jarrett et al., "What is the best multi-stage architecture for object recognition?", ICCV 2009, with
    averages over boxes; Ren et al. (ICLR 2017) with ``groups`` = C.

    Args:
        num_channels: C.
        window: the field of the mean, as for `DivisiveNorm2d`; the paper's is 9.
        others: as for `DivisiveNorm2d`.
    """

    _input_dims = 4
    _input_form = "(N, C, H, W)"

    def __init__(
        self,
        num_channels: int,
        window: Window = 9,
        norm_window: Window = "same",
        *,
        eps: float | None = None,
        affine: bool = True,
        edges: str = "valid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            num_channels,
            window,
            norm_window,
            eps=eps,
            groups=num_channels,
            affine=affine,
            edges=edges,
            device=device,
            dtype=dtype,
            **options,
        )

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return super().extra_repr().replace(f", groups={self.num_channels}", "")


class PositionalNorm2d(_Windowed):
    """Positional normalization of (N, C, H, W): every position by mean and deviation of its channels.

    Source: Li et al., "Positional Normalization", NeurIPS 2019. The same as LayerNorm over the channels of an image.

    Args:
        num_channels: C.
        eps: sigma squared; 1e-5 where neither it nor sigma is given.
        others: as for `DivisiveNorm2d`.
    """

    _input_dims = 4
    _input_form = "(N, C, H, W)"
    _default_eps = EPS

    def __init__(
        self,
        num_channels: int,
        eps: float | None = None,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_channels, 1, eps=eps, affine=affine, device=device, dtype=dtype, **options)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return super().extra_repr().replace(", window=1", "")


class DivisiveNormFeatures(NormalizationLayer):
    """Divisive normalization over windows of features, (..., F): as in the paper's recurrent layers.

    Args:
        num_features: F; weight and bias have shape (F,).
        window: features in a window.
        others: as for `DivisiveNorm2d`.
    """

    _default_eps = 1.0

    def __init__(
        self,
        num_features: int,
        window: Window = 60,
        norm_window: Window = "same",
        *,
        eps: float | None = None,
        affine: bool = True,
        edges: str = "valid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_size("num_features", num_features)
        check_flag("affine", affine)
        geometry((1, num_features), window, norm_window, 1, edges, False)
        super().__init__((num_features,), weight=affine, bias=affine, eps=eps, device=device, dtype=dtype, **options)
        self.num_features, self.window, self.norm_window = num_features, listless(window), listless(norm_window)
        self.edges, self.affine = edges, affine
        self._row_shape = (num_features,)
        self.reset_parameters()

    def _call(self, x: Tensor) -> Tensor:
        shape = x.shape
        if len(shape) < 2 or shape[-1] != self.num_features:
            raise ValueError(f"x: got shape {tuple(shape)}, expected (..., {self.num_features}), num_features last")
        rows = x if len(shape) == 2 else x.reshape(-1, self.num_features)
        y = self._normalize(
            rows, self.window, self.norm_window, 1, weight=self.weight, bias=self.bias, edges=self.edges
        )[0]
        return y if len(shape) == 2 else y.view(shape)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed(
            [f"{self.num_features}", f"window={self.window!r}"],
            [
                ("norm_window", self.norm_window, "same"),
                ("affine", self.affine, True),
                ("edges", self.edges, "valid"),
                *self._options_repr(),
            ],
        )
