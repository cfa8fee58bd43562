"""The benchmark: what it measures is what it says, and its command line."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_command import run
from process import run_python
from rich.console import Console

from bench import family, pages, running, sanitized, timing
from bench import measure as measuring
from bench.cases import CASES, SWEEP_WINDOWS, Case, Setting
from bench.inputs import image_cases, sample_cases, tensor_case
from bench.machine import describe
from bench.measure import check, measure
from bench.options import INTERRUPTED
from bench.report import print_headline, table
from bench.results import (
    against,
    best_of_ours,
    geometric_mean,
    headline,
    in_words,
    ratio,
    settings_of,
    share_of_limit,
    window_growth,
)
from bench.subjects import OURS, PEERS, Subject, activation, groups_for, ours, peers

pytestmark = pytest.mark.usefixtures("torchs_defaults")

SMALL = Setting(Case("small", (2, 8, 9, 9), "a test"), "float32", "contiguous", 3)


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_activation_has_the_settings_dtype_and_layout(form):
    setting = Setting(CASES["8x16x32x32"], "bfloat16", form, 3)
    x = activation(setting, setting.case.values())
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=getattr(torch, form.replace("contiguous", "contiguous_format")))
    assert torch.equal(x, setting.case.values().bfloat16())


def test_subjects_compute_what_their_names_say():
    x = torch.randn(2, 8, 9, 9)
    named = {s.name: s for s in (*ours(SMALL, x), *peers(SMALL, x, compiled=False))}
    eager = named["eager reference"].function(x)
    torch.testing.assert_close(named["divnorm cpu"].function(x), eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(named["GroupNorm"].function(x), torch.nn.functional.group_norm(x, groups_for(8)))
    torch.testing.assert_close(named["BatchNorm"].function(x).mean((0, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    assert set(named) == {"divnorm cpu", *PEERS} - {"torch.compile"}


def test_rows_hold_together():
    rows = measure(SMALL, check(SMALL, {}), compiled=False, seconds=0.05, failures={})
    by_name = {row.subject: row for row in rows}
    own, copy = by_name["divnorm cpu"], by_name["copy"]
    for row in rows:
        assert row.times.rounds >= 3
        assert 0 < row.times.low <= row.times.high
        assert row.copies == pytest.approx(row.times.both / copy.times.both)
    assert own.error.y <= own.error.limit_y
    assert own.extra_bytes is None or own.extra_bytes >= 0
    data = {row.subject: row.as_dict() for row in rows}
    assert best_of_ours(data) is data["divnorm cpu"]
    assert ratio(data["divnorm cpu"], data["BatchNorm"]) == pytest.approx(
        by_name["BatchNorm"].times.both / own.times.both
    )
    assert share_of_limit(data["divnorm cpu"]) == pytest.approx(2.5 / own.copies)


def test_wrong_results_are_not_timed(monkeypatch):
    def broken(setting, x):
        weight = torch.ones(8, requires_grad=True)
        return [Subject(f"{OURS} cpu", "broken", lambda x: x * weight.view(1, -1, 1, 1), [weight])]

    monkeypatch.setattr(measuring, "ours", broken)
    rows = [r.as_dict() for r in measure(SMALL, check(SMALL, {}), compiled=False, seconds=0.01, failures={})]
    (own,) = [row for row in rows if row["subject"].startswith(OURS)]
    assert own["times"] is None
    assert headline(rows)["wrong"] == 1


@pytest.mark.parametrize("failing", ["GroupNorm", f"{OURS} cpu"])
@pytest.mark.parametrize("where", ["round_of", "the first round"])
def test_a_subject_that_fails_takes_nothing_from_the_others(failing, where, monkeypatch):
    """A layer that a CUDA graph cannot hold, say."""
    before = timing.round_of

    def fail():
        raise RuntimeError("cannot be captured\nmore")

    def round_of(subject, x, dy):
        if subject.name != failing:
            return before(subject, x, dy)
        return fail() if where == "round_of" else fail

    monkeypatch.setattr(timing, "round_of", round_of)
    rows = [row.as_dict() for row in measured_alone()]
    by_name = {row["subject"]: row for row in rows}
    assert by_name[failing]["times"] is None
    assert by_name["BatchNorm"]["times"]["both"] > 0
    assert shown(rows).count(f"{failing} was not measured everywhere: RuntimeError: cannot be captured\n") == 1
    assert headline(rows)["failed"] == (failing != "GroupNorm")
    assert headline(rows)["wrong"] == 0


def measured_alone():
    return measure(SMALL, check(SMALL, {}), compiled=False, seconds=0.01, failures={})


def shown(rows):
    """What a run prints of its results."""
    console = Console(width=200, record=True)
    console.print(table(rows))
    print_headline(console, rows, [], {}, describe("cpu"))
    return console.export_text()


def test_a_backend_whose_result_fails_is_a_row(monkeypatch):
    """Before anything is timed, in the comparison with float64."""

    def broken(setting, x):
        return [
            Subject(f"{OURS} {name}", "", function, []) for name, function in (("a", torch.relu), ("b", torch.nope))
        ]

    def nope(x):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(torch, "nope", nope, raising=False)
    monkeypatch.setattr(measuring, "ours", broken)
    rows = {row.subject: row for row in measured_alone()}
    assert rows[f"{OURS} a"].failure is None
    assert rows[f"{OURS} b"].failure == "RuntimeError: no kernel image"
    assert rows["BatchNorm"].times.both > 0
    assert headline([row.as_dict() for row in rows.values()])["failed"] == 1


def test_nothing_is_timed_that_nothing_could_be_compared_with(monkeypatch):
    def exact(x, dy, window):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(measuring, "exact", exact)
    rows = {row.subject: row for row in measured_alone()}
    assert rows[f"{OURS} cpu"].times is None
    assert rows[f"{OURS} cpu"].failure == "nothing to compare with: OutOfMemoryError: out of memory"
    assert rows["BatchNorm"].times.both > 0
    assert "failed" in shown([row.as_dict() for row in rows.values()])


def test_a_layer_that_fails_is_a_row(monkeypatch):
    def failing(shape):
        raise_ = torch.nn.Identity()
        raise_.forward = lambda x: 1 / 0
        return raise_

    row = family.measure(replace(family.PAIRS[0], theirs=failing), replace(SMALL, window=0), False, 0.01)
    assert row.ours.both > 0
    assert (row.theirs, row.failure) == (None, "theirs: ZeroDivisionError: division by zero")


MEMORY = """
import torch
from bench.subjects import Subject
from bench.timing import extra_memory, return_freed_memory

