"""Lint rules about Q/DQ: what refuses to build, and what builds and silently does not run as INT8."""

from collections.abc import Iterator

import numpy as np
import onnx

from .lint_rule import ANY, ONNXRUNTIME, Hit, error, warning
from .lint_view import T, View, attribute, label

_INT8 = (int(T.INT8), int(T.UINT8))
_INT4 = (int(T.INT4), int(T.UINT4))
_INTEGER_OPERATORS = frozenset(
    {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "QLinearAdd"}
)
_NORMS = frozenset(
    {"RMSNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization", "Pow", "ReduceMean"}
)
_INT4_BLOCKS = (16, 32, 64, 128)


@error("zero-point")
def zero_point(view: View) -> Iterator[Hit]:
    """TensorRT quantizes symmetrically: any zero point but 0 is a parse error."""
    for quantizer in view.quantizers.values():
        if quantizer.zero_point is not None and np.any(quantizer.zero_point.astype(np.int64) != 0):
            yield (
                label(quantizer.node),
                f"has the zero point {int(quantizer.zero_point.reshape(-1)[0])}. TensorRT refuses it. Quantize "
                "symmetrically, to INT8.",
            )


@error("uint8")
def uint8(view: View) -> Iterator[Hit]:
    """UINT8 with zero point 0 is read as INT8: half of the range is lost, silently, and ONNX Runtime differs."""
    for quantizer in view.quantizers.values():
        points = quantizer.zero_point
        if quantizer.dtype == T.UINT8 and (points is None or not np.any(points)):
            yield (
                label(quantizer.node),
                "is UINT8 with zero point 0. TensorRT computes with it as INT8, silently, and loses values above 127. "
                "Use INT8, and give the zero point explicitly, since its type decides.",
            )


@error("scale-constant")
def scale_constant(view: View) -> Iterator[Hit]:
    """Scales computed at run time are refused, or turn the linear into a float one."""
    for quantizer in view.quantizers.values():
        if view.origin(quantizer.node.input[1]) not in view.constants:
            yield (
                label(quantizer.node),
                "has a scale that is computed at run time. TensorRT refuses it or runs a float GEMM. Divide the rows "
                "by their scale before QuantizeLinear, use the constant scale 1, and multiply after the MatMul.",
            )


@error("scale-value", ANY)
def scale_value(view: View) -> Iterator[Hit]:
    """A scale must be positive and finite: 0 divides by zero, a negative or non-finite one is refused."""
    for quantizer in view.quantizers.values():
        scale = None if quantizer.scale is None else quantizer.scale.astype(np.float64).reshape(-1)
        if scale is not None and not np.all(np.isfinite(scale) & (scale > 0)):
            place = int(np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))[0])
            yield (
                label(quantizer.node),
                f"has the scale {scale[place]:g} at index {place}. The result is not finite, or the build fails. "
                "Expected scales above 0: give rows of zeros a small one.",
            )


@error("activation-scale")
def activation_scale(view: View) -> Iterator[Hit]:
    """Scales per channel on an activation build, but the linear runs in float."""
    for quantizer in view.quantizers.values():
        if quantizer.is_per_channel and not quantizer.on_weight:
            yield (
                label(quantizer.node),
                "has a scale per channel on an activation. The linear runs in float, silently. Use one scale for the "
                "tensor; for scales per token divide by them before QuantizeLinear.",
            )


@error("weight-scale-axis")
def weight_scale_axis(view: View) -> Iterator[Hit]:
    """A weight's scales must run along its output channels: on the reduction axis the linear runs in float."""
    for gemm in view.integer_gemms():
        for place, quantizer in enumerate(gemm.operands):
            if not (quantizer.on_weight and quantizer.is_per_channel):
                continue
            axis = _followed_axis(view, quantizer.node.output[0], gemm.node.input[place], quantizer.axis)
            if axis is not None and axis in _reduction_axes(view, gemm.node, place):
                yield (
                    label(quantizer.node),
                    f"has its scales along axis {quantizer.axis} of the weight, over which {label(gemm.node)} sums. It "
                    "runs in float, silently. Use one scale per output channel.",
                )


def _followed_axis(view: View, start: str, end: str, axis: int) -> int | None:
    """The place of an axis of ``start`` in ``end``, through transpositions; None if something else stands between."""
    path: list[onnx.NodeProto] = []
    while end != start:
        node = view.producers[end]
        if node.op_type not in ("Transpose", "Identity"):
            return None
        path.append(node)
        end = node.input[0]
    rank = view.rank(start)
    axis = axis + rank if axis < 0 and rank is not None else axis
    for node in reversed(path):
        if node.op_type == "Transpose":
            order = list(attribute(node, "perm", list(range(rank or 2))[::-1]))
            axis = order.index(axis)
    return axis


def _reduction_axes(view: View, node: onnx.NodeProto, place: int) -> tuple[int, ...]:
    rank = view.rank(node.input[place]) or 2
    if node.op_type == "Gemm":
        transposed = bool(attribute(node, "transB" if place else "transA", 0))
        return (1 if transposed == bool(place) else 0,)
    if node.op_type == "MatMul":
        return (rank - 2,) if place and rank > 1 else (rank - 1,)
    first_spatial = tuple(range(2, rank))
    return (1, *first_spatial) if node.op_type == "Conv" else (0, *first_spatial)


