"""Rewrites that keep float32 copies of weights small while a graph runs.

A weight that is stored in 16 or 8 bits becomes float32 where a run needs it. A table of embeddings is looked up first
and widened afterwards; a linear whose float32 copy would be large, as a rule the head, is computed in slices of its
outputs; a transposed copy is never made.

NOTE: kernels add up the last columns of a product, less than a tile, in another order than the others, and divide the
columns among many threads. So slices are whole tiles, and values stay the same bit for bit on few threads; on four and
more, last bits may differ from those of the product as a whole. What is sliced depends on the graph alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .cuts import reads

MOST = 1 << 30
"""Bytes of the largest float32 copy of a weight that is made as a whole."""

SLICE = 1 << 28
"""Bytes of the float32 copy of a slice."""

_TILE = 64
"""Columns that kernels compute together, at most."""

_MICROSOFT = "com.microsoft"
_FLOAT_BYTES = 4
_STORED = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8})


def make_lean(
    model: onnx.ModelProto, *, fuse: bool, keep: Sequence[str] = (), most: int = MOST, piece: int = SLICE
) -> None:
    """Rewrite ``model`` in place.

    Args:
        model: its weights are external data.
        fuse: whether nothing optimizes the graph later: then products read transposed weights as they are stored. Else
            products of integers are left to the optimizer, which needs no float32 copy for them.
        keep: values that are to be there afterwards, beside the outputs.
        most: bytes of a float32 copy from which on a linear is cut into slices.
        piece: bytes of the float32 copy of a slice.
    """
    rewriter = _Rewriter(model.graph, fuse=fuse)
    for node in list(model.graph.node):
        if node.op_type == "Gather":
            rewriter.look_up_first(node)
        elif node.op_type == "MatMul" and not node.domain and not rewriter.slice_outputs(node, most, piece) and fuse:
            rewriter.fuse_transpose(node)
    rewriter.finish(keep)
    used = {node.domain for node in model.graph.node}
    if _MICROSOFT in used.difference(opset.domain for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))


@dataclass(frozen=True)
class _Step:
    """A node on the way from a stored weight to a product, and how it is sliced.

    Attributes:
        node: it.
        axes: along which its further inputs (scale, zero point) are sliced; None for what is read whole.
    """

    node: onnx.NodeProto
    axes: tuple[int | None, ...]


@dataclass(frozen=True)
class _Stored:
    """A stored weight [N, K] or [K, N], with N along ``axis``, and the steps that make a product's operand of it."""

    tensor: onnx.TensorProto
    axis: int
    steps: tuple[_Step, ...]


