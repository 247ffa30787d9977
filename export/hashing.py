"""SHA-256 of files and arrays, in hex."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from .errors import BismoothError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .state import State

_BLOCK_BYTES = 1 << 20
_MARK_BYTES = 1 << 28


def file_sha256(path: Path) -> str:
    """Of a file's content, which is read in blocks."""
    return _file_sha256(path, path.name, None, Event())


@contextmanager
def hashing(paths: Mapping[str, Path], state: State | None = None) -> Generator[Callable[[], dict[str, str]]]:
    """:func:`file_sha256` of files by name, on a thread of its own while the block runs; a call waits for the rest.

    An error in the block, or an interrupt, ends the thread within one read.

    Args:
        paths: the files.
        state: notes how much of each was read and what it was, every 256 MB. What an earlier run noted must be so now.

    Raises:
        BismoothError: by the call, the files are not those that the earlier run has read.
    """
    stopped = Event()
    with ThreadPoolExecutor(1) as pool:
        futures = {name: pool.submit(_file_sha256, path, name, state, stopped) for name, path in paths.items()}
        try:
            yield lambda: {name: future.result() for name, future in futures.items()}
            wait(futures.values())
        finally:
            stopped.set()


def _file_sha256(path: Path, name: str, state: State | None, stopped: Event) -> str:
    digest, block, position = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES)), 0
    noted = None if state is None else state.noted(f"read {name}")
    known, expected = noted or (0, digest.hexdigest())
    with path.open("rb", buffering=0) as file:
        try:
            while count := file.readinto(block[: max(known - position, 0) or _BLOCK_BYTES]):
                if stopped.is_set():
                    raise CancelledError
                digest.update(block[:count])
                position += count
                if position == known and digest.hexdigest() != expected:
                    break
                if position >= known + _MARK_BYTES and state is not None:
                    known, expected = position, digest.hexdigest()
                    state.note(f"read {name}", (known, expected))
        finally:
            if position > known and state is not None:
                state.note(f"read {name}", (position, digest.hexdigest()))
    if position <= known and digest.hexdigest() != expected:
        raise BismoothError(
            f"{path}: was changed since an unfinished run began to read it. Expected SHA-256 {expected} of its first "
            f"{known} bytes, got {digest.hexdigest()} of {position}. Pass --restart to discard that run."
        )
    return digest.hexdigest()


def array_sha256(array: NDArray[Any]) -> str:
    """Of an array's type, shape, and values in little-endian bytes, row by row."""
    import numpy as np

    values = np.ascontiguousarray(array)
    values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(f"{values.dtype.name} {' '.join(map(str, array.shape))} ".encode())
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
