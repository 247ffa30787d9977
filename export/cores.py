"""How many threads share an operator, which decides the last bits of results."""

from __future__ import annotations

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """Threads that share an operator of ONNX Runtime: one per core that this process may run on.

    A product of float32 is cut among them, and where it is cut decides how its sums are rounded. So this number is part
    of what a run depends on, and is given to every machine that takes part in it.
    """
    try:
        return len({_core_of(cpu) for cpu in os.sched_getaffinity(0)})
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _core_of(cpu: int) -> str:
    """Tells the core of a logical CPU from others: all that belong to it, where the system says so."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text("ascii").strip()
    except OSError:
        return str(cpu)
