"""Instructions that the CUDA kernels take for a number, read from their machine code for sm_90.

`instructions` disassembles a dtype's kernels with line information, which leaves the code as it is: the installed
module's if it has such (-DCMAKE_CUDA_FLAGS=-lineinfo), else they are compiled.
A loop belongs to the function whose source line its instructions come from, and to a vector width by its accesses.
What smooth activations take stands in the loops, behind a branch that other calls pass over, and is left out. The
pipelined kernels have loops of their own for calls without an activation, with a ReLU, and for what is rare: the first
ones count.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from process import ROOT, run

from divnorm_kernels.backends import native

SOURCES = ROOT / "csrc" / "cuda"
SIZES = {"bfloat16": 2, "float32": 4}
_NAMES = {"bfloat16": b"resident_forwardINS0_8bfloat16E", "float32": b"resident_forwardIf"}
"""A part of a kernel's name."""
_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_ACCESS = re.compile(r"\b(LDGSTS|LDS|STS|LDG|STG)\b[^\[]*")
_PIPELINED = {
    "chunk_planes.h": {"add_moments": 16, "add_sums": 8},
    "planes.h": {"normalize_numbers": 16, "differentiate": 8},
    "pixels.h": {"moments": 16, "sums": 16, "normalize": 16, "differentiate": 8},
}
"""The same of the pipelined kernels."""
_FUSED = {"normalize": 1, "normalize_numbers": 1, "sums": 3, "differentiate": 5}
"""Multiplications with an addition of a number, a ReLU's among them: they tell how many numbers a loop takes."""
_MOST = {
    "planes.h": {"normalize_numbers": 16, "sums": 8, "differentiate": 8},
    "pixels.h": {"normalize": 16, "sums": 16, "differentiate": 8},
}
"""The most bytes of x that a function takes together."""
_WIDTH = re.compile(r"\.(128|64|U16|16)\b")


@dataclass(frozen=True)
class Instruction:
    """One of a kernel's, and the source lines that it comes from, the innermost first."""

    text: str
    lines: tuple[tuple[str, int], ...]

    @property
    def access(self) -> tuple[str, int] | None:
        """Which kind of access to memory it is, and how many bytes it moves."""
        found = _ACCESS.search(self.text)
        if not found:
            return None
        width = _WIDTH.search(found[0])
        return found[1], {None: 4, "128": 16, "64": 8, "U16": 2, "16": 2}[width and width[1]]

    @property
    def smooth(self) -> bool:
        """Whether only smooth activations need it."""
        return any(file == "epilogue.h" and _function_at(file, line) == "smooth" for file, line in self.lines)

    @property
    def crosses(self) -> bool:
        """Whether only numbers that go from one channel into the next need it."""
        return any(
            file == "plane_column.h" and line in _class("plane_column.h", "OfTwoChannels") for file, line in self.lines
        )


@cache
def _text(file: str) -> list[str]:
    return (SOURCES / file).read_text().splitlines()


@cache
def _class(file: str, name: str) -> range:
    """The lines of a class."""
    first = next(i for i, line in enumerate(_text(file), 1) if line == f"class {name} {{")
    return range(first, next(i for i, line in enumerate(_text(file), 1) if i > first and line == "};"))


@cache
def _functions(file: str) -> list[tuple[int, str]]:
    """First line and name of the functions of a header, in order."""
    pattern = re.compile(r"\s*(?:static )?__device__ [\w:<>]+ (\w+)\(")
    found = ((i, pattern.match(line)) for i, line in enumerate(_text(file), 1))
    return [(i, match[1]) for i, match in found if match]


@cache
def _function_at(file: str, line: int) -> str:
    names = [name for first, name in _functions(file) if first <= line]
    return names[-1] if names else ""


@dataclass(frozen=True)
class Body:
    """A kernel's instructions, and where they branch to."""

    instructions: list[Instruction]
    branches: dict[int, int]

    def follow(self, i: int) -> list[int]:
        """What comes behind an instruction."""
        always = re.match(r"(BRA(?!\.DIV)|EXIT)\b", self.instructions[i].text)  # .DIV: a warp's threads are apart
        nexts = [*([] if always else [i + 1]), *([self.branches[i]] if i in self.branches else [])]
        return [n for n in nexts if n < len(self.instructions)]

    def shortest(self, starts: Iterable[int], ends: Container[int]) -> int | None:
        """Instructions between the nearest two of both, if there is a way."""
        reached, front, steps = set(starts), list(starts), 0
        while front:
            if any(i in ends for i in front):
                return steps
            front = [n for n in {n for i in front for n in self.follow(i)} if n not in reached]
            reached.update(front)
            steps += 1
        return None


