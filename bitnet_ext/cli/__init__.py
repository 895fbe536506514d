"""The command line, ``bitnet-ext``; typer and rich are imported only when it runs."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script: run the command line and exit with its code."""
    try:
        from bitnet_ext.cli.app import run
    except KeyboardInterrupt:  # while typer and rich load
        sys.exit(130)
    sys.exit(run())
