"""Compiles the Triton kernels ahead of time for one architecture and reports what the compiler made of them.

Run by the tests in processes of their own, without the interpreter: ``python compile_triton.py ARCH PART PARTS`` takes
every so manyth specialization and prints one JSON object a line and kernel. The launches are those of real calls, on
tensors without memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from divnorm_kernels.backends import triton as backend
from divnorm_kernels.backends.triton import (
    backward_kernel,
    backward_maps,
    forward_kernel,
    forward_maps,
    launch,
    tiles,
)
from divnorm_kernels.backends.triton.schema import Strategy
from divnorm_kernels.backends.triton.tiles import Device
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device("sm_80", "cuda", 108, 40 << 20)),
    "sm_90": (GPUTarget("cuda", 90, 32), Device("sm_90", "cuda", 132, 50 << 20)),
    "sm_100": (GPUTarget("cuda", 100, 32), Device("sm_100", "cuda", 148, 126 << 20)),
    "sm_120": (GPUTarget("cuda", 120, 32), Device("sm_120", "cuda", 170, 96 << 20)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device("gfx942", "hip", 304, 4 << 20)),
}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STAGE, SMALL, DEEP = (64, 64, 56, 56), (128, 16, 16, 16), (128, 128, 16, 16)
"""Rows that take several programs, rows that one holds, and rows that one reads twice."""
DTYPES_AND_LAYOUTS = [
    {"dtype": dtype, "channels_last": last, "half": dtype == F16, "learned": last}
    for dtype, last in product((F32, BF16, F16), (False, True))
]

BATCH = {"window": "all", "groups": 64, "over_batch": True}
FILTERS = {"window": None, "norm_window": "all", "groups": 64, "activation": "tlu"}
BEHIND = [
    ("TLU, residual", {"activation": "tlu"}, {"dtype": BF16, "residual": True}),
    ("p = 1, TLU", {"p": 1, "activation": "tlu"}, {"dtype": F32, "channels_last": True, "learned": True}),
    ("p = 1, GELU, residual", {"p": 1, "activation": "gelu"}, {"dtype": F32, "residual": True}),
    (
        "x over s, ReLU, residual",
        {"subtract_mean": False, "activation": "relu"},
        {"dtype": F16, "channels_last": True, "half": True, "residual": True},
    ),
]


@dataclass(frozen=True)
class Specialization:
    """A call: ``learned`` makes sigma a tensor with a gradient and returns l1, ``half`` gives the parameters x's dtype,
    ``launches`` asks for one launch a stage, ``wide`` for 64-bit offsets. Where ``even``, x moves 16 bytes at a time.
    A residual has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    options: dict[str, Any]
    dtype: torch.dtype = F32
    channels_last: bool = False
    affine: bool = True
    learned: bool = False
    residual: bool = False
    half: bool = False
    launches: bool = False
    wide: bool = False
    even: bool = True


