"""The launches of the Triton backend: plans, memory, CUDA graphs, autotuning."""

import gc
import sys
import weakref

import pytest
import torch
from scheduled import DEVICES, H200, geometry_of
from torch.utils._python_dispatch import TorchDispatchMode

from divnorm_kernels.backends import triton as backend
from divnorm_kernels.backends.triton import launch
from divnorm_kernels.backends.triton.stages import schedule
from divnorm_kernels.backends.triton.tiles import candidates, choose


def kept_bytes(value: object) -> int:
    """What an object and all that it holds take, but for kernels and what is shared: types and functions."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if callable(value) or isinstance(value, Kernel):
        return 0
    if isinstance(value, dict):
        held = [*value, *value.values()]
    else:
        held = value if isinstance(value, tuple | list) else vars(value).values() if hasattr(value, "__dict__") else []
    return sys.getsizeof(value) + sum(map(kept_bytes, held))


class Kernel:
    """Records launches; stands for the compiled kernel too."""

    def __init__(self):
        self.first, self.again = [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            (self.first if options else self.again).append((grid, arguments))
            return self

        return run


@pytest.fixture
def kernel(monkeypatch):
    found = Kernel()
    monkeypatch.setattr(launch, "forward_kernel", found)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "device_of", lambda _: H200)
    return found


def test_the_second_call_goes_straight_to_the_compiled_kernel(kernel):
    g = geometry_of((64, 64, 58, 56))
    g.cache.clear()
    x = torch.empty(g.shape, device="meta")
    for _ in range(3):
        backend.forward(g, x, None, None, 1.0, False)
    assert len(kernel.first) == 1
    assert len(kernel.again) == 2
    (grid, arguments), (again_grid, again) = kernel.first[0], kernel.again[0]
    assert again_grid == (*grid, 1, 1)
    assert len(arguments) == len(again)
    assert [type(a) for a in arguments] == [type(a) for a in again]


def test_addresses_that_are_not_aligned_go_through_triton(kernel):
    """Triton compiles for the alignment it sees; what was compiled for aligned addresses must not run on others."""
    g = geometry_of((2, 4, 6, 8))
    g.cache.clear()
    memory = torch.zeros(g.numel + 1)
    aligned, shifted = (memory[i : i + g.numel].view(g.shape) for i in (0, 1))
    for x, launches in ((shifted, 1), (aligned, 2), (shifted, 3), (aligned, 3)):
        backend.forward(g, x, None, None, 1.0, False)
        assert len(kernel.first) == launches
    assert len(kernel.again) == 1


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.arch)
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((8, 64, 200_000), 5),
        ((64, 64, 112, 112), 5),
        ((1024, 64, 112, 112), "all"),
        ((100_000, 3, 224, 224), (101, 31)),
    ],
    ids=str,
)
def test_what_a_geometry_keeps_does_not_grow_with_its_size(shape, window, device, kernel, monkeypatch):
    monkeypatch.setattr(launch, "device_of", lambda _: device)
    g = geometry_of(shape, window=window)
    g.cache.clear()
    backend.forward(g, torch.empty(shape, device="meta"), None, None, 1.0, True)
    assert kept_bytes(g.cache) < 8192


def test_memory_is_of_the_device_of_x_whatever_the_default(kernel):
    g = geometry_of((3, 8, 20, 20), window=3)
    with torch.device("meta"):
        backend.forward(g, torch.zeros(g.shape, device="cpu"), None, None, 1.0, True)
    ((_, arguments),) = kernel.first
    assert {a.device.type for a in arguments if isinstance(a, torch.Tensor)} == {"cpu"}


@pytest.mark.parametrize("captures", [False, True])
def test_a_graphs_table_outlives_its_geometry(captures, kernel, monkeypatch):
    g = geometry_of((2, 4, 6, 10))
    g.cache.clear()
    x = torch.empty(g.shape, device="meta")
    backend.forward(g, x, None, None, 1.0, False)
    monkeypatch.setattr(launch, "captures", lambda _: captures)
    backend.forward(g, x, None, None, 1.0, False)
    (plan,) = g.cache.values()
    kept = weakref.ref(plan.table)
    del plan
    kernel.first.clear()
    kernel.again.clear()
    g.cache.clear()
    gc.collect()
    assert (kept() is not None) == captures


def test_a_first_call_inside_a_capture_is_refused(kernel, monkeypatch):
    """What it would copy to the GPU ends the capture with an error that says nothing of the cause."""
    g = geometry_of((2, 4, 6, 11))
    g.cache.clear()
    x = torch.empty(g.shape, device="meta")
    monkeypatch.setattr(launch, "captures", lambda _: True)
    with pytest.raises(RuntimeError, match=r"first forward call .* of shape \(2, 4, 6, 11\) is inside the capture"):
        backend.forward(g, x, None, None, 1.0, False)
    assert not g.cache
    monkeypatch.setattr(launch, "captures", lambda _: False)
    backend.forward(g, x, None, None, 1.0, False)
    monkeypatch.setattr(launch, "captures", lambda _: True)
    backend.forward(g, x, None, None, 1.0, False)
    assert len(kernel.again) == 1


class Fills(TorchDispatchMode):
    """The operators that fill memory: on a GPU each is a kernel of its own."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in function.__name__ for word in ("zero", "one", "fill", "full")):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("shape", "options", "fills"),
    [
        ((2, 64, 56, 56), {}, (1, 1)),
        ((64, 512, 14, 14), {}, (0, 0)),  # one program a row: no counters
        ((128, 16, 16, 16), {}, (1, 1)),
        ((2, 64, 56, 56), {"norm_window": None}, (1, 2)),  # the gradient of a sigma that is not used
    ],
    ids=str,
)
def test_nothing_is_filled_but_counters(shape, options, fills, kernel, monkeypatch):
    monkeypatch.setattr(launch, "backward_kernel", kernel)
    g = geometry_of(shape, **options)
    g.cache.clear()
    x, affine, sigma = torch.empty(shape, device="meta"), torch.ones(g.affine_size), torch.ones(1)
    with Fills() as forward:
        _, maps, l1 = backend.forward(g, x, affine, affine, sigma, True)
    with Fills() as backward:
        backend.backward(g, x, l1, x, maps, affine, affine, sigma, (True, True, True, True, False, False))
    assert (len(forward.found), len(backward.found)) == fills, (forward.found, backward.found)


