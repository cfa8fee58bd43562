"""Building and installing as users do, in pip's build isolation, from a copy of the source tree."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zipfile
from email import message_from_string

import pybind11
import pytest
import torch
from process import ROOT, run, run_python

# An editable install of this package answers for modules that a copy lacks: the compiled one, where that is missing.
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
"""
# The CUDA kernels, which take minutes to compile, are in the installation under test (test_cuda_compile.py).
# Optimized little: that inlines less, so more is left to see of what the linker could mix up.
CPU_ALONE = {"CMAKE_ARGS": "-DDIVNORM_CUDA=off -DDIVNORM_INSTRUCTION_SETS=baseline;avx2 -DDIVNORM_OPTIMIZE=-O1"}
NO_COMPILER = {"CXX": "/nonexistent/compiler"}
NOT_BUILT = "not built: no C++ compiler that works was found"
WITHOUT_CUDA = "the compiled module has no CUDA kernels"
REPORT = "import runpy; runpy.run_module('divnorm_kernels', run_name='__main__')"
USE = """
import torch, divnorm_kernels
from divnorm_kernels.backends import cpu
from divnorm_kernels.reference import divisive_norm as reference

def results(function, **options):
    torch.manual_seed(0)
    x, weight, bias, dy = torch.randn(2, 8, 9, 7), torch.randn(8), torch.randn(8), torch.randn(2, 8, 9, 7)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = function(*inputs, window=5, norm_window=3, groups=2, sigma=0.5, **options)
    return y, *torch.autograd.grad(y, inputs, dy.double())

# float64, and sums of some hundred numbers of order one
for ours, expected in zip(results(divnorm_kernels.divisive_norm, backend={backend!r}), results(reference), strict=True):
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
print(divnorm_kernels.__file__, cpu.instruction_set())
"""
WITHOUT_KERNELS = "import warnings; warnings.simplefilter('ignore')\n" + USE.format(backend=None)
# What a clone has and a source distribution has not, and the other way round.
OF_A_CLONE = {".ci/run", ".ci/wheels", ".gitignore"}
GENERATED = {"PKG-INFO", "setup.cfg"}
IMPORTED_AS = {"pillow": "PIL", "scikit-image": "skimage", "scikit-learn": "sklearn"}


def tracked():
    """The files of the repository, new ones too."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines()
    return {name for name in listed if (ROOT / name).exists()}


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources alone: nothing compiled."""
    for name in tracked():
        target = tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return tmp_path / "tree"


def python(code, cwd, **environment):
    """What the code prints with the package in ``cwd``."""
    return run_python("-c", ALONE + code, cwd=cwd, **environment)


def sdist(tree):
    """The source distribution, unpacked."""
    target = tree.parent / "sdist"
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run_python("-c", build, target, cwd=tree)
    (built,) = target.glob("*.tar.gz")
    with tarfile.open(built) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of not naming a filter, which older Pythons do not know
        archive.extractall(target)
    return target / built.name.removesuffix(".tar.gz")


def wheel(tree, **environment):
    """Builds a wheel; returns it and pip's full output."""
    target = tree.parent / "wheels"
    shutil.rmtree(target, ignore_errors=True)
    done = run(
        sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-v", "--wheel-dir", target, cwd=tree, **environment
    )
    (built,) = target.glob("*.whl")
    return built, done.stdout + done.stderr


def installed(built, where):
    """A fresh environment with the wheel: its Python, which finds torch where this one does (with -I: there alone)."""
    run_python("-m", "venv", "--without-pip", where)
    interpreter = where / "bin" / "python"
    run_python("-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", built)
    (site,) = where.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    return interpreter, site


def editable(tree, **environment):
    """Installs the tree itself, beside this interpreter's packages; returns what it then says of itself."""
    prefix = tree.parent / "prefix"
    command = ("-m", "pip", "install", "--editable", ".", "--no-deps", "--ignore-installed", "--prefix", prefix)
    run(sys.executable, *command, cwd=tree, **environment)
    return python(REPORT, tree)


def broken_nvcc(where, only=""):
    """A compiler that fails where ``only`` is among its arguments, else the real one."""
    script = where / "nvcc"
    where.mkdir()
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *{only}*) echo "line 7: error: expected \\";\\" behind \\$<x>" >&2; exit 1;; esac\n'
        f'exec {shutil.which("nvcc")} "$@"\n'
    )
    script.chmod(0o755)
    return script


