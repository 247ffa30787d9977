"""Lower a graph to opset 20 for TensorRT 10: attention and RMS norms as primitive operators.

NOTE: TensorRT 10 fuses attention where it finds MatMul, mask, Softmax, MatMul on [batch, heads, sequence, size], so
K and V are expanded to the heads of Q before, and nothing stands between Softmax and the second MatMul. A row whose
keys are all masked therefore comes out as the mean of V, not as zeros; it is finite, and no other row reads it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import onnx

from ..export.errors import BismoothError
from ._gs import (
    Array,
    Dim,
    Graph,
    Node,
    Tensor,
    dtype_of,
    make_constant,
    make_node,
    make_variable,
    shape_of,
)
from .precision_policy import is_standard

OPSET = 20
IR_VERSION = 9
_LOWEST = float(np.finfo(np.float32).min)
_FLOAT32 = np.dtype(np.float32)
_SUBGRAPHS = ("then_branch", "else_branch", "body")
_REDEFINED = frozenset({"GroupNormalization"})
"""Operators whose inputs mean something else in opset 20 although they look the same."""


@dataclass(frozen=True, slots=True)
class Decompose:
    """Replace ``Attention`` and ``RMSNormalization`` by primitive operators and declare opset 20, IR version 9.

    Needs: 4-D attention without a cache; recorded types and shapes.
    Promises: every node is valid in opset 20, and computes what it did (to 1e-5 in float32).
    """

    name: ClassVar[str] = "decompose"

    def apply(self, graph: Graph) -> int:
        """Rewrite the graph in place; returns how many nodes were replaced.

        Raises:
            BismoothError: A node cannot be expressed in opset 20.
        """
        replaced = lower(graph, LOWERINGS)
        for node in graph.nodes:
            _make_expressible(node, graph.opset)
        _declare(graph)
        return replaced


class Builder:
    """Emits the nodes that take the place of one node; they are named after it."""

    def __init__(self, node: Node, shared: dict[str, Tensor]) -> None:
        self.node = node
        self.nodes: list[Node] = []
        self._shared = shared
        self._counts: dict[str, int] = {}

    def emit(
        self,
        op: str,
        inputs: list[Tensor],
        shape: tuple[Dim, ...] | None,
        dtype: np.dtype[Any] | None = None,
        **attrs: Any,
    ) -> Tensor:
        """Append a node; its result has the type of its first input unless one is given."""
        place = self._counts[op] = self._counts.get(op, 0) + 1
        name = f"{self.node.name}/{op}" + (f"_{place - 1}" if place > 1 else "")
        result = make_variable(f"{name}.out", dtype or dtype_of(inputs[0]), shape)
        self.nodes.append(make_node(op, name, inputs, [result], attrs))
        return result

    def cast(self, tensor: Tensor, dtype: np.dtype[Any] | None) -> Tensor:
        """The value in a type: itself where it already has that type."""
        if dtype is None or dtype_of(tensor) == dtype:
            return tensor
        to = int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
        return self.emit("Cast", [tensor], shape_of(tensor), dtype, to=to)

    def constant(self, values: Array) -> Tensor:
        """An initializer, shared by all nodes that need the same one."""
        text = "_".join(str(value) for value in values.reshape(-1).tolist())
        name = f"decompose.{values.dtype.name}.{values.ndim}.{text}"
        return self._shared.setdefault(name, make_constant(name, values))

    def scalar(self, value: float, dtype: np.dtype[Any] | None = None) -> Tensor:
        """A scalar initializer, float32 unless a type is given."""
        return self.constant(np.array(value, dtype or _FLOAT32))

    def ints(self, *values: int) -> Tensor:
        """A 1-D int64 initializer."""
        return self.constant(np.array(values, np.int64))

    def error(self, expected: str, got: str, fix: str) -> BismoothError:
        """An error about the node being replaced."""
        return BismoothError(
            f"decompose: node {self.node.name} ({self.node.op}) cannot be lowered to opset {OPSET}. "
            f"Expected {expected}, got {got}. {fix}"
        )


Lowering = Callable[[Builder], None]


def lower(graph: Graph, lowerings: dict[str, Lowering]) -> int:
    """Replace every node that has a lowering, keeping the name of its output; returns how many were replaced."""
    nodes: list[Node] = []
    shared: dict[str, Tensor] = {}
    replaced = 0
    for node in list(graph.nodes):
        lowering = lowerings.get(node.op) if is_standard(node) else None
        if lowering is None:
            nodes.append(node)
            continue
        builder = Builder(node, shared)
        lowering(builder)
        builder.nodes[-1].outputs[0] = node.outputs[0]
        nodes.extend(builder.nodes)
        node.inputs.clear()
        node.outputs.clear()
        replaced += 1
    graph.nodes[:] = nodes
    return replaced


def lower_attention(b: Builder) -> None:
    """Softmax(mask(softcap(Q * scale @ K^T))) @ V (ONNX Attention-23), with K and V expanded to the heads of Q.

    The products are in the type of Q, everything between them in float32.
    """
    query, key, value, mask = _attention_inputs(b)
    batch, heads, rows, size = _shape4(query)
    columns = _shape4(key)[2]
    shape = (batch, heads, rows, columns)
    scale = float(b.node.attrs.get("scale", 0.0)) or _default_scale(b, size)
    query = b.emit("Mul", [query, b.scalar(scale, dtype_of(query))], shape_of(query))
    key = _expand_heads(b, key, heads)
    key = b.emit("Transpose", [key], (batch, heads, size, columns), perm=[0, 1, 3, 2])
    scores = b.cast(b.emit("MatMul", [query, key], shape), _FLOAT32)
    scores = _softcap(b, scores, float(b.node.attrs.get("softcap", 0.0)))
    if mask is not None:
        scores = _apply_mask(b, scores, mask)
    if b.node.attrs.get("is_causal", 0):
        scores = _apply_mask(b, scores, _causal_mask(b, query, key))
    weights = b.cast(b.emit("Softmax", [scores], shape, axis=-1), dtype_of(value))
    b.emit("MatMul", [weights, _expand_heads(b, value, heads)], None)


def lower_rms_normalization(b: Builder) -> None:
    """x / sqrt(mean(x^2) + epsilon) in float32, then times gamma in gamma's type (ONNX RMSNormalization-23)."""
    x, gamma = b.node.inputs
    shape = shape_of(x)
    if shape is None:
        raise b.error("a recorded shape", "none", "Run shape inference on the model.")
    axis = int(b.node.attrs.get("axis", -1))
    first = axis if axis < 0 else axis - len(shape)
    kept = (*shape[:first], *[1] * -first)
    wide = b.cast(x, _FLOAT32)
    square = b.emit("Mul", [wide, wide], shape)
    mean = b.emit("ReduceMean", [square, b.ints(*range(first, 0))], kept, keepdims=1)
    shifted = b.emit("Add", [mean, b.scalar(float(b.node.attrs.get("epsilon", 1e-5)))], kept)
    unit = b.emit("Div", [wide, b.emit("Sqrt", [shifted], kept)], shape)
    b.emit("Mul", [b.cast(unit, dtype_of(gamma)), gamma], shape)


