"""Work on arrays, several items at once."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_threadpoolctl: Any = import_module("threadpoolctl")

_WORKERS = 2


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results in the order of ``items``. Two are computed at once, and no more than three exist at any time.

    NumPy's element-wise operations use one core and let other threads run. Matrix products use one core as well here:
    several threads that each want all cores would wait for each other.
    """
    workers = min(_WORKERS, os.cpu_count() or 1)
    with _threadpoolctl.threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:
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
