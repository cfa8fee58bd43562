"""What the first minutes on a GPU are to tell, each by itself: on these figures the choice of the next work hangs."""

from __future__ import annotations

import csv
import json
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from divnorm_kernels.backends import KERNELS, cuda, triton
from divnorm_kernels.backends.cuda import table as strategies
from divnorm_kernels.backends.triton import tiles

from .. import gpu
from ..cases import CASES, FORMATS, STAGES, Setting
from ..tuning import search
from ..tuning.calls import DIRECTIONS, SIGMA, WINDOW, Call, Prepared
from ..tuning.knobs import TUNABLE, row_of
from ..tuning.tables import Row, replaced
from . import tools

Figures = dict[str, Any]
DEVICE = "cuda"
RUNS = 5
"""How often kernels are timed, for a median."""
CHOSEN = ("pipeline", "finish_inside")
"""The entries of the table that choose between kernels and those that are to take their place."""
INSIDE = {"forward": (0,), "backward": (0, 16)}
"""Forward sums nothing behind its kernel: there is no l1."""
CACHE_SHARES = (0.4, 0.2, 0.1, 0.05)
TWO_PASS = (
    ("64x256x56x56", "float32", "contiguous", "backward"),
    ("64x64x112x112", "float32", "contiguous", "forward"),
    ("64x64x112x112", "float32", "contiguous", "backward"),
)
FINISHED = (
    ("64x64x112x112", "float32", "contiguous", "backward"),
    ("64x64x112x112", "bfloat16", "contiguous", "backward"),
    ("64x256x56x56", "float32", "contiguous", "backward"),
    ("64x256x56x56", "float32", "channels_last", "backward"),
    ("64x256x56x56", "bfloat16", "channels_last", "backward"),
)
WITH_L1 = ("64x64x112x112", "float32", "contiguous")
RESIDENT = ("64x256x56x56", "bfloat16", "contiguous")
IN_STAGES = (("64x256x56x56", "bfloat16", "contiguous"), ("64x1024x14x14", "bfloat16", "contiguous"))
METRICS = {
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "lts__t_sectors_srcunit_tex_lookup_miss.sum": "sectors missed in L2",
    "gpu__time_duration.sum": "nanoseconds",
}


def call(case: str, dtype: str, form: str) -> Call:
    """Windows on one of the benchmark's cases."""
    return Call(Setting(CASES[case], dtype, form, 0, DEVICE), "windows", (("window", WINDOW),))


def facts(seconds: float) -> dict[str, Callable[[], Figures]]:
    """Every fact by name, and what finds it; ``seconds`` for the values of a table's entry together."""
    found: dict[str, Callable[[], Figures]] = {"versions": versions}
    for dtype, direction in product(("bfloat16", "float32"), DIRECTIONS):
        found[f"old and new kernels, {dtype} {direction}"] = partial(old_and_new, dtype, direction, seconds)
    found["clusters at once"] = clusters
    for *which, direction in FINISHED:
        found[f"kernels of {' '.join(which)} {direction}"] = partial(kernels_of, which, direction)
    found[f"kernels of {' '.join(WITH_L1)} forward with l1"] = partial(kernels_of, WITH_L1, "forward with l1")
    for direction in DIRECTIONS:
        found[f"cluster sizes for {' '.join(RESIDENT)} {direction}"] = partial(cluster_sizes, direction, seconds)
    for which in IN_STAGES:
        for direction in DIRECTIONS:
            found[f"second pass of {' '.join(which)} {direction}"] = partial(second_pass, which, direction)
    return {**found, "memory traffic of two passes": traffic}


def versions() -> Figures:
    """Of the driver, the runtime, the compilers and the profilers."""
    driver, runtime = cuda.library.cuda_versions() if hasattr(cuda.library, "cuda_versions") else (None, None)
    found: Figures = {
        "driver supports CUDA": driver,
        "module built with CUDA": runtime,
        "module built for": getattr(cuda.library, "cuda_archs", None),
        "backends missing": {name: kernels.missing() for name, kernels in KERNELS.items() if kernels.missing()},
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "triton": triton.description() if triton.missing() is None else None,
    }
    query = ("--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu", "--format=csv,noheader")
    for name, *arguments in (
        ("nvidia-smi", *query),
        ("nvcc", "--version"),
        ("ncu", "--version"),
        ("compute-sanitizer", "--version"),
    ):
        try:
            found[name] = tools.said(name, *arguments).strip().splitlines()[-1]
        except (OSError, RuntimeError) as error:
            found[name] = str(error)
    return found


