#!/usr/bin/env bash
# Everything that wants a GPU: build, compile every kernel, test, bench. Needs no network, but
# python with the test extra and CuPy (cuda12 or cuda13), g++, and a CUDA device; takes minutes, at
# most ten. Results go to bench/results/gpu*.json with card, driver, date and commit.
#
#   tools/gpu_check.sh             all of it
#   SANITIZE=1 tools/gpu_check.sh  the tests once more under compute-sanitizer's memcheck
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/tests
results=bench/results

step() {
  local start=$SECONDS
  echo "== $1"
  shift
  "$@"
  echo "-- $((SECONDS - start)) s"
}

card() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  "$python" -c 'from bitnet_ext.gpu.device import cuda_device; print(cuda_device().name)'
}

on_the_card() { # the tests of kernels, on the card alone
  timeout 240 "$@" -m pytest -q -p no:cacheprovider -k "cuda and not emulator" tests/test_gpu_*.py
}

cli() {
  timeout 240 "$python" -c 'from bitnet_ext.cli import main; main()' "$@"
}

bench_cli() { # the ways through a model, of the 2B shape
  cli bench --device cuda --preset bitnet_2b_4t \
    --kv-dtype f16 --prompt-tokens 512 --new-tokens 64 --json --quiet >"$results/gpu_model.json"
}

step "build" tools/dev_build.sh
step "card" card
step "compile" cli info --warm
step "tests on the card" on_the_card "$python"
if [ -n "${SANITIZE:-}" ]; then
  step "memcheck" on_the_card compute-sanitizer --tool memcheck --error-exitcode 1 "$python"
fi
step "kernels" timeout 180 "$python" bench/gpu/bench_kernels.py --json "$results/gpu.json"
step "model" bench_cli