def greedy(x):
    held = [torch.ones(x.shape) for _ in range(3)]
    return x * float(held[0][0, 0, 0, 0])

return_freed_memory()
x = torch.randn(64, 64, 64, 16, requires_grad=True)
print(extra_memory(Subject("greedy", "", greedy, []), x, torch.ones(x.shape)) / (x.numel() * 4))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory cannot be read here")
def test_memory_is_what_a_subject_allocates():
    """A subject that holds three more tensors of x's size while it runs, written to, needs three times x.

    In a process of its own: how the C library returns memory can be set once.
    """
    assert float(run_python("-c", MEMORY)) == pytest.approx(3, rel=0.5)


def test_what_runs_under_the_sanitizers_is_right(monkeypatch):
    monkeypatch.setattr(sanitized, "CALLS", [sanitized.CALLS[0], ((6, 30), {"window": 7})])
    sanitized.main(["cpu"], "cpu")
    with pytest.raises(RuntimeError, match="cuda: "):
        sanitized.main(["cuda"], "cpu")


def test_geometric_mean():
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([]) is None


def test_run_writes_results_and_plots_and_show_reads_them(tmp_path):
    output = run(
        "run",
        "--case",
        "8x16x32x32",
        "--case",
        "64x1024",
        "--dtype",
        "float32",
        "--seconds",
        0.05,
        "--no-compile",
        "--no-sweep",
        "--out",
        tmp_path,
    )
    assert "than BatchNorm (geometric mean" in output
    document = json.loads((tmp_path / "results.json").read_text())
    assert len(settings_of(document["rows"])) == 3
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["call_overhead_us"]["DivisiveNorm2d"] > 0
    assert all(math.isfinite(row["times"]["both"]) for row in document["rows"])
    assert (tmp_path / "ratios.png").stat().st_size > 10_000
    (tmp_path / "ratios.png").unlink()
    assert "8x16x32x32" in run("show", tmp_path / "results.json")
    assert (tmp_path / "ratios.png").exists()


def measured(monkeypatch):
    """Records the settings that are timed."""
    seen, before = [], running.measure

    def recorded(setting, *arguments, **options):
        seen.append((setting.case.name, setting.dtype))
        return before(setting, *arguments, **options)

    monkeypatch.setattr(running, "measure", recorded)
    return seen


def test_a_killed_run_goes_on_with_resume(tmp_path, monkeypatch):
    """After every setting the file holds what has been measured; what it holds is not measured again."""
    seen, out = measured(monkeypatch), tmp_path / "results.json"
    options = ("--case", "8x16x32x32", "--format", "contiguous", "--seconds", 0.01, "--no-compile", "--no-sweep")
    options += ("--out", tmp_path)

    def killed(setting, *arguments, **options):
        if setting.dtype == "bfloat16":
            raise KeyboardInterrupt
        return recorded(setting, *arguments, **options)

    recorded = running.measure
    monkeypatch.setattr(running, "measure", killed)
    assert "--resume goes on" in run("run", *options, code=INTERRUPTED)
    first = json.loads(out.read_text())["rows"]
    assert {row["dtype"] for row in first} == {"float32"}
    monkeypatch.setattr(running, "measure", recorded)
    del seen[:]
    assert "than BatchNorm (geometric mean" in run("run", *options, "--resume")
    assert seen == [("8x16x32x32", "bfloat16")]
    rows = json.loads(out.read_text())["rows"]
    assert rows[: len(first)] == first
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}


