"""The check on a GPU, step by step, on a machine without one."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from time import monotonic, sleep

import pytest
import torch
from bench_command import run
from process import ROOT

from bench.check import command, record, running, steps, tools
from bench.check.record import CUT_OFF, DONE, FAILED, Record
from bench.options import GO_ON

pytestmark = [
    pytest.mark.usefixtures("torchs_defaults"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU where there is none"),
]
DEVICE = steps.Device("a GPU", "90", 80 << 30)


def pytest_of(folder, text, *options, code=0):
    """What pytest says of a file with this text."""
    (folder / "test_it.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        ROOT / "pyproject.toml",
        "--rootdir",
        folder,
        "-p",
        "no:cacheprovider",
    ]
    command += [*options, folder / "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


THREE = """
import os
import pytest

@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_it(name):
    open("ran", "a").write(name)
    if name == os.environ.get("KILLS") and not os.path.exists("killed"):
        open("killed", "w")
        os._exit(1)
    assert name != os.environ.get("FAILS")
"""


@pytest.mark.parametrize("processes", [(), ("--numprocesses", "1")], ids=["alone", "xdist"])
def test_what_passed_is_left_out_of_the_next_run(processes, tmp_path, monkeypatch):
    """What failed is not; and where all have passed, a run has nothing to do, which is no failure."""
    options = ("-p", "passed", "--passed", "passed", *processes)
    monkeypatch.setenv("FAILS", "b")
    assert "1 failed, 2 passed" in pytest_of(tmp_path, THREE, *options, code=1)
    assert (tmp_path / "passed").read_text().splitlines() == ["test_it.py::test_it[a]", "test_it.py::test_it[c]"]
    monkeypatch.delenv("FAILS")
    pytest_of(tmp_path, THREE, *options)
    pytest_of(tmp_path, THREE, *options)
    assert (tmp_path / "ran").read_text() == "abcb"


def test_a_test_that_kills_its_process_takes_nothing_from_the_others(tmp_path, monkeypatch):
    """The process that takes its place leaves out what it did, though the file names more by then."""
    monkeypatch.setenv("KILLS", "b")
    output = pytest_of(tmp_path, THREE, "-p", "passed", "--passed", "passed", "--numprocesses", "1", code=1)
    assert "1 failed, 2 passed" in output
    assert (tmp_path / "ran").read_text() == "abc"


def test_memory_is_given_back_to_other_processes_after_every_test(tmp_path):
    text = """
import torch
emptied = []
torch.cuda.is_initialized = lambda: True
torch.cuda.empty_cache = lambda: emptied.append(1)

def test_one():
    assert emptied == []

def test_two():
    assert emptied == [1]
