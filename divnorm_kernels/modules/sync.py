"""Makes layers of a model take their statistics over the batches of several processes."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checks import check_module
from .distributed import ProcessGroup


def convert_sync(model: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Makes every batch and Kalman norm of ``model`` take its statistics over the batches of all processes.

    In place; returns the model. In training mode, with ``torch.distributed`` initialized, count, mean and sum of
    squared deviations are merged across ``process_group`` (all processes by default), and so are the sums of backward:
    the result is that of one process on the joined batch. Some may have no samples; where none has any, the running
    statistics stay as they are. One value per channel in all together raises a ValueError in every process.

    Others that have batch statistics, such as torch.nn's, are left alone, which a warning says: `convert_norm` comes
    first, or torch's own conversion.

    Raises:
        TypeError: on what is no module.
        ValueError: on layers whose statistics do not merge: those of other p than 2, and of the k largest deviations.
    """
    check_module("model", model)
    named = dict(model.named_modules())
    layers = [module for module in named.values() if getattr(type(module), "synchronizes", False)]
    for layer in layers:
        layer.check_merges()
    for layer in layers:
        layer.sync, layer.process_group = True, process_group
    ours = {*layers, *(m for m in named.values() if isinstance(m, nn.SyncBatchNorm))}
    left = [n for n, m in named.items() if isinstance(m, _BatchNorm) and m not in ours]
    if left:
        warnings.warn(
            f"convert_sync: left alone: {', '.join(left)}, whose statistics are each process' own", stacklevel=2
        )
    return model
