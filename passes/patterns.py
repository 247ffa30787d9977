"""Small questions that passes ask when they look for a pattern, and the edit that follows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._gs import Array, Dim, Graph, Node, Tensor, import_domain, make_constant, make_node, make_variable
from .graph import Index
from .linears import unique

CONTRIB = "com.microsoft"
"""ONNX Runtime's own operators."""


class Names:
    """Names for new nodes and values of a graph."""

    def __init__(self, index: Index) -> None:
        self._taken = {*index.nodes, *index.values}

    def new(self, name: str) -> str:
        """The name, with a number behind it if a node or a value has it."""
        free = unique(name, self._taken)
        self._taken.add(free)
        return free

    def beside(self, node: Node, op: str) -> str:
        """A name for a node of the same module: ``model.layers.0/Add`` gives ``model.layers.0/Mul``."""
        return self.new(f"{node.name.rpartition('/')[0] or node.name}/{op}")


def made_by(tensor: Tensor, *ops: str) -> Node | None:
    """The node that computes a value, if it is one of these operators of ONNX itself."""
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and node.op in ops and not node.domain else None


def sole_reader(index: Index, tensor: Tensor) -> Node | None:
    """The one node that reads a value, once; None if there are more, or the value leaves the graph."""
    readers = list(tensor.outputs)
    return readers[0] if len(readers) == 1 and tensor.name not in index.outputs else None


def other_input(node: Node, tensor: Tensor) -> Tensor | None:
    """Of a node with two inputs the one that is not ``tensor``; None if ``tensor`` is neither, or both."""
    others = [item for item in node.inputs if item is not tensor]
    return others[0] if len(node.inputs) == 2 and len(others) == 1 else None


def axis_of(node: Node, rank: int, default: int = -1) -> int:
    """The attribute ``axis``, counted from the front."""
    return int(node.attrs.get("axis", default)) % rank


def replace_nodes(graph: Graph, replacements: Mapping[str, Sequence[Node]]) -> None:
    """Put new nodes where nodes of these names stand, and drop what no output needs any more.

    The new nodes must have taken over the outputs that are still read.
    """
    graph.nodes[:] = [new for node in list(graph.nodes) for new in replacements.get(node.name, (node,))]
    graph.cleanup()
    if any(node.domain == CONTRIB for node in graph.nodes):
        import_domain(graph, CONTRIB, 1)


class Maker:
    """Makes nodes with new names, and one copy of each small constant that they need."""

    def __init__(self, names: Names, constants: str) -> None:
        self._names = names
        self._prefix = constants
        self._constants: dict[tuple[str, bytes, int], Tensor] = {}
        self._nodes: list[Node] = []

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[Tensor],
        shape: Sequence[Dim],
        dtype: np.dtype[Any],
        **attributes: object,
    ) -> Tensor:
        """The output, of this shape and type, of a new node; both get the same name."""
        unique = self._names.new(name)
        output = make_variable(unique, dtype, shape)
        self._nodes.append(make_node(op, unique, inputs, [output], attributes))
        return output

    def add(self, node: Node) -> None:
        """Take a node that was made elsewhere."""
        self._nodes.append(node)

    def constant(self, values: Array) -> Tensor:
        """An initializer, shared by those who ask for the same values."""
        key = (values.dtype.name, values.tobytes(), values.ndim)
        if key not in self._constants:
            text = "_".join(map(str, values.reshape(-1).tolist()))
            name = self._names.new(f"{self._prefix}.{values.dtype.name}_{text}")
            self._constants[key] = make_constant(name, values)
        return self._constants[key]

    def integers(self, *values: int) -> Tensor:
        """An int64 vector."""
        return self.constant(np.array(values, np.int64))

    def take(self) -> list[Node]:
        """The nodes made since the last call, in order."""
        nodes, self._nodes = self._nodes, []
        return nodes
