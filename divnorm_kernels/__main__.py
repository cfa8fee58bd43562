"""``python -m divnorm_kernels``: what is installed and what it can use here."""

from __future__ import annotations

import platform

import torch

from .backends import availability, cpu
from .version import __version__


def main() -> None:
    """Prints versions, backends with the reason for each missing one, instruction set and thread count."""
    print(f"divnorm_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for name, reason in availability().items():
        print(f"backend {name}: {'available' if reason is None else f'missing: {reason}'}")
    print(f"instruction set: {cpu.instruction_set() or 'none'}")
    print(f"threads: {torch.get_num_threads()}")


if __name__ == "__main__":
    main()