LOWERINGS: dict[str, Lowering] = {
    "Attention": lower_attention,
    "RMSNormalization": lower_rms_normalization,
}


def _attention_inputs(b: Builder) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    query, key, value = b.node.inputs[:3]
    mask = next((tensor for tensor in b.node.inputs[3:4] if not tensor.is_empty()), None)
    if any(not tensor.is_empty() for tensor in (*b.node.inputs[4:], *b.node.outputs[1:])):
        raise b.error(
            "attention over its own keys alone",
            "one with a cache or more outputs than Y",
            "Concatenate K and V outside of the node.",
        )
    ranks = [len(shape_of(tensor) or ()) for tensor in (query, key, value)]
    if ranks != [4, 4, 4]:
        raise b.error(
            "Q, K, V of shape [batch, heads, sequence, size]",
            f"ranks {ranks}",
            "Reshape and transpose them before the node.",
        )
    return query, key, value, mask


def _shape4(tensor: Tensor) -> tuple[Dim, Dim, Dim, Dim]:
    batch, heads, sequence, size = shape_of(tensor) or (None, None, None, None)
    return batch, heads, sequence, size


def _default_scale(b: Builder, size: Dim) -> float:
    if not isinstance(size, int):
        raise b.error("a fixed head size, or a scale", f"{size}", "Export the model with a fixed head size.")
    return size**-0.5


