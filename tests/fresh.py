"""Run code in a Python process of its own, with the package under test importable."""

import os
import subprocess
import sys
from pathlib import Path

import bitnet_ext as bx

PACKAGE = Path(bx.__file__).resolve().parent
# AddressSanitizer keeps what is freed: resident memory says nothing.
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


def run(
    code: str, timeout: float = 120, emulator: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """The finished process; neither BITNET_* nor OMP_NUM_THREADS are inherited."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("BITNET_") and k != "OMP_NUM_THREADS"
    }
    return subprocess.run(
        [*emulator, sys.executable, "-P", "-c", code],
        env={**kept, "PYTHONPATH": str(PACKAGE.parent), **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def output(code: str, emulator: tuple[str, ...] = (), **env: str) -> str:
    """Standard output, stripped; the process must succeed."""
    done = run(code, emulator=emulator, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
