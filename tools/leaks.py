"""Print the leaks of LeakSanitizer's reports that the extensions allocated; exit status 1 if any.

A leak is ours when code of an extension stands in its stack before (above) the interpreter.
What an extension registers while it is imported lives as long as the process, and is no leak.
Usage: tools/leaks.py REPORT...
"""

import re
import sys
from pathlib import Path

OURS = re.compile(r"/bitnet_ext/_\w+\.cpython")
INTERPRETER = re.compile(r"/(lib)?python3[\w.]*(\.so[\d.]*)?(\+| |$)|Objects/|Python/|Modules/")
FOREIGN = re.compile(r"site-packages/(?!bitnet_ext)")


def is_ours(stack: list[str]) -> bool:
    if any("PyInit_" in frame for frame in stack):
        return False
    for frame in stack:
        if OURS.search(frame) or "/csrc/" in frame:
            return True
        if INTERPRETER.search(frame) or FOREIGN.search(frame):
            return False
    return False


def main() -> int:
    processes = ours = others = 0
    for path in map(Path, sys.argv[1:]):
        processes += 1
        for block in re.split(r"\n\s*\n", path.read_text(errors="replace")):
            frames = re.findall(r"^\s+#\d+ .*$", block, re.M)
            if not re.search(r"(Direct|Indirect) leak", block):
                if "ERROR: AddressSanitizer" in block or "runtime error" in block:
                    print(block)
                    ours += 1
            elif is_ours(frames):
                print(block, end="\n\n")
                ours += 1
            else:
                others += 1
    print(f"{processes} processes: {ours} leaks of the extensions, {others} of other code")
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
