"""Parts of a graph that run one after the other, each with its own weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx

from .cuts import Segment, find_segments, reads
from .subgraph import check_names


@dataclass(frozen=True)
class Piece:
    """Consecutive segments of a graph: from the segment ``first`` up to the one before ``stop``."""

    first: int
    stop: int


class PieceMaker:
    """Makes graphs of the pieces of ``model``, which stays as it is."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.segments: tuple[Segment, ...] = find_segments(model.graph)
        graph = model.graph
        self._producers = {name: number for number, node in enumerate(graph.node) for name in node.output if name}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._infos = {info.name: info for info in (*graph.value_info, *graph.output)}

    def type_of(self, value: str) -> onnx.TypeProto.Tensor | None:
        """What the graph says of a value's type and shape."""
        info = self._infos.get(value)
        return None if info is None else info.type.tensor_type

    def by_segment(self, values: Iterable[str]) -> dict[int, list[str]]:
        """Values by the segment that makes them; those outside of the stream, by the first segment that needs them.

        Raises:
            BismoothError: a name is not a value of the graph.
        """
        wanted = list(dict.fromkeys(values))
        check_names(self.model.graph, wanted)
        homes = self._homes()
        places: dict[int, list[str]] = {}
        for value in wanted:
            places.setdefault(homes.get(value, 0), []).append(value)
        return places

    def _homes(self) -> dict[str, int]:
        """The segment that each value is made in, or else first needed in."""
        nodes = self.model.graph.node
        homes = {
            name: place
            for place, segment in enumerate(self.segments)
            for number in segment.nodes
            for name in nodes[number].output
        }
        for place, segment in enumerate(self.segments):
            pending = [name for number in segment.nodes for name in reads(nodes[number])]
            while pending:
                name = pending.pop()
                if name not in homes:
                    homes[name] = place
                    producer = self._producers.get(name)
                    pending += [] if producer is None else reads(nodes[producer])
        return homes

    def make(self, piece: Piece, outputs: Sequence[str], values: Sequence[str] = ()) -> onnx.ModelProto:
        """The graph of a piece, which computes ``outputs`` and ``values``, and has the former as outputs."""
        entry = self.segments[piece.first].entry
        nodes, leaves = self._closure(entry, [*outputs, *values])
        source = self.model.graph
        graph = onnx.GraphProto(name=source.name)
        graph.node.extend(source.node[number] for number in nodes)
        graph.input.extend(value for value in source.input if value.name in leaves)
        if entry is not None:
            graph.input.append(self._infos[entry])
        graph.initializer.extend(self._initializers[name] for name in leaves if name in self._initializers)
        inner = [name for node in graph.node for name in node.output if name not in outputs]
        graph.value_info.extend(self._infos[name] for name in inner if name in self._infos)
        graph.output.extend(self._infos.get(name, onnx.ValueInfoProto(name=name)) for name in outputs)
        return onnx.ModelProto(
            ir_version=self.model.ir_version,
            opset_import=self.model.opset_import,
            functions=self.model.functions,
            graph=graph,
        )

    def _closure(self, entry: str | None, outputs: Iterable[str]) -> tuple[list[int], dict[str, None]]:
        """Nodes that make ``outputs``, in their order, and the inputs and initializers that these read."""
        nodes: set[int] = set()
        leaves: dict[str, None] = {}
        seen: set[str] = set()
        pending = list(outputs)
        while pending:
            name = pending.pop()
            if name in seen or name == entry:
                continue
            seen.add(name)
            number = self._producers.get(name)
            if number is None:
                leaves[name] = None
            elif number not in nodes:
                nodes.add(number)
                pending += reads(self.model.graph.node[number])
        return sorted(nodes), leaves
