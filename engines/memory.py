"""Memory that was freed, back to the system.

NOTE: glibc keeps what a thread has freed for that thread's next allocations. A session allocates in a thread of its
own, so the next session would need new memory for its weights beside what the last one has freed.
"""

import ctypes
import platform
import sys


def return_freed_memory() -> None:
    """Let glibc return the pages that hold nothing, those of other threads included; nothing elsewhere."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
