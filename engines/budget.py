"""How much memory a process may take, and has taken."""

from __future__ import annotations

import gc

from .memory import available_memory, current_rss, return_freed_memory
from .onnxruntime import import_onnxruntime

AVAILABLE_SHARE = 0.8
"""How much of the memory that is there may be taken, if nothing else is said: files that are read want some too."""

SPARE = 16 << 20
"""Bytes by which a budget that is named exceeds what is needed: the next process may begin with a little more."""


def base_memory() -> int:
    """Bytes that this process takes before any piece."""
    import_onnxruntime()  # which takes memory itself
    if gc.get_count()[2]:  # many objects are new: graphs that are done with have cycles
        gc.collect()
    return_freed_memory()
    return current_rss()


def find_budget(memory: int | None) -> int | None:
    """Bytes that this process may take: ``memory``, or most of what the machine has left; None if that is unknown."""
    if memory is not None:
        return memory
    available = available_memory()
    return None if available is None else current_rss() + int(AVAILABLE_SHARE * available)
