#!/usr/bin/env bash
# Build for aarch64 and run the tests under qemu-user; arguments go to pytest. tests/test_digests.py
# compares bits with those of x86-64.
# Needs Debian 12 with g++-aarch64-linux-gnu and qemu-user, the environment of CONTRIBUTING.md, and
# the network on the first run: Debian's arm64 Python, from this machine's own sources, is unpacked,
# not installed, and the tests' packages are PyPI's wheels for it, all below build/aarch64.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=$PWD/build/aarch64
root=$build/root
packages=$root/usr/lib/python3/dist-packages
version=3.11

debian_python() {
  local state=$build/apt
  mkdir -p "$state"/{lists/partial,cache/archives/partial} "$root"
  : >"$state/status"
  local apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64
    -o "Dir::State::Lists=$state/lists" -o "Dir::State::status=$state/status"
    -o "Dir::Cache=$state/cache" -o Debug::NoLocking=1)
  "${apt[@]}" update
  "${apt[@]}" install --download-only --no-install-recommends -y \
    python$version-minimal libpython$version-stdlib libpython$version-dev libstdc++6 >/dev/null
  for package in "$state"/cache/archives/*.deb; do dpkg -x "$package" "$root"; done
  # Child processes of tests start sys.executable, which the host must be able to run.
  cat >"$root/usr/bin/python3" <<EOF
#!/bin/sh
exec qemu-aarch64 -L "$root" -0 "\$0" "$root/usr/bin/python$version" "\$@"
EOF
  chmod +x "$root/usr/bin/python3"
}

test_packages() {
  "$python" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["test"], sep="\n")' |
    "$python" -m pip install --quiet --requirement /dev/stdin --target "$packages" \
      --only-binary=:all: --python-version $version --implementation cp \
      --platform manylinux_2_34_aarch64 --platform manylinux_2_28_aarch64 \
      --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64
}

[ -x "$root/usr/bin/python3" ] || debian_python
[ -d "$packages/numpy" ] || test_packages
CXX=aarch64-linux-gnu-g++ CC=aarch64-linux-gnu-gcc BUILD_DIR=$build/cmake PREFIX=$build/site \
  tools/dev_build.sh -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DPython_EXECUTABLE="$root/usr/bin/python3" \
  -DCMAKE_CXX_FLAGS="-idirafter $root/usr/include" -DCMAKE_C_FLAGS="-idirafter $root/usr/include"
export PYTHONPATH=$build/site PYTHONSAFEPATH=1
# qemu-user 7.2 itself aborts where the child of a process with threads starts threads
# (qemu_plugin_vcpu_init_hook: assertion failed).
"$root/usr/bin/python3" -m pytest --deselect tests/test_threads.py::test_a_forked_child_computes "$@"
