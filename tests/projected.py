"""What tests of projected weights and their effective learning rates share."""

import numpy as np
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from divnorm_kernels import LayerNorm


def network(**to):
    """Weights of several forms, norms of several kinds, an output layer."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, **to),
        nn.BatchNorm2d(6, **to),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 8, **to),
        LayerNorm(8, **to),
        nn.ReLU(),
        nn.Linear(8, 7, bias=False, **to),
        nn.RMSNorm(7, **to),
        nn.Linear(7, 3, **to),
    )


def arrays(model):
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def norm(w, dim=None):
    others = tuple(d for d in range(w.ndim) if d != dim) if dim is not None else None
    return np.sqrt((w**2).sum(others, keepdims=dim is not None))


class Operations(TorchDispatchMode):
    """What is called, and that no value is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"), name
        self.names.append(name)
        return function(*args, **(kwargs or {}))
