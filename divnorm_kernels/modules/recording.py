"""Layers in a graph that `torch.fx` records: one node each, as torch.nn's are."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Proxy


class Recorded:
    """What a layer has beside `torch.nn.Module`."""

    @property
    def itself(self) -> Any:
        """The layer; where it is itself what `torch.fx` records, the path to it."""
        return self

    def _as_node(self, *tensors: Tensor | None) -> Proxy | None:
        """The node that stands for a call of the layer, where one of the tensors is being recorded."""
        for t in tensors:
            if isinstance(t, Proxy):
                path, arguments = t.tracer.path_of_module(self), tuple(t for t in tensors if t is not None)
                return t.tracer.create_proxy("call_module", path or "itself", arguments, {})
        return None
