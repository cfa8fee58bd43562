"""The paper's layers over local windows: divisive normalization, and its per-channel and per-position kin."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_flag, check_size
from ..fields import geometry
from ..norm import Norm, Window
from ..sharding import by_rows
from .base import EPS, NormalizationLayer, Options, listed, of_form, of_norm
from .forms import Images, Rows


class DivisiveNorm(NormalizationLayer):
    """Divisive normalization of ``(N, C, *S)`` over local windows: `divnorm_kernels.divisive_norm` as a layer.

    With one to three spatial dimensions; `DivisiveNorm1d`, `DivisiveNorm2d` and `DivisiveNorm3d` take one form alone.
    `torch.export` records the layer for all extents of at least ``max(before + 2, after + 1)``, by the sides of its
    windows: 4 for a window of 5. A dimension that is declared to be dynamic from less on is an error of torch's.
    Source: Ren et al., "Normalizing the Normalizers", ICLR 2017.

    Args:
        num_channels: the number of channels, C.
        window, norm_window: as for `divnorm_kernels.divisive_norm`; an int is centred, ``Span(k - 1, 0)`` causal.
        groups, edges: as for `divnorm_kernels.divisive_norm`.
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
        >>> DivisiveNorm(64, window=Span(4, 0))
        DivisiveNorm(64, window=Span(before=4, after=0))
    """

    _dims: ClassVar[tuple[int, ...]] = (3, 4, 5)
    """The dimensions of x."""
    _default_eps = 1.0
    num_channels = of_form("channels")
    window, norm_window, groups, edges = map(of_norm, ("window", "norm_window", "groups", "edges"))

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
        norm, form = Norm(window, norm_window, groups, edges), Images(self._dims, num_channels)
        check_flag("affine", affine)
        check_flag("bias", bias)
        # on an input with one position, for the checks of a geometry
        entries = next((len(field) for field in (window, norm_window) if isinstance(field, tuple | list)), None)
        dims = entries if entries is not None and entries + 2 in self._dims else max(self._dims[0] - 2, 1)
        geometry(norm, (1, num_channels, *[1] * dims))
        super().__init__(
            norm,
            form,
            (num_channels,),
            weight=affine,
            bias=affine and bias,
            eps=eps,
            device=device,
            dtype=dtype,
            **options,
        )
        self.affine = affine
        self.reset_parameters()

    def _call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._form(x.shape)
        return self._normalize(x, residual, self.weight, self.bias, self.threshold)[0]

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
        num_channels: the number of channels, C.
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
        check_size("num_channels", num_channels)
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
        num_channels: the number of channels, C.
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
    """Divisive normalization over windows of features, (N, ..., F): as in the paper's recurrent layers.

    Args:
        num_features: the number of features, F; weight and bias have shape (F,).
        window: features in a window, centred as of `DivisiveNorm`.
        others: as for `DivisiveNorm`.
    """

    _default_eps = 1.0
    window, norm_window, edges = map(of_norm, ("window", "norm_window", "edges"))

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
        norm, form = Norm(window, norm_window, edges=edges), Rows((num_features,), "num_features", leading=1)
        check_flag("affine", affine)
        check_flag("bias", bias)
        geometry(norm, (1, num_features))
        super().__init__(
            norm,
            form,
            (num_features,),
            weight=affine,
            bias=affine and bias,
            eps=eps,
            device=device,
            dtype=dtype,
            **options,
        )
        self.affine = affine
        self.reset_parameters()

    @property
    def num_features(self) -> int:
        """The number of features."""
        return self.form.size

    @num_features.setter
    def num_features(self, size: int) -> None:
        self.form = replace(self.form, row=(size,))

    def _call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        shape = x.shape
        form = self._form(shape)
        if len(shape) == 2:
            return self._rows(x, residual)
        return self._rows(x.reshape(form), None if residual is None else residual.reshape(form)).view(shape)

    def _on_shards(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if x.dim() < 2 or x.shape[-1] != self.num_features:
            return self._call(x)  # which says so
        return by_rows(self._rows, x, residual, 1)

    def _rows(self, rows: Tensor, residual: Tensor | None) -> Tensor:
        return self._normalize(rows, residual, self.weight, self.bias, self.threshold)[0]

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
