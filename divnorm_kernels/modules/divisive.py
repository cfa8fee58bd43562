"""The paper's layers over local windows: divisive normalization, and its per-channel and per-position kin."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_flag, check_size
from ..fields import Window, geometry, listless
from ..sharding import by_rows
from .base import EPS, NormalizationLayer, Options, listed

_FORMS = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}


class DivisiveNorm(NormalizationLayer):
    """Divisive normalization of ``(N, C, *S)`` over local windows: `divnorm_kernels.divisive_norm` as a layer.

    With one to three spatial dimensions; `DivisiveNorm1d`, `DivisiveNorm2d` and `DivisiveNorm3d` take one form alone.
    Source: Ren et al., "Normalizing the Normalizers", ICLR 2017.

    Args:
        num_channels: C.
        window, norm_window, groups, edges: as for `divnorm_kernels.divisive_norm`.
        eps: sigma squared; 1 where neither it nor sigma is given.
        affine: gives the layer a weight and, with ``bias``, a bias of shape (C,).
        bias: whether there is a bias.
        device, dtype: of the parameters.
        options: as for `NormalizationLayer`.

    Example:
        >>> layer = DivisiveNorm(64, window=5, sigma=0.5)
        >>> layer(torch.randn(8, 64, 32, 32)).shape
        torch.Size([8, 64, 32, 32])
        >>> layer(torch.randn(8, 64, 1000)).shape
        torch.Size([8, 64, 1000])
    """

    _dims: ClassVar[tuple[int, ...]] = (3, 4, 5)
    """The dimensions of x."""
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
        bias: bool = True,
        edges: str = "valid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_size("num_channels", num_channels)
        check_flag("affine", affine)
        check_flag("bias", bias)
        # the geometry of an input with one position, for its checks
        entries = next((len(field) for field in (window, norm_window) if isinstance(field, tuple | list)), None)
        dims = entries if entries is not None and entries + 2 in self._dims else max(self._dims[0] - 2, 1)
        geometry((1, num_channels, *[1] * dims), window, norm_window, groups, edges, False)
        super().__init__(
            (num_channels,), weight=affine, bias=affine and bias, eps=eps, device=device, dtype=dtype, **options
        )
        self.num_channels, self.window, self.norm_window = num_channels, listless(window), listless(norm_window)
        self.groups, self.edges, self.affine = groups, edges, affine
        self.reset_parameters()

    def _call(self, x: Tensor) -> Tensor:
        shape = x.shape
        if len(shape) not in self._dims:
            expected = " or ".join(f"{dims}, {_FORMS[dims]}" for dims in self._dims)
            raise ValueError(f"x: got {len(shape)} dimensions, expected {expected}")
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
                ("bias", self.bias is not None, self.affine),
                ("edges", self.edges, "valid"),
                *self._options_repr(),
            ],
        )


class DivisiveNorm1d(DivisiveNorm):
    """`DivisiveNorm` of (N, C, L)."""

    _dims = (3,)


class DivisiveNorm2d(DivisiveNorm):
    """`DivisiveNorm` of (N, C, H, W)."""

    _dims = (4,)


class DivisiveNorm3d(DivisiveNorm):
    """`DivisiveNorm` of (N, C, D, H, W)."""

    _dims = (5,)


class LocalContrastNorm2d(DivisiveNorm):
    """Local contrast normalization of (N, C, H, W): every channel by the windows of its own.

    Source: Jarrett et al., "What is the best multi-stage architecture for object recognition?", ICCV 2009, with
    averages over boxes; Ren et al. (ICLR 2017) with ``groups`` = C.

    Args:
        num_channels: C.
        window: the field of the mean, as for `DivisiveNorm`; the paper's is 9.
        others: as for `DivisiveNorm`.
    """

    _dims = (4,)

    def __init__(
        self,
        num_channels: int,
        window: Window = 9,
        norm_window: Window = "same",
        *,
        eps: float | None = None,
        affine: bool = True,
        bias: bool = True,
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
            bias=bias,
            edges=edges,
            device=device,
            dtype=dtype,
            **options,
        )

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return super().extra_repr().replace(f", groups={self.num_channels}", "")


class PositionalNorm2d(DivisiveNorm):
    """Positional normalization of (N, C, H, W): every position by mean and deviation of its channels.

    Source: Li et al., "Positional Normalization", NeurIPS 2019. The same as LayerNorm over the channels of an image.

    Args:
        num_channels: C.
        eps: sigma squared; 1e-5 where neither it nor sigma is given.
        others: as for `DivisiveNorm`.
    """

    _dims = (4,)
    _default_eps = EPS

    def __init__(
        self,
        num_channels: int,
        eps: float | None = None,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_channels, 1, eps=eps, affine=affine, bias=bias, device=device, dtype=dtype, **options)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return super().extra_repr().replace(", window=1", "")


class DivisiveNormFeatures(NormalizationLayer):
    """Divisive normalization over windows of features, (..., F): as in the paper's recurrent layers.

    Args:
        num_features: F; weight and bias have shape (F,).
        window: features in a window.
        others: as for `DivisiveNorm`.
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
        bias: bool = True,
        edges: str = "valid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_size("num_features", num_features)
        check_flag("affine", affine)
        check_flag("bias", bias)
        geometry((1, num_features), window, norm_window, 1, edges, False)
        super().__init__(
            (num_features,), weight=affine, bias=affine and bias, eps=eps, device=device, dtype=dtype, **options
        )
        self.num_features, self.window, self.norm_window = num_features, listless(window), listless(norm_window)
        self.edges, self.affine = edges, affine
        self._row_shape = (num_features,)
        self.reset_parameters()

    def _call(self, x: Tensor) -> Tensor:
        shape = x.shape
        if len(shape) < 2 or shape[-1] != self.num_features:
            raise ValueError(f"x: got shape {tuple(shape)}, expected (..., {self.num_features}), num_features last")
        return self._rows(x) if len(shape) == 2 else self._rows(x.reshape(-1, self.num_features)).view(shape)

    def _on_shards(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[-1] != self.num_features:
            return self._call(x)  # which says so
        return by_rows(self._rows, x, 1)

    def _rows(self, rows: Tensor) -> Tensor:
        return self._normalize(
            rows, self.window, self.norm_window, 1, weight=self.weight, bias=self.bias, edges=self.edges
        )[0]

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed(
            [f"{self.num_features}", f"window={self.window!r}"],
            [
                ("norm_window", self.norm_window, "same"),
                ("affine", self.affine, True),
                ("bias", self.bias is not None, self.affine),
                ("edges", self.edges, "valid"),
                *self._options_repr(),
            ],
        )
