"""Run passes over a graph: apply, check and time, so that a pass does only its own work."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ._gs import Graph


class Pass(Protocol):
    """A change of a graph. Its fields are its settings; its docstring states what it needs and what it promises."""

    name: ClassVar[str]

    def apply(self, graph: Graph) -> Any:
        """Rewrite the graph in place."""
        ...


@dataclass(frozen=True)
class PassRecord:
    """One pass that was run: its name, the number of nodes after it, and its time in seconds."""

    name: str
    nodes: int
    seconds: float


def run_passes(
    graph: Graph, passes: Sequence[Pass], check: Callable[[Graph, str], None] | None = None
) -> tuple[PassRecord, ...]:
    """Apply the passes in order; ``check`` is called with the graph and the pass's name after each of them."""
    records: list[PassRecord] = []
    for current in passes:
        start = time.perf_counter()
        current.apply(graph)
        records.append(PassRecord(current.name, len(graph.nodes), round(time.perf_counter() - start, 3)))
        if check is not None:
            check(graph, current.name)
    return tuple(records)
