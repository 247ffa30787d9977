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
            _feed(digest.update, self._path, self._stopped, start, end)
            start = end
        return digest.hexdigest()


def _file_sha256(path: Path, stopped: Event) -> str:
    digest = hashlib.sha256()
    _feed(digest.update, path, stopped)
    return digest.hexdigest()


def _feed(
    update: Callable[[memoryview], None], path: Path, stopped: Event, start: int = 0, end: int | None = None
) -> None:
    """Give a hash the bytes of a file from ``start`` on, up to ``end``."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        place = file.seek(start)
        while count := file.readinto(block if end is None else block[: end - place]):
            if stopped.is_set():
                raise CancelledError
            update(block[:count])
            place += count


def array_sha256(array: NDArray[Any]) -> str:
    """Of an array's type, shape, and values in little-endian bytes, row by row."""
    import numpy as np

    values = np.ascontiguousarray(array)
    values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(f"{values.dtype.name} {' '.join(map(str, array.shape))} ".encode())
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
