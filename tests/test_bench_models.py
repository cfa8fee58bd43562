"""The benchmark's small convolutional network, eager and under torch.compile."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench_command import run

import divnorm_kernels as dk
from bench import behind, channels, gdn, models, overhead
from bench.results import write_rows
from bench.subjects import OURS
from bench.timing import Times, step

pytestmark = pytest.mark.usefixtures("torchs_defaults")


@pytest.fixture
def small_network(monkeypatch):
    """A network that is quick to time and to compile."""
    monkeypatch.setattr(models, "SHAPE", (4, 3, 9, 8))
    monkeypatch.setattr(models, "CHANNELS", (4, 6))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def timed_networks(tmp_path, *arguments, code=0):
    """The rows that the command writes, and what it prints."""
    settings = ("--dtype", "float32", "--format", "channels_last", "--device", "cpu", "--seconds", 0.01)
    output = run("models", *settings, *arguments, "--out", tmp_path, code=code)
    return json.loads((tmp_path / "models.json").read_text())["rows"], output


def test_networks_eager_and_compiled(tmp_path, small_network):
    rows, output = timed_networks(tmp_path)
    assert [(row["norm"], row["mode"]) for row in rows] == [(n, m) for n in models.NORMS for m in ("eager", "compiled")]
    assert all(row["times"]["both"] > 0 and row["error"] <= 1 for row in rows)
    compiled = {row["norm"]: row["times"]["both"] for row in rows if row["mode"] == "compiled"}
    ratio = f"{compiled[models.TORCH] / compiled['DivisiveNorm2d']:.2f}x"
    assert any("compiled" in line and "DivisiveNorm2d" in line and ratio in line for line in output.splitlines())


def test_a_wrong_network_is_not_timed(tmp_path, small_network, monkeypatch):
    class Wrong(dk.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * (1 if self.backend == "reference" else 2)

    monkeypatch.setitem(models.NORMS, "BatchNorm2d", Wrong)
    names = ("--norm", "BatchNorm2d", "--norm", models.TORCH)
    rows, output = timed_networks(tmp_path, *names, "--no-compile", code=1)
    assert [(row["norm"], row["times"] is None) for row in rows] == [("BatchNorm2d", True), (models.TORCH, False)]
    assert rows[0]["error"] > 1
    assert "wrong" in output


def test_overhead(tmp_path, monkeypatch):
    """A row for each layer and part, and what is missed is said in words."""
    monkeypatch.setattr(overhead, "ROUNDS", 3)
    rows = overhead.measure("features", "cpu")
    assert len(rows) == len(overhead.CASES["features"].layers) * len(overhead.PARTS)
    assert all(0 < row["us"][0] <= row["us"][2] for row in rows)
    slow = [row | {"us": [1e6] * 3} if row["layer"] == "LayerNorm" else row for row in rows]
    assert any(words.startswith("LayerNorm, forward + backward: ") for words in overhead.missed(slow))
    write_rows(tmp_path / "overhead.json", rows, {}, "command")
    assert json.loads((tmp_path / "overhead.json").read_text())["rows"] == rows
    assert overhead.table(rows).row_count == 3


def test_behind(monkeypatch):
    """Every option and layer is timed with all its gradients; what is slower than asked is said in words."""
    seen = []
    monkeypatch.setattr(
        behind, "interleaved", lambda rounds, _: {k: Both(seen.append((k, sum(r())))) for k, r in rounds.items()}
    )
    rows = behind.measure((2, 8, 6, 6), "float32", "channels_last", "cpu", 0.01, compiled=False)
    assert [row.subject for row in rows] == [behind.PLAIN, *behind.OPTIONS, *["ours", behind.SEPARATE] * 2]
    assert all(seconds > 0 for _, seconds in seen)
    assert behind.table(rows).row_count == 3
    large = [replace(row, shape=(64, 64, 64, 64)) for row in rows]
    slow = [replace(row, both=9.0) if row.subject in ("silu", "ours") else row for row in large]
    words = behind.missed(slow)
    assert words[0].startswith("silu, 64x64x64x64, float32, channels_last: 9.00 of the plain norm's time")
    assert words[-1] == "separate calls take 0.11 of ours on average, 1.5 asked"
    assert behind.missed(rows) == ["separate calls take 1.00 of ours on average, 1.5 asked"]


def once(rounds, _):
    """All rounds, each with the same times."""
    for round_ in rounds.values():
        assert sum(round_()) > 0
    return {name: Times(1.0, 2.0, 3.0, 3.0, 3.0, 1) for name in rounds}


def test_channels(monkeypatch):
    """All are timed in both directions, ours gives what torch's does, and what is asked is said in words."""
    monkeypatch.setattr(channels, "interleaved", once)
    rows = channels.measure((2, 8, 6, 6), "float32", "channels_last", "cpu", 0.01)
    assert [row.subject for row in rows] == list(channels.SUBJECTS)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(*(channels.SUBJECTS[name](x) for name in (channels.OURS, channels.TORCHS)))
    assert channels.table(rows).row_count == 1
    assert channels.missed(rows) == ["torch's LRN takes 1.0 of ours on average, 15.0 asked"]
    times = dict.fromkeys(channels.SUBJECTS, 1.0) | {channels.PLAIN: 0.5, channels.DECAYING: 1.6, channels.TORCHS: 16.0}
    slow = [replace(row, shape=(32, 64, 56, 56), times=replace(row.times, both=times[row.subject])) for row in rows]
    where = "32x64x56x56, float32, channels_last"
    assert channels.missed(slow) == [
        f"LRN, {where}: 2.00 of divisive, window 1, at most 1.3 asked",
        f"exponential, {where}: 1.60 of LRN, at most 1.5 asked",
    ]


def test_gdn(monkeypatch):
    """Ours and the formula are timed with all their gradients and give the same; what is asked is said in words."""
    shape = (2, 8, 6, 6)
    extra = gdn.memory(shape, "float32", "channels_last", "cpu", compiled=False)
    results = []
    monkeypatch.setattr(gdn, "interleaved", once)
    rows = gdn.measure(shape, "float32", "channels_last", "cpu", 0.01, extra, compiled=False)
    assert [row.subject for row in rows] == [OURS, gdn.EAGER]
    x, dy = gdn._made(shape, "float32", "channels_last", "cpu")
    for subject in gdn.subjects(x, compiled=False):
        results.append(step(subject, x, dy)[2])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert gdn.table(rows).row_count == 2
    words = gdn.missed([replace(row, extra_bytes=2304) for row in rows])
    where = "2x8x6x6, float32, channels_last"
    asked = [
        f"{gdn.EAGER}, {where}: 1.00 of our time, at least 1.50 asked",
        f"memory, {where}: 1.00 of x, less than 1 asked",
    ]
    assert words == asked
    fast = [replace(row, times=replace(row.times, both=1.0), extra_bytes=0) for row in rows[:1]]
    assert not gdn.missed([*fast, replace(rows[1], extra_bytes=0)])


class Both:
    """Times of a subject."""

    both = 1.0

    def __init__(self, _):
        pass
