"""SHA-256 of files and arrays, in hex."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK_BYTES = 1 << 20


def file_sha256(path: Path) -> str:
    """Of a file's content, which is read in blocks."""
    return _file_sha256(path, Event())


@contextmanager
def hashing(paths: Mapping[str, Path]) -> Generator[Callable[[], dict[str, str]]]:
    """:func:`file_sha256` of files by name, on a thread of its own while the block runs; a call waits for the rest.

    An error in the block, or an interrupt, ends the thread within one read.
    """
    stopped = Event()
    with ThreadPoolExecutor(1) as pool:
        futures = {name: pool.submit(_file_sha256, path, stopped) for name, path in paths.items()}
        try:
            yield lambda: {name: future.result() for name, future in futures.items()}
            wait(futures.values())
        finally:
            stopped.set()


def _file_sha256(path: Path, stopped: Event) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            if stopped.is_set():
                raise CancelledError
            digest.update(block[:count])
    return digest.hexdigest()


def array_sha256(array: NDArray[Any]) -> str:
    """Of an array's type, shape, and values in little-endian bytes, row by row."""
    import numpy as np

    values = np.ascontiguousarray(array)
    values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(f"{values.dtype.name} {' '.join(map(str, array.shape))} ".encode())
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