def imported(folder):
    """Packages of others that the modules of a folder import."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {folder.name}


def unpacked(built, where):
    with zipfile.ZipFile(built) as archive:
        archive.extractall(where)
    return where


def test_the_source_distribution_is_the_repository(tree):
    root = sdist(tree)
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    kept = {name for name in names if not name.startswith("divnorm_kernels.egg-info/")}
    assert kept - GENERATED == tracked() - OF_A_CLONE
    metadata = message_from_string((root / "PKG-INFO").read_text())
    assert metadata["License-Expression"] == "MIT"
    required = {
        (re.match(r"[\w-]+", line)[0], *re.findall(r"extra == .(\w+)", line))
        for line in metadata.get_all("Requires-Dist")
    }
    assert imported(root / "divnorm_kernels") - {"triton"} == {name for name, *extra in required if not extra}
    assert imported(root / "bench") - imported(root / "divnorm_kernels") == {
        IMPORTED_AS.get(name, name) for name, *extra in required if extra == ["bench"]
    } | {"divnorm_kernels"}


@pytest.mark.skipif("DIVNORM_NO_WHEEL" in os.environ, reason="minutes to compile what the installation has been of")
def test_from_the_source_distribution_to_kernels_in_a_fresh_environment(tree, tmp_path):
    root = sdist(tree)
    built, _ = wheel(root, **CPU_ALONE)
    interpreter, site = installed(built, tmp_path / "environment")
    package = site / "divnorm_kernels"
    names = {p.name for p in package.iterdir()}
    assert {"py.typed", "_native.pyi"} <= names
    assert "not_built.txt" not in names
    assert any(name.startswith("_native.") and name.endswith((".so", ".pyd")) for name in names)
    assert list(site.glob("divnorm_kernels-*.dist-info/licenses/LICENSE"))
    report = run(interpreter, "-I", "-m", "divnorm_kernels", cwd=tmp_path).stdout
    assert "backend cpu: available\n" in report
    assert f"backend cuda: missing: {WITHOUT_CUDA}: it was built with DIVNORM_CUDA=off\n" in report
    code = "from divnorm_kernels.backends import cpu; print(*cpu.instruction_sets())"
    sets = run(interpreter, "-I", "-c", code, cwd=tmp_path).stdout.split()
    assert sets[-1] == "baseline"
    assert "avx512" not in sets
    for name in sets:
        used = run(interpreter, "-I", "-c", USE.format(backend="cpu"), cwd=tmp_path, DIVNORM_INSTRUCTION_SET=name)
        assert used.stdout.split() == [str(package / "__init__.py"), name]

    # Code compiled for one instruction set must not be what the linker picks for all of them.
    objects = [file for file in (root / "build").rglob("*.cpp.o") if "divnorm_cpu_" in str(file)]
    assert objects
    for file in objects:
        symbols = run("nm", "--demangle", "--defined-only", "--extern-only", file).stdout.splitlines()
        shared = [line for line in symbols if f"divnorm::{file.parts[-4].split('_')[-1].split('.')[0]}::" not in line]
        assert [line for line in shared if "DW.ref." not in line] == []

    # A second build: CMake's cache of the first names tools that pip has deleted since. It compiles into the tree, and
    # CUDA kernels that do not compile cost it those alone.
    assert not list((root / "divnorm_kernels").glob("_native*.so"))
    nvcc = broken_nvcc(tmp_path / "cuda", "kernels_")
    few = "-DDIVNORM_INSTRUCTION_SETS=baseline -DDIVNORM_OPTIMIZE=-O0"
    report = editable(root, CMAKE_ARGS=few, CUDACXX=str(nvcc))
    assert "backend cpu: available\n" in report
    reason = "they did not compile (line 7: error: expected ''' behind ''x')"
    if shutil.which("nvcc") is None:
        reason = "no CUDA compiler that works was found when it was built"
    assert f"backend cuda: missing: {WITHOUT_CUDA}: {reason}\n" in report
    assert len(list((root / "divnorm_kernels").glob("_native*.so"))) == 1
    assert python(USE.format(backend="cpu"), root).split()[0] == str(root / "divnorm_kernels" / "__init__.py")

    # A third, for processors that this is none of.
    report = editable(root, CMAKE_ARGS="-DDIVNORM_INSTRUCTION_SETS= -DDIVNORM_CUDA=off -DDIVNORM_OPTIMIZE=-O0")
    assert "backend cpu: missing: the compiled module has kernels for other processors alone: install it here" in report
    assert "instruction set: none\n" in report
    assert python(WITHOUT_KERNELS, root).split()[1] == "None"


def test_editable_install_without_a_compiler_is_pure_python(tree):
    assert f"backend cpu: missing: {NOT_BUILT}\n" in editable(tree, **NO_COMPILER)


def test_without_a_compiler_the_install_is_pure_python_and_says_so(tree, tmp_path):
    built, output = wheel(tree, **NO_COMPILER)
    assert f"the compiled module was {NOT_BUILT}" in output
    home = unpacked(built, tmp_path / "home")
    assert not list(home.rglob("*.so"))
    assert python(WITHOUT_KERNELS, home).split()[1] == "None"
    report = python(REPORT, home)
    assert f"backend cpu: missing: {NOT_BUILT}\n" in report
    assert f"backend cuda: missing: {NOT_BUILT}\n" in report


def native_build(where, **environment):
    """The build of the module alone, with this environment's tools."""
    run_python("setup.py", "build_ext", "--build-lib", where, "--build-temp", where, **environment)


