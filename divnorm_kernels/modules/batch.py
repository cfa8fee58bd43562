"""Layers with running statistics, as torch.nn's: batch and instance normalization."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..addresses import check_held
from ..checks import check_activation, check_flag, check_number, check_running, check_size
from ..norm import Norm
from ..sharding import distributed, held_here, on_shards
from .base import NormalizationLayer, Options, Statistics, listed, of_norm
from .distributed import ProcessGroup, batch_norm_across, check_merges
from .running import scaled


class _RunningNorm(NormalizationLayer):
    """Whole fields of every channel, with torch.nn's buffers."""

    _dims: ClassVar[tuple[int, ...]]
    """The dimensions of x."""
    _over_batch: ClassVar[bool]
    _defaults: ClassVar[dict[str, bool]]
    num_features = of_norm("groups", size="num_features")

    def __init__(
        self,
        num_features: int,
        eps: float | None,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias: bool,
        **options: Unpack[Options],
    ) -> None:
        for name in self._settled.keys() & options.keys():
            raise TypeError(f"{name}: got {options[name]!r}, expected none: {type(self).__name__} has its own")
        check_size("num_features", num_features)
        check_flag("affine", affine)
        check_flag("track_running_stats", track_running_stats)
        check_flag("bias", bias)
        norm = Norm("all", groups=num_features, over_batch=self._over_batch)
        super().__init__(
            norm,
            None,
            (num_features,),
            weight=affine,
            bias=affine and bias,
            eps=eps,
            device=device,
            dtype=dtype,
            **self._settled,
            **options,
        )
        if momentum is not None:
            check_number("momentum", momentum, "a float or None")
        self.momentum, self.affine = momentum, affine
        self.track_running_stats = track_running_stats
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
            self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
            self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        else:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                self.register_buffer(name, None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Sets the running mean to zero, the running variance to one and the count to zero."""
        for buffer, value in ((self.running_mean, 0), (self.running_var, 1), (self.num_batches_tracked, 0)):
            if buffer is not None:
                buffer.fill_(value)

    def reset_parameters(self) -> None:
        """Sets weight to one, bias to zero, a learned sigma to its initial value, and the running statistics."""
        self.reset_running_stats()
        super().reset_parameters()

    def _call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """By x's own statistics, or in eval mode by the running ones where they are tracked."""
        self._check_input(x)
        if not torch.compiler.is_compiling():
            self._check_held(x)
        if not self._takes_own_statistics():
            return self._by_running_statistics(x, residual)
        count = x.numel() // (self.num_features * (1 if self._over_batch else max(x.shape[0], 1)))
        if count == 1 and not self._across_processes():
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected more than 1 value per channel when training")
        tracks = self._tracks()
        kept = tracks and self._has_running_statistics() and (count > 1 or self._across_processes())
        y, statistics, joined = self._normalized(x, residual, kept, count)
        if tracks:
            self._track(statistics, joined)
        return y

    def _check_held(self, x: Tensor) -> None:
        """Of what goes to torch's functions, which do not look."""
        running = {"running_mean": self.running_mean, "running_var": self.running_var}
        for name, t in running.items():
            check_running(name, t, self.num_features, x)
        check_held(**running)
        if not self._takes_own_statistics() or self._across_processes():
            check_held(x=x, weight=self.weight, bias=self.bias, sigma=self.sigma, threshold=self.threshold)

    def _takes_own_statistics(self) -> bool:
        """Whether x's own statistics normalize it; torch.nn's rule, which differs between its families."""
        raise NotImplementedError

    def _tracks(self) -> bool:
        """Whether a call that takes x's own statistics moves the running ones; torch.nn's rule."""
        raise NotImplementedError

    def _has_running_statistics(self) -> bool:
        if (self.running_mean is None) != (self.running_var is None):
            absent = "running_mean" if self.running_mean is None else "running_var"
            raise ValueError(f"{absent}: got None, expected a Tensor, or None for both running_mean and running_var")
        return self.running_mean is not None

    def _across_processes(self) -> bool:
        """Whether the statistics are those of several processes' batches."""
        return False

    def _check_input(self, x: Tensor) -> None:
        check_activation(x)
        if x.dim() not in self._dims:
            raise ValueError(f"x: got {x.dim()} dimensions, expected {' or '.join(map(str, self._dims))}")
        if x.shape[1] != self.num_features:
            raise ValueError(f"x: got {x.shape[1]} channels, expected num_features, {self.num_features}")

    def _normalized(
        self, x: Tensor, residual: Tensor | None, with_statistics: bool, count: int
    ) -> tuple[Tensor, Statistics | None, Tensor | int]:
        """``(y, statistics, count)`` by the statistics of ``x``, averages of ``count`` values."""
        flat = x.dim() == 2
        rows, added = (t.unsqueeze(-1) if flat and t is not None else t for t in (x, residual))
        y, statistics, count = self._normalized_rows(rows, added, with_statistics, count)
        return (y.squeeze(-1) if flat else y), statistics, count

    def _normalized_rows(
        self, x: Tensor, residual: Tensor | None, with_statistics: bool, count: int
    ) -> tuple[Tensor, Statistics | None, Tensor | int]:
        """`_normalized` of an x with spatial dimensions."""
        return *self._normalize(x, residual, self.weight, self.bias, self.threshold, with_statistics), count

    def _track(self, statistics: Statistics | None, count: Tensor | int) -> None:
        """Moves the running statistics towards those of the call; the variance is the unbiased one of ``count``.

        For other p than 2 it is the square of the deviation as it stands. A batch without values moves nothing.
        """
        if statistics is None or (self.momentum is None and not self._averages()):
            return
        mean, variance = (t.flatten(1)[0] if self._over_batch else t.flatten(1).mean(0) for t in statistics)
        self._move(self.running_mean, mean)
        self._move(self.running_var, variance * (count / (count - 1)) if self.norm.p == 2 else variance)

    def _averages(self) -> bool:
        """Whether without a momentum the running statistics are plain averages; else they stay as they are."""
        return False

    def _move(self, running: Tensor, value: Tensor) -> None:
        """Moves ``running`` by the share of the newest batch towards ``value``; rounds to its dtype once."""
        if not torch.compiler.is_compiling():
            value = _plain_beside(running, value)
        wide = torch.promote_types(running.dtype, value.dtype)
        share = self.momentum
        if share is None:
            share = held_here(self.num_batches_tracked).to(wide).reciprocal()
        running = held_here(running)
        if running.dtype == wide:
            running.lerp_(value.to(wide), share)
        else:
            running.copy_(running.to(wide).lerp_(value, share))

    def _on_shards(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._across_processes():
            raise ValueError(
                "x: got a DTensor in a layer of convert_sync, expected a Tensor of this process' samples (a DTensor's "
                "statistics are those of all without)"
            )
        return super()._on_shards(x, residual)

    def _by_running_statistics(self, x: Tensor, residual: Tensor | None) -> Tensor:
        parameters = {"running_mean": self.running_mean, "running_var": self.running_var}
        for name, running in parameters.items():
            if running is None:
                raise RuntimeError(f"{name}: got None in eval mode, expected a Tensor")
        if self.l1 is not None:
            self.l1 = None
        parameters |= {name: getattr(self, name) for name in ("weight", "bias", "sigma", "threshold")}
        if type(x) is not Tensor and distributed(x):
            return on_shards(lambda *own: (scaled(self.norm, *own), None, None), x, residual, parameters)[0]
        return scaled(self.norm, x, residual, *parameters.values())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *lists) -> None:
        # Checkpoints from before torch counted batches, as torch.nn reads them, but by way of no default device.
        version, key = local_metadata.get("version"), prefix + "num_batches_tracked"
        count = self.num_batches_tracked
        if (version is None or version < 2) and count is not None and key not in state_dict:
            state_dict[key] = torch.tensor(0, device="cpu") if count.is_meta else count
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *lists)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return listed(
            [f"{self.num_features}"],
            [
                ("momentum", self.momentum, 0.1),
                *((name, getattr(self, name), default) for name, default in self._defaults.items()),
                ("bias", self.bias is not None, self.affine),
                *self._options_repr(),
            ],
        )


