"""One forward and one backward of every backend on a few calls: ``ncu python -m bench.profiled CASE...``.

Only what lies between the profiler's start and stop counts (``--profile-from-start off``); the name printed before
tells which call the profiler speaks of next.
"""

from __future__ import annotations

import sys

import torch

from divnorm_kernels.backends import KERNELS

from .tuning.calls import DIRECTIONS, Prepared, calls
from .tuning.command import DTYPES
from .tuning.knobs import TUNABLE


def main(cases: list[str], device: str = "cuda") -> None:
    """Runs the calls of the named cases once more after a first time, which compiles."""
    for dtype in DTYPES:
        for call in (call for call in calls(dtype, device) if call.setting.case.name in cases):
            prepared = Prepared(call)
            for backend in TUNABLE:
                if KERNELS[backend].refusal(call.geometry(), prepared.xs[0]) is not None:
                    continue
                for direction in DIRECTIONS:
                    run = prepared.runner(backend, direction)
                    torch.cuda.synchronize()
                    print(call.name, backend, direction, flush=True)
                    torch.cuda.profiler.start()
                    run(1)
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
