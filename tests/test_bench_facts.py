"""What the first minutes on a GPU are to tell, found on the emulated device and under Triton's interpreter."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import emulated
import pytest
import torch
from bench_command import run

from bench import gpu
from bench.cases import CASES, FORMATS, Case, Setting
from bench.check import command, facts, tools
from bench.options import GO_ON
from bench.tuning import calls, knobs, search
from divnorm_kernels.backends import cuda
from divnorm_kernels.backends.cuda import table as strategies
from divnorm_kernels.backends.triton import tiles

pytestmark = [
    pytest.mark.usefixtures("torchs_defaults"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU where there is none"),
]
WHICH = ("small", "float32", "contiguous")


@pytest.fixture
def device(monkeypatch):
    """A device whose launches take as many microseconds as they have items, where that is known, else one."""
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 0)
    monkeypatch.setattr(facts, "DEVICE", "cpu")
    monkeypatch.setitem(CASES, "small", Case("small", (6, 40, 9, 10), "a test"))
    properties = SimpleNamespace(multi_processor_count=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with emulated.backend():
        yield


def test_the_second_pass_is_a_launch_of_its_own(device, monkeypatch):
    """Its time an item is that of the longest launch: the first ones have no chunk to pass over yet."""
    from divnorm_kernels.backends.triton.launch import Plan

    launched = []
    monkeypatch.setattr(Plan, "_launch", lambda plan, items, arguments, aligned: launched.append((plan, items)))

    def launches(run):
        del launched[:]
        run()
        plan = launched[0][0]
        assert all(of is plan for of, _ in launched)
        stages = len(plan.order.runs)
        assert not plan.ordered
        assert stages > 2
        taken = [(500.0 if i % stages == 0 else 100.0) + i / 100 for i in range(len(launched))]
        last = 100 + (plan.order.steps * stages - 1) / 100
        seen.append((plan.order.runs[-1][1], last))
        return [("fill", 1e6), *((plan.kernel.fn.__name__, t) for t in taken)]

    seen = []
    monkeypatch.setattr(facts, "launches", launches)
    for direction in calls.DIRECTIONS:
        found = facts.second_pass(WHICH, direction)
        items, last = seen[-1]
        assert (found["items"], found["launch"]) == (items, pytest.approx(last))
        assert found["an item on one multiprocessor"] == pytest.approx(last * 10 / items)
    assert tiles.ROWS[0]["arch"] == "interpreter", "the table is as it was"


@pytest.mark.parametrize("direction", [*calls.DIRECTIONS, "forward with l1"])
def test_kernels_are_timed_by_name_and_place(device, direction, monkeypatch):
    """The median of several calls, on copies in turn, each the whole call."""
    l1s, seen, before = [], [], cuda.forward

    def forward(g, x, weight, bias, sigma, with_l1):
        l1s.append(with_l1)
        return before(g, x, weight, bias, sigma, with_l1)

    def launches(run):
        result = run()
        seen.append(result.data_ptr())
        return [("main", float(len(seen) ** 2)), ("finish", 2.0), ("main", 3.0)]

    monkeypatch.setattr(cuda, "forward", forward)
    monkeypatch.setattr(facts, "launches", launches)
    assert facts.kernels_of(WHICH, direction) == {"1 main": 9.0, "2 finish": 2.0, "3 main": 3.0}
    assert len(seen) == facts.RUNS == 5
    assert l1s[-1] == (direction == "forward with l1")


def test_kernels_names_are_short():
    assert facts.short("void divnorm::(anonymous namespace)::finish<float>(divnorm::Arguments)") == "finish"
    assert facts.short("void divnorm::cuda::staged_forward<__nv_bfloat16, true>(Arguments)") == "staged_forward"
    assert facts.short("forward_kernel") == "forward_kernel"
    assert facts.short("Memset (Device)") == "Memset"


def test_launches_are_those_of_the_device_in_order(monkeypatch):
    def event(name, begin, end, device=torch.autograd.DeviceType.CUDA):
        span = SimpleNamespace(start=begin, elapsed_us=lambda: end - begin)
        return SimpleNamespace(name=name, device_type=device, time_range=span)

    events = [event("b", 7, 9), event("host", 0, 50, torch.autograd.DeviceType.CPU), event("void n::a<int>(int)", 1, 4)]

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *_):
            assert done == ["run", "synchronized"]

    done = []
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronized"))
    assert facts.launches(lambda: done.append("run")) == [("a", 3), ("b", 2)]


def test_cluster_sizes_are_those_that_tuning_tries(device, monkeypatch):
    """0, the two-pass kernels, against what the table takes."""
    monkeypatch.setattr(facts, "RESIDENT", WHICH)

    def gpu_round(run, rotation):
        return lambda: (1.5 if strategies.ROWS[0]["cluster"] == 0 else 1.0, 0.0)

    monkeypatch.setattr(search, "gpu_round", gpu_round)
    emulation = facts.cluster_sizes("forward", 0.001)
    assert emulation["present"] == 16
    assert emulation["16"] == pytest.approx(1.0)
    assert set(emulation) >= {"present", "16", "0", "4", "8"}


OLD, NEW = ("pipeline 0, finish_inside 0", "pipeline 0, finish_inside 16"), ("pipeline 512, finish_inside 0",)


@pytest.fixture
def stages(device, monkeypatch):
    """Two stages, of which one has no place in a pipeline, and slots of one size; time is what the test says."""
    monkeypatch.setitem(CASES, "odd", Case("odd", (6, 3, 5, 5), "no whole sixteen bytes"))
    monkeypatch.setitem(CASES, "aligned", Case("aligned", (6, 16, 8, 8), "as bulk copies want it"))
    monkeypatch.setattr(facts, "STAGES", ("odd", "aligned"))
    tunable = knobs.TUNABLE["cuda"]
    monkeypatch.setitem(knobs.TUNABLE, "cuda", replace(tunable, knobs={**tunable.knobs, "pipeline": (0, 512)}))

    def install(seconds):
        def gpu_round(run, rotation):
            row, form = strategies.ROWS[0], "contiguous" if run(0).is_contiguous() else "channels_last"
            return lambda: (seconds(row, form), 0.0)

        monkeypatch.setattr(search, "gpu_round", gpu_round)

    return install


@pytest.mark.parametrize(("slower", "kept"), [(1.5, 512), (2.5, 0)])
def test_old_and_new_kernels_are_compared_in_one_run(stages, slower, kept):
    """A new kernel is chosen for the mean of all stages, also of those that it cannot take."""
    stages(lambda row, form: 2 * {"contiguous": 0.5, "channels_last": slower}[form] if row["pipeline"] else 2.0)
    found = facts.old_and_new("float32", "backward", 0.001)
    names = {case: {f: f"{case} float32 {f} window=5" for f in FORMATS} for case in facts.STAGES}
    assert set(found["calls"]) == {name for of in names.values() for name in of.values()}
    for form, ratio in (("contiguous", 0.5), ("channels_last", slower)):
        aligned = found["calls"][names["aligned"][form]]
        assert (set(aligned), len(aligned)) == ({*OLD, *NEW, "pipeline 512, finish_inside 16"}, 4)
        assert aligned == {name: ratio if "512" in name else 1.0 for name in aligned}
        takes = found["takes"][names["aligned"][form]]
        assert takes == {name: "pipelined" if "512" in name else "single-block" for name in aligned}
        assert set(found["calls"][names["odd"][form]].values()) == {1.0}
        assert set(found["takes"][names["odd"][form]].values()) == {"single-block"}
    assert found["means"][NEW[0]] == pytest.approx((0.5 * slower) ** 0.25)
    assert found["the table should have"] == {"pipeline": kept, "finish_inside": 0}
    assert strategies.ROWS[0]["arch"] == "sm_120", "the table is as it was"


def test_new_kernels_are_not_chosen_for_less_than_the_noise_or_where_they_fail(stages, monkeypatch):
    stages(lambda row, form: 0.985 if row["pipeline"] else 1.0)
    found = facts.old_and_new("float32", "forward", 0.001)
    assert list(found["means"]) == [OLD[0], *NEW], "forward sums nothing behind its kernel"
    assert found["the table should have"] == {"pipeline": 0, "finish_inside": 0}
    stages(lambda row, form: 0.5 if row["pipeline"] else 1.0)
    monkeypatch.setattr(calls.Prepared, "wrong", lambda self, got, direction: strategies.ROWS[0]["pipeline"] == 512)
    found = facts.old_and_new("float32", "forward", 0.001)
    assert list(found["means"]) == [OLD[0]]
    assert found["out"][NEW[0]].startswith("wrong result on aligned")
    assert found["the table should have"] == {"pipeline": 0, "finish_inside": 0}


def test_old_and_new_kernels_come_before_all_else_that_is_timed():
    names = list(facts.facts(0.1))
    assert names[0] == "versions"
    assert names[1:5] == [
        f"old and new kernels, {dtype} {direction}"
        for dtype in ("bfloat16", "float32")
        for direction in calls.DIRECTIONS
    ]


def csv_of(values):
    """Nsight Compute's text for kernels with (read, written) bytes, a metric a line, among what else is printed."""
    head = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    lines = ["==PROF== Connected to process 1", head]
    for i, (name, read, written) in enumerate(values):
        for metric, value in (("dram__bytes_read.sum", read), ("dram__bytes_write.sum", written), ("other", 7)):
            lines.append(f'"{i}","1","void divnorm::{name}<float, false>(Arguments)","","{metric}","byte","{value:,}"')
    return "\n".join(lines)


