"""Insert Q/DQ: linears become INT8 GEMMs in the form that every supported runtime compiles to one.

Per token (one scale t per row, computed at run time; the Q and DQ nodes keep the constant scale 1)::

    t   = max(max|x|, tiny) / 127             float32
    xq  = QuantizeLinear(x / t, 1)            int8, shared by all linears that read x
    acc = MatMul(DQ(xq, 1), DQ(Wq, s0))       int8 × int8
    y   = acc · r · t                         float32, r[n] = scale_w[n] / s0

Per tensor: xq = QuantizeLinear(x · (1 / s_x), 1) and r[n] = scale_w[n] · s_x / s0.
Weight-only: MatMul(x, DQ(Wq, scale_w)).
Groups of a size: x becomes [G, T, size] and W [G, size, N], one batched MatMul; r is [G, 1, N]; the sum comes last.
Groups by magnitude: a product without the walls (channels whose weights stand out: x and Wq are 0 there), and one with
only those, gathered, each with scales of its own; the sum of both. In 16 bits walls are two INT8 digits, x = (x₁ + x₂ /
254) · t and W alike: x₁ w₁, and a second thin product of x₂ beside x₁ with w₁ beside w₂, 1 / 254 of its size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._gs import Dim, Graph, Node, Tensor, make_constant, shape_of
from .emit import FLOAT, INT8, INT64, Emitter
from .graph import Index
from .linears import Linear
from .quantizers import Quantized, Quantizers, static_scale, walls_name
from .spec import Groups, LinearSpec, PerGroup, PerMagnitude
from .static_ranges import StaticRanges
from .weights import S0

Store: TypeAlias = Callable[[str, np.dtype[Any], Sequence[int]], Tensor]
"""Makes the initializer for a tensor that will be stored under this name, with this type and shape."""


@dataclass(frozen=True)
class Product:
    """One of the products that a quantized linear is computed with.

    Attributes:
        name: Opens the names of its nodes and tensors: the linear's, for its first product.
        node: Name of the MatMul.
        values: Name of the stored INT8 weight.
        scale: Name of the stored scale.
        values_shape: [K, N], [G, size, N] for groups of a size, or [k, N] for k walls ([2k, N] for their low digits).
        scale_shape: [N], or [G, 1, N].
        group: Which group by magnitude it is of, 0 for all channels but the walls.
    """

    name: str
    node: str
    values: str
    scale: str
    values_shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    group: int = 0

    @staticmethod
    def of(linear: Linear, groups: Groups | None) -> "list[Product]":
        """Its only one; or that without the walls, and one or two for each group of walls."""
        k, n = linear.k, linear.n
        if isinstance(groups, PerGroup):
            count = -(-k // groups.size)
            return [_product(linear.name, linear.node, (count, groups.size, n), (count, 1, n))]
        products = [_product(linear.name, linear.node, (k, n), (n,))]
        if isinstance(groups, PerMagnitude):
            for number, channels in enumerate(groups.walls):
                for digit in range(groups.wall_bits // 8):
                    name = f"{linear.name}/{walls_name(number, digit)}"
                    shape = ((digit + 1) * len(channels), n)
                    products.append(_product(name, f"{name}/MatMul", shape, (n,), number + 1))
        return products


def _product(name: str, node: str, values: tuple[int, ...], scale: tuple[int, ...], group: int = 0) -> Product:
    return Product(name, node, f"{name}.weight.int8", f"{name}.weight.scale", values, scale, group)


@dataclass(frozen=True)
class InsertQdq:
    """Lower the quantized linears of a float32 graph.

    Needs: a float32 graph; linears as ``find_linears`` gives them for it.
    Promises: every linear whose specification is quantized reads its weight as INT8; nodes keep their names.

    Attributes:
        linears: The graph's linears.
        specs: Specification by linear name; those without one stay float.
        ranges: For statically quantized activations, max|x| that maps to 127.
        store: Makes the new initializers: per :class:`Product`, Wq int8 and its scale float32 (as :func:`rescale`
            gives it where a rescale follows).
    """

    linears: Sequence[Linear]
    specs: Mapping[str, LinearSpec]
    ranges: StaticRanges
    store: Store = field(compare=False)

    name: ClassVar[str] = "insert Q/DQ"

    def apply(self, graph: Graph) -> None:
        """Rewrite the graph in place.

        Raises:
            BismoothError: an activation has a static scale and no range.
        """
        lowering = _Lowering(self, Index.of(graph))
        chosen = {linear.node: linear for linear in self.linears if _is_quantized(self.specs.get(linear.name))}
        nodes: list[Node] = []
        for node in list(graph.nodes):
            linear = chosen.get(node.name)
            nodes += [node] if linear is None else lowering.lower(node, linear, self.specs[linear.name])
        graph.nodes[:] = nodes
        graph.cleanup()


def _is_quantized(spec: LinearSpec | None) -> bool:
    return spec is not None and spec.quantized


class _Lowering:
    def __init__(self, settings: InsertQdq, index: Index) -> None:
        self._store = settings.store
        self._index = index
        self._emit = Emitter()
        self._quantizers = Quantizers(self._emit, settings.ranges)

    def lower(self, node: Node, linear: Linear, spec: LinearSpec) -> list[Node]:
        """The nodes that replace a linear's MatMul or Gemm, those of its quantizer first if it is new."""
        x = self._index.values[linear.x]
        bias = node.inputs[2] if node.op == "Gemm" and linear.bias is not None else None
        result = self._sum([self._part(*item, spec) for item in self._parts(linear, x, spec)], linear)
        if isinstance(spec.groups, PerGroup):
            result = self._sum_of_groups(linear, result, x)
        if bias is not None:
            self._emit.node("Add", f"{linear.name}/Add", [result, bias], shape_of(result) or ())
        output = node.outputs[0]
        node.inputs.clear()
        node.outputs.clear()
        self._emit.rename_last_output(output)
        return self._emit.take()

    def _parts(self, linear: Linear, x: Tensor, spec: LinearSpec) -> list[tuple[Product, Quantized]]:
        """The products and what each of them reads."""
        products = Product.of(linear, spec.groups)
        if spec.activations is not None:
            return list(zip(products, self._quantizers.of(x, spec.activations, spec.groups), strict=True))
        parts = self._quantizers.parts(x, spec.groups)
        return [(product, Quantized(part, None)) for product, part in zip(products, parts, strict=True)]

    def _part(self, product: Product, x: Quantized, spec: LinearSpec) -> Tensor:
        if spec.has_rescale:
            return self._rescaled(product, x)
        return self._weight_only(product, x.value)

    def _sum(self, parts: Sequence[Tensor], linear: Linear) -> Tensor:
        total = parts[0]
        for number, part in enumerate(parts[1:]):
            name = f"{linear.name}/walls/Add_{number}"
            total = self._emit.node("Add", name, [total, part], shape_of(total) or ())
        return total

    def _rescaled(self, product: Product, x: Quantized) -> Tensor:
        """MatMul with integers, and their scale: [.., N], or [G, T, N] in groups of a size."""
        emit, base = self._emit, product.name
        values = self._store(product.values, INT8, product.values_shape)
        scale = self._store(product.scale, FLOAT, product.scale_shape)
        s0 = emit.constant("s0", S0)
        weight = emit.node("DequantizeLinear", f"{base}/weight/DequantizeLinear", [values, s0], product.values_shape)
        result = self._product(product, x.value, weight)
        shape = shape_of(result) or ()
        result = emit.node("Mul", f"{base}/rescale/Mul", [result, scale], shape)
        return result if x.scale is None else emit.node("Mul", f"{base}/rescale/Mul_1", [result, x.scale], shape)

    def _weight_only(self, product: Product, x: Tensor) -> Tensor:
        values = self._store(product.values, INT8, product.values_shape)
        scale = self._store(product.scale, FLOAT, product.scale_shape)
        # ONNX Runtime's CPU re-encodes the weight: without a zero point it adds a scalar, and then refuses that beside
        # scales per channel; a zero point that linears share it cannot replace.
        zeros = make_constant(f"{product.name}.weight.zero_point", np.zeros(product.scale_shape, np.int8))
        where = f"{product.name}/weight/DequantizeLinear"
        weight = self._emit.node("DequantizeLinear", where, [values, scale, zeros], product.values_shape, axis=1)
        return self._product(product, x, weight)

    def _product(self, product: Product, x: Tensor, weight: Tensor) -> Tensor:
        """The product keeps the node's name, but not its value's name: the last node makes that value."""
        shape = [*(shape_of(x) or ())[:-1], product.values_shape[-1]]
        return self._emit.node("MatMul", product.node, [x, weight], shape, output=f"{product.node}/product")

    def _sum_of_groups(self, linear: Linear, parts: Tensor, x: Tensor) -> Tensor:
        """[G, T, N] summed over G, in the shape that x has but for the channels."""
        emit, base, leading = self._emit, linear.name, (shape_of(x) or ())[:-1]
        flat: list[Dim] = [*(shape_of(parts) or ())[1:]]
        total = emit.node("ReduceSum", f"{base}/groups/ReduceSum", [parts, emit.integers(0)], flat, keepdims=0)
        if len(leading) == 1:
            return total
        tokens = emit.node("Shape", f"{base}/groups/Shape", [x], [len(leading)], dtype=INT64, start=0, end=-1)
        size = [len(leading) + 1]
        target = emit.node(
            "Concat", f"{base}/groups/Concat", [tokens, emit.integers(linear.n)], size, dtype=INT64, axis=0
        )
        return emit.node("Reshape", f"{base}/groups/Reshape", [total, target], [*leading, linear.n])


def rescale(scale: NDArray[np.float32], limits: Sequence[float] | None) -> NDArray[np.float32]:
    """r of an INT8 product, float32, from the weight's scale [N] or [N, G], and the activation's ranges if static."""
    steps = np.array([1.0] if limits is None else [static_scale(limit) for limit in limits])
    return (scale.astype(np.float64) * (steps[0] if len(steps) == 1 else steps) / S0).astype(np.float32)
