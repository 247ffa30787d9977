"""Work on arrays, several items at once."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from ..export.machine import BLAS

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], *, at_once: int = 2) -> Iterator[Result]:
    """The results in the order of ``items``. ``at_once`` are computed at a time, and no more than one more exists.

    NumPy's element-wise operations use one core and let other threads run. Matrix products use one core as well here:
    several threads that each want all cores would wait for each other.
    """
    workers = min(at_once, os.cpu_count() or 1)
    with one_core(), ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def one_core() -> AbstractContextManager[None]:
    """While it is open, a matrix product takes one core."""
    return _ONE_CORE.each_product()


class _OneCore:
    """The limit on BLAS, which is the whole process's: the first user sets it, the last one lifts it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limits: Any = None

    @contextmanager
    def each_product(self) -> Generator[None]:
        with self._lock:
            if not self._users:
                self._limits = BLAS.limit(limits=1, user_api="blas")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._limits.restore_original_limits()


_ONE_CORE = _OneCore()
