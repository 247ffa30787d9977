"""Residual sums and the RMS norms behind them as one operator."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._gs import Graph, Node, Tensor, dtype_of, empty_tensor, make_node, shape_of
from .graph import Index
from .patterns import CONTRIB, Names, axis_of, made_by, replace_nodes

_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class FuseSkipNorm:
    """Replace ``RMSNormalization(a + b)`` by ONNX Runtime's ``SkipSimplifiedLayerNormalization``.

    Needs: float32 a and b of the same shape [batch, sequence, channels], normalized over the channels. Promises: the
    sum is still there for its other readers; equal numbers but for the order of the mean's sum.
    """

    name: ClassVar[str] = "fuse sums and norms"

    def apply(self, graph: Graph) -> int:
        """Rewrite the graph in place; returns how many norms were fused."""
        index = Index.of(graph)
        names = Names(index)
        sums: dict[str, Node] = {}
        for node in graph.nodes:
            total = _sum_before(node)
            if total is not None and total.name not in sums and _comes_first(node, total.outputs[0], index):
                sums[total.name] = node
        replace_nodes(graph, {norm.name: [_fuse(index.nodes[name], norm, names)] for name, norm in sums.items()})
        return len(sums)


def _sum_before(norm: Node) -> Node | None:
    """The Add that a norm over the last of three axes reads, and that adds equals."""
    if norm.op != "RMSNormalization" or norm.domain or int(norm.attrs.get("stash_type", 1)) != 1:
        return None
    x, gamma = norm.inputs
    shape = shape_of(x) or ()
    total = made_by(x, "Add")
    if total is None or len(shape) != 3 or axis_of(norm, 3) != 2 or shape_of(gamma) != shape[2:]:
        return None
    is_plain = all(shape_of(tensor) == shape and dtype_of(tensor) == _FLOAT32 for tensor in (x, *total.inputs))
    return total if is_plain else None


def _comes_first(norm: Node, total: Tensor, index: Index) -> bool:
    """Whether no other node reads the sum before the norm does, in whose place the sum will be made."""
    place = index.order[norm.name]
    return all(index.owns(reader) and index.order[reader.name] >= place for reader in total.outputs)


def _fuse(total: Node, norm: Node, names: Names) -> Node:
    outputs = [norm.outputs[0], empty_tensor(), empty_tensor(), total.outputs[0]]
    inputs = [*total.inputs, norm.inputs[1]]
    attrs = {"epsilon": float(norm.attrs.get("epsilon", 1e-5))}
    total.outputs.clear()
    norm.outputs.clear()
    name = names.beside(norm, "SkipSimplifiedLayerNormalization")
    return make_node("SkipSimplifiedLayerNormalization", name, inputs, outputs, attrs, CONTRIB)
