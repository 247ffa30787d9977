"""Rewrites that keep float32 copies of weights small while a graph runs. Every value stays the same, bit for bit.

A weight that is stored in 16 or 8 bits becomes float32 where a run needs it. A table of embeddings is looked up first
and widened afterwards; a linear whose float32 copy would be large, as a rule the head, is computed in slices of its
outputs; a transposed copy is never made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from math import prod

import numpy as np
import onnx
from onnx import helper, numpy_helper

MOST = 1 << 30
"""Bytes of the largest float32 copy of a weight that is made as a whole."""

SLICE = 1 << 28
"""Bytes of the float32 copy of a slice."""

_MICROSOFT = "com.microsoft"


def make_lean(
    model: onnx.ModelProto, *, fuse: bool, keep: Collection[str] = (), most: int = MOST, piece: int = SLICE
) -> None:
    """Rewrite ``model`` in place.

    Args:
        model: its weights are external data.
        fuse: whether nothing optimizes the graph later: then products read transposed weights as they are stored.
        keep: values that stay in the graph, though nothing in it may read them any more.
        most: bytes of a float32 copy from which on a linear is cut into slices.
        piece: bytes of the float32 copy of a slice.
    """
    rewriter = _Rewriter(model.graph)
    for node in list(model.graph.node):
        if node.op_type == "Gather":
            rewriter.look_up_first(node)
        elif node.op_type == "MatMul" and not node.domain and not rewriter.slice_outputs(node, most, piece) and fuse:
            rewriter.fuse_transpose(node)
    rewriter.finish(frozenset(keep))
    if any(node.domain == _MICROSOFT for node in model.graph.node) and not any(
        opset.domain == _MICROSOFT for opset in model.opset_import
    ):
        model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))


class _Rewriter:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output if name}
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
        output, narrow = node.output[0], f"{node.output[0]}/stored"
        known = next((info for info in (*self.graph.value_info, *self.graph.output) if info.name == output), None)
        self.left.add(node.input[0])
        node.input[0], node.output[0] = table, narrow
        value, kind = narrow, self.initializers[table].data_type
        for number, cast in enumerate(casts, 1):
            if known is not None:
                self._declare(value, kind, known.type.tensor_type.shape)
            result = output if number == len(casts) else f"{output}/{number}"
            widen = helper.make_node("Cast", [value], [result], f"{node.name}/Cast_{number}")
            widen.attribute.extend(cast.attribute)
            self.behind.setdefault(narrow, []).append(widen)
            value, kind = result, next(a.i for a in cast.attribute if a.name == "to")

    def fuse_transpose(self, node: onnx.NodeProto) -> None:
        """MatMul(x, Transpose(w)) becomes one product, as ONNX Runtime's own optimizer would do."""
        transpose = self.producers.get(node.input[1])
        if transpose is not None and _is_swap(transpose):
            node.op_type, node.domain = "FusedMatMul", _MICROSOFT
            self.left.add(node.input[1])
            node.input[1] = transpose.input[0]
            node.attribute.append(helper.make_attribute("transB", 1))

    def slice_outputs(self, node: onnx.NodeProto, most: int, piece: int) -> bool:
        """MatMul(x, w) of a large w that is widened becomes one product per slice of its outputs."""
        chain = self._chain(node.input[1])
        stored = self.initializers.get(chain[-1].input[0]) if chain else None
        if stored is None or len(stored.dims) != 2 or 4 * prod(stored.dims) <= most or chain[-1].op_type == "Transpose":
            return False
        is_swapped = any(_is_swap(step) for step in chain)
        n, k = tuple(stored.dims) if is_swapped else tuple(reversed(stored.dims))
        step = max(1, piece // (4 * k))
        new: list[onnx.NodeProto] = []
        parts: list[str] = []
        for start in range(0, n, step):
            parts.append(f"{node.output[0]}/{start}")
            new += self._slice(node, chain, parts[-1], (start, min(start + step, n)), 0 if is_swapped else 1)
        new.append(helper.make_node("Concat", parts, [node.output[0]], f"{node.name}/Concat", axis=-1))
        self.instead[node.output[0]] = new
        self.left.add(node.input[1])
        return True

    def _chain(self, name: str) -> list[onnx.NodeProto]:
        """The steps from a product's operand back to what is stored, if one of them widens it."""
        steps: list[onnx.NodeProto] = []
        while (node := self.producers.get(name)) is not None:
            if not (node.op_type in ("Cast", "DequantizeLinear") or _is_swap(node)):
                return []
            steps.append(node)
            name = node.input[0]
        return steps if any(step.op_type != "Transpose" for step in steps) else []

    def _slice(
        self, node: onnx.NodeProto, chain: Sequence[onnx.NodeProto], output: str, bounds: tuple[int, int], axis: int
    ) -> list[onnx.NodeProto]:
        """The product with some outputs of the weight, whose ``axis`` they are as it is stored."""
        new: list[onnx.NodeProto] = []

        def part(name: str, along: int) -> str:
            ends = [
                self._constant(f"bismooth::{kind}{at}", at)
                for kind, at in zip(("at", "at", "axis"), (*bounds, along), strict=True)
            ]
            result = f"{output}/{name}"
            new.append(helper.make_node("Slice", [name, *ends], [result], f"{result}/Slice"))
            dims = list(self.initializers[name].dims)
            dims[along] = bounds[1] - bounds[0]
            self._declare(
                result, self.initializers[name].data_type, helper.make_tensor_type_proto(1, dims).tensor_type.shape
            )
            return result

        value = part(chain[-1].input[0], axis)
        for step in reversed(chain):
            copy = onnx.NodeProto()
            copy.CopyFrom(step)
            others = [part(name, 0) if self._is_per_channel(name) else name for name in step.input[1:]]
            copy.name, value_out = f"{output}/{step.op_type}", f"{output}/{step.op_type}"
            del copy.input[:], copy.output[:]
            copy.input.extend([value, *others])
            copy.output.append(value_out)
            new.append(copy)
            value = value_out
        product = onnx.NodeProto()
        product.CopyFrom(node)
        product.name, product.input[1], product.output[0] = output, value, output
        last = new[-1]
        if _is_swap(last):
            new.pop()
            product.op_type, product.domain, product.input[1] = "FusedMatMul", _MICROSOFT, last.input[0]
            product.attribute.append(helper.make_attribute("transB", 1))
        return [*new, product]

    def _declare(self, name: str, kind: int, shape: onnx.TensorShapeProto) -> None:
        info = helper.make_tensor_value_info(name, kind, None)
        info.type.tensor_type.shape.CopyFrom(shape)
        self.graph.value_info.append(info)

    def _is_per_channel(self, name: str) -> bool:
        return name in self.initializers and prod(self.initializers[name].dims) > 1

    def _constant(self, name: str, value: int) -> str:
        if name not in self.initializers:
            tensor = numpy_helper.from_array(np.array([value], np.int64), name)
            self.initializers[name] = tensor
            self.graph.initializer.append(tensor)
        return name

    def finish(self, keep: frozenset[str]) -> None:
        """Put new nodes in their places, and drop those whose readers were replaced, unless they make what is kept."""
        order: list[onnx.NodeProto] = []
        for node in self.graph.node:
            order += self.instead.get(node.output[0], [node])
            order += self.behind.get(node.output[0], [])
        uses = Counter(name for node in order for name in node.input)
        kept: list[onnx.NodeProto] = []
        for node in reversed(order):
            if self.left.isdisjoint(node.output) or any(uses[name] or name in keep for name in node.output):
                kept.append(node)
            else:
                uses.subtract(node.input)
                self.left.update(node.input)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))


def _is_swap(node: onnx.NodeProto) -> bool:
    return node.op_type == "Transpose" and [list(a.ints) for a in node.attribute if a.name == "perm"] in ([], [[1, 0]])