def test_a_build_that_requires_the_native_module_fails_without_a_compiler(tmp_path):
    with pytest.raises(AssertionError, match=f"error: the compiled module was {re.escape(NOT_BUILT)}"):
        native_build(tmp_path, **NO_COMPILER, DIVNORM_REQUIRE_NATIVE="1")


@pytest.mark.parametrize("value", ["on", "ON"])
def test_cuda_kernels_that_were_asked_for_are_not_left_out(tmp_path, value):
    with pytest.raises(AssertionError, match="error: the compiled module was not built: DIVNORM_CUDA=on, and no"):
        native_build(tmp_path, CMAKE_ARGS=f"-DDIVNORM_CUDA={value}", CUDACXX=str(broken_nvcc(tmp_path / "cuda")))


def configured(tmp_path, *options, **environment):
    """What CMake says of a configuration."""
    python_here = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    return run("cmake", "-S", ROOT, "-B", tmp_path / "build", *python_here, *options, **environment).stdout


def test_a_cuda_compiler_that_does_not_work_is_none(tmp_path):
    said = configured(tmp_path, CUDACXX=str(broken_nvcc(tmp_path / "cuda")))
    assert "the CUDA kernels are left out: no CUDA compiler that works was found" in said


def test_cuda_kernels_stay_off_in_a_build_that_had_them_on(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    assert "left out" not in configured(tmp_path)
    assert "the CUDA kernels are left out: it was built with" in configured(tmp_path, "-DDIVNORM_CUDA=off")


def test_an_unknown_choice_of_cuda(tmp_path):
    with pytest.raises(AssertionError, match="DIVNORM_CUDA: got maybe, expected auto, on or off"):
        configured(tmp_path, "-DDIVNORM_CUDA=maybe")


def compiled_for(what, said):
    return " ".join(re.findall(rf"divnorm_kernels: {what} kernels for (.*)", said))


def test_instruction_sets_that_are_chosen(tmp_path):
    """By default the best that this processor runs, as torch has it."""
    if platform.machine() != "x86_64":
        pytest.skip("needs an x86-64 processor")
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    for chosen, wanted in (("native", best), ("baseline;avx2;avx512", "baseline avx2 avx512"), ("", "")):
        options = ("-DDIVNORM_NATIVE_TESTS=ON", f"-DDIVNORM_INSTRUCTION_SETS={chosen}")
        assert compiled_for("CPU", configured(tmp_path, *options)) == wanted


def test_gpus_that_are_compiled_for(tmp_path):
    """Those that nvidia-smi names and nvcc knows; whatever it is, later ones get PTX that has clusters."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    script = tmp_path / "nvidia-smi"
    script.touch(0o755)
    for printed, wanted in (
        ("echo 9.0", "sm_90 compute_90"),
        ("echo 8.6; echo 9.0; echo 8.6", "sm_86 sm_90 compute_90 compute_80"),
        ("echo 8.0", "sm_80 compute_90"),
        ("echo 99.0; echo 8.9", "sm_89 compute_90 compute_80"),
        # with CUDA 12.8 or newer
        ("echo 7.5; echo '[N/A]'", "sm_80 sm_90 sm_100 sm_120 compute_90"),
        ("echo failed: 9.0; exit 9", "sm_80 sm_90 sm_100 sm_120 compute_90"),
    ):
        script.write_text(f"#!/bin/sh\n{printed}\n")
        said = configured(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert compiled_for("CUDA", said) == wanted
        assert ("does not know sm_990" in said) == ("99.0" in printed)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package without its compiled module, and where that would be."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "not_built.txt")
    package = shutil.copytree(ROOT / "divnorm_kernels", tmp_path / "divnorm_kernels", ignore=ignored)
    return tmp_path, package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_a_module_that_was_never_built(copy):
    home, module = copy
    report = python(REPORT, home)
    assert f"backend cpu: missing: not built: {module.parent} has no {module.name}\n" in report
    module.with_name("not_built.txt").write_text("the compiler was tired\n")
    assert "backend cpu: missing: not built: the compiler was tired\n" in python(REPORT, home)
    warned = subprocess.run(
        [sys.executable, "-c", ALONE + "import divnorm_kernels"], cwd=home, capture_output=True, text=True, check=True
    )
    assert "served by the slow reference (not built: the compiler was tired)" in warned.stderr


def test_a_module_that_does_not_load(copy):
    home, module = copy
    module.write_bytes(b"no library at all")
    report = python(REPORT, home)
    assert f"backend cpu: missing: the compiled module does not load: {module}: " in report
    assert "circular" not in report
