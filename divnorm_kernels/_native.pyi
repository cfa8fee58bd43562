"""The compiled module: addresses in, nothing checked. Used by `divnorm_kernels.backends.cpu` and `.cuda` alone."""

from typing import Any

__version__: str

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...

_Axis = tuple[int, int, int]
_Field = tuple[_Axis, _Axis, _Axis] | None

class Plan:
    def __init__(
        self,
        dtype: int,
        channels_last: bool,
        over_batch: bool,
        affine_per_position: bool,
        relu: bool,
        whole: bool,
        batch: int,
        channels: int,
        groups: int,
        extent: tuple[int, int, int],
        summation: _Field,
        suppression: _Field,
        /,
    ) -> None: ...
    def forward(
        self,
        x: int,
        weight: int,
        weight_dtype: int,
        bias: int,
        bias_dtype: int,
        sigma: int,
        sigma_dtype: int,
        sigma_count: int,
        sigma_value: float,
        y: int,
        maps: int,
        with_l1: bool,
        with_variance: bool,
        threads: int,
        /,
    ) -> float: ...
    def backward(
        self,
        x: int,
        dy: int,
        maps: int,
        weight: int,
        weight_dtype: int,
        bias: int,
        bias_dtype: int,
        sigma: int,
        sigma_dtype: int,
        sigma_count: int,
        dl1: float,
        dx: int,
        dweight: int,
        dbias: int,
        dsigma: int,
        threads: int,
        /,
    ) -> None: ...

# Only where the module was built without CUDA.

without_cuda: str
"""Why: ``it was built with DIVNORM_CUDA=off``."""

# Only where the module was built with CUDA.

cuda_archs: str
"""The architectures it was built for: ``sm_80 sm_90``."""
cuda_most_positions: int
cuda_compiled_for: dict[str, tuple[int, int]]

def cuda_versions() -> tuple[int, int]:
    """The newest CUDA that the driver supports, 0 where there is no driver, and the one built with: 12040 is 12.4."""

def cuda_strategy(plan: Plan, backward: bool, device: dict[str, Any], row: dict[str, Any], /) -> dict[str, Any]: ...

class CudaCalls:
    def __init__(
        self,
        plan: Plan,
        device_index: int,
        device: dict[str, Any],
        forward_row: dict[str, Any],
        backward_row: dict[str, Any],
        /,
    ) -> None: ...
    @property
    def scratch_bytes(self) -> tuple[int, int]: ...
    @property
    def strategies(self) -> tuple[str, str]: ...
    def forward(
        self,
        device_index: int,
        stream: int,
        x: int,
        weight: int,
        weight_dtype: int,
        bias: int,
        bias_dtype: int,
        sigma: int,
        sigma_dtype: int,
        sigma_count: int,
        sigma_value: float,
        y: int,
        maps: int,
        with_variance: bool,
        l1: int,
        scratch: int,
        /,
    ) -> None: ...
    def backward(
        self,
        device_index: int,
        stream: int,
        x: int,
        dy: int,
        maps: int,
        weight: int,
        weight_dtype: int,
        bias: int,
        bias_dtype: int,
        sigma: int,
        sigma_dtype: int,
        sigma_count: int,
        sigma_value: float,
        dl1: int,
        dx: int,
        dweight: int,
        dbias: int,
        dsigma: int,
        scratch: int,
        /,
    ) -> None: ...