SPECIALIZATIONS = [
    *(Specialization("several programs", STAGE, {"window": 5}, **known) for known in DTYPES_AND_LAYOUTS),
    *(Specialization("one program", SMALL, {"window": 3}, **known) for known in DTYPES_AND_LAYOUTS),
    *(Specialization("one program, two reads", DEEP, {"window": 5}, **known) for known in DTYPES_AND_LAYOUTS),
    Specialization("one program, two reads, mean only", DEEP, {"window": 5, "norm_window": None, "activation": "relu"}),
    Specialization("one program, two reads, groups", (64, 256, 14, 14), {"window": 3, "groups": 2}, F32, even=False),
    Specialization("one program, two reads, whole", DEEP, {"window": "all"}, BF16),
    Specialization("one program, two reads, whole", DEEP, {"window": "all"}, F32, True),
    Specialization("one program, 32x32", (128, 16, 32, 32), {"window": 3}, BF16),
    Specialization("one program, 32x32", (128, 16, 32, 32), {"window": 3}, F32, True),
    Specialization("whole", STAGE, {"window": "all"}, BF16),
    Specialization("whole", STAGE, {"window": "all"}, F32, True),
    Specialization("whole, one program", (64, 512, 4, 4), {"window": "all", "groups": 32}, F32),
    Specialization("whole, one program", (64, 512, 4, 4), {"window": "all", "groups": 32}, BF16, True),
    Specialization(
        "batch norm", STAGE, {"window": "all", "groups": 64, "over_batch": True, "activation": "relu"}, BF16
    ),
    Specialization("over the batch", STAGE, {"window": 5, "over_batch": True}, F16, True),
    Specialization("features", (64, 1024), {"window": 60}, BF16),
    Specialization("long features", (256, 65536), {"window": 60}),
    Specialization("whole features", (4096, 768), {"window": "all"}),
    Specialization("local contrast", (64, 3, 112, 112), {"window": 9, "groups": 3}, BF16),
    Specialization("volume", (2, 24, 20, 32, 32), {"window": 3, "norm_window": 5, "groups": 2}, F16),
    Specialization("odd", (64, 2048, 7, 7), {"window": 3}, BF16, even=False),
    Specialization("odd", (64, 99, 9, 9), {"window": 3}, F32, True, even=False),
    Specialization("no parameters, launches", STAGE, {"window": 5}, BF16, affine=False, launches=True),
    Specialization("wide", STAGE, {"window": 5}, F32, wide=True),
    Specialization("mean only, ReLU", STAGE, {"window": 5, "norm_window": None, "activation": "relu"}),
    Specialization("no mean, ReLU", SMALL, {"window": None, "norm_window": 5, "activation": "relu"}),
    Specialization("neither", STAGE, {"window": None}, BF16),
    Specialization("several programs, SiLU", STAGE, {"window": 5, "activation": "silu"}, BF16),
    Specialization("several programs, GELU", STAGE, {"window": 5, "activation": "gelu"}, F32, True, learned=True),
    Specialization("several programs, GELU by tanh", STAGE, {"window": 5, "activation": "gelu_tanh"}, F16, half=True),
    Specialization("one program, SiLU", SMALL, {"window": 3, "activation": "silu"}, F16, True, half=True),
    Specialization("one program, GELU", SMALL, {"window": 3, "activation": "gelu"}, F32, True, learned=True),
    Specialization("one program, GELU by tanh", SMALL, {"window": 3, "activation": "gelu_tanh"}, BF16),
    Specialization("one program, two reads, SiLU", DEEP, {"window": 5, "activation": "silu"}, F32),
    Specialization("one program, two reads, GELU", DEEP, {"window": 5, "activation": "gelu"}, BF16, True, learned=True),
    Specialization("one program, two reads, GELU by tanh", DEEP, {"window": 5, "activation": "gelu_tanh"}, F32, True),
    Specialization("group norm, SiLU", STAGE, {"window": "all", "groups": 32, "activation": "silu"}, BF16),
    Specialization(
        "batch norm, GELU", STAGE, {"window": "all", "groups": 64, "over_batch": True, "activation": "gelu"}, BF16
    ),
    Specialization("whole, GELU", STAGE, {"window": "all", "activation": "gelu"}, F32, True),
    Specialization("whole features, GELU", (4096, 768), {"window": "all", "activation": "gelu"}, BF16),
    Specialization("long features, GELU", (256, 65536), {"window": 60, "activation": "gelu"}),
    Specialization("wide, GELU", STAGE, {"window": 5, "activation": "gelu"}, F32, wide=True),
    *(
        Specialization(f"several programs, {name}", STAGE, {"window": 5} | options, **known)
        for name, options, known in BEHIND
    ),
    *(
        Specialization(f"one program, {name}", SMALL, {"window": 3} | options, **known)
        for name, options, known in BEHIND
    ),
    *(
        Specialization(f"one program, two reads, {name}", DEEP, {"window": 5} | options, **known)
        for name, options, known in BEHIND
    ),
    Specialization("filter response norm", STAGE, FILTERS, BF16),
    Specialization("batch norm, ReLU, residual", STAGE, BATCH | {"activation": "relu"}, BF16, residual=True),
    Specialization("L1 batch norm", STAGE, BATCH | {"p": 1}, BF16),
    Specialization("variance norm, p = 1", STAGE, BATCH | {"p": 1, "subtract_mean": False}, F32),
    Specialization(
        "whole, p = 1, TLU, residual", STAGE, {"window": "all", "p": 1, "activation": "tlu"}, F32, residual=True
    ),
    Specialization(
        "whole, one program, p = 1, TLU, residual",
        (64, 512, 4, 4),
        {"window": "all", "groups": 32, "p": 1, "activation": "tlu"},
        F32,
        residual=True,
    ),
    Specialization(
        "features, p = 1, TLU, residual", (64, 1024), {"window": 60, "p": 1, "activation": "tlu"}, BF16, residual=True
    ),
    Specialization(
        "long features, p = 1, GELU, residual",
        (256, 65536),
        {"window": 60, "p": 1, "activation": "gelu"},
        residual=True,
    ),
    Specialization("whole features, TLU, residual", (4096, 768), {"window": "all", "activation": "tlu"}, residual=True),
]


