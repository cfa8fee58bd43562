"""The compiled module."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from .backends.native import Needs
from .fields import Geometry
from .norm import Norm
from .prepared import Form

__version__: str

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def connect() -> None:
    """Looks up what is needed of torch; to be called first. An error says what torch does not offer."""

Extents = tuple[int, int, int]
Box = tuple[int, int] | None
Scalars = tuple[float, float, float, float]

def channels_forward(
    x: int,
    y: int,
    dtype: int,
    extents: Extents,
    box: Box,
    squared: bool,
    scalars: Scalars,
    learned: int,
    threads: int,
    /,
) -> None:
    """A channel normalization of tensors at these addresses, as `divnorm_kernels.channels.cpu` lays them out."""

def channels_backward(
    dy: int,
    x: int,
    dx: int,
    dlearned: int,
    dtype: int,
    extents: Extents,
    box: Box,
    squared: bool,
    scalars: Scalars,
    learned: int,
    threads: int,
    /,
) -> None:
    """Its gradients; an address of 0 is no tensor."""

Rows = tuple[int, int]
Numbers = tuple[int, int, int]
Parameters = tuple[Numbers, Numbers, Numbers]

def seam_statistics(calls: CpuCalls, x: int, rows: Rows, threads: int, /) -> None:
    """Mean and variance of the rows of a tensor at this address, as `divnorm_kernels.seam.cpu` lays them out."""

def seam_normalize(
    calls: CpuCalls, x: int, rows: Rows, parameters: Parameters, residual: int, y: int, with_l1: bool, threads: int, /
) -> float:
    """The y by mean and 1/s of the rows; returns l1. Of parameters there are address, dtype and number."""

def seam_sums(
    calls: CpuCalls,
    dy: int,
    l1_scale: float,
    x: int,
    rows: Rows,
    parameters: Parameters,
    residual: int,
    sums: int,
    gradients: Parameters,
    threads: int,
    /,
) -> None:
    """The first half of backward."""

def seam_gradient(
    calls: CpuCalls,
    dy: int,
    l1_scale: float,
    x: int,
    rows: Rows,
    slopes: int,
    parameters: Parameters,
    residual: int,
    dx: int,
    dresidual: int,
    threads: int,
    /,
) -> None:
    """The second half; an address of 0 is no tensor."""

class CpuCalls:
    """The CPU's forward and backward of a geometry, for tensors of one dtype and memory format."""

    def __init__(self, geometry: Geometry, dtype: int, channels_last: bool, residual: bool, /) -> None: ...
    @property
    def capsule(self) -> object: ...

class Plan:
    """A geometry on tensors of one dtype, memory format and device."""

    def __init__(
        self,
        geometry: Geometry,
        backend: ModuleType,
        calls: CpuCalls | CudaCalls | None,
        like: Tensor,
        residual: bool,
        /,
    ) -> None: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def backend(self) -> ModuleType: ...
    @property
    def native(self) -> bool:
        """Whether its calls run in the compiled module, which needs no shape of x but the geometry's numbers."""
    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sigma: Tensor | float,
        with_l1: bool,
        with_variance: bool,
        residual: Tensor | None,
        threshold: Tensor | None,
        /,
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...
    def backward(
        self,
        dy: Tensor | None,
        dl1: Tensor | None,
        x: Tensor,
        maps: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sigma: Tensor | float,
        needs: Needs,
        residual: Tensor | None,
        threshold: Tensor | None,
        /,
    ) -> tuple[Tensor | None, ...]: ...

class Call:
    """What `divnorm_kernels.prepared.prepared` gives."""

    def __init__(
        self,
        norm: Norm,
        backend: str | None,
        form: Form | None,
        prepare: Callable[[Norm, str | None, Form | None, Tensor, bool], Plan | None],
        /,
    ) -> None: ...
    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sigma: Tensor | float,
        with_l1: bool = False,
        with_statistics: bool = False,
        residual: Tensor | None = None,
        threshold: Tensor | None = None,
        /,
    ) -> Any: ...

def forward(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    residual: Tensor | None,
    threshold: Tensor | None,
    /,
) -> Any:
    """Of the autograd function that a `Call` applies."""

def backward(
    ctx: Any, saved: tuple[Tensor | None, ...], dy: Tensor | None, dl1: Tensor | None, /
) -> tuple[Tensor | None, ...] | Any:
    """Its backward: the gradients, or NotImplemented."""

def differentiate_by(apply: Callable[..., Any], /) -> None:
    """Tells the calls the ``apply`` of that function."""

def register_operators(loaded: str, /) -> bool:
    """Makes the CPU's kernels of the operators torch's, once.

    ``loaded``: a library that has brought torch's into the process. ``False`` where torch has not all that they need.
    """

def remember(norm: str, backend: str, x: Tensor, plan: Plan, /) -> None:
    """Tells them the plan for calls with such an ``x``; ``backend`` is empty where none is named."""

def operator_texts() -> tuple[str, str | None]:
    """The norm and the backend of the call that this thread makes of an operator's namesake in Python."""

