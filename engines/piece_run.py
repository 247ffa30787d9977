"""A piece of a graph, on batches of windows: what it reads and writes lies in files, so it can run in any process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.durable import settle
from .onnxruntime import InMemoryGraph, Mode, Session

Ids = NDArray[np.int64]
Values = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """Windows from ``start`` up to the one before ``stop``."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        """Tells it from the other batches of a run."""
        return f"{self.start}-{self.stop}"


@dataclass(frozen=True)
class StreamFile:
    """A value of all windows in a file, one behind the other.

    Attributes:
        path: the file.
        value: its name in the graph.
        dtype: its type.
        shape: of one window.
    """

    path: Path
    value: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def window_bytes(self) -> int:
        """Bytes of one window."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def create(self, windows: int) -> None:
        """A file of the full size.

        Raises:
            OSError: there is no space.
        """
        with self.path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, windows * self.window_bytes)

    def read(self, batch: Batch) -> NDArray[Any]:
        """Values [n, …] of some windows."""
        count = batch.stop - batch.start
        data = np.fromfile(self.path, self.dtype, count * prod(self.shape), offset=batch.start * self.window_bytes)
        return data.reshape(count, *self.shape)

    def write(self, batch: Batch, values: NDArray[Any]) -> None:
        """Put the values [n, …] of some windows in their place.

        NOTE: the file is opened to write alone: a client of NFS that has read the rest of a page writes all of it, and
        other machines write there too.
        """
        rest = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8).data
        place = batch.start * self.window_bytes
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            while rest:
                count = os.pwrite(descriptor, rest, place)
                rest, place = rest[count:], place + count
            settle(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class PieceRun:
    """A piece and its place between two files: runs batches of windows in any process that sees the files.

    Attributes:
        label: what runs, for messages.
        model: the piece, a serialized ONNX graph.
        folder: where its external data lies.
        mode: of the session.
        entry: what it reads of the piece before; None for the first one.
        exit: what it writes for the next one; None for the last one.
        outputs: what else it gives back.
        ids: token ids [N, S] of all windows.
        threads: of the session, wherever it runs: another number rounds otherwise.
    """

    label: str
    model: bytes
    folder: Path
    mode: Mode
    entry: StreamFile | None
    exit: StreamFile | None
    outputs: tuple[str, ...]
    ids: Ids
    threads: int

    def open(self) -> Session:
        """The session, which this process keeps until it opens another piece or :func:`close_piece` is called."""
        return _opened.session(self)

    def __call__(self, batch: Batch, others: Values | None = None) -> dict[str, NDArray[Any]]:
        """Run a batch, write what the next piece needs, and return the ``outputs``."""
        session = self.open()
        feeds = dict(others or {})
        if self.entry is not None:
            feeds[self.entry.value] = self.entry.read(batch)
        ids = self.ids[batch.start : batch.stop]
        names = [*self.outputs, *([self.exit.value] if self.exit and self.exit.value not in self.outputs else [])]
        results = session.run(session.token_feeds(ids, feeds), names)
        if self.exit is not None:
            self.exit.write(batch, results[self.exit.value])
        return {name: results[name] for name in self.outputs}


class _Opened:
    """The session of the piece that this process runs at present."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._key: tuple[str, str] | None = None
        self._session: Session | None = None

    def session(self, run: PieceRun) -> Session:
        key = (sha256(run.model).hexdigest(), f"{run.folder} {run.mode} {run.threads}")
        with self._lock:
            if self._session is None or key != self._key:
                self._close()
                model = InMemoryGraph(run.label, run.model, run.folder)
                self._session = Session(model, mode=run.mode, threads=run.threads, lean=True)
                self._key = key
            return self._session

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = self._key = None


_opened = _Opened()


def close_piece() -> None:
    """Free the piece that this process has run last."""
    _opened.close()
