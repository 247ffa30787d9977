"""How long-running functions report how far they are."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a step's name, how much of it is done, and how much there is."""


def silent(_step: str, _done: int, _total: int) -> None:
    """Report to nobody."""


class Counter:
    """Counts the units of a step that are done: one more each time it is called."""

    def __init__(self, progress: Progress, step: str, total: int) -> None:
        self._progress, self._step, self._total, self._done = progress, step, total, 0

    def __call__(self, _unit: str) -> None:
        self.add(1)

    def add(self, units: int) -> None:
        """Report so many more units."""
        self._done += units
        self._progress(self._step, self._done, self._total)
