"""What the benchmark measures: its cases and suites."""

import json
import re

import pytest
from bench_command import run

from bench.cases import CASES, SUITES, settings

pytestmark = pytest.mark.usefixtures("torchs_defaults")


def test_suites_name_cases_that_exist():
    for suite in SUITES.values():
        assert set(suite.cases) | set(suite.compiled) | set(suite.sweep) <= CASES.keys()


def test_settings_are_every_combination_and_features_have_one_format():
    chosen = [CASES["8x16x32x32"], CASES["64x1024"]]
    made = list(settings(chosen, ["float32", "bfloat16"], ["contiguous", "channels_last"], [3, 5]))
    assert len(made) == len(set(made)) == 8 + 4


def test_any_shape_is_a_case(tmp_path):
    options = ("--dtype", "float32", "--format", "contiguous", "--seconds", 0.01, "--no-compile", "--no-sweep")
    assert "3x5x6x7" in run("run", "--case", "3x5x6x7", *options, "--out", tmp_path)
    (case,) = {row["case"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert case == "3x5x6x7"
    for wrong in ("3x0x6", "7", "3x5x6x7x8x9", "3x-1", "ResNet"):
        said = re.sub(r"[\s│]+", " ", run("run", "--case", wrong, *options, "--out", tmp_path, code=2))
        assert f"got '{wrong}', expected a shape such as 8x64x56x56" in said