def test_traffic_is_that_of_the_two_pass_kernels_over_the_least(monkeypatch):
    x = 4 * torch.Size(CASES["64x256x56x56"].shape).numel()
    stem = 4 * torch.Size(CASES["64x64x112x112"].shape).numel()
    values = [("staged_backward", 3 * x + n, x) for n in range(4)] + [("finish", 1, 1)]
    values += [("staged_forward", 2 * stem, stem + n) for n in range(4)]
    values += [("staged_backward", 2 * stem, stem)] * 4
    seen = []

    def said(name, *arguments):
        seen.append(arguments)
        arguments[arguments.index("--log-file") + 1].write_text(csv_of(values))
        return ""

    monkeypatch.setattr(tools, "said", said)
    found = facts.traffic()
    assert seen[0][-2:] == ("-m", "bench.check.facts")
    assert len(found) == 12
    first = found["64x256x56x56 float32 contiguous backward, cache_share 0.4"]
    assert first == {"kernel": "staged_backward", "read": 3 * x, "written": x, "over the least": pytest.approx(4 / 3)}
    last = found["64x64x112x112 float32 contiguous forward, cache_share 0.05"]
    assert last["written"] == stem + 3
    assert last["over the least"] == pytest.approx(1.5)
    del values[-1]
    with pytest.raises(RuntimeError, match="ncu profiled 11 two-pass kernels, expected 12"):
        facts.traffic()


