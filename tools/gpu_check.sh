#!/usr/bin/env bash
# Everything that wants a GPU: build, smoke test of the kernels, tests, benches. Takes no more than
# ten minutes and no network; needs python with the test extra and CuPy (cuda12 or cuda13), g++, a
# CUDA device, and torch and transformers for the peers, of which nothing is claimed where they are
# absent. A stage that fails or runs out of time does not stop the others (but nothing runs without
# a build); what became of each is in bench/results/gpu_check.json as soon as it has ended.
#
#   tools/gpu_check.sh             all of it
#   WHEELS=dir tools/gpu_check.sh  with the wheels of that folder, CuPy's for one, put before all
#   OUT=dir tools/gpu_check.sh     results, and the log, in that folder as well
#   COMMIT=hash tools/gpu_check.sh what results name, of a copy that has no .git
#   SANITIZE=1 tools/gpu_check.sh  the tests once more under compute-sanitizer's memcheck: four
#                                  minutes more
#   DRY=1 tools/gpu_check.sh       without a card: the tests' emulated device stands in, tiny shapes;
#                                  bench/results stays as it is
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
dry=${DRY:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
results=$PWD/bench/results
[ -n "$dry" ] && results=$work/results && mkdir -p "$results"
export PYTHONPATH=$work/site:$PWD:$PWD/tests JOBS=${JOBS:-$(nproc)}
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
export PATH=$scripts:$PATH # where pip has put cmake, ninja and cython
export COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null)}
stages=()
failed=

card() { # name and driver
  nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1
}

report() { # the stages so far, wherever results go
  {
    printf '{\n "machine": {"card": "%s", "driver": "%s", "date": "%s", "commit": "%s"},\n' \
      "$(card name)" "$(card driver_version)" "$(date +%F)" "$COMMIT"
    printf ' "results": [\n'
    local i
    for i in "${!stages[@]}"; do
      printf '  %s%s\n' "${stages[i]}" "$([ "$i" -lt $((${#stages[@]} - 1)) ] && echo ,)"
    done
    printf ' ]\n}\n'
  } >"$results/gpu_check.json"
  if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    cp "$results/gpu_check.json" "$work/log" "$OUT"
    tar -czf "$OUT/gpu_results.tar.gz" -C "$results" $(cd "$results" && ls -d gpu_*.json)
  fi
}

# Seconds of the stages add up to 580; what one leaves goes to those that follow.
due=0
stage() { # name, seconds, command
  due=$((due + $2))
  local name=$1 limit=$((due - SECONDS)) start=$SECONDS status=0
  shift 2
  echo "== $name" | tee -a "$work/log"
  if [ "$limit" -le 0 ]; then
    status=124
  else
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$work/log" || status=$?
  fi
  local found=passed
  case $status in
    0) ;;
    3) found="no peer" ;;
    124 | 137) found="out of time" && failed=1 ;;
    *) found="failed ($status)" && failed=1 ;;
  esac
  echo "-- $name: $found, $((SECONDS - start)) s" | tee -a "$work/log"
  stages+=("{\"name\": \"$name\", \"result\": \"$found\", \"seconds\": $((SECONDS - start))}")
  report
  return "$status"
}

tests() { # name, seconds, marks of the tests, which of them, what runs python
  local name=$1 limit=$2 marked=$3 which=$4
  shift 4
  stage "$name" "$limit" "$@" -m pytest -q -p no:cacheprovider -W default \
    --continue-on-collection-errors -m "$marked" -k "$which" tests/test_gpu_*.py
}

on_card=("$python")
all=(bench/gpu/all)
chosen="cuda and not emulator"
order=cuda
[ -n "$dry" ] || export BITNET_TEST_CUDA=1
if [ -n "$dry" ]; then
  on_card=("$python" -m cuda_emulator)
  all=(bench/gpu/all --emulated --results "$results")
  chosen="test_gpu_mask and ascending and streams"
  order=ascending
fi

if [ -n "${WHEELS:-}" ]; then
  stage packages 20 "$python" -m pip install -q --no-index --no-deps --no-compile \
    --disable-pip-version-check --target "$work/site" "$WHEELS"/*.whl
fi
stage build 150 tools/dev_build.sh || exit 1
[ -n "$dry" ] || stage driver 5 nvidia-smi
stage device 15 "${on_card[@]}" -c '
from bitnet_ext.gpu.device import cuda_device
card = cuda_device()
print(card.name, card.capability / 10, card.processors)
'
stage compile 60 "${on_card[@]}" -c 'from bitnet_ext.cli import main; main()' info --warm
mkdir -p "$work/smoke"
[ -n "$dry" ] || stage smoke 60 "$python" bench/gpu/all --smoke --seconds 30 --results "$work/smoke"
tests "hot path" 30 hot_path "$order" "$python"
tests tests 90 "" "$chosen" "$python"
if [ -n "${SANITIZE:-}" ]; then
  tests memcheck 240 "" "$chosen" compute-sanitizer --tool memcheck --error-exitcode 1 "$python"
fi
stage benches 150 "$python" "${all[@]}" --seconds 90
exit "${failed:-0}"
