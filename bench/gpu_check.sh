#!/usr/bin/env bash
# Everything that takes a GPU: a build for it, the tests on the device, compute-sanitizer, the benchmark. Needs no
# network: Python must have torch, setuptools and pybind11, and cmake and nvcc be there.
# Usage: bench/gpu_check.sh [FOLDER]; logs, JSON and plots go to FOLDER. Steps: STEPS="tests memcheck ... bench".
# A benchmark that was cut off goes on where FOLDER has its results. Not among the steps without being asked for:
# STEPS=tune tunes the backends' tables and puts them into the package; TUNE="--backend cuda ..." says what.
# STEPS=profile shows the kernels of PROFILE="64x512x28x28 ..." under Nsight Compute.
# STEPS=train runs the experiments, TRAIN_STEPS each, on the data in the folder DATA.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/out/gpu}
python=${PYTHON:-python3}
steps=${STEPS:-build tests memcheck racecheck synccheck initcheck bench layers}
suite=${SUITE:-gpu-targets}
mkdir -p "$out"
export PYTHONPATH=.:tests PYTHONUNBUFFERED=1 HYPOTHESIS_PROFILE=${HYPOTHESIS_PROFILE:-quick}
export DIVNORM_REQUIRE_NATIVE=1
failed=0

# For the GPU at hand alone, which takes a minute where all architectures take several.
build() {
    local arch
    arch=$("$python" -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))') || return
    CMAKE_ARGS="-DDIVNORM_CUDA=on -DDIVNORM_CUDA_ARCHS=$arch" "$python" setup.py build_ext --inplace
}

# Compiling for Triton takes most of the time, so side by side; the largest tensors one after the other.
tests() {
    local options=(-p no:cacheprovider) parallel=()
    "$python" -c 'import xdist' && parallel=(--numprocesses "${JOBS:-$(nproc)}" --dist worksteal)
    "$python" -m pytest "${options[@]}" "${parallel[@]}" tests/test_gpu.py tests/test_cuda.py tests/test_triton.py &&
        "$python" -m pytest "${options[@]}" -m slow tests/test_gpu.py
}

profile() {
    read -ra cases <<<"${PROFILE:-64x512x28x28}"
    local sections=(SpeedOfLight MemoryWorkloadAnalysis Occupancy LaunchStats WarpStateStats)
    ncu --clock-control none --profile-from-start off "${sections[@]/#/--section=}" \
        "$python" -m bench.profiled "${cases[@]}"
}

# The paper's experiments, three runs at a time: one alone does not fill a GPU.
train() {
    local data=${DATA:?DATA: expected a folder with cifar-10-batches-bin, wikitext-2-small and super-resolution}
    local options=(--device cuda --jobs 3 --steps "${TRAIN_STEPS:-4000}")
    "$python" -m bench train cifar --data "$data/cifar-10-batches-bin" "${options[@]}" --out "$out/cifar-cnn" &&
        "$python" -m bench train text --data "$data/wikitext-2-small" "${options[@]}" --out "$out/text-lstm" &&
        "$python" -m bench train superres --data "$data/super-resolution" "${options[@]}" --out "$out/superres"
}

run() {
    local name=$1
    shift
    local begin=$SECONDS
    "$@" >"$out/$name.log" 2>&1
    local code=$?
    echo "== $name: exit $code after $((SECONDS - begin)) s"
    tail -n 5 "$out/$name.log"
    [ "$code" -eq 0 ] || failed=1
}

seconds=${SECONDS_A_SETTING:-0.5}
read -ra tune <<<"${TUNE:-}"
for step in $steps; do
    case $step in
    build | tests | profile | train) run "$step" "$step" ;;
    bench) run bench "$python" -m bench run --device cuda --suite "$suite" --seconds "$seconds" --resume --out "$out" ;;
    layers) run layers "$python" -m bench layers --device cuda --seconds "$seconds" --out "$out" ;;
    tune) run tune "$python" -m bench tune --jobs "${JOBS:-$(nproc)}" --install --out "$out/tuning" "${tune[@]}" ;;
    memcheck | racecheck | synccheck | initcheck)
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$step" compute-sanitizer --tool "$step" --error-exitcode 1 "$python" -m bench.sanitized
        ;;
    *)
        echo "STEPS: got $step, expected build, tests, memcheck, racecheck, synccheck, initcheck, bench, layers, tune, profile or train"
        failed=1
        ;;
    esac
done
exit $failed