def _body(code: str) -> Body:
    body: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: dict[int, str] = {}
    lines: list[tuple[str, int]] = []
    fresh = True
    for line in code.splitlines():
        if match := _LINE.search(line):
            if fresh:
                lines, fresh = [], False
            if Path(match[1]).parent == SOURCES:
                lines.append((Path(match[1]).name, int(match[2])))
        elif match := re.match(r"(\.L_\w+):", line):
            labels[match[1]] = len(body)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            fresh = True
            if branch := _BRANCH.search(match[1]):
                branches[len(body)] = branch[1]
            body.append(Instruction(match[1], tuple(lines)))
    return Body(body, {at: labels[label] for at, label in branches.items() if label in labels})


def _loops(body: Body) -> Iterator[tuple[int, int]]:
    """First and last instruction of a kernel's innermost loops."""
    back = [(to, at) for at, to in body.branches.items() if to <= at and not body.instructions[at].smooth]
    for first, last in back:
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in back):
            yield first, last


def _others_way(body: Body, first: int, last: int) -> list[Instruction]:
    """A loop's instructions that lie on a way through it past those of smooth activations."""
    code = body.instructions
    follows = {
        i: [n for n in body.follow(i) if first <= n <= last and not (code[i].smooth or code[n].smooth)]
        for i in range(first, last)
    }
    from_first, to_last = {first}, {last}
    for i in range(first, last):  # within a loop that has none in it, every other branch leads on
        if i in from_first:
            from_first.update(follows[i])
    for i in reversed(range(first, last)):
        if to_last.intersection(follows[i]):
            to_last.add(i)
    return [code[i] for i in range(first, last + 1) if i in from_first and i in to_last]


def _around(body: Body, first: int, last: int) -> int | None:
    """Instructions of a computing warp of a pipelined kernel on the shortest way from a wait to a loop and to one."""
    waits = {
        i
        for i, instruction in enumerate(body.instructions)
        if "TRYWAIT" in instruction.text
        and any(
            file == "pipeline_roles.h" and _function_at(file, n) == "compute_in_order" for file, n in instruction.lines
        )
    }
    there, back = body.shortest(waits, {first}), body.shortest([last], waits)
    return None if there is None or back is None else there + back


def _measured(loop: list[Instruction], size: int) -> tuple[str, int, int, float] | None:
    """What a loop does, the numbers that it takes together, its part of that, and its instructions for a number."""
    owners = Counter(next(((f, _function_at(f, n)) for f, n in i.lines if f in _MOST), None) for i in loop)
    owner = max(owners, key=owners.__getitem__)
    accesses = Counter(i.access for i in loop if i.access)
    moved = defaultdict(int)
    for (kind, width), count in accesses.items():
        moved[kind] += width * count
    if owner is None:
        copied = moved["LDGSTS"] or (moved["LDG"] if moved["STS"] else 0)
        if copied and any(file == "tile.h" for i in loop for file, _ in i.lines):
            width = max(i.access[1] for i in loop if i.access and i.access[0] in ("LDGSTS", "LDG"))
            return "copy_in", width // size, 0, len(loop) * size / copied
        if moved["STG"] and moved["LDS"] and any(_function_at(f, n) == "copy_out" for i in loop for f, n in i.lines):
            width = max(i.access[1] for i in loop if i.access and i.access[0] == "STG")
            return "copy_out", width // size, 0, len(loop) * size / moved["STG"]
        return None
    file, function = owner
    fused = sum("FFMA" in i.text for i in loop)
    if function == "moments" and moved["LDS"]:  # a loop for the mean and one for the squares, which read x alone
        width = max(width for kind, width in accesses if kind == "LDS")
        return function, width // size, fused > 0, len(loop) * size / moved["LDS"]
    if function not in _FUSED:
        return None
    numbers, rest = divmod(fused, _FUSED[function])
    assert rest == 0, (function, loop)
    kind, times = ("LDS", 2) if function == "sums" else ("STS", 1)
    what = function.removesuffix("_numbers")
    for together in (1, 2, 4, 8):  # parameters are as wide as the next or wider
        fits = together * size <= _MOST[file][function] and numbers % together == 0
        if fits and accesses[kind, together * size] >= times * numbers // together > 0:
            return what, together, 0, len(loop) / numbers
    return None


