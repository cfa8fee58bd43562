"""The compiled module: addresses in, nothing checked. `divnorm_kernels.backends.cpu` is its only user."""

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
        sigma: int,
        sigma_dtype: int,
        sigma_count: int,
        dl1: float,
        dx: int,
        dweight: int,
        dbias: int,
        dbias_dtype: int,
        dsigma: int,
        threads: int,
        /,
    ) -> None: ...