def test_what_is_profiled_are_two_pass_kernels_at_every_share(device, monkeypatch):
    """One run between the profiler's start and stop, planned and warmed before."""
    taken, events = [], []

    def runner(self, backend, direction):
        row = strategies.ROWS[0]
        taken.append((direction, row["direction"], row["cluster"], row["cache_share"]))
        return lambda i: events.append("run")

    monkeypatch.setattr(facts, "TWO_PASS", ((*WHICH, "backward"), (*WHICH, "forward")))
    monkeypatch.setattr(calls.Prepared, "runner", runner)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: events.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: events.append("stop"))
    facts.run_two_passes()
    assert taken == [(d, d, 0, share) for d in ("backward", "forward") for share in facts.CACHE_SHARES]
    assert events == ["start", "run", "stop"] * 8


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_clusters_are_counted_by_a_program_that_compiles(monkeypatch):
    """Without a driver it says so, and the compiler's word is the command's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(RuntimeError, match="clusters ended with 1: cudaGetDeviceProperties: "):
        facts.clusters()


def test_versions_are_told_as_far_as_they_can_be_found(monkeypatch):
    def said(name, *arguments):
        if name == "ncu":
            raise FileNotFoundError("ncu is nowhere")
        return f"{name}\nBuild 1\n"

    monkeypatch.setattr(tools, "said", said)
    found = facts.versions()
    assert (found["nvcc"], found["ncu"], found["torch"]) == ("Build 1", "ncu is nowhere", torch.__version__)
    assert set(found["backends missing"]) >= {"cuda"}


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Three facts on a device, found by functions of the test's; the command, and what facts.json has."""
    known, found = {}, []

    def fact(name):
        def find():
            found.append(name)
            return known[name]()

        return find

    monkeypatch.setattr(facts, "facts", lambda seconds: {name: fact(name) for name in known})
    monkeypatch.setattr(command, "device_named", lambda given: given)
    monkeypatch.setattr(command, "describe", lambda device: {"gpu": "a GPU"})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(*arguments, code=0):
        del found[:]
        output = run("gpu-check", "facts", "--out", tmp_path, *arguments, code=code)
        return output, list(found), json.loads((tmp_path / "facts.json").read_text())["facts"]

    return known, call


def failing(error):
    def find():
        raise error

    return find


def test_a_fact_that_fails_takes_nothing_from_the_others_and_is_tried_again(few):
    known, call = few
    known |= {"a": lambda: {"x": 1}, "b": failing(FileNotFoundError("no ncu")), "c": lambda: {"y": 2}}
    output, found, figures = call(code=1)
    assert found == ["a", "b", "c"]
    assert figures == {"a": {"x": 1}, "b": {"failure": "FileNotFoundError: no ncu", "spoilt": False}, "c": {"y": 2}}
    assert 'c: {"y": 2}' in output
    known["b"] = lambda: {"z": 3}
    assert call()[1:] == (["b"], figures | {"b": {"z": 3}})
    assert call()[1] == []
    known["a"] = lambda: {"x": 2}
    assert call("--fact", "a")[1:] == (["a"], {"a": {"x": 2}, "b": {"z": 3}, "c": {"y": 2}})


def test_a_fact_that_spoils_the_process_ends_it_and_the_next_goes_on_behind(few):
    known, call = few
    known |= {"a": lambda: {"x": 1}, "b": failing(gpu.Spoilt("in a capture")), "c": lambda: {"y": 2}}
    assert call(code=GO_ON)[1] == ["a", "b"]
    output, found, figures = call(code=1)
    assert found == ["c"]
    assert figures["b"] == {"failure": "Spoilt: in a capture", "spoilt": True}
    assert "in a capture" in output


def test_every_fact_names_cases_and_directions_that_exist():
    known = facts.facts(0.1)
    assert len(known) == 2 + 4 + len(facts.FINISHED) + 1 + 2 + 2 * len(facts.IN_STAGES) + 1
    for which in (*facts.FINISHED, *facts.TWO_PASS, facts.WITH_L1, facts.RESIDENT, *facts.IN_STAGES):
        assert isinstance(facts.call(*which[:3]).setting, Setting)
        assert set(which[3:]) <= set(calls.DIRECTIONS)