EVERYTHING = ("sm_90", "gfx942")
"""One architecture of each maker compiles every specialization, the others every third."""


class Recorder:
    """Stands in for a kernel: compiles every launch for a target instead of running it."""

    def __init__(self, kernel: Any, target: GPUTarget, found: list[tuple[Any, dict[str, Any], dict[str, Any]]]):
        self.kernel, self.target, self.found = kernel, target, found
        self.compiled = False

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._again if self.compiled else self._compile

    def _again(self, *arguments: Any) -> None:
        assert len(arguments) == len(self.kernel.params), "a later launch takes the arguments of the first"

    def _compile(self, *arguments: Any, **options: Any) -> Any:
        signature, constants, attributes = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + NAMES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=self.target, options=options)
        known = {parameter.name: value for parameter, value in zip(self.kernel.params, arguments, strict=True)}
        self.found.append((compiled, options, known))
        self.compiled = True
        return self


def compiled(arch: str, call: Specialization) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """The kernels that forward and backward of a call launch, with their options and arguments."""
    target, device = TARGETS[arch]
    found: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    before = launch.forward_kernel, launch.backward_kernel, launch._INT32, tiles.ROWS
    launch.forward_kernel, launch.backward_kernel = (Recorder(kernel, target, found) for kernel in before[:2])
    launch.device_of = lambda _: device
    launch._INT32 = 1 if call.wide else before[2]
    tiles.ROWS = [{**row, "ordered": row["ordered"] and not call.launches} for row in before[3]]

    g = geometry(Norm(**call.options), call.shape)
    g.cache.clear()
    x = torch.empty(call.shape, dtype=call.dtype, device="meta")
    if call.channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    affine = torch.empty(g.affine_size, dtype=call.dtype if call.half else F32, device="meta") if call.affine else None
    sigma = torch.empty((), device="meta") if call.learned else 1.0
    residual, activation = x if call.residual else None, g.norm.activation
    threshold = torch.empty(g.affine_size, device="meta") if activation == "tlu" else None
    _, maps, l1 = backend.forward(g, x, affine, affine, sigma, call.learned, False, residual, threshold)
    residual = None if activation is None else residual
    needs = (True, call.affine, call.affine, call.learned, residual is not None, threshold is not None)
    backend.backward(g, x, l1, x, maps, affine, affine, sigma, needs, residual, threshold)
    launch.forward_kernel, launch.backward_kernel, launch._INT32, tiles.ROWS = before
    return found


