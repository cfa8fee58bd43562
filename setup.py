"""Builds the compiled module by driving CMakeLists.txt; everything else about the package is in pyproject.toml."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MODULE = "divnorm_kernels._native"
REQUIRED = os.environ.get("DIVNORM_REQUIRE_NATIVE") == "1"
NOTE = "not_built.txt"
"""In place of a module that was not built: why, for backends/native.py to repeat, as pip hides what a build prints."""
ERRORS = (
    r"^CMake Error(?: at .*)?:\s*(.+(?:\n +\S.*)*)",  # CMake breaks the lines of its messages
    r"^(.*\b(?:error|fatal)\s*:.*)$",
)


class CMakeBuild(build_ext):
    """Builds the native module with CMake, which also receives the options in the environment variable CMAKE_ARGS.

    The module is optional: setuptools turns a CompileError into a warning and the package installs as pure Python,
    unless DIVNORM_REQUIRE_NATIVE=1 or the CUDA kernels were asked for (-DDIVNORM_CUDA=on).
    """

    reason = None

    def run(self) -> None:
        super().run()
        note = Path(self.get_ext_fullpath(MODULE)).with_name(NOTE)  # in the source tree where the module belongs there
        note.unlink(missing_ok=True)
        if self.reason is not None:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(self.reason + "\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        try:
            self._cmake(build, output)
        except (OSError, ImportError, BuildError) as error:
            self.reason = str(error)
            ext.optional = ext.optional and cached(build, "DIVNORM_CUDA") != "on"
            raise CompileError(
                f"the compiled module was not built: {error}. Without it the package works in pure Python, with "
                'backend="reference" only. With a C++17 compiler in place, install again for the CPU kernels.'
            ) from error

    def _cmake(self, build: Path, output: Path) -> None:
        import pybind11

        cmake = shutil.which("cmake")
        if cmake is None:
            raise FileNotFoundError("cmake is not on the PATH")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDIVNORM_VERSION={self.distribution.get_version()}",
        ]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        compile_all = [cmake, "--build", str(build), "--parallel"]
        try:
            run([*configure, "--fresh"])  # an earlier build's cache points at a ninja that pip has deleted since
            run(compile_all)
        except BuildError as error:
            if cached(build, "DIVNORM_CUDA") != "auto" or not cached(build, "CMAKE_CUDA_COMPILER"):
                raise
            print("divnorm_kernels: once more, without the CUDA kernels", flush=True)
            run([*configure, "-DDIVNORM_CUDA=off", f"-DDIVNORM_WITHOUT_CUDA=they did not compile ({error})"])
            run(compile_all)
        output.parent.mkdir(parents=True, exist_ok=True)
        built = next(build.glob("_native*.so"), None) or next(build.glob("_native*.pyd"))
        shutil.copy2(built, output)


class BuildError(Exception):
    """What a build says of its failure, in a line."""


def run(command: list[str]) -> None:
    """Runs a command and shows what it prints; a failure raises a BuildError."""
    printed = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as job:
        for line in job.stdout:
            print(line, end="", flush=True)
            printed.append(line)
    if job.returncode != 0:
        found = (re.search(pattern, "".join(printed), re.MULTILINE) for pattern in ERRORS)
        words = next((match[1] for match in found if match), f"{' '.join(command)} ended with {job.returncode}")
        raise BuildError(textwrap.shorten(words, 300).rstrip("."))


def cached(build: Path, name: str) -> str:
    """An entry of CMake's cache in lower case, empty where there is none or nothing was found."""
    cache = build / "CMakeCache.txt"
    entry = re.search(rf"^{name}:\w+=(.*)$", cache.read_text(), re.MULTILINE) if cache.exists() else None
    return "" if entry is None or entry[1].endswith("NOTFOUND") else entry[1].lower()


setup(
    ext_modules=[Extension(MODULE, sources=[], optional=not REQUIRED)],
    cmdclass={"build_ext": CMakeBuild},
)