def old_and_new(dtype: str, direction: str, seconds: float) -> Figures:
    """Times of ResNet-50's stages with the pipelined kernels, and with sums inside, over those of the older kernels.

    These, resident or two-pass with a launch behind them for the sums, are the first of the table's entries that are
    compared. What each takes of a call is named: rows that a ring has no room for stay where they were.
    """
    tunable, ratios, takes, out = TUNABLE["cuda"], {}, {}, {}
    compared = [dict(zip(CHOSEN, of, strict=True)) for of in product(tunable.knobs["pipeline"], INSIDE[direction])]
    entries = {", ".join(f"{entry} {value}" for entry, value in of.items()): of for of in compared}
    for case, form in product(STAGES, FORMATS):
        p = Prepared(call(case, dtype, form))
        present = row_of(tunable, p.xs[0], direction)
        rows = {label: {**present, **of} for label, of in entries.items()}
        ratios[p.call.name] = search.compared("cuda", direction, rows, p, seconds, out)
        takes[p.call.name] = {label: _taken(p, direction, row) for label, row in rows.items() if label not in out}
    means = search.scored(ratios.values(), entries, out)
    best = min(means, key=means.__getitem__)
    chosen = best if means[best] < search.GAIN else next(iter(entries))
    return {"the table should have": entries[chosen], "means": means, "calls": ratios, "takes": takes, "out": out}


def _taken(p: Prepared, direction: str, row: Row) -> str:
    """The strategy of a call under a row."""
    with with_entry(strategies, row):
        return cuda.strategies(p.call.geometry(), p.xs[0])[DIRECTIONS.index(direction)]


def clusters() -> Figures:
    """How many clusters run at once, by the blocks that share a multiprocessor's memory and the blocks of a cluster."""
    with tempfile.TemporaryDirectory() as folder:
        program, major_minor = Path(folder) / "clusters", torch.cuda.get_device_capability()
        arch = "-arch=sm_{}{}".format(*major_minor)
        tools.said("nvcc", arch, "-o", program, Path(__file__).with_name("clusters.cu"))
        return json.loads(tools.said(str(program)))