@error("blocked-activation", ANY)
def blocked_with_quantized_activation(view: View) -> Iterator[Hit]:
    """Block scales on a weight whose other operand is quantized: block 0's scale is applied to all blocks."""
    for gemm in view.integer_gemms():
        for quantizer in gemm.operands:
            if quantizer.block_size:
                yield (
                    label(gemm.node),
                    f"multiplies a quantized activation by a weight in blocks of {quantizer.block_size} "
                    f"({label(quantizer.node)}). TensorRT applies the first block's scale to all, silently, and ONNX "
                    "Runtime's CPU is wrong as well. Leave the activation in float, or split the sum into one MatMul "
                    "per group.",
                )


@warning("blocked-weight")
def blocked_int8_weight(view: View) -> Iterator[Hit]:
    """INT8 weights in blocks with a float activation are dequantized whole in every run: nothing is gained."""
    for node in view.linears():
        for quantizer in map(view.dequantizer, node.input[:2]):
            is_alone = quantizer is not None and sum(view.dequantizer(x) is not None for x in node.input[:2]) == 1
            if quantizer is not None and is_alone and quantizer.block_size and quantizer.dtype in _INT8:
                yield (
                    label(node),
                    f"reads an INT8 weight in blocks of {quantizer.block_size}. A separate kernel rewrites the whole "
                    "weight in every run, and the GEMM is a float one. Use one scale per output channel, or INT4.",
                )


@error("int4-block")
def int4_block(view: View) -> Iterator[Hit]:
    """INT4 weights have a fused kernel for blocks of 16, 32, 64 and 128."""
    for quantizer in view.quantizers.values():
        if quantizer.dtype in _INT4 and quantizer.block_size not in _INT4_BLOCKS:
            yield (
                label(quantizer.node),
                f"is INT4 with block size {quantizer.block_size}. TensorRT has no kernel for it. "
                f"Expected one of {', '.join(map(str, _INT4_BLOCKS))}.",
            )


@warning("blocked-matmulnbits", ONNXRUNTIME)
def blocked_weight_in_onnxruntime(view: View) -> Iterator[Hit]:
    """ONNX Runtime turns a blocked weight into MatMulNBits, which quantizes the activations unless told not to."""
    for quantizer in view.quantizers.values():
        if quantizer.on_weight and quantizer.block_size and quantizer.node.op_type == "DequantizeLinear":
            yield (
                label(quantizer.node),
                "is a weight in blocks. ONNX Runtime's CPU quantizes the activations for it, silently. Set "
                "session.qdq_matmulnbits_accuracy_level=1.",
            )


@error("integer-operator")
def integer_operator(view: View) -> Iterator[Hit]:
    """TensorRT reads quantization from QuantizeLinear and DequantizeLinear alone."""
    for node in view.nodes:
        if node.op_type in _INTEGER_OPERATORS:
            yield (
                label(node),
                f"is a {node.op_type}. TensorRT refuses it. Write QuantizeLinear, DequantizeLinear and a float "
                "operator instead (QDQ format, static scales).",
            )


@error("int32-bias")
def int32_dequantize(view: View) -> Iterator[Hit]:
    """A bias stored as INT32 behind DequantizeLinear is a parse error."""
    for quantizer in view.quantizers.values():
        if quantizer.node.op_type == "DequantizeLinear" and quantizer.dtype == T.INT32:
            yield label(quantizer.node), "dequantizes INT32, a bias. TensorRT refuses it. Keep biases in float."


@error("weight-constant")
def weight_constant(view: View) -> Iterator[Hit]:
    """What DequantizeLinear reads must be an initializer or the output of QuantizeLinear."""
    for quantizer in view.quantizers.values():
        source = view.origin(quantizer.node.input[0])
        if quantizer.node.op_type != "DequantizeLinear" or source in view.constants:
            continue
        producer = view.producers.get(source)
        if producer is None or producer.op_type != "QuantizeLinear":
            yield (
                label(quantizer.node),
                f"dequantizes {source}, which is neither stored nor quantized in the graph. The build fails. Store "
                "weights as INT8 initializers.",
            )


@warning("quantized-residual", ANY)
def quantized_residual(view: View) -> Iterator[Hit]:
    """Quantizing a residual sum costs accuracy in every layer after it (cosine .61 against .98 in one project)."""
    for node in view.nodes:
        if node.op_type in ("Add", "Sum") and not any(value in view.constants for value in node.input):
            for quantizer in map(view.dequantizer, node.input):
                if quantizer is not None and not quantizer.on_weight:
                    yield (
                        label(node),
                        f"adds a quantized activation ({label(quantizer.node)}). The error stays in the residual "
                        "stream. Quantize inputs of linears only.",
                    )


@warning("quantized-norm", ANY)
def quantized_norm(view: View) -> Iterator[Hit]:
    """Quantizing what a norm reads costs accuracy: outliers of the residual stream take the whole range."""
    for node in view.nodes:
        quantizer = view.dequantizer(node.input[0]) if node.op_type in _NORMS else None
        if quantizer is not None and not quantizer.on_weight:
            yield (
                label(node),
                f"normalizes a quantized activation ({label(quantizer.node)}). Outliers of the residual stream take "
                "the whole range. Quantize after the norm.",
            )


@warning("quantized-attention")
def quantized_attention(view: View) -> Iterator[Hit]:
    """INT8 attention is fused only for head sizes 16, 32, 64 and up to 512 tokens; otherwise it is slower."""
    products = [gemm.node for gemm in view.integer_gemms() if not any(operand.on_weight for operand in gemm.operands)]
    fused = [node for node in view.nodes if node.op_type == "Attention" and any(map(view.dequantizer, node.input[:3]))]
    for node in (*products, *fused):
        yield (
            label(node),
            "multiplies two quantized activations, as in attention. It is fused only for head sizes 16, 32 and 64 and "
            "up to 512 tokens, and slower otherwise. Leave attention in float16.",
        )