class _Rewriter:
    def __init__(self, graph: onnx.GraphProto, *, fuse: bool) -> None:
        self.graph = graph
        self.fuse = fuse
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.infos = {info.name: info.type.tensor_type for info in (*graph.value_info, *graph.output)}
        self.behind: dict[str, list[onnx.NodeProto]] = {}
        self.instead: dict[str, list[onnx.NodeProto]] = {}
        self.left: set[str] = set()
        """Values that a reader was taken from."""

    def look_up_first(self, node: onnx.NodeProto) -> None:
        """Gather(Cast(table), ids) becomes Cast(Gather(table, ids)); of several Casts in a row, all are moved."""
        casts: list[onnx.NodeProto] = []
        table = node.input[0]
        while (cast := self.producers.get(table)) is not None and cast.op_type == "Cast":
            casts.insert(0, cast)
            table = cast.input[0]
        if not casts or table not in self.initializers:
            return
        output, value = node.output[0], f"{node.output[0]}/stored"
        kind, known = self.initializers[table].data_type, self.infos.get(output)
        self.left.add(node.input[0])
        node.input[0], node.output[0] = table, value
        behind = self.behind.setdefault(value, [])
        for number, cast in enumerate(casts, 1):
            if known is not None:
                self._declare(value, kind, known.shape)
            result = output if number == len(casts) else f"{output}/{number}"
            behind.append(_like(cast, f"{node.name}/Cast{number}", [value], result))
            value, kind = result, next(a.i for a in cast.attribute if a.name == "to")

    def fuse_transpose(self, node: onnx.NodeProto) -> None:
        """MatMul(x, Transpose(w)) becomes one product, as ONNX Runtime's own optimizer would do."""
        transpose = self.producers.get(node.input[1])
        if transpose is not None and is_swap(transpose):
            self.left.add(node.input[1])
            _read_transposed(node, transpose.input[0])

    def slice_outputs(self, node: onnx.NodeProto, most: int, piece: int) -> bool:
        """MatMul(x, w) of a large w that is widened becomes one product per slice of its outputs."""
        stored = self._stored(node.input[1])
        if stored is None or _FLOAT_BYTES * prod(stored.tensor.dims) <= most or self._is_integer(node):
            return False
        n, k = stored.tensor.dims[stored.axis], stored.tensor.dims[1 - stored.axis]
        width = max(1, piece // (_FLOAT_BYTES * k * _TILE)) * _TILE
        new: list[onnx.NodeProto] = []
        parts: list[str] = []
        for start in range(0, n, width):
            parts.append(f"{node.output[0]}/{start}")
            new += self._slice(node, stored, parts[-1], (start, min(start + width, n)))
        new.append(helper.make_node("Concat", parts, [node.output[0]], f"{node.name}/Concat", axis=-1))
        self.instead[node.output[0]] = new
        self.left.add(node.input[1])
        return True

    def _is_integer(self, product: onnx.NodeProto) -> bool:
        """Whether the optimizer makes a product of integers of it."""
        operands = [self.producers.get(name) for name in product.input]
        return not self.fuse and all(node and node.op_type == "DequantizeLinear" for node in operands)

    def _stored(self, operand: str) -> _Stored | None:
        """What the operand [K, N] of a product is made of; None if that is no weight of which slices can be copied."""
        nodes: list[onnx.NodeProto] = []
        while (node := self.producers.get(operand)) is not None:
            if not (node.op_type in ("Cast", "DequantizeLinear") or is_swap(node)):
                return None
            nodes.insert(0, node)
            operand = node.input[0]
        tensor = self.initializers.get(operand)
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type not in _STORED or all(map(is_swap, nodes)):
            return None
        axis = first = (1 + sum(map(is_swap, nodes))) % 2
        steps: list[_Step] = []
        for node in nodes:
            axes = self._axes(node, axis, tensor.dims[first])
            if axes is None:
                return None
            steps.append(_Step(node, axes))
            axis = 1 - axis if is_swap(node) else axis
        return _Stored(tensor, first, tuple(steps))

    def _axes(self, node: onnx.NodeProto, axis: int, size: int) -> tuple[int | None, ...] | None:
        """How scale and zero point are sliced where ``size`` outputs lie along ``axis``; None if it cannot be told."""
        own = next((a.i for a in node.attribute if a.name == "axis"), 1) % 2
        axes: list[int | None] = []
        for name in node.input[1:]:
            dims = tuple(self.initializers[name].dims) if name in self.initializers else ()
            if name and name not in self.initializers:
                return None
            if prod(dims) == 1 or (len(dims) == 1 and own != axis):
                axes.append(None)
            elif dims[axis if len(dims) == 2 else 0] == size:
                axes.append(axis if len(dims) == 2 else 0)
            else:  # blocks of outputs share a scale
                return None
        return tuple(axes)

    def _slice(
        self, node: onnx.NodeProto, stored: _Stored, output: str, bounds: tuple[int, int]
    ) -> list[onnx.NodeProto]:
        """The product with the outputs of the weight within ``bounds``."""
        new: list[onnx.NodeProto] = []
        value = self._part(new, stored.tensor.name, stored.axis, output, bounds)
        for number, step in enumerate(stored.steps):
            others = [
                name if axis is None else self._part(new, name, axis, output, bounds)
                for name, axis in zip(step.node.input[1:], step.axes, strict=True)
            ]
            made = f"{output}/{step.node.op_type}{number}"
            new.append(_like(step.node, made, [value, *others], made))
            value = made
        product = _like(node, output, [node.input[0], value], output)
        if is_swap(new[-1]):
            _read_transposed(product, new.pop().input[0])
        if node.output[0] in self.infos:
            info = self.infos[node.output[0]]
            self._declare(output, info.elem_type, info.shape, {len(info.shape.dim) - 1: bounds[1] - bounds[0]})
        return [*new, product]

    def _part(self, new: list[onnx.NodeProto], name: str, axis: int, output: str, bounds: tuple[int, int]) -> str:
        """A slice of an initializer, for the product that makes ``output``."""
        tensor, result = self.initializers[name], f"{output}/{name}"
        ends = [self._constant(f"bismooth::at{bound}", bound) for bound in bounds]
        new.append(
            helper.make_node(
                "Slice", [name, *ends, self._constant(f"bismooth::axis{axis}", axis)], [result], f"{result}/Slice"
            )
        )
        shape = helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type.shape
        self._declare(result, tensor.data_type, shape, {axis: bounds[1] - bounds[0]})
        return result

    def _declare(self, name: str, kind: int, shape: onnx.TensorShapeProto, sizes: dict[int, int] | None = None) -> None:
        """Say what type and shape a new value has: ``shape``, with other ``sizes`` by axis."""
        info = helper.make_tensor_value_info(name, kind, None)
        info.type.tensor_type.shape.CopyFrom(shape)
        for axis, size in (sizes or {}).items():
            info.type.tensor_type.shape.dim[axis].dim_value = size
        self.graph.value_info.append(info)

    def _constant(self, name: str, value: int) -> str:
        if name not in self.initializers:
            tensor = numpy_helper.from_array(np.array([value], np.int64), name)
            self.initializers[name] = tensor
            self.graph.initializer.append(tensor)
        return name

    def finish(self, keep: Sequence[str]) -> None:
        """Put new nodes in their places, and drop those whose readers were replaced."""
        order: list[onnx.NodeProto] = []
        for node in self.graph.node:
            order += self.instead.get(node.output[0], [node])
            order += self.behind.get(node.output[0], [])
        uses = Counter([*keep, *(value.name for value in self.graph.output)])
        for node in order:
            uses.update(reads(node))
        kept: list[onnx.NodeProto] = []
        for node in reversed(order):
            if self.left.isdisjoint(node.output) or any(uses[name] for name in node.output):
                kept.append(node)
            else:
                uses.subtract(reads(node))
                self.left.update(node.input)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))


def is_swap(node: onnx.NodeProto) -> bool:
    """Whether a node transposes a matrix."""
    return node.op_type == "Transpose" and [list(a.ints) for a in node.attribute if a.name == "perm"] == [[1, 0]]


def _like(node: onnx.NodeProto, name: str, inputs: Sequence[str], output: str) -> onnx.NodeProto:
    """A copy of a node with one output that reads and makes other values."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = name
    del copy.input[:], copy.output[:]
    copy.input.extend(inputs)
    copy.output.append(output)
    return copy


def _read_transposed(product: onnx.NodeProto, weight: str) -> None:
    """Let a MatMul read its weight as it is stored, [N, K]."""
    product.op_type, product.domain, product.input[1] = "FusedMatMul", _MICROSOFT, weight
    product.attribute.append(helper.make_attribute("transB", 1))
