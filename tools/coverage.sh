#!/usr/bin/env bash
# Line coverage of the Python and the C++ sources by the tests; arguments go to pytest. Fails where a
# line of the masks is not covered.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/coverage
BUILD_DIR=$build PREFIX=$build/site tools/dev_build.sh -DBITNET_COVERAGE=ON
find $build -name '*.gcda' -delete
PYTHONPATH="$PWD/$build/site" "${PYTHON:-python3}" -P -m pytest \
  --cov="$PWD/$build/site/bitnet_ext" --cov-report=term-missing:skip-covered "$@"
# A line counts as covered when one instance of its template ran; busy loops overflow gcov's idea of
# a likely count.
cpp_lines() {
  gcovr --root . --exclude-throw-branches --merge-lines \
    --gcov-ignore-parse-errors=suspicious_hits.warn_once_per_file --txt - "$@" "$build"
}
cpp_lines --filter csrc/ --txt-summary
"${PYTHON:-python3}" -m coverage report --show-missing --include='*/bitnet_ext/masks.py' --fail-under=100
cpp_lines --filter csrc/mask/ --filter csrc/bind/mask.cpp --fail-under-line 100
