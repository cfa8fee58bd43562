"""What all layers share: sigma or eps, weight and bias, the penalty, and the one call of the operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..addresses import check_held
from ..backends import check_name
from ..checks import check_activation, check_at_least_zero, check_flag, check_number, check_residual, check_size
from ..epilogue import promoted
from ..functional import normalize
from ..norm import Norm
from ..prepared import Form, nothing, prepared
from ..sharding import distributed
from .forms import Rows
from .nested import on_rows
from .penalty import Calls
from .recording import Recorded

EPS = 1e-5
"""torch.nn's."""

_LEAST_EPS = {wide: torch.finfo(torch.float64 if wide else torch.float32).eps for wide in (False, True)}
"""Where a layer has none, by whether x is of float64."""

Statistics = tuple[Tensor, Tensor]
"""Mean and biased variance, each of shape (1 or N, groups, 1, ...)."""


class Options(TypedDict, total=False):
    """The keywords that every layer takes beside its own; `NormalizationLayer` says what they mean."""

    sigma: float | None
    learn_sigma: bool
    l1_weight: float
    p: float
    subtract_mean: bool
    activation: str | None
    backend: str | None


def _resolved_sigma(sigma: float | None, eps: float | None, default_eps: float | None, root: float) -> float | None:
    """The sigma that a layer is made with: of it and eps, its power ``root``, one is given or none."""
    if sigma is not None and eps is not None:
        raise ValueError(f"eps: got {eps!r} beside sigma {sigma!r}, expected one of them: eps is sigma^{root:g}")
    if sigma is not None:
        check_number("sigma", sigma, "a float")
        return float(sigma)
    eps = default_eps if eps is None else eps
    if eps is None:
        return None
    check_at_least_zero("eps", eps, "a float")
    return float(eps) ** (1 / root)


def of_norm(option: str, size: str | None = None) -> Any:
    """An attribute of a layer: an option that its norm holds; ``size``: the layer's name of it, where it is a size."""
    return _of("norm", option, size)


def of_form(option: str) -> Any:
    """An attribute of a layer: a size that its form holds."""
    return _of("form", option)


def _of(owner: str, name: str, size: str | None = None) -> Any:
    def change(layer: Any, value: Any) -> None:
        if size is not None:
            check_size(size, value)
        setattr(layer, owner, replace(getattr(layer, owner), **{name: value}))

    return property(lambda layer: getattr(getattr(layer, owner), name), change)


