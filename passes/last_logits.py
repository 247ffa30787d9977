"""Logits of the last position alone."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..export.graph_names import LOGITS
from ._gs import Dim, Graph, Node, Tensor, dtype_of, make_constant, make_node, make_variable, set_type, shape_of
from .graph import Index
from .patterns import Names

_BOUNDS = {"start": -1, "end": int(np.iinfo(np.int64).max), "axis": 1}
"""Of the slice that keeps the last position."""

_NORMS = frozenset({"LayerNormalization", "RMSNormalization"})
_ELEMENTWISE = frozenset(
    {"Abs", "Add", "Cast", "DequantizeLinear", "Div", "Max", "Min", "Mul", "QuantizeLinear", "Sub", "Tanh"}
)


@dataclass(frozen=True)
class LastLogits:
    """Compute ``logits`` [batch, 1, vocabulary] for the last position of each row, which is all that decoding reads.

    What is behind the last norm's input, the norm included, is computed for that position alone.

    Needs: ``logits`` [batch, sequence, vocabulary], computed position by position from one value. Promises: nothing
    else of the graph changes; if the pattern is another one, nothing at all.
    """

    name: ClassVar[str] = "last logits"

    def apply(self, graph: Graph) -> int:
        """Rewrite the graph in place; returns 1, or 0 if the pattern is another one."""
        index = Index.of(graph)
        tail = _find_tail(index)
        if tail is None:
            return 0
        _cut(graph, index, tail)
        return 1


@dataclass(frozen=True, eq=False)
class _Tail:
    """The nodes that compute the logits from ``source`` [batch, sequence, channels]."""

    source: Tensor
    nodes: tuple[Node, ...]


def _find_tail(index: Index) -> _Tail | None:
    """As far up from the logits as one value is the source, up to the first norm."""
    logits = index.values.get(LOGITS)
    shape = None if logits is None or LOGITS not in index.outputs else shape_of(logits)
    if logits is None or shape is None or len(shape) != 3:
        return None
    nodes: list[Node] = []
    sources: list[Tensor] = [logits]
    found: _Tail | None = None
    while sources:
        latest = max(sources, key=lambda tensor: _place(tensor, index))
        node = index.producer(latest.name)
        if node is None or not _is_per_position(node, index, shape) or not _is_read_by(latest, nodes, index):
            break
        nodes.append(node)
        sources = [item for item in sources if item is not latest]
        sources += [item for item in _activations(node, index) if not any(item is other for other in sources)]
        if len(sources) == 1 and any(item.op == "MatMul" for item in nodes):
            found = _Tail(sources[0], tuple(nodes))
        if node.op in _NORMS:
            break
    return found


def _place(tensor: Tensor, index: Index) -> int:
    node = index.producer(tensor.name)
    return -1 if node is None else index.order[node.name]


def _activations(node: Node, index: Index) -> list[Tensor]:
    return [tensor for tensor in node.inputs if not tensor.is_empty() and tensor.name not in index.constants]


def _is_read_by(tensor: Tensor, nodes: list[Node], index: Index) -> bool:
    """Whether nobody else reads a value."""
    if tensor.name in index.outputs:
        return not nodes and not tensor.outputs
    return all(any(reader is node for node in nodes) for reader in tensor.outputs)


def _is_per_position(node: Node, index: Index, logits: tuple[Dim, ...]) -> bool:
    """Whether a node computes each position [batch, sequence, ..] from the same position of what it reads."""
    activations = _activations(node, index)
    shapes = [shape_of(tensor) or () for tensor in (*activations, *node.outputs)]
    if node.domain or any(len(shape) != 3 or shape[:2] != logits[:2] for shape in shapes):
        return False
    if node.op == "MatMul":
        return activations == [node.inputs[0]]
    if node.op == "ReduceMax":
        return _over_channels(node, index)
    return node.op in _ELEMENTWISE or (node.op in _NORMS and int(node.attrs.get("axis", -1)) in (-1, 2))


def _over_channels(node: Node, index: Index) -> bool:
    axes = index.array(node.inputs[1].name) if len(node.inputs) > 1 else None
    return axes is not None and axes.reshape(-1).tolist() in ([-1], [2])


def _cut(graph: Graph, index: Index, tail: _Tail) -> None:
    """Let the tail read a slice of its source."""
    names = Names(index)
    name = names.new(f"{tail.source.name}/last")
    last = make_variable(name, dtype_of(tail.source), _of_one_position(tail.source))
    bounds = [make_constant(names.new(f"{name}/{part}"), np.array([value])) for part, value in _BOUNDS.items()]
    for node in tail.nodes:
        for place, tensor in enumerate(node.inputs):
            if tensor is tail.source:
                node.inputs[place] = last
        for tensor in node.outputs:
            set_type(tensor, dtype_of(tensor), _of_one_position(tensor))
    first = min(index.order[node.name] for node in tail.nodes)
    graph.nodes.insert(first, make_node("Slice", name, [tail.source, *bounds], [last]))


def _of_one_position(tensor: Tensor) -> list[Dim]:
    batch, _, *channels = shape_of(tensor) or (None, None)
    return [batch, 1, *channels]
