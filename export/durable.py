"""Who makes sure that data are on disk before they count as written.

What one process writes and records, it flushes once, before the record. Where others write for it, on other machines,
each of them does so itself: what they have not sent yet, nobody else can.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager


class _Process:
    is_writing_through = False


_process = _Process()


@contextmanager
def writing_through() -> Generator[None]:
    """While it is open, :func:`settle` writes through to disk, in all threads of this process."""
    before, _process.is_writing_through = _process.is_writing_through, True
    try:
        yield
    finally:
        _process.is_writing_through = before


def settle(descriptor: int) -> None:
    """Called when a task has written to a file: inside :func:`writing_through`, let it be on disk."""
    if _process.is_writing_through:
        os.fsync(descriptor)
