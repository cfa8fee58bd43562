"""Tuning of the GPU backends' tables: the search, its files, and the targets that a run is held against."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from timeit import timeit

import emulated
import pytest
import torch
from bench_command import run
from process import ROOT

from bench import gpu, profiled, targets
from bench.cases import Case, Setting
from bench.tuning import calls, command, knobs, search, tables
from divnorm_kernels.backends import cuda, preference
from divnorm_kernels.backends.cuda import table as strategies
from divnorm_kernels.backends.native import DTYPES
from divnorm_kernels.backends.triton import tiles

pytestmark = [
    pytest.mark.usefixtures("torchs_defaults"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU where there is none"),
]
SETTING = Setting(Case("small", (3, 8, 5, 6), "a test"), "float32", "contiguous", 0)
CALL = calls.Call(SETTING, "windows", (("window", 3),))
WHOLE = replace(CALL, fields="whole", options=(("window", "all"), ("groups", 2)))


@pytest.fixture
def device(monkeypatch):
    """The emulated device and Triton's interpreter, whose work is run where a GPU would replay a graph of it."""
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "captured", lambda step, rotation: (lambda: step(1), 1))
    monkeypatch.setattr(gpu, "elapsed", lambda replay: timeit(replay, number=1))
    with emulated.backend():
        for table in (strategies, tiles, preference):
            monkeypatch.setattr(table, "ROWS", table.ROWS)
        yield


@pytest.fixture
def timed_by(monkeypatch):
    """Lets the time of a candidate follow from the table's first row."""

    def install(seconds):
        def round_of(run, rotation):
            taken = seconds(strategies.ROWS[0])
            return lambda: (taken, 0.0)

        monkeypatch.setattr(search, "gpu_round", round_of)

    return install


NOT_TUNED = {"cuda": {"tile_positions"}, "triton": set()}
"""Entries that bound the memory of a block."""


@pytest.mark.parametrize("backend", knobs.TUNABLE)
def test_every_entry_of_a_table_is_tuned(backend):
    tunable = knobs.TUNABLE[backend]
    for row in tunable.table.ROWS:
        assert row.keys() - set(knobs.KEYS) == tunable.knobs.keys() | NOT_TUNED[backend]


def with_knobs(monkeypatch, **values):
    monkeypatch.setitem(knobs.TUNABLE, "cuda", replace(knobs.TUNABLE["cuda"], knobs=values))


def trials(direction="backward", workers=None):
    prepared = [calls.Prepared(CALL), calls.Prepared(WHOLE)]
    names = list(knobs.TUNABLE["cuda"].knobs)
    return list(search.tuned("cuda", direction, prepared, names, 0.001, workers))


@pytest.mark.parametrize("file", ["cuda/strategies.json", "triton/tiles.json", "preference.json"])
def test_tables_are_written_as_the_backends_keep_them(file, tmp_path):
    path = ROOT / "divnorm_kernels" / "backends" / file
    tables.write(tmp_path / "table.json", json.loads(path.read_text())["rows"])
    assert (tmp_path / "table.json").read_text() == path.read_text()


def test_the_fastest_value_is_kept_and_the_next_entry_starts_from_it(device, timed_by, monkeypatch):
    with_knobs(monkeypatch, blocks=(1, 3), threads=(192,))
    timed_by(lambda row: row["blocks"] * row["threads"])
    first, second = trials()
    assert (first.present, first.kept, first.scores) == (2, 1, pytest.approx({"2": 1.0, "1": 0.5, "3": 1.5}))
    assert set(first.calls) == {CALL.name, WHOLE.name}
    assert (second.present, second.kept, second.scores) == (256, 192, pytest.approx({"256": 1.0, "192": 0.75}))
    assert {name: second.row[name] for name in ("arch", "direction", "bytes", "blocks", "threads", "cluster")} == {
        "arch": "sm_90", "direction": "backward", "bytes": 4, "blocks": 1, "threads": 192, "cluster": 16
    }  # fmt: skip
    assert strategies.ROWS[0]["arch"] == "sm_120", "the module's table is as it was"


ALIGNED = replace(CALL, setting=replace(SETTING, case=Case("aligned", (3, 16, 8, 8), "bulk copies want it so")))
ODD = replace(CALL, setting=replace(SETTING, case=Case("odd", (3, 3, 5, 5), "no whole sixteen bytes")))
OLDER = replace(emulated.TINY, capability=(8, 0))
LARGE = replace(
    CALL,
    setting=replace(SETTING, case=Case("large", (20, 8, 130, 130), "many pieces of work")),
    options=(("window", 3), ("over_batch", True)),
)


