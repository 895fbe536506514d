#!/usr/bin/env bash
# Build the extensions and put them beside the Python sources, for work in the checkout.
# Usage: tools/dev_build.sh [CMake options]; then PYTHONPATH=. pytest. PYTHON chooses the interpreter,
# BUILD_DIR the build's folder, PREFIX another place for the package (its Python files are copied).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
package() { "$python" -c "import $1, os; print(os.path.dirname($1.__file__))"; }
build=${BUILD_DIR:-build/dev}
if [ ! -f "$build/build.ninja" ] || [ $# -gt 0 ]; then
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$python")" \
    -DCMAKE_PREFIX_PATH="$(package pybind11)/share/cmake;$(package cython_cmake)" \
    -DCMAKE_MODULE_PATH="$(package cython_cmake)/cmake" -DSKBUILD_PROJECT_VERSION=dev "$@"
fi
cmake --build "$build" -j "${JOBS:-2}"
prefix=${PREFIX:-.}
if [ "$prefix" != . ]; then
  mkdir -p "$prefix"
  tar -c --exclude='*.so' --exclude=__pycache__ bitnet_ext | tar -x -C "$prefix"
fi
cmake --install "$build" --prefix "$prefix" >/dev/null
