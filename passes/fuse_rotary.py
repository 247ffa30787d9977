"""Rotary position embeddings as one operator."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._gs import Graph, Node, Tensor, dtype_of, make_node, shape_of
from .graph import Index
from .patterns import Maker, Names, axis_of, made_by, other_input, replace_nodes

_OPSET = 23
"""``RotaryEmbedding`` is in ONNX from here on."""
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class FuseRotary:
    """Replace x · cos + [-x₂, x₁] · sin, where x = [x₁, x₂] is cut in the middle, by ``RotaryEmbedding`` (RoFormer).

    Needs: float32 x [batch, heads, sequence, size]; cos and sin [batch, sequence, size] of the same angles twice over,
    unsqueezed for the heads. Promises: the same products and sums.
    """

    name: ClassVar[str] = "fuse rotary embeddings"

    def apply(self, graph: Graph) -> int:
        """Rewrite the graph in place; returns how many were fused."""
        if graph.opset < _OPSET:
            return 0
        fusion = _Fusion(Index.of(graph))
        found = [(node, match) for node in graph.nodes if (match := fusion.match(node)) is not None]
        replace_nodes(graph, {node.name: fusion.fuse(node, match) for node, match in found})
        return len(found)


@dataclass(frozen=True, eq=False)
class _Rotation:
    """x [batch, heads, sequence, size]; cos and sin [batch, sequence, size]."""

    x: Tensor
    cos: Tensor
    sin: Tensor


class _Fusion:
    def __init__(self, index: Index) -> None:
        self._index = index
        self._names = Names(index)
        self._make = Maker(self._names, "rotary")
        self._halves: dict[str, Tensor] = {}

    def match(self, node: Node) -> _Rotation | None:
        if node.op != "Add" or node.domain:
            return None
        first, second = (made_by(tensor, "Mul") for tensor in node.inputs)
        if first is None or second is None:
            return None
        return self._rotation(first, second) or self._rotation(second, first)

    def fuse(self, node: Node, rotation: _Rotation) -> list[Node]:
        """What takes the place of the Add: the operator, behind halves of cos and sin where these are new."""
        inputs = [rotation.x, self._half(rotation.cos), self._half(rotation.sin)]
        outputs = list(node.outputs)
        node.outputs.clear()
        self._make.add(make_node("RotaryEmbedding", self._names.beside(node, "RotaryEmbedding"), inputs, outputs))
        return self._make.take()

    def _half(self, table: Tensor) -> Tensor:
        """The first half of the channels of cos or sin [batch, sequence, size]."""
        if table.name not in self._halves:
            *leading, size = shape_of(table) or (None,)
            half = int(str(size)) // 2
            bounds = [self._make.integers(value) for value in (0, half, len(leading))]
            shape = [*leading, half]
            self._halves[table.name] = self._make.node("Slice", f"{table.name}/half", [table, *bounds], shape, _FLOAT32)
        return self._halves[table.name]

    def _rotation(self, straight: Node, turned: Node) -> _Rotation | None:
        """x · cos and [-x₂, x₁] · sin."""
        for rotated in turned.inputs:
            x = self._source(rotated)
            sin = other_input(turned, rotated)
            cos = None if x is None else other_input(straight, x)
            if x is None or sin is None or cos is None:
                continue
            tables = self._table(cos, "Cos", x), self._table(sin, "Sin", x)
            if tables[0] is not None and tables[1] is not None:
                return _Rotation(x, tables[0], tables[1])
        return None

    def _source(self, rotated: Tensor) -> Tensor | None:
        """x of [-x₂, x₁]."""
        joined = made_by(rotated, "Concat")
        rank = len(shape_of(rotated) or ())
        if joined is None or rank != 4 or len(joined.inputs) != 2 or axis_of(joined, rank) != rank - 1:
            return None
        negated, first = made_by(joined.inputs[0], "Neg"), made_by(joined.inputs[1], "Slice")
        second = None if negated is None else made_by(negated.inputs[0], "Slice")
        if first is None or second is None or first.inputs[0] is not second.inputs[0]:
            return None
        x = first.inputs[0]
        size = (shape_of(x) or (None,))[-1]
        if not isinstance(size, int) or size % 2 or self._cut(first, size) != (0, size // 2):
            return None
        return x if self._cut(second, size) == (size // 2, size) else None

    def _cut(self, node: Node, size: int) -> tuple[int, int] | None:
        """Begin and end of a slice of the last of four axes, of this size."""
        values = [self._index.array(tensor.name) for tensor in node.inputs[1:]]
        if len(values) < 3 or any(value is None or value.size != 1 for value in values):
            return None
        start, end, axis, *step = (int(value.reshape(-1)[0]) for value in values if value is not None)
        return (start, min(end, size)) if axis in (-1, 3) and step in ([], [1]) else None

    def _table(self, tensor: Tensor, function: str, x: Tensor) -> Tensor | None:
        """cos or sin before it got an axis for the heads, if its second half repeats the first."""
        unsqueezed = made_by(tensor, "Unsqueeze")
        axes = None if unsqueezed is None else self._index.array(unsqueezed.inputs[1].name)
        if unsqueezed is None or axes is None or axes.reshape(-1).tolist() != [1]:
            return None
        table = unsqueezed.inputs[0]
        batch, _, *rest = shape_of(x) or (None, None)
        fits = shape_of(table) == (batch, *rest) and dtype_of(table) == dtype_of(x) == _FLOAT32
        return table if fits and self._repeats(table, function) else None

    def _repeats(self, table: Tensor, function: str) -> bool:
        """Whether a value is cos or sin, perhaps scaled (YaRN), of [angles, angles]."""
        scaled = made_by(table, "Mul")
        if scaled is not None:
            scalars = [tensor for tensor in scaled.inputs if shape_of(tensor) in ((), (1,))]
            rest = other_input(scaled, scalars[0]) if len(scalars) == 1 else None
            return rest is not None and self._repeats(rest, function)
        node = made_by(table, function)
        joined = None if node is None else made_by(node.inputs[0], "Concat")
        if joined is None or axis_of(joined, 3) != 2:
            return False
        return len(joined.inputs) == 2 and joined.inputs[0] is joined.inputs[1]
