"""The steps of the check: what each runs, and how long it may take."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from divnorm_kernels.backends import cuda

from ..cases import STAGES
from . import tools

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (".py", ".json", ".h", ".cpp", ".cu")
PASSED = "passed.txt"
"""Names of tests that passed: tests go on behind them."""
TEST_BYTES = 8 << 30
"""What a test of real sizes holds of the GPU's memory at its peak, its process' context and the oracle in it."""
FIRST = "not real_sizes and not values_and_gradients or real_sizes and bfloat16 and not all"
"""Tests of every kind, of those that take long the ones that say most."""
TEST_SECONDS = 120
"""After these a test hangs; where the package pytest-timeout is there, it ends alone."""
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
PROFILED = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")


@dataclass(frozen=True)
class Device:
    """The GPU, as its steps need to know it."""

    name: str
    arch: str
    """As CMake names it: 90."""
    memory: int

    @property
    def jobs(self) -> int:
        """How many processes may run tests side by side, each with memory of its own."""
        return max(1, min(os.cpu_count() or 1, self.memory // TEST_BYTES))


def device() -> Device | None:
    """The first GPU, where there is one; asked for in a process of its own, which takes its memory with it."""
    code = "import json, torch; p = torch.cuda.get_device_properties(0); "
    code += "print(json.dumps([p.name, f'{p.major}{p.minor}', p.total_memory]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return Device(*json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


@dataclass(frozen=True)
class Step:
    """A part of the check: commands that run one after the other, the first that fails ends it."""

    name: str
    what: str
    limit: int
    """The most seconds of one run. What takes longer goes on in the next."""
    commands: Callable[[Device, Path], list[list[str]]]
    """The commands for a device and the folder for results."""
    environment: Callable[[Device], dict[str, str]] = field(default=lambda device: {})
    asked_for: bool = False
    """Whether it runs where it is named alone."""
    there: Callable[[Device], bool] = field(default=lambda device: True)
    """Whether what it made for the steps behind it is still there."""
    needed: bool = False
    """Whether without it the steps behind it would show less than they say."""


def sources() -> str:
    """What tells the kernels and the package from others."""
    found = hashlib.sha256()
    there = chain(*((ROOT / folder).rglob("*") for folder in ("csrc", "divnorm_kernels")))
    for path in sorted([ROOT / "CMakeLists.txt", *(path for path in there if path.suffix in SOURCES)]):
        found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def environment() -> dict[str, str]:
    """What all commands see."""
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    ours = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "DIVNORM_REQUIRE_NATIVE": "1"}
    profile = os.environ.get("HYPOTHESIS_PROFILE", "quick")
    return {**os.environ, **ours, "HYPOTHESIS_PROFILE": profile, "PATH": tools.path()}


def bench(*arguments: object) -> list[str]:
    """A command of the benchmark."""
    return [sys.executable, "-m", "bench", *map(str, arguments)]


def _build(device: Device, out: Path) -> list[list[str]]:
    return [[sys.executable, "setup.py", "build_ext", "--inplace"]]


def _build_environment(device: Device) -> dict[str, str]:
    """For this GPU alone, which takes a fraction of the time that all take; the CPU's kernels are of no use here."""
    options = f"-DDIVNORM_CUDA=on -DDIVNORM_CUDA_ARCHS={device.arch} -DDIVNORM_INSTRUCTION_SETS=baseline"
    return {"CMAKE_ARGS": f"{options} {os.environ.get('CMAKE_ARGS', '')}".strip()}


def _built(device: Device) -> bool:
    archs = getattr(cuda.library, "cuda_archs", "").split()
    return f"sm_{device.arch}" in archs


