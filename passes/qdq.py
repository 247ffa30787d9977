"""Insert Q/DQ: linears become INT8 GEMMs in the form that every supported runtime compiles to one.

Per token (one scale t per row, computed at run time; the Q and DQ nodes keep the constant scale 1)::

    t   = max(max|x|, tiny) / 127             float32
    xq  = QuantizeLinear(x / t, 1)            int8, shared by all linears that read x
    acc = MatMul(DQ(xq, 1), DQ(Wq, s0))       int8 × int8
    y   = acc · r · t                         float32, r[n] = scale_w[n] / s0

Per tensor: xq = QuantizeLinear(x · (1 / s_x), 1) and r[n] = scale_w[n] · s_x / s0. Weight-only: MatMul(x, DQ(Wq, scale_w)).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..export.errors import BismoothError
from ._gs import Graph, Node, Tensor, make_constant, make_node, make_variable, set_type, shape_of
from .graph import Index
from .linears import Linear
from .spec import LinearSpec, PerGroup, StaticActivation
from .weights import QMAX, S0

_FLOAT = np.dtype(np.float32)
_INT8 = np.dtype(np.int8)
TINY = float(np.finfo(np.float32).tiny) * QMAX
"""Least row maximum: 127 times the smallest normal float32, so that t is normal as well."""


@dataclass(frozen=True)
class WeightNames:
    """Names of the stored tensors of a quantized linear."""

    values: str
    scale: str

    @staticmethod
    def of(linear: Linear) -> "WeightNames":
        return WeightNames(f"{linear.name}.weight.int8", f"{linear.name}.weight.scale")


Stored = Callable[[str, np.dtype[Any], Sequence[int]], Tensor]
"""Makes the initializer for a tensor that will be stored under this name, with this type and shape."""


@dataclass(frozen=True)
class InsertQdq:
    """Lower the quantized linears of a float32 graph.

    Needs: a float32 graph; linears as ``find_linears`` gives them for it.
    Promises: every linear whose specification is quantized reads its weight as INT8; nodes keep their names.

    Attributes:
        linears: The graph's linears.
        specs: Specification by linear name; those without one stay float.
        ranges: For statically quantized activations, max|x| that maps to 127, by value name.
        stored: Makes the new initializers.
    """

    linears: Sequence[Linear]
    specs: Mapping[str, LinearSpec]
    ranges: Mapping[str, float]
    stored: Stored = field(compare=False)

    name: ClassVar[str] = "insert Q/DQ"

    def apply(self, graph: Graph) -> None:
        """Rewrite the graph in place.

        Raises:
            BismoothError: a specification that has no lowering, or a static one without a range.
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
    return spec is not None and spec.weights is not None


