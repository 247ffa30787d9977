"""Find the linears of an ONNX graph: products with a constant weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ..export.errors import BismoothError
from ..export.graph_names import LOGITS
from .external_data import check_external_data

if TYPE_CHECKING:
    import onnx

_PRODUCTS = ("MatMul", "Gemm")
#: What may stand between an initializer and the product that reads it.
_WEIGHT_OPS = frozenset(
    {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
#: What may stand between a DequantizeLinear and the product that reads it.
_LAYOUT_OPS = frozenset({"Reshape", "Transpose"})
#: What may stand between the head and the logits: types, rescale, bias, soft capping.
_TAIL_OPS = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Tanh", "Unsqueeze"})


@dataclass(frozen=True)
class Linear:
    """A MatMul or Gemm with a constant weight.

    Attributes:
        name: module path, ``model.layers.0.self_attn.q_proj``; the node's name where it does not end in its operator.
        node: name of the ONNX node.
        macs: multiply-accumulates per token, N·K.
        quantized: activation and weight both come from DequantizeLinear.
        head: computes the logits.
    """

    name: str
    node: str
    macs: int
    quantized: bool
    head: bool


@dataclass(frozen=True)
class GraphSummary:
    """What the null engine and the audit need to know of a graph. ``operators`` counts the nodes by operator."""

    linears: tuple[Linear, ...]
    operators: dict[str, int]
    inputs: dict[str, tuple[int | str | None, ...]]


def summarize(path: Path, part: bytes | None = None) -> GraphSummary:
    """Read the graph in ``path``, or the ``part`` of it, leaving its weights on disk, where they are checked to be.

    Raises:
        BismoothError: no readable ONNX file, weights that are not where it says, two products of one name, or the
            package onnx is missing.
    """
    try:
        from .subgraph import load_graph, parse_graph
    except ModuleNotFoundError as error:
        raise BismoothError(
            f"{path}: reading ONNX files needs the package '{error.name}'. "
            "Install it with: pip install 'bismooth[compile]'"
        ) from error
    graph = (load_graph(path) if part is None else parse_graph(part, str(path))).graph
    check_external_data(path, graph)
    return _Graph(path, graph).summary()


@dataclass
class _Graph:
    path: Path
    graph: onnx.GraphProto
    producers: dict[str, onnx.NodeProto] = field(init=False)
    constants: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.producers = {output: node for node in self.graph.node for output in node.output}
        self.constants = {tensor.name: tuple(tensor.dims) for tensor in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant":
                self.constants |= dict.fromkeys(node.output, tuple(node.attribute[0].t.dims if node.attribute else ()))

    def summary(self) -> GraphSummary:
        products = [node for node in self.graph.node if node.op_type in _PRODUCTS]
        heads = self._heads()
        linears = [linear for node in products if (linear := self._linear(node, heads)) is not None]
        self._check_names(linears)
        operators: dict[str, int] = {}
        for node in self.graph.node:
            operators[node.op_type] = operators.get(node.op_type, 0) + 1
        return GraphSummary(tuple(linears), operators, self._inputs())

    def _inputs(self) -> dict[str, tuple[int | str | None, ...]]:
        shapes = {
            value.name: value.type.tensor_type.shape.dim
            for value in self.graph.input
            if value.name not in self.constants
        }
        return {
            name: tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims)
            for name, dims in shapes.items()
        }

    def _linear(self, node: onnx.NodeProto, heads: frozenset[str]) -> Linear | None:
        weights = [shape for value in node.input[:2] if (shape := self._weight(value)) is not None]
        if len(weights) != 1:  # none: a product of activations; two: folded at build time
            return None
        quantized = all(self._dequantized(value) for value in node.input[:2])
        output = node.output[0]
        name = node.name or f"node_of_{output}"  # TensorRT's name for a node that has none
        return Linear(name.removesuffix(f"/{node.op_type}"), name, prod(weights[0]), quantized, output in heads)

    def _weight(self, value: str) -> tuple[int, ...] | None:
        """Shape of the constant that ``value`` is made from, or ``None``."""
        return self.constants.get(self._origin(value, _WEIGHT_OPS))

    def _dequantized(self, value: str) -> bool:
        node = self.producers.get(self._origin(value, _LAYOUT_OPS))
        return node is not None and node.op_type == "DequantizeLinear"

    def _origin(self, value: str, operators: frozenset[str]) -> str:
        """Where ``value`` comes from, following first inputs through ``operators`` (and not round a cycle)."""
        seen: set[str] = set()
        node = self.producers.get(value)
        while node is not None and node.op_type in operators and node.input and value not in seen:
            seen.add(value)
            value = node.input[0]
            node = self.producers.get(value)
        return value

    def _heads(self) -> frozenset[str]:
        """Outputs of the products from which the logits follow without another layer between."""
        heads: set[str] = set()
        pending = [LOGITS] if any(output.name == LOGITS for output in self.graph.output) else []
        seen: set[str] = set()
        while pending:
            value = pending.pop()
            node = self.producers.get(value)
            if node is None or value in seen:
                continue
            seen.add(value)
            if node.op_type in _PRODUCTS:
                heads.add(value)
            elif node.op_type in _TAIL_OPS:
                pending.extend(node.input)
        return frozenset(heads)

    def _check_names(self, linears: Iterable[Linear]) -> None:
        seen: set[str] = set()
        for linear in linears:
            if linear.node in seen:
                raise BismoothError(
                    f"{self.path}: two nodes are named '{linear.node}'. Expected unique names, by which kernels are "
                    "found. Rename the nodes, or export the model with 'bismooth export'."
                )
            seen.add(linear.node)
