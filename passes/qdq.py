"""Insert Q/DQ: linears become INT8 GEMMs in the form that every supported runtime compiles to one.

Per token (one scale t per row, computed at run time; the Q and DQ nodes keep the constant scale 1)::

    t   = max(max|x|, tiny) / 127             float32
    xq  = QuantizeLinear(x / t, 1)            int8, shared by all linears that read x
    acc = MatMul(DQ(xq, 1), DQ(Wq, s0))       int8 × int8
    y   = acc · r · t                         float32, r[n] = scale_w[n] / s0

Per tensor: xq = QuantizeLinear(x · (1 / s_x), 1) and r[n] = scale_w[n] · s_x / s0.
Weight-only: MatMul(x, DQ(Wq, scale_w)).
Per group: x becomes [G, T, size] and W [G, size, N], one batched MatMul; r is [G, 1, N]; the groups are summed last.
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
from .quantizers import Quantized, Quantizers, static_scale
from .spec import LinearSpec
from .weights import S0

Store: TypeAlias = Callable[[str, np.dtype[Any], Sequence[int]], Tensor]
"""Makes the initializer for a tensor that will be stored under this name, with this type and shape."""


@dataclass(frozen=True)
class WeightNames:
    """Names of the stored tensors of a quantized linear."""

    values: str
    scale: str

    @staticmethod
    def of(linear: Linear) -> "WeightNames":
        return WeightNames(f"{linear.name}.weight.int8", f"{linear.name}.weight.scale")


@dataclass(frozen=True)
class InsertQdq:
    """Lower the quantized linears of a float32 graph.

    Needs: a float32 graph; linears as ``find_linears`` gives them for it.
    Promises: every linear whose specification is quantized reads its weight as INT8; nodes keep their names.

    Attributes:
        linears: The graph's linears.
        specs: Specification by linear name; those without one stay float.
        ranges: For statically quantized activations, max|x| that maps to 127, by value name.
        store: Makes the new initializers: per linear, Wq int8 and its scale float32 (for W8A8 as :func:`rescale` gives
            it), in the shapes [K, N] and [N], or [G, size, N] and [G, 1, N] with a scale per group.
    """

    linears: Sequence[Linear]
    specs: Mapping[str, LinearSpec]
    ranges: Mapping[str, float]
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
        if spec.activations is None:
            result = self._weight_only(node.name, linear, x)
        else:
            quantized = self._quantizers.of(x, spec.activations, spec.group)
            result = self._integer(node.name, linear, quantized, spec.group)
            if spec.group is not None:
                result = self._sum_of_groups(linear, result, x)
        if bias is not None:
            self._emit.node("Add", f"{linear.name}/Add", [result, bias], shape_of(result) or ())
        output = node.outputs[0]
        node.inputs.clear()
        node.outputs.clear()
        self._emit.rename_last_output(output)
        return self._emit.take()

    def _integer(self, name: str, linear: Linear, x: Quantized, group: int | None) -> Tensor:
        """MatMul of INT8 values and the rescale: [.., N], or [G, T, N] in groups."""
        emit, names, base = self._emit, WeightNames.of(linear), linear.name
        values = self._store(names.values, INT8, values_shape(linear, group))
        scale = self._store(names.scale, FLOAT, scale_shape(linear, group))
        s0 = emit.constant("s0", S0)
        weight = emit.node("DequantizeLinear", f"{base}/weight/DequantizeLinear", [values, s0], shape_of(values) or ())
        result = self._product(name, x.value, weight, linear.n)
        shape = shape_of(result) or ()
        result = emit.node("Mul", f"{base}/rescale/Mul", [result, scale], shape)
        return result if x.scale is None else emit.node("Mul", f"{base}/rescale/Mul_1", [result, x.scale], shape)

    def _weight_only(self, name: str, linear: Linear, x: Tensor) -> Tensor:
        names = WeightNames.of(linear)
        values = self._store(names.values, INT8, values_shape(linear, None))
        scale = self._store(names.scale, FLOAT, scale_shape(linear, None))
        # ONNX Runtime's CPU re-encodes the weight: without a zero point it adds a scalar, and then refuses that beside
        # scales per channel; a zero point that linears share it cannot replace.
        zeros = make_constant(f"{linear.name}.weight.zero_point", np.zeros(linear.n, np.int8))
        where = f"{linear.name}/weight/DequantizeLinear"
        weight = self._emit.node("DequantizeLinear", where, [values, scale, zeros], [linear.k, linear.n], axis=1)
        return self._product(name, x, weight, linear.n)

    def _product(self, name: str, x: Tensor, weight: Tensor, n: int) -> Tensor:
        """The product keeps the node's name, but not its value's name: the last node makes that value."""
        return self._emit.node("MatMul", name, [x, weight], [*(shape_of(x) or ())[:-1], n], output=f"{name}/product")

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


def values_shape(linear: Linear, group: int | None) -> tuple[int, ...]:
    """Shape of the stored INT8 weight: [K, N], or [G, size, N]."""
    return (linear.k, linear.n) if group is None else (-(-linear.k // group), group, linear.n)


def scale_shape(linear: Linear, group: int | None) -> tuple[int, ...]:
    """Shape of the stored scale: [N], or [G, 1, N]."""
    return (linear.n,) if group is None else (-(-linear.k // group), 1, linear.n)


def rescale(scale: NDArray[np.float32], limit: float | None) -> NDArray[np.float32]:
    """r of an INT8 GEMM, float32, from the weight's scale, and the activation's range if it is static."""
    return (scale.astype(np.float64) * (1.0 if limit is None else static_scale(limit)) / S0).astype(np.float32)
