"""The layers that torch has too, in the benchmark."""

import json
from dataclasses import replace

import pytest
from bench_command import run

import divnorm_kernels as dk
from bench import family
from bench.cases import Case, Setting
from bench.options import INTERRUPTED

pytestmark = pytest.mark.usefixtures("torchs_defaults")


def test_layers_against_torchs(tmp_path, monkeypatch):
    small = {4: (2, 8, 5, 6), 2: (6, 8)}
    pairs = tuple(replace(pair, shapes=(small[len(pair.shapes[0])],)) for pair in family.PAIRS)
    monkeypatch.setattr(family, "PAIRS", pairs)
    output = run("layers", "--seconds", 0.01, "--dtype", "float32", "--device", "cpu", "--out", tmp_path)
    assert "than torch's LayerNorm and ReLU (geometric mean)" in output
    rows = json.loads((tmp_path / "layers.json").read_text())["rows"]
    assert {(row["layer"], row["relu"]) for row in rows} == {(p.name, relu) for p in pairs for relu in (False, True)}
    assert all(row["ours"]["both"] > 0 and row["theirs"]["both"] > 0 and row["error"] <= 1 for row in rows)


def test_a_killed_run_of_layers_goes_on_with_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(family, "PAIRS", (replace(family.PAIRS[0], shapes=((2, 8, 5, 6),)),))
    options = ("--seconds", 0.01, "--dtype", "float32", "--device", "cpu", "--out", tmp_path)
    seen, before = [], family.measure

    def killed_after(count):
        def measure(pair, setting, relu, seconds):
            if len(seen) == count:
                raise KeyboardInterrupt
            seen.append((setting.format, relu))
            return before(pair, setting, relu, seconds)

        monkeypatch.setattr(family, "measure", measure)

    killed_after(3)
    assert "--resume goes on" in run("layers", *options, code=INTERRUPTED)
    first = json.loads((tmp_path / "layers.json").read_text())["rows"]
    assert len(first) == 3
    killed_after(-1)
    run("layers", *options, "--resume")
    assert seen == [(form, relu) for form in ("contiguous", "channels_last") for relu in (False, True)]
    rows = json.loads((tmp_path / "layers.json").read_text())["rows"]
    assert rows[:3] == first
    assert len(rows) == 4


def test_a_wrong_layer_is_not_timed():
    def wrong(shape, backend=None, **options):
        return dk.BatchNorm2d(shape[1], eps=None if backend else 1.0, backend=backend, **options)

    setting = Setting(Case("small", (2, 8, 9, 9), "a test"), "float32", "contiguous", 0)
    row = family.measure(replace(family.PAIRS[0], ours=wrong), setting, False, 0.01)
    assert row.ours is None
    assert row.error > 1
    assert row.theirs.both > 0
