"""Cut the part of a graph that a fold changes: from a site's producer to the linears that read its channels."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ..passes._gs import Dim, Graph, Node, Tensor, copy_node, copy_tensor, dtype_of, is_constant, make_graph, shape_of
from ..passes.graph import Index, find_caches
from ..passes.sites import Site

BATCH, LENGTH = 2, 7
"""Sizes of symbolic dimensions: those in front of a graph input, and the others."""

SMALL_PART = 1 << 16
"""Elements of the constants of a node that a segment may include only to learn the shape of an input."""


@dataclass(frozen=True)
class Sizes:
    """Numbers for the symbolic dimensions of a graph."""

    names: dict[str, int]

    @classmethod
    def of(cls, graph: Graph) -> "Sizes":
        """Numbers for the symbolic dimensions of the graph's inputs; caches are empty."""
        names: dict[str, int] = {}
        caches = set(find_caches(graph).values())
        for tensor in sorted(graph.inputs, key=lambda tensor: tensor.name not in caches):
            for axis, dim in enumerate(shape_of(tensor) or ()):
                if isinstance(dim, str):
                    length = 0 if tensor.name in caches else LENGTH
                    names.setdefault(dim, BATCH if axis == 0 else length)
        return cls(names)

    def known(self, dim: Dim) -> int | None:
        """The size of a dimension that is a number, a name, or a product of these."""
        if isinstance(dim, int):
            return dim
        product = 1
        for factor in (dim or "").replace(" ", "").split("*"):
            if not factor.isdecimal() and factor not in self.names:
                return None
            product *= int(factor) if factor.isdecimal() else self.names[factor]
        return product

    def shape(self, dims: tuple[Dim, ...]) -> list[int]:
        """Sizes for all dimensions; one of unknown name is taken for a batch in front, else for a length."""
        sizes = [self.known(dim) for dim in dims]
        return [(LENGTH if axis else BATCH) if size is None else size for axis, size in enumerate(sizes)]


@dataclass(frozen=True, eq=False)
class Segment:
    """A graph of its own.

    Attributes:
        graph: Its inputs are activations; the constants are those of the whole graph, not read.
        outputs: Names of the values to compare: whatever a scaled value makes that is not scaled any more.
    """

    graph: Graph
    outputs: tuple[str, ...]


def cut(graph: Graph, index: Index, site: Site, sizes: Sizes) -> Segment:
    """The segment of a site: its producer and every node that scaled values reach.

    Activations that enter from outside become inputs. Integers (shapes, positions) are computed as in the whole
    graph, down to its inputs, so that the segment works for every batch and length. All ways out of the segment are
    outputs, so a comparison also shows that no scaled channel leaks.
    """
    core = {site.producer.node, *site.nodes}
    members, boundary = _close(index, core, sizes)
    outputs = _leaving(index, core, site.scaled)
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


def _close(index: Index, core: Collection[str], sizes: Sizes) -> tuple[set[str], list[str]]:
    """Add the nodes that compute constants, integers and odd shapes; the names of the values to be given."""
    members, boundary = set(core), set[str]()
    pending = list(core)
    while pending:
        for tensor in index.nodes[pending.pop()].inputs:
            maker = None if tensor.is_empty() or is_constant(tensor) else index.producer(tensor.name)
            if maker is not None and maker.name not in members and _is_included(tensor, maker, index, sizes):
                members.add(maker.name)
                pending.append(maker.name)
            elif not (tensor.is_empty() or is_constant(tensor)):
                boundary.add(tensor.name)
    produced = {tensor.name for name in members for tensor in index.nodes[name].outputs}
    return members, sorted(boundary - produced)


def _is_included(tensor: Tensor, maker: Node, index: Index, sizes: Sizes) -> bool:
    dtype, shape = dtype_of(tensor), shape_of(tensor)
    if tensor.name in index.constants or (dtype is not None and np.issubdtype(dtype, np.integer)):
        return True
    is_known = shape is not None and all(sizes.known(dim) is not None for dim in shape)
    return not is_known and index.owns(maker) and all(_is_small(constant) for constant in maker.inputs)


def _is_small(tensor: Tensor) -> bool:
    shape = shape_of(tensor) if is_constant(tensor) else ()
    return int(np.prod([dim for dim in shape or () if isinstance(dim, int)])) <= SMALL_PART


def _leaving(index: Index, core: Collection[str], scaled: Collection[str]) -> list[str]:
    """The values that are computed from scaled ones and must not be changed by the fold."""
    return [
        tensor.name
        for name in sorted(core, key=index.order.__getitem__)
        for tensor in index.nodes[name].outputs
        if tensor.name not in scaled and not tensor.is_empty() and (tensor.outputs or tensor.name in index.outputs)
    ]
