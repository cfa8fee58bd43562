"""The CUDA sources as compilers older than this machine's see them, and the versions of runtime and driver."""

import re
import shutil
from types import ModuleType

import pytest
import torch
from emulated import backend
from process import ROOT, run

from divnorm_kernels import divisive_norm
from divnorm_kernels.backends import cuda
from divnorm_kernels.backends.cuda import table

# As nvcc 12.6 sees the kernels, once its own headers have been read: it writes PTX 8.5.
OLDER = """
#include <cuda_runtime.h>
#undef __CUDACC_VER_MAJOR__
#undef __CUDACC_VER_MINOR__
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 6
#include "cuda/kernels_bfloat16.cu"
"""


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """The kernels of bfloat16 as an older compiler would write them."""
    if not (shutil.which("nvcc") and shutil.which("ptxas")):
        pytest.skip("needs nvcc and ptxas")
    folder = tmp_path_factory.mktemp("kernels")
    source, ptx = folder / "kernels.cu", folder / "kernels.ptx"
    source.write_text(OLDER)
    run("nvcc", "-std=c++17", "-ptx", "-arch=compute_90", "-I", ROOT / "csrc", source, "-o", ptx)
    return ptx.read_text()


def test_two_passes_tell_the_cache_what_to_keep(ptx):
    """The first asks it to keep what it reads; the second to drop what it reads and writes."""
    bodies = dict(
        re.findall(r"^\.visible \.entry \S*?\d((?:staged|resident)_\w+?)I\S*\((.*?)^}", ptx, re.DOTALL | re.MULTILINE)
    )
    assert len(bodies) == 4
    for name, body in bodies.items():
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global(\.L2::cache_hint)? ", body)
        hinted = {hint for hint in copies}
        assert hinted == ({".L2::cache_hint"} if name.startswith("staged") else {""}), name
        for policy in (
            "createpolicy.fractional.L2::evict_last",
            "createpolicy.fractional.L2::evict_first",
            "st.global.L2::cache_hint.v4",
        ):
            assert (policy in body) == name.startswith("staged"), (name, policy)


def test_older_compilers_get_instructions_that_they_know(tmp_path, ptx):
    text, replaced = re.subn(r"^\.version .*$", ".version 8.5", ptx, flags=re.MULTILINE)
    ptx = tmp_path / "kernels.ptx"
    assert replaced == 1
    assert "barrier.cluster.arrive" in text
    ptx.write_text(text)
    run("ptxas", "-O0", "-arch=sm_90", ptx, "-o", tmp_path / "kernels.cubin")


@pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("ptxas")), reason="needs nvcc and ptxas")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_hoppers_words_are_instructions(arch, tmp_path):
    """Of a kernel that has them all: the emulated device's, in csrc/tests. From Hopper on as CUDA 12.1 knows them."""
    source, ptx = tmp_path / "ring.cu", tmp_path / "ring.ptx"
    source.write_text('#include "tests/ring_kernel.h"')
    run("nvcc", "-std=c++17", "-ptx", f"-arch=compute_{arch}", "-I", ROOT / "csrc", source, "-o", ptx)
    text = ptx.read_text()
    instructions = ("mbarrier.try_wait.parity.acquire.cluster", "cp.async.bulk.global", "st.async", "fence.proxy.async")
    assert {instruction in text for instruction in instructions} == {arch >= 90}
    assert ("trap;" in text) == (arch < 90)
    if arch == 90:
        ptx.write_text(re.sub(r"^\.version .*$", ".version 8.1", text, flags=re.MULTILINE))
    run("ptxas", f"-arch=sm_{arch}", ptx, "-o", tmp_path / "ring.cubin")


@pytest.fixture
def versions(monkeypatch):
    """Puts a module with these versions of driver and runtime in the compiled one's place; counts the questions."""

    def replace(driver, runtime):
        asked = []
        module = ModuleType("with_versions")
        module.CudaCalls = None
        module.cuda_versions = lambda: asked.append(1) or (driver, runtime)
        monkeypatch.setattr(cuda, "library", module)
        return asked

    return replace


TOO_OLD = "the driver supports CUDA 12.4, the kernels were built with 13.0"


def test_a_driver_older_than_the_runtime_is_a_reason(versions):
    asked = versions(12040, 13000)
    assert [cuda.missing() for _ in range(3)] == [TOO_OLD] * 3
    assert len(asked) == 1


@pytest.mark.parametrize(("driver", "runtime"), [(13000, 13010), (13000, 13000), (13010, 12080), (0, 13000)])
def test_minor_versions_newer_drivers_and_none_are_no_reason(versions, driver, runtime):
    asked = versions(driver, runtime)
    assert cuda.missing() in (None, "there is no NVIDIA GPU")
    assert asked == [1]


def test_a_call_with_a_driver_older_than_the_runtime_goes_elsewhere(versions):
    """On the emulated device, whose tensors are where the kernels are: the reason comes before any launch."""
    with backend():
        versions(12040, 13000)
        x = torch.randn(2, 3, 4, 5, device=cuda.DEVICE_TYPE)
        with pytest.raises(RuntimeError, match=f"backend: got 'cuda', which cannot serve this call: {TOO_OLD}"):
            divisive_norm(x, window=3, backend="cuda")


@pytest.mark.parametrize(
    ("archs", "runs", "does_not_run"),
    [
        ("sm_90 compute_90", [(9, 0), (10, 0), (12, 1)], [(8, 0), (8, 9)]),
        ("sm_86 compute_90 compute_80", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], [(7, 5)]),
        ("sm_86 sm_120", [(8, 6), (8, 9), (12, 0), (12, 1)], [(8, 0), (9, 0), (10, 0)]),
    ],
)
def test_a_device_without_code_for_it_is_a_reason(versions, monkeypatch, archs, runs, does_not_run):
    versions(13000, 13000)
    cuda.library.cuda_archs, cuda.library.cuda_most_positions = archs, 1 << 30
    for capability in (*runs, *does_not_run):
        monkeypatch.setattr(cuda, "device_of", lambda index, found=capability: table.Device(found, 1, 1, 1, 1))
        reason, _ = cuda._serves(0)
        assert (reason is None) == (capability in runs), capability
        if (8, 0) <= capability in does_not_run:
            assert f"the compiled module has code for {archs}: install it here" in reason
