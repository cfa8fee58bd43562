#!/usr/bin/env bash
# Everything that takes a GPU, in steps of minutes that other runs go on with: `bench/gpu_check.sh` prints what is done
# and what to run next, `bench/gpu_check.sh run` runs that. Needs no network: Python (PYTHON=...) must have torch,
# setuptools, pybind11, pytest, hypothesis and the packages of the benchmark, and cmake and nvcc be there.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench gpu-check "${@:-status}"
