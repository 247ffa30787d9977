"""Make a float32 graph round where its deployed 16-bit graph does: Casts to the 16-bit type and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from ._gs import Graph, Node, Tensor, dtype_of, make_node, make_variable, shape_of
from .precision_policy import Role, is_float, role_of

Places = Mapping[str, tuple[int, ...]]
"""By node name, places among a node's inputs or outputs."""


def round_trip(source: Tensor, target: Tensor, dtype: np.dtype[Any], prefix: str = "") -> list[Node]:
    """Two Casts that bring the float32 value ``source`` into ``target``, rounded to ``dtype`` on the way."""
    narrow = make_variable(f"{prefix}{target.name}.{dtype}", dtype, shape_of(target))
    return [
        make_node("Cast", f"{prefix}{new.name}/Cast", [old], [new], {"to": _element_type(new)})
        for old, new in ((source, narrow), (narrow, target))
    ]


@dataclass(frozen=True)
class Rounding:
    """Where a 16-bit graph rounds what a float32 graph with the same node names does not.

    Attributes:
        dtype: The 16-bit type.
        reads: The inputs that are read in it. The INT8 operands of a product are exact, so they are not among them.
        writes: The outputs that are computed in it; the integer sums of an INT8 product are not among them.
    """

    dtype: np.dtype[Any]
    reads: Places
    writes: Places

    @classmethod
    def of(cls, deployed: Graph, dtype: np.dtype[Any]) -> "Rounding":
        """The rounding of a deployed graph, quantized or not."""
        reads: dict[str, tuple[int, ...]] = {}
        writes: dict[str, tuple[int, ...]] = {}
        for node in deployed.nodes:
            dequantized = [_is_dequantized(tensor) for tensor in node.inputs]
            reads[node.name] = tuple(
                place
                for place, tensor in enumerate(node.inputs)
                if dtype_of(tensor) == dtype and not dequantized[place]
            )
            is_integer = len(dequantized) > 1 and all(dequantized[:2])
            writes[node.name] = tuple(
                place for place, tensor in enumerate(node.outputs) if dtype_of(tensor) == dtype and not is_integer
            )
        return cls(dtype, reads, writes)

    def concerns(self, graph: Graph) -> bool:
        """Whether a node of the float32 graph rounds anything."""
        return any(self.reads.get(node.name) or self.writes.get(node.name) for node in graph.nodes)

    def apply(self, graph: Graph) -> None:
        """Insert the Casts into a float32 graph, in place."""
        nodes: list[Node] = []
        rounded: dict[str, Tensor] = {}
        for node in list(graph.nodes):
            for place in self.reads.get(node.name, ()):
                if is_float(tensor := node.inputs[place]):
                    if tensor.name not in rounded:
                        rounded[tensor.name] = make_variable(
                            f"{tensor.name}.rounded", dtype_of(tensor), shape_of(tensor)
                        )
                        nodes += round_trip(tensor, rounded[tensor.name], self.dtype)
                    node.inputs[place] = rounded[tensor.name]
            nodes.append(node)
            for place in self.writes.get(node.name, ()):
                if is_float(tensor := node.outputs[place]):
                    rounded[tensor.name] = tensor
                    if role_of(node) is not Role.MOVE:
                        exact = _float(f"{tensor.name}.exact", tensor)
                        node.outputs[place] = exact
                        nodes += round_trip(exact, tensor, self.dtype)
        graph.nodes[:] = nodes


def _float(name: str, like: Tensor) -> Tensor:
    return make_variable(name, np.dtype(np.float32), shape_of(like))


def _is_dequantized(tensor: Tensor) -> bool:
    return bool(tensor.inputs) and tensor.inputs[0].op == "DequantizeLinear"


def _element_type(tensor: Tensor) -> int:
    dtype = dtype_of(tensor)
    assert dtype is not None
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
