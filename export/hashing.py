"""SHA-256 of files and arrays, in hex."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Event
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .errors import UnfinishedRunError

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
        UnfinishedRunError: by the call, the files are not those that the earlier run has read.
    """
    stopped = Event()
    with ThreadPoolExecutor(1) as pool:
        futures = {name: pool.submit(_file_sha256, path, name, state, stopped) for name, path in paths.items()}
        try:
            yield lambda: {name: future.result() for name, future in futures.items()}
            wait(futures.values())
        finally:
            stopped.set()


class WrittenHash:
    """:func:`file_sha256` of a file whose parts are being written, in any order: a thread follows from the front on.

    An error in the block that it is open for, or an interrupt, ends the thread within one read.
    """

    def __init__(self, path: Path, ends: Mapping[str, int]) -> None:
        """Of a file, given by the name of each part, in the order of the file, the byte that it ends before.

        The bytes in front of the first part are there.
        """
        self._path, self._ends = path, ends
        self._written: set[str] = set()
        self._changed = Condition()
        self._stopped = Event()
        self._pool = ThreadPoolExecutor(1)

    def add(self, names: Iterable[str]) -> None:
        """These parts are written."""
        with self._changed:
            self._written.update(names)
            self._changed.notify()

    def hexdigest(self) -> str:
        """The hash, when all parts were added and read."""
        return self._future.result()

    def __enter__(self) -> Self:
        self._future = self._pool.submit(self._run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped.set()
            self._changed.notify()
        self._pool.shutdown()

    def _run(self) -> str:
        digest, start = hashlib.sha256(), 0
        for name, end in self._ends.items():
            with self._changed:
                self._changed.wait_for(lambda name=name: name in self._written or self._stopped.is_set())
            # opened for each part: where several machines write, what was read ahead may be older than what is there
            self._feed(digest.update, start, end)
            start = end
        return digest.hexdigest()

    def _feed(self, update: Callable[[memoryview], None], start: int, end: int) -> None:
        """Give a hash the bytes of the file from ``start`` up to ``end``."""
        block = memoryview(bytearray(_BLOCK_BYTES))
        with self._path.open("rb", buffering=0) as file:
            place = file.seek(start)
            while count := file.readinto(block[: end - place]):
                if self._stopped.is_set():
                    raise CancelledError
                update(block[:count])
                place += count


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
        raise UnfinishedRunError(
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