def _pytest(device: Device, out: Path, *options: str, parallel: bool = True) -> list[str]:
    """Compiling for Triton takes most of the time, so side by side."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "passed", "--passed", str(out / PASSED)]
    if find_spec("pytest_timeout"):
        command += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    if parallel and find_spec("xdist"):
        command += ["--numprocesses", str(device.jobs), "--dist", "worksteal"]
    return [*command, *options]


def _tests(*options: str) -> Callable[[Device, Path], list[list[str]]]:
    files = ("tests/test_gpu.py", "tests/test_cuda.py", "tests/test_triton.py")
    return lambda device, out: [_pytest(device, out, *options, *files)]


def _largest(device: Device, out: Path) -> list[list[str]]:
    """Tens of gigabytes each: one after the other."""
    return [_pytest(device, out, "-m", "slow", "tests/test_gpu.py", parallel=False)]


def _timed(command: str, *options: object) -> Callable[[Device, Path], list[list[str]]]:
    def commands(device: Device, out: Path) -> list[list[str]]:
        seconds = os.environ.get("SECONDS_A_SETTING", "0.3")
        return [bench(command, "--device", "cuda", "--seconds", seconds, "--resume", *options, "--out", out)]

    return commands


def _sanitizer(tool: str, backend: str) -> Step:
    def commands(device: Device, out: Path) -> list[list[str]]:
        sanitizer = [tools.found("compute-sanitizer"), "--tool", tool, "--error-exitcode", "1"]
        return [[*sanitizer, sys.executable, "-m", "bench.sanitized", backend]]

    what = f"compute-sanitizer's {tool} on small calls of {backend}"
    return Step(f"{tool}-{backend}", what, 240, commands, lambda device: {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _profile(device: Device, out: Path) -> list[list[str]]:
    cases = shlex.split(os.environ.get("PROFILE", "64x512x28x28"))
    sections = [f"--section={name}" for name in PROFILED]
    ncu = [tools.found("ncu"), "--clock-control", "none", "--profile-from-start", "off", *sections]
    return [[*ncu, sys.executable, "-m", "bench.profiled", *cases]]


def _tune(device: Device, out: Path) -> list[list[str]]:
    what = shlex.split(os.environ.get("TUNE", ""))
    return [bench("tune", "--jobs", device.jobs, "--install", "--out", out / "tuning", *what)]


def _train(device: Device, out: Path) -> list[list[str]]:
    """Three runs at a time: one alone does not fill a GPU."""
    if "DATA" not in os.environ:
        raise FileNotFoundError(
            "DATA: expected a folder with cifar-10-batches-bin, wikitext-2-small and super-resolution"
        )
    data, steps = Path(os.environ["DATA"]), os.environ.get("TRAIN_STEPS", "4000")
    experiments = (
        ("cifar", "cifar-10-batches-bin", "cifar-cnn"),
        ("text", "wikitext-2-small", "text-lstm"),
        ("superres", "super-resolution", "superres"),
    )
    options = ("--device", "cuda", "--jobs", 3, "--steps", steps)
    return [bench("train", name, "--data", data / of, *options, "--out", out / to) for name, of, to in experiments]


def _every() -> Iterator[Step]:
    chosen = [*chain(*(("--case", name) for name in STAGES)), "--dtype", "bfloat16", "--no-compile", "--no-sweep"]
    yield Step(
        "build", "the compiled module, for this GPU alone", 420, _build, _build_environment, there=_built, needed=True
    )
    yield Step(
        "facts",
        "old kernels and new ones, clusters at once, kernels' times, memory traffic: what the next work hangs on",
        240,
        lambda device, out: [bench("gpu-check", "facts", "--out", out)],
    )
    yield Step("tests-first", "tests of every kind on the device", 300, _tests("-k", FIRST))
    yield Step("bench-first", "ResNet-50's stages in bfloat16", 240, _timed("run", *chosen))
    yield from (_sanitizer(tool, "cuda") for tool in SANITIZERS[:2])
    yield Step("tests", "all other tests on the device", 450, _tests())
    yield Step("bench", "the suite gpu-targets, and what falls short", 450, _timed("run", "--suite", "gpu-targets"))
    yield from (_sanitizer(tool, "triton") for tool in SANITIZERS[:2])
    yield from (_sanitizer(tool, backend) for tool in SANITIZERS[2:] for backend in ("cuda", "triton"))
    yield Step("layers", "layers against torch's", 450, _timed("layers"))
    yield Step("largest", "more than 2^31 elements", 300, _largest)
    yield Step("profile", "kernels of PROFILE='64x512x28x28 ...' under Nsight Compute", 450, _profile, asked_for=True)
    yield Step("tune", "the backends' tables, into the package; TUNE='--backend cuda ...'", 450, _tune, asked_for=True)
    yield Step("train", "the experiments on DATA=..., TRAIN_STEPS each", 450, _train, asked_for=True)


STEPS = {step.name: step for step in _every()}
