"""Memory: what this process has taken, what the machine has left, and what was freed, back to the system.

NOTE: glibc keeps what a thread has freed for that thread's next allocations. A session allocates in a thread of its
own, so the next session would need new memory for its weights beside what the last one has freed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20
"""Bytes from which on a block is mapped by itself."""


def return_freed_memory() -> None:
    """Let glibc return the pages that hold nothing, those of other threads included; nothing elsewhere."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks() -> None:
    """From now on, let glibc return large blocks when they are freed; nothing elsewhere.

    By itself it learns to keep blocks of up to 32 MB for later, for each thread, and no larger ones fit between them: a
    run of several layers took up to twice what its values are, and the search for factors half as much again.
    """
    if _is_glibc():
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _is_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


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


def current_rss() -> int:
    """Resident memory of this process in bytes; where the system does not tell, the peak, or 0."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_rss() or 0


def available_memory() -> int | None:
    """Bytes that new allocations of this process may take, by the system and by its control group; None if unknown."""
    limits = [limit for limit in (_system_available(), _group_available()) if limit is not None]
    return min(limits, default=None)


def _system_available() -> int | None:
    info = Path("/proc/meminfo")
    match = re.search(r"^MemAvailable:\s*(\d+) kB", info.read_text(), re.MULTILINE) if info.exists() else None
    return int(match[1]) * 1024 if match else None


def _group_available() -> int | None:
    """What is left of the limit of a container (control groups, version 2); page cache counts as free."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cache = re.search(r"^file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(cache[1] if cache else 0))


def format_bytes(count: int) -> str:
    """Bytes rounded up to megabytes: ``2750MB``, as ``--memory`` takes it."""
    return f"{-(-count // 10**6)}MB"
