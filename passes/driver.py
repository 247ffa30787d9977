"""Run passes over a graph: apply, check and time, so that a pass does only its own work."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ..export.errors import BismoothError
from ._gs import Graph, Node, dtype_of, is_constant


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
    """Apply the passes in order, and verify the graph after each of them.

    Args:
        graph: Rewritten in place.
        passes: What to apply.
        check: A further check, called with the graph and the name of the pass that it comes from.

    Raises:
        BismoothError: A pass left a graph that is no valid one (see :func:`verify`), or could not be applied.
    """
    records: list[PassRecord] = []
    untyped = _untyped(graph)
    for current in passes:
        start = time.perf_counter()
        current.apply(graph)
        records.append(PassRecord(current.name, len(graph.nodes), round(time.perf_counter() - start, 3)))
        verify(graph, current.name, untyped)
        if check is not None:
            check(graph, current.name)
    return tuple(records)


def verify(graph: Graph, name: str, untyped: Collection[str] = ()) -> None:
    """Check the structure of a graph, without reading a weight.

    Every node has a name of its own, every value one source that stands before its readers, and every value a type.

    Args:
        graph: What a pass left.
        name: The pass.
        untyped: Values without a type that are no fault of the pass.

    Raises:
        BismoothError: It does not hold; the message names the pass and the node.
    """
    names: set[str] = set()
    sources = {tensor.name: "the graph's inputs" for tensor in graph.inputs}
    for node in graph.nodes:
        if not node.name or node.name in names:
            raise _broken(name, node, "a name of its own", "that of another node" if node.name else "none")
        names.add(node.name)
        for tensor in node.inputs:
            if not (tensor.is_empty() or is_constant(tensor) or tensor.name in sources):
                raise _broken(name, node, "inputs that were computed before it", f"{tensor.name!r}")
        for tensor in node.outputs:
            if tensor.is_empty():
                continue
            if tensor.name in sources:
                other = sources[tensor.name]
                raise _broken(name, node, "outputs of its own", f"{tensor.name!r}, which belongs to {other}")
            if dtype_of(tensor) is None and tensor.name not in untyped:
                raise _broken(name, node, "outputs of a known type", f"{tensor.name!r} without one")
            sources[tensor.name] = node.name
    for tensor in graph.outputs:
        if not (is_constant(tensor) or tensor.name in sources):
            raise _broken(name, None, "a source for every output of the graph", f"none for {tensor.name!r}")


def _untyped(graph: Graph) -> frozenset[str]:
    return frozenset(tensor.name for node in graph.nodes for tensor in node.outputs if dtype_of(tensor) is None)


def _broken(name: str, node: Node | None, expected: str, got: str) -> BismoothError:
    where = "the graph" if node is None else f"node {node.name!r} ({node.op})"
    return BismoothError(
        f"pass {name}: it left {where} broken. Expected {expected}, got {got}. This is a defect of bismooth, not of "
        "the model: report it."
    )