@dataclass(frozen=True)
class UseUnsignedActivations:
    """Quantize activations to UINT8 around 128 instead of INT8 around 0: the same numbers, another encoding.

    ONNX Runtime's CPU kernels multiply unsigned activations; it re-encodes signed ones itself, but not those that several
    linears share. TensorRT reads UINT8 otherwise, so this is for the CPU's graph alone.

    Needs: the Q/DQ pairs that ``InsertQdq`` makes. Promises: every activation is quantized as uint8 with zero point 128.
    """

    name: ClassVar[str] = "unsigned activations"

    def apply(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        zero = make_constant("quantize.zero_unsigned", np.array(128, np.uint8))
        for node in graph.nodes:
            if node.op != "QuantizeLinear":
                continue
            quantized = node.outputs[0]
            set_type(quantized, np.dtype(np.uint8), shape_of(quantized))
            node.inputs[2] = zero
            for reader in list(quantized.outputs):
                reader.inputs.append(zero)  # InsertQdq leaves the zero point of a DequantizeLinear out


@dataclass
class _Quantizer:
    """A quantized activation: its dequantized value, and the run-time scale t if there is one."""

    value: Tensor
    scale: Tensor | None


class _Lowering:
    def __init__(self, settings: InsertQdq, index: Index) -> None:
        self._settings = settings
        self._index = index
        self._quantizers: dict[tuple[str, bool], _Quantizer] = {}
        self._constants: dict[str, Tensor] = {}
        self._nodes: list[Node] = []

    def lower(self, node: Node, linear: Linear, spec: LinearSpec) -> list[Node]:
        """The nodes that replace a linear's MatMul or Gemm, those of its quantizer first if it is new."""
        assert spec.weights is not None
        if isinstance(spec.weights.granularity, PerGroup):
            raise BismoothError(f"{linear.name}: weights per group are not lowered yet. Expected per_channel weights.")
        self._nodes = []
        if spec.activations is None:
            self._lower_weight_only(node, linear)
        else:
            static = isinstance(spec.activations, StaticActivation)
            self._lower_integer(node, linear, self._quantizer(linear, static))
        return self._nodes

    def _lower_integer(self, node: Node, linear: Linear, quantizer: _Quantizer) -> None:
        names, base = WeightNames.of(linear), linear.name
        values = self._settings.stored(names.values, _INT8, (linear.k, linear.n))
        scale = self._settings.stored(names.scale, _FLOAT, (linear.n,))
        shape = [*(shape_of(quantizer.value) or ())[:-1], linear.n]
        weight = self._node(
            "DequantizeLinear",
            f"{base}/weight/DequantizeLinear",
            [values, self._constant("s0", S0)],
            [linear.k, linear.n],
        )
        product = self._matmul(node, [quantizer.value, weight], shape)
        scaled = self._node("Mul", f"{base}/rescale/Mul", [product, scale], shape)
        if quantizer.scale is not None:
            scaled = self._node("Mul", f"{base}/rescale/Mul_1", [scaled, quantizer.scale], shape)
        self._finish(node, linear, scaled, shape)

    def _lower_weight_only(self, node: Node, linear: Linear) -> None:
        names = WeightNames.of(linear)
        values = self._settings.stored(names.values, _INT8, (linear.k, linear.n))
        scale = self._settings.stored(names.scale, _FLOAT, (linear.n,))
        x = node.inputs[0]
        shape = [*(shape_of(x) or ())[:-1], linear.n]
        name = f"{linear.name}/weight/DequantizeLinear"
        weight = self._node("DequantizeLinear", name, [values, scale], [linear.k, linear.n], {"axis": 1})
        self._finish(node, linear, self._matmul(node, [x, weight], shape), shape)

    def _matmul(self, node: Node, inputs: list[Tensor], shape: Sequence[Any]) -> Tensor:
        """The product keeps the node's name; its value gets a new one, since the last node takes over the old value."""
        output = make_variable(f"{node.name}/product", _FLOAT, shape)
        self._nodes.append(make_node("MatMul", node.name, inputs, [output]))
        return output

    def _finish(self, node: Node, linear: Linear, value: Tensor, shape: Sequence[Any]) -> None:
        """Add a Gemm's own bias, and let the last node produce what the linear's node produced."""
        if node.op == "Gemm" and linear.bias is not None:
            bias = node.inputs[2]
            value = self._node("Add", f"{linear.name}/Add", [value, bias], shape)
        output = node.outputs[0]
        last = self._nodes[-1]
        node.inputs.clear()
        node.outputs.clear()
        last.outputs[0] = output

    def _quantizer(self, linear: Linear, static: bool) -> _Quantizer:
        key = (linear.x, static)
        if key not in self._quantizers:
            x = self._index.values[linear.x]
            if static:
                self._quantizers[key] = self._static(x)
            else:
                self._quantizers[key] = self._per_token(x)
        return self._quantizers[key]

    def _per_token(self, x: Tensor) -> _Quantizer:
        base, shape = f"{x.name}/per_token", list(shape_of(x) or ())
        row = [*shape[:-1], 1]
        magnitude = self._node("Abs", f"{base}/Abs", [x], shape)
        axis = self._constant("last_axis", [-1], np.dtype(np.int64))
        peak = self._node("ReduceMax", f"{base}/ReduceMax", [magnitude, axis], row, {"keepdims": 1})
        floored = self._node("Max", f"{base}/Max", [peak, self._constant("tiny", TINY)], row)
        scale = self._node("Div", f"{base}/Div", [floored, self._constant("qmax", QMAX)], row)
        unit = self._node("Div", f"{base}/Div_1", [x, scale], shape)
        return _Quantizer(self._quantize(unit, base), scale)

    def _static(self, x: Tensor) -> _Quantizer:
        limit = self._settings.ranges.get(x.name)
        if limit is None:
            raise BismoothError(
                f"{x.name}: has no range for its static scale. Expected one from calibration, got none. Run 'bismooth "
                "calibrate' on this artifact first."
            )
        base, shape = f"{x.name}/per_tensor", list(shape_of(x) or ())
        inverse = make_constant(f"{base}/inverse_scale", np.array(1.0 / static_scale(limit), np.float32))
        return _Quantizer(self._quantize(self._node("Mul", f"{base}/Mul", [x, inverse], shape), base), None)

    def _quantize(self, unit: Tensor, base: str) -> Tensor:
        shape, one, zero = list(shape_of(unit) or ()), self._constant("one", 1.0), self._constant("zero", 0, _INT8)
        name = f"{base}/QuantizeLinear"
        quantized = make_variable(name, _INT8, shape)
        self._nodes.append(make_node("QuantizeLinear", name, [unit, one, zero], [quantized]))
        return self._node("DequantizeLinear", f"{base}/DequantizeLinear", [quantized, one], shape)

    def _node(
        self,
        op: str,
        name: str,
        inputs: Sequence[Tensor],
        shape: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
    ) -> Tensor:
        output = make_variable(name, _FLOAT, shape)
        self._nodes.append(make_node(op, name, inputs, [output], attributes))
        return output

    def _constant(self, name: str, value: Any, dtype: np.dtype[Any] = _FLOAT) -> Tensor:
        if name not in self._constants:
            self._constants[name] = make_constant(f"quantize.{name}", np.array(value, dtype))
        return self._constants[name]


def static_scale(limit: float) -> float:
    """The scale that maps a range of ±``limit`` to ±127."""
    return max(limit, TINY) / QMAX


def rescale(scale: np.ndarray[Any, Any], limit: float | None) -> np.ndarray[Any, Any]:
    """r[n] of an INT8 GEMM: float32 [N] from the weight's scale, and the activation's range if it is static."""
    return (scale.astype(np.float64) * (1.0 if limit is None else static_scale(limit)) / S0).astype(np.float32)
