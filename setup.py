"""Builds the compiled module by driving CMakeLists.txt; everything else about the package is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("DIVNORM_REQUIRE_NATIVE") == "1"


class CMakeBuild(build_ext):
    """Builds the native module with CMake, which also receives the options in the environment variable CMAKE_ARGS.

    The module is optional: setuptools turns a CompileError into a warning and the package installs as pure Python,
    unless DIVNORM_REQUIRE_NATIVE=1.
    """

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        try:
            self._cmake(build, output)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"the native module was not built ({error}). Without it the package works in pure Python, with "
                'backend="reference" only. With a C++17 compiler in place, install again for the CPU kernels.'
            ) from error

    def _cmake(self, build: Path, output: Path) -> None:
        import pybind11

        cmake = shutil.which("cmake")
        if cmake is None:
            raise FileNotFoundError("cmake is not on the PATH")
        configure = [
            cmake,
            "--fresh",  # an earlier build's cache points at a ninja that pip has deleted since
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
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        built = next(build.glob("_native*.so"), None) or next(build.glob("_native*.pyd"))
        shutil.copy2(built, output)


setup(
    ext_modules=[Extension("divnorm_kernels._native", sources=[], optional=not REQUIRED)],
    cmdclass={"build_ext": CMakeBuild},
)