def test_the_table_is_as_wide_as_the_end_of_the_scratch_memory(kernel, monkeypatch):
    """The kernel adds to the table's numbers in the table's type: here to where the partial sums of dsigma begin."""
    monkeypatch.setattr(launch, "backward_kernel", kernel)
    g = geometry_of((1, 2, (2**31 - 200_000) // 5))
    g.cache.clear()
    x = torch.empty(g.shape, device="meta")
    maps = torch.empty(g.kept_shape(False), device="meta")
    backend.backward(g, x, None, x, maps, None, None, torch.ones(1), (True, False, False, True, False, False))
    (plan,) = g.cache.values()
    tiles = choose(g, H200, "backward", 4, False)
    found = schedule(g, tiles, backward=True, finish=1, sigmas=1, variance=False)
    assert max(found.table) < 2**31 <= found.order.scratch == plan.order.scratch
    assert plan.table.dtype == torch.int64


def test_autotuning_keeps_the_fastest_plan(kernel, monkeypatch):
    g = geometry_of((64, 64, 60, 56))
    g.cache.clear()
    runs = []

    def do_bench(function, return_mode):
        function()
        runs.append(kernel.first[-1])
        return 1.0 if len(runs) == 3 else 2.0

    monkeypatch.setattr(launch, "AUTOTUNE", True)
    monkeypatch.setattr(launch.triton.testing, "do_bench", do_bench)
    backend.forward(g, torch.empty(g.shape, device="meta"), None, None, 1.0, False)
    assert len(runs) == len(list(candidates(g, H200, "forward", 4, False)))
    (plan,) = (found for found in g.cache.values() if isinstance(found, launch.Plan))
    assert plan.trailing == runs[2][1][-len(plan.trailing) :]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_every_launch_is_on_the_device_of_x_those_of_autotuning_too(elsewhere, kernel, monkeypatch):
    """Triton compiles for the current device, and a plan keeps what it compiled."""
    g = geometry_of((64, 64, 61, 56))
    g.cache.clear()
    current = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *error):
            current.pop()

    launched = []

    def run(plan, *rest):
        launched.append(list(current))

    def do_bench(function, return_mode):
        function()
        return 1.0

    monkeypatch.setattr(backend, "_elsewhere", lambda _: elsewhere)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(launch, "AUTOTUNE", True)
    monkeypatch.setattr(launch.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(launch.Plan, "run", run)
    x = torch.empty(g.shape, device="meta")
    for _ in range(2):
        backend.forward(g, x, None, None, 1.0, False)
    assert len(launched) > 3
    assert all(devices == [x.device] * elsewhere for devices in launched)
