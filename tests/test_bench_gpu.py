"""How the benchmark measures on a GPU, on stand-ins for one: steps, copies, results that are kept, failures."""

import json
import weakref
from contextlib import contextmanager
from dataclasses import replace
from timeit import timeit

import pytest
import torch
from bench_command import run

from bench import cli, family, gpu, measure, running
from bench.options import GO_ON
from bench.subjects import OURS, Subject

pytestmark = [
    pytest.mark.usefixtures("torchs_defaults"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU where there is none"),
]


class Graph:
    """In the place of a CUDA graph: what is captured runs as it would then, and once more for every replay."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


class Stream:
    """A stream that notes whom it waits for."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch):
    """Streams and graphs of no device; what happens to them, in order."""
    noted = []

    @contextmanager
    def on(stream):
        noted.append(f"on {stream.name}")
        yield
        noted.append(f"off {stream.name}")

    @contextmanager
    def graph(graph):
        noted.append("capture")
        yield
        noted.append("captured")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream("side", noted))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current", noted))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 1 << 20)
    return noted


def test_warm_up_waits_for_the_current_stream_and_the_capture_for_the_warm_up(log, monkeypatch):
    monkeypatch.setattr(gpu, "elapsed", lambda replay: 1.0)
    gpu.captured(lambda i: log.append(f"step {i}"), 2)
    before = ["side waits for current", "on side", "step 0", "step 1", "step 2", "off side", "current waits for side"]
    assert log == [*before, "capture", "step 0", "step 1", "captured"]


@pytest.mark.parametrize(
    ("seconds", "rotation", "expected"),
    [(6e-6, 2, 200), (6e-6, 40, 200), (1e-4, 2, 30), (1e-4, 40, 40), (1.0, 2, 2), (1.0, 40, 40)],
)
def test_a_graph_has_some_200_short_steps_and_never_less_than_go_round_the_copies(
    log, seconds, rotation, expected, monkeypatch
):
    """Timed as a graph, without what a call costs the host; to begin a graph costs the time of a step of 6 us."""
    taken = []
    monkeypatch.setattr(gpu, "elapsed", lambda replay: 6e-6 + seconds * len(taken))

    def step(i):
        if i == 0:
            taken.clear()
        taken.append(i)

    _, steps = gpu.captured(step, rotation)
    assert steps == len(taken) == expected
    assert taken == list(range(expected))


def test_results_of_as_many_steps_are_kept_as_there_are_copies(log, monkeypatch):
    """Memory of a result that is let go of is the next one's, and would never leave the cache."""
    monkeypatch.setattr(gpu, "elapsed", lambda replay: 1e-4)
    made, alive = [], []

    def step(i):
        if i == 0:
            del made[:], alive[:]
        result = torch.empty(1)
        alive.append([j for j, of in enumerate(made) if of() is not None])
        made.append(weakref.ref(result))
        return result

    _, steps = gpu.captured(step, 5)
    assert steps == 150
    assert alive[5:] == [list(range(i - 5, i)) for i in range(5, 150)]


def test_rounds_rotate_over_copies_and_keep_y_and_dx(log, monkeypatch):
    """Work is run where a GPU would replay a graph of it; no memory of a round's results is used again."""
    rotations, kept = [], []

    def captured(step, rotation):
        rotations.append(rotation)
        return lambda: kept.append([step(i) for i in range(8)]), 8

    monkeypatch.setattr(gpu, "captured", captured)
    monkeypatch.setattr(gpu, "elapsed", lambda replay: timeit(replay, number=1))
    x, dy = torch.randn(2, 8, 128, 128, requires_grad=True), torch.randn(2, 8, 128, 128)
    assert len(gpu.copies(x)) == 4
    seen = []

    def function(x):
        seen.append(x.data_ptr())
        return x * 2

    forward, backward = gpu.round_of(Subject("double", "", function, []), x, dy)()
    assert forward > 0
    assert backward >= 0
    assert len(set(seen[:8])) == len(set(seen[8:])) == 4
    alone, both = kept
    assert len({y.data_ptr() for y in alone}) == 8
    assert len({t.data_ptr() for pair in both for t in pair}) == 16
    assert all(not t.requires_grad for pair in both for t in pair), "nothing else is kept"
    copy, nothing = gpu.copy_round(x)()
    assert copy > 0
    assert nothing == 0
    assert rotations == [4, 4, 4]


