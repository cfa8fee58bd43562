#!/usr/bin/env bash
# Everything that takes a GPU: the tests on the device, compute-sanitizer, the benchmark. Needs no network.
# Usage: bench/gpu_check.sh [FOLDER]; logs, JSON and plots go to FOLDER. Steps: STEPS="tests memcheck ... bench".
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/out/gpu}
python=${PYTHON:-python3}
steps=${STEPS:-tests memcheck racecheck synccheck initcheck bench}
suite=${SUITE:-gpu-targets}
mkdir -p "$out"
export PYTHONPATH=.:tests PYTHONUNBUFFERED=1 HYPOTHESIS_PROFILE=${HYPOTHESIS_PROFILE:-quick}
failed=0

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

for step in $steps; do
    case $step in
    tests) run tests "$python" -m pytest -p no:cacheprovider tests/test_gpu.py tests/test_triton.py ;;
    bench) run bench "$python" -m bench run --device cuda --suite "$suite" --seconds "${SECONDS_A_SETTING:-0.5}" --out "$out" ;;
    *) PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$step" compute-sanitizer --tool "$step" --error-exitcode 1 "$python" -m bench.sanitized ;;
    esac
done
exit $failed
