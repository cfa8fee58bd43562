"""Layers over the whole of each sample, as torch.nn's: layer, RMS and group normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..checks import check_flag, check_size
from ..norm import Norm
from ..sharding import by_rows
from .base import NormalizationLayer, Options, listed, of_form, of_norm
from .forms import Channels, Rows


class _Trailing(NormalizationLayer):
    """Normalizes the trailing dimensions ``normalized_shape`` of x, with a weight for each element of them."""

    _subtracts_mean: bool
    normalized_shape = of_form("row")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        elementwise_affine: bool,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **options: Unpack[Options],
    ) -> None:
        form = Rows(normalized_shape)
        check_flag("elementwise_affine", elementwise_affine)
        check_flag("bias", bias)
        super().__init__(
            Norm("all" if self._subtracts_mean else None, "all"),
            form,
            form.row,
            weight=elementwise_affine,
            bias=elementwise_affine and bias,
            eps=eps,
            device=device,
            dtype=dtype,
            **options,
        )
        self.elementwise_affine = elementwise_affine
        self.reset_parameters()

    def _call(self, x: Tensor) -> Tensor:
        dims = len(self.normalized_shape)
        shape = x.shape
        form = self._form(shape)
        weight, bias = self.weight, self.bias
        if dims > 1:
            if x.dim() == dims + 1 and not x.is_contiguous():
                return self._channels_last(x)
            weight, bias = (None if t is None else t.flatten() for t in (weight, bias))
        rows = x if len(shape) == 2 and dims == 1 else x.reshape(form)
        return self._rows(rows, weight, bias).view(shape)

    def _channels_last(self, x: Tensor) -> Tensor:
        """As `_call`, in and out of a tensor whose second dimension lies last; the parameters are turned instead."""
        rows = x.movedim(1, -1)
        weight, bias = (None if t is None else t.movedim(0, -1).flatten() for t in (self.weight, self.bias))
        return (
            self._rows(rows.reshape(-1, math.prod(self.normalized_shape)), weight, bias).view(rows.shape).movedim(-1, 1)
        )

    def _on_shards(self, x: Tensor) -> Tensor:
        dims = len(self.normalized_shape)
        if tuple(x.shape[-dims:]) != self.normalized_shape:
            return self._call(x)  # which says so
        weight, bias = (None if t is None else t.flatten() for t in (self.weight, self.bias))
        return by_rows(lambda rows: self._rows(rows, weight, bias), x, dims)

    def _rows(self, rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return self._normalize(rows, weight, bias)[0]


class LayerNorm(_Trailing, nn.LayerNorm):
    """Layer normalization of ``(..., *normalized_shape)``: `torch.nn.LayerNorm` with a sigma, a penalty and a ReLU.

    Constructor order and ``state_dict`` keys are torch.nn's.

    Args:
        normalized_shape: the trailing dimensions that are normalized together; weight and bias have this shape.
        eps: sigma squared; 1e-5 where neither it nor sigma is given.
        elementwise_affine: gives the layer a weight and, with ``bias``, a bias.
        bias: whether there is a bias.
        device, dtype: of the parameters.
        options: as for `NormalizationLayer`; with sigma and l1_weight, the paper's LN-s and LN*.
    """

    _subtracts_mean = True

    def _told_by_eps(self) -> bool:
        # what computes a layer normalization by itself asks for both parameters
        return self.weight is not None and self.bias is not None and super()._told_by_eps()

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype, **options)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed(
            [f"{self.normalized_shape}"],
            [
                ("elementwise_affine", self.elementwise_affine, True),
                ("bias", self.bias is not None, self.elementwise_affine),
                *self._options_repr(),
            ],
        )


class RMSNorm(_Trailing, nn.RMSNorm):
    """Root-mean-square normalization of ``(..., *normalized_shape)``: as `LayerNorm`, but no mean is subtracted.

    As `torch.nn.RMSNorm`: no bias, and where neither eps nor sigma is given, eps is the epsilon of the dtype that is
    computed in: float64's for float64, float32's for all others.
    """

    _subtracts_mean = False
    _default_eps = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, False, device, dtype, **options)

    def forward(self, x: Tensor) -> Tensor:
        """As of the other layers, under torch.nn's name of what it takes."""
        return super().forward(x)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed(
            [f"{self.normalized_shape}"],
            [
                ("elementwise_affine", self.elementwise_affine, True),
                *self._options_repr(),
            ],
        )


class GroupNorm(NormalizationLayer, nn.GroupNorm):
    """Group normalization of (N, C, ...): `torch.nn.GroupNorm` with a sigma, a penalty and a fused ReLU.

    Constructor order and ``state_dict`` keys are torch.nn's. One group is the paper's layer normalization of images.

    Args:
        num_groups: number of equal groups the channels form.
        num_channels: C.
        others: as for `LayerNorm`; weight and bias have shape (C,).
    """

    num_groups, num_channels = of_norm("groups", size="num_groups"), of_form("channels")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float | None = None,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        check_size("num_groups", num_groups)
        norm, form = Norm("all", groups=num_groups), Channels(num_channels)
        check_flag("affine", affine)
        check_flag("bias", bias)
        if num_channels % num_groups:
            raise ValueError(f"num_groups: got {num_groups}, expected a divisor of the {num_channels} channels")
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

    def _call(self, x: Tensor) -> Tensor:
        shape = x.shape
        form = self._form(shape)
        rows = x if tuple(shape) == form else x.reshape(form)
        y = self._normalize(rows, self.weight, self.bias)[0]
        return y if rows is x else y.view(shape)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed(
            [f"{self.num_groups}, {self.num_channels}"],
            [("affine", self.affine, True), ("bias", self.bias is not None, self.affine), *self._options_repr()],
        )
