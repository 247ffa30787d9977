"""An executor that does no work twice: what a state has on record is taken from there, the rest is recorded."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock
from types import TracebackType
from typing import Any, Self

from ..export.replacing import flush
from ..export.state import Progress, State
from .executor import Executor, ItemT, ResultT, Task

COLLECT_SECONDS = 1.0
"""How long results are collected before they are recorded together: a kill loses the work of so long."""


class ResumingExecutor:
    """Runs what lacks by another executor. Used as a context manager: at its end, all that was done is on record.

    A thread of its own writes the data through to disk, and then records the results; meanwhile the work goes on.
    """

    def __init__(self, executor: Executor, state: State, data: Path) -> None:
        """Wrap ``executor``; ``data`` is the file in the state's folder that tasks write to, once one has made it."""
        self._executor, self._state, self._data = executor, state, data
        self._pool = ThreadPoolExecutor(1)
        self._ended = Event()
        self._lock = Lock()
        self._new: dict[str, Any] = {}
        self._progress: Progress | None = None
        self._recording: Future[None] | None = None

    def map(self, task: Task[ItemT, ResultT], items: Iterable[ItemT], /) -> Iterator[ResultT]:
        """The results, in the order of the items."""
        keys = {f"{task.step}: {item.name}": item for item in items}
        missing = {key: item for key, item in keys.items() if key not in self._state}
        results = self._executor.map(task, missing.values())
        done = len(keys) - len(missing)
        try:
            for key in keys:
                if key not in missing:
                    yield task.decode(self._state.get(key))
                    continue
                result = next(results)
                done += 1
                self._add(key, task.encode(result), (task.step, done, len(keys)))
                yield result
        finally:
            if isinstance(results, Generator):
                results.close()  # now: an error's traceback would keep it, and the calls that wait, alive

    def _add(self, key: str, value: Any, progress: Progress) -> None:
        with self._lock:
            self._new[key], self._progress = value, progress
        if self._recording is None or self._recording.done():
            self._raise_failed()
            self._recording = self._pool.submit(self._record_soon)

    def _raise_failed(self) -> None:
        if self._recording is not None:
            self._recording.result()

    def _record_soon(self) -> None:
        self._ended.wait(COLLECT_SECONDS)
        self._record()

    def _record(self) -> None:
        with self._lock:
            new, self._new = self._new, {}
        if not new:
            return
        if self._data.exists():
            flush(self._data)
            flush(self._data.parent)
        self._state.record_all(new, self._progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._pool.shutdown()
        with suppress(*([] if kind is None else [OSError])):  # the error that ends the run is the one to be told
            self._raise_failed()
            self._record()