@pytest.mark.parametrize(
    ("found", "call", "rounds"), [(emulated.TINY, ALIGNED, 3), (OLDER, ALIGNED, 1), (emulated.TINY, ODD, 1)]
)
def test_what_is_asked_for_in_vain_is_not_compared(found, call, rounds, device, monkeypatch):
    """What takes the same kernel, cut in the same way, is timed once: a pipeline where there cannot be one, say."""
    made = []
    monkeypatch.setattr(cuda, "device_of", lambda index: found)
    monkeypatch.setattr(search, "gpu_round", lambda run, rotation: made.append(run) or (lambda: (1.0, 0.0)))
    p = calls.Prepared(call)
    present = knobs.row_of(knobs.TUNABLE["cuda"], p.xs[0], "forward")
    rows = {str(size): {**present, "pipeline": size} for size in (0, 512, 1024)}
    ratios = search.compared("cuda", "forward", rows, p, 0.001, {})
    assert (len(made), ratios) == (rounds, dict.fromkeys(rows, 1.0))


@pytest.mark.parametrize("call", [CALL, WHOLE, ALIGNED, ODD, LARGE], ids=lambda call: call.name)
@pytest.mark.parametrize("direction", calls.DIRECTIONS)
def test_entries_that_are_passed_over_change_nothing(call, direction, device):
    """What the module says of a strategy is the same for all rows that tuning takes for alike, and not for all rows."""
    x = calls.Prepared(call).xs[0]
    tunable, g = knobs.TUNABLE["cuda"], call.geometry()
    last, backward = x.stride(1) == 1, direction == "backward"
    seen, cuts = {}, []
    for pipeline in (0, 512):
        for cluster in (0, 1, 16):
            known = {**knobs.row_of(tunable, x, direction), "pipeline": pipeline, "cluster": cluster}
            for knob, values in tunable.knobs.items():
                for value in values:
                    row = {**known, knob: value}
                    with tables.replaced(strategies, [row, *strategies.ROWS]):
                        cut = tunable.cut(g, x, direction)
                    facts = emulated.TINY.facts()
                    found = cuda.library.cuda_strategy(g, DTYPES[x.dtype], last, backward, facts, row)
                    if cut not in cuts:
                        cuts.append(cut)
                    assert seen.setdefault(cuts.index(cut), found) == found, (row, cut)
    assert len({str(found) for found in seen.values()}) > 1
    assert len(cuts) < 3 * sum(map(len, tunable.knobs.values()))


def test_a_value_that_gains_less_than_the_noise_is_not_kept(device, timed_by, monkeypatch):
    with_knobs(monkeypatch, blocks=(1,))
    timed_by(lambda row: 1 if row["blocks"] == 2 else 0.995)
    (trial,) = trials("forward")
    assert (trial.kept, trial.row["blocks"]) == (2, 2)


def test_values_that_fail_or_are_wrong_are_out(device, timed_by, monkeypatch):
    with_knobs(monkeypatch, threads=(100_000, 128, 64))
    timed_by(lambda row: row["threads"])
    monkeypatch.setattr(calls.Prepared, "wrong", lambda self, got, direction: strategies.ROWS[0]["threads"] == 64)
    (trial,) = trials()
    assert trial.kept == 128
    assert set(trial.scores) == {"256", "128"}
    assert "more threads than the CUDA kernels are compiled for" in trial.out["100000"]
    assert trial.out["64"].startswith("wrong result on small")


def test_a_value_that_spoils_the_process_ends_the_search(device, monkeypatch):
    def round_of(run, rotation):
        raise gpu.Spoilt("in a capture")

    with_knobs(monkeypatch, threads=(128,))
    monkeypatch.setattr(search, "gpu_round", round_of)
    with pytest.raises(gpu.Spoilt, match="in a capture"):
        trials()


def test_a_table_that_is_wrong_as_it_stands_is_an_error(device, timed_by, monkeypatch):
    with_knobs(monkeypatch, blocks=(1,))
    timed_by(lambda row: 1)
    monkeypatch.setattr(calls.Prepared, "wrong", lambda self, got, direction: strategies.ROWS[0]["blocks"] == 2)
    with pytest.raises(RuntimeError, match="cuda, forward, the present row: wrong result on small"):
        trials("forward")


@pytest.mark.parametrize("call", [CALL, WHOLE], ids=lambda call: call.fields)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_what_is_timed_is_the_operator(device, backend, call):
    """Right results pass and results that are off by little do not."""
    prepared = calls.Prepared(call)
    for direction in calls.DIRECTIONS:
        got = prepared.runner(backend, direction)(1)
        assert not prepared.wrong(got, direction)
        assert prepared.wrong(got * (1 + 1e-4), direction)
        assert prepared.wrong(torch.full_like(got, float("nan")), direction)


def test_a_row_is_planned_anew(device):
    prepared = calls.Prepared(CALL)
    row = knobs.row_of(knobs.TUNABLE["cuda"], prepared.xs[0], "forward")
    with tables.replaced(strategies, [{**row, "cluster": 0}, *strategies.ROWS]):
        g = CALL.geometry()
        cuda.forward(g, prepared.xs[0], None, None, 1.0, False)
        assert cuda.strategies(g, prepared.xs[0])[0] == "two-pass"
    assert cuda.strategies(CALL.geometry(), prepared.xs[0])[0] != "two-pass"


