"""Where a graph can be cut in two: only the residual stream crosses there.

The *stream* is what depends on the content of the tokens through a weight (an embedding, a linear). All else (masks,
positions, rotary angles, shapes) is cheap: each part of a graph computes what it needs of it again. Going along the
nodes, a cut is wherever exactly one value of the stream is still to be read: between the layers of a transformer, and
between attention and the feed-forward part in each. No module names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx

from ..export.graph_names import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, is_past
from .subgraph import captured

#: Types that a cut may carry. Not bfloat16: ONNX Runtime takes no such arrays from Python.
_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16})
#: Outputs of these say nothing of the content of what they read.
_SHAPES = frozenset({"Shape", "Size"})
_SIGNATURE_LIMIT = 16
"""Segments that one repetition may have, at most: more would be no repetition that anybody means."""


@dataclass(frozen=True)
class Segment:
    """The nodes of the stream between two cuts.

    Attributes:
        nodes: their numbers in the graph, ascending.
        entry: the value that the cut before it carries; ``None`` at the start of the graph.
        exit: the same of the cut behind it; ``None`` at the end.
    """

    nodes: tuple[int, ...]
    entry: str | None
    exit: str | None


@dataclass(frozen=True)
class Repeated:
    """The repeated region: ``count`` blocks of ``length`` segments each, from the segment ``first`` on."""

    first: int
    length: int
    count: int

    @property
    def starts(self) -> tuple[int, ...]:
        """The first segment of each block, and the first behind the last one."""
        return tuple(self.first + self.length * number for number in range(self.count + 1))


def find_segments(graph: onnx.GraphProto) -> tuple[Segment, ...]:
    """The segments of a graph in order; one without an entry and an exit if it cannot be cut."""
    stream = _stream_nodes(graph)
    if not stream:
        return (Segment(tuple(range(len(graph.node))), None, None),)
    segments: list[Segment] = []
    start, entry = 0, None
    for place, value in _cuts(graph, stream):
        segments.append(Segment(tuple(stream[start : place + 1]), entry, value))
        start, entry = place + 1, value
    segments.append(Segment(tuple(stream[start:]), entry, None))
    return tuple(segments)


def find_repeated(graph: onnx.GraphProto, segments: Sequence[Segment]) -> Repeated | None:
    """The longest run of blocks that have the same operators and shapes of weights; ``None`` if nothing repeats."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer if len(tensor.dims) > 1}
    signatures = [
        tuple((graph.node[n].op_type, *(weights.get(name) for name in graph.node[n].input)) for n in segment.nodes)
        for segment in segments
    ]
    best: Repeated | None = None
    for length in range(1, min(_SIGNATURE_LIMIT, len(segments) // 2) + 1):
        for run in _runs(signatures, length):
            if best is None or run.count * run.length > best.count * best.length:
                best = run
    return best


def _runs(signatures: Sequence[object], length: int) -> Iterator[Repeated]:
    """Runs of two or more equal stretches of ``length`` signatures."""
    first, matched = 0, 0
    for place in range(length, len(signatures) + 1):
        if place < len(signatures) and signatures[place] == signatures[place - length]:
            matched += 1
            continue
        if matched >= length:
            yield Repeated(first, length, matched // length + 1)
        first, matched = place - length + 1, 0


def _cuts(graph: onnx.GraphProto, stream: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Behind which node of the stream, by its place among them, there is a cut, and the value that crosses it."""
    places = {name: place for place, number in enumerate(stream) for name in graph.node[number].output if name}
    last_use: dict[str, int] = {}
    for place, number in enumerate(stream):
        for name in reads(graph.node[number]):
            if name in places:
                last_use[name] = place
    carried = _carriable(graph)
    live: set[str] = set()
    crossed: str | None = None
    for place, number in enumerate(stream):
        live = {name for name in live if last_use[name] > place}
        live.update(name for name in graph.node[number].output if last_use.get(name, -1) > place)
        if len(live) == 1 and (value := next(iter(live))) in carried and value != crossed:
            crossed = value  # it is still to be read behind a branch that ends in an output
            yield place, value


def _carriable(graph: onnx.GraphProto) -> frozenset[str]:
    """Float tensors [batch, …] of which the sizes are known, given those of the token ids [batch, length]."""
    ids = [value.type.tensor_type.shape for value in graph.input if value.name == INPUT_IDS]
    names = [dim.dim_param for shape in ids for dim in shape.dim if dim.dim_param]
    return frozenset(info.name for info in graph.value_info if _is_carriable(info.type.tensor_type, names))


def _is_carriable(kind: onnx.TypeProto.Tensor, names: Sequence[str]) -> bool:
    dims = kind.shape.dim
    if kind.elem_type not in _FLOATS or not dims or not names or dims[0].dim_param != names[0]:
        return False
    return all(dim.HasField("dim_value") or dim.dim_param in names for dim in dims)


def _stream_nodes(graph: onnx.GraphProto) -> list[int]:
    """Numbers of the nodes whose results depend on what the tokens are, and on a weight, or on such a result."""
    constants = {tensor.name for tensor in graph.initializer}
    given = [value.name for value in graph.input if value.name not in constants]
    content = {name for name in given if name not in (ATTENTION_MASK, POSITION_IDS) and not is_past(name)}
    weighty = {tensor.name for tensor in graph.initializer if sum(size > 1 for size in tensor.dims) > 1}
    stream: list[int] = []
    for number, node in enumerate(graph.node):
        names = reads(node)
        if node.op_type not in _SHAPES and not content.isdisjoint(names):
            content.update(node.output)
        if not weighty.isdisjoint(names):
            weighty.update(node.output)
        if not content.isdisjoint(node.output) and not weighty.isdisjoint(node.output):
            stream.append(number)
    return stream


def reads(node: onnx.NodeProto) -> set[str]:
    """Names of the values that a node, or a body inside it, takes from its graph."""
    return {name for name in node.input if name} | captured(node)
