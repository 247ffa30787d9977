"""The rescale of INT8 products as the scale of their weights."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._gs import Graph, Node, Tensor, dtype_of, is_constant, make_constant, shape_of
from .graph import Index
from .patterns import Names, made_by, other_input, sole_reader

_INT8 = np.dtype(np.int8)


@dataclass(frozen=True)
class MergeRescale:
    """MatMul(DQ(xq, 1), DQ(Wq, s0)) · r becomes MatMul(DQ(xq, s0), DQ(Wq, r)), one INT8 kernel of ONNX Runtime.

    Needs: products as ``InsertQdq`` makes them. Those with groups of a size, whose r is no vector, stay, with all that
    read the same activation. Promises: INT8 kernels give the same bits, since s0 is a power of two.
    """

    name: ClassVar[str] = "merge rescale"

    def apply(self, graph: Graph) -> int:
        """Rewrite the graph in place; returns how many products were merged."""
        index = Index.of(graph)
        names = Names(index)
        merged = 0
        for node in graph.nodes:
            products = _products(node, index)
            for product in products:
                _merge(product, names)
            if products:
                node.inputs[1] = products[0].s0
            merged += len(products)
        graph.cleanup()
        return merged


@dataclass(frozen=True, eq=False)
class _Product:
    """A product, its weight's DequantizeLinear with the scalar scale s0, and the Mul by r [N] behind it."""

    node: Node
    weight: Node
    s0: Tensor
    rescale: Node
    r: Tensor
    channels: int


def _products(activation: Node, index: Index) -> list[_Product]:
    """The products that read a DequantizeLinear with scale 1, if all of its readers are such products with one s0."""
    if activation.op != "DequantizeLinear" or activation.domain or is_constant(activation.inputs[0]):
        return []
    one = index.array(activation.inputs[1].name)
    if one is None or one.shape != () or one != 1:
        return []
    value = activation.outputs[0]
    products = [_product(reader, value, index) for reader in index.users(value.name)]
    found = [product for product in products if product is not None]
    scales = {product.s0.name for product in found}
    return found if len(found) == len(products) and len(scales) == 1 else []


def _product(node: Node, x: Tensor, index: Index) -> _Product | None:
    weight = made_by(node.inputs[1], "DequantizeLinear") if node.op == "MatMul" and node.inputs[0] is x else None
    if weight is None or len(weight.inputs) != 2 or sole_reader(index, weight.outputs[0]) is not node:
        return None
    values, s0 = weight.inputs
    channels = (shape_of(values) or (None,))[-1]
    rescale = sole_reader(index, node.outputs[0])
    r = other_input(rescale, node.outputs[0]) if rescale is not None and rescale.op == "Mul" else None
    if rescale is None or r is None or not (is_constant(values) and is_constant(s0) and is_constant(r)):
        return None
    is_linear = dtype_of(values) == _INT8 and len(shape_of(values) or ()) == 2 and shape_of(s0) == ()
    if not is_linear or not isinstance(channels, int) or shape_of(r) != (channels,):
        return None
    return _Product(node, weight, s0, rescale, r, channels)


def _merge(product: _Product, names: Names) -> None:
    # Each weight has zero points of its own: ONNX Runtime re-encodes weights for CPUs whose kernels take them unsigned,
    # and cannot replace a zero point that several share.
    zeros = make_constant(names.new(f"{product.weight.name}/zero_point"), np.zeros(product.channels, _INT8))
    product.weight.inputs[1] = product.r
    product.weight.inputs.append(zeros)
    product.weight.attrs["axis"] = 1
    (output,) = product.rescale.outputs
    product.rescale.outputs.clear()
    product.node.outputs[0] = output