def test_every_knob_is_an_entry_of_its_table_and_every_call_a_case():
    for tunable in knobs.TUNABLE.values():
        assert set(tunable.knobs) <= set(tunable.table.ROWS[0])
    for dtype in command.DTYPES:
        found = calls.calls(dtype, "cpu")
        assert len(set(found)) == len(found)
        assert all(call.geometry().whole == (call.fields == "whole") for call in found)


def test_the_command_writes_tables_trials_and_preferences(device, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "device_named", lambda given: "cpu")
    monkeypatch.setattr(command, "calls", lambda dtype, device: [CALL, WHOLE])
    monkeypatch.setattr(preference, "arch", lambda index: "sm_90")
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    for module, folder in ((strategies, "cuda"), (tiles, "triton"), (preference, "")):
        (tmp_path / "package" / folder).mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(module, "__file__", str(tmp_path / "package" / folder / "module.py"))
    out = tmp_path / "out"
    options = ("--knob", "items", "--knob", "programs", "--dtype", "float32", "--seconds", 0.001, "--jobs", 1)
    output = run("tune", *options, "--install", "--out", out)
    assert len(re.findall(r"^(items|programs): ", output, flags=re.MULTILINE)) == 4
    document = json.loads((out / "tuning.json").read_text())
    assert [(t["backend"], t["row"]["direction"]) for t in document["trials"]] == [
        (backend, direction) for backend in ("cuda", "triton") for direction in calls.DIRECTIONS
    ]
    assert {row["row"]["fields"] for row in document["preferences"]} == {"windows", "whole"}
    assert all(min(of.values()) == 1 for row in document["preferences"] for of in row["calls"].values())
    for file, folder, arch in (("strategies.json", "cuda", "sm_90"), ("tiles.json", "triton", "interpreter")):
        rows = json.loads((out / file).read_text())["rows"]
        assert {(row["arch"], row["direction"], row["bytes"]) for row in rows[:2]} == {
            (arch, direction, 4) for direction in calls.DIRECTIONS
        }
        assert (tmp_path / "package" / folder / file).read_text() == (out / file).read_text()
    rows = json.loads((out / "preference.json").read_text())["rows"]
    assert [(row["arch"], row["bytes"], row["measured"]) for row in rows[:2]] == [("sm_90", 4, True)] * 2
    assert sorted(rows[0]["order"]) == ["cuda", "triton"]


def test_a_profiler_sees_every_direction_of_every_backend(device, monkeypatch, capsys):
    began = []
    monkeypatch.setattr(profiled, "DTYPES", ("float32",))
    monkeypatch.setattr(profiled, "calls", lambda dtype, device: [CALL])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: began.append(1))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: None)
    profiled.main(["another"], "cpu")
    assert not began
    profiled.main(["small"], "cpu")
    assert len(began) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{CALL.name} {b} {d}" for b in knobs.TUNABLE for d in calls.DIRECTIONS]


def test_tuning_needs_a_gpu():
    assert "torch finds no GPU here" in run("tune", code=2)


def rows_of(forward, backward, batch_norm, shape=(64, 256, 28, 28)):
    """A setting in which cuda and BatchNorm took so many milliseconds."""

    def row(subject, forward, backward):
        known = {"case": "a", "dtype": "float32", "format": "contiguous", "window": 5, "shape": list(shape)}
        times = {"forward": forward, "backward": backward, "both": forward + backward}
        return known | {"subject": subject, "times": times}

    return [row("divnorm cuda", forward, backward), row("BatchNorm", batch_norm / 2, batch_norm / 2)]


def test_targets_are_shares_of_the_copys_bandwidth_and_of_batch_norms_time():
    machine = {"copy_bytes_per_second": 1e12}
    least = 64 * 256 * 28 * 28 * 4 / 1e12 * 1e3  # milliseconds of one pass over x
    (reached,) = targets.verdicts(rows_of(2 * least, 3 * least, 8 * least), machine)
    assert (reached.forward, reached.backward, reached.batch_norm) == pytest.approx((1.0, 1.0, 5 / 8))
    assert reached.missed == []
    (slow,) = targets.verdicts(rows_of(2 * least / 0.89, 3 * least / 0.84, 7 * least), machine)
    assert slow.missed == ["forward", "backward", "BatchNorm"]
    small = (64, 256, 7, 7)
    (even,) = targets.verdicts(rows_of(2 * least, 3 * least, 5 * least, small), machine)
    assert "BatchNorm" not in even.missed, "small images are to be no slower"
    assert targets.verdicts(rows_of(2 * least, 3 * least, 8 * least), {}) == []
