"""What a process needs that answers another one with JSON lines on its stdout."""

from __future__ import annotations

import os
import signal
from typing import TextIO


def claim_stdout() -> TextIO:
    """The real stdout, for answers alone: what native code prints there goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def leave_signals_to_caller() -> None:
    """What interrupts a command goes to all its processes: the caller then ends this one, and says why."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):  # Windows has no SIGHUP
            signal.signal(number, signal.SIG_IGN)