class NormalizationLayer(Recorded, nn.Module):
    """The base of every layer: one call of `divnorm_kernels.divisive_norm` with the layer's options.

    Every layer takes these keywords beside its own:

    Args:
        sigma: the smoothing constant, or the value that a learned one starts from; in place of eps, its square.
        learn_sigma: makes sigma a parameter, of shape (1,), under the key ``sigma``. What it starts from stays in
            ``initial_sigma``, which the printed layer shows.
        l1_weight: the coefficient of the paper's penalty on the centred activations. Above 0, each call in training
            mode keeps mean abs(v) in ``l1``; add `l1_penalty` of the model to the loss, or `collect_l1`'s sum.
        p: the exponent of the deviation, as for `divnorm_kernels.divisive_norm`. Eps is sigma to this power, and sigma
            itself for ``math.inf``: what is added under the root, where there is one.
        subtract_mean: without, x stands in the numerator; of a layer that subtracts no mean, the same.
        activation: as for `divnorm_kernels.divisive_norm`. With ``"tlu"`` the layer has a parameter ``threshold``, of
            the shape that weight has, which starts from zero.
        backend: as for `divnorm_kernels.divisive_norm`.
    """

    p, subtract_mean = map(of_norm, ("p", "subtract_mean"))
    l1: Tensor | None
    _default_eps: ClassVar[float | None] = EPS
    _settled: ClassVar[dict[str, Any]] = {}
    """Options that are not a user's to choose, for they make the layer what it is, with their values."""
    _default_activation: ClassVar[str | None] = None
    followed_by: tuple[str, ...] = ()
    """Child modules that `forward` applies behind the normalization, in this order: an activation, a dropout."""

    def __init__(
        self,
        norm: Norm,
        form: Form | None,
        affine_shape: tuple[int, ...],
        *,
        weight: bool,
        bias: bool,
        eps: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        sigma: float | None = None,
        learn_sigma: bool = False,
        l1_weight: float = 0.0,
        p: float = 2,
        subtract_mean: bool = True,
        activation: str | None = None,
        backend: str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # of torch.nn's layers, which some are, the names and no more
        norm = replace(norm, p=p, subtract_mean=subtract_mean, activation=activation)
        sigma = _resolved_sigma(sigma, eps, self._default_eps, norm.root)
        check_flag("learn_sigma", learn_sigma)
        check_name(backend)
        if learn_sigma and sigma is None:
            raise ValueError("sigma: got None with learn_sigma=True, expected a float to start from")
        self.initial_sigma, self.learn_sigma = sigma, learn_sigma
        self._norm, self._form, self._backend = norm, form, backend
        self.l1_weight, self._affine_shape = l1_weight, affine_shape
        factory = {"device": device, "dtype": dtype}
        self.register_parameter("weight", nn.Parameter(torch.empty(affine_shape, **factory)) if weight else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(affine_shape, **factory)) if bias else None)
        threshold = nn.Parameter(torch.empty(affine_shape, **factory)) if activation == "tlu" else None
        self.register_parameter("threshold", threshold)
        # one dimension: torch's sharding takes no scalars
        self.sigma = nn.Parameter(torch.empty(1, **factory)) if learn_sigma else sigma
        self.l1 = None
        self._calls = Calls()
        self._prepared: Callable[..., Any] | None = None

    @property
    def norm(self) -> Norm:
        """What the layer does to an x of the operator's form."""
        return self._norm

    @norm.setter
    def norm(self, norm: Norm) -> None:
        self._norm, self._prepared = norm, None

    @property
    def activation(self) -> str | None:
        """As for `divnorm_kernels.divisive_norm`; setting it to "tlu" gives the layer a threshold of zeros."""
        return self._norm.activation

    @activation.setter
    def activation(self, activation: str | None) -> None:
        self.norm = replace(self._norm, activation=activation)
        if activation != "tlu":
            self.threshold = None
        elif self.threshold is None:
            own = (*self.parameters(recurse=False), *self.buffers(recurse=False))
            like = next((t for t in own if t.is_floating_point()), None)
            factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
            self.threshold = nn.Parameter(torch.zeros(self._affine_shape, **factory))

    @property
    def form(self) -> Form | None:
        """What shapes of x the layer takes, where it is one call of the operator and nothing more."""
        return self._form

    @form.setter
    def form(self, form: Form | None) -> None:
        self._form, self._prepared = form, None

    @property
    def backend(self) -> str | None:
        """As for `divnorm_kernels.divisive_norm`."""
        return self._backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        check_name(backend)
        self._backend, self._prepared = backend, None

    @property
    def l1_weight(self) -> float:
        """The coefficient of the penalty."""
        return self._l1_weight

    @l1_weight.setter
    def l1_weight(self, value: float) -> None:
        check_at_least_zero("l1_weight", value, "a number")
        self._l1_weight = float(value)

    @property
    def eps(self) -> float | None:
        """Sigma to the power p under torch.nn's name, or ``None`` for the epsilon of the dtype that x is computed in.

        NaN where weight, bias and eps do not tell all that the layer does: of layers that torch.nn has not, and with
        another p than 2, x in the numerator, an activation, a penalty, modules that follow or a learned sigma, on the
        meta device too. What computes a layer by itself from torch.nn's attributes, as
        `torch.nn.TransformerEncoderLayer` in eval mode and SyncBatchNorm's conversion do, then leaves it alone or shows
        that it must not; what a layer was made with is its ``sigma``, of a learned one ``initial_sigma``.
        """
        if not self._told_by_eps():
            return math.nan
        return None if self.sigma is None else self.sigma**self._norm.root

    @eps.setter
    def eps(self, value: float) -> None:
        if self.learn_sigma:
            raise AttributeError("eps: sigma is learned, set layer.sigma")
        self.sigma = self.initial_sigma = _resolved_sigma(None, value, self._default_eps, self._norm.root)

    def _told_by_eps(self) -> bool:
        """Whether torch.nn's layer with the same weight, bias and eps does the same."""
        torchs = isinstance(self, _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)
        norm = self._norm
        plain = self.l1_weight == 0 and not self.learn_sigma and not self.followed_by
        return torchs and plain and norm.activation is None and norm.p == 2 and norm.subtract_mean

    def reset_parameters(self) -> None:
        """Sets weight to one, bias and threshold to zero and a learned sigma to its initial value."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.threshold is not None:
            nn.init.zeros_(self.threshold)
        if self.learn_sigma:
            nn.init.constant_(self.sigma, self.initial_sigma)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalizes x; in training with ``l1_weight > 0`` also keeps the penalty of this call in ``l1``.

        ``residual``, as for `divnorm_kernels.divisive_norm`, is added before the activation. In a graph that `torch.fx`
        records the layer is one node, as torch.nn's are.
        """
        x = input
        if type(x) is Tensor and self._form is not None and not torch.compiler.is_dynamo_compiling():
            y = self._at_once(x, residual)
            if y is not NotImplemented:
                return self._followed(y) if self.followed_by else y
        node = self._as_node(x, residual)
        if node is not None:
            return node
        if not isinstance(x, Tensor):
            check_activation(x)
        nested = x.layout is not torch.strided or x.is_nested
        if residual is not None:
            if nested:
                raise TypeError("residual: got one beside an x that is nested or not strided, expected None")
            x, residual = promoted(x, residual, self._parameters.values())
            check_residual(residual, x)
            if not torch.compiler.is_compiling():
                check_held(residual=residual)
        if type(x) is not Tensor and distributed(x):
            y = self._on_shards(x, residual)
        elif nested:
            y = self._on_values(x)
        else:
            try:
                y = self._call(x, residual)
            except RuntimeError:
                check_held(x=x, residual=residual)  # where a view of it was refused in other words
                raise
        return self._followed(y)

    def _at_once(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """`forward` by a prepared call; NotImplemented where it does not serve."""
        parameters = self._parameters  # a module's own look-up takes longer than a small kernel
        try:
            weight, bias, threshold = parameters["weight"], parameters["bias"], parameters.get("threshold")
            sigma = parameters["sigma"] if self.learn_sigma else self.sigma
        except KeyError:  # parametrized, or in a replica
            return NotImplemented
        if sigma is None and self._default_eps is None:
            sigma = self._least_sigma(x)
        call = self._prepared_call()
        with_l1 = self._l1_weight > 0 and self.training
        y = call(x, weight, bias, sigma, with_l1, False, residual, threshold)
        if y is NotImplemented:
            return y
        if with_l1:
            y, l1, _ = y
            self._keep(y, l1)
        elif self.l1 is not None:  # setting a module's attribute costs as much as a small kernel
            self.l1 = None
        return y

    def _prepared_call(self) -> Callable[..., Any]:
        if self._prepared is None:
            # a subclass may make its parameters from others
            own = not any(hasattr(type(self), name) for name in ("weight", "bias", "sigma", "threshold"))
            self._prepared = prepared(self._norm, self._backend, self._form) if own else nothing
        return self._prepared

    def _least_sigma(self, x: Tensor) -> float:
        return _LEAST_EPS[x.dtype == torch.float64] ** (1 / self._norm.root)

    def _followed(self, y: Tensor) -> Tensor:
        for name in self.followed_by:
            y = getattr(self, name)(y)
        return y

    def _call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`forward` of a tensor."""
        raise NotImplementedError

    def _on_shards(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """`forward` of a DTensor."""
        return self._call(x, residual)

    def _on_values(self, x: Tensor) -> Tensor:
        """`forward` of a nested tensor, whose rows are normalized each by itself."""
        row = self._form.row if isinstance(self._form, Rows) else None
        if row is None or not x.is_nested:
            got = f"a nested tensor of layout {x.layout}" if x.is_nested else f"layout {x.layout}"
            raise TypeError(f"x: got {got}, expected a strided {'' if row is None else 'or nested '}tensor")
        return on_rows(self._call, x, row)

    def _normalize(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        threshold: Tensor | None,
        with_statistics: bool = False,
    ) -> tuple[Tensor, Statistics | None]:
        """``(y, statistics)`` of a call; keeps the penalty in ``l1`` where it counts."""
        wants_l1 = self.l1_weight > 0 and self.training
        sigma = self._sigma_for(x)
        call = None
        if self._form is None and not torch.compiler.is_dynamo_compiling():
            call = self._prepared_call()
        y, l1, statistics = normalize(
            self._norm, x, weight, bias, sigma, wants_l1, self._backend, with_statistics, call, residual, threshold
        )
        self._keep(y, l1 if wants_l1 else None)
        return y, statistics

    def _sigma_for(self, x: Tensor) -> Tensor | float:
        """Sigma as the operator takes it."""
        sigma = self._sigma()
        if isinstance(sigma, Tensor):
            return sigma.squeeze(0) if sigma.shape == (1,) else sigma
        return self._least_sigma(x) if sigma is None and self._default_eps is None else sigma

    def _sigma(self) -> Tensor | float | None:
        """What the operator is called with; ``None`` where it goes by the dtype of x."""
        return self.sigma

    def _keep(self, y: Tensor, l1: Tensor | None) -> None:
        """Keeps the penalty of a call, ``None`` where it has none."""
        if l1 is not None:
            self.l1 = l1
            self._calls.note(y, l1, self.l1_weight, "_is_replica" in self.__dict__)
        elif self.l1 is not None:
            self.l1 = None

    def __getstate__(self) -> dict[str, object]:
        """Leaves out of copies and pickles what is found again, and the last call's penalty, which is its graph's."""
        return {**super().__getstate__(), "l1": None, "_prepared": None}

    def _options_repr(self) -> list[tuple[str, Any, Any]]:
        every = [
            (
                "sigma",
                self.initial_sigma if isinstance(self.sigma, Tensor) else self.sigma,
                None if self._default_eps is None else self._default_eps ** (1 / self._norm.root),
            ),
            ("learn_sigma", self.learn_sigma, False),
            ("l1_weight", self.l1_weight, 0.0),
            ("p", self.p, 2),
            ("subtract_mean", self.subtract_mean, True),
            ("activation", self.activation, self._default_activation),
            ("backend", self.backend, None),
        ]
        return [option for option in every if option[0] not in self._settled]


def listed(required: list[str], options: list[tuple[str, Any, Any]]) -> str:
    """The arguments of a layer as its constructor takes them: ``options`` are (name, value, default)."""
    return ", ".join(required + [f"{name}={value!r}" for name, value, default in options if value != default])
