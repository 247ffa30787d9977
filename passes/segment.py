"""Cut the part of a graph that a fold changes: from a site's producer to the linears that read its channels."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..passes._gs import Graph, Node, Tensor, copy_node, copy_tensor, dtype_of, is_constant, make_graph
from ..passes.graph import Index
from ..passes.linears import Linear
from ..passes.sites import Site


@dataclass(frozen=True, eq=False)
class Segment:
    """A graph of its own.

    Attributes:
        graph: Its inputs are activations; the constants are those of the whole graph, not read.
        outputs: Names of the values to compare: the linears' products, and whatever else leaves the segment.
    """

    graph: Graph
    outputs: tuple[str, ...]


def cut(graph: Graph, index: Index, site: Site, linears: Sequence[Linear]) -> Segment:
    """The segment of a site.

    Activations that enter from outside become inputs. Integers (shapes, positions) are computed as in the whole
    graph, down to its inputs, so that the segment works for every batch and length. Every value of the segment that
    is read outside is an output, so that a comparison also shows that no scaled channel leaks.
    """
    reads = {consumer.linear for consumer in site.consumers}
    ends = {linear.node for linear in linears if linear.name in reads}
    core = _between(index, site.producer.node, ends)
    members, boundary = _close(index, core)
    outputs = _leaving(index, core, ends)
    copies = _Copies(index)
    nodes = [copies.node(name) for name in sorted(members, key=index.order.__getitem__)]
    inputs = [copies.tensor(index.values[name]) for name in boundary]
    results = [copies.tensor(index.values[name]) for name in outputs]
    return Segment(make_graph(nodes, inputs, results, graph), tuple(outputs))


class _Copies:
    """Copies of nodes that share copies of their tensors."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.tensors: dict[str, Tensor] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        if tensor.is_empty():
            return copy_tensor(tensor)
        if tensor.name not in self.tensors:
            self.tensors[tensor.name] = copy_tensor(tensor)
        return self.tensors[tensor.name]

    def node(self, name: str) -> Node:
        node = self.index.nodes[name]
        return copy_node(node, [self.tensor(t) for t in node.inputs], [self.tensor(t) for t in node.outputs])


def _between(index: Index, start: str, ends: Collection[str]) -> set[str]:
    """The nodes on the ways from one node to others, all of these included."""
    last = max(index.order[end] for end in ends)
    after = _reach(
        [start],
        lambda name: [] if name in ends else [user.name for user in _readers(index, name) if index.owns(user)],
        lambda name: index.order[name] <= last,
    )
    return _reach(ends, lambda name: [maker.name for maker in _makers(index, name)], lambda name: name in after)


def _reach(starts: Iterable[str], step: Callable[[str], Iterable[str]], admits: Callable[[str], bool]) -> set[str]:
    found = set(starts)
    pending = list(found)
    while pending:
        for name in step(pending.pop()):
            if name not in found and admits(name):
                found.add(name)
                pending.append(name)
    return found


def _readers(index: Index, name: str) -> list[Node]:
    return [user for tensor in index.nodes[name].outputs for user in tensor.outputs]


def _makers(index: Index, name: str) -> list[Node]:
    return [maker for tensor in index.nodes[name].inputs for maker in tensor.inputs]


def _close(index: Index, core: set[str]) -> tuple[set[str], list[str]]:
    """Add the nodes that compute constants and integers; the names of the values that have to be given."""
    members, boundary = set(core), dict[str, None]()
    pending = list(core)
    while pending:
        for tensor in index.nodes[pending.pop()].inputs:
            if tensor.is_empty() or is_constant(tensor):
                continue
            maker = index.producer(tensor.name)
            if maker is not None and maker.name in members:
                continue
            if maker is not None and (tensor.name in index.constants or _is_integer(tensor)):
                members.add(maker.name)
                pending.append(maker.name)
            else:
                boundary[tensor.name] = None
    produced = {tensor.name for name in members for tensor in index.nodes[name].outputs}
    return members, sorted(boundary.keys() - produced)


def _is_integer(tensor: Tensor) -> bool:
    dtype = dtype_of(tensor)
    return dtype is not None and np.issubdtype(dtype, np.integer)


def _leaving(index: Index, core: set[str], ends: Collection[str]) -> list[str]:
    """The values that are read outside of the core: what the fold must not change."""
    names: list[str] = []
    for name in sorted(core, key=index.order.__getitem__):
        for tensor in index.nodes[name].outputs:
            outside = [user for user in tensor.outputs if user.name not in core and user.op not in ("Shape", "Size")]
            if not tensor.is_empty() and (name in ends or outside or tensor.name in index.outputs):
                names.append(tensor.name)
    return names