def operator_raised(error: BaseException, /) -> None:
    """Tells them what that call has raised."""

def operator_calls() -> tuple[int, int]:
    """How many calls of forward and of backward they have served."""

def operator_plans() -> int:
    """How many plans they know."""

# Generalized divisive normalization (csrc/gdn.h). ``form``: dtype, inverse, simplified, x's numel; ``places``:
# blocks, rows, columns, the strides of blocks and rows of tensors like x, and those of scratch; then addresses.

def gdn_pool(form: tuple[int, ...], places: tuple[int, ...], threads: int, x: int, s: int, /) -> None: ...
def gdn_forward(form: tuple[int, ...], places: tuple[int, ...], threads: int, x: int, y: int, d: int, /) -> None: ...
def gdn_slope(
    form: tuple[int, ...], places: tuple[int, ...], threads: int, dy: int, x: int, d: int, e: int, dd: int, /
) -> None: ...
def gdn_slope_of_result(
    form: tuple[int, ...], places: tuple[int, ...], threads: int, dy: int, x: int, y: int, s: int, e: int, dd: int, /
) -> bool: ...
def gdn_backward(
    form: tuple[int, ...], places: tuple[int, ...], threads: int, x: int, dx: int, e: int, ds: int, /
) -> None: ...

# Only where the module was built without CUDA.

without_cuda: str
"""Why: ``it was built with DIVNORM_CUDA=off``."""

# Only where the module was built with CUDA.

cuda_archs: str
"""What it has code for: ``sm_80 sm_90 compute_90``, the last as PTX."""
cuda_most_positions: int
cuda_most_channels: int
"""Of a channel normalization this and more are too many."""
cuda_compiled_for: dict[str, tuple[int, int]]

def cuda_versions() -> tuple[int, int]:
    """The newest CUDA that the driver supports, 0 where there is no driver, and the one built with: 12040 is 12.4."""

def cuda_strategy(
    geometry: Geometry,
    dtype: int,
    channels_last: bool,
    backward: bool,
    device: dict[str, Any],
    row: dict[str, Any],
    residual: bool = False,
    /,
) -> dict[str, Any]: ...

class CudaCalls:
    """As `CpuCalls`, of a GPU."""

    def __init__(
        self,
        geometry: Geometry,
        dtype: int,
        channels_last: bool,
        residual: bool,
        device_index: int,
        device: dict[str, Any],
        forward_row: dict[str, Any],
        backward_row: dict[str, Any],
        /,
    ) -> None: ...
    @property
    def capsule(self) -> object: ...
    @property
    def scratch_bytes(self) -> tuple[int, int]: ...
    @property
    def strategies(self) -> tuple[str, str]: ...

class CudaSeam:
    """The halves of a geometry whose fields are whole, on a GPU; tensors are addresses, 0: absent.

    ``where`` is the device's index, the stream and scratch memory of ``scratch_bytes``.
    """

    def __init__(
        self,
        geometry: Geometry,
        dtype: int,
        channels_last: bool,
        residual: bool,
        device_index: int,
        device: dict[str, Any],
        forward: dict[str, Any],
        backward: dict[str, Any],
        /,
    ) -> None: ...
    @property
    def scratch_bytes(self) -> tuple[int, int, int, int]:
        """That statistics, normalize, sums and gradient need."""
    def statistics(self, x: int, rows: Rows, where: tuple[int, int, int], /) -> None: ...
    def normalize(
        self,
        x: int,
        rows: Rows,
        parameters: Parameters,
        residual: int,
        y: int,
        l1: int,
        where: tuple[int, int, int],
        /,
    ) -> None: ...
    def sums(
        self,
        dy: int,
        l1_scale: int,
        x: int,
        rows: Rows,
        parameters: Parameters,
        residual: int,
        sums: int,
        gradients: Parameters,
        where: tuple[int, int, int],
        /,
    ) -> None: ...
    def gradient(
        self,
        dy: int,
        l1_scale: int,
        x: int,
        rows: Rows,
        slopes: int,
        parameters: Parameters,
        residual: int,
        dx: int,
        dresidual: int,
        where: tuple[int, int, int],
        /,
    ) -> None: ...

class CudaChannels:
    """A channel normalization (`divnorm_kernels.channels.pool.Pool`) on a GPU; tensors are addresses, 0: absent."""

    def __init__(
        self,
        dtype: int,
        extents: tuple[int, int, int],
        box: tuple[int, int] | None,
        squared: bool,
        device_index: int,
        device: dict[str, Any],
        /,
    ) -> None: ...
    @property
    def scratch_bytes(self) -> tuple[int, int]:
        """That forward and backward need."""
    def cut(self, backward: bool) -> dict[str, Any]:
        """How a direction is cut into tiles, blocks and threads."""
    def forward(
        self, x: int, y: int, scalars: tuple[float, ...], learned: int, scratch: int, stream: int, /
    ) -> None: ...
    def backward(
        self,
        dy: int,
        x: int,
        dx: int,
        dlearned: int,
        scalars: tuple[float, ...],
        learned: int,
        scratch: int,
        stream: int,
        /,
    ) -> None: ...