def _expand_heads(b: Builder, tensor: Tensor, heads: Dim) -> Tensor:
    """[batch, h, sequence, size] with every head repeated ``heads / h`` times in a row."""
    batch, own, sequence, size = _shape4(tensor)
    if own == heads:
        return tensor
    if not isinstance(own, int) or not isinstance(heads, int) or not isinstance(size, int) or heads % own:
        raise b.error(
            "fixed numbers of heads, those of Q a multiple of those of K and V",
            f"{heads} and {own}",
            "Export the model with fixed numbers of heads.",
        )
    group = heads // own
    split = b.emit("Unsqueeze", [tensor, b.ints(2)], (batch, own, 1, sequence, size))
    repeated = b.emit("Expand", [split, b.ints(1, 1, group, 1, 1)], (batch, own, group, sequence, size))
    return b.emit("Reshape", [repeated, b.ints(0, heads, -1, size)], (batch, heads, sequence, size))


def _softcap(b: Builder, scores: Tensor, cap: float) -> Tensor:
    if not cap:
        return scores
    shape, limit = shape_of(scores), b.scalar(cap)
    return b.emit("Mul", [b.emit("Tanh", [b.emit("Div", [scores, limit], shape)], shape), limit], shape)


def _apply_mask(b: Builder, scores: Tensor, mask: Tensor) -> Tensor:
    if dtype_of(mask) == np.bool_:
        return b.emit("Where", [mask, scores, b.scalar(_LOWEST)], shape_of(scores), _FLOAT32)
    return b.emit("Add", [scores, b.cast(mask, _FLOAT32)], shape_of(scores))


def _causal_mask(b: Builder, query: Tensor, key: Tensor) -> Tensor:
    """[rows, columns] bool: a query reads the keys at its own position and before; ``key`` is transposed."""
    rows, columns = _positions(b, query, 2), _positions(b, key, 3)
    row = b.emit("Unsqueeze", [rows, b.ints(1)], (None, 1))
    return b.emit("LessOrEqual", [columns, row], (None, None), np.dtype(np.bool_))


def _positions(b: Builder, tensor: Tensor, axis: int) -> Tensor:
    int64 = np.dtype(np.int64)
    length = b.emit("Shape", [tensor], (1,), int64, start=axis, end=axis + 1)
    zero, one = b.constant(np.array(0, np.int64)), b.constant(np.array(1, np.int64))
    return b.emit("Range", [zero, b.emit("Squeeze", [length], ()), one], (None,))


def _make_expressible(node: Node, opset: int) -> None:
    """Drop attributes that only say their default; fail on what the older operator cannot do."""
    if not is_standard(node):
        return
    if any(name in node.attrs for name in _SUBGRAPHS):
        raise _inexpressible(node, "a graph without control flow", f"{node.op} with a subgraph")
    old, new = _schema(node.op, OPSET), _schema(node.op, opset)
    if old is None or new is None or (new.since_version > OPSET and node.op in _REDEFINED):
        raise _inexpressible(node, f"an operator of opset {OPSET}", f"{node.op} of opset {opset}")
    if new.since_version <= OPSET:
        return
    for name in [name for name in node.attrs if name not in old.attributes]:
        default = onnx.helper.get_attribute_value(new.attributes[name].default_value)
        if node.attrs[name] != default:
            raise _inexpressible(node, f"attributes of opset {OPSET}", f"{name}={node.attrs[name]}")
        del node.attrs[name]
    for side, formal in ((node.inputs, old.inputs), (node.outputs, old.outputs)):
        for place, tensor in enumerate(side):
            kind = _type_string(tensor)
            if kind is not None and kind not in formal[min(place, len(formal) - 1)].types:
                raise _inexpressible(node, f"types of opset {OPSET}", f"{tensor.name} of type {kind}")


def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None


def _type_string(tensor: Tensor) -> str | None:
    dtype = None if tensor.is_empty() else dtype_of(tensor)
    if dtype is None:
        return None
    kind = onnx.helper.tensor_dtype_to_string(onnx.helper.np_dtype_to_tensor_dtype(dtype))
    return f"tensor({kind.removeprefix('TensorProto.').lower()})"


def _inexpressible(node: Node, expected: str, got: str) -> BismoothError:
    return BismoothError(
        f"decompose: node {node.name} ({node.op}) does not exist in opset {OPSET}. Expected {expected}, got {got}. "
        "Export with --opset 23 and use a runtime that reads it."
    )


def _declare(graph: Graph) -> None:
    """Set the opset and IR version of the file that the graph is written to."""
    others = [entry for entry in cast(Any, graph).import_domains or () if entry.domain not in ("", "ai.onnx")]
    cast(Any, graph).import_domains = [onnx.helper.make_opsetid("", OPSET), *others]
    cast(Any, graph).opset = OPSET
    cast(Any, graph).ir_version = IR_VERSION
