"""The process in which calls are made.

A call is written to a file before it is made, so that it is known after a crash. With ``--fork`` each is made in a
process of its own, whose crash is an exception in this one: hypothesis shrinks it as any other. In the end it writes
how often each strategy was taken.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from process import load

FAILED = 99
"""The exit status after an exception, when the file holds the smallest call that raises it; others are crashes."""


def in_fork(make: Callable[..., None], case: tuple[Any, ...]) -> None:
    """Makes a call in a child of this process; the AssertionError has what a failing one wrote."""
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), sys.stderr.fileno())
            status = 0
            try:
                make(*case)
            except BaseException:
                traceback.print_exc()
                status = FAILED
            os._exit(status)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        assert status == 0, errors.read().decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("folder", type=Path, help="where the kernels were built")
    parser.add_argument("--only", help="make this call alone")
    parser.add_argument("--note", type=Path, help="where each call is written")
    parser.add_argument("--calls", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--fork", action="store_true")
    options = parser.parse_args()
    if options.target == "cpu":
        load("divnorm_kernels._native", options.folder)  # in the place of the package's own, which is then not loaded

    import torch
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from strategies import Recipe

    from fuzz.calls import CALLS, maker

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    make, taken = maker(options.target, options.folder), Counter()
    if options.only is not None:
        make(*eval(options.only, {"torch": torch, "Recipe": Recipe}))
        return 0

    @seed(options.seed)
    @settings(
        max_examples=options.calls,
        phases=(Phase.generate, Phase.shrink),
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(CALLS[options.target])
    def each(case: tuple[Any, ...]) -> None:
        options.note.write_text(repr(case))
        if options.fork:
            in_fork(make, case)
        else:
            taken.update(make(*case))

    try:
        each()
    except Exception as failure:
        print(*traceback.format_exception_only(failure), file=sys.stderr)
        return FAILED
    print(json.dumps(taken))
    return 0


if __name__ == "__main__":
    sys.exit(main())
