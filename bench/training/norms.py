"""The norms of the experiments: a name of the family with the paper's constants, in the place where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from divnorm_kernels import DivisiveNorm2d, DivisiveNormFeatures, NormalizationLayer, convert_norm
from divnorm_kernels.fields import Window

PENALIZED = "none*"
"""No normalization, but the penalty: the paper's baseline with L1. The operator without fields and with sigma 1."""

NO_LAYERS_OF_THE_OPERATOR = ("evo-b0", "evo-s0", "wn", "sws", "dyt", "derf")
"""Names that the experiments have no place for: of layers without the operator's options, or of none."""

PLAIN_AFFINE = ("bn", "l1bn", "bn-s", "bn*", "ln", "gn", "in", "rms", "frn", "vn")
"""Those that keep weight and bias, as in their papers."""


@dataclass(frozen=True)
class Constants:
    """What the paper's tables set for a norm."""

    sigma: float
    l1_weight: float = 0.0


def check_norm(name: str) -> None:
    """Raises ValueError on a name that is not of the family, or of layers that the experiments have no place for."""
    if name in NO_LAYERS_OF_THE_OPERATOR:
        raise ValueError(f"norm: got {name!r}, expected one that is a layer of the operator")
    if name == PENALIZED:
        return
    try:
        convert_norm(nn.BatchNorm2d(1), name, report=None)
    except ValueError as error:
        raise ValueError(f"norm: {str(error).removeprefix('to: ')}") from None


def family(name: str) -> str:
    """The name without what stands for sigma and penalty."""
    return name.removesuffix("*").removesuffix("-s")


def _given(name: str, constants: Mapping[str, Constants], backend: str | None) -> dict[str, Any]:
    known = constants.get(name)
    numbers = {} if known is None else {"sigma": known.sigma, "l1_weight": known.l1_weight}
    return {**numbers, "backend": backend}


def image_norm(
    name: str,
    channels: int,
    constants: Mapping[str, Constants],
    *,
    window: Window,
    norm_window: Window = "same",
    edges: str = "valid",
    activation: str | None = "relu",
    learn_sigma: bool = False,
    num_groups: int | None = None,
    backend: str | None = None,
) -> nn.Module:
    """The norm over (N, channels, H, W), with the nonlinearity behind it.

    ``learn_sigma`` counts where sigma is part of the model: not for the plain "bn", "ln" and their like; ``num_groups``
    is that of "gn", and where it is not given `convert_norm`'s.
    """
    if name == "none":
        return nn.Identity() if activation is None else nn.ReLU()
    options = {**_given(name, constants, backend), "activation": activation}
    if name == PENALIZED:
        return DivisiveNorm2d(channels, None, None, affine=False, **{**options, "sigma": 1.0})
    if family(name).startswith("dn"):
        options |= {"window": window, "edges": edges} | ({"norm_window": norm_window} if family(name) == "dn" else {})
    if family(name) == "gn" and num_groups is not None:
        options |= {"num_groups": num_groups}
    if name not in PLAIN_AFFINE:
        options |= {"affine": False}
    if learn_sigma and (name != family(name) or family(name).startswith("dn")):
        options |= {"learn_sigma": True}
    return convert_norm(nn.BatchNorm2d(channels), name, report=None, **options)


class OverTime(nn.Module):
    """A norm over units that is called once per time step, on ``parts`` groups of units at once.

    Normalizing the four gates of an LSTM as four times as many rows is one call in place of four.
    """

    def __init__(
        self,
        name: str,
        units: int,
        parts: int,
        constants: Mapping[str, Constants],
        *,
        window: int,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_norm(name)
        options = _given(name, constants, backend)
        self.parts, self.units = parts, units
        self.by_rows = family(name) not in ("bn", "none")
        if name == "none":
            self.layer: nn.Module = nn.Identity()
        elif name == PENALIZED:
            self.layer = DivisiveNormFeatures(units, None, None, affine=False, **{**options, "sigma": 1.0})
            self.by_rows = True
        elif family(name) == "bn":
            place = nn.BatchNorm1d(parts * units, momentum=None)  # all time steps count alike
            self.layer = convert_norm(place, name, report=None, **options)
        else:
            place = nn.LayerNorm(units)
            if family(name).startswith("dn"):
                options |= {"window": window, "affine": False}
            else:  # the bias stands before the norm, and the next layer's weights behind it
                options |= {"elementwise_affine": False}
            self.layer = convert_norm(place, name, report=None, **options)
        self.l1_weight = getattr(self.layer, "l1_weight", 0.0)

    def begin(self, steps: int) -> None:
        """Before a sequence: its penalty is the mean over the steps, summed over the parts."""
        if isinstance(self.layer, NormalizationLayer):
            self.layer.l1_weight = self.l1_weight * self.parts / steps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes ``x`` (N, parts * units), each part by itself."""
        return self.layer(x.view(-1, self.units)).view(x.shape) if self.by_rows else self.layer(x)