def _measured_of_pipeline(loop: list[Instruction], size: int) -> tuple[str, int, int, float] | None:
    """The same of a loop of a pipelined kernel; copies of whole stretches are counted one by one.

    "start" is what a sample's first chunk takes beside the moments. Other loops for a call without an activation, and
    with parameters by channel.
    """
    copies = sum(re.search("UBLKCP|UTMALDG|UTMASTG", i.text) is not None for i in loop)
    if copies:
        return "copy_bulk", 1, 0, len(loop) / copies
    owners = Counter(next(((f, _function_at(f, n)) for f, n in i.lines if f in _PIPELINED), None) for i in loop)
    file, function = max(owners, key=owners.__getitem__, default=None) or ("", "")
    if function not in _PIPELINED.get(file, {}):
        return None
    most, what = _PIPELINED[file][function], function.removeprefix("add_").removesuffix("_numbers")
    across = "across " if any(i.crosses for i in loop) else ""
    moved: dict[str, Counter[int]] = defaultdict(Counter)
    for kind, width in (i.access for i in loop if i.access):
        moved[kind][width] += width
    fused, loaded = sum("FFMA" in i.text for i in loop), sum(moved["LDS"].values())
    if what == "moments":
        first = any(_function_at(f, n) == "start" for i in loop for f, n in i.lines)
        if not loaded or (first and fused):
            return None
        return "start" if first else what, max(moved["LDS"]) // size, fused > 0, len(loop) * size / loaded
    if what == "sums":  # of two multiplications with an addition; a ReLU brings a third
        numbers = fused // 2 if fused.bit_count() == 1 else 0
        by_position = file == "chunk_planes.h" and loaded == 2 * numbers * size
        kind, times, fits = "LDS", 2, numbers and not by_position
    else:
        numbers, rest = divmod(fused, {"normalize": 1, "differentiate": 3}[what])
        kind, times, fits = "STS", 1, rest == 0 and numbers
    for together in (1, 2, 4, 8):  # parameters are as wide as the next or wider
        if fits and together * size <= most and moved[kind][together * size] >= times * numbers * size:
            return across + what, together, 0, len(loop) / numbers
    return None


@cache
def instructions(dtype: str) -> dict[tuple[str, bool, str, int], float]:
    """Instructions a number by kernel ("resident_forward"), whether channels_last, function, and numbers together.

    Of the plain form's kernels.

    "around moments": instructions of a warp beside those of the loop, between the barriers in front and behind.

    Of the loops of one part the shortest counts: the others have parameters by position, or take what unrolling leaves
    over. A ReLU's and l1's instructions are in them, whether they are wanted or not, those of smooth activations not.
    """
    printed = _installed(dtype) or _compiled(dtype)
    found: dict[tuple[str, bool, str, int], dict[int, float]] = defaultdict(dict)
    for name, code in re.findall(r"\n\.text\.(\S+):\n(.*?)(?=\n\.text\.|\Z)", printed, re.DOTALL):
        kernel = re.search(r"\d((?:resident|staged|pipelined)_(?:forward|backward))I.*Lb([01])ELNS\w*4FormE0", name)
        of = _measured_of_pipeline if kernel and kernel[1].startswith("pipelined") else _measured
        body = _body(code) if kernel else Body([], {})
        for first, last in _loops(body):
            if measured := of(_others_way(body, first, last), SIZES[dtype]):
                what, together, part, each = measured
                known = found[kernel[1], kernel[2] == "1", what, together]
                known[part] = min(each, known.get(part, each))
                if kernel[1].startswith("pipelined") and (around := _around(body, first, last)):
                    beside = found[kernel[1], kernel[2] == "1", f"around {what}", together]
                    beside[0] = min(around, beside.get(0, around))
    return {key: sum(parts.values()) for key, parts in found.items()}


def _installed(dtype: str) -> str | None:
    """The installed module's machine code, where it was built from these sources with line information."""
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(native.module, "CudaCalls"):
            run(_tool("cuobjdump"), "--extract-elf", "sm_90", native.module.__file__, cwd=folder)
        for cubin in Path(folder).glob("*.cubin"):
            if _NAMES[dtype] in cubin.read_bytes() and f'File "{SOURCES}/' in (printed := _disassembled(cubin)):
                return printed
    return None


def _compiled(dtype: str) -> str:
    """The machine code of the sources as they are."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        source = SOURCES / f"kernels_{dtype}.cu"
        run("nvcc", "-std=c++17", "-O3", "-lineinfo", "-arch=sm_90", "-cubin", "-I", ROOT / "csrc", source, "-o", cubin)
        return _disassembled(cubin)


def _disassembled(cubin: Path) -> str:
    return run(_tool("nvdisasm"), "-gi", cubin).stdout


def _tool(name: str) -> Path:
    """That of Triton's package: a compiler need not have come with one."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
