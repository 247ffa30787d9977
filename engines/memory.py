"""Memory of this process: its peak, and what was freed, back to the system.

NOTE: glibc keeps what a thread has freed for that thread's next allocations. A session allocates in a thread of its
own, so the next session would need new memory for its weights beside what the last one has freed.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path


def return_freed_memory() -> None:
    """Let glibc return the pages that hold nothing, those of other threads included; nothing elsewhere."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def peak_rss() -> int | None:
    """Peak resident memory of this process in bytes, ``None`` where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: on Linux it starts from the parent's peak
        match = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        return int(match[1]) * 1024 if match else None
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
