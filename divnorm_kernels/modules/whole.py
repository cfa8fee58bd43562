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

    def _call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        dims = len(self.normalized_shape)
        shape = x.shape
        form = self._form(shape)
        if dims > 1 and x.dim() == dims + 1 and not x.is_contiguous():
            return self._channels_last(x, residual)
        as_they_are = len(shape) == 2 and dims == 1
        rows, added = (t if t is None or as_they_are else t.reshape(form) for t in (x, residual))
        return self._rows(rows, added, *self._flattened()).view(shape)

    def _flattened(self, *turn: int) -> tuple[Tensor | None, ...]:
        """Weight, bias and threshold in one dimension; ``turn``: a dimension that moves, and where it goes before."""
        parameters = self.weight, self.bias, self.threshold
        if len(self.normalized_shape) == 1:
            return parameters
        if turn:
            parameters = (None if t is None else t.movedim(*turn) for t in parameters)
        return tuple(None if t is None else t.flatten() for t in parameters)

    def _channels_last(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """As `_call`, in and out of a tensor whose second dimension lies last; the parameters are turned instead."""
        turned, added = (None if t is None else t.movedim(1, -1) for t in (x, residual))
        size = math.prod(self.normalized_shape)
        rows, added = (None if t is None else t.reshape(-1, size) for t in (turned, added))
        return self._rows(rows, added, *self._flattened(0, -1)).view(turned.shape).movedim(-1, 1)

    def _on_shards(self, x: Tensor, residual: Tensor | None) -> Tensor:
        dims = len(self.normalized_shape)
        if tuple(x.shape[-dims:]) != self.normalized_shape:
            return self._call(x)  # which says so
        parameters = self._flattened()
        return by_rows(lambda rows, added: self._rows(rows, added, *parameters), x, residual, dims)

    def _rows(
        self,
        rows: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        threshold: Tensor | None,
    ) -> Tensor:
        return self._normalize(rows, residual, weight, bias, threshold)[0]


class LayerNorm(_Trailing, nn.LayerNorm):
    """Layer normalization of ``(..., *normalized_shape)``: `torch.nn.LayerNorm` with more options.

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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As of the other layers, under torch.nn's name of what it takes."""
        return super().forward(x, residual)

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
    """Group normalization of (N, C, ...): `torch.nn.GroupNorm` with more options.

    Constructor order and ``state_dict`` keys are torch.nn's. One group is the paper's layer normalization of images.

    Args:
        num_groups: number of equal groups the channels form.
        num_channels: the number of channels, C.
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

    def _call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        shape = x.shape
        form = self._form(shape)
        as_they_are = tuple(shape) == form
        rows, added = (t if t is None or as_they_are else t.reshape(form) for t in (x, residual))
        y = self._normalize(rows, added, self.weight, self.bias, self.threshold)[0]
        return y if as_they_are else y.view(shape)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed(
            [f"{self.num_groups}, {self.num_channels}"],
            [("affine", self.affine, True), ("bias", self.bias is not None, self.affine), *self._options_repr()],
        )
