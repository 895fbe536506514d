#!/usr/bin/env bash
# Run the tests under AddressSanitizer, UndefinedBehaviorSanitizer and LeakSanitizer (g++);
# arguments go to pytest. The first bad access stops the run. Leaks are looked for at the end of
# every process, and those of the extensions reported (Python itself and NumPy leave thousands of
# blocks): operator new's caller is in the stack however short the fast unwinder cuts it.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/sanitize
python=${PYTHON:-python3}
BUILD_DIR=$build PREFIX=$build/site tools/dev_build.sh -DBITNET_SANITIZE=ON
rm -f $build/report.*
# libstdc++ too: without it the exceptions of the extension have no interceptor to come back to.
libraries=$(for name in libasan.so libubsan.so libstdc++.so.6; do g++ -print-file-name=$name; done)
# Python's own allocator would hide the edges of small objects. intercept_tls_get_addr: the leak
# checker of GCC 13 and older reads thread-local memory where glibc no longer keeps it, and crashes.
asan=allocator_may_return_null=1:abort_on_error=1:malloc_context_size=40:intercept_tls_get_addr=0
env LD_PRELOAD="$(echo $libraries)" PYTHONPATH="$PWD/$build/site" PYTHONMALLOC=malloc \
  ASAN_OPTIONS=$asan:log_path=$PWD/$build/report \
  LSAN_OPTIONS=exitcode=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  "$python" -P -m pytest "$@" && status=0 || status=$?
"$python" tools/leaks.py $build/report.*  # of a bad access too
exit $status
