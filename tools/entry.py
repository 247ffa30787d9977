"""Where the command starts. Imports as little as possible, so that Ctrl-C is answered while the rest is imported."""

from __future__ import annotations

import signal
import sys

INTERRUPTED = 130
MESSAGE = (
    "Interrupted. Nothing is half-written. Run the command again; 'compile', 'calibrate', 'quantize' and 'verify' go "
    "on from here."
)

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
_received: list[int] = []


def main() -> int:
    """Run the command that the arguments of this process name, and return its exit status.

    SIGTERM and SIGHUP, which batch schedulers, ``docker stop`` and dropped connections send, end it as Ctrl-C does.
    """
    for number in _ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, _interrupt)
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write(f"error: {MESSAGE}\n")
        return interrupted()


def interrupted() -> int:
    """The exit status of a command that was interrupted: 128 and the number of the signal."""
    return 128 + _received[0] if _received else INTERRUPTED


def is_ending() -> bool:
    """Whether the process has to end, whatever Ctrl-C means at the time."""
    return bool(_received)


def _interrupt(number: int, _frame: object) -> None:
    _received.append(number)
    if len(_received) == 1:  # later ones (a closed terminal sends SIGHUP twice) must not break off the unwinding
        raise KeyboardInterrupt
