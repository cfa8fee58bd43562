"""The compiled CUDA kernels, read back from the installed module: registers, spills and how they move memory.

Skips where the module was built without CUDA. The disassembler is the one that Triton's package carries.
"""

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from emulated import HOPPER
from process import run

from divnorm_kernels import fields
from divnorm_kernels.backends import native
from divnorm_kernels.backends.cuda import table
from divnorm_kernels.norm import Norm

CUOBJDUMP = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
pytestmark = pytest.mark.skipif(
    not hasattr(native.module, "CudaCalls") or not CUOBJDUMP.exists(), reason="needs a module with CUDA, and cuobjdump"
)
KERNELS = ("resident_forward", "resident_backward", "staged_forward", "staged_backward")
PIPELINED = ("pipelined_forward", "pipelined_backward")
CHANNELS = ("channels_forward", "channels_backward")
SEAM = ("seam_sums",)
TYPES = {"d": 8, "f": 4, "NS0_8bfloat16E": 2, "NS0_7float16E": 2}
REGISTERS = 1 << 16


@pytest.fixture(scope="module")
def usage():
    """What the compiler gave every kernel, by architecture and name."""
    printed = run(CUOBJDUMP, "--dump-resource-usage", native.module.__file__).stdout
    found, arch = {}, None
    for line in printed.splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            arch = match[1]
        if match := re.match(r" Function (\S+):", line):
            name = match[1]
        if line.lstrip().startswith("REG:"):
            found[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found


def archs(usage):
    return {arch for arch, _ in usage}


def kernel_of(name, kernels=KERNELS):
    """Kernel, dtype, layout and form of a mangled name, or None for others."""
    match = re.search(rf"\d+({'|'.join(kernels)})I({'|'.join(TYPES)})Lb([01])ELNS\w*4FormE([01])E", name)
    return match and match.groups()


def pipelined_kernel_of(name):
    """Those of a pipelined kernel's, or None."""
    return kernel_of(name, PIPELINED)


def channels_kernel_of(name):
    """Kernel, dtype, and whether its arrays are far, of a mangled name of a channel normalization's, or None."""
    return _of_one_form(CHANNELS, name)


def seam_kernel_of(name):
    """Kernel, dtype and layout of a mangled name of the seam's, or None."""
    return _of_one_form(SEAM, name)


def _of_one_form(kernels, name):
    match = re.search(rf"\d+({'|'.join(kernels)})I({'|'.join(TYPES)})Lb([01])E", name)
    return match and match.groups()


WHICH = (kernel_of, pipelined_kernel_of, channels_kernel_of, seam_kernel_of)


def test_every_kernel_for_every_architecture(usage):
    wanted = {*product(KERNELS + PIPELINED, TYPES, "01", "01"), *product(CHANNELS + SEAM, TYPES, "01")}
    assert archs(usage) == {arch for arch in native.module.cuda_archs.split() if arch.startswith("sm_")}
    for arch in archs(usage):
        names = [name for a, name in usage if a == arch]
        found = {of(name) for of in WHICH for name in names}
        assert found - {None} == wanted, arch


def test_nothing_spills_and_the_launches_find_their_registers(usage):
    for (arch, name), used in usage.items():
        assert used["STACK"] == used["LOCAL"] == 0, (arch, name, used)
        assert used["SHARED"] <= 1024, (arch, name, used)  # all of it is asked for at launch; 1 KB is the driver's
        if found := next(filter(None, (of(name) for of in WHICH)), None):
            threads, blocks = native.module.cuda_compiled_for[found[0].split("_")[0]]
            if TYPES[found[1]] == 8:  # float64 has room for half as many
                blocks = (blocks + 1) // 2
            assert used["REG"] * threads * blocks <= REGISTERS, (arch, name, used)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """The machine code for sm_90, by kernel."""
    printed = run(CUOBJDUMP, "--dump-sass", "--gpu-architecture", "sm_90", native.module.__file__).stdout
    functions = re.split(r"Function : (\S+)", printed)[1:]
    return dict(zip(functions[::2], functions[1::2], strict=True))


def test_activations_move_sixteen_bytes_at_a_time(instructions):
    for name, code in instructions.items():
        found = kernel_of(name)
        if not found:
            continue
        assert "LDGSTS.E.BYPASS.128" in code or "LDGSTS.E.BYPASS.LTC128B.128" in code, name
        assert "STG.E.128" in code, name
        assert not re.search(r"\b(STL|LDL)\b", code), name
        # What another block has written must not come from a cache that misses it.
        assert not re.search(r"LDG\S*\.CONSTANT", code), name


def test_bulk_copies_are_of_a_warp(instructions):
    """Of a thread that is alone each would be a loop over the lanes that might have addresses of their own."""
    found = {name: code for name, code in instructions.items() if pipelined_kernel_of(name)}
    assert found
    for name, code in found.items():
        assert re.search(r"\bUBLKCP\.S\.G\b", code), name
        assert re.search(r"\bUBLKCP\.G\.S\b", code), name
        assert "BRA.U.ANY" not in code, name


def test_sums_of_rows_are_read_sixteen_bytes_at_a_time(instructions):
    found = {name: code for name, code in instructions.items() if seam_kernel_of(name)}
    assert found
    for name, code in found.items():
        assert re.search(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128", code), name
        assert not re.search(r"\b(STL|LDL)\b", code), name


def test_tiles_of_channels_move_sixteen_bytes_at_a_time(instructions):
    for name, code in instructions.items():
        if channels_kernel_of(name):
            assert re.search(r"LDG\S*\.128", code), name
            assert re.search(r"STG\S*\.128", code), name


def test_clusters_exchange_sums_through_shared_memory(instructions):
    for name, code in instructions.items():
        found = kernel_of(name)
        if found and found[0].startswith("resident"):
            assert "UCGABAR" in code, name


def test_sums_have_eight_loads_under_way(instructions):
    """A load that waits for the sum of those before takes the whole way to the cache for each."""
    found = {name: code for name, code in instructions.items() if "6finishI" in name}
    assert len({re.search(r"finishI(\w)E", name)[1] for name in found}) == 2  # float and double
    for name, code in found.items():
        most = max(len(re.findall(r"\bLDG\b", part)) for part in re.split(r"\b[FD]ADD\b", code))
        assert most >= 8, name


def test_who_waits_rests_and_leaves_the_cache_alone(instructions):
    for name, code in instructions.items():
        if kernel_of(name):
            poll = re.search(r"LDG\.E\S*\.STRONG\.GPU(?:(?!LDG\.E\S*\.STRONG).)*?NANOSLEEP", code, re.DOTALL)
            assert poll, name
            assert "CCTL.IVALL" not in poll[0], name


def test_launches_start_early_and_wait(instructions):
    for name, code in instructions.items():
        found = kernel_of(name)
        waits = "6finishI" in name or (found and found[0].startswith("staged"))
        assert ("ACQBULK" in code) == bool(waits), name
        assert ("PREEXIT" in code) == ("6finishI" not in name), name  # and let others start


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_errors_name_the_kernel_and_the_shape():
    """What the CUDA runtime says where there is no driver comes back as an exception."""
    g = fields.geometry(Norm(3), (2, 8, 5, 6))
    rows = [table.row_for(HOPPER, direction, 4) for direction in ("forward", "backward")]
    with pytest.raises(
        RuntimeError, match=r"CUDA, single-block forward of \(2, 8, 5, 1, 6\): cudaGetDevice: cudaError"
    ):
        native.module.CudaCalls(g, native.DTYPES[torch.float32], False, False, 0, HOPPER.facts(), *rows)
