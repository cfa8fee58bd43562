"""Building and installing as users do, in pip's build isolation, from a copy of the source tree."""

import shutil
import sys
import zipfile

import pytest
from process import ROOT, run, run_python

SOURCES = ("csrc", "divnorm_kernels", "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE")
# An editable install of this package answers for modules that a copy lacks: the compiled one, where that is missing.
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
"""
# The CUDA kernels, which take minutes to compile, are in the installation under test (test_cuda_compile.py).
CPU_ALONE = {"CMAKE_ARGS": "-DDIVNORM_CUDA=off"}
QUICK = {"CMAKE_ARGS": "-DDIVNORM_CUDA=off -DDIVNORM_OPTIMIZE=-O0"}
REPORT = "import runpy; runpy.run_module('divnorm_kernels', run_name='__main__')"
USE = """
import torch, divnorm_kernels
from divnorm_kernels.backends import cpu
from divnorm_kernels.reference import divisive_norm as reference
x = torch.randn(2, 8, 9, 9)
y = divnorm_kernels.divisive_norm(x, window=5, backend={backend!r})
assert torch.allclose(y, reference(x, window=5), atol=1e-5)
print(divnorm_kernels.__file__, cpu.instruction_set())
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources alone: nothing compiled."""
    for name in SOURCES:
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        source, target = ROOT / name, tmp_path / "tree" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(source, target)
    return tmp_path / "tree"


def python(code, cwd, **environment):
    """What the code prints with the package in ``cwd``."""
    return run_python("-c", ALONE + code, cwd=cwd, **environment)


def wheel(tree, **environment):
    """Builds a wheel; returns it and pip's full output."""
    target = tree.parent / "wheels"
    shutil.rmtree(target, ignore_errors=True)
    done = run(
        sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-v", "--wheel-dir", target, cwd=tree, **environment
    )
    (built,) = target.glob("*.whl")
    return built, done.stdout + done.stderr


def editable(tree, **environment):
    """Installs the tree itself, beside this interpreter's packages; returns what it then says of itself."""
    prefix = tree.parent / "prefix"
    command = ("-m", "pip", "install", "--editable", ".", "--no-deps", "--ignore-installed", "--prefix", prefix)
    run(sys.executable, *command, cwd=tree, **environment)
    return python(REPORT, tree)


def unpacked(built, where):
    with zipfile.ZipFile(built) as archive:
        archive.extractall(where)
    return where


def test_wheel_runs_on_every_instruction_set_and_an_editable_install_follows(tree, tmp_path):
    built, _ = wheel(tree, **CPU_ALONE)
    home = unpacked(built, tmp_path / "home")
    names = {p.name for p in (home / "divnorm_kernels").iterdir()}
    assert {"py.typed", "_native.pyi"} <= names
    assert any(name.startswith("_native.") and name.endswith((".so", ".pyd")) for name in names)
    code = "from divnorm_kernels.backends import cpu; print(*cpu.instruction_sets())"
    for name in python(code, home).split():
        assert python(USE.format(backend="cpu"), home, DIVNORM_INSTRUCTION_SET=name).split() == [
            str(home / "divnorm_kernels" / "__init__.py"),
            name,
        ]

    # Code compiled for one instruction set must not be what the linker picks for all of them.
    objects = list((tree / "build").rglob("kernels.cpp.o"))
    assert objects
    for file in objects:
        symbols = run("nm", "--demangle", "--defined-only", "--extern-only", file, cwd=tree).stdout.splitlines()
        shared = [line for line in symbols if f"divnorm::{file.parts[-4].split('_')[-1].split('.')[0]}::" not in line]
        assert [line for line in shared if "DW.ref." not in line] == []

    # A second build: CMake's cache of the first names tools that pip has deleted since. It compiles into the tree.
    assert not list((tree / "divnorm_kernels").glob("_native*.so"))
    assert "backend cpu: available" in editable(tree, **QUICK)
    assert len(list((tree / "divnorm_kernels").glob("_native*.so"))) == 1


def test_editable_install_without_a_compiler_is_pure_python(tree):
    assert "backend cpu: missing: the compiled module does not import" in editable(tree, CXX="/nonexistent/compiler")


def test_without_a_compiler_the_install_is_pure_python_and_says_so(tree, tmp_path):
    built, output = wheel(tree, CXX="/nonexistent/compiler")
    assert "the native module was not built" in output
    home = unpacked(built, tmp_path / "home")
    assert not list(home.rglob("*.so"))
    code = USE.format(backend=None).replace(
        "import torch", "import warnings; warnings.simplefilter('ignore'); import torch"
    )
    assert python(code, home).split()[1] == "None"
    report = python(REPORT, home)
    assert "backend cpu: missing: the compiled module does not import" in report


def test_a_build_that_requires_the_native_module_fails_without_a_compiler(tree):
    with pytest.raises(AssertionError, match="error"):
        wheel(tree, CXX="/nonexistent/compiler", DIVNORM_REQUIRE_NATIVE="1")
