#!/usr/bin/env bash
# Run the tests under AddressSanitizer and UndefinedBehaviorSanitizer (g++); arguments go to pytest.
# The first finding stops the run. LEAKS=1: run LeakSanitizer at the end of every process as well,
# and report what the extensions allocated (Python itself and NumPy leave thousands of blocks).
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/sanitize
python=${PYTHON:-python3}
BUILD_DIR=$build PREFIX=$build/site tools/dev_build.sh -DBITNET_SANITIZE=ON
options=allocator_may_return_null=1:abort_on_error=1
if [ "${LEAKS:-0}" = 1 ]; then
  rm -f $build/leaks.*
  options+=:detect_leaks=1:fast_unwind_on_malloc=0:malloc_context_size=40:log_path=$PWD/$build/leaks
else
  options+=:detect_leaks=0
fi
# libstdc++ too: without it the exceptions of the extension have no interceptor to come back to.
libraries=$(for name in libasan.so libubsan.so libstdc++.so.6; do g++ -print-file-name=$name; done)
# Python's own allocator would hide the edges of small objects.
env LD_PRELOAD="$(echo $libraries)" PYTHONPATH="$PWD/$build/site" PYTHONMALLOC=malloc \
  ASAN_OPTIONS=$options LSAN_OPTIONS=exitcode=0 \
  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 "$python" -P -m pytest "$@"
if [ "${LEAKS:-0}" = 1 ]; then
  "$python" tools/leaks.py $build/leaks.*
fi
