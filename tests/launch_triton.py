"""Calls the Triton backend through Triton's own runtime, with a driver that records launches in place of a GPU's.

Run by the tests in a process of its own, without the interpreter. What is compiled is what a GPU would get.
"""

from __future__ import annotations

import torch
from compile_triton import TARGETS
from triton.runtime import driver

from divnorm_kernels.backends import triton as backend
from divnorm_kernels.backends.triton import launch
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm
from divnorm_kernels.seam import triton as seam
from divnorm_kernels.seam import triton_plans

TARGET, DEVICE = TARGETS["sm_90"]


class Launcher:
    """Triton makes one per compiled kernel, and calls it with grid, stream, handles, hooks and arguments."""

    made: list[Launcher] = []  # noqa: RUF012
    launches: list[tuple[Launcher, tuple[int, int, int], tuple]] = []  # noqa: RUF012
    BEFORE_ARGUMENTS = 9

    def __init__(self, source, metadata):
        self.names = source.fn.arg_names
        self.made.append(self)

    def __call__(self, *arguments):
        self.launches.append((self, arguments[:3], arguments[self.BEFORE_ARGUMENTS :]))


class Driver:
    """As much of a driver as the runtime asks for."""

    launcher_cls = Launcher

    class utils:
        """Loading code and asking for limits."""

        @staticmethod
        def load_binary(name, kernel, shared, device):
            return "module", "function", 128, 0, 1024

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 227 << 10, "multiprocessor_count": DEVICE.multiprocessors, "warpSize": 32}

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGET

    def get_device_interface(self):
        return torch.cuda


def step(x: torch.Tensor, options: dict) -> list[tuple[Launcher, tuple[int, int, int], tuple]]:
    """Forward and backward of a call, with a residual where there is a threshold; the launches they made."""
    g = geometry(Norm(**options), tuple(x.shape))
    affine, sigma, bounded = torch.ones(g.affine_size), torch.ones(1), g.norm.activation == "tlu"
    behind = (x, affine) if bounded else (None, None)
    _, maps, l1 = backend.forward(g, x, affine, affine, sigma, True, False, *behind)
    backend.backward(g, x, l1, x, maps, affine, affine, sigma, (*(True,) * 4, bounded, bounded), *behind)
    found, Launcher.launches = Launcher.launches, []
    return found


def seam_step(x: torch.Tensor, options: dict) -> list[tuple[Launcher, tuple[int, int, int], tuple]]:
    """The seam's passes; the launches they made, two but for the gradient."""
    g = geometry(Norm(**options), tuple(x.shape))
    affine, scale, rows = torch.ones(g.affine_size), torch.ones(()), torch.ones(2, *g.maps_shape[1:])
    seam.statistics(g, x)
    seam.normalize(g, x, rows, affine, affine, True, None, None)
    seam.sums(g, x, scale, x, rows, affine, affine, (True, True, False), None, None)
    seam.gradient(g, x, scale, x, rows, rows, affine, affine, None, None, (True, False))
    found, Launcher.launches = Launcher.launches, []
    return found


CALLS = [
    (step, (2, 64, 28, 28), {"window": 5, "activation": None}, 2),
    (step, (7, 64), {"window": 5, "activation": "tlu"}, 2),
    (seam_step, (7, 64), {"window": "all"}, 7),
]


def main() -> None:
    """Raises where a later call's launch differs from the first, or runs code that was compiled for other addresses."""
    driver.set_active(Driver())
    launch.device_of = triton_plans.device_of = lambda _: DEVICE
    for made_by, shape, options, launches in CALLS:
        memory = torch.zeros(torch.Size(shape).numel() + 1)
        aligned, shifted = (memory[i : memory.numel() - 1 + i].view(shape) for i in (0, 1))
        first, again = made_by(aligned, options), made_by(aligned, options)
        assert len(first) == len(again) == launches
        for (launcher, grid, arguments), (other, other_grid, others) in zip(first, again, strict=True):
            assert launcher is other
            assert grid == other_grid
            assert len(arguments) == len(others) == len(launcher.names)
            assert [type(a) for a in arguments] == [type(a) for a in others]
        made = len(Launcher.made)
        assert all(launcher in Launcher.made[made:] for launcher, _, _ in made_by(shifted, options))
        assert [launcher for launcher, _, _ in made_by(aligned, options)] == [launcher for launcher, _, _ in first]
        if made_by is step:  # a window is an argument, not a constant
            made = len(Launcher.made)
            step(aligned, options | {"window": 3})
            assert len(Launcher.made) == made
    print(f"{len(Launcher.made)} kernels")


if __name__ == "__main__":
    main()