def _plain_beside(running: Tensor, value: Tensor) -> Tensor:
    """``value`` as a plain tensor, where torch.func.functionalize has wrapped it and not the buffer it goes into."""
    if torch._is_functional_tensor(value) and not torch._is_functional_tensor(running):
        torch._sync(value)
        value = torch._from_functional_tensor(value)
    return value


class _BatchNorm(_RunningNorm):
    _over_batch = True
    _defaults: ClassVar = {"affine": True, "track_running_stats": True}

    def __init__(
        self,
        num_features: int,
        eps: float | None = None,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias, **options)
        self.sync = False
        """Whether statistics are those of all processes' batches; `divnorm_kernels.convert_sync` sets it."""
        self.process_group: ProcessGroup | None = None

    synchronizes = True
    """Whether `convert_sync` changes such layers."""

    def check_merges(self) -> None:
        """Raises a ValueError unless the statistics of several batches can be merged."""
        check_merges(self.norm)

    def _takes_own_statistics(self) -> bool:
        return self.training or (self.running_mean is None and self.running_var is None)

    def _tracks(self) -> bool:
        return self.training and self.track_running_stats

    def _averages(self) -> bool:
        return self.num_batches_tracked is not None

    def _track(self, statistics: Statistics | None, count: Tensor | int) -> None:
        # as torch.nn, which counts the batches of batch normalization alone, those without values too
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        super()._track(statistics, count)

    def _across_processes(self) -> bool:
        return self.sync and self.training and torch.distributed.is_initialized()

    def _normalized_rows(
        self, x: Tensor, residual: Tensor | None, with_statistics: bool, count: int
    ) -> tuple[Tensor, Statistics | None, Tensor | int]:
        if not self._across_processes():
            return super()._normalized_rows(x, residual, with_statistics, count)
        given = self.weight, self.bias, self._sigma_for(x), self.threshold
        y, l1, statistics, joined = batch_norm_across(
            self.process_group, self.norm, x, residual, *given, self.l1_weight > 0, self.backend
        )
        self._keep(y, l1)
        return y, statistics if with_statistics else None, joined


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L). Arguments as for `BatchNorm2d`."""

    _dims = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W): `torch.nn.BatchNorm2d` with more options.

    Constructor order and ``state_dict`` keys are torch.nn's. In eval mode the running statistics normalize, those that
    training has tracked: mean and unbiased variance of each channel over the batch.

    With p=1 it is L1 batch normalization, ``weight * v / (sqrt(pi/2) * mean abs(v) + eps) + bias`` (Hoffer et al.,
    "Norm matters", NeurIPS 2018). The running variance of other p than 2 is the average of the squared deviation
    without sigma, for p=1 of ``(sqrt(pi/2) * mean abs(v))^2``, so that checkpoints go from one p to another.

    Args:
        num_features: the number of channels, C.
        eps: sigma^p; 1e-5 where neither it nor sigma is given.
        momentum: the share of the newest batch in the running statistics; ``None``: their plain average (of instance
            norms, as torch.nn's: they stay as they are).
        affine: gives the layer a weight and, with ``bias``, a bias of shape (C,).
        track_running_stats: without, the batch's statistics normalize in eval mode too.
        device, dtype: of parameters and buffers.
        bias: whether there is a bias.
        options: as for `NormalizationLayer`; with sigma and l1_weight, the paper's BN-s and BN*.
    """

    _dims = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W). Arguments as for `BatchNorm2d`."""

    _dims = (5,)


class _InstanceNorm(_RunningNorm):
    _over_batch = False
    _defaults: ClassVar = {"affine": False, "track_running_stats": False}

    def __init__(
        self,
        num_features: int,
        eps: float | None = None,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias, **options)

    def _call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As of torch.nn's, x may come without a batch dimension."""
        if x.dim() == self._dims[0] - 1:
            added = None if residual is None else residual.unsqueeze(0)
            return super()._call(x.unsqueeze(0), added).squeeze(0)
        return super()._call(x, residual)

    def _takes_own_statistics(self) -> bool:
        return self.training or not self.track_running_stats

    def _tracks(self) -> bool:
        return True


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """Instance normalization of (N, C, L) or (C, L). Arguments as for `InstanceNorm2d`."""

    _dims = (3,)


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """Instance normalization of (N, C, H, W) or (C, H, W): every channel of every sample by its own statistics.

    As `torch.nn.InstanceNorm2d`, by default without parameters or running statistics; arguments as for `BatchNorm2d`.
    """

    _dims = (4,)


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """Instance normalization of (N, C, D, H, W) or (C, D, H, W). Arguments as for `InstanceNorm2d`."""

    _dims = (5,)