def expected(kernel: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the arguments say of a kernel: its strategy; the times it polls, waits and signals; its barriers; the copies
    of tiles of x, dy and a residual on their way while one is computed and the waits for them, in the code of all loops
    over x.
    """
    backward = kernel == "backward_kernel"
    results = ("dweight", "dbias", "dsigma", "dthreshold") if backward else ("l1",)
    finish = any(arguments[name] is not None for name in results)
    strategy, ordered = Strategy(arguments["STRATEGY"]), arguments["ORDERED"]
    statistics = (arguments["SUMMATION"] or arguments["SUPPRESSION"]) and (backward or arguments["CHANNELS"] > 1)
    deviations = arguments["P"] == 1 and arguments["SUMMATION"] and not backward
    loops = 0 if strategy == Strategy.SINGLE else 1 + statistics + deviations
    residuals = (loops if backward else min(loops, 1)) * (arguments["residual"] is not None)
    return {
        "strategy": strategy.name,
        "expected": {
            "polls": ordered * (finish + (strategy == Strategy.STAGED)),
            "acquires": ordered * (finish + (strategy == Strategy.STAGED)),
            "releases": int(ordered),
            "tickets": int(ordered),
            "barriers": ordered * (1 + finish + (strategy == Strategy.STAGED))
            + (1 if strategy == Strategy.LOOPED else 3 * (strategy == Strategy.SINGLE and not arguments["WHOLE"])),
            # two tiles before a loop, one in it; one wait in it and one behind it
            "copies": 3 * (loops * (1 + backward) + residuals),
            "copy_waits": 2 * loops,
        },
    }


def unordered(ptx: str) -> list[str]:
    """The code around signals and waits that no barrier keeps apart from the memory accesses that they are for; and
    waits whose value nobody reads, which some Tritons leave out.
    """
    found = []
    for at in re.finditer(r"\.release\.", ptx):
        before = ptx[: at.start()].rpartition("bar.sync")[2]
        found += [before] if re.search(r"st\.global|cp\.async\.c", before) else []
    for at in re.finditer(r"\.acquire\.", ptx):
        behind = ptx[at.end() :].partition("bar.sync")[0]
        found += [behind] if re.search(r"(?:ld|st)\.global|cp\.async\.c", behind) else []
        register = re.search(r"%r\d+", behind)[0]
        found += [] if re.search(rf"{register}\b", behind.partition(";")[2]) else [f"{register} is not read"]
    return found


def nvidia_report(kernel: Any) -> dict[str, Any]:
    """Registers, local memory, the widths in bytes of the moves that have a cache policy: those of x; the arithmetic
    that flushes small numbers or approximates; and what `expected` has an opinion on.
    """
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing.stdout).groups()
    ptx = kernel.asm["ptx"]
    moves = re.findall(r"(?:ld|st)\.global(?:\.L1::evict_\w+)(?:\.L2::cache_hint)?(?:\.v(\d))?\.b(\d+)", ptx)
    # their policies stand in this form in PTX from Triton 3.9 on
    copies = re.findall(r"async_copy_global_to_local .*evict_.*", kernel.asm["ttgir"])
    sizes = {"f32": 4, "bf16": 2, "f16": 2}
    widths = {int(lanes or 1) * int(bits) // 8 for lanes, bits in moves}
    for copy in copies:
        contiguity = re.search(r"contiguity = (\d+)", copy)
        widths.add(min(16, int(contiguity[1] if contiguity else 1) * sizes[re.search(r"!tt\.ptr<(\w+)>", copy)[1]]))
    return {
        "registers": int(registers),
        "spilled": int(stack) + int(local),
        "widths": sorted(widths),
        "polls": len(re.findall(r"ld\.global\.gpu\.relaxed", ptx)),
        "acquires": len(re.findall(r"\.acquire\.", ptx)),
        "releases": len(re.findall(r"\.release\.", ptx)),
        "tickets": len(re.findall(r"atom\.global\.gpu\.relaxed\.add", ptx)),
        "barriers": len(re.findall(r"\b(?:ttg|gpu)\.barrier\b", kernel.asm["ttgir"])),
        "copies": len(copies),
        "copy_waits": len(re.findall(r"cp\.async\.wait_group", ptx)),
        "unordered": unordered(ptx),
        "read_only": len(re.findall(r"ld\.global\.nc", ptx)),
        "rough": sorted(set(re.findall(r"\w+\.(?:\w+\.)*(?:ftz|approx|full)[\w.]*", ptx))),
    }


def amd_report(kernel: Any) -> dict[str, Any]:
    """The same from the AMD assembly, where the widest moves are those of x."""
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    moves = re.findall(r"\b(?:global|buffer)_(?:load|store)_(\w+)", text)
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "byte": 1}
    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size"),
        "widths": sorted({sizes[move] for move in moves if move in sizes}),
        "read_only": 0,
        "rough": [],
    }


def main(arch: str, part: int, parts: int) -> None:
    """Prints the reports of a part."""
    report = nvidia_report
    if arch.startswith("gfx"):
        report = amd_report
        for module in (forward_kernel, forward_maps, backward_kernel, backward_maps):
            module.IN_FLIGHT = triton.language.constexpr(1)  # as in a torch for such GPUs
    taken = SPECIALIZATIONS[:: 1 if arch in EVERYTHING else 3]
    for call in taken[part::parts]:
        layout = "channels_last" if call.channels_last else "contiguous"
        for kernel, options, arguments in compiled(arch, call):
            known = {"name": f"{call.name}, {NAMES[call.dtype]}, {layout}", "kernel": kernel.metadata.name}
            known |= {"warps": options["num_warps"], "shared": kernel.metadata.shared, "even": call.even}
            known |= {"wide": call.wide} | expected(kernel.metadata.name, arguments)
            known |= {"crowded": arguments["residual"] is not None or arguments["threshold"] is not None}
            known |= {"smooth": call.options.get("activation") not in (None, "relu", "tlu")}
            print(json.dumps(known | report(kernel)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