def test_only_results_of_this_machine_are_resumed(tmp_path):
    options = ("--case", "64x1024", "--seconds", 0.01, "--no-compile", "--no-sweep", "--resume", "--out", tmp_path)
    run("run", *options)
    out = tmp_path / "results.json"
    document = json.loads(out.read_text())
    document["machine"]["threads"] += 1
    out.write_text(json.dumps(document))
    threads = document["machine"]["threads"]
    message = f"got results with threads {threads}, expected {threads - 1}, as here"
    assert message in re.sub(r"[\s│]+", " ", run("run", *options, code=2))
    out.write_text("[]")
    assert "expected a results file of this benchmark" in re.sub(r"[\s│]+", " ", run("run", *options, code=2))


def test_ratios_in_words():
    assert [in_words(ratio) for ratio in (1.5, 1, 0.87)] == ["1.50x faster", "1.00x faster", "1.15x slower"]
    assert against(0.87, "BatchNorm").strip() == "1.15x slower than BatchNorm"


def document_of(times, machine="a processor"):
    """A results file: milliseconds by (case, dtype, subject)."""
    rows = [
        {"case": case, "dtype": dtype, "format": "contiguous", "window": 5, "subject": subject, "error": None}
        | {"times": {"both": both}, "copies": both}
        for (case, dtype, subject), both in times.items()
    ]
    sweeps = [{**rows[0], "window": window, "times": {"both": both}} for window, both in ((3, 2.0), (31, 3.0))]
    known = {"processor": machine, "threads": 2, "instruction_set": "avx2", "torch": "2.13.0"}
    return {"rows": rows, "sweeps": sweeps, "machine": known}


def cells_of(page):
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)}


def test_tables_of_the_documentation_are_ratios_of_times(tmp_path):
    ours, batch, group = f"{OURS} cpu", "BatchNorm", "GroupNorm"
    one = {("a", "float32", ours): 2.0, ("a", "float32", batch): 3.0, ("a", "float32", group): 1.0}
    two = {("a", "bfloat16", ours): 1.0, ("a", "bfloat16", batch): 6.0, ("b", "float32", ours): 1.0}
    for name, times in (("one", one), ("two", one | two)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document_of(times, name)))
    page = "<!-- table ratios two.json -->\n<!-- end -->\ntext\n<!-- table means one.json two.json -->\n<!-- end -->\n"
    first, text, second = pages.filled(page, tmp_path).partition("text")
    assert text
    ratios, means = cells_of(first), cells_of(second)
    assert ratios["N x C x H x W"] == ["float32", "bfloat16"]
    assert ratios["a"] == ["1.50 / 0.50", "6.00 / -"]
    assert ratios["b"] == ["-", "-"]
    assert means[batch] == ["1.50", "3.00"], "the geometric mean of 1.5 and 6"
    assert means["window 31 / window 3"] == ["1.50", "1.50"]
    assert means["eager reference"] == ["-", "-"]
    assert means["settings"] == ["1", "3"]
    with pytest.raises(ValueError, match=r"table nothing one.json -->: got view 'nothing', expected one of means, "):
        pages.filled("<!-- table nothing one.json -->\n<!-- end -->", tmp_path)


def test_sweep_over_windows(tmp_path):
    output = run(
        "run",
        "--case",
        "32x64x56x56",
        "--dtype",
        "float32",
        "--format",
        "contiguous",
        "--seconds",
        0.02,
        "--no-compile",
        "--out",
        tmp_path,
    )
    assert "31 / 3" in output
    assert "window 31 takes" in output
    sweeps = json.loads((tmp_path / "results.json").read_text())["sweeps"]
    assert [row["window"] for row in sweeps] == list(SWEEP_WINDOWS)
    ((_, growth),) = window_growth(sweeps).items()
    assert growth == pytest.approx(sweeps[-1]["times"]["both"] / sweeps[0]["times"]["both"])
    assert (tmp_path / "windows.png").exists()


def test_a_users_tensor_and_pictures(tmp_path):
    np.save(tmp_path / "activation.npy", np.random.default_rng(0).normal(size=(2, 4, 10, 12)))
    (case,) = [tensor_case(tmp_path / "activation.npy")]
    assert case.shape == (2, 4, 10, 12)
    sample, response = sample_cases()
    assert sample.shape[:2] == (1, 3)
    assert response.shape == (1, 64, (sample.shape[2] + 1) // 2, (sample.shape[3] + 1) // 2)
    assert abs(sample.values().mean()) < 1e-4
    output = run(
        "run",
        "--tensor",
        tmp_path / "activation.npy",
        "--dtype",
        "float32",
        "--seconds",
        0.02,
        "--no-compile",
        "--no-sweep",
        "--out",
        tmp_path / "out",
    )
    assert "activation.npy" in output


def test_bad_files_are_clear_errors(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects.npy: expected a .npy file of numbers"):
        tensor_case(tmp_path / "objects.npy")
    np.save(tmp_path / "flat.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"got float64 of shape \(3,\), expected numbers of 2 to 5 dimensions"):
        tensor_case(tmp_path / "flat.npy")
    with pytest.raises(ValueError, match="expected a folder with pictures"):
        image_cases(tmp_path)
    assert "expected one of" in run("run", "--suite", "none", code=2)


def test_cases_are_listed():
    assert "32x64x56x56" in run("cases")
