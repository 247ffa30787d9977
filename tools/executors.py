"""Who does the work of long steps, by the name that users give."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.errors import BismoothError
from ..passes.executor import LOCAL, Executor, LocalExecutor
from . import console

if TYPE_CHECKING:
    from ..passes.ray_executor import RayExecutor


@dataclass(frozen=True)
class Share:
    """What a call gets.

    Attributes:
        spread: makes the calls, as :func:`map` does.
        memory: bytes for the process, or None.
    """

    spread: Callable[..., Iterator[Any]]
    memory: int | None


@contextmanager
def open_executor(
    name: str, files: Iterable[Path], workers: int = LOCAL.workers, memory: int | None = None
) -> Generator[Executor]:
    """An executor.

    Args:
        name: ``local``, or ``ray`` for the cluster of :func:`..passes.ray_executor.connect`.
        files: what there is already of the files that the tasks will read and write.
        workers: of a local one, at most.
        memory: bytes that a process takes which makes one call at a time; a node of a cluster gets no more than fit.

    Raises:
        BismoothError: there is none of that name, or as of ``connect``.
    """
    if name == "local":
        yield LocalExecutor(workers)
    else:
        with _connect(name, files, memory=memory) as executor:
            yield executor


@contextmanager
def open_spread(name: str, files: Iterable[Path], memory: int | None) -> Generator[Share]:
    """An executor for work of which each call takes a whole machine; for the arguments see :func:`open_executor`.

    Args:
        name: of the executor.
        files: what there is already.
        memory: bytes that a process may take, or None.
    """
    if name == "local":
        yield Share(map, memory)
    else:
        with _connect(name, files, whole_nodes=True) as executor:
            sizes = [size for size in (memory, executor.memory) if size is not None]
            yield Share(executor.map, min(sizes, default=None))


@contextmanager
def _connect(
    name: str, files: Iterable[Path], *, whole_nodes: bool = False, memory: int | None = None
) -> Generator[RayExecutor]:
    if name != "ray":
        raise BismoothError(f"executor {name!r}: there is none of that name. Expected 'local' or 'ray'.")
    from ..passes.ray_executor import connect

    with connect(files, whole_nodes=whole_nodes, memory=memory) as executor:
        console.note(executor.description)
        yield executor
