"""What the emulated device counts beside bytes, and what the CUDA kernels cost by it."""

import shutil

import hopper_model
import pytest
import torch
from emulated import DEVICE, HOPPER, backend, counted
from traffic import DIRECTIONS, Addresses, done

from divnorm_kernels import fields
from divnorm_kernels.backends import native
from divnorm_kernels.backends.cuda import table
from divnorm_kernels.norm import Norm

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="needs the emulated device")
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize(
    ("stride", "bytes_each", "taken", "least"),
    [
        *((4, 4, 1, 1), (2, 2, 1, 1), (0, 4, 1, 1), (8, 4, 2, 1), (128, 4, 32, 1), (132, 4, 1, 1)),
        *((8, 8, 2, 2), (16, 16, 4, 4), (32, 16, 8, 4)),
    ],
)
def test_wavefronts_of_a_warp(stride, bytes_each, taken, least):
    """Banks of four bytes: neighbours and equals share one, strides of 32 words collide, wide accesses take turns."""
    assert counted().wavefronts([lane * stride for lane in range(32)], bytes_each) == (taken, least)


@pytest.fixture
def kept():
    """Runs a direction of a call on the emulated device and returns the phases of its main kernel."""

    def run(made, direction, launch=0, barrier=-1):
        counted().keep_costs(1 << 20)
        counted().leave_out(counted().Word.barrier, launch, barrier)
        made.run[direction]()
        return [phase for phase in counted().costs() if phase.launch == launch]

    with backend(counted(), device=HOPPER):
        yield run
    counted().leave_out(counted().Word.barrier, -1, -1)
    counted().keep_costs(0)


def made(shape, dtype=torch.float32, memory_format=torch.contiguous_format, **options):
    return Addresses(counted(), torch.randn(shape).to(dtype).contiguous(memory_format=memory_format), **options)


@pytest.mark.parametrize(
    ("window", "memory_format", "direction", "barriers", "caught"),
    [
        (5, FORMATS[0], "forward", 7, 6),
        (5, FORMATS[0], "backward", 8, 7),
        (5, FORMATS[1], "forward", 7, 4),
        (5, FORMATS[1], "backward", 8, 4),
        ("all", FORMATS[0], "forward", 4, 3),
        ("all", FORMATS[0], "backward", 5, 4),
        ("all", FORMATS[1], "forward", 4, 2),
        ("all", FORMATS[1], "backward", 5, 3),
    ],
)
def test_blocks_of_a_cluster_do_not_race_and_would_without_a_barrier(
    window, memory_format, direction, barriers, caught, kept
):
    """All but the last, behind which a block ends; channels_last blocks hold all of what they sum over channels."""
    call = made((2, 64, 14, 14), memory_format=memory_format, window=window)
    assert call.calls.strategies == ("cluster-resident",) * 2
    endings = [phase.ending.name for phase in kept(call, direction) if phase.block == 0]
    assert counted().conflicts()[0] == 0
    of_cluster = [i for i, ending in enumerate(endings) if ending.startswith("cluster")]
    races = []
    for barrier in of_cluster:
        kept(call, direction, barrier=barrier)
        races.append(counted().conflicts()[0])
    assert (len(races), sum(found > 0 for found in races)) == (barriers, caught), (endings, races)


def test_what_only_the_machine_orders_is_counted(kept):
    """Blocks write over what others have read of them behind restricted barriers (cuda/device.h says why they may)."""
    kept(made((2, 64, 14, 14), window=5), "forward")
    races, unordered = counted().conflicts()
    assert races == 0
    assert unordered > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_planes_have_few_bank_conflicts(dtype, direction, kept):
    """None but where a warp goes from the end of a channel's positions to the start of another channel's."""
    phases = kept(made((1, 128, 28, 28), dtype, window=5), direction)
    tile = max(phase.shared_bytes for phase in phases)
    through_the_tile = [phase for phase in phases if phase.shared_bytes > tile / 4]
    assert through_the_tile
    for phase in through_the_tile:
        vectors = 28 * 28 * dtype.itemsize / 16  # at least, of a channel
        assert phase.wavefronts <= phase.least * (1 + 32 / vectors), phase.index


def test_barriers_of_a_sample(kept):
    """Two and one for each of the four passes over the maps, and a last one before the blocks end."""
    phases = kept(made((2, 64, 14, 14), window=5), "forward")
    of_block = [phase.ending.name for phase in phases if phase.block == 0]
    assert of_block.count("cluster_shared") == 2 + 4 + 1
    assert of_block.count("cluster") == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_partial_sums_of_two_passes_are_few(channels_last):
    """Backward's last stage takes tiles of many positions, each of which leaves a number for every channel of it."""
    norm, dtype = Norm(5), torch.float32
    for shape in ((64, 256, 56, 56), (64, 64, 112, 112)):
        x_bytes = dtype.itemsize * torch.Size(shape).numel()
        row = table.row_for(HOPPER, "backward", dtype.itemsize)
        found = counted().cuda_strategy(
            fields.geometry(norm, shape), native.DTYPES[dtype], channels_last, True, HOPPER.facts(), row
        )
        assert found["name"] == "two-pass"
        written_and_read = 2 * 2 * found["slots"] * shape[1] * dtype.itemsize  # of weight and bias
        assert written_and_read < 0.03 * 3 * x_bytes, (shape, found["slots"])


def test_time_is_that_of_the_bytes_where_nothing_else_takes_any():
    launch = (hopper_model.MULTIPROCESSORS, hopper_model.MULTIPROCESSORS, 1, 256, 1024)
    work = [hopper_model.Work(bytes=1000.0)] * launch[0]
    assert hopper_model.clocks_of(launch, work, "resident") == pytest.approx(1000 / hopper_model.COPY)
    slower = [hopper_model.Work(bytes=1000.0, wavefronts=400.0)] * launch[0]
    assert hopper_model.clocks_of(launch, slower, "resident") == 400


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_instructions_in_the_machine_code():
    pytest.importorskip("triton")
    from machine_code import instructions

    found = instructions("bfloat16")
    kernels = {key[:2] for key in found}
    assert len(kernels) == 12
    for kernel, channels_last in kernels:
        pipelined, forward = kernel.startswith("pipelined"), kernel.endswith("forward")
        copies = () if pipelined else ("copy_in", "copy_out")
        wanted = ["moments", "normalize"] if forward else ["sums", "differentiate"]
        for what in (*wanted, *copies):
            each = {key[3]: value for key, value in found.items() if key[:3] == (kernel, channels_last, what)}
            assert each, (kernel, what)
            assert min(each, key=each.get) == max(each), (kernel, what, each)  # wider vectors take fewer a number
        for what in copies:
            # sixteen bytes at a time: an address and a store, not the bytes one by one
            assert found[kernel, channels_last, what, 8] * 8 <= 32, (kernel, what)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_prediction_is_below_the_speed_of_a_copy():
    pytest.importorskip("triton")
    x = torch.randn(64, 128, 14, 14).bfloat16()
    with backend(counted(), device=HOPPER):
        for one in done(x, window=5):
            assert 0 < one.share < 1
            assert 0 < one.idle < 1
            assert one.instructions > 10
