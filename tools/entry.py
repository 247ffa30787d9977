"""Where the command starts. Imports as little as possible, so that Ctrl-C is answered while the rest is imported."""

from __future__ import annotations

import sys

INTERRUPTED = 130
MESSAGE = (
    "Interrupted. Nothing is half-written. Run the command again; 'compile', 'calibrate', 'quantize' and 'verify' go "
    "on from here."
)


def main() -> int:
    """Run the command that the arguments of this process name, and return its exit status."""
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write(f"error: {MESSAGE}\n")
        return INTERRUPTED