def failing_step(i):
    raise torch.OutOfMemoryError("out of memory")


def test_a_failure_inside_a_capture_spoils_the_process(log):
    with pytest.raises(gpu.Spoilt, match="OutOfMemoryError: out of memory") as caught:
        gpu.recorded(failing_step, 2, 2)
    assert gpu.spoilt(caught.value)
    assert not gpu.spoilt(torch.OutOfMemoryError("out of memory")), "before a capture nothing is left behind"


def test_an_error_that_stays_with_the_device_spoils_the_process(log, monkeypatch):
    def synchronize():
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert gpu.spoilt(RuntimeError("whatever said it first"))


@pytest.fixture
def spoiling(monkeypatch):
    """Lets a layer's capture fail, in settings of this dtype, as memory does; returns what was tried."""
    tried, before = [], measure.timing.round_of

    def install(name, dtype):
        def round_of(subject, x, dy):
            tried.append((subject.name, x.dtype))
            if (subject.name, x.dtype) == (name, dtype):
                raise gpu.Spoilt("OutOfMemoryError: out of memory")
            return before(subject, x, dy)

        monkeypatch.setattr(measure.timing, "round_of", round_of)
        monkeypatch.setattr(measure.timing, "spoilt", lambda error: isinstance(error, gpu.Spoilt))
        return tried

    return install


@pytest.mark.parametrize(("subject", "code"), [("GroupNorm", 0), (f"{OURS} cpu", 1)])
def test_after_it_the_run_ends_and_another_process_goes_on_without_the_subject(subject, code, tmp_path, spoiling):
    """What was measured stays, the setting is measured again, and what failed in it is a row."""
    tried = spoiling(subject, torch.float32)
    options = ("--case", "8x16x32x32", "--format", "contiguous", "--seconds", 0.01, "--no-compile", "--no-sweep")
    options += ("--dtype", "bfloat16", "--dtype", "float32", "--device", "cpu", "--resume", "--out", tmp_path)
    output = run("run", *options, code=GO_ON)
    assert "Spoilt: OutOfMemoryError: out of memory" in output
    assert tried[-1] == (subject, torch.float32)
    document = json.loads((tmp_path / "results.json").read_text())
    assert {row["dtype"] for row in document["rows"]} == {"bfloat16"}
    del tried[:]
    assert "was not measured everywhere: Spoilt: OutOfMemoryError" in run("run", *options, code=code)
    assert (subject, torch.float32) not in tried
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    found = {(row["subject"], row["dtype"]): row for row in rows}
    assert found[subject, "float32"]["times"] is None
    assert found["BatchNorm", "float32"]["times"]["both"] > 0
    assert found[subject, "bfloat16"]["times"]["both"] > 0


def test_a_sweep_goes_on_without_it_too(tmp_path, spoiling, monkeypatch):
    monkeypatch.setattr(cli, "SWEEP_WINDOWS", (3, 5))
    spoiling(f"{OURS} cpu", torch.float32)
    setting = running.Setting(family.Case("small", (2, 8, 9, 9), "a test"), "float32", "contiguous", 3)
    results = running.Results(tmp_path / "results.json", {}, "", {})
    plan = running.Plan([], [[setting]], set(), 0.01)

    def go():
        for _, step in running.steps(plan.without(results), results):
            step()

    with pytest.raises(measure.Ended) as caught:
        go()
    results.add(caught.value)
    go()
    assert [(row["times"], row["failure"]) for row in results.sweeps] == [
        (None, "Spoilt: OutOfMemoryError: out of memory")
    ]


def test_layers_go_on_without_it_too(tmp_path, spoiling, monkeypatch):
    monkeypatch.setattr(family, "PAIRS", (replace(family.PAIRS[0], shapes=((2, 8, 5, 6),)),))
    spoiling("ours", torch.float32)
    options = ("--seconds", 0.01, "--dtype", "float32", "--format", "contiguous", "--device", "cpu", "--resume")
    options += ("--out", tmp_path)
    for _ in range(2):
        assert "OutOfMemoryError" in run("layers", *options, code=GO_ON)
    assert "failed" in run("layers", *options, code=1)
    rows = json.loads((tmp_path / "layers.json").read_text())["rows"]
    assert [row["failure"] for row in rows] == ["Spoilt: OutOfMemoryError: out of memory"] * 2
