"""How much memory a run of a graph takes, from the types and shapes of its values alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod

import onnx
from onnx import helper

from ..export.graph_names import TOTAL
from .cuts import reads
from .lean import is_swap
from .onnxruntime import Mode

MARGIN, SLACK = 96 << 20, 0.1
"""Bytes for ONNX Runtime itself, its threads and the operators' own buffers; and the share of the values by which what
was freed lies about."""

_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators whose output is the memory of their input."""

_COPIES = 3
_FLOAT_BYTES = 4
_PAGES = 1 << 20
"""Bytes that may become resident around what is read: page faults map files by folios, measured 0.7 MB for a row."""


def footprint(model: onnx.ModelProto, sizes: Mapping[str, int], mode: Mode, rows: int | None = None) -> int:
    """Bytes that a lean session of ``model`` takes: its weights, and at most so much of its values at one time.

    Args:
        model: nodes in the order in which they run. A value without a shape counts as much as the first input of its
            node, a constant as much as in float32.
        sizes: of the symbolic dimensions.
        mode: of the session.
        rows: how many different rows of a table all runs look up, at most: what one has read stays mapped while others
            run. By default, those of one run.
    """
    values = _Values(model.graph, sizes)
    looked_up = _looked_up(model.graph, values, rows)
    stored = sum(min(_resident(t), looked_up.get(t.name, _resident(t))) for t in model.graph.initializer)
    most = int((1 + SLACK) * _peak(model.graph, values, mode))
    return stored + most + MARGIN


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of what a tensor stores."""
    return _bytes(tensor.data_type, tuple(tensor.dims))


def _resident(tensor: onnx.TensorProto) -> int:
    """Bytes of an initializer in memory: mapped, or, from the graph itself, once serialized, once read, once loaded."""
    return (1 if tensor.data_location == onnx.TensorProto.EXTERNAL else _COPIES) * tensor_bytes(tensor)


def resolve(shape: onnx.TensorShapeProto, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """Numbers for the dimensions of a shape, which may be sums and products of names; None if one is unknown."""
    dims = [_resolve(dim, sizes) for dim in shape.dim]
    known = tuple(dim for dim in dims if dim is not None)
    return known if len(known) == len(dims) else None


def _resolve(dim: onnx.TensorShapeProto.Dimension, sizes: Mapping[str, int]) -> int | None:
    if dim.HasField("dim_value"):
        return dim.dim_value
    total = 0
    for term in dim.dim_param.replace(" ", "").split("+"):
        factors = [int(factor) if factor.isdecimal() else sizes.get(factor) for factor in term.split("*")]
        if None in factors:
            return None
        total += prod(factor for factor in factors if factor is not None)
    return total


def _peak(graph: onnx.GraphProto, memory: _Values, mode: Mode) -> int:
    """The most bytes of values that exist at one time; the graph's inputs and outputs exist to the end.

    In mode "int8" nodes that the optimizer has put in place of others run after all that could run before: so what is
    made of constants alone exists from the beginning.
    """
    early: set[str] = set()
    if mode == "int8":
        memory.bytes_of.update(dict.fromkeys(_fused(graph), 0))
        early.update(_made_of_constants(graph))
    end = memory.last_reads()
    live = sum(memory.bytes_of.get(value.name, 0) for value in graph.input)
    live += sum(memory.bytes_of[name] for node in graph.node for name in memory.made_by(node) if name in early)
    most = live
    dying: dict[int, list[str]] = {}
    for name, place in end.items():
        dying.setdefault(place, []).append(name)
    for place, node in enumerate(graph.node):
        live += sum(memory.bytes_of[name] for name in memory.made_by(node) if name not in early)
        most = max(most, live + memory.scratch(node))
        live -= sum(memory.bytes_of[name] for name in dying.get(place, ()))
    return most


def _looked_up(graph: onnx.GraphProto, memory: _Values, rows: int | None) -> dict[str, int]:
    """Bytes that runs read of tables in files of which it only looks up rows, and what the system maps around them."""
    tables = {t.name: t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    counts, whole = Counter[str](), set[str]()
    for node in graph.node:
        for name in reads(node).intersection(tables):
            ids = memory.shapes.get(node.input[1]) if node.op_type == "Gather" and name == node.input[0] else None
            if ids is None or any(a.name == "axis" and a.i != 0 for a in node.attribute):
                whole.add(name)
            else:
                counts[name] += prod(ids) if rows is None else rows
    return {
        name: count * (tensor_bytes(tables[name]) // max(1, *tables[name].dims[:1]) + _PAGES)
        for name, count in counts.items()
        if name not in whole
    }


def _fused(graph: onnx.GraphProto) -> Iterator[str]:
    """Operands of products that the optimizer spares: it multiplies integers, or reads weights as they are stored."""
    makers = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        if node.op_type == "MatMul":
            operands = [makers.get(name) for name in node.input]
            if all(maker and maker.op_type == "DequantizeLinear" for maker in operands):
                yield from node.input
            elif operands[1] and is_swap(operands[1]):
                yield node.input[1]


def _made_of_constants(graph: onnx.GraphProto) -> set[str]:
    """Values that depend on no input of the graph."""
    known = {tensor.name for tensor in graph.initializer}
    made: set[str] = set()
    for node in graph.node:
        if known.issuperset(reads(node)):
            known.update(node.output)
            made.update(node.output)
    return made


class _Values:
    """Sizes of all values, and which are views of others."""

    def __init__(self, graph: onnx.GraphProto, sizes: Mapping[str, int]) -> None:
        self._graph, self._sizes = graph, sizes
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._roots: dict[str, str] = {}
        self._widths: dict[str, int] = {}
        self.bytes_of: dict[str, int] = {}
        weights = {tensor.name: _FLOAT_BYTES * prod(tensor.dims) for tensor in graph.initializer}
        for info in (*graph.input, *graph.value_info, *graph.output):
            kind = info.type.tensor_type
            shape = resolve(kind.shape, sizes) if kind.HasField("shape") else None
            if shape is not None and kind.elem_type:
                self.shapes[info.name] = shape
                self.bytes_of[info.name] = _bytes(kind.elem_type, shape)
                self._widths[info.name] = _bytes(kind.elem_type, (1,))
        for node in graph.node:
            first = node.input[0] if node.input else ""
            for name in filter(None, node.output):
                self.bytes_of.setdefault(name, weights.get(first, self._widened(node)))
            if node.op_type in _VIEWS and first not in weights:
                self._roots[node.output[0]] = self._roots.get(first, first)
                self._widths.setdefault(node.output[0], self._widths.get(first, _FLOAT_BYTES))

    def _widened(self, node: onnx.NodeProto) -> int:
        """Bytes of an output without a shape: those of its first input, in float32 if the node makes it that."""
        first = node.input[0] if node.input else ""
        size = self.bytes_of.get(first, 0)
        if node.op_type not in ("Cast", "DequantizeLinear"):
            return size
        return size // max(1, self._widths.get(first, _FLOAT_BYTES)) * _FLOAT_BYTES

    def made_by(self, node: onnx.NodeProto) -> Iterator[str]:
        """The outputs of a node that are memory of their own."""
        return (name for name in node.output if name and name not in self._roots)

    def last_reads(self) -> dict[str, int]:
        """Which node is the last to read what a node has made; without those that are outputs of the graph."""
        ends: dict[str, int] = {}
        for place, node in enumerate(self._graph.node):
            ends.update(dict.fromkeys(self.made_by(node), place))
            roots = (self._roots.get(name, name) for name in node.input)
            ends.update({name: place for name in roots if name in ends})
        for value in self._graph.output:
            ends.pop(self._roots.get(value.name, value.name), None)
        return ends

    def scratch(self, node: onnx.NodeProto) -> int:
        """Bytes that a node takes beside its inputs and outputs: the scores of attention, before and after softmax."""
        shape = self.shapes.get(node.input[0]) if node.op_type == "Attention" else None
        if shape is None or len(shape) not in (3, 4):
            return 0
        heads = next((a.i for a in node.attribute if a.name == "q_num_heads"), 1) if len(shape) == 3 else shape[1]
        return 2 * _FLOAT_BYTES * shape[0] * heads * shape[-2] * self._sizes.get(TOTAL, shape[-2])


def _bytes(kind: int, dims: tuple[int, ...]) -> int:
    if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1):
        return -(-prod(dims) // 2)
    return prod(dims) * helper.tensor_dtype_to_np_dtype(kind).itemsize
