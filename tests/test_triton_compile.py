"""The Triton kernels compiled for GPUs that are not here: registers, spills, shared memory, width of the moves."""

import json
import os

import pytest
from process import run_python

from divnorm_kernels.backends.triton.tiles import CROWDED_REGISTERS

SHARED_MEMORY = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""What one program may use, in KiB."""
REGISTERS = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "sm_120": 65536, "gfx942": 4 * 512 * 64}
"""What the programs of a multiprocessor share."""


QUICK = {"div.full.f32", "ex2.approx.f32"}
"""What is good to 2 ulp where an activation uses it."""

ARCHS = os.environ.get("DIVNORM_TRITON_ARCHS", " ".join(SHARED_MEMORY)).split()
"""Those that are compiled for: all, unless the environment names some."""


PARTS = 3
"""Into so many the specializations are cut, for several processes."""
SHARE = int(os.environ.get("DIVNORM_COMPILED", "1"))
"""Of each part one in as many, where the environment says so."""


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("arch", ARCHS)
def test_every_specialization_compiles_well(arch, part, tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    printed = run_python("tests/compile_triton.py", arch, part, PARTS * SHARE, **environment)
    reports = [json.loads(line) for line in printed.splitlines()]
    assert {report["kernel"] for report in reports} == {"forward_kernel", "backward_kernel"}
    strategies = {"SINGLE", "STAGED"} | (set() if arch.startswith("gfx") else {"LOOPED"})
    assert {report["strategy"] for report in reports} == strategies
    lanes = 64 if arch.startswith("gfx") else 32
    for report in reports:
        what = f"{report['kernel']} of {report['name']!r} on {arch}"
        assert report["spilled"] == 0, f"{what} spills"
        assert report["shared"] <= SHARED_MEMORY[arch] * 1024, f"{what} takes {report['shared']} bytes of shared memory"
        assert report["registers"] * report["warps"] * lanes <= REGISTERS[arch], f"{what}: {report['registers']}"
        # a load that bypasses the caches' coherence would miss what another program has just stored
        assert report["read_only"] == 0, what
        # a mean square of 1e-40 is one, and an approximate division by a large number gives zero; the divisors of the
        # smooth activations are small, and so is what they take the power of
        assert set(report["rough"]) <= (QUICK if report["smooth"] else set()), f"{what}: {report['rough']}"
        if report["even"]:
            widest = report["widths"][-1] if arch.startswith("gfx") else report["widths"][0]
            assert widest == 16, f"{what} moves {report['widths']} bytes at a time"
        if not arch.startswith("gfx"):
            check_order_and_loops(what, report)
            # 128 spill for sm_100, and in backward beside a residual or a threshold
            most = 136 if arch == "sm_100" else 128
            if report["crowded"] and report["kernel"] == "backward_kernel":
                most = CROWDED_REGISTERS
            if report["strategy"] != "SINGLE" and not report["wide"]:
                assert report["registers"] <= most, f"{what} takes {report['registers']}: fewer programs are at work"


def check_order_and_loops(what, report):
    """Triton 3.6 and 3.7 leave out an acquire whose value nobody reads; and no loop is pipelined unless asked to be."""
    assert not report["unordered"], f"{what}: {report['unordered']}"
    for name, wanted in report["expected"].items():
        # two bytes at a time cannot be copied while others are computed
        if report["even"] or not name.startswith("cop"):
            assert report[name] == wanted, f"{what}: {report[name]} {name}, expected {wanted}"
    if report["strategy"] == "LOOPED":
        assert report["tickets"] == report["polls"] == report["releases"] == 0, what
    if report["strategy"] != "SINGLE":
        assert report["warps"] <= (16 if report["strategy"] == "LOOPED" else 8), what


def test_kernels_of_channels_compile_well(tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    printed = run_python("tests/compile_channels.py", "sm_90", SHARE, **environment)
    reports = [json.loads(line) for line in printed.splitlines()]
    assert {report["kernel"] for report in reports} == {"forward_kernel", "backward_kernel"}
    for report in reports:
        what = f"{report['kernel']} of {report['name']}"
        assert report["spilled"] == 0, f"{what} spills"
        assert report["registers"] * report["warps"] * 32 <= REGISTERS["sm_90"], f"{what}: {report['registers']}"
        assert report["widths"] == [report["width"]], f"{what} moves {report['widths']} bytes at a time"
        assert report["atomics"] == 0, f"{what}: the order of sums is that of time"
        # numbers among beta's that roots give need no power
        assert (report["powers"] > 0) == (report["beta"] is None), what
        if report["beta"] is not None:
            assert (report["roots"] > 0) == (report["beta"] < 1), what


def test_kernels_of_gdn_compile_well(tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    printed = run_python("tests/compile_gdn.py", "sm_90", SHARE, **environment)
    reports = [json.loads(line) for line in printed.splitlines()]
    assert {report["kernel"] for report in reports} == {"forward_kernel", "slope_kernel", "dgamma_kernel", "dx_kernel"}
    for report in reports:
        what = f"{report['kernel']} of {report['name']}"
        assert report["precision"] == report["allowed"], what
        assert report["spilled"] == 0, f"{what} spills"
        assert report["registers"] * report["warps"] * 32 <= REGISTERS["sm_90"], f"{what}: {report['registers']}"


def test_kernels_of_the_seam_compile_well(tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    printed = run_python("tests/compile_seam.py", "sm_90", SHARE, **environment)
    reports = [json.loads(line) for line in printed.splitlines()]
    passes = {"statistics", "normalize", "sums", "gradient"}
    assert {report["kernel"] for report in reports} == {f"{name}_kernel" for name in passes}
    for report in reports:
        what = f"{report['kernel']} of {report['name']}"
        assert report["spilled"] == 0, f"{what} spills"
        # as many as where the plain call's backward has a residual: the sums of rows and parameters are in one pass
        most = CROWDED_REGISTERS if report["kernel"] == "sums_kernel" else 128
        assert report["registers"] <= most, f"{what} takes {report['registers']}"
        assert report["shared"] <= SHARED_MEMORY["sm_90"] * 1024, f"{what} takes {report['shared']} bytes"
        assert report["widths"] == [report["width"]], f"{what} moves {report['widths']} bytes at a time"
        assert set(report["rough"]) <= (QUICK if report["smooth"] else set()), f"{what}: {report['rough']}"
        assert report["atomics"] == 0, f"{what}: the order of sums is that of time"
        assert report["copies"] == report["expected_copies"], f"{what}: {report['copies']} tiles on their way"


def test_launches_of_tritons_own_runtime(tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    assert run_python("tests/launch_triton.py", **environment) == "16 kernels\n"