"""
    assert "2 passed" in pytest_of(tmp_path, text, "-p", "conftest")


def python(code):
    """A step's commands: one of Python's, that may speak of the folder for results as ``out``."""
    lead = "import os, sys, time; from pathlib import Path; out = Path(sys.argv[1]); "
    return lambda device, out: [[sys.executable, "-c", lead + code, str(out)]]


def step(name, code, limit=60, **more):
    return steps.Step(name, f"what {name} does", limit, python(code), **more)


@pytest.fixture
def check(monkeypatch, tmp_path):
    """The command line on a device, with these steps; what it prints, in lines as long as they are."""
    monkeypatch.setattr(steps, "device", lambda: DEVICE)
    monkeypatch.setattr(steps, "sources", lambda: "abc")
    monkeypatch.setattr(command, "width", lambda: 400)
    monkeypatch.delenv(record.OUT, raising=False)

    def call(*arguments, code=0):
        return run("gpu-check", *arguments, "--out", tmp_path / "results", code=code)

    def install(*chosen):
        named = {one.name: one for one in chosen}
        for module in (command, record):
            monkeypatch.setattr(module, "STEPS", named)
        return call

    return install


def states(tmp_path):
    return {name: of.state for name, of in Record.read(tmp_path / "results").outcomes.items()}


def test_steps_run_in_turn_and_a_failure_takes_nothing_from_the_others(check, tmp_path):
    call = check(
        step("one", "print('fine')"),
        step("two", "print('bad luck\\n────'); sys.exit(3)"),
        step("three", "print('at last')"),
        step("four", "print('unasked')", asked_for=True),
    )
    assert re.search(r"3 to run, one first: bench/gpu_check.sh run --out", call("status"))
    output = call("run", code=1)
    assert output.index("== one: done") < output.index("== two: failed") < output.index("== three: done")
    assert "bad luck" in output
    assert "unasked" not in output
    assert states(tmp_path) == {"one": DONE, "two": FAILED, "three": DONE}
    after = call("status")
    assert "nothing is left but what failed" in after
    assert re.search(r"two failed: .*/two.log; once more: bench/gpu_check.sh run two --out", after)
    assert re.search(r"two +│ what two does +│ failed +│ \d+ +│ bad luck", after)
    assert "bad luck" in (tmp_path / "results" / "two.log").read_text()
    assert "== " not in call("run"), "what ran to its end does not run again"
    assert "unasked" in call("run", "four")
    assert "expected one of one, two, three, four" in run("gpu-check", "run", "five", code=2)


def test_a_step_ends_at_its_limit_with_all_that_it_started_and_comes_again(check, tmp_path):
    """And what it wrote so far is there for the next run."""
    child = "import time; time.sleep(3); open('outlived', 'w')"
    code = f"os.chdir(out); import subprocess; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    code += "n = len(list(out.glob('part*'))); (out / f'part{n}').touch(); time.sleep(0 if n else 60)"
    call = check(step("slow", code, limit=2), step("quick", "pass"))
    begin = monotonic()
    output = call("run")
    assert monotonic() - begin < 20
    assert "== slow: cut off" in output
    assert "== quick: done" in output
    assert "1 to run, slow first: " in output
    sleep(3)
    assert not (tmp_path / "results" / "outlived").exists()
    assert "== slow: done" in call("run")
    assert states(tmp_path) == {"slow": DONE, "quick": DONE}
    assert (tmp_path / "results" / "part1").exists()


def test_a_step_is_of_the_callers_session(check):
    """Machines end what a command leaves behind by that."""
    check(step("one", f"sys.exit(os.getsid(0) != {os.getsid(0)})"))("run")


def test_a_step_that_does_not_want_to_end_is_killed(check, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "GRACE", 0.5)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    begin = monotonic()
    assert "== deaf: cut off" in check(step("deaf", code, limit=2))("run")
    assert monotonic() - begin < 20


def test_no_step_begins_or_goes_on_when_the_time_is_up(check, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "LEAST_SECONDS", 1.5)
    call = check(step("long", "time.sleep(60)"), step("next", "pass"))
    begin = monotonic()
    call("run", "--minutes", 3 / 60)
    assert monotonic() - begin < 20
    assert states(tmp_path) == {"long": CUT_OFF}


def test_a_step_whose_run_was_killed_comes_again(check, tmp_path):
    """The machine went away: what the file says of the step is that it was running."""
    call = check(step("one", "kept = (out / 'check.json').read_text(); (out / 'seen').write_text(kept)"))
    call("run")
    seen = (tmp_path / "results" / "seen").read_text()
    (tmp_path / "results" / "check.json").write_text(seen)
    assert states(tmp_path) == {"one": CUT_OFF}
    assert "1 to run, one first" in call("status")


def test_a_command_that_another_process_is_to_go_on_with_is_run_again_at_once(check, tmp_path):
    """As a benchmark after a failure inside a capture."""
    code = f"n = len(list(out.glob('run*'))); (out / f'run{{n}}').touch(); sys.exit({GO_ON} if n < 2 else 0)"
    assert "== bench: done" in check(step("bench", code))("run")
    assert len(list((tmp_path / "results").glob("run*"))) == 3


def test_a_step_without_its_tool_fails_and_says_so(check, tmp_path):
    def commands(device, out):
        return [[tools.found("no-such-tool")]]

    call = check(steps.Step("tool", "", 60, commands), step("next", "pass"))
    assert "no-such-tool is neither on the PATH nor in /usr/local/cuda/bin" in call("run", code=1)
    assert states(tmp_path) == {"tool": FAILED, "next": DONE}


def test_nothing_runs_without_what_it_needs(check, tmp_path):
    """Tests of a module that was not built would pass over what is missing."""
    mended = tmp_path / "mended"
    build = step("build", f"sys.exit(not Path({str(mended)!r}).exists())", needed=True)
    call = check(build, step("tests", "pass"))
    for _ in range(2):
        call("run", code=1)
        assert states(tmp_path) == {"build": FAILED}
    mended.touch()
    call("run")
    assert states(tmp_path) == {"build": DONE, "tests": DONE}
    assert [one.name for one in steps.STEPS.values() if one.needed] == ["build"]


def test_what_a_step_made_is_made_again_where_it_is_gone(check, tmp_path):
    """The record came back to a new machine, the compiled module did not."""
    built = tmp_path / "module"
    build = step("build", f"Path({str(built)!r}).touch()", there=lambda device: built.exists())
    call = check(build, step("tests", "pass"))
    call("run")
    assert "== " not in call("run")
    built.unlink()
    output = call("run")
    assert "== build: done" in output
    assert "== tests" not in output


def test_results_are_of_one_gpu_and_of_the_same_kernels(check, tmp_path, monkeypatch):
    call = check(step("one", "pass"))
    call("run")

    def refusal():
        return re.sub(r"[\s│]+", " ", call("run", code=2))

    monkeypatch.setattr(steps, "sources", lambda: "def")
    assert "got results of sources abc, expected def, as here" in refusal()
    monkeypatch.setattr(steps, "sources", lambda: "abc")
    monkeypatch.setattr(steps, "device", lambda: replace(DEVICE, name="another"))
    assert "got results of gpu a GPU, expected another, as here" in refusal()
    monkeypatch.setattr(steps, "device", lambda: None)
    assert "torch finds no GPU here" in refusal()


def test_sources_are_those_of_the_package_and_its_kernels(monkeypatch, tmp_path):
    for folder in ("csrc/cuda", "divnorm_kernels/backends"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("CMakeLists.txt", "csrc/cuda/a.h", "divnorm_kernels/backends/a.json", "divnorm_kernels/a.py"):
        (tmp_path / file).write_text("a")
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    seen = {steps.sources()}
    for file in ("CMakeLists.txt", "csrc/cuda/a.h", "divnorm_kernels/backends/a.json", "divnorm_kernels/a.py"):
        (tmp_path / file).write_text("b")
        seen.add(steps.sources())
    assert len(seen) == 5
    for made in ("divnorm_kernels/_native.so", "divnorm_kernels/not_built.txt"):
        (tmp_path / made).write_text("by a build")
    assert steps.sources() in seen


def test_results_are_packed_after_every_step_where_they_are_to_leave_the_machine(check, tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv(record.OUT, str(place))
    packed = f"assert os.listdir({str(place)!r}) == ['gpu-check.tar.gz']"
    call = check(step("one", "print('fine')"), step("two", packed))
    call("run")
    with tarfile.open(place / "gpu-check.tar.gz") as archive:
        archive.extractall(tmp_path / "home", filter="data")
    assert os.listdir(place) == ["gpu-check.tar.gz"]
    home = Record.read(tmp_path / "home" / "results")
    assert {name: of.state for name, of in home.outcomes.items()} == {"one": DONE, "two": DONE}
    assert "fine" in (tmp_path / "home" / "results" / "one.log").read_text()


def test_every_step_has_its_commands_and_ends_within_eight_minutes(monkeypatch, tmp_path):
    """On a machine with all tools; a step of tests or measurements goes on where the one before it was cut off."""
    monkeypatch.setattr(tools, "found", lambda name: f"/tools/{name}")
    monkeypatch.setenv("DATA", str(tmp_path))
    commands = {name: one.commands(DEVICE, tmp_path) for name, one in steps.STEPS.items()}
    assert all(one.limit < 8 * 60 for one in steps.STEPS.values())
    assert all(commands.values())
    text = {name: "\n".join(" ".join(of) for of in several) for name, several in commands.items()}
    for name in ("tests-first", "tests", "largest"):
        assert f"--passed {tmp_path}/passed.txt" in text[name]
    for name in ("bench-first", "bench", "layers"):
        assert "--resume" in text[name]
        assert f"--out {tmp_path}" in text[name]
    assert text["memcheck-cuda"].startswith("/tools/compute-sanitizer --tool memcheck --error-exitcode 1 ")
    assert text["memcheck-cuda"].endswith("-m bench.sanitized cuda")
    assert "-DDIVNORM_CUDA_ARCHS=90 " in steps.STEPS["build"].environment(DEVICE)["CMAKE_ARGS"]
    order = list(steps.STEPS)
    assert order[:4] == ["build", "facts", "tests-first", "bench-first"]


def test_the_options_of_the_benchmarks_steps_are_there(monkeypatch, tmp_path):
    """All but the device is checked before it is asked for."""
    for name in ("facts", "bench-first", "bench", "layers"):
        for of in steps.STEPS[name].commands(DEVICE, tmp_path):
            assert of[1:3] == ["-m", "bench"]
            assert "got 'cuda', but torch finds no GPU here" in re.sub(r"[\s│]+", " ", run(*of[3:], code=2))


def test_parallel_tests_fit_the_memory(monkeypatch):
    """Each with tensors, context and oracle of its own; and no more of them than processors."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert DEVICE.jobs == 10
    assert replace(DEVICE, memory=141 << 30).jobs == 16
    assert replace(DEVICE, memory=4 << 30).jobs == 1
    (tests,) = steps.STEPS["tests"].commands(DEVICE, ROOT)
    assert tests[tests.index("--numprocesses") + 1] == "10"


def test_tools_are_found_off_the_path(monkeypatch, tmp_path):
    """By steps, and by what they run: cmake looks for nvcc on the PATH."""
    place = tmp_path / "cuda" / "bin"
    place.mkdir(parents=True)
    (place / "nvcc").write_text("#!/bin/sh\necho a compiler\n")
    (place / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setattr(tools, "PLACE", place)
    assert tools.found("nvcc") == str(place / "nvcc")
    assert tools.said("nvcc") == "a compiler\n"
    assert shutil.which("nvcc", path=steps.environment()["PATH"]) == str(place / "nvcc")
    assert tools.found("sh") == "/bin/sh", "what is on the PATH comes first"
    monkeypatch.setenv("PATH", f"{place}:/bin")
    assert steps.environment()["PATH"] == f"{place}:/bin"
    (place / "nvcc").write_text("#!/bin/sh\necho no license >&2\nexit 3\n")
    with pytest.raises(RuntimeError, match="nvcc ended with 3: no license"):
        tools.said("nvcc")
