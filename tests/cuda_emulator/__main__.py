"""Run a script, or a line of Python, with the emulated device as the current one.

PYTHONPATH=.:tests python -m cuda_emulator SCRIPT [ARGUMENT ...]
PYTHONPATH=.:tests python -m cuda_emulator -c CODE [ARGUMENT ...]
"""

import runpy
import sys
from pathlib import Path

from cuda_emulator.emulator import EmulatedDevice

import bitnet_ext.gpu.device


def main() -> None:
    device = EmulatedDevice(90)
    bitnet_ext.gpu.device.cuda_device = lambda: device
    first, *rest = sys.argv[1:]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).resolve().parent))  # as python SCRIPT does
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
