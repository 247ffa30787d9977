"""Who does the work of a long step, item by item: threads of this process here, elsewhere the nodes of a cluster.

NOTE: an executor never changes numbers. What a task makes of an item depends on nothing but both, so the output of a
run is the same bytes with every executor and any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .parallel import ordered_map


class Item(Protocol):
    """Something that a task works on: small, picklable, and by its name different from all others of the step."""

    @property
    def name(self) -> str: ...


ItemT = TypeVar("ItemT", bound=Item)
Item_contra = TypeVar("Item_contra", bound=Item, contravariant=True)
ResultT = TypeVar("ResultT")
Result_co = TypeVar("Result_co", covariant=True)


class Work(Protocol[Item_contra, Result_co]):
    """The work of one step: a picklable value. What cannot be pickled is opened anew, from its path, by each process.

    Large data do not pass through it: a call reads what it needs from files, and writes to files that are there.
    A call may be repeated, after a worker was lost: it writes the same bytes to the same places again.
    """

    @property
    def step(self) -> str:
        """Name of the step, different from all others of a run."""
        ...

    def __call__(self, item: Item_contra, /) -> Result_co:
        """The result for an item: small and picklable."""
        ...


class Task(Work[Item_contra, ResultT], Protocol[Item_contra, ResultT]):
    """Work whose results can be put on record."""

    def encode(self, result: ResultT, /) -> Any:
        """The result as plain JSON values, to the last bit."""
        ...

    def decode(self, plain: Any, /) -> ResultT:
        """A result again, of what :meth:`encode` gave."""
        ...


class Executor(Protocol):
    """Runs the calls of a task."""

    def map(self, task: Task[ItemT, ResultT], items: Iterable[ItemT], /) -> Iterator[ResultT]:
        """The results, in the order of the items.

        A process keeps its copy of the task for all its items: the copy may keep what it opened.
        """
        ...


@dataclass(frozen=True)
class LocalExecutor:
    """Threads of this process, ``workers`` at most, see :func:`.parallel.ordered_map`."""

    workers: int = 2

    def map(self, task: Task[ItemT, ResultT], items: Iterable[ItemT], /) -> Iterator[ResultT]:
        """The results, in the order of the items."""
        return ordered_map(task, items, at_once=self.workers)


LOCAL = LocalExecutor()


def each(
    executor: Executor, task: Task[ItemT, ResultT], items: Iterable[ItemT], on_item: Callable[[str], None]
) -> Iterator[tuple[ItemT, ResultT]]:
    """Each item with its result, in order; ``on_item`` is called with the names of those that are done."""
    listed = list(items)
    for item, result in zip(listed, executor.map(task, listed), strict=True):
        on_item(item.name)
        yield item, result
