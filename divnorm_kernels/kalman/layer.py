"""Kalman normalization: batch normalization by the batch's moments and those that the layers before predict."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..addresses import check_held
from ..checks import (
    check_activation,
    check_at_least_zero,
    check_flag,
    check_number,
    check_running,
    check_size,
    compute_dtype,
)
from ..functional import divisive_norm
from ..modules.backend import WithBackend
from ..modules.base import EPS, listed
from ..modules.distributed import ProcessGroup, merged
from ..modules.running import scaled
from ..norm import Norm
from .state import KalmanState, along, check_state

_WORST_RATIO = 100
"""Where prior variances are so many times the batch's on average, the prior does not count."""


class KalmanNorm(WithBackend, _BatchNorm):
    """The base of `KalmanNorm1d`, `KalmanNorm2d` and `KalmanNorm3d`, with torch.nn's parameters and buffers."""

    _dims: ClassVar[tuple[int, ...]]
    """The dimensions of x."""
    synchronizes = True
    """Whether `divnorm_kernels.convert_sync` changes such layers."""

    def check_merges(self) -> None:
        """Nothing: the moments of several batches can be merged."""

    def __init__(
        self,
        num_features: int,
        prior_weight: float = 0.9,
        eps: float = EPS,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        check_size("num_features", num_features)
        check_prior_weight(prior_weight)
        check_at_least_zero("eps", eps, "a float")
        if momentum is not None:
            check_number("momentum", momentum, "a float or None")
        for name, flag in (("affine", affine), ("track_running_stats", track_running_stats), ("bias", bias)):
            check_flag(name, flag)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.bias = None
        self.prior_weight, self.backend = prior_weight, backend
        self.sync = False
        """Whether the moments are those of all processes' batches; `divnorm_kernels.convert_sync` sets it."""
        self.process_group: ProcessGroup | None = None

    def forward(self, input: Tensor, prior: KalmanState | None = None) -> tuple[Tensor, KalmanState]:
        """``(y, state)`` of x, by what ``prior``, a pair of mean and variance, says of it before it is seen."""
        x = input
        self._check(x, prior)
        if not self.training and self.running_mean is not None:
            return self._by_running_averages(x)
        across = self.sync and self.training and torch.distributed.is_initialized()
        if x.numel() < 2 * self.num_features and not across:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected more than 1 value per channel when training")
        posterior: list[Tensor] = []

        def filtered(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
            if across:
                mean, variance, _ = merged(mean, variance, x.numel() // self.num_features, self.process_group)
            if prior is not None:
                mean, variance = self._filtered(mean, variance, *(along(t, mean.dim()) for t in prior))
            posterior.extend((mean, variance))
            return mean, variance

        rows = x.unsqueeze(-1) if x.dim() == 2 else x
        y = divisive_norm(
            rows,
            self.weight,
            self.bias,
            window="all",
            groups=self.num_features,
            over_batch=True,
            sigma=math.sqrt(self.eps),
            on_statistics=filtered,
            backend=self.backend,
        )
        state = KalmanState(*(t.flatten() for t in posterior))
        if self.training and self.running_mean is not None and self.track_running_stats:
            self._track(state)
        return y.view(x.shape), state

    def _filtered(
        self, mean: Tensor, variance: Tensor, prior_mean: Tensor, prior_variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The posterior of a prior and a batch's moments."""
        ratio = (prior_variance.detach() / variance.detach()).mean()
        counts = ratio < _WORST_RATIO  # NaN does not
        # in place of a prior that does not count the moments themselves, which the formulas leave as they are
        prior_mean = torch.where(counts, prior_mean, mean)
        prior_variance = torch.where(counts, prior_variance, variance)
        p = self.prior_weight
        spread = (mean - prior_mean).square()
        return mean.lerp(prior_mean, p), variance.lerp(prior_variance, p) + p * (1 - p) * spread

    def _by_running_averages(self, x: Tensor) -> tuple[Tensor, KalmanState]:
        norm = Norm("all", groups=self.num_features, over_batch=True)
        averages = self.running_mean, self.running_var
        y = scaled(norm, x, None, *averages, self.weight, self.bias, math.sqrt(self.eps), None)
        return y, KalmanState(*(t.to(compute_dtype(x), copy=True) for t in averages))

    @torch.no_grad()
    def _track(self, state: KalmanState) -> None:
        """Moves the running averages towards the posterior; rounds to their dtype once."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        for running, value in zip((self.running_mean, self.running_var), state, strict=True):
            wide = torch.promote_types(running.dtype, value.dtype)
            share = self.momentum
            if share is None:
                share = self.num_batches_tracked.to(wide).reciprocal()
            running.copy_(running.to(wide).lerp(value.to(wide), share))

    def _check(self, x: object, prior: object) -> None:
        check_activation(x)
        if x.dim() not in self._dims:
            raise ValueError(f"x: got {x.dim()} dimensions, expected {' or '.join(map(str, self._dims))}")
        if x.shape[1] != self.num_features:
            raise ValueError(f"x: got {x.shape[1]} channels, expected num_features, {self.num_features}")
        if prior is not None:
            check_state("prior", prior, (torch.Size([self.num_features]), compute_dtype(x), x.device))
        if (self.running_mean is None) != (self.running_var is None):
            raise ValueError("running_mean, running_var: got None for one of them, expected a Tensor or None for both")
        running = {"running_mean": self.running_mean, "running_var": self.running_var}
        for name, t in running.items():
            check_running(name, t, self.num_features, x)
        if not torch.compiler.is_compiling():
            given = () if prior is None else zip(("prior mean", "prior variance"), prior, strict=True)
            check_held(x=x, weight=self.weight, bias=self.bias, **running, **dict(given))

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed(
            [f"{self.num_features}"],
            [
                ("prior_weight", self.prior_weight, 0.9),
                ("eps", self.eps, EPS),
                ("momentum", self.momentum, 0.1),
                ("affine", self.affine, True),
                ("track_running_stats", self.track_running_stats, True),
                ("bias", self.bias is not None, self.affine),
                ("backend", self.backend, None),
            ],
        )


def check_prior_weight(value: object) -> None:
    """Raises unless ``value`` is a number from 0 to 1."""
    check_at_least_zero("prior_weight", value, "a number from 0 to 1")
    if value > 1:
        raise ValueError(f"prior_weight: got {value}, expected a number from 0 to 1")


class KalmanNorm1d(KalmanNorm):
    """Kalman normalization of (N, C) or (N, C, L). Arguments as for `KalmanNorm2d`."""

    _dims = (2, 3)


class KalmanNorm2d(KalmanNorm):
    """Kalman normalization of (N, C, H, W): ``y, state = layer(x, prior)``.

    With xbar and S a channel's mean and biased variance over the batch, m and v those of ``prior``, p its weight::

        mu = p m + (1 - p) xbar
        V = p v + (1 - p) S + p (1 - p) (xbar - m)^2
        y = weight (x - mu) / sqrt(V + eps) + bias

    Without a prior, and where the mean over the channels of v/S is not below 100, it is batch normalization: mu = xbar,
    V = S. One channel that is constant in the batch, S = 0, makes that mean infinite, or NaN if its v is 0 too: the
    whole layer goes by the batch alone then, and y of that channel is its bias. No number is read back from a device to
    decide.

    ``state`` is (mu, V), moments of x and not of y. `propagate` makes the next layer's prior of it. Both are pairs of
    tensors of shape (C,) in the dtype of the sums, float64 for x of float64, else float32, and parts of the graph:
    gradients reach the layers before.

    In eval mode the running averages of mu and V normalize, with and without a prior, which changes nothing, and are
    the state. They are averages of the posterior as it is: ``running_var`` is without batch normalization's factor
    n/(n-1). Keys of ``state_dict`` are torch.nn's. Torch's tools find the layer as a batch normalization; conversion to
    `torch.nn.SyncBatchNorm` makes it one, without a prior. `convert_sync` makes xbar and S those of all processes.

    Source: Wang et al., "Kalman Normalization: Normalizing Internal Representations Across Network Layers", NeurIPS
    2018, as the authors' code computes it where the paper's text differs.

    Args:
        num_features: the number of channels, C.
        prior_weight: p, from 0, batch normalization, to 1; the authors' 0.9 is for batches of a few samples, 0.05 for
            large ones.
        eps: added to V.
        momentum: the share of the newest posterior in the running averages; ``None``: the plain average of all.
        affine: gives the layer a weight and, with ``bias``, a bias of shape (C,).
        track_running_stats: without, eval mode is as training.
        device, dtype: of parameters and buffers.
        bias: whether there is a bias.
        backend: as for `divnorm_kernels.divisive_norm`.

    Raises:
        TypeError, ValueError: on a bad argument; on x of fewer than two values a channel, but in eval mode.
    """

    _dims = (4,)


class KalmanNorm3d(KalmanNorm):
    """Kalman normalization of (N, C, D, H, W). Arguments as for `KalmanNorm2d`."""

    _dims = (5,)