def short(kernel: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters."""
    plain = kernel.replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", plain.removeprefix("void "))[0].rpartition("::")[2].strip()


def launches(run: Callable[[], object]) -> list[tuple[str, float]]:
    """The kernels that ``run`` launches, in order, with their microseconds."""
    kinds = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[kinds]) as profile:
        run()
        torch.cuda.synchronize()
    there = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    in_order = sorted(there, key=lambda event: event.time_range.start)
    return [(short(event.name), event.time_range.elapsed_us()) for event in in_order]


def kernels_of(which: tuple[str, str, str], direction: str) -> Figures:
    """The microseconds of each kernel of a call of CUDA's backend: of what finishes it too."""
    prepared = Prepared(call(*which))
    if direction == "forward with l1":
        g = prepared.call.geometry()

        def run(i: int) -> Tensor:
            return cuda.forward(g, prepared.xs[i % len(prepared.xs)], prepared.weight, prepared.bias, SIGMA, True)[0]

        run(0)
    else:
        run = prepared.runner("cuda", direction)
    rounds = [launches(partial(run, i)) for i in range(1, RUNS + 1)]
    names = [name for name, _ in rounds[0]]
    return {f"{i + 1} {name}": median(of[i][1] for of in rounds) for i, name in enumerate(names)}


def cluster_sizes(direction: str, seconds: float) -> Figures:
    """The time of every size of clusters over that of the table's; 0 is the two-pass kernels."""
    (trial,) = search.tuned("cuda", direction, [Prepared(call(*RESIDENT))], ["cluster"], seconds, None)
    return {"present": trial.present, **trial.scores, **trial.out}


def with_entry(module: Any, row: Row, **entries: Any) -> Any:
    """The module's table with a row in front that differs in some entries."""
    return replaced(module, [{**row, **entries}, *module.ROWS])


def second_pass(which: tuple[str, str, str], direction: str) -> Figures:
    """Triton's second pass over x as a launch of its own: the longest of its launches, which has all of a chunk."""
    from divnorm_kernels.backends.triton.launch import Plan  # brings triton, which takes a second

    prepared = Prepared(call(*which))
    g, (x, dy) = prepared.call.geometry(), (prepared.xs[0], prepared.dys[0])
    staged = {"single": 0, "single_narrow": 0, "single_whole": 0, "looped": 0}
    with with_entry(tiles, row_of(TUNABLE["triton"], x, direction), ordered=False, **staged):
        _, maps, _ = triton.forward(g, x, prepared.weight, prepared.bias, SIGMA, False)
        if direction == "forward":
            run = partial(triton.forward, g, x, prepared.weight, prepared.bias, SIGMA, False)
        else:
            needs = (True, True, True, False, False, False)
            run = partial(triton.backward, g, dy, None, x, maps, prepared.weight, prepared.bias, SIGMA, needs)
            run()
    plan = next(p for key, p in g.cache.items() if isinstance(p, Plan) and key[0] == direction)
    segments, stages = list(plan.order.segments()), len(plan.order.runs)
    steps = plan.order.steps
    found = []
    for _ in range(RUNS):
        times = [taken for name, taken in launches(run) if name == f"{direction}_kernel"]
        if len(times) != len(segments):
            raise RuntimeError(f"{len(times)} launches of {direction}_kernel, expected {len(segments)}")
        found.append(max(times[stages - 1 : steps * stages : stages]))
    items, taken = plan.order.runs[-1][1], median(found)
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return {"items": items, "launch": taken, "an item on one multiprocessor": taken * multiprocessors / items}


def traffic() -> Figures:
    """What the two-pass kernels move through memory, by the share of the cache for a chunk: by Nsight Compute.

    The calls run in a process of their own (``python -m bench.check.facts``), one profiled launch a share and call.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        options = ("--clock-control", "none", "--profile-from-start", "off", "--print-units", "base", "--csv")
        options += ("--metrics", ",".join(METRICS), "--log-file", log)
        tools.said("ncu", *options, sys.executable, "-m", __name__)
        found = [of for of in profiled(log.read_text()) if of["kernel"].startswith("staged")]
    labels = [(which, share) for which in TWO_PASS for share in CACHE_SHARES]
    if len(found) != len(labels):
        raise RuntimeError(f"ncu profiled {len(found)} two-pass kernels, expected {len(labels)}")
    figures: Figures = {}
    for (which, share), of in zip(labels, found, strict=True):
        *case, direction = which
        setting = call(*case).setting
        size = getattr(torch, setting.dtype).itemsize * torch.Size(setting.case.shape).numel()
        least = {"forward": 2, "backward": 3}[direction] * size
        of["over the least"] = (of["read"] + of["written"]) / least
        figures[f"{' '.join(which)}, cache_share {share}"] = of
    return figures


def profiled(text: str) -> list[Figures]:
    """The kernels of Nsight Compute's CSV, in order, with their metrics."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, Figures] = {}
    for row in csv.DictReader(lines):
        of = found.setdefault(row["ID"], {"kernel": short(row["Kernel Name"])})
        if row["Metric Name"] in METRICS:
            of[METRICS[row["Metric Name"]]] = float(row["Metric Value"].replace(",", ""))
    return list(found.values())


def run_two_passes() -> None:
    """What `traffic` profiles."""
    for *which, direction in TWO_PASS:
        prepared = Prepared(call(*which))
        row = row_of(TUNABLE["cuda"], prepared.xs[0], direction)
        for share in CACHE_SHARES:
            with with_entry(strategies, row, cluster=0, cache_share=share):
                run = prepared.runner("cuda", direction)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            run(1)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def find(names: list[str], figures: Figures, seconds: float, save: Callable[[], None]) -> None:
    """Finds facts into ``figures``, saved after each; one that fails says so there.

    Raises:
        Spoilt: where none can be found in this process behind it.
    """
    known = facts(seconds)
    for name in names:
        try:
            figures[name] = known[name]()
        except Exception as error:  # whatever it is, the others do not depend on it
            spoilt = gpu.spoilt(error)
            figures[name] = {"failure": f"{type(error).__name__}: {error}", "spoilt": spoilt}
            if spoilt:
                save()
                raise gpu.Spoilt(f"{name}: {error}") from error
        save()


if __name__ == "__main__":
    run_two_passes()
